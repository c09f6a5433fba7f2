"""The kernels as differentiable functions: ``sparse.encode`` and ``sparse.decode`` for a GPU, for any architecture.

1. ``encode``: one dense product in the compute type and the k largest by ``ops.select``; backward sums rows by feature.
2. ``decode``: a bag of rows; backward is the products with the same rows and sums by feature.
3. Where so many features are active that dense products are faster (``compute.sparse_pays``), decoding and gradients use those.

Gradients come as float32 and are exact for the rounded factors; the rounding itself counts as the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int

from evalkit.dictionaries.base import SparseCodes
from evalkit.training.kernels import dense, ops
from evalkit.training.kernels.dispatch import sparse_pays


def _tokens(indices: torch.Tensor) -> torch.Tensor:
    """The token of each pair (B K,), int32."""
    B, k = indices.shape
    return torch.arange(B, dtype=torch.int32, device=indices.device).repeat_interleave(k, output_size=B * k)


def _defined(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Rows of features without pairs hold whatever was in memory: 0 in a gradient that others will read."""
    return rows.masked_fill_((counts == 0)[:, None], 0.0)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor,
        centre: torch.Tensor,
        norms: torch.Tensor | None,
        k: int,
        compute: torch.dtype,
    ) -> Any:
        centred = (x - centre).to(compute)
        rounded = W.to(compute)
        values, indices = ops.select(centred @ rounded.T, b, k, norms)
        ctx.save_for_backward(centred, W, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        centred, W, values, indices = ctx.saved_tensors
        features, k = W.shape[0], values.shape[1]
        live = values > 0
        d = torch.where(live, gradients[0].float(), 0.0)
        if sparse_pays(k, features, W.device):
            pairs = ops.by_feature(indices.flatten(), live.flatten(), features)
            rows, flat = _tokens(indices), d.flatten()
            sums = ops.segment_sums(pairs, flat, rows, centred, flat, rows, centred)
            dW, db = _defined(sums.decoder, pairs.counts), sums.bias
        else:
            back = dense.codes(d, indices, features, torch.float32)
            dW, db = (back.to(centred.dtype).T @ centred).float(), back.sum(0)
        assert db is not None
        return None, dW, db, -(db @ W.float()), None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, indices: torch.Tensor, W: torch.Tensor, compute: torch.dtype) -> Any:
        rounded = W.to(compute)
        ctx.save_for_backward(values, indices, rounded)
        if sparse_pays(values.shape[1], len(W), W.device):
            return ops.decode(values, indices, rounded)
        return (dense.codes(values, indices, len(W), compute) @ rounded).float()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        values, indices, W = ctx.saved_tensors
        gradient, features = gradients[0].to(W.dtype), len(W)
        if not sparse_pays(values.shape[1], features, W.device):
            d = (gradient @ W.T).gather(1, indices.long()).float()
            return d, None, (dense.codes(values, indices, features, W.dtype).T @ gradient).float(), None
        pairs = ops.by_feature(indices.flatten(), (values != 0).flatten(), features)
        sums = ops.segment_sums(pairs, values.flatten(), _tokens(indices), gradient)
        return ops.dots(gradient, indices, W), None, _defined(sums.decoder, pairs.counts), None


def encode(
    x: Float[torch.Tensor, "B D"],
    W: Float[torch.Tensor, "F D"],
    b: Float[torch.Tensor, " F"],
    centre: Float[torch.Tensor, " D"],
    norms: Float[torch.Tensor, " F"] | None,
    k: int,
    compute: torch.dtype = torch.float32,
) -> SparseCodes:
    """The k largest codes of each token, values (B, k) float32 and indices (B, k) int64. ``x`` gets no gradient.

    Args:
        norms: features' weights in the choice, not in the values.
        compute: type of the factors of the dense product; sums are float32.
    """
    values, indices = _Encode.apply(x, W, b, centre, norms, k, compute)
    return SparseCodes(values, indices.long())


def decode(
    values: Float[torch.Tensor, "B K"],
    indices: Int[torch.Tensor, "B K"],
    W: Float[torch.Tensor, "F D"],
    compute: torch.dtype = torch.float32,
) -> Float[torch.Tensor, "B D"]:
    """Sum of ``values`` times the rows of ``W``, rounded to ``compute``, at ``indices``: float32."""
    result: torch.Tensor = _Decode.apply(values, indices, W, compute)
    return result
