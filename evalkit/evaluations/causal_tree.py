"""Causal trees: which features of earlier hook points make a feature fire, and which make those fire.

1. Targets are named or drawn (``choosing``) at a hook point; a tree goes down the suite's earlier hook points, one a level, with
   the dictionary of the same name at each.
2. A node's parents are found in contexts of its own, where its activation lies between ``level`` times its maximum and the
   maximum (where these are too few, in its strongest windows): every active feature of the hook point before is a candidate,
   the gradient proposes, exact ablation decides (``causal_effects``).
3. The ``branching`` parents with the largest shares become nodes, down to ``depth`` levels. A feature that several trees come to
   is studied once.
4. Every ablated feature is an edge with its share, interval and p, whether or not it is significant, so that other rules can be
   applied to the same rows.
5. A dictionary's trees are sparse where few parents carry much: share of the strongest, number of parents, how many make half
   of what all candidates take. The strongest is chosen in every second context; its share, what of it is carried, and the null,
   as much along a random direction, are means over the others, so that the largest of many is not flattered.
6. Carried: how much of that share is the written vector itself, taken along by the residual stream and read again
   (``causal_effects``). A tree of carried shares follows one feature through the layers and says nothing of a computation.

Only causes are looked for: features whose ablation raises the child are no parents. At the earliest hook point there is nothing
before, and no tree.

Cunningham et al. 2023 (arXiv 2309.08600), section 5 and figure 5.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from scipy import stats

from evalkit.errors import ModelError, SuiteError
from evalkit.evaluations.ablation import correlation
from evalkit.evaluations.ablation_measure import contexts_of
from evalkit.evaluations.base import EVALUATIONS, Bench, Evaluation, Metric, Result, Score
from evalkit.evaluations.causal_effects import OTHERS, Ablations, Parents, Rule, parents_of
from evalkit.evaluations.choosing import LEAST_WINDOWS, PREFERENCES, choose_features, feature_codes
from evalkit.patching.onward import depth

if TYPE_CHECKING:
    from evalkit.dictionaries.base import Dictionary

STRONGEST = 50
"""Firings among which a node's tokens are counted."""
NAMED = 5
"""Parents of a node whose tokens are kept, followed or not."""


@dataclass(frozen=True)
class CausalTreeConfig:
    """Settings of the evaluation 'causal_tree': which earlier features make a feature fire."""

    features: int = 8
    """Targets drawn from those active in enough windows; a smaller sample is part of a larger one."""
    feature_ids: tuple[int, ...] = ()
    """Grow trees of these features instead of a sample."""
    least_windows: int = LEAST_WINDOWS
    """Windows of scoring text a drawn target must be active in."""
    prefer: str = "any"
    """'any' draws from all of these; 'one token' from the quarter that fires most on a single token, for stories of features."""
    contexts: int = 16
    """Contexts of each node (the paper: 20)."""
    level: float = 0.5
    """Contexts are drawn where the node reaches this share of its maximum (the paper: half), or from as many of its strongest
    windows as are wanted where fewer do."""
    branching: int = 3
    """Parents of a node that become nodes."""
    depth: int = 2
    """Levels below the target, at most as many as there are earlier hook points."""
    tested: int = 48
    """Candidates with the largest gradient estimates that are ablated one by one."""
    checked: int = 12
    """Candidates drawn from the others that are ablated too: they tell what the gradient misses."""
    alpha: float = 0.05
    """A parent's p, one-sided over contexts and corrected by Holm for all candidates, lies below this."""
    least_share: float = 0.05
    """A parent takes at least this share of the child's activation with it."""
    tokens: int = 3
    """Tokens named at each node."""

    def __post_init__(self) -> None:
        if self.prefer not in PREFERENCES:
            raise ValueError(f"prefer = '{self.prefer}' is not one of {', '.join(PREFERENCES)}")
        for key, least in (("features", 1), ("least_windows", 1), ("contexts", 3), ("branching", 1), ("depth", 1),
                           ("tested", 1), ("checked", 0), ("tokens", 1)):  # fmt: skip
            if getattr(self, key) < least:
                raise ValueError(f"{key} = {getattr(self, key)} is too small: choose {least} or more")
        for key in ("level", "alpha", "least_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} = {getattr(self, key):g} is not between 0 and 1")


class _Node(NamedTuple):
    """One feature of one hook point, studied."""

    maximum: float
    tokens: str
    parents: Parents | None
    """None at the earliest hook point, and where it never fires."""


Key = tuple[str, int]
"""Hook point and feature."""


@EVALUATIONS.register("causal_tree")
class CausalTree(Evaluation):
    """Features of earlier hook points that a feature hangs on, with what their ablation takes, level by level."""

    name: ClassVar[str] = "causal_tree"
    version: ClassVar[int] = 5
    config: ClassVar[type] = CausalTreeConfig
    needs_reach: ClassVar[bool] = True
    metrics: ClassVar[dict[str, Metric]] = {
        "parent_share": Metric(
            "strongest cause", "neither", null="parent_share_random", main=True,
            note="Share of the feature's activation that goes when the strongest feature of the hook point before is ablated: "
            "found in every second context, mean over the others; whether it passes the test or not.",
        ),
        "parent_carried": Metric(
            "of it carried", "neither",
            note="Share that goes with the strongest cause's own vector, read again at the later hook point with nothing "
            "computed from it. Where it is near the strongest cause's share, that is the feature itself some layers earlier and "
            "no computation; undefined off the residual stream.",
        ),
        "parent_share_random": Metric(
            "strongest cause, random", "neither", note="As much as the strongest cause added along a random direction, in the "
            "contexts it is measured in.",
        ),
        "parents": Metric(
            "parents", "neither", digits=1,
            note="Features of the hook point before whose ablation takes at least least_share (0.05 unless set) of the "
            "activation, significantly (Holm over all active ones).",
        ),
        "together": Metric(
            "all parents", "neither", note="Share that goes when all of a feature's parents are ablated at once; undefined "
            "without parents.",
        ),
        "half": Metric(
            "half of the loss", "lower", digits=1,
            note="How many of the ablated features, largest first, make half of the sum of the positive shares of all active "
            "ones (by the gradient where not ablated): few where the tree is sparse; undefined where they do not make half.",
        ),
        "missed": Metric(
            "missed", "lower",
            note="Of the features that the gradient left out and that were ablated all the same (drawn at random), the share "
            "that would have been parents.",
        ),
        "estimate_r": Metric(
            "gradient r", "neither", chance=0.0,
            note="Correlation of the gradient's estimate with the exact share over the ablated features.",
        ),
    }  # fmt: skip

    def reaches(self, config: CausalTreeConfig, hook_point: str, hook_points: Sequence[str]) -> list[str]:
        """The ``depth`` nearest hook points before this one, the nearest first."""
        try:
            before = [name for name in hook_points if depth(name) < depth(hook_point)]
        except ModelError as error:
            raise SuiteError(error.what, where=error.where, fix=error.fix) from error
        return sorted(before, key=depth, reverse=True)[: config.depth]

    def run(self, bench: Bench, dictionary: Dictionary, config: CausalTreeConfig) -> Result:
        """Grow a tree of each chosen feature of ``dictionary``.

        Raises:
            UnitFailed: no feature is active in enough windows, or a named one does not exist.
            DictionaryError: a dictionary's width is not that of its hook point.
        """
        levels = [bench.hook_point, *self.reaches(config, bench.hook_point, bench.hook_points)]
        wanted: list[int] = choose_features(
            dictionary,
            bench.score(),
            ids=config.feature_ids,
            features=config.features,
            least_windows=config.least_windows,
            seed=bench.seed,
            prefer=config.prefer,
        )
        targets, nodes = wanted, dict[Key, _Node]()
        for level, hook_point in enumerate(levels):
            before = levels[level + 1] if level + 1 < len(levels) else None
            study(bench, dictionary if level == 0 else None, hook_point, before, wanted, config, nodes)
            grown = [found for feature in wanted if (found := nodes[hook_point, feature].parents)]
            wanted = sorted({parent for found in grown for parent in chosen(found, config.branching)})
            others = {parent for found in grown for parent in chosen(found, NAMED)} - set(wanted)
            if before is not None:  # parents that are not followed are named all the same
                study(bench, None, before, None, sorted(others), config, nodes)
        scores = [score for feature in targets for score in _scores(feature, nodes[bench.hook_point, feature].parents)]
        edges = [edge for feature in targets for edge in edges_of(feature, levels, nodes, config)]
        return Result(scores, {"causal_edges": edges, "causal_nodes": list(_node_rows(nodes))})


def chosen(found: Parents, branching: int) -> list[int]:
    """The parents that become nodes: significant ones that the gradient proposed, the largest shares first."""
    return found.features[found.significant & ~found.checked][:branching].tolist()


def study(
    bench: Bench,
    children: Dictionary | None,
    hook_point: str,
    before: str | None,
    features: Sequence[int],
    config: CausalTreeConfig,
    nodes: dict[Key, _Node],
) -> None:
    """Add ``features`` of ``hook_point`` to ``nodes``, with their parents at ``before``.

    Args:
        children: dictionary at ``hook_point``; the one of the bench's name there when left out.
        before: the earlier hook point; None where there is none.
    """
    if not features:
        return
    here = bench.at(hook_point)
    own = children if children is not None else here.dictionary(bench.name)
    score = here.score()
    codes = feature_codes(own, score, features)  # (N, T, S)
    rule = Rule(config.tested, config.checked, config.alpha, config.least_share)
    title = f"causes of features at {hook_point}" if before else f"tokens of features at {hook_point}"
    with bench.progress.stage(title, len(features), "features") as stage:
        for place, feature in enumerate(features):
            random = np.random.default_rng([bench.seed, 7, *depth(hook_point), feature])
            contexts, maximum = contexts_of(codes[..., place], config.contexts, config.level, random.permutation(len(codes)))
            tokens = json.dumps(_tokens(bench, codes[..., place], score.tokens, config.tokens), ensure_ascii=False)
            found = None
            if before is not None and contexts:
                earlier = bench.at(before)
                ablations = Ablations(
                    bench.model, before, hook_point, earlier.dictionary(bench.name), own, feature, earlier.score(), contexts
                )
                found = parents_of(ablations, rule, random) if len(ablations.rows) else None
            nodes[hook_point, feature] = _Node(maximum, tokens, found)
            stage.advance()


def _tokens(bench: Bench, codes: torch.Tensor, tokens: torch.Tensor, most: int) -> list[list[Any]]:
    """Most frequent tokens among the strongest firings, with their shares."""
    values, places = codes.flatten().topk(min(STRONGEST, codes.numel()))
    fired = tokens.flatten()[places[values > 0]].tolist()
    counted = Counter(bench.model.token_strings(fired)).most_common(most)
    return [[token, round(count / len(fired), 3)] for token, count in counted]


def _scores(feature: int, found: Parents | None) -> Iterator[Score]:
    def score(metric: str, value: float | None, weight: float = 1.0, n: int = 1) -> Score:
        ok = value is not None and value == value
        return Score(
            metric, value if ok else None, feature, "feature", weight if ok else 0.0, status="ok" if ok else "undefined", n=n
        )

    if found is None or not len(found.features):
        for metric in CausalTree.metrics:
            yield score(metric, None)
        return
    C, mean = len(found.activations), found.shares.mean(1)
    proposed = ~found.checked
    measured = {"parent_share": found.shares, "parent_carried": found.carried}
    others = len(range(C)[OTHERS])
    positive = np.clip(mean[proposed], 0, None)
    for metric, values in measured.items():
        known = found.strongest is not None and others
        yield score(metric, float(values[found.strongest, OTHERS].mean()) if known else None, n=others)
    yield score("parent_share_random", found.random, n=others)
    yield score("parents", float((found.significant & proposed).sum()), n=len(found.features))
    yield score("together", found.together, n=C)
    sums, total = np.cumsum(positive), positive.sum() + found.rest
    reached = int(np.searchsorted(sums, total / 2)) + 1 if 0 < total <= 2 * sums[-1] else None
    yield score("half", None if reached is None else float(reached), n=len(positive))
    checked = int(found.checked.sum())
    missed = float((found.significant & found.checked).sum())
    yield score("missed", missed / checked if checked else None, weight=float(checked), n=checked)
    yield score("estimate_r", correlation(found.estimates, mean), n=len(mean))


def edges_of(target: int, levels: Sequence[str], nodes: dict[Key, _Node], config: CausalTreeConfig) -> Iterator[dict[str, Any]]:
    """Rows of ``causal_edges`` of one tree."""
    layer = [target]
    for number, (hook_point, before) in enumerate(zip(levels, levels[1:], strict=False), start=1):
        following: list[int] = []
        for child in layer:
            found = nodes[hook_point, child].parents
            if found is not None:
                yield from _edges(found, target, number, (hook_point, child), before)
                following += chosen(found, config.branching)
        layer = sorted(set(following))


def _edges(found: Parents, target: int, number: int, child: Key, before: str) -> Iterator[dict[str, Any]]:
    C = len(found.activations)
    half = stats.t.ppf(0.975, C - 1) * found.shares.std(1, ddof=1) / np.sqrt(C) if C > 1 else np.full(len(found.features), np.nan)
    for place, parent in enumerate(found.features.tolist()):
        share, spread, carried = float(found.shares[place].mean()), float(half[place]), float(found.carried[place].mean())
        yield {
            "target": target,
            "depth": number,
            "child_hook": child[0],
            "child": child[1],
            "parent_hook": before,
            "parent": parent,
            "place": place + 1,
            "share": share,
            "low": share - spread if C > 1 else None,
            "high": share + spread if C > 1 else None,
            "carried": carried if carried == carried else None,
            "checked": bool(found.checked[place]),
            "estimate": float(found.estimates[place]),
            "p": float(found.p[place]),
            "p_holm": float(found.p_holm[place]),
            "significant": bool(found.significant[place]),
            "active": int(found.active[place]),
            "contexts": C,
        }


def _node_rows(nodes: dict[Key, _Node]) -> Iterator[dict[str, Any]]:
    for (hook_point, feature), node in nodes.items():
        row: dict[str, Any] = {"hook_point": hook_point, "feature": feature, "tokens": node.tokens, "maximum": node.maximum}
        if (found := node.parents) is not None:
            r = correlation(found.estimates, found.shares.mean(1)) if len(found.features) else float("nan")
            row |= {
                "activation": float(found.activations.mean()),
                "contexts": len(found.activations),
                "candidates": found.candidates,
                "tested": int((~found.checked).sum()),
                "checked": int(found.checked.sum()),
                "missed": int((found.significant & found.checked).sum()),
                "parents": int((found.significant & ~found.checked).sum()),
                "together": found.together,
                "random": found.random,
                "estimate_r": r if r == r else None,
            }
        yield row
