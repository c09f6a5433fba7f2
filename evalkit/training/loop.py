"""The training loop: data in, frozen dictionary and history out.

1. A seeded sample of the data gives scale, centre and variance (``trainer.begin``).
2. Shuffled batches are fed to a ``Trainer``; every few steps a row of means goes into the history and to the observers.
3. Every loss is checked: NaN or infinity ends the run with the step and advice, and nothing is returned.

On the CPU the same seed, data and number of threads give bit-identical weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.fitting import sample
from evalkit.dictionaries.registry import Vectors
from evalkit.errors import DictionaryError
from evalkit.progress import Progress
from evalkit.training.config import TrainConfig, TrainingFailed
from evalkit.training.supply import batches
from evalkit.training.trainer import SAMPLE, Step, Trainer, begin

ROWS = 50
"""Most rows of a history."""

Observer = Callable[[dict[str, float]], None]
"""Is given each row of the history as it is made."""


class Trained(NamedTuple):
    """What a training run gives."""

    dictionary: Dictionary
    """Frozen, in the units of the activations."""
    history: list[dict[str, float]]
    """Up to ``ROWS`` rows: step, tokens, loss, fvu, l0 (each a mean since the row before), dead_share, tokens_per_second."""


class History:
    """Means of what steps report, a row every ``every`` steps."""

    def __init__(self, steps: int, batch: int, observe: Observer | None = None) -> None:
        self.steps, self.batch, self.observe = steps, batch, observe
        self.every = max(1, math.ceil(steps / ROWS))
        self.rows: list[dict[str, float]] = []
        self._sums: torch.Tensor | None = None
        self._count, self._since = 0, time.perf_counter()

    def add(self, number: int, step: Step, trainer: Trainer) -> None:
        """Note step ``number`` (1 for the first)."""
        values = torch.stack([value.double() for value in step])
        self._sums = values if self._sums is None else self._sums + values
        self._count += 1
        if number % self.every and number != self.steps:
            return
        now = time.perf_counter()
        row = {
            "step": number,
            "tokens": number * self.batch,
            **dict(zip(Step._fields, (self._sums / self._count).tolist(), strict=True)),
            "dead_share": float(trainer.dead.float().mean()),
            "tokens_per_second": self._count * self.batch / max(now - self._since, 1e-9),
        }
        self.rows.append(row)
        if self.observe is not None:
            self.observe(row)
        self._sums, self._count, self._since = None, 0, now


def check_data(x: Vectors, where: str) -> None:
    """Raise DictionaryError unless ``x`` holds at least two rows."""
    if x.ndim != 2 or x.shape[0] < 2:
        raise DictionaryError(
            f"training needs at least two activation vectors as rows, not an array of shape {tuple(x.shape)}",
            where=where,
            fix="give it more fitting text",
        )


def check_loss(step: Step, number: int, config: TrainConfig, where: str) -> None:
    """Raise TrainingFailed where the loss of step ``number`` is NaN or infinite."""
    loss = float(step.loss)
    if not math.isfinite(loss):
        raise TrainingFailed(
            f"training diverged: the loss became {loss} at step {number} of {config.steps}",
            where=where,
            fix=f"lower lr (now {config.peak_lr:g}), or raise warmup; check the activations for extreme values",
        )


def check_end(trainer: Trainer, where: str) -> None:
    """Raise TrainingFailed where the last step left weights that are no numbers."""
    if not trainer.finite:
        raise TrainingFailed(
            f"training diverged: the last of {trainer.config.steps} steps left NaN or infinite weights",
            where=where,
            fix=f"lower lr (now {trainer.config.peak_lr:g}); check the activations for extreme values",
        )


def train(
    config: TrainConfig,
    x: Vectors,
    *,
    hook_point: str,
    model: str,
    progress: Progress,
    name: str = "",
    observe: Observer | None = None,
) -> Trained:
    """Train a dictionary on activation vectors.

    Args:
        config: the run's settings.
        x: (N, D) float32 activations, in memory or memory-mapped; only rows that take part in metrics.
        hook_point: where ``x`` was read.
        model: identity of the language model ``x`` comes from.
        progress: where the stage is shown.
        name: what the stage calls the dictionary; its architecture when left out.
        observe: is given each row of the history.

    Raises:
        DictionaryError: the data hold NaN or infinities, or do not vary.
        TrainingFailed: the loss became NaN or infinite.
        SuiteError: too few features for the architecture's settings.
    """
    check_data(x, hook_point)
    where = f"{config.architecture} at {hook_point}"
    trainer = Trainer(config, begin(config, sample(x, SAMPLE, config.data_seed), hook_point))
    history = History(config.steps, config.batch, observe)
    supply = batches(x, config.batch, config.data_seed)
    title = f"training {name or config.architecture} ({trainer.start.features} features)"
    with progress.stage(title, config.steps * config.batch, "tokens") as stage:
        for number in range(1, config.steps + 1):
            step = trainer.step(next(supply))
            check_loss(step, number, config, where)
            history.add(number, step, trainer)
            stage.advance(config.batch, f"FVU {float(step.fvu):.3f}")
    check_end(trainer, where)
    last = history.rows[-1]
    details = {"vectors": int(x.shape[0]), "end": {key: last[key] for key in ("loss", "fvu", "l0", "dead_share")}}
    return Trained(trainer.freeze(hook_point=hook_point, model=model, details=details), history.rows)
