"""Training a TopK autoencoder (Gao et al. 2024, arXiv 2406.04093).

1. b_dec starts at the geometric median of the data, decoder rows at random unit vectors, the encoder as the decoder's
   transpose, b_enc at 0.
2. Loss: unexplained variance + ``auxk_weight`` * how badly the ``auxk`` strongest dead features explain the residual.
3. Decoder rows stay of unit length: the gradient's part along a row is removed, and rows are rescaled after each step.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float

from evalkit.dictionaries.topk import TopK
from evalkit.training import losses, sparse
from evalkit.training.base import TRAINABLES, Forward, Start, Trainable
from evalkit.training.config import TrainConfig


@TRAINABLES.register("topk")
class TrainableTopK(Trainable):
    """W_enc (F, D) with rows as features, b_enc (F,), W_dec (F, D), b_dec (D,)."""

    default_lr = 2e-3

    def __init__(self, config: TrainConfig, start: Start) -> None:
        super().__init__(config, start)
        rows = torch.randn(start.features, len(start.centre), generator=start.generator)
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_enc = torch.nn.Parameter(rows.clone())
        self.b_enc = torch.nn.Parameter(torch.zeros(start.features))
        self.W_dec = torch.nn.Parameter(rows)
        self.b_dec = torch.nn.Parameter(start.centre.clone())
        self.auxk = len(start.centre) // 2 if config.auxk is None else config.auxk

    def forward(self, x: Float[torch.Tensor, "B D"], dead: Bool[torch.Tensor, " F"]) -> Forward:
        """Loss and statistics of one scaled batch."""
        values, indices = sparse.encode(x, self.W_enc, self.b_enc, self.b_dec, self.config.k)
        residual = x - sparse.decode(values, indices, self.W_dec) - self.b_dec
        loss = losses.unexplained(residual, self.start.variance)
        if self.auxk and self.config.auxk_weight and bool(dead.any()):
            loss = loss + self.config.auxk_weight * losses.auxiliary(self._from_dead(x, dead), residual)
        active = values.detach() > 0
        fired = torch.zeros_like(dead)
        fired[indices[active]] = True
        return Forward(loss, residual.detach(), fired, float(active.sum()) / len(x))

    def _from_dead(self, x: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
        """What the strongest dead features would write."""
        which = dead.nonzero()[:, 0]
        values, indices = sparse.encode(x, self.W_enc[which], self.b_enc[which], self.b_dec, min(self.auxk, len(which)))
        return sparse.decode(values, indices, self.W_dec[which])

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        """Remove the part of the decoder's gradient that would only change a row's length."""
        gradient = self.W_dec.grad
        if gradient is not None:
            gradient -= (gradient * self.W_dec).sum(1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def constrain_weights(self) -> None:
        """Rescale decoder rows to unit length."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    def freeze(self, scale: float, **where: Any) -> TopK:
        """Codes of x are those of scale * x over ``scale``: only the two biases change."""
        tensors = {
            "W_enc": self.W_enc.detach().T.contiguous(),
            "b_enc": self.b_enc.detach() / scale,
            "W_dec": self.W_dec.detach().clone(),
            "b_dec": self.b_dec.detach() / scale,
        }
        return TopK(tensors, self.config.k, **where)
