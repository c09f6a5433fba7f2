"""Every score of single features in a run, with its null beside it.

1. All feature scores are read in one query. If several configurations have a feature, the first one is used. Several seeds
   stand side by side.
2. A score that failed or is undefined says so: it is not left out.
3. A metric that is another's null stands in brackets beside it, as in the tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from evalkit.report.selection import Name
from evalkit.report.tables import number
from evalkit.store.reader import Results

SCORES = """
SELECT u.evaluation, u.evaluation_version, u.dictionary, u.hook_point, u.config, s.item AS feature, s.metric, s.value, s.status
FROM run_units u JOIN scores s ON s.unit_key = u.unit_key
WHERE u.run_id = $run AND u.status = 'done' AND s.kind = 'feature' AND u.evaluation IN (SELECT unnest($evaluations))
ORDER BY u.unit_order, s.item, s.metric, s.seed
"""
DESCRIPTIONS = (
    "SELECT * FROM metric_descriptions WHERE evaluation IN (SELECT unnest($evaluations)) ORDER BY evaluation, position, metric"
)


class Line(NamedTuple):
    """One metric of a feature."""

    evaluation: str
    title: str
    value: str
    null: str
    note: str


class _Metric(NamedTuple):
    title: str
    digits: int
    null: str
    exponent: bool
    note: str


class _Score(NamedTuple):
    value: float
    status: str


class FeatureScores:
    """Scores by feature, evaluation and metric.

    Args:
        scores: rows of ``SCORES``.
        metrics: rows of ``DESCRIPTIONS``.
        evaluations: their names, in the order in which ``of`` lists them.
    """

    def __init__(self, scores: pd.DataFrame, metrics: pd.DataFrame, evaluations: Sequence[str]) -> None:
        self._evaluations = list(evaluations)
        self._scores: dict[Name, dict[tuple[str, str], list[_Score]]] = {}
        config: dict[tuple[Name, str], Any] = {}
        rows: list[Any] = list(scores.itertuples())
        for row in rows:
            name = (str(row.dictionary), str(row.hook_point), int(row.feature))
            # the first configuration that has the feature is used
            if config.setdefault((name, row.evaluation), row.config) == row.config:
                own = self._scores.setdefault(name, {}).setdefault((row.evaluation, row.metric), [])
                own.append(_Score(float(row.value), str(row.status)))
        versions = scores.groupby("evaluation")["evaluation_version"].max().to_dict() if len(scores) else {}
        self._metrics: dict[tuple[str, str], _Metric] = {}
        known: list[Any] = list(metrics.itertuples())
        for row in known:
            if versions.get(row.evaluation) == row.evaluation_version:
                digits = 3 if pd.isna(row.digits) else int(row.digits)
                null, note = (text if isinstance(text, str) else "" for text in (row.null_metric, row.note))
                title = row.title if isinstance(row.title, str) and row.title else str(row.metric)
                self._metrics[(row.evaluation, row.metric)] = _Metric(title, digits, null, row.transform == "exp", note)

    def has(self, name: Name, evaluation: str) -> bool:
        """Whether a feature has a score in an evaluation."""
        return any(key[0] == evaluation for key in self._scores.get(name, ()))

    def value(self, name: Name, evaluation: str, metric: str) -> float | None:
        """A score, None where there is none that is ok."""
        found = self._scores.get(name, {}).get((evaluation, metric), [])
        values = [score.value for score in found if score.status == "ok" and not math.isnan(score.value)]
        return values[0] if values else None

    def text(self, name: Name, evaluation: str, metric: str, digits: int) -> str:
        """A score in words, '' where it was not measured; seeds beside each other."""
        found = self._scores.get(name, {}).get((evaluation, metric), [])
        about = self._metrics.get((evaluation, metric))
        exponent = about is not None and about.exponent
        return ", ".join(_shown(score, digits, exponent) for score in found)

    def of(self, name: Name) -> list[Line]:
        """All scores of a feature, by evaluation, in the order of the tables."""
        own = self._scores.get(name, {})
        order = {key: place for place, key in enumerate(self._metrics)}
        nulls = {(key[0], about.null) for key, about in self._metrics.items() if about.null and key in own}
        shown = sorted(own, key=lambda key: (self._evaluations.index(key[0]), order.get(key, len(order)), key))
        found = []
        for evaluation, metric in shown:
            if (evaluation, metric) in nulls:
                continue
            about = self._metrics.get((evaluation, metric), _Metric(metric, 3, "", False, ""))
            null = self.text(name, evaluation, about.null, about.digits) if about.null else ""
            found.append(Line(evaluation, about.title, self.text(name, evaluation, metric, about.digits), null, about.note))
        return found


def _shown(score: _Score, digits: int, exponent: bool) -> str:
    if score.status != "ok":
        return score.status
    value = math.exp(score.value) if exponent and score.value < 700 else score.value
    return number(value, digits)


def feature_scores(store: Results, run: str, evaluations: Sequence[str]) -> FeatureScores:
    """The feature scores of some evaluations of one run."""
    asked = {"evaluations": list(evaluations)}
    return FeatureScores(store.own(SCORES, {"run": run, **asked}), store.own(DESCRIPTIONS, asked), evaluations)
