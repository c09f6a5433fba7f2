"""Numbers of a whole curve with their bootstrap draws: intervals and differences.

1. A crossing of a mean curve belongs to no item. It is kept as scores of the kind 'draw': item 0 is the estimate, of weight 1.
   Items 1 to B are the same number for B bootstrap draws of the groups, of weight 0. ``n`` is the number of groups.
2. Status 'censored': the curve was measured up to ``value`` and the number lies above it.
3. The interval's ends are quantiles of the draws: no end lies outside what the number can be. Quantiles are taken further out
   where groups are few, at Phi(-t sqrt(n / (n - 1))) (expanded percentiles, Hesterberg 2015).
4. Differences are taken draw by draw: draw b resamples the same groups on both sides, so that they pair. Where a side of a draw
   is censored, that end of the difference is open, and the draw counts for either sign.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats

from evalkit.util.statistics import Interval, OverSeeds

DRAW = "draw"
"""Kind of the scores."""
CENSORED = "censored"
"""Status of a number that lies above the score's value."""


class Drawn(NamedTuple):
    """An estimate and B draws of it."""

    estimate: float
    above: bool
    """The estimate is censored."""
    values: Float[np.ndarray, " B"]
    censored: Bool[np.ndarray, " B"]
    groups: int
    """Independent groups that were resampled."""

    def ends(self, level: float = 0.95) -> Ends:
        """The interval at ``level``; NaN without draws or with one group."""
        if not len(self.values) or self.groups < 2:
            return Ends(math.nan, math.nan, False, False)
        order = np.lexsort([self.censored, self.values])
        tail = _tail(self.groups, level) * (len(order) - 1)
        low, high = order[math.floor(tail)], order[math.ceil(len(order) - 1 - tail)]
        return Ends(float(self.values[low]), float(self.values[high]), bool(self.censored[low]), bool(self.censored[high]))

    def beyond(self, level: float = 0.95) -> str:
        """Which of 'mean', 'low' and 'high' are censored, separated by spaces."""
        ends = self.ends(level)
        marks = {"mean": self.above, "low": ends.low_above, "high": ends.high_above}
        return " ".join(name for name, is_above in marks.items() if is_above)


class Ends(NamedTuple):
    """An interval and which of its ends are censored."""

    low: float
    high: float
    low_above: bool
    high_above: bool


class DrawnDifference(NamedTuple):
    """a - b, a bound of it where one side is censored; an end is infinite where censoring leaves it open."""

    difference: float
    low: float
    high: float
    p: float


def _tail(groups: int, level: float) -> float:
    """Share of the draws that is cut off on either side."""
    t = stats.t.ppf((1 + level) / 2, groups - 1)
    return float(stats.norm.cdf(-t * math.sqrt(groups / (groups - 1))))


def drawn(scores: pd.DataFrame) -> Drawn | None:
    """``scores`` (rows of one metric) as an estimate with draws, means over the suite's seeds; None where they are something else
    or the estimate is undefined."""
    own = scores[(scores["kind"] == DRAW) & scores["status"].isin(("ok", CENSORED))]
    if own.empty or not (own["item"] == 0).any():
        return None
    above = own["status"] == CENSORED
    by_item = own.assign(above=above).groupby("item").agg({"value": "mean", "above": "any", "n": "max"})
    values, censored = by_item["value"].to_numpy(np.float64), by_item["above"].to_numpy(bool)  # item 0 is the first
    return Drawn(float(values[0]), bool(censored[0]), values[1:], censored[1:], int(by_item["n"].to_numpy()[0]))


def over_seeds(parts: Sequence[Drawn], level: float = 0.95) -> OverSeeds:
    """Mean of several dictionaries of one recipe: the seeds' noise, by Student's t, and that of the draws of the mean add up."""
    count, k = min(len(part.values) for part in parts), len(parts)
    estimates = np.array([part.estimate for part in parts])
    mean, sd, groups = float(estimates.mean()), float(estimates.std(ddof=1)), min(part.groups for part in parts)
    averaged = np.mean([part.values[:count] for part in parts], axis=0)
    ends = Drawn(mean, False, averaged, np.zeros(count, dtype=bool), groups).ends(level)
    reach = float(stats.t.ppf((1 + level) / 2, k - 1)) * sd / math.sqrt(k)
    low, high = mean - math.hypot(mean - ends.low, reach), mean + math.hypot(ends.high - mean, reach)
    return OverSeeds(Interval(mean, low, high, groups), sd, k)


def difference(a: Drawn, b: Drawn, level: float = 0.95) -> DrawnDifference:
    """a - b, draw by draw, with interval and two-sided p."""
    count, groups = min(len(a.values), len(b.values)), min(a.groups, b.groups)
    estimate = math.nan if a.above and b.above else a.estimate - b.estimate  # a bound where one of them is censored
    if not count or groups < 2:
        return DrawnDifference(estimate, math.nan, math.nan, math.nan)
    apart = a.values[:count] - b.values[:count]
    least = np.sort(np.where(b.censored[:count], -np.inf, apart))
    most = np.sort(np.where(a.censored[:count], np.inf, apart))
    tail = _tail(groups, level) * (count - 1)
    low, high = float(least[math.floor(tail)]), float(most[math.ceil(count - 1 - tail)])
    share = (min(np.count_nonzero(least <= 0), np.count_nonzero(most >= 0)) + 1) / (count + 1)
    # the inverse of ``_tail``: p is below 1 - level where that interval leaves 0 out
    t = -stats.norm.ppf(min(share, 0.5)) / math.sqrt(groups / (groups - 1))
    return DrawnDifference(estimate, low, high, float(2 * stats.t.sf(t, groups - 1)))
