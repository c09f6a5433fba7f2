"""Scores and rows of causal trees: what is said of a dictionary, what of a feature, and what of the gradient that chose.

1. Of every target, whatever the test says: the share of the strongest cause, with its null, and how much of all estimated loss
   the three largest causes make. Dictionaries are compared by these: no target drops out for having no parent.
2. Of the test: number of parents, and what goes without all of them; 0 where there are none.
3. Of targets that have a parent: the share of the strongest one, its null, and what of it is carried. The residual stream takes a
   written vector along; a tree of carried shares follows one feature through the layers and says nothing of a computation.
4. Of the gradient: its correlation with exact shares, and which of the candidates it left out would have been parents, among
   those next in size and among some drawn at random. These are counts: their intervals are exact binomial ones.
5. Of the contexts: how many are weaker than ``level`` asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from evalkit.evaluations.base import Metric, Score
from evalkit.evaluations.causal_tree.parents import OTHERS, Parents
from evalkit.judges.base import ExplainTask
from evalkit.util.statistics import correlation

LARGEST = 3
"""Causes whose part of all loss is given."""
METRICS: dict[str, Metric] = {
    "cause_share": Metric(
        "strongest cause", "neither", null="cause_share_random", main=True,
        note="Share of the feature's activation that goes when the strongest candidate of the hook point before is ablated, "
        "significant or not: found in every second context, mean over the others. 0 where there is no candidate.",
    ),
    "cause_share_random": Metric(
        "strongest cause, random", "neither",
        note="As much as the strongest cause added along a random direction, in the contexts it is measured in.",
    ),
    "top_share": Metric(
        "three causes", "higher",
        note=f"Part of all loss that the {LARGEST} largest causes make: their positive mean shares, over the sum of those of all "
        "features active in the contexts, by the gradient where not ablated. Near 1 where the tree is sparse. Undefined only "
        "where nothing takes anything.",
    ),
    "parents": Metric(
        "parents", "neither", digits=1,
        note="Candidates whose ablation takes at least least_share (0.05 unless set) of the activation, significantly: one-sided "
        "t over contexts, corrected by Holm for all candidates; undefined in fewer than 6 contexts. The t-test takes shares for "
        "about normal: where a rare context is raised much more than the others are lowered, and is not among those drawn, it "
        "says yes too often.",
    ),
    "parents_flips": Metric(
        "parents, flips", "neither", digits=1,
        note="Those of the parents that exact sign flips over contexts find too, corrected in the same way: a test that takes "
        "shares for symmetric where nothing is caused, and not for normal. It needs a child with many contexts in which a "
        "parent is active: p is at least 1 / 2^contexts.",
    ),
    "candidates": Metric(
        "candidates", "neither", digits=0,
        note="Features of the hook point before that are active in at least least_active (3 unless set) of the contexts: what "
        "the correction is for. Those active in fewer are never parents.",
    ),
    "together": Metric(
        "all parents", "neither",
        note="Share that goes when all of a feature's parents are ablated at once; 0 where it has none.",
    ),
    "parent_share": Metric(
        "strongest parent", "neither", null="parent_share_random",
        note="As the strongest cause, of the significant ones alone; undefined without parents, so that n says how many features "
        "it is about: those on which something was found, which the test chose in all contexts.",
    ),
    "parent_carried": Metric(
        "of it carried", "neither",
        note="Share that goes with the strongest parent's own vector, read again at the later hook point with nothing computed "
        "from it. Where it is near the strongest parent's share, that is the feature itself some layers earlier and no "
        "computation; undefined without parents and off the residual stream.",
    ),
    "parent_share_random": Metric(
        "strongest parent, random", "neither", note="As much as the strongest parent added along a random direction, in the same "
        "contexts.",
    ),
    "missed": Metric(
        "missed, drawn", "lower", transform="counts",
        note="Of the candidates that the gradient left out and that were drawn at random and ablated all the same, the share "
        "that would have been parents, all targets together; interval of Clopper and Pearson, as if they were independent. Its "
        "upper end is what can be ruled out: a few missed parents among hundreds left out cannot be seen.",
    ),
    "missed_next": Metric(
        "missed, next", "lower", transform="counts",
        note="The same of the candidates next by the size of their estimate, of either sign: sees a cut that comes too early and "
        "slopes of the wrong sign, not effects for which the slope is near 0.",
    ),
    "estimate_r": Metric(
        "gradient r", "neither", chance=0.0,
        note="Correlation of the gradient's estimate with the exact share over the ablated features.",
    ),
    "weak": Metric(
        "weak contexts", "neither",
        note="Share of the contexts in which the feature lies below level (0.5 unless set) of its maximum: its strongest windows "
        "were taken where too few reach it.",
    ),
}  # fmt: skip
ALWAYS = ("cause_share", "cause_share_random", "parents", "parents_flips", "candidates", "together")
"""Metrics that are 0 where a feature has contexts and no candidate."""


class Node(NamedTuple):
    """One feature of one hook point, studied."""

    maximum: float
    tokens: str
    parents: Parents | None
    """None at the earliest hook point, and where it never fires."""
    weak: int = 0
    """Of the contexts, those in which it lies below ``level`` of its maximum."""
    task: ExplainTask | None = None
    """What the judge is to explain; None where it is not asked."""
    explanation: str | None = None
    """By the judge; None where it was not asked or failed."""
    judge: str | None = None
    """The one that was asked."""
    error: str = ""
    """Why it has no explanation, or that the one it has was cut off."""


Key = tuple[str, int]
"""Hook point and feature."""


def chosen(found: Parents, branching: int) -> list[int]:
    """The parents that become nodes: significant ones that the gradient proposed, the largest shares first."""
    return found.features[found.significant & ~found.checked][:branching].tolist()


def top_share(found: Parents) -> float | None:
    """Part of all positive loss that the ``LARGEST`` ablated features make; None where there is no loss."""
    positive = np.clip(found.shares.mean(1), 0, None)
    total = positive.sum() + found.rest
    return float(np.sort(positive)[::-1][:LARGEST].sum() / total) if total > 0 else None


def scores_of(feature: int, node: Node) -> Iterator[Score]:
    """Scores of one target, of every metric."""

    def score(metric: str, value: float | None, n: int = 1, weight: float = 1.0) -> Score:
        found = Score.of(metric, value, feature, "feature", weight, n=n)
        return found if found.value is not None else found._replace(weight=0.0)

    found = node.parents
    if found is None:
        for metric in METRICS:
            yield score(metric, None)
        return
    C, others = len(found.activations), len(range(len(found.activations))[OTHERS])
    values: dict[str, float | None] = dict.fromkeys(METRICS)
    counts = dict.fromkeys(METRICS, C)
    weights = dict.fromkeys(METRICS, 1.0)
    values |= {"parents": float(len(chosen(found, len(found.features)))), "candidates": float(found.candidates)}
    values["parents_flips"] = float((found.significant & ~found.checked & (found.p_flips < found.alpha)).sum())
    values |= {"together": found.together or 0.0, "top_share": top_share(found), "weak": node.weak / C}
    if not found.tested:
        values |= {"parents": None, "parents_flips": None, "together": None}
    if not found.candidates:
        values |= dict.fromkeys(ALWAYS, 0.0)
    for name, one in (("cause", found.cause), ("parent", found.parent)):
        if one is not None:
            values |= {f"{name}_share": one.share, f"{name}_share_random": one.random}
        counts |= {f"{name}_share": others, f"{name}_share_random": others}
    values["parent_carried"] = found.parent.carried if found.parent is not None else None
    counts["parent_carried"] = others
    for metric, which in (("missed", found.drawn), ("missed_next", found.checked & ~found.drawn)):
        checked = int(which.sum()) if found.tested else 0
        values[metric] = float((found.significant & which).sum()) / checked if checked else None
        counts[metric], weights[metric] = checked, float(checked)
    if len(found.features):
        values["estimate_r"] = correlation(found.estimates, found.shares.mean(1))
    counts |= {
        "parents": found.candidates,
        "parents_flips": found.candidates,
        "top_share": found.present,
        "estimate_r": len(found.features),
    }
    for metric, value in values.items():
        yield score(metric, value, counts[metric], weights[metric])


def edges_of(target: int, levels: Sequence[str], nodes: dict[Key, Node], branching: int) -> Iterator[dict[str, Any]]:
    """Rows of ``causal_edges`` of one tree."""
    layer = [target]
    for number, (hook_point, before) in enumerate(zip(levels, levels[1:], strict=False), start=1):
        following: list[int] = []
        for child in layer:
            found = nodes[hook_point, child].parents
            if found is not None:
                yield from _edges(found, target, number, (hook_point, child), before)
                following += chosen(found, branching)
        layer = sorted(set(following))


def _edges(found: Parents, target: int, number: int, child: Key, before: str) -> Iterator[dict[str, Any]]:
    C = len(found.activations)
    half = stats.t.ppf(0.975, C - 1) * found.shares.std(1, ddof=1) / np.sqrt(C) if C > 1 else np.full(len(found.features), np.nan)
    for place, parent in enumerate(found.features.tolist()):
        share, spread, carried = float(found.shares[place].mean()), float(half[place]), float(found.carried[place].mean())
        checked, drawn = bool(found.checked[place]), bool(found.drawn[place])
        yield {
            "target": target,
            "depth": number,
            "child_hook": child[0],
            "child": child[1],
            "parent_hook": before,
            "parent": parent,
            "place": place + 1,
            "share": share,
            "low": share - spread if found.tested else None,
            "high": share + spread if found.tested else None,
            "carried": carried if carried == carried else None,
            "checked": checked,
            "proposed_as": "drawn" if drawn else "next" if checked else "tested",
            "estimate": float(found.estimates[place]),
            "p": float(found.p[place]) if found.tested else None,
            "p_holm": float(found.p_holm[place]) if found.tested else None,
            "p_flips": float(found.p_flips[place]) if found.tested else None,
            "significant": bool(found.significant[place]),
            "active": int(found.active[place]),
            "contexts": C,
        }


def node_rows(nodes: dict[Key, Node]) -> Iterator[dict[str, Any]]:
    """Rows of ``causal_nodes``."""
    for (hook_point, feature), node in nodes.items():
        row: dict[str, Any] = {"hook_point": hook_point, "feature": feature, "tokens": node.tokens, "maximum": node.maximum}
        row |= {"explanation": node.explanation, "explained_by": node.judge, "explanation_error": node.error or None}
        if (found := node.parents) is not None:
            r = correlation(found.estimates, found.shares.mean(1)) if len(found.features) else float("nan")
            row |= {
                "activation": float(found.activations.mean()),
                "contexts": len(found.activations),
                "weak": node.weak,
                "candidates": found.candidates,
                "present": found.present,
                "tested": int((~found.checked).sum()),
                "checked": int(found.checked.sum()),
                "missed": int((found.significant & found.checked).sum()) if found.tested else None,
                "parents": int((found.significant & ~found.checked).sum()) if found.tested else None,
                "together": (found.together or 0.0) if found.tested else None,
                "random": found.cause.random if found.cause is not None else None,
                "top_share": top_share(found),
                "estimate_r": r if r == r else None,
            }
        yield row
