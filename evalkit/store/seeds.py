"""Dictionaries that differ in nothing but the seed of their training, and the row that stands for all of them.

1. A family is what has one kind, one hook point and one recipe (``details["trained"]``), the seeds of weights and data apart.
   It is read from the stored recipes, so that ``seeds = [...]`` and ``train = {seed = [...]}`` of any run are families.
2. Its row has the name that they share. The rows of the single seeds stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

SEEDS = ("seed", "order")
"""Settings of a recipe that a family does not share."""
_WORD = re.compile(r"[\s,_-]*\bseed[ =_-]*\d+\b")


def families(dictionaries: Mapping[str, Any]) -> dict[str, str]:
    """What the members of a family have in common, by dictionary_id; what was not trained is in none.

    Args:
        dictionaries: details (JSON) by dictionary_id.
    """
    found = {}
    for key, details in dictionaries.items():
        known = json.loads(details) if isinstance(details, str) else {}
        recipe = known.get("trained") if isinstance(known, dict) else None
        if isinstance(recipe, dict) and "seed" in recipe:
            found[str(key)] = json.dumps({k: v for k, v in recipe.items() if k not in SEEDS}, sort_keys=True, default=str)
    return found


def family_name(names: Sequence[str]) -> str:
    """Name of the row of all seeds: what is left of the names without their seed, and how many they are."""
    shared = dict.fromkeys(_WORD.sub("", name).strip() for name in names)
    first = next(iter(shared))
    return f"{first if len(shared) == 1 and first else ' + '.join(names)} ({len(names)} seeds)"
