"""The rows of a training run: means of what its steps report.

1. Each step's loss, FVU and L0 are added to sums on the device; nothing waits for them.
2. Every so many steps the sums are read, divided, and become a row, with the share of dead features and the speed since the row
   before. Each row is handed to the observer.
3. Whether a sum is a number says whether all of its steps were.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from evalkit.training.loop.trainer import Step

ROWS = 50
"""Most rows of a history."""

Observer = Callable[[dict[str, float]], None]
"""Is given each row of the history as it is made."""


class History:
    """Means of what one member's steps report, a row every ``every`` steps.

    Args:
        steps: of the whole run.
        batch: activations a step.
        observe: is given each row.
        device: where the steps are computed.
    """

    def __init__(self, steps: int, batch: int, observe: Observer | None = None, device: str | torch.device = "cpu") -> None:
        self.steps, self.batch, self.observe = steps, batch, observe
        self.every = max(1, math.ceil(steps / ROWS))
        self.rows: list[dict[str, float]] = []
        self.sums: torch.Tensor = torch.zeros(3, dtype=torch.float64, device=device)
        """(3,) of loss, FVU and L0 since the last row."""
        self._count = 0
        self._began = 0.0
        """Seconds of the run when the row began."""

    def add(self, step: Step) -> None:
        """Note what a step reports."""
        self.sums += torch.stack(list(step))
        self._count += 1

    def due(self, number: int) -> bool:
        """Whether a row ends with step ``number`` (1 for the first)."""
        return number % self.every == 0 or number == self.steps

    def end_row(self, number: int, seconds: float, dead_share: float) -> None:
        """Make a row of the steps since the last one; waits for the device.

        Args:
            number: the step it ends with.
            seconds: time of all steps so far.
            dead_share: features that are dead now.
        """
        row = {
            "step": number,
            "tokens": number * self.batch,
            **dict(zip(Step._fields, (self.sums / self._count).tolist(), strict=True)),
            "dead_share": dead_share,
            "tokens_per_second": self._count * self.batch / max(seconds - self._began, 1e-9),
        }
        self.rows.append(row)
        self.sums.zero_()
        self._count, self._began = 0, seconds
        if self.observe is not None:
            self.observe(row)

    def state(self) -> dict[str, Any]:
        """What a later ``load_state`` needs to go on."""
        return {"rows": self.rows, "count": self._count, "sums": self.sums, "began": self._began}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. Its rows were observed already."""
        self.rows, self._count, self._began = list(state["rows"]), int(state["count"]), float(state["began"])
        self.sums.copy_(state["sums"])
