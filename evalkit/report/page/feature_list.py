"""The features of a run's page: which have a card, in which order, and what is in it.

1. A feature has a card if an evaluation has rows about it (``View.opens_card``). If several configurations of an evaluation have
   it, the first one in the suite is used, as in the case studies.
2. ``most`` are kept: those that satisfy every criterion (``case_studies``), then those that most evaluations have rows about,
   then in the order of the case studies.
3. They are shown in the order of the case studies; features without one come last.
4. Each has an anchor made of dictionary, hook point and number, which links on the page lead to.
5. A card is put together from what every view adds: lines on top, parts below, and the words that the filter looks in.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pandas as pd
from markupsafe import Markup

from evalkit.errors import UsageError
from evalkit.report.case_studies.criteria import NEEDS, SIDES, WHY_NONE, stories
from evalkit.report.feature_scores import Line, feature_scores
from evalkit.report.html import filled
from evalkit.report.selection import Name, by_feature, name_of
from evalkit.report.tables import NOTHING
from evalkit.report.views.base import Card, Feature, explanations, views_of
from evalkit.store.reader import Results


class Section(NamedTuple):
    """The card of one feature, for the template."""

    anchor: str
    name: Name
    title: str
    agrees: bool
    """Every criterion is satisfied."""
    criteria: list[tuple[str, str]]
    """Each with 'yes', 'no', or '-' where it could not be evaluated."""
    explanation: str
    hint: Markup
    find: str
    """What the filter looks in."""
    facts: list[tuple[str, str]]
    blocks: dict[str, list[Markup]]
    """By their place."""
    scores: list[Line]


class Browser(NamedTuple):
    """The features of a page."""

    sections: list[Section]
    known: int
    """Features there are rows about."""
    agreeing: int
    """Of these, features that satisfy every criterion."""
    stories: pd.DataFrame | None
    why: str
    """Why there are no case studies; '' where there are."""
    anchors: dict[Name, str]


def browser(store: Results, run: str, most: int) -> Browser:
    """The cards of a run's features, at most ``most`` of them."""
    views = views_of(store, run)
    tables = [{table: by_feature(rows) for table, rows in view.feature_rows().items()} for view in views]
    table, why = _case_studies(store, run)
    ranked = {} if table is None else {name_of(row): row for _, row in table.iterrows()}
    agreeing = {name for name, row in ranked.items() if row["agree"] == row["sides"]}
    count: dict[Name, int] = {}
    for view, rows in zip(views, tables, strict=True):
        for name in next(iter(rows.values()), ()) if view.opens_card else ():
            count[name] = count.get(name, 0) + 1
    rank = {name: at for at, name in enumerate(ranked)}
    last = len(rank)
    chosen = sorted(count, key=lambda name: (name not in agreeing, -count[name], rank.get(name, last)))[: max(0, most)]
    chosen.sort(key=lambda name: (name not in agreeing, rank.get(name, last)))
    anchors = _anchors(chosen)
    scores = feature_scores(store, run, [view.evaluation for view in views if view.lists_scores])
    texts = explanations(store, run)
    sections = []
    for name in chosen:
        feature = Feature(name, {}, scores, ranked.get(name), anchors)
        own = [{table: rows[name] for table, rows in by_table.items() if name in rows} for by_table in tables]
        cards = [view.feature_card(feature._replace(rows=rows)) for view, rows in zip(views, own, strict=True)]
        sections.append(_section(feature, [card for card in cards if card], texts.get(name, ""), name in agreeing))
    return Browser(sections, len(count), len(agreeing & set(count)), table, why, anchors)


def _case_studies(store: Results, run: str) -> tuple[pd.DataFrame | None, str]:
    """The case studies of the run, or None and why there are none."""
    if not set(NEEDS) <= set(store.evaluations(run)):
        return None, WHY_NONE
    try:
        return stories(store, run), ""
    except UsageError as error:
        return None, error.what


def _section(feature: Feature, cards: list[Card], explanation: str, agrees: bool) -> Section:
    """The card of a feature from what every view adds."""
    hints = [card.hint for card in cards if card.hint]
    hints += [filled("<q>{}</q>", explanation)] if explanation else []
    words = [word.replace("\u2423", "") for card in cards for word in card.words]
    dictionary, hook_point, number = feature.name
    find = dict.fromkeys([str(number), dictionary, hook_point, explanation, *words])
    blocks: dict[str, list[Markup]] = {"beside": [], "contexts": [], "below": []}
    for block in (block for card in cards for block in card.blocks):
        blocks[block.place].append(block.html)
    return Section(
        anchor=feature.anchors[feature.name],
        name=feature.name,
        title=feature.title,
        agrees=agrees,
        criteria=_criteria(feature.case_study),
        explanation=explanation,
        hint=Markup(" ").join(hints),
        find=f" {' '.join(find).lower()} ",
        facts=[fact for card in cards for fact in card.facts],
        blocks=blocks,
        scores=feature.scores.of(feature.name),
    )


def _criteria(row: pd.Series | None) -> list[tuple[str, str]]:
    texts = {True: "yes", False: "no", None: NOTHING}
    return [] if row is None else [(side, texts[None if row[side] is None else bool(row[side])]) for side in SIDES]


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
