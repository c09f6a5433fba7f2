"""Which fields of a writer's files were used, and what is said of the others.

1. ``Fields`` is a config, or the tensors of a file, that notes every name it is asked for. A name that no reader asked for had
   no influence on the dictionary.
2. A format says of the names it does not use what they are: facts of how the dictionary was made (``Format.facts``), or
   settings of the training alone (``Format.training``, patterns).
3. ``account`` sorts the names of one import: facts go to ``details["made_with"]``, training is passed over, and every other
   name is named in ``details["ignored"]``. A field that is null or empty says nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from evalkit.dictionaries.base import Dictionary

LONGEST = 120
"""Letters of a value that are kept in the details."""

TRAINING = (
    r"(lr|l0|l1|lp|adam|sgd|beta|ema|aux|auxk|wandb|log|logger|logging|eval|resample|resampling|warm|warmup|sparsity_warmup|decay"
    r"|checkpoint|compile|autocast|dead|feature_sampling|ghost|mse|ste|bandwidth|init|num_workers|gradient|grad|scheduler"
    r"|optimizer|optim|save|run|resume|resumed|target_l0|prefetch|verbose|tqdm|push|hf_repo|top_k_aux|topk_threshold_lr"
    r"|sparsity_penalty|sparsity_loss|finetune)(_.*)?",
    r".*_(lr|lrs|path|dir|steps|step|samples|batches|batch_size|batch_size_tokens|batch_size_prompts|coefficient|coeff|alpha|penalty|loss"
    r"|project|entity|workers|fraction|every|init|init_norm|scheduler|optimizer|window|initialization|kernel)",
    r"train(ing)?_(batch.*|tokens|steps|samples|data|dataset|ratio|epochs?|time)|clip_(grad|norm).*|steps?|epochs?|iter(ation)?s?|callbacks|loops|.*version|batch_size|(num|n|total)_tokens|tokens_per_.*|seed|seeds|device|dtype|verbose|name|version|num_batches|trainer_class|n_batches.*|buffer_.*|.*_device",
)
"""Names that every trainer has for its own running: whole names, matched in lower case."""


class Fields(dict[str, Any]):
    """A dictionary that notes which of its names were asked for. Copies (``{**fields}``, ``dict(fields)``) note nothing.

    Args:
        fields: names and values.
        prefix: put before a name where it is shown.
        asked: the names asked for so far, shared with another view of the same fields.
    """

    def __init__(self, fields: Mapping[str, Any], prefix: str = "", asked: set[str] | None = None) -> None:
        super().__init__(fields)
        self.prefix = prefix
        self.asked: set[str] = set() if asked is None else asked
        self.parts: dict[str, Fields] = {}

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The value, which counts as used."""
        self.asked.add(name)
        return super().get(name, default)

    def part(self, name: str) -> Fields:
        """The object under ``name``, whose own names are noted one by one; empty where there is no object."""
        if name not in self.parts:
            inner = self.get(name)
            self.parts[name] = Fields(inner if isinstance(inner, dict) else {}, f"{self.prefix}{name}.")
        return self.parts[name]

    def unused(self) -> dict[str, Any]:
        """Names that nothing asked for, those of parts among them, with their values; without null and empty ones."""
        found = {
            f"{self.prefix}{name}": value for name, value in self.items() if name not in self.asked and not _says_nothing(value)
        }
        for part in self.parts.values():
            found |= part.unused()
        return found


def _says_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | dict | list | tuple) and len(value) == 0)


def account(dictionary: Dictionary, read: Iterable[Fields], facts: Mapping[str, str], training: Iterable[str]) -> None:
    """Sort what the reader of ``dictionary`` did not use into its details.

    Args:
        dictionary: as read.
        read: what its format was handed.
        facts: fields, as ``Fields.unused`` names them, that say how the dictionary was made, with their common names; they are
            facts whether they were used or not.
        training: patterns of names, without their prefix, that matter in training only.
    """
    made_with, ignored = {}, {}
    patterns = [re.compile(pattern, re.IGNORECASE) for pattern in (*TRAINING, *training)]
    for fields in read:
        for name, value in _every(fields):
            if name in facts and not _says_nothing(value):
                made_with[facts[name]] = plain(value)
        for name, value in fields.unused().items():
            bare = name.rsplit(".", 1)[-1]
            if name not in facts and not any(pattern.fullmatch(bare) for pattern in patterns):
                ignored[name] = plain(value)
    if made_with or "made_with" in dictionary.details:
        dictionary.details["made_with"] = {**made_with, **dictionary.details.get("made_with", {})}
    if ignored:
        dictionary.details["ignored"] = {**dictionary.details.get("ignored", {}), **ignored}


def _every(fields: Fields) -> Iterable[tuple[str, Any]]:
    yield from ((f"{fields.prefix}{name}", value) for name, value in fields.items())
    for part in fields.parts.values():
        yield from _every(part)


def plain(value: Any) -> Any:
    """``value`` as the details keep it: JSON, and short."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool | int) or value is None or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in list(value.items())[:20]}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value[:20]]
    return str(value)[:LONGEST]
