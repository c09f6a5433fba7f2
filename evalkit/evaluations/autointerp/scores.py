"""Scores of explain-and-simulate from real and simulated activations: the arithmetic behind ``autointerp``.

1. A constant prediction has a correlation of 0, for it predicts nothing. A constant activation has none: 'undefined'.
2. A failed simulation among the fragments makes a score 'failed'. Tokens that are not kept or have no value are left out.
3. What a judge predicts under any explanation is partialled out (``specific``).
4. A control variate that is known of every feature corrects the mean of the sampled ones (``adjusted``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evalkit.activations.fragments import Fragment
from evalkit.evaluations.autointerp.fragments import Chosen
from evalkit.evaluations.base import Score
from evalkit.judges.base import Explanation, Simulation
from evalkit.judges.prompts.explanation import copies_an_example
from evalkit.util.statistics import pearson

LEAST_ADJUSTED = 12
"""Scored features from which on the control variate is used: its slope is estimated from them."""


class Scored(NamedTuple):
    """One feature's simulated fragments under one explanation."""

    fragments: list[Fragment]
    part: list[str]
    actual: list[np.ndarray]
    predicted: list[Simulation]

    def where(self, part: str | None) -> Scored:
        """The fragments of one part; all of them for None."""
        return self._at([i for i, each in enumerate(self.part) if part in (None, each)])

    def of(self, fragments: Sequence[Fragment]) -> Scored:
        """These fragments, in this order."""
        return self._at([self.fragments.index(fragment) for fragment in fragments])

    def _at(self, places: Sequence[int]) -> Scored:
        return Scored(
            [self.fragments[i] for i in places],
            [self.part[i] for i in places],
            [self.actual[i] for i in places],
            [self.predicted[i] for i in places],
        )

    @property
    def failed(self) -> bool:
        """Whether a simulation failed."""
        return any(answer.expected is None for answer in self.predicted)


def tokens_of(scored: Scored) -> tuple[np.ndarray, np.ndarray]:
    """Real and predicted activations (L,) of all tokens, NaN where one is missing."""
    return np.concatenate(scored.actual), np.concatenate([answer.values for answer in scored.predicted])


def correlation_of(actual: np.ndarray, predicted: np.ndarray) -> float | None:
    """Pearson's r of values (L,); 0 for a constant prediction, which predicts nothing; None for a constant activation."""
    if len(actual) < 2 or actual.min() == actual.max():
        return None
    return pearson(actual, predicted) or 0.0


def correlation(metric: str, feature: int, scored: Scored, seed: int, part: str | None = None) -> Score:
    """``correlation_of`` over all tokens of the fragments of ``part`` (None: all), flattened as published.

    A failed simulation among them makes it 'failed', a constant activation 'undefined'. Positions that are not kept and tokens
    without a value are left out; ``n`` counts the others.
    """
    picked = scored.where(part)
    if picked.failed:
        return Score(metric, None, feature, "feature", status="failed", n=0, seed=seed)
    actual, predicted = tokens_of(picked)
    seen = ~np.isnan(actual) & ~np.isnan(predicted)
    value = correlation_of(actual[seen], predicted[seen])
    return Score.of(metric, value, feature, "feature", n=int(seen.sum()), seed=seed)


def by_fragment(feature: int, scored: Scored, seed: int) -> Score:
    """Mean of the single fragments' correlations, over those whose activation varies."""
    if scored.failed:
        return Score("per_fragment", None, feature, "feature", status="failed", n=0, seed=seed)
    found = []
    for actual, answer in zip(scored.actual, scored.predicted, strict=True):
        seen = ~np.isnan(actual) & ~np.isnan(answer.values)
        value = correlation_of(actual[seen], answer.values[seen])
        found += [] if value is None else [value]
    return Score.of("per_fragment", float(np.mean(found)) if found else None, feature, "feature", n=len(found), seed=seed)


def specific(feature: int, own: Scored, null: Scored, seed: int) -> Score:
    """Partial correlation of real and own predicted activations, given the predictions under another explanation."""
    if own.failed or null.failed:
        return Score("specific", None, feature, "feature", status="failed", n=0, seed=seed)
    (actual, predicted), (_, prior) = tokens_of(own), tokens_of(null)
    seen = ~np.isnan(actual) & ~np.isnan(predicted) & ~np.isnan(prior)
    value = partial(actual[seen], predicted[seen], prior[seen])
    return Score.of("specific", value, feature, "feature", n=int(seen.sum()), seed=seed)


def partial(actual: np.ndarray, predicted: np.ndarray, prior: np.ndarray) -> float | None:
    """Correlation (L,) of ``actual`` and ``predicted`` with a linear part of ``prior`` taken out of both.

    0 where nothing of the prediction is left; None where nothing of the activation is.
    """
    if len(actual) < 3 or actual.min() == actual.max():
        return None
    with_prior, between = pearson(actual, prior) or 0.0, pearson(predicted, prior) or 0.0
    own = pearson(actual, predicted) or 0.0
    if 1 - with_prior**2 < 1e-12:
        return None
    left = (1 - with_prior**2) * (1 - between**2)
    return float(np.clip((own - with_prior * between) / np.sqrt(left), -1.0, 1.0)) if 1 - between**2 > 1e-12 else 0.0


def missing_tokens(chosen: Sequence[Chosen], own: Sequence[Scored]) -> list[Score]:
    """Share of each feature's kept tokens without a value, over fragments whose calls did not fail; none where all have one."""
    shares = []
    for c, scored in zip(chosen, own, strict=True):
        pairs = [(a, p.values) for a, p in zip(scored.actual, scored.predicted, strict=True) if p.expected is not None]
        lost = [np.isnan(predicted[~np.isnan(actual)]) for actual, predicted in pairs]
        n = sum(map(len, lost))
        value = sum(int(part.sum()) for part in lost) / n if n else None
        shares.append(Score("missing", value, c.feature, "feature", status="failed" if value is None else "ok", n=n))
    return shares if any(score.value for score in shares) else []


def constant_share(metric: str, own: Sequence[Scored]) -> Score:
    """Share of the features without a failed call whose prediction is one value for all tokens."""
    answered = [tokens_of(scored)[1] for scored in own if not scored.failed]
    known = [values[~np.isnan(values)] for values in answered]
    constant = [len(values) > 0 and values.min() == values.max() for values in known]
    return Score.of(metric, sum(constant) / len(constant) if constant else None, n=len(constant))


def template_share(words: Sequence[Explanation]) -> Score:
    """Share of the explanations that have the form of an example in the explainer's prompt."""
    said = [explanation.text for explanation in words if explanation.text is not None]
    return Score.of("template", sum(map(copies_an_example, said)) / len(said) if said else None, n=len(said))


def digit_mass(own: Sequence[Scored]) -> Score:
    """Median probability of the digits over all slots; 'undefined' where the judge shows none."""
    mass = [value for scored in own for answer in scored.predicted for value in answer.mass or []]
    return Score.of("digit_mass", float(np.median(mass)) if mass else None, n=len(mass))


def over(metric: str, own: dict[int, float], listed: dict[int, float], seed: int) -> list[Score]:
    """Own score minus the reference's, of features that have both."""
    return [Score(metric, own[f] - listed[f], f, "feature", seed=seed) for f in own if f in listed]


def adjusted(own: dict[int, float], listed: dict[int, float], seed: int) -> list[Score]:
    """Regression estimator of the judge's mean over all eligible features (Cochran 1977, Sampling Techniques, chapter 7).

    Each score is r - b (x - X), x the feature's lexical r and X its mean over all: their mean is the estimate, and their
    spread is what the control variate leaves.
    """
    both = [feature for feature in own if feature in listed]
    if len(both) < LEAST_ADJUSTED:
        return []
    r, x = np.array([own[f] for f in both]), np.array([listed[f] for f in both])
    if x.min() == x.max():
        return []
    slope = float(np.cov(r, x)[0, 1] / x.var(ddof=1))
    values = r - slope * (x - float(np.mean(list(listed.values()))))
    return [Score("adjusted", float(v), f, "feature", seed=seed) for f, v in zip(both, values, strict=True)]
