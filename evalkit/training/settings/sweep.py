"""One entry of a suite that stands for several dictionaries: every setting may be a list.

1. ``train = { architecture = "topk", k = [16, 32], seed = [0, 1] }`` is the product of its lists, the last one varying fastest:
   four dictionaries. A setting that is a list by itself is swept by a list of lists.
2. Names: ``{k}`` in the entry's name stands for the setting; settings that vary and are not in the name are put behind it,
   "SAE k=16 seed=0".
3. Several seeds share the order of the data (``order``, the first seed, unless it is given), so that all are fed from one pass.
"""

from __future__ import annotations

import dataclasses
import itertools
import string
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from evalkit.errors import SuiteError
from evalkit.training.architectures.base import TRAINABLES
from evalkit.training.settings.config import TrainConfig, train_config
from evalkit.util.registry import near_miss


class Variant(NamedTuple):
    """One dictionary of a sweep."""

    name: str
    config: TrainConfig


def _is_list(hint: Any) -> bool:
    """Whether a setting of this type is a list itself."""
    return typing.get_origin(hint) is tuple or any(_is_list(part) for part in typing.get_args(hint))


def _hints(table: Mapping[str, Any]) -> dict[str, Any]:
    names = table.get("architecture", "topk")
    hints = typing.get_type_hints(TrainConfig)
    for name in names if isinstance(names, list) else [names]:
        if name in TRAINABLES.names():
            hints |= typing.get_type_hints(TRAINABLES.get(name).settings)
    return hints


def _lists(table: Mapping[str, Any], where: str) -> dict[str, list[Any]]:
    """The settings that vary, with their values."""
    hints, found = _hints(table), {}
    for key, value in table.items():
        if not isinstance(value, list):
            continue
        if key in hints and _is_list(hints[key]) and not (value and all(isinstance(item, list) for item in value)):
            continue
        if not value or any(value.count(item) > 1 for item in value):
            raise SuiteError(
                f"the list of {key} is empty or names a value twice", where=f"{where} {key}", fix="write each value once"
            )
        found[key] = value
    return found


def _word(value: Any) -> str:
    """A value as names show it."""
    return format(value, "g") if isinstance(value, float) else str(value)


def _named(name: str, chosen: Mapping[str, Any], config: TrainConfig, where: str) -> str:
    """The entry's name with its placeholders filled in and the other varying settings behind it."""
    own = dataclasses.asdict(config.own)
    known = {**{f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "own"}, **own}
    try:
        parts = [(literal, key) for literal, key, _, _ in string.Formatter().parse(name)]
    except ValueError as error:
        raise SuiteError(f"the name '{name}' cannot be read: {error}", where=where, fix="write {k} for a setting") from error
    text, used = "", set()
    for literal, key in parts:
        text += literal
        if key is None:
            continue
        if key not in known:
            raise SuiteError(f"the name asks for '{{{key}}}', which is no setting", where=where, fix=near_miss(key, known))
        text += _word(chosen.get(key, known[key]))
        used.add(key)
    return " ".join([text, *(f"{key}={_word(value)}" for key, value in chosen.items() if key not in used)])


def expand(name: str, table: Mapping[str, Any], where: str) -> list[Variant]:
    """The dictionaries that ``train = table`` stands for: one, where nothing in it is a list.

    Args:
        name: the entry's name; ``{setting}`` in it is filled in.
        table: settings, each a value or a list of values.
        where: what the table is called in messages.

    Raises:
        SuiteError: an unknown key, an impossible value, or a name that asks for no setting.
    """
    lists = _lists(table, where)
    if len(lists.get("seed", ())) > 1 and "order" not in table:
        table = {**table, "order": lists["seed"][0]}
    variants = []
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        config = train_config({**table, **chosen}, where)
        variants.append(Variant(_named(name, chosen, config, where), config))
    return variants
