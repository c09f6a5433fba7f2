"""Massive activations: where the norms of ordinary positions end and those of massive ones begin.

1. Norms are looked at in logarithms; m is their median. s is a standard deviation that outliers do not move: the larger of
   1.4826 * median |log norm - m| and (95 % point - m) / 1.645, and at least ``LEAST_SPREAD``.
2. A boundary lies above m + 3 s and above the 95 % point, so that at most one position in twenty is left out.
3. An empty stretch of at least 3 s above that is a valley, however few positions lie beyond it.
4. Otherwise a window of width s slides over the tail. It is a valley when more positions lie beyond it than in it, by 3
   standard deviations. The tail of a single group at least halves over a width, which leaves fewer beyond a window than in it.
5. The limit is the middle of the widest gap between neighbouring norms in the lowest of the emptiest valleys. Without a valley
   there is no limit.

Massive activations: Sun et al. 2024 (arXiv 2402.17762). Their norms are several times those of all other positions, and a few of
them own the variance. With ``multiple`` the limit is that multiple of the median instead, and 0 is no limit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

LEAST_SPREAD = 0.02
"""Smallest s in use: norms that are nearly all equal would make a valley of every difference."""
FEWEST = 20
"""Positions from which on a valley is looked for."""
HIGH = 2.5
"""Multiple of the median norm above which kept positions are counted as high."""
MOST_HIGH = 0.05
"""Share of the kept variance that high positions may have without a warning."""
STEPS = 4
"""Windows looked at a width."""
BLOCK = 64
"""Windows whose distances are computed at a time."""


class NormFacts(NamedTuple):
    """What the rule made of the norms of one text, first positions aside."""

    median: float
    """Median norm, in the units of the activations."""
    massive_variance: float
    """Of the squared distance of all positions from the mean of the kept ones, the share of the positions left out."""
    high_variance: float
    """Of the kept positions' squared distance from their mean, the share of those above ``HIGH`` times the median norm."""
    high: int
    """Kept positions above ``HIGH`` times the median norm."""


def norm_limit(norms: Float[np.ndarray, " N"], multiple: float | None = None) -> float:
    """Largest norm of an ordinary position; infinite where there is no boundary.

    Args:
        norms: of the positions behind the first of each window, finite.
        multiple: limit in medians; 0 for no limit; None to look for the boundary.
    """
    if multiple is not None:
        return float(np.median(norms)) * multiple if multiple and norms.size else float("inf")
    logs = np.sort(np.log(norms[norms > 0].astype(np.float64)))  # (N,)
    if len(logs) < FEWEST:
        return float("inf")
    median, upper = (float(point) for point in np.quantile(logs, [0.5, 0.95]))
    spread = max(1.4826 * float(np.median(np.abs(logs - median))), (upper - median) / 1.645, LEAST_SPREAD)
    start = max(median + 3 * spread, upper)
    valley = _empty_stretch(logs, start, 3 * spread) or _shoulder(logs, start, spread)
    return float("inf") if valley is None else float(np.exp(_widest_gap(logs, *valley)))


class _Valley(NamedTuple):
    low: float
    high: float


def _empty_stretch(logs: Float[np.ndarray, " N"], start: float, width: float) -> _Valley | None:
    """The first stretch of ``width`` without a position that ends above ``start``, with positions beyond it."""
    ends = logs[int(np.searchsorted(logs, start)) :]
    if not len(ends):
        return None
    before = logs[len(logs) - len(ends) - 1] if len(ends) < len(logs) else ends[0]
    edges = np.concatenate([[before], ends])
    wide = np.flatnonzero(np.diff(edges) >= width)
    return _Valley(float(edges[wide[0]]), float(edges[wide[0] + 1])) if len(wide) else None


def _shoulder(logs: Float[np.ndarray, " N"], start: float, width: float) -> _Valley | None:
    """The lowest of the emptiest windows of ``width`` beyond which more positions lie than in them."""
    lows = np.arange(start, logs[-1], width / STEPS)  # (W,)
    counts = np.searchsorted(logs, lows + width) - np.searchsorted(logs, lows)  # (W,)
    beyond = len(logs) - np.searchsorted(logs, lows + width)  # (W,)
    clear = (beyond > 0) & (beyond - counts >= 3 * np.sqrt(beyond + counts))
    if not clear.any():
        return None
    fewest = counts[clear].min()
    low = float(lows[clear & (counts <= fewest + 2 * np.sqrt(fewest))][0])
    return _Valley(low, low + width)


def _widest_gap(logs: Float[np.ndarray, " N"], low: float, high: float) -> float:
    """Middle of the widest gap between neighbours of which at least one lies in [low, high]."""
    first, last = int(np.searchsorted(logs, low)), int(np.searchsorted(logs, high, side="right"))
    inside = np.clip(logs[max(first - 1, 0) : last + 1], low, high)
    edges = np.concatenate([[low], inside, [high]])
    widest = int(np.diff(edges).argmax())
    return float(edges[widest] + edges[widest + 1]) / 2


def norm_facts(
    x: Float[np.ndarray, "N T D"], norms: Float[np.ndarray, "N T"], keep: Bool[np.ndarray, "N T"], first: int
) -> NormFacts:
    """Median norm, and how the variance lies on either side of the limit and of ``HIGH`` medians.

    Args:
        norms: of ``x``.
        keep: positions that are kept.
        first: positions at the start of every window that are left out whatever their norm.
    """
    later = norms[:, first:]
    if not later.size or not keep.any():
        return NormFacts(float("nan"), float("nan"), float("nan"), 0)
    median = float(np.median(later))
    blocks = [slice(n, n + BLOCK) for n in range(0, len(x), BLOCK)]
    total = sum(x[b][keep[b]].sum(0, dtype=np.float64) for b in blocks)
    mean = total / keep.sum()  # (D,)
    high = keep & (norms > HIGH * median)
    of_kept = of_high = of_massive = 0.0
    for b in blocks:
        distance = np.square(x[b, first:] - mean).sum(-1)  # (B, T - first)
        of_kept += float(distance[keep[b, first:]].sum())
        of_high += float(distance[high[b, first:]].sum())
        of_massive += float(distance[~keep[b, first:]].sum())
    whole = of_kept + of_massive
    return NormFacts(median, of_massive / whole if whole else 0.0, of_high / of_kept if of_kept else 0.0, int(high.sum()))
