"""Intervals, differences and correlations: the arithmetic behind every number evalkit shows.

1. A metric is a weighted mean, sum(v * w) / sum(w); a ratio of sums has its denominator as the weight.
2. Its interval is a percentile bootstrap (Efron 1979): items, or whole clusters of items, are drawn with replacement and
   the weighted mean is taken again. A cluster enters a draw with all its items, so that windows of one document, or one
   feature under several seeds, never pass for independent evidence.
3. A difference of two means is bootstrapped too. Paired: one draw of clusters for both sides, so what the sides share
   cancels. Independent: each side is drawn on its own (a stratified bootstrap). p is two-sided and comes from the same
   draws: twice the smaller share of draws on either side of zero (both counts plus one), so p and interval agree. Few
   clusters cannot carry a small p, whatever the draws say: p is never below the smallest that an exact test of that many
   could give, 2 / 2^C for C pairs (sign flips) and 2 / binomial(C_a + C_b, C_a) for two sides (permutations).
4. Several p-values at once are corrected by Holm (1979), which needs no independence.
5. A share of counted cases has the exact binomial interval instead: it is wide where few cases were looked at and none counted.
6. Draws are made in blocks of bounded memory from ``numpy.random.default_rng(seed)``: same input, same numbers.

A percentile interval is too narrow for few clusters (below about 20); ``n`` is there to be shown beside it. From fewer than
``LEAST_CLUSTERS`` it says next to nothing: resampled, so few mostly give back their smallest and largest. Whoever shows an
interval leaves it out there (``store.scores`` does so for tables and comparisons).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv

Floats = NDArray[np.float64]
BLOCK = 1 << 21
"""Most resampled clusters held at once (16 MB of indices)."""
LEAST_CLUSTERS = 6
"""Independent groups of items from which on an interval, or a p-value, is shown to a reader."""


class Interval(NamedTuple):
    """A weighted mean with its interval."""

    mean: float
    """The weighted mean; NaN where there are no items or no weight."""
    low: float
    """Lower end; NaN where fewer than two clusters leave nothing to resample."""
    high: float
    """Upper end; NaN as ``low``."""
    n: int
    """Number of items."""


class Difference(NamedTuple):
    """The difference of two weighted means, a minus b."""

    mean_a: float
    mean_b: float
    difference: float
    """mean_a - mean_b."""
    low: float
    """Lower end of the interval of the difference; NaN where it cannot be had."""
    high: float
    """Upper end."""
    p: float
    """Two-sided bootstrap p-value of 'no difference', at least 2 / (draws + 1) and what so few clusters can carry; NaN
    where there is no interval."""
    n: int
    """Number of pairs, or of items on both sides together where independent."""
    paired: bool


class _Sums(NamedTuple):
    """Per cluster (C,): the sum of v * w and the sum of w."""

    numerator: Floats
    weight: Floats


def _vector(values: ArrayLike, name: str, length: int | None = None) -> Floats:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {vector.shape}")
    if length is not None and len(vector) != length:
        raise ValueError(f"{name} has {len(vector)} entries for {length} values")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} holds NaN or infinity; leave missing values out")
    return vector


def _weights(weights: ArrayLike | None, length: int) -> Floats:
    if weights is None:
        return np.ones(length)
    vector = _vector(weights, "weights", length)
    if (vector < 0).any():
        raise ValueError("weights must not be negative")
    return vector


def _codes(clusters: Sequence[Any] | NDArray[Any] | None, length: int) -> NDArray[np.int64]:
    """Cluster of each item as 0..C-1."""
    if clusters is None:
        return np.arange(length)
    if len(clusters) != length:
        raise ValueError(f"clusters has {len(clusters)} entries for {length} values")
    seen: dict[Any, int] = {}
    return np.fromiter((seen.setdefault(c, len(seen)) for c in clusters), dtype=np.int64, count=length)


def _sums(values: Floats, weights: Floats, codes: NDArray[np.int64]) -> _Sums:
    count = int(codes.max()) + 1 if len(codes) else 0
    numerator, weight = np.bincount(codes, values * weights, count), np.bincount(codes, weights, count)
    return _Sums(numerator.astype(np.float64), weight.astype(np.float64))


def _mean(sums: _Sums) -> float:
    weight = sums.weight.sum()
    return float(sums.numerator.sum() / weight) if weight > 0 else float("nan")


def _resample(count: int, draws: int, rng: np.random.Generator, statistic: Callable[[NDArray[np.int64]], Floats]) -> Floats:
    """``statistic`` of index blocks (b, C), drawn with replacement; all draws (draws,) together."""
    step = max(1, BLOCK // max(1, count))
    blocks = [statistic(rng.integers(0, count, (min(step, draws - i), count))) for i in range(0, draws, step)]
    return np.concatenate(blocks)


def _drawn_mean(sums: _Sums) -> Callable[[NDArray[np.int64]], Floats]:
    """Weighted means (b,) of index blocks (b, C); NaN for a draw without weight."""

    def statistic(index: NDArray[np.int64]) -> Floats:
        weight = sums.weight[index].sum(1)
        return np.divide(sums.numerator[index].sum(1), weight, out=np.full(len(weight), np.nan), where=weight > 0)

    return statistic


def _ends(drawn: Floats, level: float) -> tuple[float, float]:
    """Percentile interval of the draws that have a value."""
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _two_sided(drawn: Floats, arrangements: int) -> float:
    drawn = drawn[~np.isnan(drawn)]
    tail = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    return float(min(1.0, max(2 * (tail + 1) / (len(drawn) + 1), 2 / arrangements)))


def weighted_mean_interval(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    clusters: Sequence[Any] | NDArray[Any] | None = None,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """sum(v * w) / sum(w) with its percentile bootstrap interval.

    Args:
        values: one number for each item, (N,); missing ones left out.
        weights: (N,), not negative; None: all one.
        clusters: (N,) hashable; items of one cluster are drawn together. None: each item on its own.
        level: coverage of the interval.
        draws: bootstrap draws.
        seed: seed of the draws.

    Returns:
        NaN for all three numbers where N is 0 or all weights are; NaN ends where there are fewer than two clusters.

    Raises:
        ValueError: lengths differ, a value is not finite or a weight is negative.
    """
    vector = _vector(values, "values")
    sums = _sums(vector, _weights(weights, len(vector)), _codes(clusters, len(vector)))
    mean, low, high = _mean(sums), float("nan"), float("nan")
    if len(sums.weight) > 1:
        low, high = _ends(_resample(len(sums.weight), draws, np.random.default_rng(seed), _drawn_mean(sums)), level)
    return Interval(mean, low, high, len(vector))


def binomial_interval(hits: float, trials: float, *, level: float = 0.95) -> Interval:
    """Share of independent trials that hit, with the exact interval of Clopper and Pearson (1934).

    Where none hits of a few, a bootstrap has nothing to resample and would say that none ever does.

    Returns:
        NaN for all three numbers without trials.

    Raises:
        ValueError: hits are negative or more than trials.
    """
    if not 0 <= hits <= trials:
        raise ValueError(f"{hits:g} hits of {trials:g} trials")
    if not trials:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    tail = (1 - level) / 2
    low = float(betaincinv(hits, trials - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, trials - hits, 1 - tail)) if hits < trials else 1.0
    return Interval(hits / trials, low, high, round(trials))


def difference_interval(
    a: ArrayLike,
    b: ArrayLike,
    weights_a: ArrayLike | None = None,
    weights_b: ArrayLike | None = None,
    clusters_a: Sequence[Any] | NDArray[Any] | None = None,
    clusters_b: Sequence[Any] | NDArray[Any] | None = None,
    *,
    paired: bool,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Difference:
    """The difference of two weighted means, with interval and two-sided bootstrap p-value.

    Args:
        a: items of the first side, (N,).
        b: items of the second side, (M,); where ``paired``, b[i] is about the same thing as a[i].
        weights_a: weights of ``a``; None: all one.
        weights_b: weights of ``b``.
        clusters_a: clusters of ``a``; where ``paired``, of the pairs.
        clusters_b: clusters of ``b``; must be None where ``paired``.
        paired: draw pairs together; otherwise draw each side on its own.
        level: coverage of the interval.
        draws: bootstrap draws.
        seed: seed of the draws.

    Raises:
        ValueError: as ``weighted_mean_interval``; or pairs of unequal number; or clusters_b beside ``paired``.
    """
    one, two = _vector(a, "a"), _vector(b, "b")
    if paired and len(one) != len(two):
        raise ValueError(f"paired sides must be of one length, got {len(one)} and {len(two)}")
    if paired and clusters_b is not None:
        raise ValueError("pairs have one cluster each: give clusters_a alone")
    codes = _codes(clusters_a, len(one))
    sums_a = _sums(one, _weights(weights_a, len(one)), codes)
    sums_b = _sums(two, _weights(weights_b, len(two)), codes if paired else _codes(clusters_b, len(two)))
    mean_a, mean_b = _mean(sums_a), _mean(sums_b)
    n = len(one) if paired else len(one) + len(two)
    nan = float("nan")
    if min(len(sums_a.weight), len(sums_b.weight)) < 2:
        return Difference(mean_a, mean_b, mean_a - mean_b, nan, nan, nan, n, paired)
    rng = np.random.default_rng(seed)
    drawn_a, drawn_b = _drawn_mean(sums_a), _drawn_mean(sums_b)
    if paired:
        drawn = _resample(len(sums_a.weight), draws, rng, lambda index: drawn_a(index) - drawn_b(index))
        arrangements = 2 ** len(sums_a.weight)
    else:
        side_a = _resample(len(sums_a.weight), draws, rng, drawn_a)
        drawn = side_a - _resample(len(sums_b.weight), draws, rng, drawn_b)
        arrangements = comb(len(sums_a.weight) + len(sums_b.weight), len(sums_a.weight))
    low, high = _ends(drawn, level)
    return Difference(mean_a, mean_b, mean_a - mean_b, low, high, _two_sided(drawn, arrangements), n, paired)


def holm(p_values: ArrayLike) -> Floats:
    """p-values (R,) corrected for their number by Holm's step-down method; NaN stays NaN and is not counted."""
    p = np.asarray(p_values, dtype=np.float64)
    corrected = np.full(p.shape, np.nan)
    present = np.flatnonzero(~np.isnan(p))
    order = present[np.argsort(p[present], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors)) if len(order) else []
    return corrected


def pearson(x: ArrayLike, y: ArrayLike) -> float | None:
    """Pearson correlation in float64 of x (N,) and y (N,); None where it is undefined: either is constant, or N < 2.

    Raises:
        ValueError: lengths differ or a value is not finite.
    """
    one = _vector(x, "x")
    two = _vector(y, "y", len(one))
    if len(one) < 2 or one.min() == one.max() or two.min() == two.max():
        return None
    one, two = one - one.mean(), two - two.mean()
    one, two = one / np.abs(one).max(), two / np.abs(two).max()  # squares of 1e-200 would vanish
    return float(np.clip(one @ two / np.sqrt((one @ one) * (two @ two)), -1.0, 1.0))


def auroc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Probability that a positive scores above a negative, ties counting half; None where either class is empty.

    Args:
        labels: (N,) of 0/1 or booleans.
        scores: (N,) finite.

    Raises:
        ValueError: lengths differ, a score is not finite or a label is neither 0 nor 1.
    """
    marks = _vector(labels, "labels")
    ranked = _vector(scores, "scores", len(marks))
    if not np.isin(marks, (0.0, 1.0)).all():
        raise ValueError("labels must be 0 or 1")
    positive = marks == 1
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return None
    _, inverse, counts = np.unique(ranked, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2  # mean rank of each tied group, from 1
    above = middle[inverse][positive].sum() - n_positive * (n_positive + 1) / 2
    return float(above / (n_positive * n_negative))


def minimum_detectable(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    clusters: Sequence[Any] | NDArray[Any] | None = None,
    *,
    paired: bool = False,
    level: float = 0.95,
    power: float = 0.8,
) -> float:
    """The smallest true difference of means that would be shown with probability ``power``.

    (z_level + z_power) * SE, assuming that means are normally distributed (clusters not too few). SE is the linearised
    standard error of a weighted mean over clusters; for plain items it is s / sqrt(n). Two independent sides as noisy as
    ``values`` are assumed, hence sqrt(2) * SE; with ``paired``, ``values`` are the differences of the pairs themselves.

    Returns:
        NaN with fewer than two clusters or without weight.
    """
    vector = _vector(values, "values")
    weight = _weights(weights, len(vector))
    codes = _codes(clusters, len(vector))
    sums = _sums(vector, weight, codes)
    count, mean = len(sums.weight), _mean(sums)
    if count < 2 or np.isnan(mean):
        return float("nan")
    residual = _sums(vector - mean, weight, codes).numerator  # (C,)
    error = np.sqrt(count / (count - 1) * (residual @ residual)) / sums.weight.sum()
    normal = NormalDist()
    z = normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)
    return float(z * error * (1.0 if paired else np.sqrt(2.0)))
