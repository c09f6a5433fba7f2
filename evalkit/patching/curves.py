"""How far the first k features of an ordering bring the patched run, for growing k.

1. ``grid`` gives the set sizes at which every ordering is evaluated, so that curves can be compared point by point.
2. ``curve`` patches the first k features of an ordering for each size and keeps what every prompt says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int

from evalkit.patching.engine import Measures, Patching


class Curve(NamedTuple):
    """An ordering, evaluated."""

    size: Int[torch.Tensor, " S"]
    """How many features were patched."""
    measures: Measures
    """What that did to each prompt, (S, N)."""


def grid(candidates: int, per_doubling: int = 2) -> list[int]:
    """Set sizes from 0 to ``candidates``: every size up to 4, then ``per_doubling`` sizes for each doubling, and all."""
    sizes, step = {0, candidates} | set(range(min(candidates, 4) + 1)), 0
    while (size := round(4 * 2 ** (step / per_doubling))) < candidates:
        sizes.add(size)
        step += 1
    return sorted(sizes)


def nested_sets(order: Int[torch.Tensor, " C"], sizes: Sequence[int]) -> Bool[torch.Tensor, "S C"]:
    """The first ``size`` places of ``order`` as sets, for each size."""
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    return rank[None, :] < torch.tensor(list(sizes))[:, None]


def curve(patching: Patching, order: Int[torch.Tensor, " C"], sizes: Sequence[int] | None = None) -> Curve:
    """``order`` (places among ``patching.candidates``, most important first) evaluated exactly at ``sizes``."""
    chosen = list(sizes) if sizes is not None else grid(len(order))
    return Curve(torch.tensor(chosen), patching.measure(nested_sets(order, chosen)))
