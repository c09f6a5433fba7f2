"""Which single feature tells a concept best: found on one half of the texts, checked on the other.

1. A feature has one value a text (``pooling``); the two tails of signed codes are two candidates.
2. Texts are divided in two at random, pairs kept together and single texts by label. On the first half every candidate gets the
   AUROC of its values; the best ``kept`` are found. Ties go to the larger distance of the class means, in units of the
   candidate's largest value.
3. Each found candidate is tested once on the second half: AUROC, and a one-sided p. Pairs are tested as pairs, exactly, by
   Wilcoxon's signed ranks of their differences; texts that are no pairs by Mann and Whitney's ranks. However many candidates
   there were, they had no part in these numbers. The tests of all concepts and found candidates are corrected by Holm (1979).
   A feature that is given by number is tested in the same way without a search: only its tail is chosen, on the first half.
4. Levels of activation: thirds of the largest value on the first half. Precision at a level is the share of the second half's
   texts at that level that show the concept.
5. Null: the same search where, in every pair, a coin says which text counts as showing the concept, and the labels of single
   texts are permuted.

Wilcoxon 1945; Mann and Whitney 1947; specificity by activation level: Templeton et al. 2024 (Scaling Monosemanticity).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import mannwhitneyu, rankdata

from evalkit.evaluations.concepts.pooling import Values, in_pairs
from evalkit.util.statistics import auroc

LEAST = 3
"""Texts with and without the concept that a half must have."""
LEVELS = ("weak", "middle", "strong")
"""Thirds of the largest value; 0 and below is off."""


class Found(NamedTuple):
    """A candidate found on the first half, with its test on the second."""

    candidate: int
    """Column of ``Values``."""
    chosen: float
    """AUROC on the half it was found on."""
    auroc: float
    """AUROC on the other half."""
    p: float
    """One-sided p of the other half (``check``)."""


class Tested(NamedTuple):
    """What the half that did not choose says of one candidate."""

    auroc: float
    p: float
    """One-sided."""


class Levels(NamedTuple):
    """One candidate by level of activation, on the second half; one entry for each of ``LEVELS``."""

    texts: list[int]
    precision: list[float | None]
    """Share of the texts that show the concept; None where there is no text."""
    recall: float
    """Share of the texts showing the concept on which it is above 0."""


def halves(label: Bool[np.ndarray, " N"], group: Int[np.ndarray, " N"], seed: int) -> Bool[np.ndarray, " N"]:
    """Which texts are the second half: groups stay whole, and kinds of groups (pairs, single texts of one label) are divided
    evenly. What is left of kinds of odd number goes, the largest group first, to the half that has fewer texts like it."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(label), dtype=bool)
    left: list[int] = []
    kinds: dict[tuple[int, int], list[int]] = {}
    for g in dict.fromkeys(group.tolist()):
        inside = label[group == g]
        kinds.setdefault((int(inside.sum()), len(inside)), []).append(g)
    for members in kinds.values():
        drawn = rng.permutation(members)
        held |= np.isin(group, drawn[: len(members) // 2])
        left += drawn[2 * (len(members) // 2) :].tolist()
    even = np.zeros(2)  # texts with and without the concept: of the second half, minus those of the first
    for g in sorted(left, key=lambda g: -int((group == g).sum())):
        inside = group == g
        own = np.array([(inside & label).sum(), (inside & ~label).sum()])
        second, first = np.abs(even + own).sum(), np.abs(even - own).sum()
        if second < first or (second == first and rng.random() < 0.5):
            held, even = held | inside, even + own
        else:
            even = even - own
    return held


def divided(label: Bool[np.ndarray, " N"], held: Bool[np.ndarray, " N"]) -> bool:
    """Whether each half has at least ``LEAST`` texts with and without the concept."""
    return all(int((half & kind).sum()) >= LEAST for half in (held, ~held) for kind in (label, ~label))


def aurocs(value: Float[np.ndarray, "N C"], label: Bool[np.ndarray, " N"]) -> Float[np.ndarray, " C"]:
    """AUROC of every column; 0.5 for a constant one."""
    positive = int(label.sum())
    negative = len(label) - positive
    ranks = rankdata(value, axis=0)[label].sum(0)
    return np.asarray((ranks - positive * (positive + 1) / 2) / (positive * negative))


def search(
    values: Values, label: Bool[np.ndarray, " N"], held: Bool[np.ndarray, " N"], group: Int[np.ndarray, " N"], kept: int
) -> list[Found]:
    """The ``kept`` best candidates of the first half, best first, each tested on the second (``held``)."""
    first, here = values.value[~held], label[~held]
    chosen = aurocs(first, here)
    spread = np.abs(first).max(0)
    gap = (first[here].mean(0) - first[~here].mean(0)) / np.where(spread > 0, spread, 1)
    order = np.lexsort((np.arange(len(gap)), -gap, -chosen))[:kept]
    return [Found(int(c), float(chosen[c]), *check(values.value[held, c], label[held], group[held])) for c in order]


def given(
    values: Values,
    label: Bool[np.ndarray, " N"],
    held: Bool[np.ndarray, " N"],
    group: Int[np.ndarray, " N"],
    features: Sequence[int],
) -> list[Found]:
    """Each of ``features``, in their order, tested on the second half at the tail that does better on the first."""
    found = []
    for feature in features:
        own = np.flatnonzero(values.feature == feature)
        (best,) = search(Values(values.value[:, own], values.feature[own], values.sign[own]), label, held, group, 1)
        found.append(best._replace(candidate=int(own[best.candidate])))
    return found


def check(value: Float[np.ndarray, " N"], label: Bool[np.ndarray, " N"], group: Int[np.ndarray, " N"]) -> Tested:
    """AUROC and one-sided p of one candidate: signed ranks where all texts are pairs, else Mann-Whitney."""
    found = auroc(label, value)
    assert found is not None  # both classes are in both halves
    if value.min() == value.max():
        return Tested(found, 1.0)
    if in_pairs(label, group):
        order = np.argsort(group, kind="stable")
        shows = label[order]
        return Tested(found, signed_rank(value[order][shows] - value[order][~shows]))
    return Tested(found, float(mannwhitneyu(value[label], value[~label], alternative="greater").pvalue))


def signed_rank(difference: Float[np.ndarray, " P"]) -> float:
    """Exact one-sided p of Wilcoxon's signed ranks: how often random signs give so large a sum of positive ranks.

    Differences of 0 are left out. Tied ones share their mean rank, and the p stays exact, which SciPy's is not with ties.
    """
    d = difference[difference != 0]
    double = np.rint(2 * rankdata(np.abs(d))).astype(int)  # mean ranks are halves
    ways = np.ones(1)
    for rank in double:  # ways[s]: share of sign patterns whose doubled positive ranks sum to s
        ways = (np.append(ways, np.zeros(rank)) + np.append(np.zeros(rank), ways)) / 2
    return float(min(1.0, ways[int(double[d > 0].sum()) :].sum()))


def shuffled(label: Bool[np.ndarray, " N"], group: Int[np.ndarray, " N"], rng: np.random.Generator) -> Bool[np.ndarray, " N"]:
    """Labels by chance: turned round in about half of the pairs; among single texts, dealt out anew."""
    drawn = label.copy()
    single = np.array([int((group == g).sum()) == 1 for g in group])
    for g in np.unique(group[~single]):
        inside = np.flatnonzero(group == g)
        if rng.random() < 0.5:
            drawn[inside] = ~drawn[inside]
    drawn[single] = rng.permutation(drawn[single])
    return drawn


def by_chance(
    values: Values,
    label: Bool[np.ndarray, " N"],
    group: Int[np.ndarray, " N"],
    held: Bool[np.ndarray, " N"],
    draws: int,
    seed: int,
) -> list[Found]:
    """The best candidate for labels by chance, once a draw; draws that leave a half with one label are left out."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        chance = shuffled(label, group, rng)
        if all(0 < int(part.sum()) < len(part) for part in (chance[held], chance[~held])):
            found += search(values, chance, held, group, 1)
    return found


def level_of(value: Float[np.ndarray, " N"], top: float) -> Int[np.ndarray, " N"]:
    """Level of each value: -1 off, 0 to 2 the thirds of ``top``; above it counts as strong."""
    if top <= 0:
        return np.full(len(value), -1)
    return np.where(value > 0, np.minimum(np.ceil(value / top * len(LEVELS)).astype(int) - 1, len(LEVELS) - 1), -1)


def spread(level: Int[np.ndarray, " N"], count: int, rng: np.random.Generator) -> list[int]:
    """``count`` of the texts that have a level, drawn from the levels in turn as long as they last; in order."""
    drawn = rng.permutation(np.flatnonzero(level >= 0))
    turn = np.array([int((level[drawn[:n]] == level[row]).sum()) for n, row in enumerate(drawn)], dtype=int)
    return sorted(drawn[np.argsort(turn, kind="stable")][:count].tolist())


def levels(value: Float[np.ndarray, " N"], label: Bool[np.ndarray, " N"], held: Bool[np.ndarray, " N"]) -> Levels:
    """Precision by level, and recall, of one candidate on the second half."""
    at, shows = level_of(value, float(value[~held].max()))[held], label[held]
    texts = [int((at == level).sum()) for level in range(len(LEVELS))]
    precision = [float(shows[at == level].mean()) if n else None for level, n in enumerate(texts)]
    return Levels(texts, precision, float((value[held][shows] > 0).mean()))
