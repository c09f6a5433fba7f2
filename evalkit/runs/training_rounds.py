"""What of a suite is trained together, in rounds that survive being cut short.

1. A round is every trained dictionary that is missing and can be fed from the same batches: those at the hook point that is
   asked for, with the same batch size, number of steps and order of the data. Where activations are streamed, those at the
   suite's other hook points too: one pass of the language model feeds them all.
2. One checkpoint holds them all until the last one is there; each is published in its own recipe's folder as it ends.
3. A checkpoint names its members by those folders. So what an earlier start left is found again by what it holds: members that
   were published since are passed over, the others go on from it, and a checkpoint whose members are all there is removed.
4. One that fails is noted with its message, and the others are there all the same. Where all fail, the last good checkpoint is
   kept. After an exception of unknown origin each is trained by itself, so that one that raises it fails alone.
5. Under torchrun the other processes help (``training.loop.distributed``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from evalkit.dictionaries.provenance import note
from evalkit.dictionaries.storage import CARD, save_dictionary
from evalkit.errors import EvalkitError, UnitFailed, as_unit_failed, fails_one_unit
from evalkit.runs.inputs import Inputs
from evalkit.suite import DictionarySpec
from evalkit.training.loop import distributed
from evalkit.training.loop.checkpoint import FILE, Checkpoint, CheckpointError
from evalkit.training.loop.loggers import Logged, open_log
from evalkit.training.loop.members import Member, Result, Trained
from evalkit.training.loop.train import train_together
from evalkit.training.settings.config import TrainConfig
from evalkit.util.disk import disk_failures, is_full
from evalkit.util.files import tidy
from evalkit.util.hashing import content_hash, short

MOST_PASSES = 2.0
"""Passes over the fitting text above which a training is said to repeat it."""


def repeats(config: TrainConfig, passes: float) -> str:
    """A note where a training presents its text more than ``MOST_PASSES`` times; '' elsewhere."""
    if passes <= MOST_PASSES:
        return ""
    return (
        f"trained on {config.tokens:,} activations, {passes:.1f} passes over the fitting text: it may fit that text better "
        "than any other (more fit_tokens, or [training] stream_tokens)"
    )


class Missing(NamedTuple):
    """A trained dictionary that is not there yet."""

    spec: DictionarySpec
    hook_point: str
    config: TrainConfig
    target: Path
    """Folder of its recipe."""


class Round(NamedTuple):
    """What is trained together."""

    missing: list[Missing]
    folder: Path
    """Of the checkpoint, which may be there already."""


class _Unfinished(NamedTuple):
    """What an earlier start left."""

    folder: Path
    open: frozenset[str]
    """Recipe folders of its members that are not there yet and have not failed."""


def seeded(config: TrainConfig, seed: int) -> TrainConfig:
    """``config`` with the suite's seed in all of its own."""
    order = None if config.order is None else config.order + seed
    return dataclasses.replace(config, seed=config.seed + seed, order=order)


def round_of(missing: list[Missing]) -> Round:
    """The round of the first of ``missing``: the one that its checkpoint holds, or a new one without what others hold."""
    names = {m.target.name for m in missing}
    asked, elsewhere = missing[0].target, set[str]()
    for left in unfinished(asked.parent):
        if not left.open <= names:
            continue  # some of it is not asked for now: to go on without them would lose them
        if asked.name in left.open:
            return Round([m for m in missing if m.target.name in left.open], left.folder)
        elsewhere |= left.open
    rest = [m for m in missing if m.target.name not in elsewhere]
    name = rest[0].target.name if len(rest) == 1 else f"together-{short(content_hash([m.target.name for m in rest]))}"
    return Round(rest, asked.with_name(f".{name}.training"))


def unfinished(dictionaries: Path) -> list[_Unfinished]:
    """What earlier starts left in the folder of all dictionaries, the newest first; what is of no use any more is removed."""
    files = {}
    for file in dictionaries.glob(f".*.training/{FILE}"):
        with suppress(FileNotFoundError):  # of another process that has just finished with it
            files[file] = file.stat().st_mtime_ns
    found = []
    for file in sorted(files, key=lambda file: files[file], reverse=True):
        checkpoint = Checkpoint(file.parent)
        with suppress(CheckpointError):  # said where that very round is trained
            about = checkpoint.about() or {"members": {}, "failed": []}
            names = set(about["members"]) - set(about["failed"])
            left = frozenset(name for name in names if not (dictionaries / name / CARD).exists())
            if left:
                found.append(_Unfinished(file.parent, left))
            else:
                checkpoint.discard()
    return found


def train_round(
    inputs: Inputs, work: Round, watch: Callable[[dict[str, Any]], None] | None = None
) -> dict[tuple[str, str], UnitFailed]:
    """Train and publish; what failed, by name and hook point. Where the whole round ended early, all that is not there did.

    Raises:
        CheckpointError: the checkpoint of a distributed run is damaged or of another evalkit.
        ProcessLost: another process of a distributed run died or hangs.
    """
    checkpoint = Checkpoint(work.folder, every_s=inputs.suite.training.checkpoint_s)
    failed: dict[tuple[str, str], UnitFailed] = {}
    kind = inputs.suite.training.log
    logs = [
        open_log(kind, inputs.folder, m.spec.name, m.target.name, dataclasses.asdict(m.config)) if kind else None
        for m in work.missing
    ]
    complete = True
    for m in work.missing:
        tidy(m.target)
        if said := repeats(m.config, inputs.passes(m.config, m.hook_point)):
            inputs.progress.say(f"warning: {m.spec.name} at {m.hook_point}: {said}")

    def observer(m: Missing, logged: Logged | None) -> Callable[[dict[str, float]], None]:
        def observe(row: dict[str, float]) -> None:
            if watch is not None:
                watch({"dictionary": m.spec.name, "recipe": m.target.name, "hook_point": m.hook_point, **row})
            if logged is not None:
                logged.observe(row)

        return observe

    def publish(i: int, trained: Trained) -> None:
        nonlocal complete
        m = work.missing[i]
        try:
            kept = "the last checkpoint is kept, and the same command goes on from it" if checkpoint.path.exists() else ""
            if said := repeats(m.config, inputs.passes(m.config, m.hook_point)):
                note(trained.dictionary.details, said)
            with disk_failures(m.target, kept):
                if not (m.target / CARD).exists():  # another process may have made the same dictionary meanwhile
                    save_dictionary(trained.dictionary, m.target)
        except EvalkitError as error:
            complete = False
            failed[m.spec.name, m.hook_point] = UnitFailed(error.what, where=error.where, fix=error.fix)

    members = [
        Member(m.spec.name, m.config, m.hook_point, observer(m, logged), m.target.name)
        for m, logged in zip(work.missing, logs, strict=True)
    ]
    apart = False
    try:
        results: list[Result] = _train(inputs, members, checkpoint, publish)
    except UnitFailed as error:  # no disk, no data: the checkpoint is kept
        complete, results = False, [error for _ in members]
    except Exception as error:
        if not fails_one_unit(error) or is_full(error) or distributed.current() is not None:
            raise
        complete, results = False, [as_unit_failed(error) for _ in members]
        # whose fault it is nobody knows: each is tried by itself, and those that can be trained are
        apart = len(members) > 1 and not isinstance(error, EvalkitError)
    finally:
        for logged in logs:
            if logged is not None:
                logged.close()
    if apart:
        inputs.progress.say(f"training together failed: {results[0]}\neach is trained by itself")
        for m in [m for m in work.missing if not (m.target / CARD).exists()]:
            failed |= train_round(inputs, Round([m], m.target.with_name(f".{m.target.name}.training")), watch)
        return failed
    for m, result in zip(work.missing, results, strict=True):
        if isinstance(result, EvalkitError) and not (m.target / CARD).exists():
            failed[m.spec.name, m.hook_point] = UnitFailed(result.what, where=result.where, fix=result.fix)
    if complete and any(isinstance(result, Trained) for result in results):
        checkpoint.discard()
    return failed


def _train(
    inputs: Inputs, members: list[Member], checkpoint: Checkpoint, finished: Callable[[int, Trained], None]
) -> list[Result]:
    hook_points = list(dict.fromkeys(member.hook_point for member in members))
    supplies = inputs.supplies(members[0].config, hook_points)
    identity, progress, group = inputs.model.identity, inputs.progress, distributed.current()
    if group is None:
        # float64 sums of the history are not to be had on every accelerator
        device = inputs.model.device if inputs.model.device.type == "cuda" else "cpu"
        return train_together(
            members, supplies, model=identity, progress=progress, checkpoint=checkpoint, device=device, finished=finished,
        )  # fmt: skip
    widths = {hook_point: inputs.model.width(hook_point) for hook_point in hook_points}
    return distributed.lead(
        group, members, supplies, widths, model=identity, progress=progress, checkpoint=checkpoint, finished=finished,
    )  # fmt: skip
