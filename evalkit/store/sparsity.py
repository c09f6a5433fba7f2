"""L0 of the dictionaries of a results file, and which of them may be compared.

1. L0 is the mean number of non-zero codes a kept token. It comes from the metric ``l0`` (of ``reconstruction``); without that,
   it is the sum of the densities that ``geometry`` stores for every feature.
2. Each run has its own L0: the same dictionary fires otherwise on other text. Where a run has none, another one's stands.
3. Two dictionaries are comparable where the larger L0 is at most ``LIKE`` times the smaller. A dense code rebuilds and
   predicts more, so that being better at another L0 is no merit. A dictionary is always comparable with itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd

LIKE = 1.2
"""Most that two L0 may differ by, as a ratio."""
OTHER = "other L0"
MEASURED_BY = ("reconstruction", "geometry")
"""Evaluations whose metrics give L0."""
UNKNOWN = "L0 not measured"
MEASURED = """
    SELECT run_id, dictionary_id, hook_point, coalesce(max(own), max(summed)) AS l0 FROM (
        SELECT u.run_id, u.dictionary_id, u.hook_point, u.unit_order,
               sum(s.value * coalesce(s.weight, 1)) FILTER (s.metric = 'l0')
                   / nullif(sum(coalesce(s.weight, 1)) FILTER (s.metric = 'l0'), 0) AS own,
               CASE WHEN count(*) FILTER (s.metric = 'density' AND s.kind = 'feature') = max(d.n_features)
                    THEN sum(s.value) FILTER (s.metric = 'density' AND s.kind = 'feature') END AS summed
        FROM run_units u JOIN scores s ON s.unit_key = u.unit_key
        LEFT JOIN dictionaries d ON d.dictionary_id = u.dictionary_id
        WHERE u.status = 'done' AND s.status = 'ok' AND s.metric IN ('l0', 'density')
        GROUP BY ALL
    ) GROUP BY ALL HAVING l0 IS NOT NULL ORDER BY max(unit_order)
"""
"""run_id, dictionary_id, hook_point and l0 of whatever was measured, the latest last."""


class Sparsity(NamedTuple):
    """L0 by run, dictionary and hook point; by dictionary and hook point where the run did not measure it."""

    of_run: dict[tuple[str, str, str], float]
    of_any: dict[tuple[str, str], float]

    def __call__(self, run: str, dictionary_id: str, hook_point: str) -> float:
        """L0 of a dictionary at a hook point; NaN where it was never measured."""
        return self.of_run.get((run, dictionary_id, hook_point), self.of_any.get((dictionary_id, hook_point), math.nan))


NO_L0 = Sparsity({}, {})
"""Nothing measured."""


def sparsity(measured: pd.DataFrame) -> Sparsity:
    """The rows of ``MEASURED``, to be asked."""
    rows = list(measured[["run_id", "dictionary_id", "hook_point", "l0"]].itertuples(index=False, name=None))
    return Sparsity({row[:3]: float(row[3]) for row in rows}, {row[1:3]: float(row[3]) for row in rows})


def unlike(l0_a: float, l0_b: float) -> str:
    """Why two dictionaries are not comparable; '' where they are."""
    if math.isnan(l0_a) or math.isnan(l0_b):
        return UNKNOWN
    low, high = sorted((l0_a, l0_b))
    return "" if high <= LIKE * low else OTHER
