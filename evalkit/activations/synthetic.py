"""Toy data whose features are known: sparse sums of random directions (Sharkey, Braun and Millidge 2022).

1. Truth: ``features`` directions in ``width`` dimensions, normalised Gaussians: more of them than dimensions is superposition.
2. Feature i is active with a probability that falls as decay^i: some features are frequent, most are rare. Probabilities are
   scaled so that ``active`` features are active a row on average.
3. correlated: each row draws one vector from a normal distribution with a random covariance (a symmetric matrix of uniform
   numbers, shifted until it is positive definite). Its normal CDF, times decay^i and scaled as above, gives that row's
   probabilities: some features come together.
4. Active features have strengths uniform in [0, 1). A row without any gets one feature at random, with strength 1.
5. x = strengths @ truth, plus Gaussian noise where asked.

Whether a dictionary found the truth is the mean over true directions of the largest cosine with a row of the dictionary
(``evalkit.dictionaries.similarity.nearest``): 1 if every one is there.

    data = toy.superposition(100_000, width=32, features=64, active=2.0, correlated=True, seed=0)
    data.x, data.truth                       # (100000, 32), (64, 32)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float

from evalkit.errors import SuiteError

STREAM = 7_919_000_000
"""Added to the seed: a trainer that draws its first weights with the same small seed must not start from the truth."""

BLOCK = 1 << 22
"""Most strengths held at a time (16 MB)."""


class ToyData(NamedTuple):
    """Activations and the directions they are made of."""

    x: Float[torch.Tensor, "N D"]
    truth: Float[torch.Tensor, "G D"]
    """Unit rows, the most frequent feature first."""


def covariance(features: int, generator: torch.Generator) -> Float[torch.Tensor, "G G"]:
    """A random positive definite matrix with ones on its diagonal."""
    uniform = torch.rand(features, features, generator=generator, dtype=torch.float64)
    symmetric = (uniform + uniform.T) / 2
    lowest = float(torch.linalg.eigvalsh(symmetric)[0])
    shifted = symmetric + (max(0.0, -lowest) + 1e-3) * torch.eye(features, dtype=torch.float64)
    deviations = shifted.diagonal().sqrt()
    return (shifted / deviations / deviations[:, None]).float()


def superposition(
    n: int,
    *,
    width: int = 256,
    features: int = 512,
    active: float = 5.0,
    decay: float = 0.99,
    correlated: bool = False,
    noise: float = 0.0,
    seed: int = 0,
) -> ToyData:
    """Rows of known make; the defaults are the published ones.

    Args:
        n: rows.
        width: D.
        features: G, true directions.
        active: mean number of active features a row, before rows without any are given one.
        decay: what the probability of being active is multiplied by from one feature to the next.
        correlated: whether some features come together.
        noise: standard deviation of Gaussian noise on every coordinate.
        seed: same seed, same data on one machine.

    Raises:
        SuiteError: impossible numbers.
    """
    if min(n, width, features) < 1 or not 0 < active <= features or not 0 < decay <= 1 or not noise >= 0:
        raise SuiteError(
            f"no toy data with n = {n}, width = {width}, features = {features}, active = {active}, decay = {decay}, "
            f"noise = {noise}",
            where="toy data",
            fix="n, width and features are 1 or more, 0 < active <= features, 0 < decay <= 1, noise is 0 or more",
        )
    generator = torch.Generator().manual_seed(STREAM + seed)
    truth = torch.randn(features, width, generator=generator)
    truth /= truth.norm(dim=1, keepdim=True)
    weights = decay ** torch.arange(features, dtype=torch.float32)
    odds = weights * (active / float(weights.sum()))  # (G,)
    factor = torch.linalg.cholesky(covariance(features, generator)) if correlated else None
    rows = max(1, BLOCK // features)
    x = torch.empty(n, width)
    for start in range(0, n, rows):
        count = min(rows, n - start)
        chance = odds.expand(count, features)
        if factor is not None:
            normal = torch.randn(count, features, generator=generator) @ factor.T
            chance = 2 * odds * (0.5 * (1 + torch.erf(normal / math.sqrt(2))))  # a CDF is 1/2 on average
        on = torch.rand(count, features, generator=generator) < chance
        strengths = torch.rand(count, features, generator=generator) * on
        empty = (~on.any(1)).nonzero()[:, 0]
        strengths[empty, torch.randint(features, (len(empty),), generator=generator)] = 1.0
        x[start : start + count] = strengths @ truth
    if noise:
        x += noise * torch.randn(n, width, generator=generator)
    return ToyData(x, truth)
