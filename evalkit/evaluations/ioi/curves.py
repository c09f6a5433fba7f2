"""Numbers of a patching curve: how many patches a share of the effect needs, with bootstrap draws over prompts.

A curve is a distance from the target, such as KL(patched || target), of N prompts at S set sizes, the first features of one
ordering.

1. Crossing: the first size at which the distance, mean or median over prompts, is at most a share of the reference. That is the
   distance of the model as it is, one for all dictionaries. Between grid sizes a straight line in log size is taken. What else
   is wanted there (the mean edit, the patches active on a prompt) is read off by the same line.
2. A crossing belongs to the curve over all prompts, not to a prompt. So the curve itself is bootstrapped: ``DRAWS`` draws of the
   prompts, each with its own crossing. Draws depend on the number of prompts alone, so that dictionaries pair draw by draw.
3. A curve that never gets there is censored: it takes more patches than all that were measured. No crossing lies outside 1 to
   the number of candidates. ``missed`` is the share of draws that are censored.
4. ``over_chance``: crossing of the order by chance over the own one, draw by draw. It puts dictionaries with other numbers of
   features on one scale.
5. Area: the mean share of the KL that is left, over log2 of the number of patches from 1 to ``upto``; beyond the last set it
   stays as it is there. The figure's area under the curve, on one scale for dictionaries of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

Floats = NDArray[np.float64]


DRAWS = 400
"""Bootstrap draws of the prompts behind a crossing."""


class Crossing(NamedTuple):
    """What reaching a share of the reference takes: of the whole, and of each of B draws of the prompts (R = 1 + B)."""

    log_patches: Float[np.ndarray, " R"]
    """Natural logarithm of the number of patches; where it is not reached that of all of them; NaN where nothing is to reach."""
    reached: Bool[np.ndarray, " R"]
    """Whether a measured set reaches it; where not, the numbers are bounds from below."""
    beside: dict[str, Float[np.ndarray, " R"]]
    """Means over prompts of what else was asked for there, by name."""

    @property
    def defined(self) -> Bool[np.ndarray, " R"]:
        """Where there is something to reach and something to patch."""
        return ~np.isnan(self.log_patches)

    @property
    def missed(self) -> float:
        """Share of the draws in which it is not reached."""
        return float((~self.reached[1:]).mean())


def prompt_draws(count: int, draws: int = DRAWS) -> Int[np.ndarray, "R N"]:
    """All ``count`` prompts, and ``draws`` bootstrap draws of them: the same for every dictionary."""
    return np.concatenate([np.arange(count)[None], np.random.default_rng(0).integers(0, count, (draws, count))])


def crossing(
    sizes: Int[np.ndarray, " S"],
    distance: Float[np.ndarray, "S N"],
    reference: Float[np.ndarray, " N"],
    share: float,
    beside: Mapping[str, Float[np.ndarray, "S N"]] | None = None,
    *,
    centre: Callable[..., Floats] = np.mean,
    draws: int = DRAWS,
) -> Crossing:
    """Patches at which the distance first falls to ``share`` of the reference.

    Args:
        sizes: rising, from 0.
        distance: of each set and prompt from the target.
        reference: distance of each prompt, the model as it is.
        share: between 0 and 1.
        beside: what else is read off there.
        centre: of the prompts: ``np.mean`` or ``np.median``.
        draws: bootstrap draws.
    """
    index = prompt_draws(distance.shape[1], draws)  # (R, N)
    curves = centre(distance[:, index], axis=2).T  # (R, S)
    limit = share * centre(reference[index], axis=1)
    places = _places(sizes, curves, limit)
    read = {name: _read(values[:, index].mean(2).T, places) for name, values in (beside or {}).items()}
    log_sizes = np.log(np.maximum(sizes, 1)).astype(np.float64)
    return Crossing(_read(np.broadcast_to(log_sizes, curves.shape), places), places.reached, read)


class _Places(NamedTuple):
    """Where R curves cross, between two set sizes each."""

    before: Int[np.ndarray, " R"]
    at: Int[np.ndarray, " R"]
    part: Floats
    """Of the way from one to the other."""
    reached: Bool[np.ndarray, " R"]
    defined: Bool[np.ndarray, " R"]


def _places(sizes: Int[np.ndarray, " S"], curves: Float[np.ndarray, "R S"], limit: Float[np.ndarray, " R"]) -> _Places:
    rows, last = np.arange(len(curves)), len(sizes) - 1
    below = curves <= limit[:, None]
    # nothing to reach where the empty set is there already: prompts that do not differ for the model, or an error term whose
    # removal alone does it
    defined = ~below[:, 0] if last else np.zeros(len(curves), dtype=bool)
    reached = below.any(1) & defined
    at = np.where(reached, below.argmax(1), last)
    before = np.maximum(at - 1, 0)
    fall = curves[rows, before] - curves[rows, at]
    part = np.divide(curves[rows, before] - limit, fall, out=np.ones(len(curves)), where=fall > 0)
    # between no patch and one there is nothing: the first patch is counted whole
    part = np.where((before == 0) | ~reached, 1.0, np.clip(part, 0.0, 1.0))
    return _Places(before, at, part, reached, defined)


def _read(values: Float[np.ndarray, "R S"], places: _Places) -> Floats:
    """Values at the crossings; NaN where none is defined."""
    rows = np.arange(len(values))
    before, at = values[rows, places.before], values[rows, places.at]
    found: Floats = np.where(places.defined, before + places.part * (at - before), np.nan)
    return found


def over_chance(own: Crossing, chance: Crossing) -> Crossing:
    """Logarithm of the patches by chance over the own ones, draw by draw.

    Where chance alone does not get there the number is a bound from below. Where the own order does not, it is the least that it
    can be, one patch over all, so that an interval does not flatter; an estimate of that kind is undefined.
    """
    ratio = chance.log_patches - own.log_patches
    ratio = np.where(own.reached | np.isnan(ratio), ratio, -own.log_patches)
    if not own.reached[0]:
        ratio[0] = np.nan
    return Crossing(ratio, chance.reached | ~own.reached, {})


def area(sizes: Int[np.ndarray, " S"], kl: Float[np.ndarray, "S N"], upto: int) -> Float[np.ndarray, " N"]:
    """Mean KL of each prompt over log2 of the number of patches, from 1 to ``upto`` (at least 2), in nats.

    Args:
        sizes: rising, from 0.
        kl: of each set and prompt.
        upto: last number of patches that counts.
    """
    sizes, kl = (sizes[1:], kl[1:]) if len(sizes) > 1 else (np.ones(1), kl)
    within = sizes < upto
    log_sizes = np.log2(sizes.astype(np.float64))
    grid = np.concatenate([log_sizes[within], [np.log2(upto)]])
    # np.interp keeps the last value beyond the last size, and the first before the first
    values = np.stack([np.interp(grid, log_sizes, prompt) for prompt in kl.T])  # (N, G)
    return np.trapezoid(values, grid, axis=1) / grid[-1]
