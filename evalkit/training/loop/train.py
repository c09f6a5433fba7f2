"""Training from the first step to the last, shown as one stage: ``train`` for one dictionary, ``train_together`` for many.

1. A checkpoint that is there is gone on from (``together``). Where its bits may not be those of a run in one go, that is said.
2. Steps are made while members are left. Beside the progress stand FVU, L0 and share of dead features of the last step, and the
   speed (``status``).
3. A member that is dropped is said when it is.
4. Ctrl-C ends the run after the step it came in, with a checkpoint; a second one ends it at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch

from evalkit.dictionaries.registry import Vectors
from evalkit.errors import EvalkitError
from evalkit.training.data.batches import Supply, VectorSupply
from evalkit.training.loop.checkpoint import Checkpoint
from evalkit.training.loop.history import Observer
from evalkit.training.loop.interrupts import held
from evalkit.training.loop.members import Member, Result, Trained, load
from evalkit.training.loop.together import Together
from evalkit.training.loop.trainer import Step
from evalkit.training.settings.config import TrainConfig
from evalkit.util import arithmetic
from evalkit.util.progress import Progress

WORDS_S = 0.5
"""Seconds between changes of the words beside the progress."""


def status(run: Together, reports: Mapping[int, Step]) -> str:
    """The last step of the members that are still trained, with the speed: of one its values, of several lowest and highest."""
    if not run.trainers:
        return ""
    rows = torch.stack([torch.stack([*reports[i], trainer.dead.float().mean()]) for i, trainer in run.trainers.items()])
    loss, fvu, l0, dead = rows.amin(0).tolist()
    _, most_fvu, most_l0, most_dead = rows.amax(0).tolist()
    speed = run.number * run.batch / max(run.seconds, 1e-9)
    if len(run.members) == 1:
        return f"loss {loss:.4g}, FVU {fvu:.3f}, L0 {l0:.3g}, dead {dead:.1%}, {speed:,.0f} tokens/s"
    failed = f", {len(run.failures)} failed" if run.failures else ""
    return f"FVU {fvu:.2f}-{most_fvu:.2f}, L0 {l0:.3g}-{most_l0:.3g}, dead {dead:.0%}-{most_dead:.0%}, {speed:,.0f}/s{failed}"


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
            stage.advance(run.batch, status(run, reports) if due and not progress.quiet else "")
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
