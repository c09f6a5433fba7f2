"""Automatic interpretation: the explanation of a feature with its score, and the fragments that a judge was shown."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from evalkit.report.contexts import EMPTY, Context, Shade, share
from evalkit.report.html import rendered
from evalkit.report.selection import Name, name_of
from evalkit.report.tables import number
from evalkit.report.views.base import VIEWS, Block, Card, Feature, View
from evalkit.util.terminal import legible

FRAGMENTS = 4
"""Fragments in a card."""


@VIEWS.register("autointerp")
class AutointerpView(View):
    """The scores; the card has the explanation's score and fragments, each token with its activation."""

    tables = ("predictions",)
    opens_card = False
    lists_scores = True
    position = 6

    def explanations(self) -> dict[Name, str]:
        rows = self.rows("explanations")
        found: dict[Name, str] = {}
        for row in rows[rows["status"] == "ok"].to_dict("records"):  # the suite's judge before its references
            found.setdefault(name_of(row), str(row["explanation"]))
        return found

    def feature_card(self, feature: Feature) -> Card | None:
        score = feature.scores.text(feature.name, self.evaluation, "top_and_random", 2)
        found = fragments(feature.rows["predictions"]) if "predictions" in feature.rows else []
        note = "Fragments with the activation of each token:"
        blocks = [Block(rendered("contexts.html", note=note, contexts=found), "contexts")] if found else []
        return Card([("explanation scores", score)] if score else [], blocks=blocks)


def fragments(rows: pd.DataFrame) -> list[Context]:
    """Fragments a judge was shown or asked about, with the activation of each token, from a feature's rows of ``predictions``."""
    rows = rows[rows["part"].isin(["explain", "top"])].drop_duplicates(["part", "fragment"])
    found: list[tuple[float, list[Any], list[float]]] = []
    for row in rows.to_dict("records"):
        tokens, actual = list(row["tokens"]), [float(value) for value in row["actual"]]
        kept = [value for value in actual if not math.isnan(value)]
        if kept and len(tokens) == len(actual):
            found.append((max(kept, key=abs), tokens, actual))
    found.sort(key=lambda fragment: -abs(fragment[0]))
    largest = max((abs(top) for top, _, _ in found), default=0.0)

    def shades(tokens: list[Any], actual: list[float]) -> list[Shade]:
        pairs = zip(tokens, actual, strict=True)
        return [Shade(legible(token) or EMPTY, share(value, largest), number(value, 2)) for token, value in pairs]

    return [Context(number(top, 2), shades(tokens, actual)) for top, tokens, actual in found[:FRAGMENTS]]
