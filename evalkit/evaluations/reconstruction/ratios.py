"""A ratio of sums as items of a mean, so that one bootstrap over items gives its interval.

1. The ratio is sum(a) / sum(b) over all items, also those whose denominator is not positive.
2. Where every b is positive, an item is its own ratio a / b with the weight b.
3. Where some are not, items are the ratio's influence values r + (a - r b) / mean(b), each with the weight 1. Their mean is r,
   and their spread is that of the ratio (Hampel 1974).
4. Where some are not and the interval of the mean denominator holds 0, there is no ratio: every item is undefined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evalkit.util.statistics import weighted_mean_interval


class RatioItem(NamedTuple):
    """One item of a ratio."""

    value: float | None
    """None where the ratio is undefined."""
    weight: float
    own: bool
    """Whether the value is the item's own ratio: only then is the mean over some of the items their ratio."""


def ratio_items(
    numerators: NDArray[np.float64], denominators: NDArray[np.float64], clusters: Sequence[Any] | None = None
) -> list[RatioItem]:
    """Items whose weighted mean is sum(numerators) / sum(denominators).

    Args:
        numerators: one number an item, (N,).
        denominators: (N,).
        clusters: (N,) what is resampled together; None: each item on its own.
    """
    a, b = numerators, denominators
    if not len(b):
        return []
    if (b > 0).all() and np.isfinite(a).all():
        return [RatioItem(value, weight, True) for value, weight in zip((a / b).tolist(), b.tolist(), strict=True)]
    groups = len(set(clusters)) if clusters is not None else len(b)
    lowest = weighted_mean_interval(b, clusters=clusters).low if groups > 1 else float(b.mean())
    if not (lowest > 0 and np.isfinite(a).all()):
        return [RatioItem(None, 0.0, True) for _ in b]
    ratio = a.sum() / b.sum()
    return [RatioItem(value, 1.0, False) for value in (ratio + (a - ratio * b) / b.mean()).tolist()]
