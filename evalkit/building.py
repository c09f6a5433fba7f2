"""What of a suite is trained together: every trained dictionary that is missing and can be fed from the same batches.

1. Those at the hook point that is asked for, with the same batch size, number of steps and order of the data. Where activations
   are streamed, those at the suite's other hook points too: one pass of the language model feeds them all.
2. One checkpoint holds them all until the last one is finished; each is published in its own recipe's folder.
3. One that fails is noted with its message, and the others are there all the same.
4. Under torchrun the other processes help (``training.distributed``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from evalkit.dictionaries.storage import save_dictionary
from evalkit.errors import EvalkitError, UnitFailed
from evalkit.hashing import content_hash, short
from evalkit.suite import DictionarySpec
from evalkit.training import distributed
from evalkit.training.checkpoint import Checkpoint, writing
from evalkit.training.config import TrainConfig
from evalkit.training.loop import Trained
from evalkit.training.observers import Logged
from evalkit.training.together import Member, Result, train_together

if TYPE_CHECKING:
    from evalkit.bench import Workbench


class Missing(NamedTuple):
    """A trained dictionary that is not there yet."""

    spec: DictionarySpec
    hook_point: str
    config: TrainConfig
    target: Path
    """Folder of its recipe."""


def seeded(config: TrainConfig, seed: int) -> TrainConfig:
    """``config`` with the suite's seed in all of its own."""
    order = None if config.order is None else config.order + seed
    return dataclasses.replace(config, seed=config.seed + seed, order=order)


def companions(bench: Workbench, spec: DictionarySpec, hook_point: str) -> list[Missing]:
    """What is trained when ``spec`` at ``hook_point`` is: itself first."""

    def feed(config: TrainConfig) -> tuple[int, int, int]:
        return config.batch, config.steps, config.data_seed

    hook_points = [hook_point]
    if bench.suite.training.stream:
        hook_points += [other for other in bench.suite.hook_points if other != hook_point]
    found = []
    for here in hook_points:
        for other in [spec, *(entry for entry in bench.suite.dictionaries if entry is not spec)]:
            if other.source != "train" or feed(other.settings) != feed(spec.settings):
                continue
            asked = (other.name, here) == (spec.name, hook_point)
            if asked or (bench.wants(other, here) and not bench.is_built(other, here)):
                config = seeded(other.settings, bench.suite.suite.seed)
                found.append(Missing(other, here, config, bench.recipe_folder(other, here)))
    return found


def train_missing(bench: Workbench, missing: list[Missing]) -> dict[tuple[str, str], UnitFailed]:
    """Train and publish; what failed, by name and hook point.

    Raises:
        ProcessLost: another process of a distributed run died or hangs.
        DataExhausted, DiskFailed: nothing more can be trained; the checkpoint is kept.
    """
    folder = missing[0].target.parent / f".together-{short(content_hash([m.target.name for m in missing]))}.training"
    checkpoint = Checkpoint(folder, every_s=bench.suite.training.checkpoint_s)
    failed: dict[tuple[str, str], UnitFailed] = {}
    logs = [bench.open_log(m.spec, m.config, m.target.name) for m in missing]

    def observer(m: Missing, logged: Logged | None) -> Callable[[dict[str, float]], None]:
        return lambda row: bench.observe(m.spec, m.hook_point, m.target.name, row, logged)

    def publish(i: int, trained: Trained) -> None:
        m = missing[i]
        try:
            with writing(m.target, "run the same command again"):
                save_dictionary(trained.dictionary, m.target)
        except EvalkitError as error:
            failed[m.spec.name, m.hook_point] = UnitFailed(error.what, where=error.where, fix=error.fix)

    members = [Member(m.spec.name, m.config, m.hook_point, observer(m, logged)) for m, logged in zip(missing, logs, strict=True)]
    try:
        results = _train(bench, members, checkpoint, publish)
    finally:
        for logged in logs:
            if logged is not None:
                logged.close()
    for m, result in zip(missing, results, strict=True):
        if isinstance(result, EvalkitError):
            failed[m.spec.name, m.hook_point] = UnitFailed(result.what, where=result.where, fix=result.fix)
    checkpoint.discard()
    return failed


def _train(
    bench: Workbench, members: list[Member], checkpoint: Checkpoint, finished: Callable[[int, Trained], None]
) -> list[Result]:
    hook_points = list(dict.fromkeys(member.hook_point for member in members))
    supplies = bench.supplies(members[0].config, hook_points)
    identity, progress, group = bench.model.identity, bench.progress, distributed.current()
    if group is None:
        # float64 sums of the history are not to be had on every accelerator
        device = bench.model.device if bench.model.device.type == "cuda" else "cpu"
        return train_together(
            members, supplies, model=identity, progress=progress, checkpoint=checkpoint, device=device, finished=finished
        )
    widths = {hook_point: bench.model.width(hook_point) for hook_point in hook_points}
    return distributed.lead(
        group, members, supplies, widths, model=identity, progress=progress, checkpoint=checkpoint, finished=finished
    )
