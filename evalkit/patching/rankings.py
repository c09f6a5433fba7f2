"""Orderings of features by how much patching them matters, cheap ones and ``acdc``.

1. ``random``: by seed, the null of every comparison. ``largest-edit``: by how far each feature alone moves the activation. It
   knows nothing of what the model does with it: what it finds, any basis with few large changes has for free.
2. ``single``: KL drop of each feature patched alone.
3. ``attribution``: first-order KL drop of each feature at the unpatched run. ``integrated-gradients``: the same, averaged along
   the straight line from the unpatched run to all features patched.
4. ``greedy``: forward selection. Each step measures the ``shortlist`` features of largest last known gain on top of those
   chosen and takes the best; with a shortlist of all features it is exact.
5. ``acdc`` is in ``acdc.py``, ``acdc-fast`` in ``acdc_fast.py``.

Attribution patching: Nanda 2023; integrated gradients over features: Marks et al. 2024 (arXiv 2403.19647).
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int

from evalkit.errors import SuiteError
from evalkit.patching.patching import Patching
from evalkit.util.registry import Registry, near_miss

CHUNK = 256
"""Sets handed to one ``measure``: bounds the memory of (sets, candidates)."""


class Groups(NamedTuple):
    """The nested sets an ordering came from, largest first."""

    thresholds: Float[torch.Tensor, " G"]
    """Threshold of each set, float64."""
    sets: Bool[torch.Tensor, "G C"]
    """Which candidates stay patched at that threshold."""


class Ranking(NamedTuple):
    """Candidates in order of importance, and what it cost to find out."""

    order: Int[torch.Tensor, " C"]
    """Places among ``Patching.candidates``, most important first."""
    effect: Float[torch.Tensor, " C"]
    """Each candidate's number (in the order of ``candidates``), float64; what it is, the ranking's docstring says."""
    groups: Groups | None
    """Nested sets by threshold, for ``acdc``; None where there are no thresholds."""
    passes: int
    """Runs of one prompt from the hook point on; a gradient counts 3, what was looked up nothing. ``rank`` adds the set-up."""
    seconds: float
    """Time spent in them; from ``rank`` all of the ranking's, set-up included."""


Rank = Callable[..., Ranking]
"""What is registered in ``RANKINGS``: (patching, *, seed, its settings) to a ranking. ``rank`` checks the settings first."""

RANKINGS: Registry[Rank] = Registry("ranking", "evalkit.patching", SuiteError)
"""Rankings by name."""


def rank(name: str, patching: Patching, *, seed: int = 0, **settings: Any) -> Ranking:
    """The candidates of ``patching`` in the order that the ranking ``name`` puts them in.

    Its cost is that of the set-up and of what ``patching`` does not remember: give it ``patching.fresh()`` to know the whole.

    Raises:
        SuiteError: no such ranking, or a setting it does not have.
    """
    make = RANKINGS.get(name, "rankings")
    known = [parameter for parameter in inspect.signature(make).parameters if parameter not in ("patching", "seed")]
    for setting in settings:
        if setting not in known:
            fix = near_miss(setting, known) if known else "leave it out"
            raise SuiteError(f"the ranking '{name}' has no setting '{setting}'", where=setting, fix=fix)
    began = time.perf_counter()
    found = make(patching, seed=seed, **settings)
    seconds = patching.setup.seconds + time.perf_counter() - began
    return found._replace(passes=patching.setup.passes + found.passes, seconds=seconds)


class Cost:
    """Passes and seconds of ``patching`` since this was made."""

    def __init__(self, patching: Patching) -> None:
        self._patching, self._passes, self._seconds = patching, patching.passes, patching.seconds

    @property
    def passes(self) -> int:
        """Runs of one prompt."""
        return self._patching.passes - self._passes

    @property
    def seconds(self) -> float:
        """Time spent in them."""
        return self._patching.seconds - self._seconds


def by_effect(patching: Patching, effect: Float[torch.Tensor, " C"], cost: Cost) -> Ranking:
    """Largest effect first; of equal ones the earlier candidate first."""
    order = torch.argsort(effect, descending=True, stable=True)
    return Ranking(order, effect.double(), None, cost.passes, cost.seconds)


def mean_kl(patching: Patching, sets: Bool[torch.Tensor, "S C"]) -> Float[torch.Tensor, " S"]:
    """KL(patched || target) of each set, mean over prompts."""
    return torch.cat([patching.measure(part).kl.mean(1) for part in sets.split(CHUNK)])


def kl_with_each(patching: Patching, current: Bool[torch.Tensor, " C"], flipped: list[int]) -> Float[torch.Tensor, " S"]:
    """Mean KL of ``current`` with one candidate put in or taken out, for each of ``flipped``."""
    parts = []
    for start in range(0, len(flipped), CHUNK):
        some = flipped[start : start + CHUNK]
        sets = current.repeat(len(some), 1)
        sets[torch.arange(len(some)), some] ^= True
        parts.append(patching.measure(sets).kl.mean(1))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def line_shares(current: Bool[torch.Tensor, " C"], points: int) -> Float[torch.Tensor, "P C"]:
    """The midpoints of ``points`` equal pieces of the line from nothing patched to ``current``."""
    return (torch.arange(points) + 0.5)[:, None] / points * current.float()


@RANKINGS.register("random")
def random(patching: Patching, *, seed: int = 0) -> Ranking:
    """A random order. ``effect`` counts down from the number of candidates."""
    cost, count = Cost(patching), len(patching.candidates)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    effect = torch.empty(count, dtype=torch.float64)
    effect[order] = torch.arange(count, 0, -1, dtype=torch.float64)
    return Ranking(order, effect, None, cost.passes, cost.seconds)


@RANKINGS.register("largest-edit")
def largest_edit(patching: Patching, *, seed: int = 0) -> Ranking:
    """By the length of what each feature's patch adds, root of the sum of squares over prompts and positions: ``effect``."""
    cost = Cost(patching)
    return by_effect(patching, patching.sizes, cost)


@RANKINGS.register("single")
def single(patching: Patching, *, seed: int = 0) -> Ranking:
    """By the KL drop (nats) of patching each feature alone, which is ``effect``."""
    cost, count = Cost(patching), len(patching.candidates)
    nothing = torch.zeros(count, dtype=torch.bool)
    drop = patching.unpatched.kl.mean() - kl_with_each(patching, nothing, list(range(count)))
    return by_effect(patching, drop, cost)


@RANKINGS.register("attribution")
def attribution(patching: Patching, *, seed: int = 0) -> Ranking:
    """By the first-order KL drop (nats) of patching each feature, at the unpatched run: ``effect``."""
    cost = Cost(patching)
    gradient = patching.gradients(torch.zeros(1, len(patching.candidates)))
    return by_effect(patching, -gradient[0].mean(0), cost)


@RANKINGS.register("integrated-gradients")
def integrated_gradients(patching: Patching, *, seed: int = 0, points: int = 10) -> Ranking:
    """By each feature's share of the KL drop from nothing to everything patched: ``effect``; the shares sum to the drop.

    Args:
        points: places on the line where the gradient is taken.
    """
    cost = Cost(patching)
    everything = torch.ones(len(patching.candidates), dtype=torch.bool)
    gradient = patching.gradients(line_shares(everything, _positive("points", points)))
    return by_effect(patching, -gradient.mean((0, 1)), cost)


@RANKINGS.register("greedy")
def greedy(patching: Patching, *, seed: int = 0, steps: int = 64, shortlist: int = 8) -> Ranking:
    """Features in the order forward selection takes them, then the others by last known gain.

    ``effect`` is the KL drop (nats) each brought when it was taken; for the others the last one measured.

    Args:
        steps: features chosen one by one.
        shortlist: features measured at each step, those of largest last known gain.
    """
    cost, first = Cost(patching), single(patching)
    gain, chosen = first.effect.clone(), torch.zeros(len(first.order), dtype=torch.bool)
    order: list[int] = []
    level = float(patching.unpatched.kl.mean())
    for _ in range(min(_positive("steps", steps), len(gain))):
        candidates = torch.argsort(torch.where(chosen, -math.inf, gain), descending=True, stable=True)
        some = candidates[: min(_positive("shortlist", shortlist), len(gain) - len(order))].tolist()
        kl = kl_with_each(patching, chosen, some)
        gain[some] = level - kl
        best = int(kl.argmin())
        order.append(some[best])
        chosen[some[best]], level = True, float(kl[best])
    rest = [place for place in torch.argsort(gain, descending=True, stable=True).tolist() if not chosen[place]]
    return Ranking(torch.tensor([*order, *rest], dtype=torch.int64), gain, None, cost.passes, cost.seconds)


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise SuiteError(f"{name} = {value} is too small", where=name, fix="use at least 1")
    return value
