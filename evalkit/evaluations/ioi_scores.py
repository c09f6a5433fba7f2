"""Scores and rows of a patching measurement.

1. Items are the reported prompts (kind 'prompt'): the same ones for every dictionary, so that they pair.
2. Shares of the KL are ratios of means over all prompts, also those on which patching makes things worse. Where every denominator
   is positive, a prompt's item is its own ratio, weighted by the denominator: the jackknife over prompts is then that of the
   ratio. Where some are not, items are the ratio's influence values, r + (a - r b) / mean(b), whose mean is the ratio.
3. Where denominators have both signs and the interval of their mean holds 0, there is no ratio: every item is 'undefined'.
4. Where an ordering has seeds, a prompt has a score for each; they are resampled together. Crossings are those of the mean curve
   over the seeds. One that is not reached without some prompt is a value of the dictionary, not of a prompt: it pairs with none.
5. Rows hold seven significant digits: the model behind them computes in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.evaluations.base import Score
from evalkit.evaluations.ioi_curves import DRAWS, area, crossing
from evalkit.evaluations.ioi_measure import MEASURED, NULL, Curve, Measured, Ordering
from evalkit.evaluations.ratios import ratio_items
from evalkit.tasks.base import TaskReport

Floats = NDArray[np.float64]

PERCENTS = (50, 25, 10)
"""Shares of the unpatched KL, in percent, that patches are counted for."""


def scores(found: Measured, report: TaskReport, main: str, top: int, area_to: int, keep_error: bool = True) -> Iterator[Score]:
    """Every score of one dictionary.

    Args:
        found: what was measured.
        report: how the model does the task.
        main: the ordering the table speaks of.
        top: size of the set whose faithfulness is reported.
        area_to: number of patches the area goes to.
        keep_error: whether the error term was kept; where not, the KL with nothing patched is a number of its own.
    """
    for name, ending in ((main, ""), (NULL, "_random")):
        if found.of(name):
            yield from _crossings(found.of(name), found.reference, ending)
        for ordering in found.of(name):
            yield from _top(ordering, ending, top, found.target_difference)
    areas = {}
    for name in dict.fromkeys(ordering.ranking for ordering in found.orderings):
        of_seed = {o.seed: area(o.curve.sizes, o.curve.values["kl"], area_to) for o in found.of(name)}
        areas[name] = np.mean(list(of_seed.values()), axis=0)
        for seed, values in of_seed.items():
            yield from _ratio("area" if name == main else f"area_{name}", values, found.reference, seed)
        if name != NULL:
            for cost in ("passes", "seconds"):
                mean = float(np.mean([getattr(ordering, cost) for ordering in found.of(name)]))
                yield Score(f"{cost}_{name}", mean, n=len(of_seed))
    if "acdc" in areas:
        for name in areas:
            if name not in ("acdc", NULL):
                yield from _ratio(f"gap_{name}", areas[name] - areas["acdc"], found.reference)
    for name in found.left_out:
        costs = (f"passes_{name}", f"seconds_{name}")
        for metric in (f"area_{name}", *costs, *(f"gap_{other}" for other in areas if other != NULL)):
            yield Score(metric, None, status="undefined")
    kl = found.of(main)[0].curve.values["kl"]
    yield from _plain("kl_unpatched", found.reference)
    if not keep_error:
        yield from _plain("kl_nothing", kl[0])
    yield from _plain("kl_floor", kl[-1])
    for ordering in found.of(main):
        by_set = ordering.curve.values["kl"]
        yield from _plain("kl_lowest", by_set[int(by_set.mean(1).argmin())], ordering.seed)
    yield Score("unseen", float(found.unseen), n=kl.shape[1])
    yield from _ratio("unseen_share", kl[0] - found.unseen_kl, kl[0] - kl[-1])
    yield from _ratio("unseen_lost", found.seen_kl - kl[-1], kl[0] - kl[-1])
    yield Score("candidates", float(found.candidates), n=kl.shape[1])
    for metric, average in report._asdict().items():
        yield from _plain(metric, np.asarray(average.values))


def _crossings(orderings: list[Ordering], reference: Floats, ending: str) -> Iterator[Score]:
    """Patches and edit for each share, by their influence values, and how often it is missed."""
    sizes, seed = orderings[0].curve.sizes, orderings[0].seed
    kl, edit = (np.mean([ordering.curve.values[key] for ordering in orderings], axis=0) for key in ("kl", "edit"))
    for percent in PERCENTS:
        reached = crossing(sizes, kl, edit, reference, percent / 100)
        for metric, values in (("patches", reached.log_patches), ("edit", reached.edit)):
            if len(values) < kl.shape[1]:
                n = kl.shape[1]  # its weight beside another seed of the suite whose prompts have values
                yield Score(f"{metric}_{percent}{ending}", float(values[0]), weight=float(n), n=n, seed=seed)
            else:
                yield from _plain(f"{metric}_{percent}{ending}", values, seed)
        yield Score(f"missed_{percent}{ending}", reached.missed, n=DRAWS)


def _top(ordering: Ordering, ending: str, top: int, target: Floats) -> Iterator[Score]:
    """Logit difference recovered, faithfulness and completeness of the first ``top`` features."""
    values = ordering.curve.values
    at = int(np.searchsorted(ordering.curve.sizes, min(top, int(ordering.curve.sizes[-1]))))
    empty, full = values["kl"][0], values["kl"][-1]
    yield from _recovered(f"recovered{ending}", values["logit_difference"], at, target, ordering.seed)
    yield from _ratio(f"faithfulness{ending}", empty - values["kl"][at], empty - full, ordering.seed)
    yield from _ratio(f"completeness{ending}", ordering.without_top["kl"] - full, empty - full, ordering.seed)


def _recovered(metric: str, differences: Floats, at: int, target: Floats, seed: int) -> Iterator[Score]:
    """Way of the logit difference, weighted by its length: prompts the target changes little must not decide."""
    way = target - differences[0]
    yield from _ratio(metric, (differences[at] - differences[0]) * np.sign(way), np.abs(way), seed)


def _ratio(metric: str, numerators: Floats, denominators: Floats, seed: int = 0) -> Iterator[Score]:
    """mean(numerators) / mean(denominators) over prompts, as items; undefined where the denominator may be 0."""
    for item, found in enumerate(ratio_items(numerators, denominators)):
        status = "undefined" if found.value is None else "ok"
        yield Score(metric, found.value, item=item, kind="prompt", weight=found.weight, status=status, seed=seed)


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
