"""Training from the first step to the last, shown as one stage: ``train`` for one dictionary, ``train_together`` for many.

1. A checkpoint that is there is gone on from (``together``). Where its bits may not be those of a run in one go, that is said.
2. Steps are made while members are left. Beside the progress stand loss, FVU, L0 and share of dead features of the last step,
   and the speed: of one dictionary as they are, of several from the lowest to the highest. What has no room is left out.
3. A member that is dropped is said when it is.
4. Ctrl-C ends the run after the step it came in, with a checkpoint; a second one ends it at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

from evalkit import arithmetic
from evalkit.dictionaries.registry import Vectors
from evalkit.errors import EvalkitError
from evalkit.progress import Progress
from evalkit.training.checkpoint import Checkpoint
from evalkit.training.config import TrainConfig
from evalkit.training.history import Observer
from evalkit.training.interrupts import held
from evalkit.training.members import Member, Result, Trained, load
from evalkit.training.supply import Supply, VectorSupply
from evalkit.training.together import Together
from evalkit.training.trainer import Step

WORDS_S = 0.5
"""Seconds between changes of the words beside the progress."""


class Measures(NamedTuple):
    """Where one member stands."""

    loss: float
    fvu: float
    l0: float
    dead: float


def measures(run: Together, reports: Mapping[int, Step]) -> list[Measures]:
    """Of the members that are still trained, the last step's; where there are none, how those that ended well ended."""
    trainers = run.trainers
    if trainers:
        dead = torch.stack([trainer.dead.double().mean() for trainer in trainers.values()])
        rows = torch.stack([torch.stack(list(reports[i])).to(dead) for i in trainers])
        return [Measures(*row) for row in torch.cat([rows, dead[:, None]], dim=1).tolist()]
    rows_of = [result.history[-1] for result in run.results.values() if isinstance(result, Trained)]
    return [Measures(row["loss"], row["fvu"], row["l0"], row["dead_share"]) for row in rows_of]


def brief(value: float) -> str:
    """A number in few characters: 0.034, 5.2, 64, 1,024, 1e+06."""
    return f"{value:,.0f}" if 10 <= abs(value) < 1e5 else f"{value:.2g}"


def span(values: Sequence[float], form: Callable[[float], str] = brief) -> str:
    """The lowest and the highest of some values, or the one where both read the same."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low}-{high}"


def words(found: Sequence[Measures], speed: float, members: int = 1, failed: int = 0, room: int | None = None) -> str:
    """What stands beside the progress.

    Args:
        found: of the members that are left.
        speed: activations a second.
        members: of the whole run.
        failed: of them, those that failed.
        room: characters there are, if not as many as it takes; where there are fewer, the least telling is left out.
    """
    if not found:
        return ""
    if members == 1:
        (one,) = found
        parts = {
            "loss": f"loss {one.loss:.4g}",
            "fvu": f"FVU {one.fvu:.3f}",
            "l0": f"L0 {one.l0:.3g}",
            "dead": f"dead {one.dead:.1%}",
            "speed": f"{speed:,.0f} tokens/s",
        }
    else:
        parts = {
            "fvu": f"FVU {span([m.fvu for m in found], lambda value: f'{value:.2f}')}",
            "l0": f"L0 {span([m.l0 for m in found])}",
            "dead": f"dead {span([100 * m.dead for m in found], lambda value: f'{value:.0f}')}%",
            "speed": f"{speed / 1000:.3g}k/s" if speed >= 1000 else f"{speed:.0f}/s",
            "failed": f"{failed} failed" if failed else "",
            "loss": f"loss {span([m.loss for m in found])}",
        }
    for name in ("loss", "speed", "dead", "l0"):
        if room is not None and len(", ".join(filter(None, parts.values()))) > room:
            del parts[name]
    return ", ".join(filter(None, parts.values()))


def carry_out(run: Together, progress: Progress, finished: Callable[[int, Trained], None] | None = None) -> list[Result]:
    """All steps that are left, shown as one stage; a result for each member.

    Raises:
        KeyboardInterrupt: Ctrl-C; a checkpoint was written, unless it came twice.
    """
    count, steps = len(run.members), max(member.config.steps for member in run.members)
    title = f"training {count} SAEs"
    if count == 1:
        features = "".join(f" ({trainer.start.features} features)" for trainer in run.trainers.values())
        title = f"training {run.title(0)}{features}"
    if run.number:
        progress.say(f"{title}: going on at step {run.number} of {steps}")
    if run.checkpoint is not None and run.device.type == "cpu":
        before = (run.checkpoint.about() or {}).get("arithmetic") if run.number else None
        if doubt := arithmetic.doubts(before):
            progress.say(f"{title}: {doubt}")
    for note in sorted({supply.note(steps * run.batch) for supply in run.supplies.values()} - {""}):
        progress.say(f"{title}: {note}")
    said: set[int] = set()

    def show(reports: Mapping[int, Step], room: int) -> str:
        speed = run.number * run.batch / max(run.seconds, 1e-9)
        return words(measures(run, reports), speed, count, len(run.failures), room)

    # where others wait for this process within a step, the checkpoint would come too late for them
    holding = held() if run.checkpoint is not None and run.group.size == 1 else nullcontext(lambda: False)
    with holding as interrupted, progress.stage(title, steps * run.batch, "tokens") as stage:
        stage.go_on(run.number * run.batch)
        run.conclude(finished)  # what a checkpoint held that was complete
        spoken = 0.0
        while run.running:
            reports = run.step(finished)
            if count > 1:
                for i in sorted(run.failures.keys() - said):
                    progress.say(f"{title}: {run.title(i)} at {run.members[i].hook_point} failed: {run.failures[i].what}")
                    said.add(i)
            due = time.monotonic() - spoken > WORDS_S or not run.running
            stage.advance(run.batch, show(reports, stage.room) if due and not progress.quiet else "")
            spoken = time.monotonic() if due else spoken
            if interrupted() and run.running:
                run.save()
                progress.say(f"{title}: interrupted after step {run.number} of {steps}")
                raise KeyboardInterrupt
    return [run.results[i] for i in range(count)]


def train_together(
    members: Sequence[Member],
    supplies: Mapping[str, Supply],
    *,
    model: str,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
    device: str | torch.device = "cpu",
    finished: Callable[[int, Trained], None] | None = None,
) -> list[Result]:
    """Train several dictionaries on one pass over the data, or go on with them.

    Args:
        members: what is trained; all of one batch size.
        supplies: batches by hook point; closed at the end.
        model: identity of the language model.
        progress: where the stage is shown.
        checkpoint: where the state of all is kept now and then. It is left there at the end: discard it once what was finished
            is safe. One that holds more members serves these; from its next writing on it holds these alone.
        device: where the steps are computed.
        finished: is given the number and the result of each member as it ends well.

    Returns:
        A result for each member, in order: the dictionary with its history, or the error that ended it.

    Raises:
        SuiteError: members of different batch sizes; with a checkpoint, of different lengths.
        DataExhausted: the data may not be repeated and gave out.
        CheckpointError: the checkpoint is damaged, of another evalkit or of another run.
        DiskFailed: a checkpoint could not be written.
        KeyboardInterrupt: Ctrl-C.
    """
    try:
        saved = load(checkpoint, members, supplies, model)
        run = Together(members, supplies, model=model, checkpoint=checkpoint, device=device, saved=saved)
        return carry_out(run, progress, finished)
    finally:
        for supply in supplies.values():
            supply.close()


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
        CheckpointError: the checkpoint is damaged, of another evalkit or of another run.
        DictionaryError: the data hold NaN or infinities, or do not vary.
        TrainingFailed: the loss became NaN or infinite.
        DataExhausted: the data may not be repeated and gave out.
        DiskFailed: a checkpoint could not be written.
        SuiteError: too few features for the architecture's settings.
    """
    supply = x if isinstance(x, Supply) else VectorSupply(x, config.batch, config.data_seed, where=hook_point)
    members = [Member(name, config, hook_point, observe)]
    (result,) = train_together(
        members, {hook_point: supply}, model=model, progress=progress, checkpoint=checkpoint, device=device
    )
    if isinstance(result, EvalkitError):
        raise result
    return result
