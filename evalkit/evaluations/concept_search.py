"""Which single feature tells a concept best: found on one half of the texts, checked on the other.

1. A feature's value on a text is its largest code over the text's kept tokens. Where codes are signed, a feature has two tails,
   and the lower one, turned round, is a candidate of its own.
2. Texts are divided in two at random, pairs kept together and single texts by label. On the first half every candidate gets the
   AUROC of its values; the best ``kept`` are found. Ties go to the larger distance of the class means, in units of the
   candidate's largest value.
3. Each found candidate is tested once on the second half: AUROC, and a one-sided Mann-Whitney test. However many candidates
   there were, they had no part in these numbers; the tests of all concepts and found candidates are corrected by Holm (1979).
   A feature that is given by number is tested in the same way without a search: only its tail is chosen, on the first half.
4. Levels of activation: thirds of the largest value on the first half. Precision at a level is the share of the second half's
   texts at that level that show the concept.
5. A probe is a logistic regression on the mean of the raw activations over the text, fitted on the first half.
6. Null: the same search where, in every pair, a coin says which text counts as showing the concept, and the labels of single
   texts are permuted.

Mann and Whitney 1947; specificity by activation level: Templeton et al. 2024 (Scaling Monosemanticity).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import mannwhitneyu, rankdata

from evalkit.statistics import auroc

if TYPE_CHECKING:
    from evalkit.dictionaries.base import Dictionary

LEAST = 3
"""Texts with and without the concept that a half must have."""
CODES = 1 << 24
"""Codes held at a time (64 MB)."""
LEVELS = ("weak", "middle", "strong")
"""Thirds of the largest value; 0 and below is off."""


class Values(NamedTuple):
    """A dictionary's values on N texts: C candidates, one or two a feature."""

    value: Float[np.ndarray, "N C"]
    feature: Int[np.ndarray, " C"]
    sign: Int[np.ndarray, " C"]
    """-1 where the candidate is a feature's lower tail, turned round."""


class Found(NamedTuple):
    """A candidate found on the first half, with its test on the second."""

    candidate: int
    """Column of ``Values``."""
    chosen: float
    """AUROC on the half it was found on."""
    auroc: float
    """AUROC on the other half."""
    p: float
    """One-sided Mann-Whitney p of the other half."""


class Levels(NamedTuple):
    """One candidate by level of activation, on the second half; one entry for each of ``LEVELS``."""

    texts: list[int]
    precision: list[float | None]
    """Share of the texts that show the concept; None where there is no text."""
    recall: float
    """Share of the texts showing the concept on which it is above 0."""


def pooled(
    dictionary: Dictionary | None, x: Float[torch.Tensor, "N T D"], keep: Bool[torch.Tensor, "N T"], *, signed: bool | None = None
) -> Values:
    """Largest codes over the kept tokens of each text; of ``x`` itself where ``dictionary`` is None (the neurons)."""
    N, T, D = x.shape
    F = D if dictionary is None else dictionary.n_features
    both = (dictionary is None or dictionary.signed) if signed is None else signed
    tops, bottoms = [], []
    group = max(1, CODES // (T * F))
    for start in range(0, N, group):
        part, inside = x[start : start + group], keep[start : start + group, :, None]
        codes = part if dictionary is None else dictionary.encode(part)  # (B, T, F)
        tops.append(_ends(codes, inside))
        if both:
            bottoms.append(_ends(-codes, inside))
    value, feature = torch.cat(tops), torch.arange(F)
    sign = torch.ones(F, dtype=torch.int64)
    if both:
        value, feature, sign = torch.cat([value, torch.cat(bottoms)], 1), torch.cat([feature, feature]), torch.cat([sign, -sign])
    return Values(value.double().numpy(), feature.numpy(), sign.numpy())


def codes_of(
    dictionary: Dictionary, values: Values, candidate: int, x: Float[torch.Tensor, "N T D"], keep: Bool[torch.Tensor, "N T"]
) -> Float[np.ndarray, "N T"]:
    """One candidate's codes on every token, its tail turned up; 0 where a token is not kept."""
    feature, sign = int(values.feature[candidate]), int(values.sign[candidate])
    rows = [sign * dictionary.encode(own[None])[0, :, feature] for own in x]
    own = torch.stack(rows) if rows else x.new_zeros(x.shape[:2])
    return own.masked_fill(~keep, 0.0).numpy()


def _ends(codes: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    top = codes.masked_fill(~inside, -torch.inf).amax(1)  # (B, F)
    return torch.where(top.isfinite(), top, 0.0)


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


def search(values: Values, label: Bool[np.ndarray, " N"], held: Bool[np.ndarray, " N"], kept: int) -> list[Found]:
    """The ``kept`` best candidates of the first half, best first, each tested on the second (``held``)."""
    first, here = values.value[~held], label[~held]
    chosen = aurocs(first, here)
    spread = np.abs(first).max(0)
    gap = (first[here].mean(0) - first[~here].mean(0)) / np.where(spread > 0, spread, 1)
    order = np.lexsort((np.arange(len(gap)), -gap, -chosen))[:kept]
    return [Found(int(c), float(chosen[c]), *check(values.value[held, c], label[held])) for c in order]


def given(values: Values, label: Bool[np.ndarray, " N"], held: Bool[np.ndarray, " N"], features: Sequence[int]) -> list[Found]:
    """Each of ``features``, in their order, tested on the second half at the tail that does better on the first."""
    found = []
    for feature in features:
        own = np.flatnonzero(values.feature == feature)
        (best,) = search(Values(values.value[:, own], values.feature[own], values.sign[own]), label, held, 1)
        found.append(best._replace(candidate=int(own[best.candidate])))
    return found


def check(value: Float[np.ndarray, " N"], label: Bool[np.ndarray, " N"]) -> tuple[float, float]:
    """AUROC and one-sided Mann-Whitney p of one candidate."""
    found = auroc(label, value)
    assert found is not None  # both classes are in both halves
    if value.min() == value.max():
        return found, 1.0
    return found, float(mannwhitneyu(value[label], value[~label], alternative="greater").pvalue)


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
            found += search(values, chance, held, 1)
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


def probe(
    x: Float[torch.Tensor, "N T D"],
    keep: Bool[torch.Tensor, "N T"],
    label: Bool[np.ndarray, " N"],
    held: Bool[np.ndarray, " N"],
    strength: float,
) -> tuple[float, float, float]:
    """AUROC on the first half, and AUROC and p on the second, of a logistic regression with inverse penalty ``strength``."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    weight = keep.float()[..., None]
    mean = ((x * weight).sum(1) / weight.sum(1).clamp(min=1)).double().numpy()  # (N, D)
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000)).fit(mean[~held], label[~held])
    score = fitted.decision_function(mean)
    first, _ = check(score[~held], label[~held])
    return (first, *check(score[held], label[held]))
