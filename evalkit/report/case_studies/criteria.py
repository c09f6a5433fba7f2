"""Case studies of single features: do inputs, effect and causal tree of a feature agree?

After section 5 of Cunningham et al. 2023 (arXiv 2309.08600), which chose its examples by hand; the criteria are ours.

1. One row a feature that has both inputs and an ablation in the run. If several configurations of an evaluation have it, the
   first one in the suite is used; results are never pooled. The criteria, each against its own null:
   - inputs: one token class has at least ``least_share`` of the mean tenth of the range, and ``times_null`` times its share among
     the same activations on tokens drawn at random;
   - effect: ablation has a larger KL than an edit of the same length along each of some random directions. Its change in one half
     of the contexts predicts that in the other (``least_repeated`` of it, and more than for each random direction). The token
     that the text goes on with becomes less likely: its 95% interval by t over contexts lies below 0. ``least_same`` of the
     contexts end in a token of the main class, so that effect and inputs are about the same thing. None of these picks what it
     measures. The notes give the number that would pass by chance, and the number after Holm's correction (1979);
   - tree: an upstream feature has a significant effect, and the strongest one takes more of the activation than an edit of the
     same length along a random direction. Missing where no earlier hook point has a dictionary or no tree was asked for; that is
     not a no. The share along the direct path (the feature itself some layers earlier) stands beside it.
2. Strength: geometric mean of the main class's share, the repeated share of the effect and, where there is a tree, the share of
   the strongest upstream feature.
3. Rows are ordered by the number of criteria satisfied, then by strength. The first row is the best of all features studied: the
   table gives their number and how they were drawn.

The thresholds stand in the suite file, [stories] (``criterion``), and so in the run's name before anything is measured.
"""

from __future__ import annotations

import json
import math
import tomllib
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

from evalkit.errors import UsageError
from evalkit.evaluations.criterion import StoriesConfig
from evalkit.report.selection import SAME, first_of
from evalkit.store.reader import Results
from evalkit.text.token_classes import token_class
from evalkit.util.registry import near_miss
from evalkit.util.settings import parse
from evalkit.util.statistics import LEAST_CLUSTERS, holm

OWN = StoriesConfig()
"""The criterion where the suite file has none."""
ALPHA = 0.025
"""One-sided: the 95% interval lies below 0."""
NEEDS = ("inputs", "ablation")
"""Evaluations that a run has case studies of."""
WHY_NONE = "they need inputs and ablation of the same features"
SIDES = ("inputs", "effect", "tree")
"""The criteria: columns of the table."""
INPUTS = {"monosemantic": "share", "monosemantic_random": "share_null", "density": "density"}
EFFECT = {
    "concentration": "concentration",
    "repeated": "repeated",
    "repeated_random": "repeated_null",
    "kl": "kl",
    "kl_random": "kl_null",
    "next_change": "next_change",
}

TREE = {"parents": "parents", "parent_share": "parent_share", "parent_share_random": "parent_share_null"}
RANKS = {"kl_rank": "kl_rank", "repeated_rank": "repeated_rank"}
CARRIED = {"parent_carried": "carried"}


def stories(store: Results, run: str | None = None) -> pd.DataFrame:
    """One row a feature, the most consistent story first.

    Args:
        store: a results file.
        run: run_id or suite; the default is the latest run with ablations.

    Returns:
        run, dictionary, hook_point, feature, main_class, lowered (tokens whose probability falls most, by ablation), the numbers
        behind each side with their nulls, ``same`` (share of the contexts read at the main class), ``carried`` (of the strongest
        parent's share), ``preferred`` (drawn for firing on one token), ``inputs``, ``effect`` and ``tree`` (True, False or None
        where missing), ``agree`` (sides that say yes), ``sides`` (sides there are) and ``strength``.

    Raises:
        UsageError: no run has both inputs and ablations, or they share no feature.
    """
    name = str(store.table("ablation", run)["run"].iloc[0])
    if "inputs" not in store.evaluations(name):
        what = f"run {name} has ablations and no inputs"
        raise UsageError(what, where=str(store.path), fix='run a suite with the evaluations "inputs" and "ablation"')
    found = _values(store, "inputs", name, INPUTS).merge(_values(store, "ablation", name, EFFECT), on=SAME, how="inner")
    if found.empty:
        fix = "give both the same features and seed: the smaller sample is part of the larger"
        raise UsageError(f"inputs and ablation of run {name} share no feature", where=str(store.path), fix=fix)
    found.insert(0, "run", name)
    try:
        found = found.merge(_values(store, "ablation", name, RANKS), on=SAME, how="left")
    except UsageError:  # a run of an earlier evalkit, with one random direction
        found["kl_rank"] = (found["kl"] > found["kl_null"]).astype(float)
        found["repeated_rank"] = (found["repeated"] > found["repeated_null"]).astype(float)
    drawn = store.features("ablation", "kl", name).drop_duplicates(SAME)[[*SAME, "config"]]
    configs = [json.loads(config) for config in drawn.pop("config")]
    drawn["preferred"] = [config.get("prefer", "any") != "any" for config in configs]
    drawn["nulls"] = [int(config.get("nulls", 1)) for config in configs]
    found = found.merge(drawn, on=SAME, how="left")
    bins = store.rows("input_bins", "inputs", name)
    classes = bins[bins["of"] == "feature"].drop_duplicates(SAME)[[*SAME, "main_class"]]
    found = found.merge(classes, on=SAME, how="left").merge(_read(store, name), on=SAME, how="left")
    found["same"] = [_share_of(row.main_class, row.read) for row in found.itertuples()]
    found = found.drop(columns="read")
    found = found.merge(_lowered(store, name), on=SAME, how="left").merge(_next(store, name), on=SAME, how="left")
    found = found.merge(_parents(store, name), on=SAME, how="left")
    suite = _suite_of(store, name)
    criterion = parse(StoriesConfig, suite.get("stories", {}), "[stories]")
    judged = _judged(found, criterion)
    judged.attrs["notes"] = [_written(suite)]
    return judged


def _suite_of(store: Results, run: str) -> dict[str, Any]:
    """The suite file of a run; empty where the run has none that can be read."""
    rows = store.sql("SELECT suite_toml FROM run_states WHERE run_id = ?", [run])
    text = rows["suite_toml"].iloc[0] if len(rows) else None
    try:
        return tomllib.loads(text) if isinstance(text, str) else {}
    except tomllib.TOMLDecodeError:
        return {}


def _written(suite: dict[str, Any]) -> str:
    """Where the criterion was written, and what it is judged on."""
    if "stories" not in suite:
        return "criterion: evalkit's own numbers. The suite file has no [stories], so that nothing says when they were chosen."
    seed = suite.get("suite", {}).get("seed", 0)
    return f"criterion: from [stories] of the suite file, written before the run; judged on features and text of seed {seed}."


def _values(store: Results, evaluation: str, run: str, metrics: dict[str, str]) -> pd.DataFrame:
    """Values of several metrics side by side; of the first configuration where there are several."""
    wide: pd.DataFrame | None = None
    for metric, column in metrics.items():
        one = store.features(evaluation, metric, run).drop_duplicates(SAME)[[*SAME, "value"]].rename(columns={"value": column})
        wide = one if wide is None else wide.merge(one, on=SAME, how="outer")
    assert wide is not None
    return wide


def _lowered(store: Results, run: str) -> pd.DataFrame:
    """Tokens whose probability an ablation lowers most, as one text."""
    rows = first_of(store.rows("logit_effects", "ablation", run))
    wanted = (rows["edit"] == "ablate") & (rows["ranked_by"] == "mass") & (rows["side"] == "lowered") & (rows["place"] <= 3)
    rows = rows[wanted & (rows["mass"] < 0) & (rows["change"] < 0)].sort_values("place", kind="stable")
    tokens = rows.groupby(SAME, sort=False)["token"].agg(lambda part: " ".join(repr(token) for token in part))
    return tokens.rename("lowered").reset_index()


def _read(store: Results, run: str) -> pd.DataFrame:
    """Classes of the tokens at which each feature's contexts are read."""
    rows = first_of(store.rows("ablation_contexts", "ablation", run))
    rows = rows[rows["edit"] == "ablate"]
    found: list[list[Any]] = []
    for key, part in rows.groupby(SAME, sort=False):
        last = [(json.loads(tokens) if isinstance(tokens, str) else list(tokens))[-1:] for tokens in part["tokens"]]
        found.append([*key, [token_class(token) for (token,) in filter(None, last)]])
    return pd.DataFrame(found, columns=[*SAME, "read"])


def _share_of(main_class: Any, read: Any) -> float:
    """Share of ``read`` that is of the main class."""
    return sum(one == main_class for one in read) / len(read) if isinstance(read, list) and read else math.nan


def _next(store: Results, run: str) -> pd.DataFrame:
    """Interval of the change of the next token's log-probability over contexts, by Student's t, and p of its being no loss.

    A bootstrap of ten or so contexts would give intervals that are too short. Fewer than ``LEAST_CLUSTERS`` contexts have none.
    """
    rows = first_of(store.rows("ablation_contexts", "ablation", run))
    rows = rows[rows["edit"] == "ablate"]
    found = []
    for key, part in rows.groupby(SAME, sort=False):
        values = part["next_change"].to_numpy(np.float64)
        n = len(values)
        low, high, p = math.nan, math.nan, 1.0
        if n >= LEAST_CLUSTERS:
            mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n)
            reach = float(t.ppf(0.975, n - 1)) * error
            low, high = mean - reach, mean + reach
            p = float(t.cdf(mean / error, n - 1)) if error > 0 else float(mean >= 0)
        found.append([*key, low, high, p, n])
    return pd.DataFrame(found, columns=[*SAME, "next_low", "next_high", "next_p", "contexts"])


def _parents(store: Results, run: str) -> pd.DataFrame:
    """Trees of the run: parents that are significant and the largest share, with its null; no row where no tree was grown."""
    if "causal_tree" not in store.evaluations(run):
        return pd.DataFrame(columns=[*SAME, *TREE.values(), *CARRIED.values()])
    found = _values(store, "causal_tree", run, TREE)
    try:
        found = found.merge(_values(store, "causal_tree", run, CARRIED), on=SAME, how="left")
    except UsageError:  # a run of an earlier evalkit
        found = found.assign(carried=math.nan)
    return found[found["parents"].notna()]


def _judged(found: pd.DataFrame, criterion: StoriesConfig = OWN) -> pd.DataFrame:
    inputs = (found["share"] >= criterion.least_share) & (found["share"] >= criterion.times_null * found["share_null"])
    found = found.assign(next_p_holm=holm(found["next_p"].fillna(1.0)))
    effect = (found["repeated"] >= criterion.least_repeated) & (found["repeated_rank"] == 1) & (found["kl_rank"] == 1)
    effect &= (found["next_high"] < 0) & (found["same"] >= criterion.least_same)
    if criterion.corrected:
        effect &= found["next_p_holm"] < ALPHA
    grown = found["parents"].notna()
    tree = grown & (found["parents"].astype(float) > 0)
    tree &= found["parent_share"].astype(float) > found["parent_share_null"].astype(float)
    parts = found[["share", "repeated"]].astype(float).assign(parent=found["parent_share"].astype(float))
    # a product over what there is: a missing tree is left out, a tree without parents counts as nothing
    parts.loc[grown & parts["parent"].isna(), "parent"] = 0.0
    with np.errstate(divide="ignore"):
        logarithms = pd.DataFrame(np.log(parts.to_numpy(np.float64).clip(min=0)), index=parts.index)
    strength = np.exp(logarithms.mean(axis=1, skipna=True))
    trees: list[Any] = [bool(yes) if there else None for yes, there in zip(tree, grown, strict=True)]
    found = found.assign(
        inputs=inputs,
        effect=effect,
        tree=trees,
        agree=inputs.astype(int) + effect.astype(int) + tree.astype(int),
        sides=2 + grown.astype(int),
        strength=strength.where(parts[["share", "repeated"]].notna().all(axis=1), 0.0),
    )
    ranked = found.sort_values(["agree", "strength"], ascending=False, kind="stable").reset_index(drop=True)
    ranked.attrs["criterion"] = criterion
    return ranked


def chosen(found: pd.DataFrame, feature: str | None = None) -> pd.Series:
    """One story: the first, or that of ``feature``: 'NUMBER', or 'HOOK POINT:NUMBER', or 'DICTIONARY:HOOK POINT:NUMBER'.

    Raises:
        UsageError: there is no such story, or there are several.
    """
    if feature is None:
        return found.iloc[0]
    wanted = feature.split(":")
    names = [f"{row.dictionary}:{row.hook_point}:{row.feature}" for row in found.itertuples()]
    fits = [place for place, name in enumerate(names) if name.split(":")[-len(wanted) :] == wanted]
    if len(fits) == 1:
        return found.iloc[fits[0]]
    if fits:
        fix = f"say which: {', '.join(names[place] for place in fits)}"
        raise UsageError(f"{len(fits)} stories are called '{feature}'", where="--feature", fix=fix)
    number = wanted[-1] if wanted[-1].isdecimal() else "NUMBER"
    raise UsageError(
        f"there is no story of a feature '{feature}'",
        where="--feature",
        fix=f"to study it, write feature_ids = [{number}] below [[evaluation]] inputs and ablation and run the suite again; "
        f"{near_miss(feature, names)}",
    )
