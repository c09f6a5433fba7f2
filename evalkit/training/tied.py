"""Training the tied autoencoder of Cunningham et al. 2023 (arXiv 2309.08600, section 2 and appendix B).

1. M starts Xavier-uniform, b at 0. Rows are divided by their length inside the forward pass; the parameter itself is free.
2. c = ReLU(M x + b), x_hat = M^T c; loss = mean over dimensions of (x - x_hat)^2 + l1 * sum of c.
3. No resampling and no auxiliary loss, as published.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float

from evalkit.dictionaries.tied import Tied
from evalkit.training import losses
from evalkit.training.base import TRAINABLES, Forward, Start, Trainable
from evalkit.training.config import TrainConfig

SHORTEST = 1e-8
"""Row lengths are clamped to this before dividing, as in the paper's code."""


@TRAINABLES.register("tied")
class TrainableTied(Trainable):
    """M (F, D) and b (F,); the centre is fixed."""

    default_lr = 1e-3

    def __init__(self, config: TrainConfig, start: Start) -> None:
        super().__init__(config, start)
        width = len(start.centre)
        bound = (6 / (start.features + width)) ** 0.5
        rows = torch.rand(start.features, width, generator=start.generator) * (2 * bound) - bound
        self.M = torch.nn.Parameter(rows)
        self.b = torch.nn.Parameter(torch.zeros(start.features))
        self.centre = start.centre if config.centre else None

    def _rows(self) -> torch.Tensor:
        return self.M / self.M.norm(dim=1, keepdim=True).clamp(min=SHORTEST)

    def forward(self, x: Float[torch.Tensor, "B D"], dead: Bool[torch.Tensor, " F"]) -> Forward:
        """Loss and statistics of one scaled batch."""
        centred = x if self.centre is None else x - self.centre
        rows = self._rows()
        codes = torch.addmm(self.b, centred, rows.T).relu()  # (B, F)
        residual = centred - codes @ rows
        active = codes.detach() > 0
        return Forward(losses.l1(residual, codes, self.config.l1), residual.detach(), active.any(0), float(active.sum()) / len(x))

    def freeze(self, scale: float, **where: Any) -> Tied:
        """Codes of x are those of scale * x over ``scale``: only the bias and the centre change."""
        centre = None if self.centre is None else self.centre / scale
        return Tied(self._rows().detach(), self.b.detach() / scale, centre, **where)
