"""Who is trained in one run: the members, what became of each, and what a checkpoint of them is recognised by.

1. A member is a name, its settings and its hook point. All members of a run have one batch size.
2. A checkpoint names each by its key, with all that determines its weights: settings, hook point, data, language model.
3. A checkpoint serves any part of the members it holds; a member that it lacks, or has with other settings, is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from evalkit.dictionaries.base import Dictionary
from evalkit.errors import EvalkitError, SuiteError
from evalkit.training.data.batches import Supply
from evalkit.training.loop.checkpoint import Checkpoint
from evalkit.training.loop.history import Observer
from evalkit.training.settings.config import TrainConfig


class Member(NamedTuple):
    """One dictionary to train."""

    name: str
    config: TrainConfig
    hook_point: str
    observe: Observer | None = None
    """Is given each row of the history; rows behind the last checkpoint of a killed run come again."""
    key: str = ""
    """What a checkpoint calls it; its name when left out."""


class Trained(NamedTuple):
    """What training one dictionary gives."""

    dictionary: Dictionary
    """Frozen, in the units of the activations."""
    history: list[dict[str, float]]
    """Up to ``ROWS`` rows: step, tokens, loss, fvu, l0 (each a mean since the row before), dead_share, tokens_per_second."""


Result = Trained | EvalkitError
"""What became of a member: the finished dictionary, or why there is none."""


def keys_of(members: Sequence[Member]) -> list[str]:
    """What a checkpoint calls each member: its key, or its name, numbered where others have it too."""
    keys: list[str] = []
    for member in members:
        plain = key = member.key or member.name or member.config.architecture
        number = 1
        while key in keys:
            number += 1
            key = f"{plain} ({number})"
        keys.append(key)
    return keys


def about(members: Sequence[Member], supplies: Mapping[str, Supply], model: str) -> dict[str, Any]:
    """What a run is: a checkpoint of another one is refused."""
    data = {hook_point: supply.identity for hook_point, supply in supplies.items()}
    settings = [{"hook_point": m.hook_point, "data": data[m.hook_point], **dataclasses.asdict(m.config)} for m in members]
    return {"model": model, "members": dict(zip(keys_of(members), settings, strict=True))}


def load(checkpoint: Checkpoint | None, members: Sequence[Member], supplies: Mapping[str, Supply], model: str) -> Any:
    """What a checkpoint of these members, or of more, holds; None where there is none.

    Raises:
        CheckpointError: it is damaged, of another evalkit or of another run.
    """
    return None if checkpoint is None else checkpoint.load(about(members, supplies, model), larger="members")


def one_batch(members: Sequence[Member], processes: int = 1) -> int:
    """The batch size of all members.

    Raises:
        SuiteError: they have several, or it cannot be shared out evenly.
    """
    sizes = sorted({member.config.batch for member in members})
    if len(sizes) != 1:
        raise SuiteError(
            f"one pass gives batches of one size, and these members want {', '.join(map(str, sizes)) or 'none'}",
            where="batch",
            fix="train members of each batch size by themselves",
        )
    if sizes[0] % processes:
        raise SuiteError(
            f"a batch of {sizes[0]} cannot be shared out evenly among {processes} processes",
            where="batch",
            fix=f"choose a multiple of {processes}",
        )
    return sizes[0]


def one_length(members: Sequence[Member]) -> None:
    """Check that all members end at the same step.

    Raises:
        SuiteError: they do not.
    """
    if len({member.config.steps for member in members}) != 1:
        raise SuiteError(
            "a checkpoint holds members that end at the same step, and these have different tokens",
            where="tokens",
            fix="train members of each length by themselves",
        )
