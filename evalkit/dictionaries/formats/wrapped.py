"""Weights that lie one level down: ``{"state_dict": {...}, "cfg": {...}}``, and names with a wrapper's prefix.

1. Where a file's outermost names hold matrices, they are the weights. Elsewhere the only inner dictionary that holds matrices
   is taken, whatever it is called; an optimiser's state is none. Several are not chosen among: a message says where they lie.
2. A prefix that every name has (``_orig_mod.`` of torch.compile, ``module.`` of DistributedDataParallel, ``model.``, ...) is
   taken off, again and again.
3. What lies beside the weights is kept: a config under one of the usual names, and everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evalkit.errors import DictionaryError

PREFIXES = ("_orig_mod.", "module.", "model.", "autoencoder.", "_forward_module.", "sae.", "ae.", "dictionary.", "net.")
"""What wrappers put before every name."""

CONFIGS = ("cfg", "config", "hyper_parameters", "hyperparameters", "hparams", "args", "sae_cfg", "trainer", "trainer_config")
"""Names under which a config lies beside the weights."""

DEEPEST = 6
"""Levels that are looked through."""


class Unwrapped(NamedTuple):
    """The weights of a file, and what lay around them."""

    tensors: dict[str, Any]
    """By name, without a wrapper's prefix."""
    config: dict[str, Any]
    """The config that lay beside them; {} where none did."""
    beside: dict[str, Any]
    """Everything else that lay beside them, an optimiser's state aside."""
    taken: str
    """In words, what was taken off; '' where nothing was."""


def unwrap(found: dict[str, Any], path: Path) -> Unwrapped:
    """The weights in ``found``, which was read from ``path``.

    Raises:
        DictionaryError: several inner dictionaries hold matrices.
    """
    places = list(_places(found, ()))
    if len(places) > 1 and () not in places:
        shown = ", ".join(f"'{'.'.join(place)}'" for place in places[:12]) + (" and more" if len(places) > 12 else "")
        raise DictionaryError(
            f"the file holds {len(places)} sets of weights, none of them at its top: {shown}",
            where=str(path),
            fix="save the one that is meant alone, as a state_dict",
        )
    place = () if () in places or not places else places[0]
    inner, config, beside = found, dict[str, Any](), dict[str, Any]()
    for key in place:
        for name, value in inner.items():
            if name == key or _of_optimiser(name):
                continue
            if name.lower() in CONFIGS and isinstance(value, dict):
                config |= {str(field): item for field, item in value.items()}
            else:
                beside[str(name)] = value
        inner = {str(name): value for name, value in inner[key].items()}
    names, prefixes = _without_prefixes(inner)
    taken = [f"the weights lie under '{'.'.join(place)}'"] if place else []
    taken += [f"names without '{prefixes}'"] if prefixes else []
    return Unwrapped(names, config, beside, ", ".join(taken))


def _places(found: dict[Any, Any], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Where matrices lie, from the top: a dictionary that holds some is not looked into further."""
    if any(isinstance(value, torch.Tensor) and value.ndim >= 2 for value in found.values()):
        yield above
        return
    for name, value in found.items():
        if isinstance(name, str) and isinstance(value, dict) and not _of_optimiser(name) and len(above) < DEEPEST:
            yield from _places(value, (*above, name))


def _of_optimiser(name: str) -> bool:
    return name.lower().startswith(("optim", "sched", "lr_sched"))


def _without_prefixes(found: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """``found`` without the prefixes that all names have, and the prefixes."""
    taken = ""
    while found and (prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in found)), None)):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
        taken += prefix
    return found, taken
