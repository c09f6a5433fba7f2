"""Training the tied autoencoder of Cunningham et al. 2023 (arXiv 2309.08600, section 2 and appendix B).

1. M starts Xavier-uniform, b at 0. Rows are divided by their length inside the forward pass; the parameter itself is free.
2. c = ReLU(M x + b), x_hat = M^T c; loss = mean over dimensions of (x - x_hat)^2 + l1 * sum of c.
3. No resampling and no auxiliary loss, as published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from evalkit.dictionaries.tied import Tied
from evalkit.training.architectures.base import TRAINABLES, Forward, Start, Trainable
from evalkit.training.sparse_ops.topk import matmul
from evalkit.training.sparse_ops.types import Compute
from evalkit.util.matmul import linear
from evalkit.util.settings import AtLeast0, Settings

SHORTEST = 1e-8
"""Row lengths are clamped to this before dividing, as in the paper's code."""


@dataclass(frozen=True)
class TiedSettings(Settings):
    """Settings of architecture = "tied"."""

    l1: AtLeast0 = 8.577e-4
    """Weight of the sparsity penalty: error + l1 * sum of codes, a token. With the error as a mean over dimensions this is the
    scale of the paper's code, whose headline value this is; times the width for the paper's equation 4. It applies to inputs as
    the trainer sees them: after the scale where ``normalise`` is true."""
    centre: bool = False
    """Subtract the geometric median before encoding. The paper does not."""


@TRAINABLES.register("tied")
class TrainableTied(Trainable):
    """M (F, D) and b (F,); the centre is fixed."""

    settings = TiedSettings
    default_lr = 1e-3
    default_error = "mean"

    def __init__(self, own: Any, start: Start, error: str | None = None, compute: Compute = "float32") -> None:
        super().__init__(own, start, error, compute)
        width = len(start.centre)
        bound = (6 / (start.features + width)) ** 0.5
        rows = torch.rand(start.features, width, generator=start.generator) * (2 * bound) - bound
        self.M = torch.nn.Parameter(rows)
        self.b = torch.nn.Parameter(torch.zeros(start.features))
        self.centre = start.centre if self.own.centre else None

    def _rows(self) -> torch.Tensor:
        return self.M / self.M.norm(dim=1, keepdim=True).clamp(min=SHORTEST)

    def main(self, x: Float[torch.Tensor, "B D"]) -> Forward:
        """Loss and statistics of one scaled batch."""
        centred = x if self.centre is None else x - self.centre
        rows, compute = self._rows(), self.compute
        if compute == "float32":
            codes = linear(centred, rows, self.b).relu()  # (B, F)
        else:
            codes = (matmul(centred, rows.T, compute) + self.b).relu()
        residual = centred - matmul(codes, rows, compute)
        active = codes.detach() > 0
        loss = self.reconstruction_loss(residual) + self.own.l1 * codes.sum(1).mean()
        return Forward(loss, residual.detach(), active.any(0), active.sum() / len(x))

    def freeze(self, scale: float, **where: Any) -> Tied:
        """Codes of x are those of scale * x over ``scale``: only the bias and the centre change."""
        centre = None if self.centre is None else self.centre / scale
        return Tied(self._rows().detach(), self.b.detach() / scale, centre, **where)
