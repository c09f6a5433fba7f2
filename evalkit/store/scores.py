"""Scores into tables and comparisons: the numbers a reader sees, with their intervals.

1. The ok scores of one metric become ``Items``; failed and undefined ones are counted and enter no mean.
2. Resampled together are items of one cluster; without a cluster, one item under all its seeds; scores of a dictionary
   as a whole (no items) are resampled by seed.
3. A table row is a weighted mean with its interval, beside it the null metric computed in the same way.
4. A comparison pairs items that are the same thing: windows of the same text, prompts drawn by the same settings for the same
   model, concepts, or features of the same dictionary.
   Where fewer than half of the smaller side's items have a partner, or the items mean different things, the sides are
   drawn independently.
5. Fewer than ``LEAST_CLUSTERS`` independent groups give no interval and no p: the row has none, and ``no_interval`` says why.
   What reads these frames (tables, figures, pages, CSV) needs no rule of its own.
6. The family of a comparison is the main metrics of all pairs asked for together whose sides are comparable in L0
   (``store.sparsity``). Its p-values are corrected together (Holm), and a side is called better only where p_holm < 0.05.
   Everything else is described without a verdict: what is no main metric, and what compares dictionaries of other L0.
7. A table marks a row as best among the dictionaries comparable with it in L0. It must differ from each of them at 0.05,
   corrected for their number (Holm). Seeds of one recipe do not compete with each other.
8. Dictionaries that differ in the seed of their training alone (``store.seeds``) have a row for all of them besides their own:
   the mean over seeds, an interval for the next seed (``statistics.over_seeds``) and the spread between seeds.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from evalkit.store.seeds import family_name
from evalkit.store.sparsity import NO_L0, Sparsity, unlike
from evalkit.util import bootstrap as draws
from evalkit.util.bootstrap import DRAW, Drawn, drawn
from evalkit.util.statistics import (
    LEAST_CLUSTERS,
    Interval,
    OverSeeds,
    binomial_interval,
    difference_interval,
    holm,
    over_seeds,
    weighted_mean_interval,
)

TABLE_COLUMNS = [
    "dictionary", "kind", "hook_point", "metric", "title", "mean", "low", "high", "n", "failed", "undefined", "chance",
    "null_mean", "null_low", "null_high", "judge", "clusters", "units_failed", "null_metric", "better", "main", "digits",
    "note", "config", "evaluation", "run", "no_interval", "null_n", "null_failed", "null_undefined", "null_clusters",
    "l0", "best", "seeds", "seed_sd", "beyond", "null_beyond", "p", "flag",
]  # fmt: skip
COMPARE_COLUMNS = [
    "evaluation", "hook_point", "metric", "title", "a", "b", "mean_a", "mean_b", "difference", "low", "high", "p", "p_holm",
    "n_a", "n_b", "paired", "better", "note", "digits", "config", "clusters", "no_interval", "main", "detectable", "l0_a", "l0_b",
]  # fmt: skip
ALPHA = 0.05
"""Corrected p below which a difference counts as shown."""
NOTHING = "no difference shown"
COUNTS = ["n", "failed", "undefined", "clusters", "null_n", "null_failed", "null_undefined", "null_clusters"]
"""What counts scores in a table."""
ALL_SOURCES = "all"
"""Source of the rows over all text."""
DESCRIBED = "descriptive"
"""In place of a verdict: the metric is no main one."""


NAN = float("nan")
_NOTHING_THERE = Interval(NAN, NAN, NAN, 0)


FEW = f"fewer than {LEAST_CLUSTERS} independent groups"


def too_few(groups: int) -> str:
    """Why so many independent groups of scores have no interval; '' where they are enough, or none."""
    return FEW if 0 < groups < LEAST_CLUSTERS else ""


class Items(NamedTuple):
    """Scores of one metric of one dictionary at one hook point, all seeds."""

    values: np.ndarray[Any, np.dtype[np.float64]]
    weights: np.ndarray[Any, np.dtype[np.float64]]
    clusters: list[tuple[Any, ...]]
    """What is resampled together."""
    keys: list[tuple[Any, ...]]
    """(kind, item, seed of the unit, seed of the score): what pairs."""
    failed: int
    undefined: int
    drawn: Drawn | None = None
    """The estimate with its bootstrap draws, where the metric is a number of a whole curve; its one value is the estimate."""

    @property
    def kinds(self) -> set[str]:
        """What the items count."""
        return {key[0] for key in self.keys}

    @property
    def groups(self) -> int:
        """Independent groups: what is resampled."""
        return self.drawn.groups if self.drawn else len(set(self.clusters))

    def interval(self, transform: str | None = None) -> Interval:
        """Weighted mean and interval, the exact one for counted cases; a mean alone where the groups are too few."""
        if self.drawn:
            ends = self.drawn.ends()
            low, high = (NAN, NAN) if too_few(self.groups) else (ends.low, ends.high)
            return Interval(self.drawn.estimate, low, high, self.groups)
        found = self.counted() if transform == "counts" else weighted_mean_interval(self.values, self.weights, self.clusters)
        return found._replace(low=NAN, high=NAN) if too_few(self.groups) else found

    @property
    def beyond(self) -> str:
        """Which of 'mean', 'low' and 'high' are censored: the number lies above what is given."""
        return self.drawn.beyond() if self.drawn else ""

    def p_of_chance(self, chance: float) -> float:
        """p of a mean of ``chance`` by sign flips of whole groups; NaN where the groups are too few."""
        if not self.groups or too_few(self.groups):
            return NAN
        level = np.full(len(self.values), chance)
        return difference_interval(self.values, level, self.weights, self.weights, self.clusters, paired=True).p

    def counted(self) -> Interval:
        """The same where values are shares of counted cases and weights their numbers: the interval is the exact binomial one."""
        # shares are quotients of counts: their products with the counts are whole but for rounding
        hits, trials = round(float(self.values @ self.weights)), round(float(self.weights.sum()))
        return binomial_interval(hits, trials)._replace(n=len(self.values))


class Side(NamedTuple):
    """One side of a comparison: one dictionary in one run."""

    label: str
    """As the reader named it."""
    run: str
    dictionary: str
    text: str | None
    """Model and corpus of the run: windows of equal texts are the same windows. None: unknown."""


def gather(scores: pd.DataFrame) -> Items:
    """``scores`` (rows of one metric) as items."""
    if (found := drawn(scores)) is not None:
        return Items(np.array([found.estimate]), np.ones(1), [(DRAW,)], [(DRAW, 0, 0, 0)], 0, 0, found)
    ok = scores[scores["status"] == "ok"]
    clusters: list[tuple[Any, ...]] = []
    keys: list[tuple[Any, ...]] = []
    facts = (ok[column] for column in ("kind", "item", "cluster", "unit_seed", "seed"))
    for kind, item, cluster, unit_seed, seed in zip(*facts, strict=True):
        if not pd.isna(cluster):
            clusters.append(("cluster", int(cluster)))
        else:
            clusters.append((kind, unit_seed, seed) if kind == "dictionary" else (kind, item))
        keys.append((kind, item, unit_seed, seed))
    counts = scores["status"].value_counts()
    return Items(
        ok["value"].to_numpy(np.float64),
        ok["weight"].fillna(1.0).to_numpy(np.float64),
        clusters,
        keys,
        int(counts.get("failed", 0)),
        int(counts.get("undefined", 0)),
    )


def config_labels(configs: Iterable[str]) -> dict[str, str]:
    """What tells configurations (JSON, or '') apart ("features=50"); '' where there is one."""
    different = list(dict.fromkeys(configs))
    if len(different) < 2:
        return dict.fromkeys(different, "")
    parsed = {config: json.loads(config) if config else {} for config in different}
    names = sorted({name for settings in parsed.values() for name in settings})
    telling = [name for name in names if len({json.dumps(s.get(name), sort_keys=True) for s in parsed.values()}) > 1]
    return {config: ", ".join(f"{n}={settings.get(n)}" for n in telling) or "other" for config, settings in parsed.items()}


def _with_config(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with '' for an absent configuration: NULL is not equal to itself."""
    return frame.assign(config=frame["config"].astype("object").fillna(""))


def _shown(interval: Interval, about: dict[str, Any]) -> Interval:
    """``interval`` on the scale it is shown on, inside the values that the metric can have; without ends where it has none."""
    mean, low, high, n = interval
    transform, has_interval = about["transform"], bool(about["has_interval"])
    if not has_interval:
        low = high = float("nan")
    if transform == "exp":
        mean, low, high = (math.exp(x) if x < 700 else float("inf") for x in (mean, low, high))
        if math.isnan(interval.low) or not has_interval:
            low = high = float("nan")
        if math.isnan(interval.mean):
            mean = float("nan")
    lowest, highest = about.get("lowest"), about.get("highest")
    if lowest is not None and low < lowest:
        low = min(lowest, mean)
    if highest is not None and high > highest:
        high = max(highest, mean)
    return Interval(mean, low, high, n)


def _description(metrics: pd.DataFrame, metric: str) -> dict[str, Any]:
    """Row of ``metrics`` for ``metric``, missing values as None; a bare one where it was never described."""
    rows = metrics[metrics["metric"] == metric]
    if rows.empty:
        bare = {"title": metric, "better": "neither", "chance": None, "null_metric": None, "transform": None}
        return {**bare, "has_interval": True, "digits": 3, "main": True, "note": ""}
    return {str(key): None if pd.isna(value) else value for key, value in rows.iloc[-1].items()}


def _flag(about: dict[str, Any], mean: float) -> str:
    """What a mean below the metric's bound means; '' where it is not."""
    bound = about.get("flag_below")
    return str(about["flag"] or "") if bound is not None and mean < bound else ""


def _metric_order(metrics: pd.DataFrame, present: Iterable[str]) -> list[str]:
    newest_first = metrics.sort_values(["evaluation_version", "position"], ascending=[False, True])
    described = list(dict.fromkeys(newest_first["metric"]))  # a file may know several versions of an evaluation
    known = set(present)
    return [m for m in described if m in known] + sorted(known - set(described))


def score_table(
    units: pd.DataFrame,
    scores: pd.DataFrame,
    metrics: pd.DataFrame,
    kinds: dict[str, str],
    l0: Sparsity = NO_L0,
    of_family: Mapping[str, str] = MappingProxyType({}),
) -> pd.DataFrame:
    """One row for each dictionary, hook point, configuration and metric; seeds collapsed.

    Args:
        units: units of one run and evaluation, in order (columns of ``run_units``).
        scores: their scores with dictionary, hook_point, config and unit_seed.
        metrics: descriptions of the metrics.
        kinds: dictionary_id to kind.
        l0: L0 of dictionaries.
        of_family: what is the same for dictionaries that differ in their seed alone, by dictionary_id.

    Returns:
        Columns ``TABLE_COLUMNS``; ``n`` counts ok scores, ``clusters`` independent groups, and ``no_interval`` says why a row
        that would have an interval has none. ``null_n``, ``null_failed``, ``null_undefined`` and ``null_clusters`` are the
        null's. ``p`` is of a mean at the chance level, for main metrics that have one; ``flag`` says what a mean below the
        metric's bound means. A metric none of the run's units has is left out; a dictionary whose every unit failed has its
        rows with n = 0 and ``units_failed``.
    """
    units, scores = _with_config(units), _with_config(scores)
    labels = config_labels(units["config"])
    by_group = dict(iter(scores.groupby(["dictionary", "hook_point", "config"], sort=False)))
    order = _metric_order(metrics, scores["metric"].unique() if len(scores) else metrics["metric"])
    rows: list[dict[str, Any]] = []
    behind: list[_Row] = []
    for key, group in units.groupby(["dictionary", "hook_point", "config"], sort=False):
        version = group["evaluation_version"].max()
        described = metrics[metrics["evaluation_version"] == version]
        found = by_group.get(key, scores.iloc[:0])
        items = {str(metric): gather(part) for metric, part in found.groupby("metric", sort=False)}
        last = group.iloc[-1]
        for metric in order:
            about = _description(described, metric)
            own = items.get(metric, gather(found.iloc[:0]))
            null = items.get(about["null_metric"] or "")
            shown = _shown(own.interval(about["transform"]), about)
            beside = _shown(null.interval(), about) if null else _NOTHING_THERE
            few = too_few(own.groups)
            if not few and null and (of_null := too_few(null.groups)):
                few = f"null: {of_null}"
            rows.append(
                {
                    "dictionary": last["dictionary"], "kind": kinds.get(last["dictionary_id"]), "hook_point": last["hook_point"],
                    "metric": metric, "title": about["title"] or metric, "mean": shown.mean, "low": shown.low, "high": shown.high,
                    "n": shown.n, "failed": own.failed, "undefined": own.undefined,
                    "chance": float("nan") if about["chance"] is None else float(about["chance"]),
                    "null_mean": beside.mean, "null_low": beside.low, "null_high": beside.high,
                    "judge": None if pd.isna(last["judge"]) else last["judge"], "clusters": own.groups,
                    "units_failed": int((group["status"] == "failed").sum()), "null_metric": about["null_metric"] or "",
                    "better": about["better"] or "neither", "main": bool(about["main"]),
                    "digits": 3 if about["digits"] is None else int(about["digits"]), "note": about["note"] or "",
                    "config": labels[last["config"]],
                    "evaluation": last["evaluation"], "run": last["run_id"],
                    "no_interval": few if about["has_interval"] else "",
                    "null_n": beside.n, "null_failed": null.failed if null else 0,
                    "null_undefined": null.undefined if null else 0, "null_clusters": null.groups if null else 0,
                    "l0": l0(last["run_id"], last["dictionary_id"], last["hook_point"]), "best": False,
                    "seeds": 1, "seed_sd": NAN,
                    "beyond": own.beyond, "null_beyond": null.beyond if null else "",
                    "p": own.p_of_chance(float(about["chance"])) if about["main"] and about["chance"] is not None else NAN,
                    "flag": _flag(about, shown.mean),
                }
            )  # fmt: skip
            identity = str(last["dictionary_id"])
            behind.append(_Row(own, null, about, identity, of_family.get(identity, identity)))
    frame = pd.DataFrame(rows, columns=TABLE_COLUMNS)
    for _, part in frame.groupby(["hook_point", "config", "metric"], sort=False):
        frame.loc[[i for i in part.index if _is_best(i, part, behind)], "best"] = True
    return _with_families(frame, behind)


class _Row(NamedTuple):
    """What is behind a row of a table."""

    items: Items
    null: Items | None
    about: dict[str, Any]
    dictionary_id: str
    family: str


def _over_seeds(items: Sequence[Items]) -> OverSeeds:
    """Mean and spread over the seeds of a family; no ends where the groups of items are too few."""
    parts = [(one.values, one.weights, one.clusters) for one in items]
    drawn_ones = [one.drawn for one in items if one.drawn]
    if len(drawn_ones) == len(items) > 1:
        found = draws.over_seeds(drawn_ones)
        return found._replace(interval=found.interval._replace(low=NAN, high=NAN)) if too_few(_groups(items)) else found
    found, few = over_seeds(parts, shared=_shared(items)), too_few(_groups(items))
    return found._replace(interval=found.interval._replace(low=NAN, high=NAN)) if few else found


def _shared(items: Sequence[Items]) -> bool:
    """Whether equal items of several dictionaries are the same thing."""
    return set().union(*(one.kinds for one in items)) <= {"window", "prompt", "concept"}


def _groups(items: Sequence[Items]) -> int:
    """Independent groups of items behind all of them."""
    if all(one.drawn for one in items):
        return max((one.groups for one in items), default=0)
    return len(set().union(*(one.clusters for one in items))) if _shared(items) else sum(one.groups for one in items)


def _with_families(frame: pd.DataFrame, behind: Sequence[_Row]) -> pd.DataFrame:
    """``frame`` with the row of each family behind those of its last member."""
    members: dict[tuple[str, str, str], list[int]] = {}
    for place, row in enumerate(behind):
        key = (row.family, str(frame.at[place, "hook_point"]), str(frame.at[place, "config"]))
        members.setdefault(key, []).append(place)
    rows: list[tuple[int, dict[str, Any]]] = []
    for places in members.values():
        names = list(dict.fromkeys(frame.loc[places, "dictionary"]))
        if len({behind[place].dictionary_id for place in places}) < 2:
            continue
        for metric in dict.fromkeys(frame.loc[places, "metric"]):
            of_metric = [place for place in places if frame.at[place, "metric"] == metric]
            pooled = _family_row(frame.loc[of_metric], [behind[place] for place in of_metric])
            rows.append((places[-1], {**pooled, "dictionary": family_name(names)}))
    if not rows:
        return frame
    records: list[tuple[int, dict[str, Any]]] = list(enumerate(frame.astype("object").to_dict("records")))  # type: ignore[arg-type]
    ordered = [row for _, row in sorted([*records, *rows], key=lambda one: one[0])]  # stable: a family after its last member
    return pd.DataFrame(ordered, columns=TABLE_COLUMNS).astype(frame.dtypes.to_dict())


def _family_row(part: pd.DataFrame, behind: Sequence[_Row]) -> dict[str, Any]:
    """The row of all seeds of one metric, from the rows of the single ones."""
    about, own = behind[-1].about, [row.items for row in behind]
    nulls = [row.null for row in behind if row.null is not None]
    found, beside = _over_seeds(own), _over_seeds(nulls) if len(nulls) == len(own) else None
    shown = _shown(found.interval, about)
    null = _shown(beside.interval, about) if beside else _NOTHING_THERE
    counts = {column: int(part[column].sum()) for column in COUNTS if column != "clusters"}
    few = too_few(_groups(own))
    return {
        **{str(column): value for column, value in part.iloc[-1].items()}, **counts, "clusters": _groups(own),
        "mean": shown.mean, "low": shown.low, "high": shown.high, "best": False,
        "null_mean": null.mean, "null_low": null.low, "null_high": null.high,
        "units_failed": int(part["units_failed"].sum()), "l0": float(part["l0"].mean()), "seeds": found.seeds,
        "seed_sd": found.sd * (shown.mean if about["transform"] == "exp" else 1),  # of exp(mean), by its derivative
        "no_interval": few if about["has_interval"] else "", "p": NAN, "flag": _flag(about, shown.mean),
    }  # fmt: skip


def _is_best(place: Any, part: pd.DataFrame, behind: Sequence[_Row]) -> bool:
    """Whether the row ``place`` of ``part`` (one metric) is better than all comparable ones, each at p < 0.05 (Holm)."""
    row = part.loc[place]
    sign = {"higher": 1.0, "lower": -1.0}.get(row["better"], 0.0)
    kin = [behind[other].family == behind[place].family for other in part.index]
    others = part[~np.array(kin) & part["mean"].notna()]
    others = others[[not unlike(row["l0"], other) for other in others["l0"]]]
    if not sign or others.empty or math.isnan(row["low"]) or (sign * others["mean"]).max() >= sign * row["mean"]:
        return False
    found: list[float] = []
    side = Side("", str(row["run"]), "", None)
    for other in (sign * others["mean"]).sort_values(ascending=False).index:  # the runner-up first: it decides most often
        one, two = behind[place], behind[other]
        pairable = _same_things(one.items, two.items, (side, side), (one.dictionary_id, two.dictionary_id))
        p = compare_metric(one.items, two.items, pairable)["p"]
        if not p < ALPHA:
            return False
        found.append(p)
    return bool((holm(found) < ALPHA).all())


def source_table(
    units: pd.DataFrame,
    scores: pd.DataFrame,
    metrics: pd.DataFrame,
    kinds: dict[str, str],
    l0: Sparsity = NO_L0,
    of_family: Mapping[str, str] = MappingProxyType({}),
) -> pd.DataFrame:
    """``score_table`` with a column ``source``: rows for each source of text, and then those over all of it (``ALL_SOURCES``).

    There are no rows of sources where scores name fewer than two. Arguments as of ``score_table``.
    """
    whole = score_table(units, scores, metrics, kinds, l0, of_family).assign(source=ALL_SOURCES)
    named = [source for source in dict.fromkeys(scores["source"].dropna()) if source]
    if len(named) < 2:
        return whole
    nothing: dict[str, Any] = dict.fromkeys(("mean", "low", "high", "null_mean", "null_low", "null_high", "seed_sd", "p"), NAN)
    counts: dict[str, Any] = {**dict.fromkeys(COUNTS, 0), "no_interval": "", "best": False}
    keys = ["dictionary", "hook_point", "config"]
    parts = []
    for source in named:
        part = score_table(units, scores[scores["source"] == source], metrics, kinds, l0, of_family)
        # what a source has no scores of has an empty cell there
        part = pd.concat([part[part["metric"].isin(whole["metric"])], whole.assign(**nothing, **counts)], ignore_index=True)
        parts.append(part.drop_duplicates([*keys, "metric"]).assign(source=source))
    frame = pd.concat([*parts, whole], ignore_index=True)
    orders = {column: {name: i for i, name in enumerate(dict.fromkeys(frame[column]))} for column in ("source", "metric")}
    orders["metric"] = {name: i for i, name in enumerate(dict.fromkeys(whole["metric"]))}
    rows = [tuple(row) for row in frame[keys].itertuples(index=False, name=None)]
    place = {key: i for i, key in enumerate(dict.fromkeys(tuple(row) for row in whole[keys].itertuples(index=False, name=None)))}
    by = [
        (place[key], orders["source"][s], orders["metric"][m])
        for key, s, m in zip(rows, frame["source"], frame["metric"], strict=True)
    ]
    return frame.iloc[sorted(range(len(by)), key=by.__getitem__)].reset_index(drop=True)


def _same_things(a: Items, b: Items, sides: tuple[Side, Side], ids: tuple[str, str]) -> bool:
    """Whether equal keys of both sides name the same thing."""
    if a.kinds == b.kinds and a.kinds in ({"window"}, {"prompt"}, {"concept"}, {DRAW}):
        return sides[0].run == sides[1].run or (sides[0].text is not None and sides[0].text == sides[1].text)
    return a.kinds == b.kinds == {"feature"} and ids[0] == ids[1]


def compare_metric(a: Items, b: Items, pairable: bool) -> dict[str, Any]:
    """Difference of one metric: mean_a, mean_b, difference, low, high, p, n_a, n_b, paired, clusters (independent groups of the
    side that has fewer, or of the pairs), no_interval (why low, high and p are missing) and detectable (the smallest true
    difference that would be shown with probability 0.8 at an uncorrected p of 0.05)."""
    if a.drawn and b.drawn:
        groups = min(a.groups, b.groups)
        found = draws.difference(a.drawn, b.drawn)
        if few := too_few(groups):
            found = found._replace(low=NAN, high=NAN, p=NAN)
        return {
            "mean_a": a.drawn.estimate, "mean_b": b.drawn.estimate, **found._asdict(), "paired": pairable, "detectable": NAN,
            "n_a": a.groups, "n_b": b.groups, "clusters": groups, "no_interval": few,
        }  # fmt: skip
    place = {key: i for i, key in enumerate(b.keys)}
    common = [(i, place[key]) for i, key in enumerate(a.keys) if key in place] if pairable else []
    paired = len(common) > 0 and 2 * len(common) >= min(len(a.keys), len(b.keys))
    if paired:
        left, right = (list(index) for index in zip(*common, strict=True))
        clusters = [a.clusters[i] for i in left]
        result = difference_interval(a.values[left], b.values[right], a.weights[left], b.weights[right], clusters, paired=True)
        n_a = n_b = len(common)
        groups = len(set(clusters))
    else:
        result = difference_interval(a.values, b.values, a.weights, b.weights, a.clusters, b.clusters, paired=False)
        n_a, n_b = len(a.keys), len(b.keys)
        groups = min(a.groups, b.groups)
    few = too_few(groups)
    row = (result._replace(low=NAN, high=NAN, p=NAN, detectable=NAN) if few else result)._asdict()
    del row["n"], row["groups"]
    return {**row, "n_a": n_a, "n_b": n_b, "clusters": groups, "no_interval": few}


def comparison(
    pairs: Sequence[tuple[Side, Side]], scores: pd.DataFrame, metrics: pd.DataFrame, l0: Sparsity = NO_L0
) -> pd.DataFrame:
    """Differences of all metrics both sides of each pair have; columns ``COMPARE_COLUMNS``.

    Metrics that are nulls of others are left out. A metric shown as exp of its mean is compared as it is stored (the
    mean's scale), and its note says so. ``better`` is 'a', 'b', 'no difference shown', or 'differs' where the metric has
    no better direction; outside the family it is 'descriptive', 'other L0' or 'L0 not measured', and ``p_holm`` is NaN.

    Args:
        pairs: what to compare.
        scores: scores of all runs involved, with run_id, evaluation, evaluation_version, dictionary_id, hook_point, config.
        metrics: descriptions of the metrics.
        l0: L0 of dictionaries.
    """
    keys = ["evaluation", "hook_point", "config"]
    rows: list[dict[str, Any]] = []
    outside: list[str] = []
    scores = _with_config(scores)
    for sides in pairs:
        parts = [scores[(scores["run_id"] == s.run) & (scores["dictionary"] == s.dictionary)] for s in sides]
        groups: list[dict[Any, pd.DataFrame]] = [dict(iter(part.groupby(keys, sort=False))) for part in parts]
        common = [key for key in groups[0] if key in groups[1]]
        # distinguished within an evaluation only: two evaluations never have the same settings
        labels = {
            (name, config): text
            for name in {key[0] for key in common}
            for config, text in config_labels(key[2] for key in common if key[0] == name).items()
        }
        for key in common:
            one, two = groups[0][key], groups[1][key]
            if one["evaluation_version"].max() != two["evaluation_version"].max():
                continue
            version = one["evaluation_version"].max()
            described = metrics[(metrics["evaluation"] == key[0]) & (metrics["evaluation_version"] == version)]
            nulls = set(described["null_metric"].dropna())
            ids = (str(one["dictionary_id"].iloc[-1]), str(two["dictionary_id"].iloc[-1]))
            own_l0, their_l0 = (l0(side.run, name, key[1]) for side, name in zip(sides, ids, strict=True))
            apart = "" if ids[0] == ids[1] else unlike(own_l0, their_l0)
            for metric in _metric_order(described, set(one["metric"]) & set(two["metric"])):
                if metric in nulls:
                    continue
                about = _description(described, metric)
                a, b = gather(one[one["metric"] == metric]), gather(two[two["metric"] == metric])
                row = compare_metric(a, b, _same_things(a, b, sides, ids))
                if not about["has_interval"]:
                    row.update(low=NAN, high=NAN, p=NAN, detectable=NAN, no_interval="")
                note = "compared on the scale of the mean, before exp" if about["transform"] == "exp" else ""
                rows.append(
                    {
                        "evaluation": key[0], "hook_point": key[1], "metric": metric,
                        "title": ("log " if about["transform"] == "exp" else "") + (about["title"] or metric),
                        "a": sides[0].label, "b": sides[1].label, **row, "better": about["better"] or "neither", "note": note,
                        "digits": 3 if about["digits"] is None else int(about["digits"]),
                        "config": labels[key[0], key[2]], "main": bool(about["main"]), "l0_a": own_l0, "l0_b": their_l0,
                    }
                )  # fmt: skip
                outside.append(apart if about["main"] else DESCRIBED)
    frame = pd.DataFrame(rows, columns=COMPARE_COLUMNS)
    frame["p_holm"] = holm(np.where([not reason for reason in outside], frame["p"].astype(np.float64), NAN))
    facts = zip(frame["difference"], frame["p_holm"], frame["better"], outside, strict=True)
    frame["better"] = [reason or _verdict(difference, p, way) for difference, p, way, reason in facts]
    return frame


def _verdict(difference: float, p_holm: float, way: str) -> str:
    if math.isnan(p_holm) or p_holm >= ALPHA or difference == 0:
        return NOTHING
    if way == "neither":
        return "differs"
    return "a" if (difference > 0) == (way == "higher") else "b"


def text_of(suite_toml: Any) -> str | None:
    """Model and corpus sections of a suite, as one comparable text; None where there is no suite to read."""
    if not isinstance(suite_toml, str):
        return None
    try:
        suite = tomllib.loads(suite_toml)
    except tomllib.TOMLDecodeError:
        return None
    return json.dumps([suite.get("model"), suite.get("corpus")], sort_keys=True, default=str)
