"""One feature's section of a page, from the rows of every evaluation that knows it.

1. On top is a line for each side of its story with the null in brackets; below, the parts (``feature_parts``), the causal tree
   (``trees.page``) and all scores (``feature_numbers``).
2. A part that no evaluation has rows for is left out; a tree without edges says why.
3. What the filter of the page looks in: number, names, explanation, the tokens it fires on and moves, and its concepts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd

from evalkit.report import feature_parts as parts
from evalkit.report.feature_numbers import Name, Number, Numbers
from evalkit.report.stories import SAME
from evalkit.report.tables import NOTHING, number, with_interval
from evalkit.report.trees.data import Nodes, grown
from evalkit.report.trees.page import Picture, picture_of
from evalkit.terminal import legible

TABLES = ("input_bins", "logit_effects", "ablation_contexts", "predictions")
"""Tables that the parts are made of."""
TEXTS = 6
"""Texts shown of one concept."""


class Criterion(NamedTuple):
    """One side of a story."""

    name: str
    said: str
    """'yes', 'no', or '-' where there is none."""


class Telling(NamedTuple):
    """A concept that the feature tells best of its dictionary."""

    concept: str
    auroc: str
    p: str
    recall: str
    texts: int
    strongest: list[tuple[str, str, str]]
    """Activation, 'shows it' or 'does not', text."""


class Section(NamedTuple):
    """Everything of one feature."""

    anchor: str
    dictionary: str
    hook_point: str
    feature: int
    agrees: bool
    criteria: list[Criterion]
    main_class: str
    lowered: list[str]
    explanation: str
    find: str
    """What the filter looks in."""
    facts: list[tuple[str, str]]
    histogram: parts.Histogram | None
    top: list[parts.Context]
    spread: list[parts.Spread]
    fragments: list[parts.Context]
    effects: parts.Effects | None
    direct: dict[str, list[parts.Named]]
    other_edits: dict[str, dict[str, list[parts.Named]]]
    ablated: list[parts.Ablated]
    tree: Picture | None
    tree_said: str
    steering: list[parts.Steering]
    tellings: list[Telling]
    numbers: list[Number]


class Facts(NamedTuple):
    """Rows of a run by feature."""

    rows: dict[str, dict[Name, pd.DataFrame]]
    steering: dict[Name, pd.DataFrame]
    stories: dict[Name, pd.Series]
    nodes: Nodes
    numbers: Numbers
    explanations: dict[Name, str]
    grown: set[Name]
    """Features that a causal tree was asked for."""


def section(name: Name, facts: Facts, anchors: dict[Name, str], agrees: bool) -> Section:
    """Everything of one feature.

    Args:
        anchors: sections of the page, by feature; of this one too.
        agrees: whether all sides of its story do.
    """
    own = {table: by_name.get(name) for table, by_name in facts.rows.items()}
    bins, logits, contexts, predictions = (own.get(table) for table in TABLES)
    story = facts.stories.get(name)
    tree, tree_said = _tree(name, own.get("causal_edges"), facts, anchors)
    explanation = facts.explanations.get(name, "")
    histogram = None if bins is None else parts.histogram(bins)
    effects = None if logits is None else parts.effects(logits)
    steering = (
        [parts.steering(part) for _, part in facts.steering[name].groupby("concept", sort=False)]
        if name in facts.steering
        else []
    )
    tellings = _tellings(own.get("concept_features"), own.get("concept_texts"))
    lowered = [one.token for one in effects.sides["lowered"][:3]] if effects else []
    tokens = [one.token for tenth in histogram.tenths for one in tenth.tokens] if histogram else []
    moved = [one.token for part in effects.sides.values() for one in part] if effects else []
    words = [*tokens, *moved, *(word for one in steering for word in one.words)]
    words += [*(one.concept for one in steering), *(one.concept for one in tellings)]
    said = [str(name[2]), name[0], name[1], explanation, *(part.replace("\u2423", "") for part in words)]
    return Section(
        anchors[name], *name, agrees, _criteria(story), histogram.main_class if histogram else "", lowered, explanation,
        f" {' '.join(dict.fromkeys(said)).lower()} ", _lines(name, facts, story, histogram), histogram,
        [] if bins is None else parts.top_contexts(bins), [] if bins is None else parts.spread(bins),
        [] if predictions is None else parts.fragments(predictions),
        effects, {} if logits is None else parts.direct(logits), {} if logits is None else parts.other_edits(logits),
        [] if contexts is None else parts.ablated(contexts), tree, tree_said, steering, tellings, facts.numbers.of(name),
    )  # fmt: skip


def _criteria(story: pd.Series | None) -> list[Criterion]:
    if story is None:
        return []
    said = {True: "yes", False: "no", None: NOTHING}
    return [Criterion(side, said[None if story[side] is None else bool(story[side])]) for side in ("inputs", "effect", "tree")]


def _lines(name: Name, facts: Facts, story: pd.Series | None, histogram: parts.Histogram | None) -> list[tuple[str, str]]:
    """What stands on top of a section: each side in a line, its null in brackets."""

    def said(evaluation: str, metric: str, digits: int) -> str:
        return facts.numbers.said(name, evaluation, metric, digits)

    found = []
    if density := facts.numbers.value(name, "inputs", "density"):
        found.append(("fires on", f"{density:.2%} of the tokens"))
    if histogram and (share := said("inputs", "monosemantic", 2)):
        null = said("inputs", "monosemantic_random", 2) or NOTHING
        found.append(("main class", f"{histogram.main_class}: {share} of the mean tenth of its range (random tokens {null})"))
    if kl := said("ablation", "kl", 4):
        found.append(("KL without it", f"{kl} nats (random directions {said('ablation', 'kl_random', 4) or NOTHING})"))
    if story is not None and "next_low" in story:
        change = with_interval(float(story["next_change"]), float(story["next_low"]), float(story["next_high"]), 3)
        found.append(("next token", f"{change} nats without it, over {int(story['contexts'])} contexts"))
    elif change := said("ablation", "next_change", 3):
        found.append(("next token", f"{change} nats without it"))
    if repeated := said("ablation", "repeated", 2):
        null = said("ablation", "repeated_random", 2) or NOTHING
        found.append(("effect repeats", f"{repeated} of it in the other half of the contexts (random directions {null})"))
    if direct := said("ablation", "direct_r", 2):
        found.append(("direct effect", f"correlation {direct} with the effect of ablation"))
    if share := said("causal_tree", "parent_share", 2):
        null, carried = (said("causal_tree", metric, 2) or NOTHING for metric in ("parent_share_random", "parent_carried"))
        beside = f"a random direction {null}; carried {carried}"
        found.append(
            (
                "strongest parent",
                f"{share} of its activation goes with the strongest of the significant earlier features ({beside})",
            )
        )
    if score := said("autointerp", "top_and_random", 2):
        found.append(("explanation scores", score))
    return found


def _tree(name: Name, edges: pd.DataFrame | None, facts: Facts, anchors: dict[Name, str]) -> tuple[Picture | None, str]:
    """The picture of the tree, and a sentence about what it leaves out or why there is none."""
    if edges is None:
        said = "No feature of an earlier hook point was a candidate." if name in facts.grown else ""
        return None, said
    about = pd.Series(dict(zip(SAME, name, strict=True)))
    tree, whole = (grown(edges, facts.nodes, about, *most) for most in ((), (None,)))
    if not tree.edges and edges["p"].isna().all():
        return None, f"Its {int(edges['contexts'].max())} contexts are too few for a test: nothing is known of its parents."
    if not tree.edges:
        return (
            None,
            f"None of the {int((~edges['checked'].eq(True)).sum())} features that were ablated has a significant effect on it.",
        )
    more = len(whole.edges) - len(tree.edges)
    said = f"{len(tree.edges)} significant edges are shown" if len(tree.edges) > 1 else "The one significant edge is shown"
    said += (
        f"; {more} weaker ones are left out (evalkit figure causal_tree --feature NUMBER -o tree.json has all)." if more else "."
    )
    return picture_of(tree, anchors), said


def _tellings(features: pd.DataFrame | None, texts: pd.DataFrame | None) -> list[Telling]:
    if features is None:
        return []
    found = []
    rows: list[Any] = list(features.itertuples())
    for row in rows:
        own = texts[(texts["concept"] == row.concept) & texts["held_out"].astype(bool)] if texts is not None else None
        strongest = (
            [] if own is None else own.sort_values(["value", "text"], ascending=[False, True]).head(TEXTS).to_dict("records")
        )
        shown = [(number(t["value"], 2), "shows it" if t["label"] else "does not", legible(t["text"])) for t in strongest]
        told = (number(row.auroc, 2), number(row.p_holm, 4), number(row.recall, 2), int(row.texts))
        found.append(Telling(str(row.concept), *told, shown))
    return found
