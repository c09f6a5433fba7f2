"""The sparse operations as dense matrix products, for where a large share of the features is active (``compute.sparse_pays``).

Codes are written into a (B, F) matrix, and the matrix unit does the rest: 2 B D F operations a product at its full rate instead
of 2 B D K at the rate of gathers. Signatures and results, to rounding, are those of ``oracles``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int

from evalkit.training.kernels.oracles import Decoded, Sums


def codes(
    values: Float[torch.Tensor, "B K"], indices: Int[torch.Tensor, "B K"], features: int, dtype: torch.dtype
) -> Float[torch.Tensor, "B F"]:
    """Codes as a matrix of ``dtype``. Index 0 with value 0, which fills empty places, adds nothing."""
    out = torch.zeros(len(values), features, dtype=dtype, device=values.device)
    return out.scatter_add_(1, indices.long(), values.to(dtype))


def decode_error(
    values: Float[torch.Tensor, "B K"],
    indices: Int[torch.Tensor, "B K"],
    W: Float[torch.Tensor, "F D"],
    x: Float[torch.Tensor, "B D"],
    b_dec: Float[torch.Tensor, " D"],
    keep: torch.dtype,
) -> Decoded:
    """``oracles.decode_error`` by two products."""
    residual = x.float() - (codes(values, indices, len(W), W.dtype) @ W).float() - b_dec.float()
    kept = residual.to(keep)
    products = (kept.to(W.dtype) @ W.T).gather(1, indices.long()).float()
    return Decoded(kept, residual.square().sum(1), products)


def sums(
    values: Float[torch.Tensor, "B K"],
    gradients: Float[torch.Tensor, "B K"],
    indices: Int[torch.Tensor, "B K"],
    features: int,
    residual: Float[torch.Tensor, "B D"],
    centred: Float[torch.Tensor, "B D"],
) -> Sums:
    """Gradients of both matrices by two products, and of the encoder bias: every row is defined here.

    Args:
        values: codes, times whatever the residual is to be multiplied by.
        gradients: of the codes before the ReLU.
    """
    decoder = codes(values, indices, features, residual.dtype).T @ residual
    back = codes(gradients, indices, features, torch.float32)
    return Sums(decoder.float(), (back.to(centred.dtype).T @ centred).float(), back.sum(0))
