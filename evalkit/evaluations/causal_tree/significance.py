"""Is a candidate's mean share of the child's code above 0? Two tests over contexts, and their correction.

1. ``one_sided``: Student's t. It takes shares for about normal.
2. ``sign_flips``: how often the mean is as large where the sign of each context's share is drawn at random. It takes shares for
   symmetric about 0 where the candidate causes nothing, and nothing else. All sign patterns are tried where they are few, so
   that p is exact. Contexts without any effect change nothing in it: p is at least 1 / 2^(contexts with an effect).
3. ``corrected``: Holm (1979), for all candidates, those that were not tested included.

Neither test holds where a rare context would raise the child a lot and none of those drawn does.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import stats

EXACT = 16
"""Contexts up to which all patterns of signs are tried."""
PATTERNS = 1 << EXACT
"""Patterns drawn where there are more contexts."""


def one_sided(shares: Float[np.ndarray, "K C"]) -> Float[np.ndarray, " K"]:
    """p of each mean being above 0, by a t-test over contexts; 1 where there are fewer than two or all are 0.

    Shares are at most 1 and have no lower end. Where a candidate mostly lowers the child a little and seldom raises it a lot, few
    contexts may miss the latter. Simulated (``tests/unit/test_causal_scores.py``), 1,200 candidates with a mean of 0, the child's
    code log-normal where they are active, 8 to 16 contexts: a child in 10 at most has a false parent where all of them have a
    spread of 0.3, 15 to 33 in 100 at 0.5; 1 or 2 in 100 where most have less than 0.1.
    """
    K, C = shares.shape
    if C < 2 or K == 0:
        return np.ones(K)
    mean, error = shares.mean(1), shares.std(1, ddof=1) / np.sqrt(C)
    t = np.divide(mean, error, out=np.where(mean > 0, np.inf, 0.0), where=error > 0)
    return np.where(mean > 0, stats.t.sf(t, C - 1), 1.0)


def sign_flips(shares: Float[np.ndarray, "K C"], seed: int = 0) -> Float[np.ndarray, " K"]:
    """p of each mean being above 0, by flips of the contexts' signs; exact up to ``EXACT`` contexts.

    Args:
        seed: of the patterns, where not all are tried.
    """
    K, C = shares.shape
    if K == 0 or C == 0:
        return np.ones(K)
    observed = shares.sum(1)
    least = observed - 1e-9 * np.abs(shares).sum(1)  # ties in exact arithmetic are ties here too
    if C <= EXACT:
        signs = 1.0 - 2.0 * ((np.arange(1 << C)[:, None] >> np.arange(C)) & 1)
        return ((signs @ shares.T) >= least).mean(0)
    signs = np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), (PATTERNS, C))
    return (1 + ((signs @ shares.T) >= least).sum(0)) / (1 + PATTERNS)


def corrected(p: Float[np.ndarray, " K"], tests: int) -> Float[np.ndarray, " K"]:
    """Holm's p-values of K of ``tests`` tests, the others taken as not significant."""
    order = np.argsort(p, kind="stable")
    out = np.empty(len(p))
    out[order] = np.minimum(1, np.maximum.accumulate(p[order] * (tests - np.arange(len(p)))))
    return out
