"""Scores and rows of a patching measurement.

1. Items are the reported prompts (kind 'prompt'): the same ones for every dictionary, so that they pair.
2. Shares of the KL are ratios of sums: a prompt's own ratio, weighted by its denominator.
3. Where an ordering has seeds, a prompt has a score for each; they are resampled together.
4. Rows hold seven significant digits: the model behind them computes in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.evaluations.base import Score
from evalkit.evaluations.ioi_curves import area, crossing
from evalkit.evaluations.ioi_measure import MEASURED, Curve, Measured, Ordering
from evalkit.tasks.base import TaskReport

Floats = NDArray[np.float64]

PERCENTS = (50, 25, 10)
"""Shares of the unpatched KL, in percent, that patches are counted for."""


def scores(found: Measured, report: TaskReport, main: str, top: int, area_to: int) -> Iterator[Score]:
    """Every score of one dictionary.

    Args:
        found: what was measured.
        report: how the model does the task.
        main: the ordering the table speaks of.
        top: size of the set whose faithfulness is reported.
        area_to: number of patches the area goes to.
    """
    for name, ending in ((main, ""), ("random", "_random")):
        for ordering in found.of(name):
            yield from _crossings(ordering, ending)
            yield from _top(ordering, ending, top, found.target_difference)
    areas = {}
    for name in dict.fromkeys(ordering.ranking for ordering in found.orderings):
        of_seed = {o.seed: area(o.curve.sizes, o.curve.values["kl"], area_to) for o in found.of(name)}
        areas[name] = np.mean(list(of_seed.values()), axis=0)
        for seed, values in of_seed.items():
            yield from _ratios("area" if name == main else f"area_{name}", values, _unpatched(found.orderings[0]), seed)
        if name != "random":
            passes = float(np.mean([ordering.passes for ordering in found.of(name)]))
            yield Score(f"passes_{name}", passes, n=len(of_seed))
    if "acdc" in areas:
        for name in areas:
            if name not in ("acdc", "random"):
                yield from _ratios(f"gap_{name}", areas[name] - areas["acdc"], _unpatched(found.orderings[0]), 0)
    kl = found.of(main)[0].curve.values["kl"]
    yield from _plain("kl_unpatched", kl[0])
    yield from _plain("kl_floor", kl[-1])
    yield Score("candidates", float(found.candidates), n=kl.shape[1])
    for metric, average in report._asdict().items():
        yield from _plain(metric, np.asarray(average.values))


def _unpatched(ordering: Ordering) -> Floats:
    """KL of each prompt where nothing is patched."""
    return ordering.curve.values["kl"][0]


def _crossings(ordering: Ordering, ending: str) -> Iterator[Score]:
    """Patches and edit for each share, by their influence values."""
    curve = ordering.curve
    for percent in PERCENTS:
        reached = crossing(curve.sizes, curve.values["kl"], curve.values["edit"], percent / 100)
        yield from _plain(f"patches_{percent}{ending}", reached.log_patches, ordering.seed)
        yield from _plain(f"edit_{percent}{ending}", reached.edit, ordering.seed)


def _top(ordering: Ordering, ending: str, top: int, target: Floats) -> Iterator[Score]:
    """Logit difference recovered, faithfulness and completeness of the first ``top`` features."""
    values = ordering.curve.values
    at = int(np.searchsorted(ordering.curve.sizes, min(top, int(ordering.curve.sizes[-1]))))
    empty, full = values["kl"][0], values["kl"][-1]
    yield from _recovered(f"recovered{ending}", values["logit_difference"], at, target, ordering.seed)
    yield from _ratios(f"faithfulness{ending}", empty - values["kl"][at], empty - full, ordering.seed)
    yield from _ratios(f"completeness{ending}", ordering.without_top["kl"] - full, empty - full, ordering.seed)


def _recovered(metric: str, differences: Floats, at: int, target: Floats, seed: int) -> Iterator[Score]:
    """Way of the logit difference, weighted by its length: prompts the target changes little must not decide."""
    way = target - differences[0]
    yield from _ratios(metric, (differences[at] - differences[0]) * np.sign(way), np.abs(way), seed)


def _ratios(metric: str, numerators: Floats, denominators: Floats, seed: int = 0) -> Iterator[Score]:
    """A ratio a prompt with its denominator as the weight; undefined where that is not positive."""
    for item, (a, b) in enumerate(zip(numerators.tolist(), denominators.tolist(), strict=True)):
        if b > 0 and math.isfinite(a):
            yield Score(metric, a / b, item=item, kind="prompt", weight=b, seed=seed)
        else:
            yield Score(metric, None, item=item, kind="prompt", weight=0.0, status="undefined", seed=seed)


def _plain(metric: str, values: Floats, seed: int = 0) -> Iterator[Score]:
    """A value a prompt; NaN is 'undefined'."""
    for item, value in enumerate(values.tolist()):
        ok = math.isfinite(value)
        yield Score(metric, value if ok else None, item=item, kind="prompt", status="ok" if ok else "undefined", seed=seed)


def tables(found: Measured) -> dict[str, list[dict[str, Any]]]:
    """Rows of ``patching_curves``, ``feature_ranks`` and ``patching_rankings``."""
    curves, ranks, costs = [], [], []
    for o in found.orderings:
        about = {"ranking": o.ranking, "seed": o.seed}
        for curve in (o.curve, o.accepted):
            curves += [] if curve is None else _curve_rows(curve, about)
        ranks += [
            {**about, "place": place, "feature": feature, "effect": None if effect is None else _short(effect)}
            for place, (feature, effect) in enumerate(zip(o.features, o.effects, strict=True), start=1)
        ]
        costs.append(
            {**about, "prompts": o.prompts, "candidates": o.candidates, "passes": o.passes, "seconds": round(o.seconds, 3)}
        )
    return {"patching_curves": curves, "feature_ranks": ranks, "patching_rankings": costs}


def _curve_rows(curve: Curve, about: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for s, (size, threshold) in enumerate(zip(curve.sizes.tolist(), curve.thresholds, strict=True)):
        for prompt in range(curve.values["kl"].shape[1]):
            numbers = {key: _short(float(curve.values[key][s, prompt])) for key in MEASURED}
            rows.append({**about, "threshold": threshold, "size": size, "prompt": prompt, **numbers})
    return rows


def _short(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None
