"""Sparsity penalties that change on the way: a linear rise, and the annealed Lp norm (Karvonen et al. 2024, arXiv 2408.00113).

1. ``risen``: a penalty rises linearly from 0, so that features form before they are pushed down.
2. p-annealing: sum of codes^p with p falling from 1 to ``p_end`` in equal steps. A smaller p asks for fewer active features
   and shrinks the strong ones less.
3. At each step of p the penalty's weight is multiplied by (sum of codes^p) / (sum of codes^p_next), each a mean over the last
   ``RECENT`` batches, so that its size does not jump.
"""

from __future__ import annotations

import torch
from jaxtyping import Float

RECENT = 10
"""Batches that the weight's correction is measured on, as published."""

STEPS = 10
"""Values that p takes on its way."""

SMALLEST = 1e-3
"""Added to codes under the power: below it (codes are of order 1) the slope of codes^p, infinite at 0, stays finite."""


def risen(step: int, steps: int, warmup: float) -> float:
    """The share of a penalty at ``step``: ``warmup`` is a share of ``steps`` below 1, a number of steps from 1 on."""
    rise = warmup * steps if warmup < 1 else warmup
    return min(1.0, step / rise) if rise > 0 else 1.0


class Annealed(torch.nn.Module):
    """The annealed penalty; everything that changes is a buffer.

    Args:
        p_end: last exponent, 0 < p_end <= 1.
        begins: share of the run at which p leaves 1.

    Attributes:
        stage: how many steps down p has made.
        factor: what the penalty is multiplied by.
        recent: (2, RECENT) sums of codes^p and codes^p_next of the last batches; 0 where there was none.
    """

    stage: torch.Tensor
    factor: torch.Tensor
    recent: torch.Tensor

    def __init__(self, p_end: float, begins: float) -> None:
        super().__init__()
        self.p_end, self.begins = p_end, begins
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))
        self.register_buffer("factor", torch.ones(()))
        self.register_buffer("recent", torch.zeros(2, RECENT))

    def power(self, stage: int) -> float:
        """p after ``stage`` steps down."""
        return 1 - (1 - self.p_end) * min(stage, STEPS - 1) / (STEPS - 1)

    def due(self, step: int, steps: int) -> int:
        """How many steps down p has made at ``step`` of ``steps``."""
        share = (step / max(1, steps) - self.begins) / (1 - self.begins)
        return max(0, min(STEPS - 1, int(share * STEPS)))

    def forward(self, codes: Float[torch.Tensor, "*codes"], tokens: int, step: int, steps: int) -> Float[torch.Tensor, ""]:
        """The penalty of a batch of ``tokens``, a mean over them, at ``step`` of ``steps``; ``codes`` are 0 or more."""
        due = self.due(step, steps)
        if due > int(self.stage):
            old, new = self.recent.sum(1).tolist()
            if new > 0:
                self.factor *= old / new
            self.stage.fill_(due)
            self.recent.zero_()
        stage = int(self.stage)
        size = self._size(codes, self.power(stage)) / tokens
        with torch.no_grad():
            # in a short run p falls by more than one of its steps at a time
            later = self._size(codes.detach(), self.power(max(stage + 1, self.due(step + 1, steps)))) / tokens
            self.recent[:, step % RECENT] = torch.stack([size.detach(), later])
        return size * self.factor

    @staticmethod
    def _size(codes: torch.Tensor, p: float) -> torch.Tensor:
        return codes.sum() if p == 1 else ((codes + SMALLEST) ** p - SMALLEST**p).sum()
