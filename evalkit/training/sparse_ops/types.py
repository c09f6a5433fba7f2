"""What the sparse products of training take and give."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int

Compute = Literal["float32", "bfloat16"]
"""Type of the factors of matrix products."""


class Weights(NamedTuple):
    """Parameters of an autoencoder whose features are rows of both matrices."""

    W_enc: Float[torch.Tensor, "F D"]
    b_enc: Float[torch.Tensor, " F"]
    W_dec: Float[torch.Tensor, "F D"]
    b_dec: Float[torch.Tensor, " D"]
    norms: Float[torch.Tensor, " F"] | None = None
    """What pre-activations are weighted by where the largest are chosen; no gradient passes through it."""

    def rows(self, which: Int[torch.Tensor, " N"]) -> Weights:
        """The autoencoder of some features."""
        norms = None if self.norms is None else self.norms[which]
        return Weights(self.W_enc[which], self.b_enc[which], self.W_dec[which], self.b_dec, norms)


class Reconstruction(NamedTuple):
    """A reconstructed batch: its feature activations, and what they leave unexplained."""

    values: Float[torch.Tensor, "B K"]
    indices: Int[torch.Tensor, "B K"]
    residual: Float[torch.Tensor, "B D"]
    """x - x_hat."""
