"""Causal trees: which features of earlier hook points make a feature fire, and which make those fire.

1. Targets are named or drawn (``sampling``) at a hook point; a tree goes down the suite's earlier hook points, one a level, with
   the dictionary of the same name at each.
2. A node's parents are found in contexts of its own, where its activation lies between ``level`` times its maximum and the
   maximum (where these are too few, in its strongest windows; how many lie below is recorded): features of the hook point before
   that are active in at least ``least_active`` of them are candidates, the gradient proposes, exact ablation decides
   (``causal_effects``).
3. The ``branching`` parents with the largest shares become nodes, down to ``depth`` levels. A feature that several trees come to
   is studied once.
4. Every ablated feature is an edge with its share, interval and p, whether or not it is significant, so that other rules can be
   applied to the same rows.
5. Scores (``causal_scores``) are about the targets: the strongest cause and what the three largest carry are there for all of
   them, so that dictionaries can be compared; what is said of parents is said of targets that have any.
6. Where ``explain`` is set the suite's judge explains every node from fragments around its strongest firings, as ``autointerp``
   has it do; a call that failed is a missing explanation, counted, and asked again by the next start.

Only causes are looked for: features whose ablation raises the child are no parents. At the earliest hook point there is nothing
before, and no tree.

Cunningham et al. 2023 (arXiv 2309.08600), section 5 and figure 5.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch

from evalkit.errors import ModelError, SuiteError
from evalkit.evaluations.base import CUT, EVALUATIONS, Bench, Cost, Evaluation, Metric, Result, Score, cut_share
from evalkit.evaluations.causal_tree.parents import Ablations, Rule, parents_of
from evalkit.evaluations.causal_tree.scores import METRICS, Key, Node, chosen, edges_of, node_rows, scores_of
from evalkit.evaluations.sampling import LEAST_WINDOWS, Preference, choose_features, feature_codes
from evalkit.interventions.ablations import contexts_of
from evalkit.interventions.hooks import depth
from evalkit.judges.base import Example, ExplainTask, Questions
from evalkit.util.settings import Count, NotNegative, Range, Settings, Share

if TYPE_CHECKING:
    from evalkit.dictionaries.base import Dictionary

STRONGEST = 50
"""Firings among which a node's tokens are counted."""
NAMED = 5
"""Parents of a node whose tokens are kept, followed or not."""


@dataclass(frozen=True)
class CausalTreeConfig(Settings):
    """Settings of the evaluation 'causal_tree': which earlier features make a feature fire."""

    features: Count = 8
    """Targets drawn from those active in enough windows; a smaller sample is part of a larger one."""
    feature_ids: tuple[int, ...] = ()
    """Grow trees of these features instead of a sample."""
    least_windows: Count = LEAST_WINDOWS
    """Windows of scoring text a drawn target must be active in."""
    prefer: Preference = "any"
    """'any' draws from all of these; 'one token' from the quarter that fires most on a single token, for stories of features."""
    contexts: Annotated[int, Range(ge=3)] = 16
    """Contexts of each node (the paper: 20)."""
    level: Share = 0.5
    """Contexts are drawn where the node reaches this share of its maximum (the paper: half), or from as many of its strongest
    windows as are wanted where fewer do."""
    branching: Count = 3
    """Parents of a node that become nodes."""
    depth: Count = 2
    """Levels below the target, at most as many as there are earlier hook points."""
    tested: Count = 48
    """Candidates with the largest gradient estimates that are ablated one by one."""
    checked: NotNegative = 12
    """Other candidates that are ablated too: half of them those next by the size of the estimate, half drawn at random. They tell
    what the gradient misses."""
    least_active: Count = 3
    """Contexts in which a feature of the hook point before must be active to be a candidate. This looks at activity and never at
    an effect, so it is blind to what is tested; the correction is for fewer tests then."""
    alpha: Share = 0.05
    """A parent's p, one-sided over contexts and corrected by Holm for all candidates, lies below this."""
    least_share: Share = 0.05
    """A parent takes at least this share of the child's activation with it."""
    tokens: Count = 3
    """Tokens named at each node."""
    explain: bool = False
    """Have the suite's judge explain every node: one call each."""
    fragments: Count = 5
    """Fragments it is shown of a node."""
    fragment: Count = 24
    """Tokens a fragment."""

    def check_together(self) -> None:
        if self.least_active > self.contexts:
            raise ValueError(f"least_active = {self.least_active} of {self.contexts} contexts: nothing could be a candidate")


@EVALUATIONS.register("causal_tree")
class CausalTree(Evaluation):
    """Upstream features that a feature depends on, with the drop in its activation when each is ablated, level by level."""

    name: ClassVar[str] = "causal_tree"
    version: ClassVar[int] = 11
    config: ClassVar[type] = CausalTreeConfig
    needs_reach: ClassVar[bool] = True
    metrics: ClassVar[dict[str, Metric]] = {
        **METRICS,
        "explained": Metric(
            "explained", "neither", interval=False, digits=2,
            note="Nodes of the trees that the judge was asked to explain; failed: calls that gave no explanation.",
        ),
        "cut": CUT,
    }  # fmt: skip

    def asks(self, config: CausalTreeConfig) -> bool:
        """Where nodes are explained."""
        return config.explain

    def cost(self, config: CausalTreeConfig) -> Cost:
        """One explanation of each node, if every tree is as wide as it may be."""
        nodes = followed = len(config.feature_ids) or config.features
        for _ in range(config.depth):
            nodes += followed * max(config.branching, NAMED)
            followed *= config.branching
        calls = nodes if config.explain else 0
        return Cost((Questions("explain", calls, config.fragments, config.fragment),))

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
            BudgetReached, JudgeSetupError: of the judge, where it is asked.
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
            fit=lambda: bench.fit(),
        )
        targets, nodes = wanted, dict[Key, Node]()
        for level, hook_point in enumerate(levels):
            before = levels[level + 1] if level + 1 < len(levels) else None
            study(bench, dictionary if level == 0 else None, hook_point, before, wanted, config, nodes)
            grown = [found for feature in wanted if (found := nodes[hook_point, feature].parents)]
            wanted = sorted({parent for found in grown for parent in chosen(found, config.branching)})
            others = {parent for found in grown for parent in chosen(found, NAMED)} - set(wanted)
            if before is not None:  # parents that are not followed are named all the same
                study(bench, None, before, None, sorted(others), config, nodes)
        scores = [score for feature in targets for score in scores_of(feature, nodes[bench.hook_point, feature])]
        if config.explain:
            scores += explained(bench, nodes)
        edges = [edge for feature in targets for edge in edges_of(feature, levels, nodes, config.branching)]
        return Result(scores, {"causal_edges": edges, "causal_nodes": list(node_rows(nodes))})


def study(
    bench: Bench,
    children: Dictionary | None,
    hook_point: str,
    before: str | None,
    features: Sequence[int],
    config: CausalTreeConfig,
    nodes: dict[Key, Node],
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
    rule = Rule(config.tested, config.checked, config.alpha, config.least_share, config.least_active)
    title = f"causes of features at {hook_point}" if before else f"tokens of features at {hook_point}"
    with bench.progress.stage(title, len(features), "features") as stage:
        for place, feature in enumerate(features):
            random = np.random.default_rng([bench.seed, 7, *depth(hook_point), feature])
            contexts, maximum = contexts_of(codes[..., place], config.contexts, config.level, random.permutation(len(codes)))
            tokens = json.dumps(_tokens(bench, codes[..., place], score.tokens, config.tokens), ensure_ascii=False)
            found, weak = None, 0
            if before is not None and contexts:
                earlier = bench.at(before)
                ablations = Ablations(
                    bench.model, before, hook_point, earlier.dictionary(bench.name), own, feature, earlier.score(), contexts
                )
                if len(ablations.rows):
                    found = parents_of(ablations, rule, random)
                    read = torch.stack([codes[contexts[row].window, contexts[row].position, place] for row in ablations.rows])
                    weak = int((read < config.level * maximum).sum())
            task = _shown(bench, codes[..., place], score.tokens, config) if config.explain and maximum > 0 else None
            nodes[hook_point, feature] = Node(maximum, tokens, found, weak, task)
            stage.advance()


def explained(bench: Bench, nodes: dict[Key, Node]) -> list[Score]:
    """Give every node that fires the judge's explanation; one score each, failed where the call was."""
    assert bench.judge is not None
    asked = [(key, node, node.task) for key, node in nodes.items() if node.task is not None]
    with bench.progress.stage(f"explaining with {bench.judge.label}", total=len(asked), unit="features") as stage:
        answers = bench.judge.explain([task for _, _, task in asked], stage.advance)
    scores = []
    for place, ((key, node, _), said) in enumerate(zip(asked, answers, strict=True)):
        nodes[key] = node._replace(explanation=said.text, judge=bench.judge.label, error=said.error)
        ok = said.text is not None
        scores.append(Score("explained", 1.0 if ok else None, place, "node", status="ok" if ok else "failed"))
    return [*scores, cut_share(answers)]


def _shown(bench: Bench, codes: torch.Tensor, tokens: torch.Tensor, config: CausalTreeConfig) -> ExplainTask:
    """The strongest fragments of a feature, one a window, its firing about three quarters in: what comes before tells most."""
    peaks, where = codes.max(1)
    opening = bench.score().opening  # the BOS is shown to nobody
    length = min(config.fragment, codes.shape[1] - opening)
    examples = []
    for window in peaks.argsort(descending=True, stable=True)[: min(config.fragments, int((peaks > 0).sum()))].tolist():
        start = min(max(opening, int(where[window]) - 3 * length // 4), codes.shape[1] - length)
        span = slice(start, start + length)
        examples.append(Example(bench.model.token_strings(tokens[window, span].tolist()), codes[window, span].tolist()))
    return ExplainTask(examples)


def _tokens(bench: Bench, codes: torch.Tensor, tokens: torch.Tensor, most: int) -> list[list[Any]]:
    """Most frequent tokens among the strongest firings, with their shares."""
    values, places = codes.flatten().topk(min(STRONGEST, codes.numel()))
    fired = tokens.flatten()[places[values > 0]].tolist()
    counted = Counter(bench.model.token_strings(fired)).most_common(most)
    return [[token, round(count / len(fired), 3)] for token, count in counted]
