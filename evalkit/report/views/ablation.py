"""Ablation: tokens that a feature's absence lowers and raises, with 95% intervals over contexts, and the contexts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from evalkit.report.contexts import EMPTY, tokens_of, visible
from evalkit.report.html import filled, rendered
from evalkit.report.selection import of_feature
from evalkit.report.tables import NOTHING, number, with_interval
from evalkit.report.views.base import VIEWS, Block, Card, Feature, View
from evalkit.util.statistics import LEAST_CLUSTERS
from evalkit.util.terminal import legible

LISTED = 8
"""Tokens of one side."""
SIDES = ("lowered", "raised")


def moved(effects: pd.DataFrame, side: str, edit: str = "ablate") -> pd.DataFrame:
    """Tokens that an edit lowers or raises, in probability and in its mean logarithm: the largest change of probability
    first, then those of the largest change of log-probability. Fewer than ``LEAST_CLUSTERS`` contexts have no interval."""
    own = effects[(effects["edit"] == edit) & (effects["side"] == side)]
    way = -1 if side == "lowered" else 1
    own = own[(own["change"] * way > 0) & (own["mass"] * way > 0) & own["ranked_by"].isin(["mass", "change"])]
    order = own.sort_values(["ranked_by", "place"], ascending=[False, True], kind="stable")  # 'mass' before 'change'
    order = order.drop_duplicates("token_id")
    # bootstrapped over contexts: of few, the interval says no more than the smallest and the largest of them
    return order.assign(**{end: order[end].where(order["contexts"] >= LEAST_CLUSTERS) for end in ("low", "high")})


@VIEWS.register("ablation")
class AblationView(View):
    """The scores; the card has the tokens lowered and raised, and the contexts."""

    tables = ("logit_effects", "ablation_contexts")
    lists_scores = True
    position = 2

    def feature_card(self, feature: Feature) -> Card | None:
        hint, words, blocks = Markup(), [], []
        rows = feature.rows.get("logit_effects")
        if rows is not None and (shown := _effects(rows)):
            lowered = [visible(token) for token in moved(rows, "lowered").head(3)["token"]]
            if lowered:
                hint = filled("lowers" + ' <bdi class="token">{}</bdi>' * len(lowered), *lowered)
            words = [token["token"] for side in shown["sides"].values() for token in side]
            further = {"direct": _direct(rows), "other_edits": _other_edits(rows)}
            blocks.append(Block(rendered("effects.html", effects=shown, **further, title=feature.title), "beside"))
        if "ablation_contexts" in feature.rows:
            contexts = _contexts(feature.rows["ablation_contexts"])
            if contexts:
                blocks.append(Block(rendered("ablated.html", contexts=contexts, title=feature.title)))
        return Card(self._facts(feature), hint, words, blocks)

    def _facts(self, feature: Feature) -> list[tuple[str, str]]:
        """What stands on top of a card, each null in brackets."""

        def score(metric: str, digits: int = 2) -> str:
            return feature.scores.text(feature.name, self.evaluation, metric, digits)

        facts = []
        if kl := score("kl", 4):
            facts.append(("KL without it", f"{kl} nats (random directions {score('kl_random', 4) or NOTHING})"))
        if (row := feature.case_study) is not None and "next_low" in row:
            change = with_interval(float(row["next_change"]), float(row["next_low"]), float(row["next_high"]), 3)
            facts.append(("next token", f"{change} nats without it, over {int(row['contexts'])} contexts"))
        elif change := score("next_change", 3):
            facts.append(("next token", f"{change} nats without it"))
        if repeated := score("repeated"):
            null = score("repeated_random") or NOTHING
            facts.append(("effect repeats", f"{repeated} of it in the other half of the contexts (random directions {null})"))
        if direct := score("direct_r"):
            facts.append(("direct effect", f"correlation {direct} with the effect of ablation"))
        return facts

    def text(self, about: pd.Series) -> str:
        effects = of_feature(self.rows("logit_effects"), about)
        if effects.empty:
            return ""
        lines = ["without it: change of log-probability in nats, and of probability"]
        for side in SIDES:
            rows: list[Any] = list(moved(effects, side).head(LISTED).itertuples())
            lines += [
                f"  {side:8} {visible(row.token):20} {with_interval(row.change, row.low, row.high, 3):26} {row.mass:+.5f}"
                for row in rows
            ]
        return "\n".join(lines)


def _effects(rows: pd.DataFrame) -> dict[str, Any] | None:
    """Tokens lowered and raised, on one axis from 0 to 100, from one feature's rows of ``logit_effects``."""
    sides = {side: moved(rows, side).head(LISTED) for side in SIDES}
    both = pd.concat(list(sides.values()))
    if both.empty:
        return None
    reach = both[["low", "high", "change"]].to_numpy(np.float64)
    low, high = min(0.0, float(np.nanmin(reach))), max(0.0, float(np.nanmax(reach)))

    def on_axis(value: float) -> float:
        return round(100 * (value - low) / ((high - low) or 1.0), 1)

    def shown(row: Any) -> dict[str, Any]:
        # without an interval, the bar is a point
        first, last = (on_axis(row.change if math.isnan(end) else end) for end in (row.low, row.high))
        return {
            "token": visible(row.token),
            "change": with_interval(row.change, row.low, row.high, 3),
            "low": first,
            "middle": on_axis(row.change),
            "high": last,
            "mass": f"{row.mass:+.4f}",
            "direct": NOTHING if row.direct is None or pd.isna(row.direct) else f"{float(row.direct):+.3f}",
        }

    return {"zero": on_axis(0.0), "sides": {side: [shown(row) for row in part.itertuples()] for side, part in sides.items()}}


def _direct(rows: pd.DataFrame) -> dict[str, list[tuple[str, str]]]:
    """Tokens whose logit changes most through the residual stream alone; {} off the residual stream."""
    own = rows[(rows["edit"] == "ablate") & (rows["ranked_by"] == "direct") & rows["direct"].notna()]
    own = own.sort_values("place", kind="stable")
    sides = {side: _changes(own[own["side"] == side], "direct") for side in SIDES}
    return sides if any(sides.values()) else {}


def _other_edits(rows: pd.DataFrame) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """Tokens lowered and raised most, in probability, where the feature was added or clamped instead."""
    edits = [str(edit) for edit in rows["edit"].unique() if edit != "ablate"]
    by_edit = {edit: {side: _changes(moved(rows, side, edit), "change") for side in SIDES} for edit in edits}
    return {edit: sides for edit, sides in by_edit.items() if any(sides.values())}


def _changes(rows: pd.DataFrame, column: str) -> list[tuple[str, str]]:
    rows = rows.head(LISTED)
    return [(visible(str(token)), f"{value:+.3f}") for token, value in zip(rows["token"], rows[column], strict=True)]


def _contexts(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """From one feature's rows of ``ablation_contexts``; the largest loss of the next token first."""
    own = rows[rows["edit"] == "ablate"].sort_values(["next_change", "window", "position"], kind="stable")
    contexts = []
    for row in own.to_dict("records"):
        tokens, lowered = tokens_of(row["tokens"]), row["lowered"]
        contexts.append(
            {
                "text": legible("".join(tokens[:-1])),
                "token": visible(tokens[-1]) if tokens else EMPTY,
                "activation": number(row["code"], 2),
                "kl": number(row["kl"], 4),
                "next_token": visible(row["next_token"]) if isinstance(row["next_token"], str) else NOTHING,
                "next_change": number(row["next_change"], 3),
                "lowered": (visible(lowered), f"{row['lowered_change']:+.3f}") if isinstance(lowered, str) else None,
            }
        )
    return contexts
