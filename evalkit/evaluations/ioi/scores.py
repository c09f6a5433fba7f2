"""Scores and rows of a patching measurement.

1. Items are the reported prompts (kind 'prompt'): the same ones for every dictionary, so that they pair.
2. Shares of the KL are ratios of means over all prompts, also those on which patching makes things worse. Where every denominator
   is positive, a prompt's item is its own ratio, weighted by the denominator: the jackknife over prompts is then that of the
   ratio. Where some are not, items are the ratio's influence values, r + (a - r b) / mean(b), whose mean is the ratio.
3. Where denominators have both signs and the interval of their mean holds 0, there is no ratio: every item is 'undefined'.
4. Where an ordering has seeds, a prompt has a score for each; they are resampled together.
5. A crossing is a number of the mean curve over the seeds: an estimate with bootstrap draws of the prompts (``util.bootstrap``),
   censored where the curve does not get there. Draws are the same for every dictionary, so that they pair.
6. Besides the KL, crossings are taken of the median over prompts of the share that is left, and of what is left of the way of the
   logit difference: one or two prompts of large KL do not decide the former, nor what has nothing to do with the answers the
   latter.
7. Rows hold seven significant digits: the model behind them computes in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.evaluations.base import Score
from evalkit.evaluations.ioi.curves import DRAWS, Crossing, area, crossing, over_chance
from evalkit.evaluations.ioi.measure import ACTIVE, MEASURED, NULL, Curve, Measured, Ordering, named
from evalkit.evaluations.reconstruction.ratios import ratio_items
from evalkit.tasks.base import TaskReport
from evalkit.util.bootstrap import CENSORED, DRAW

Floats = NDArray[np.float64]

PERCENTS = (50, 25, 10)
"""Shares of the unpatched KL, in percent, that patches are counted for."""

HALF = 0.5
"""The share of the crossings that stand beside the first."""


def scores(found: Measured, report: TaskReport, main: str, top: int, area_to: int, keep_error: bool = True) -> Iterator[Score]:
    """Every score of one dictionary.

    Args:
        found: what was measured.
        report: how the model does the task.
        main: the ordering reported in the table.
        top: size of the set whose faithfulness is reported.
        area_to: number of patches the area goes to.
        keep_error: whether the error term was kept; where not, the KL with nothing patched is a number of its own.
    """
    yield from _all_crossings(found, main)
    for name, ending in ((main, ""), (NULL, "_random")):
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
            yield Score.of(metric, None)
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


def _all_crossings(found: Measured, main: str) -> Iterator[Score]:
    """Every crossing: of the reported prompts, of the arms beside them, and of the further orderings."""
    whole = {"": found.of(main), "_random": found.of(NULL)}
    for percent in PERCENTS:
        share, both = percent / 100, dict[str, Crossing]()
        for ending, orderings in whole.items():
            if not orderings:
                continue
            reached = both[ending] = _crossing(orderings, "kl", found.reference, share)
            yield from _drawn(f"patches_{percent}{ending}", reached, reached.log_patches, found.reference)
            yield from _drawn(f"edit_{percent}{ending}", reached, reached.beside["edit"], found.reference)
            yield from _drawn(f"active_{percent}{ending}", reached, reached.beside[ACTIVE], found.reference)
            yield Score(f"missed_{percent}{ending}", reached.missed, n=DRAWS)
        yield from _ratio_to_chance(f"chance_{percent}", both, found.reference)
    for metric, crossed in (("patches_median", _median), ("patches_difference", _difference)):
        for ending, orderings in whole.items():
            if orderings:
                reached = crossed(orderings, found)
                yield from _drawn(f"{metric}{ending}", reached, reached.log_patches, found.reference)
    for name in dict.fromkeys(ordering.ranking for ordering in found.orderings):
        if name not in (main, NULL):
            reached = _crossing(found.of(name), "kl", found.reference, HALF)
            yield from _drawn(f"patches_50_{name}", reached, reached.log_patches, found.reference)
    for arm, there in found.beside.items():
        both = {}
        for ending, name in (("", main), ("_random", NULL)):
            if named(there.orderings, name):
                reached = both[ending] = _crossing(named(there.orderings, name), "kl", there.reference, HALF)
                yield from _drawn(f"patches_50_{arm}{ending}", reached, reached.log_patches, there.reference)
        yield from _ratio_to_chance(f"chance_50_{arm}", both, there.reference)


def _over_seeds(orderings: list[Ordering], key: str) -> Floats:
    """Mean over the seeds of an ordering, (S, N)."""
    mean: Floats = np.mean([ordering.curve.values[key] for ordering in orderings], axis=0)
    return mean


def _crossing(orderings: list[Ordering], key: str, reference: Floats, share: float) -> Crossing:
    beside = {name: _over_seeds(orderings, name) for name in ("edit", ACTIVE)}
    return crossing(orderings[0].curve.sizes, _over_seeds(orderings, key), reference, share, beside)


def _median(orderings: list[Ordering], found: Measured) -> Crossing:
    """Where half of the prompts have at most half of their own KL left."""
    kl = _over_seeds(orderings, "kl")
    left = np.divide(kl, found.reference, out=np.zeros_like(kl), where=found.reference > 0)
    return crossing(orderings[0].curve.sizes, left, np.sign(found.reference), HALF, centre=np.median)


def _difference(orderings: list[Ordering], found: Measured) -> Crossing:
    """Where half of the way of the mean logit difference from base to target is gone."""
    differences = _over_seeds(orderings, "logit_difference")
    way = found.target_difference - differences[0]
    return crossing(orderings[0].curve.sizes, (found.target_difference - differences) * np.sign(way), np.abs(way), HALF)


def _ratio_to_chance(metric: str, both: dict[str, Crossing], reference: Floats) -> Iterator[Score]:
    if len(both) == 2:
        ratio = over_chance(both[""], both["_random"])
        yield from _drawn(metric, ratio, ratio.log_patches, reference)


def _drawn(metric: str, crossed: Crossing, values: Floats, reference: Floats) -> Iterator[Score]:
    """``values`` at a crossing as an estimate with its draws; undefined where the estimate is."""
    n = len(reference)
    if not crossed.defined[0]:
        yield Score.of(metric, None, kind=DRAW, weight=0.0, n=n)
        return
    for item in np.flatnonzero(crossed.defined).tolist():
        status = "ok" if crossed.reached[item] else CENSORED
        yield Score(metric, float(values[item]), item=item, kind=DRAW, weight=float(item == 0), status=status, n=n)


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
        yield Score.of(metric, found.value, item, "prompt", found.weight, seed=seed)


def _plain(metric: str, values: Floats, seed: int = 0) -> Iterator[Score]:
    """A value a prompt; NaN is 'undefined'."""
    for item, value in enumerate(values.tolist()):
        yield Score.of(metric, value, item, "prompt", seed=seed)


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
