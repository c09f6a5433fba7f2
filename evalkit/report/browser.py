"""Single features of a run, each with what every evaluation knows of it: the part of the page to browse.

1. Features are those that inputs, ablation, causal trees, steering or the search for concepts have rows about. Where several
   configurations have one, the first in the suite speaks, as in the stories.
2. ``most`` are kept: those whose sides all agree (``stories``), then those that most evaluations know, then the better stories.
3. They are shown in the order of the stories, so that those that agree come first; features without a story come last.
4. Each has an anchor made of dictionary, hook point and number, which the nodes of causal trees lead to.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pandas as pd

from evalkit.errors import UsageError
from evalkit.report.feature_numbers import Name, numbers_of
from evalkit.report.feature_section import Facts, Section, section
from evalkit.report.replies import steered
from evalkit.report.stories import SAME, first_of, stories
from evalkit.report.trees.data import Nodes, explanations, nodes_of
from evalkit.store.reader import Results

TABLES = {
    "input_bins": "inputs",
    "logit_effects": "ablation",
    "ablation_contexts": "ablation",
    "causal_edges": "causal_tree",
    "concept_features": "concepts",
    "concept_texts": "concepts",
    "predictions": "autointerp",
}
"""Tables a section is made of, and whose they are."""
SOURCES = ("input_bins", "logit_effects", "causal_edges", "concept_features", "steering_texts")
"""Tables whose features get a section."""


class Browser(NamedTuple):
    """The features of a page."""

    sections: list[Section]
    known: int
    """Features there are rows about."""
    agreeing: int
    """Of these, features whose sides all agree."""
    stories: pd.DataFrame | None
    why: str
    """Why there are no stories; '' where there are."""
    anchors: dict[Name, str]


def browser(store: Results, run: str, most: int) -> Browser:
    """The sections of a run's features, at most ``most`` of them."""
    has = set(store.evaluations(run))
    told, why = _stories(store, run, has)
    rows = {table: _by_feature(store, table, evaluation, run) for table, evaluation in TABLES.items() if evaluation in has}
    steering = _grouped(first_of(steered(store, run))) if "steering" in has else {}
    ranked = {} if told is None else {_name(row): row for _, row in told.iterrows()}
    numbers = numbers_of(store, run)
    facts = Facts(
        rows, steering, ranked, nodes_of(store, run) if "causal_tree" in has else Nodes({}, {}), numbers,
        explanations(store, run), numbers.features("causal_tree"),
    )  # fmt: skip
    every = {**rows, "steering_texts": steering}
    count = {name: 0 for table in SOURCES for name in every.get(table, {})}
    for table in SOURCES:
        for name in every.get(table, {}):
            count[name] += 1
    place = {name: at for at, name in enumerate(ranked)}
    last = len(place)
    whole = {name for name, story in ranked.items() if story["agree"] == story["sides"]}
    chosen = sorted(count, key=lambda name: (name not in whole, -count[name], place.get(name, last)))[: max(0, most)]
    chosen.sort(key=lambda name: (name not in whole, place.get(name, last)))
    anchors = _anchors(chosen)
    sections = [section(name, facts, anchors, name in whole) for name in chosen]
    return Browser(sections, len(count), len(whole & set(count)), told, why, anchors)


def _stories(store: Results, run: str, has: set[str]) -> tuple[pd.DataFrame | None, str]:
    """The stories of the run, or None and why there are none."""
    if not {"inputs", "ablation"} <= has:
        return None, "they need inputs and ablation of the same features"
    try:
        return stories(store, run), ""
    except UsageError as error:
        return None, error.what


def _by_feature(store: Results, table: str, evaluation: str, run: str) -> dict[Name, pd.DataFrame]:
    rows = store.rows(table, evaluation, run).rename(columns={"target": "feature"} if table == "causal_edges" else {})
    if table == "concept_features":
        rows = rows[(rows["source"] == "feature") & (rows["place"] == 1)]
    return _grouped(first_of(rows[rows["feature"].notna()]))


def _grouped(rows: pd.DataFrame) -> dict[Name, pd.DataFrame]:
    groups: Any = rows.groupby(SAME, sort=False)
    return {(str(dictionary), str(hook_point), int(feature)): part for (dictionary, hook_point, feature), part in groups}


def _name(row: Any) -> Name:
    return (str(row["dictionary"]), str(row["hook_point"]), int(row["feature"]))


def _anchors(names: list[Name]) -> dict[Name, str]:
    """An anchor for each: letters, digits, points and dashes, the same for the same names; two never share one."""
    found: dict[Name, str] = {}
    used: set[str] = set()
    short: dict[str, str] = {}
    for dictionary, hook_point, feature in names:
        if dictionary not in short:
            slug = base = re.sub(r"[^a-z0-9]+", "-", dictionary.lower()).strip("-") or "dictionary"
            further = 2
            while slug in short.values():
                slug, further = f"{base}-{further}", further + 1
            short[dictionary] = slug
        anchor = base = f"{short[dictionary]}-{re.sub(r'[^A-Za-z0-9._-]+', '-', hook_point)}-{feature}"
        further = 2
        while anchor in used:
            anchor, further = f"{base}-{further}", further + 1
        used.add(anchor)
        found[(dictionary, hook_point, feature)] = anchor
    return found
