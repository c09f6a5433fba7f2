"""TopK encode and decode that touch F features once, in the encoder's matrix product, and only k afterwards.

1. pre = (x - centre) @ W^T + b is the one dense product, made and forgotten for some tokens at a time: wide autoencoders hold
   no (B, F) array.
2. The k largest of a row are found exactly by two short selections (``largest``): of groups by their maxima, then inside the k
   best groups, where the k largest must lie.
3. compute = 'bfloat16': the product only proposes, k and a quarter as many again; proposals are then computed and chosen from in
   float32. Values are float32 ones; a choice can differ only where the k-th value is that close to what was not proposed.
4. Backward: with d (B, k) the gradient of the kept values, row f of dW is the sum of d * (x - centre) over the tokens that kept
   f. Sorting the B * k pairs by feature turns that into bags of tokens, summed by ``embedding_bag``; the decoder's rows are bags
   of the same tokens. The centre's gradient is -(sum over tokens of d) @ W: no (B, D) product is needed.
5. Decoding sums k rows of the decoder a token, again a bag; its values' gradients are k dot products a token.

Every sum runs in a fixed order, so that equal inputs give equal bits on one machine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch.autograd.function import once_differentiable

from evalkit.dictionaries.base import SparseCodes
from evalkit.training.kernels import functions
from evalkit.training.sparse_ops.types import Compute, Reconstruction, Weights
from evalkit.util.matmul import linear, times

BLOCK = 1 << 23
"""Most pre-activations held at a time on the CPU (32 MB). Smaller blocks were slower: each packs the weights anew."""


def product(x: Float[torch.Tensor, "B D"], W: Float[torch.Tensor, "F D"], b: Float[torch.Tensor, " F"]) -> torch.Tensor:
    """x @ W^T + b, (B, F)."""
    return linear(x, W, b)


def matmul(a: torch.Tensor, b: torch.Tensor, compute: Compute) -> torch.Tensor:
    """a @ b in the type of ``a``, of factors rounded to ``compute``; so are those of its gradients."""
    return times(a, b) if compute == "float32" else (a.bfloat16() @ b.bfloat16()).to(a.dtype)


def at_pairs(
    x: Float[torch.Tensor, "B D"], W: Float[torch.Tensor, "F D"], tokens: Int[torch.Tensor, " N"], rows: Int[torch.Tensor, " N"]
) -> Float[torch.Tensor, " N"]:
    """The dot products of some tokens, ascending, with a row of ``W`` each."""
    counts = torch.bincount(tokens, minlength=len(x))
    starts = counts.cumsum(0) - counts
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(x, W, rows, starts, tokens, 0)


def largest(pre: Float[torch.Tensor, "B F"], k: int) -> Int[torch.Tensor, "B K"]:
    """Indices of the k largest of each row, in no order.

    Exact: a row is cut into groups, and an element of a group that is not among the k with the largest maxima has k elements at
    least as large before it. Groups of sqrt(F / k) make both selections equally short. Where they would not be much shorter than
    the row, and on a GPU, it is one ``topk``.
    """
    features = pre.shape[1]
    size = round((features / k) ** 0.5)
    if features < 16 * k or pre.is_cuda:
        return pre.topk(k, dim=1, sorted=False).indices
    groups = features // size  # of every groups-th element, so that maxima are those of whole slices
    best = pre[:, : size * groups].unflatten(1, (size, groups)).amax(1).topk(k, dim=1, sorted=False).indices  # (B, K)
    members = (best[:, None, :] + groups * torch.arange(size, device=pre.device)[:, None]).flatten(1)  # (B, size K)
    if size * groups < features:
        members = torch.cat([members, torch.arange(size * groups, features, device=pre.device).expand(len(pre), -1)], 1)
    return members.gather(1, pre.gather(1, members).topk(k, dim=1, sorted=False).indices)


def dots(x: Float[torch.Tensor, "B D"], W: Float[torch.Tensor, "F D"], indices: Int[torch.Tensor, "B K"]) -> torch.Tensor:
    """(B, K): the dot product of each token with each of its rows of ``W``. It is what a bag's weights get as gradient."""
    B, k = indices.shape
    starts = torch.arange(0, B * k, k, device=x.device)
    tokens = torch.arange(B, device=x.device).repeat_interleave(k)
    flat = torch.ops.aten._embedding_bag_per_sample_weights_backward(x, W, indices.flatten(), starts, tokens, 0)
    return flat.view(B, k)


class _Bags(NamedTuple):
    """The B * k pairs (token, feature), by feature."""

    order: torch.Tensor
    """(B K) places of the pairs in the flattened codes."""
    tokens: torch.Tensor
    """(B K) whose pairs they are."""
    starts: torch.Tensor
    """(F,) where each feature's pairs begin."""

    @classmethod
    def of(cls, indices: Int[torch.Tensor, "B K"], features: int) -> _Bags:
        flat = indices.flatten()
        order = flat.to(torch.int32).argsort(stable=True)
        counts = torch.bincount(flat, minlength=features)
        return cls(order, order // indices.shape[1], counts.cumsum(0) - counts)

    def sum(self, x: Float[torch.Tensor, "B D"], weights: Float[torch.Tensor, "B K"]) -> Float[torch.Tensor, "F D"]:
        """Row f: the sum of weight * token over the pairs of feature f."""
        return F.embedding_bag(self.tokens, x, self.starts, per_sample_weights=weights.flatten()[self.order], mode="sum")


def _per_feature(values: torch.Tensor, indices: torch.Tensor, features: int) -> torch.Tensor:
    """(F,) sums of ``values`` (B, K) by feature."""
    return torch.bincount(indices.flatten(), weights=values.flatten(), minlength=features).to(values.dtype)


def _select(
    centred: torch.Tensor, W: torch.Tensor, b: torch.Tensor, norms: torch.Tensor | None, k: int, compute: Compute
) -> SparseCodes:
    """The k largest pre-activations of each token, and which they are."""
    features = len(W)
    low = compute == "bfloat16"
    proposed = min(features, k + max(4, k // 4)) if low else k
    W_used, b_used = (W.bfloat16(), b.bfloat16()) if low else (W, b)
    rows = len(centred) if centred.is_cuda else max(1, BLOCK // features)
    parts = []
    for x in centred.split(rows):
        pre = product(x.bfloat16() if low else x, W_used, b_used)  # (rows, F)
        indices = largest(pre if norms is None else pre * norms, proposed)
        if low:
            exact = dots(x, W, indices) + b[indices]
            kept = (exact if norms is None else exact * norms[indices]).topk(k, dim=1, sorted=False).indices
            parts.append((exact.gather(1, kept), indices.gather(1, kept)))
        else:
            parts.append((pre.gather(1, indices), indices))
    return SparseCodes(*(torch.cat(part) if len(parts) > 1 else part[0] for part in zip(*parts, strict=True)))


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
        relu: bool,
        compute: Compute,
    ) -> Any:
        centred = x - centre
        values, indices = _select(centred, W, b, norms, k, compute)
        ctx.relu = relu
        values = values.relu_() if relu else values
        ctx.save_for_backward(centred, W, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        centred, W, values, indices = ctx.saved_tensors
        d = gradients[0] * (values > 0) if ctx.relu else gradients[0]
        dW = _Bags.of(indices, len(W)).sum(centred, d)
        db = _per_feature(d, indices, len(W))
        return None, dW, db, -(db @ W), None, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, indices: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values, indices, W)
        return F.embedding_bag(indices, W, per_sample_weights=values, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        values, indices, W = ctx.saved_tensors
        g = gradients[0].contiguous()
        d = dots(g, W, indices) if ctx.needs_input_grad[0] else None
        return d, None, _Bags.of(indices, len(W)).sum(g, values) if ctx.needs_input_grad[2] else None


class _Autoencode(torch.autograd.Function):
    """Encode and decode in one: the tokens are centred once and the pairs sorted once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor,
        W_dec: torch.Tensor,
        centre: torch.Tensor,
        norms: torch.Tensor | None,
        k: int,
        compute: Compute,
    ) -> Any:
        centred = x - centre
        values, indices = _select(centred, W, b, norms, k, compute)
        values = values.relu_()
        residual = centred - F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")
        ctx.save_for_backward(centred, W, W_dec, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices, residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        centred, W, W_dec, values, indices = ctx.saved_tensors
        g = gradients[2].contiguous()
        bags = _Bags.of(indices, len(W_dec))
        d = (gradients[0] - dots(g, W_dec, indices)) * (values > 0)
        db = _per_feature(d, indices, len(W_dec))
        dW, dW_dec = bags.sum(centred, d), bags.sum(g, values).neg_()
        return None, dW, db, dW_dec, -gradients[2].sum(0) - db @ W, None, None, None


def encode(
    x: Float[torch.Tensor, "B D"], weights: Weights, k: int, *, relu: bool = True, compute: Compute = "float32"
) -> SparseCodes:
    """The k largest codes of each token (values may be 0 where the ReLU cut them). ``x`` gets no gradient."""
    W, b, _, centre, norms = weights
    return SparseCodes(*_Encode.apply(x, W, b, centre, norms, k, relu, compute))


def decode(
    values: Float[torch.Tensor, "B K"], indices: Int[torch.Tensor, "B K"], W: Float[torch.Tensor, "F D"]
) -> Float[torch.Tensor, "B D"]:
    """Sum of ``values`` times the rows of ``W`` at ``indices``."""
    return _Decode.apply(values, indices, W)


def autoencode(x: Float[torch.Tensor, "B D"], weights: Weights, k: int, *, compute: Compute = "float32") -> Reconstruction:
    """``encode`` and ``decode``, with what they leave of ``x``."""
    W, b, W_dec, centre, norms = weights
    if x.is_cuda:
        kind = torch.bfloat16 if compute == "bfloat16" else torch.float32
        values, indices = functions.encode(x, W, b, centre, norms, k, kind)
        return Reconstruction(values, indices, x - functions.decode(values, indices, W_dec, kind) - centre)
    return Reconstruction(*_Autoencode.apply(x, W, b, W_dec, centre, norms, k, compute))


def dense_codes(x: Float[torch.Tensor, "B D"], weights: Weights, k: int, *, relu: bool = True) -> Float[torch.Tensor, "B F"]:
    """Codes with zeros in their places, for a few features, where sums over all of them are cheaper than bags of k."""
    pre = product(x - weights.b_dec, weights.W_enc, weights.b_enc)
    codes = pre.relu() if relu else pre
    if k >= pre.shape[1]:
        return codes
    chosen = (pre if weights.norms is None else pre * weights.norms).detach().topk(k, dim=1, sorted=False).indices
    return codes * torch.zeros_like(pre).scatter_(1, chosen, 1.0)


def fired(values: Float[torch.Tensor, "B K"], indices: Int[torch.Tensor, "B K"], features: int) -> torch.Tensor:
    """(F,) which features have a code above 0 anywhere in the batch."""
    strength = torch.zeros(features, dtype=values.dtype, device=values.device)
    return strength.index_add_(0, indices.flatten(), values.detach().flatten()) > 0
