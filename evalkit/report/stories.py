"""Stories of single features: do the histogram, the ablation and the causal tree of one feature tell the same tale?

1. One row a feature that has both inputs and an ablation in the run, whatever the configuration; where several of one evaluation
   have it, the first in the suite speaks, and nothing is mixed. The sides, each against its own null:
   - inputs: one token class takes at least ``least_share`` of the mean tenth of the range, and ``times_null`` times what the same
     activations on tokens drawn at random get;
   - effect: the ablation has a larger KL than as much along each of some random directions; what it does to the tokens of one
     half of the contexts repeats in the other (``least_repeated`` of the change, and more than for each random direction); and
     the token that the text goes on with loses: the feature helps, its 95% interval by t over contexts below 0. None of these
     picks what it measures. It is of the same thing as the inputs: ``least_same`` of the contexts are read at a token of the
     histogram's main class. How many would pass by chance stands in the notes, and how many do after Holm's correction (1979);
   - tree: some feature of an earlier hook point has a significant effect on it, and the strongest of these takes more of its
     activation than as much along a random direction. Missing where no earlier hook point has a dictionary, or where no tree was
     grown: not a no. How much of it is carried, the feature itself some layers earlier, stands beside it.
2. Strength: the geometric mean of the main class's share, what repeats of the effect and, where there is a tree, the share of the
   feature's activation that its strongest parent carries.
3. Ranked by the sides that agree, then by strength. The first row tells the most consistent story of the run. It is the best of
   as many as were studied, which the table says, with how they were drawn.

The criterion's numbers stand in the suite file, [stories] (``criterion``), and so in the run's name before anything is seen.
The criterion is ours; the paper (Cunningham et al. 2023, arXiv 2309.08600, section 5) chose its examples by hand.
"""

from __future__ import annotations

import json
import math
import tomllib
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

from evalkit.config import parse
from evalkit.criterion import StoriesConfig
from evalkit.errors import UsageError
from evalkit.registry import near_miss
from evalkit.report.render import Cell, Column, Sheet
from evalkit.report.tables import number, render_frame, with_interval
from evalkit.statistics import LEAST_CLUSTERS, holm
from evalkit.store.reader import Results
from evalkit.token_classes import token_class

OWN = StoriesConfig()
"""The criterion where the suite file has none."""
ALPHA = 0.025
"""One-sided: the 95% interval lies below 0."""
SHOWN = 20
"""Rows of the printed table; CSV and JSON have all."""
SAME = ["dictionary", "hook_point", "feature"]
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


def first_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each feature, the rows of the first configuration that has it."""
    return rows[rows["config"] == rows.groupby(SAME, sort=False)["config"].transform("first")]


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


def stories_table(frame: pd.DataFrame, format: str = "text") -> str:
    """The frame of ``stories`` to read or to print.

    Raises:
        UsageError: there is no such format.
    """
    return render_frame(frame, format, stories_sheet)


def _chance(frame: pd.DataFrame, criterion: StoriesConfig) -> str:
    """How many features would have an effect by chance: a bound that takes no parts of the criterion for independent."""
    held = int((frame["effect"].astype(bool) & (frame["next_p_holm"] < ALPHA)).sum())
    if criterion.corrected:
        return (
            f"by chance: did no feature help its next token, any of the {len(frame)} would have the effect with a probability of "
            f"at most {ALPHA:g}: the loss is corrected for all of them (Holm)."
        )
    return (
        f"by chance: did no feature help its next token, at most about {number(ALPHA * len(frame), 1)} of the {len(frame)} would "
        "have the effect: that is the loss alone, whatever else the criterion asks. After Holm's correction of the loss for all "
        f"{len(frame)} features it is significant for {held} of the {int(frame['effect'].sum())} that have it."
    )


def _yes(value: Any) -> Cell:
    return Cell("-" if value is None or value != value else "yes" if value else "no")


def stories_sheet(frame: pd.DataFrame) -> Sheet:
    """The first ``SHOWN`` rows of the frame of ``stories`` as the sheet that every format of it shows."""
    shown = frame.head(SHOWN)
    criterion = frame.attrs.get("criterion", OWN)
    rows: list[Any] = list(shown.itertuples())
    trees = bool(frame["parents"].notna().any())
    columns = [
        Column("dictionary", [Cell(row.dictionary) for row in rows], number=False, group=-1),
        Column("hook point", [Cell(row.hook_point) for row in rows], number=False, group=-1),
        Column("feature", [Cell(str(row.feature)) for row in rows], group=-1),
        Column("agree", [Cell(f"{row.agree} of {row.sides}") for row in rows], group=-1),
        Column("strength", [Cell(number(row.strength, 3)) for row in rows], group=0),
        Column("main class", [Cell(repr(row.main_class)) for row in rows], number=False, group=0),
        Column("share (null)", [Cell(f"{number(row.share, 2)} ({number(row.share_null, 2)})") for row in rows], group=0),
        Column("inputs", [_yes(row.inputs) for row in rows], number=False, group=0),
        Column("lowered", [Cell(row.lowered if isinstance(row.lowered, str) else "-") for row in rows], number=False, group=1),
        Column("KL (null)", [Cell(f"{number(row.kl, 4)} ({number(row.kl_null, 4)})") for row in rows], group=1),
        Column("repeated (null)", [Cell(f"{number(row.repeated, 2)} ({number(row.repeated_null, 2)})") for row in rows], group=1),
        Column("next token", [Cell(with_interval(row.next_change, row.next_low, row.next_high, 3)) for row in rows], group=2),
        Column("same tokens", [Cell(number(row.same, 2)) for row in rows], group=2),
        Column("effect", [_yes(row.effect) for row in rows], number=False, group=2),
    ]
    if trees:
        columns += [
            Column("parents", [Cell(number(row.parents, 0)) for row in rows], group=3),
            Column(
                "strongest (null)",
                [Cell(f"{number(row.parent_share, 2)} ({number(row.parent_share_null, 2)})") for row in rows],
                group=3,
            ),
            Column("carried", [Cell(number(row.carried, 2)) for row in rows], group=3),
            Column("tree", [_yes(row.tree) for row in rows], number=False, group=3),
        ]
    whole = frame[frame["agree"] == frame["sides"]]
    by = ", ".join(f"{name} {len(part)}" for name, part in whole.groupby("dictionary", sort=False))
    of = ", ".join(f"{name} {len(part)}" for name, part in frame.groupby("dictionary", sort=False))
    chosen_so = int(frame["preferred"].eq(True).sum())
    drawn = f" {chosen_so} were drawn from the quarter that fires most on a single token." if chosen_so else ""
    notes = [
        f"{len(frame)} features studied ({of}); all sides there are agree for {len(whole)}{f' ({by})' if by else ''}. "
        f"The first rows are the best of so many.{drawn}",
        *frame.attrs.get("notes", []),
        f"inputs: one token class has at least {criterion.least_share:g} of the mean tenth of the range and "
        f"{criterion.times_null:g} times its null.",
        "effect: KL above that of every random direction (in brackets: their mean); at least "
        f"{criterion.least_repeated:g} of the change of probability in one half of the contexts is foretold by the other, and "
        "more than for every random direction; the token the text goes on with loses (its 95% interval by t over contexts below "
        f"0{', also after Holm' if criterion.corrected else ''}); and at least {criterion.least_same:g} of the contexts are read "
        "at a token of the main class (same tokens).",
        _chance(frame, criterion),
        "tree: features of the hook point before with a significant effect (parents), the strongest of them above a random "
        "direction; '-' where no tree was grown.",
        "carried: what goes with the strongest parent's own vector, read again with nothing computed from it. A share that is "
        "mostly carried is the feature itself some layers earlier, not a computation.",
        "strength: geometric mean of share, repeated and, where there is a tree, the strongest parent's share.",
    ]
    return Sheet(f"stories, run {frame['run'].iloc[0]}", columns, notes)
