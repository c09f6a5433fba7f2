"""The training loop: data in, frozen dictionary and history out.

1. A seeded sample of the data gives scale, centre and variance (``trainer.begin``).
2. Batches of a ``Supply`` are fed to a ``Trainer``; every few steps a row of means goes into the history and to the observers.
3. Losses are checked: NaN or infinity ends the run with the step and advice. On the CPU each is looked at; elsewhere their sum
   is, every ``WATCH`` steps, so that nothing waits for a single one.
4. With a ``Checkpoint``, everything that a later start needs is saved now and then and at the end: weights, moments, counters,
   history, and where the supply stands. The last one with finite weights is kept whatever ends the run.

On the CPU the same seed, data and number of threads give bit-identical weights, in one go or in several.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.registry import Vectors
from evalkit.progress import Progress, Stage
from evalkit.training.base import Start
from evalkit.training.checkpoint import Checkpoint
from evalkit.training.config import TrainConfig, TrainingFailed
from evalkit.training.supply import DataExhausted, Supply, VectorSupply
from evalkit.training.trainer import SAMPLE, Beginning, Step, Trainer, begin

ROWS = 50
"""Most rows of a history."""
WATCH = 20
"""Steps between looks at the loss where looking at it would make the accelerator wait."""
WORDS_S = 0.5
"""Seconds between changes of the words beside the progress."""

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
        self.seconds = 0.0
        """Time of the steps so far, those before a checkpoint included."""
        self._sums: torch.Tensor | None = None
        self._count = 0
        self._row_s = 0.0
        self._since = time.perf_counter()

    def add(self, number: int, step: Step, trainer: Trainer) -> None:
        """Note step ``number`` (1 for the first)."""
        values = torch.stack([value.double() for value in step])
        self._sums = values if self._sums is None else self._sums + values
        self._count += 1
        self._clock()
        if number % self.every and number != self.steps:
            return
        row = {
            "step": number,
            "tokens": number * self.batch,
            **dict(zip(Step._fields, (self._sums / self._count).tolist(), strict=True)),
            "dead_share": float(trainer.dead.float().mean()),
            "tokens_per_second": self._count * self.batch / max(self._row_s, 1e-9),
        }
        self.rows.append(row)
        if self.observe is not None:
            self.observe(row)
        self._sums, self._count, self._row_s = None, 0, 0.0

    def _clock(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._row_s += now - self._since
        self._since = now

    @property
    def finite(self) -> bool:
        """Whether the losses since the last row are numbers."""
        return self._sums is None or bool(torch.isfinite(self._sums[0]))

    def state(self) -> dict[str, Any]:
        """What a later ``load_state`` needs to go on."""
        return {"rows": self.rows, "seconds": self.seconds, "row_s": self._row_s, "count": self._count, "sums": self._sums}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from ``state``. Its rows were observed already."""
        self.rows, self.seconds, self._row_s = list(state["rows"]), float(state["seconds"]), float(state["row_s"])
        self._count = int(state["count"])
        self._sums = None if state["sums"] is None else state["sums"].to(device)
        self._since = time.perf_counter()


def failed(what: str, config: TrainConfig, where: str) -> TrainingFailed:
    """The error of a run that diverged, with advice."""
    fix = f"lower lr (now {config.peak_lr:g}), or raise warmup; check the activations for extreme values"
    return TrainingFailed(f"training diverged: {what}", where=where, fix=fix)


def check_loss(step: Step, number: int, config: TrainConfig, where: str) -> None:
    """Raise TrainingFailed where the loss of step ``number`` is NaN or infinite."""
    loss = float(step.loss)
    if not math.isfinite(loss):
        raise failed(f"the loss became {loss} at step {number} of {config.steps}", config, where)


def check_end(trainer: Trainer, where: str) -> None:
    """Raise TrainingFailed where the last step left weights that are no numbers."""
    if not trainer.finite:
        raise failed(f"the last of {trainer.config.steps} steps left NaN or infinite weights", trainer.config, where)


class Run:
    """A training run as it stands: what a checkpoint holds, and what goes on from one.

    Args:
        config: the run's settings.
        supply: where its batches come from.
        hook_point: where the activations were read.
        model: identity of the language model.
        name: what the dictionary is called, for its details.
        checkpoint: where its state is kept; nowhere when left out.
        observe: is given each row of the history.
        device: where it is trained.

    Raises:
        CheckpointError: there is a checkpoint, and it is damaged or of another run.
        DictionaryError: the data hold NaN or infinities, or do not vary.
        SuiteError: too few features for the architecture's settings, or too few data where they may not be repeated.
    """

    def __init__(
        self,
        config: TrainConfig,
        supply: Supply,
        *,
        hook_point: str,
        model: str,
        name: str = "",
        checkpoint: Checkpoint | None = None,
        observe: Observer | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config, self.supply, self.checkpoint, self.name = config, supply, checkpoint, name
        self.hook_point, self.model = hook_point, model
        self.where = f"{config.architecture} at {hook_point}"
        self.note = supply.note(config.steps * config.batch)
        self.history = History(config.steps, config.batch, observe)
        saved = checkpoint.load(self._about()) if checkpoint is not None else None
        if saved is None:
            self.trainer = Trainer(config, begin(config, supply.sample(SAMPLE, config.data_seed), hook_point), device)
        else:
            self._go_on(saved, device)

    def _about(self) -> dict[str, Any]:
        data = {"data": self.supply.identity, "hook_point": self.hook_point, "model": self.model}
        return {**data, **dataclasses.asdict(self.config)}

    def _go_on(self, saved: dict[str, Any], device: str | torch.device) -> None:
        generator = torch.Generator().manual_seed(self.config.seed)
        start = Start(**saved["start"], generator=generator)
        self.trainer = Trainer(self.config, Beginning(saved["trainer"]["scale"], start), device)
        generator.set_state(saved["generator"])
        self.trainer.load_state(saved["trainer"])
        self.history.load_state(saved["history"], self.trainer.device)
        self.supply.load_state(saved["supply"])

    def save(self) -> None:
        """Write a checkpoint, if the weights are numbers: the last good one is worth more than a bad one."""
        if self.checkpoint is None or not self.trainer.finite:
            return
        start = self.trainer.start._asdict()
        state = {
            "generator": start.pop("generator").get_state(),
            "start": start,
            "trainer": self.trainer.state(),
            "history": self.history.state(),
            "supply": self.supply.state(),
        }
        self.checkpoint.save(self._about(), state)

    def step(self) -> Step:
        """One step; writes a checkpoint where one is due.

        Raises:
            TrainingFailed: the loss became NaN or infinite.
            DataExhausted: there is no batch left; a checkpoint is written first.
            DiskFailed: the checkpoint cannot be written; the one before is kept.
        """
        number = self.trainer.steps_done + 1
        try:
            batch = self.supply.next()
        except DataExhausted:
            self.save()
            raise
        step = self.trainer.step(batch)
        if self.trainer.device.type == "cpu":
            check_loss(step, number, self.config, self.where)
        self.history.add(number, step, self.trainer)
        due = self.checkpoint is not None and self.checkpoint.due(number)
        if (due or number % WATCH == 0) and not self.history.finite:
            raise failed(f"the loss became NaN or infinite by step {number} of {self.config.steps}", self.config, self.where)
        if due:
            self.save()
        return step

    def finish(self) -> Trained:
        """The frozen dictionary of a run whose steps are all done.

        Raises:
            TrainingFailed: its weights are no numbers.
        """
        check_end(self.trainer, self.where)
        self.save()
        last = self.history.rows[-1]
        end = {key: last[key] for key in ("loss", "fvu", "l0", "dead_share")}
        speed = self.config.steps * self.config.batch / max(self.history.seconds, 1e-9)
        named = {"name": self.name} if self.name else {}
        details = {**named, **self.supply.details(), "end": end, "seconds": self.history.seconds, "tokens_per_second": speed}
        return Trained(self.trainer.freeze(hook_point=self.hook_point, model=self.model, details=details), self.history.rows)


def train(
    config: TrainConfig,
    x: Vectors | Supply,
    *,
    hook_point: str,
    model: str,
    progress: Progress,
    name: str = "",
    observe: Observer | None = None,
    checkpoint: Checkpoint | None = None,
    device: str | torch.device = "cpu",
) -> Trained:
    """Train a dictionary on activation vectors, or go on with it where ``checkpoint`` holds an unfinished run.

    Args:
        config: the run's settings.
        x: (N, D) float32 activations, in memory or memory-mapped, only rows that take part in metrics; or a ``Supply`` of them.
        hook_point: where ``x`` was read.
        model: identity of the language model ``x`` comes from.
        progress: where the stage is shown.
        name: what the stage calls the dictionary; its architecture when left out.
        observe: is given each row of the history; rows behind the last checkpoint of a killed run come again.
        checkpoint: where the state is kept now and then. It is left there at the end: discard it once the dictionary is safe.
        device: where the steps are computed.

    Raises:
        CheckpointError: the checkpoint is damaged or of another run.
        DictionaryError: the data hold NaN or infinities, or do not vary.
        TrainingFailed: the loss became NaN or infinite.
        DataExhausted: the data may not be repeated and gave out.
        DiskFailed: a checkpoint could not be written.
        SuiteError: too few features for the architecture's settings.
    """
    supply = x if isinstance(x, Supply) else VectorSupply(x, config.batch, config.data_seed, where=hook_point)
    named = {"hook_point": hook_point, "model": model, "name": name}
    try:
        run = Run(config, supply, checkpoint=checkpoint, observe=observe, device=device, **named)
        title = f"training {name or config.architecture} ({run.trainer.start.features} features)"
        if run.trainer.steps_done:
            progress.say(f"{title}: going on at step {run.trainer.steps_done} of {config.steps}")
        if run.note:
            progress.say(f"{title}: {run.note}")
        with progress.stage(title, config.steps * config.batch, "tokens") as stage:
            stage.advance(run.trainer.steps_done * config.batch)
            _steps(run, stage)
        return run.finish()
    finally:
        supply.close()


def _steps(run: Run, stage: Stage) -> None:
    """All steps that are left."""
    spoken = 0.0
    for _ in range(run.trainer.steps_done, run.config.steps):
        step = run.step()
        words = ""
        if time.monotonic() - spoken > WORDS_S:
            spoken = time.monotonic()
            dead = float(run.trainer.dead.float().mean())
            speed = run.trainer.steps_done * run.config.batch / max(run.history.seconds, 1e-9)
            words = f"loss {float(step.loss):.4g}, FVU {float(step.fvu):.3f}, L0 {float(step.l0):.3g}, dead {dead:.1%}, "
            words += f"{speed:,.0f} tokens/s"
        stage.advance(run.config.batch, words)
