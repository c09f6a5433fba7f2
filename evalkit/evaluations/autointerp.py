"""Explain-and-simulate scoring (Bills et al. 2023; Cunningham et al. 2023, arXiv 2309.08600, section 3 and appendix A).

1. Of the features that are active in enough windows, draw ``features`` uniformly at random (the released code takes the
   first 150; that is a sample of nothing in particular).
2. For each, rank windows by the feature's maximum. Of the top 4n, ranks 0, 4, 8, ... are explained and ranks 2, 6, 10, ...
   are scored; of the random active windows that are not among them, n more are scored.
3. The judge explains the feature from the n explain fragments, then predicts the activation of every token of the scored
   fragments from the explanation alone.
4. The score is the Pearson correlation of predicted and real activations over all kept tokens of the scored fragments at
   once: top-and-random (the paper's), and for each half alone. A constant on either side has no correlation: 'undefined'.
   A failed call makes the feature's score 'failed'; neither enters the mean, both are counted. A token for which the judge
   showed no digit is missing: it is left out, and the share of such tokens is a metric of its own. An explanation that the limit
   on its length cut off is scored as it stands, and counted (``cut``).
5. Null: the same fragments simulated from the explanation of another feature of the same dictionary. What is left above
   it is what the explanations say about their own features.
6. Reference: each further judge (the lexical one uses no LLM) explains and simulates the same fragments.

Explained and scored fragments never share a window (``activations.fragments``). Signed codes are scored signed; fragments are
ranked by their positive part, as published. Where this departs from the published form: features are drawn, not the first
150; random fragments exclude the top pool; activations in prompts are one digit, 0-9; and small judges are shown
the peak of each fragment with a little context instead of the published table of all its tokens (``judges.explain_table``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from evalkit.activations.capture import Activations
from evalkit.activations.fragments import NONE, Fragment, FragmentLists, fragment_lists
from evalkit.dictionaries.base import Dictionary
from evalkit.errors import SuiteError, UnitFailed
from evalkit.evaluations.base import CUT, EVALUATIONS, Bench, Cost, Evaluation, Metric, Result, Score, cut_share
from evalkit.judges.base import Example, ExplainTask, Explanation, Judge, SimulateTask, Simulation
from evalkit.statistics import pearson

OWN, SHUFFLED = "own", "shuffled"


@dataclass(frozen=True)
class AutointerpConfig:
    """Explain-and-simulate scoring by the judge."""

    features: int = 20
    """Features drawn from those active in enough windows. The paper takes 150 per dictionary."""
    fragments: int = 5
    """Fragments explained, scored from the top, and scored at random: this many of each (the paper: 5)."""
    fragment: int = 24
    """Tokens a fragment (the paper: 64)."""
    null_features: int = 5
    """For this many of the features the fragments are also simulated from another feature's explanation."""

    def __post_init__(self) -> None:
        if min(self.features, self.fragments, self.fragment) < 1:
            raise ValueError("features, fragments and fragment are at least 1")
        if not 0 <= self.null_features <= self.features:
            raise ValueError("null_features is between 0 and features")


class Chosen(NamedTuple):
    """A sampled feature and its disjoint fragments."""

    feature: int
    explain: list[Fragment]
    top: list[Fragment]
    random: list[Fragment]


class Scored(NamedTuple):
    """One feature's simulated fragments under one explanation."""

    part: list[str]
    actual: list[np.ndarray]
    predicted: list[Simulation]


def choose(lists: FragmentLists, config: AutointerpConfig, seed: int) -> tuple[list[Chosen], int]:
    """The sampled features with their fragments, and how many features were eligible."""
    n = config.fragments
    eligible = []
    for feature in range(len(lists.firings)):
        if int((lists.top[feature] != NONE).sum()) < 4 * n:
            continue
        pool = set(lists.top[feature][: 4 * n : 2].tolist())
        others = [r for r, w in enumerate(lists.random[feature].tolist()) if w != NONE and w not in pool]
        if len(others) >= n:
            eligible.append((feature, others[:n]))
    rng = np.random.default_rng(seed)
    picked = sorted(rng.permutation(len(eligible))[: config.features].tolist())

    def fragments(windows: torch.Tensor, starts: torch.Tensor, ranks: Iterable[int]) -> list[Fragment]:
        return [Fragment(int(windows[r]), int(starts[r]), lists.length) for r in ranks]

    chosen = []
    for feature, others in (eligible[index] for index in picked):
        top = (lists.top[feature], lists.top_start[feature])
        drawn = (lists.random[feature], lists.random_start[feature])
        chosen.append(
            Chosen(
                feature,
                fragments(*top, range(0, 4 * n, 4)),
                fragments(*top, range(2, 4 * n, 4)),
                fragments(*drawn, others),
            )
        )
    return chosen, len(eligible)


@EVALUATIONS.register("autointerp")
class Autointerp(Evaluation):
    """Are the features interpretable? Correlation of real activations with those simulated from an explanation."""

    name: ClassVar[str] = "autointerp"
    version: ClassVar[int] = 2
    config: ClassVar[type] = AutointerpConfig
    needs_judge: ClassVar[bool] = True
    metrics: ClassVar[dict[str, Metric]] = {
        "top_and_random": Metric(
            "top-and-random r", "higher", chance=0.0, null="shuffled", main=True,
            note="Pearson correlation of real and simulated activations, strongest and random active fragments together",
        ),
        "top": Metric("top r", "higher", chance=0.0, note="the same over the strongest fragments alone"),
        "random": Metric("random r", "higher", chance=0.0, note="the same over the random active fragments alone"),
        "shuffled": Metric(
            "null r", "neither", chance=0.0,
            note="top-and-random r of a part of the features simulated from another feature's explanation",
        ),
        "lexical": Metric(
            "lexical r", "higher", chance=0.0,
            note="top-and-random r of a word list in place of explanation and judge: uses no LLM",
        ),
        "missing": Metric(
            "missing", "neither", interval=False,
            note="share of the scored tokens that the judge gave no value for (no digit among the alternatives its endpoint "
            "lists): left out of every r. Shown where there are any",
        ),
        "eligible": Metric(
            "eligible", "neither", interval=False, digits=2,
            note="share of the dictionary's features active in enough windows to be explained and scored",
        ),
        "cut": CUT,
    }  # fmt: skip

    def check(self, config: AutointerpConfig, context: int) -> None:
        if config.fragment > context:
            raise SuiteError(
                f"a fragment of {config.fragment} tokens does not fit into a window of {context}",
                where="[corpus] context, [[evaluation]] fragment",
                fix="make the context longer or the fragment shorter",
            )

    def cost(self, config: AutointerpConfig) -> Cost:
        # one call a fragment, as a judge that reads all slots in one pass makes; others make more, which their budget sees
        simulations = 2 * config.fragments * (config.features + config.null_features)
        per_slot, prompt = 4, 350
        explain = config.features * (prompt + config.fragments * config.fragment)
        return Cost(config.features + simulations, explain + simulations * (prompt + per_slot * config.fragment))

    def run(self, bench: Bench, dictionary: Dictionary, config: AutointerpConfig) -> Result:
        """Score ``config.features`` features of ``dictionary``.

        Raises:
            UnitFailed: no feature is active in enough windows.
        """
        assert bench.judge is not None
        n = config.fragments
        activations = bench.score()
        lists = fragment_lists(
            dictionary, activations, length=config.fragment, top=4 * n, random=4 * n, seed=bench.seed, progress=bench.progress
        )
        chosen, eligible = choose(lists, config, bench.seed)
        if not chosen:
            raise UnitFailed(
                f"no feature is active in {4 * n} windows of the scoring text",
                where=f"{dictionary.kind} at {bench.hook_point}",
                fix="give more scoring tokens ([corpus] score_tokens) or fewer fragments",
            )
        reader = _Reader(bench, dictionary, activations)
        share = eligible / dictionary.n_features
        scores = [Score("eligible", share, n=dictionary.n_features)]
        explanations: list[dict[str, Any]] = []
        predictions: list[dict[str, Any]] = []
        judges = [("", bench.judge), *bench.references.items()]
        for reference, judge in judges:
            nulls = 0 if reference else min(config.null_features, len(chosen) if len(chosen) > 1 else 0)
            words, own, shuffled = _ask(bench, judge, reader, chosen, nulls)
            if not reference:
                scores.append(cut_share(words))
                scores += missing_tokens(chosen, own)
            for c, said in zip(chosen, words, strict=True):
                explanations.append(reader.explanation_row(c, said, judge, lists))
            for c, scored in zip(chosen, own, strict=True):
                if reference:
                    scores.append(correlation(reference, c.feature, scored, bench.seed))
                else:
                    scores.append(correlation("top_and_random", c.feature, scored, bench.seed))
                    scores.append(correlation("top", c.feature, scored, bench.seed, "top"))
                    scores.append(correlation("random", c.feature, scored, bench.seed, "random"))
                predictions += reader.prediction_rows(c, scored, judge, OWN)
            for c, scored in zip(chosen[:nulls], shuffled, strict=True):
                scores.append(correlation("shuffled", c.feature, scored, bench.seed))
                predictions += reader.prediction_rows(c, scored, judge, SHUFFLED)
        return Result(scores, {"explanations": explanations, "predictions": predictions})


def correlation(metric: str, feature: int, scored: Scored, seed: int, part: str | None = None) -> Score:
    """Pearson correlation over all tokens of the fragments of ``part`` (None: all), flattened as published.

    A failed simulation among them makes it 'failed'; a constant side, or a failed explanation, likewise has no number. Positions
    that are not kept and tokens without a value are left out; ``n`` counts the others.
    """
    picked = [(a, p) for a, p, where in zip(scored.actual, scored.predicted, scored.part, strict=True) if part in (None, where)]
    if any(p.expected is None for _, p in picked):
        return Score(metric, None, feature, "feature", status="failed", n=0, seed=seed)
    actual = np.concatenate([a for a, _ in picked])
    predicted = np.concatenate([p.values for _, p in picked])
    seen = ~np.isnan(actual) & ~np.isnan(predicted)
    value = pearson(actual[seen], predicted[seen])
    return Score(metric, value, feature, "feature", status="undefined" if value is None else "ok", n=int(seen.sum()), seed=seed)


def missing_tokens(chosen: list[Chosen], own: list[Scored]) -> list[Score]:
    """Share of each feature's kept tokens without a value, over fragments whose calls did not fail; none where all have one."""
    shares = []
    for c, scored in zip(chosen, own, strict=True):
        pairs = [(a, p.values) for a, p in zip(scored.actual, scored.predicted, strict=True) if p.expected is not None]
        lost = [np.isnan(predicted[~np.isnan(actual)]) for actual, predicted in pairs]
        n = sum(map(len, lost))
        value = sum(int(part.sum()) for part in lost) / n if n else None
        shares.append(Score("missing", value, c.feature, "feature", status="failed" if value is None else "ok", n=n))
    return shares if any(score.value for score in shares) else []


def _ask(
    bench: Bench, judge: Judge, reader: _Reader, chosen: list[Chosen], nulls: int
) -> tuple[list[Explanation], list[Scored], list[Scored]]:
    """Explanations, own simulations, and simulations of the first ``nulls`` features from another's explanation."""
    tasks = [ExplainTask([reader.example(fragment, c.feature) for fragment in c.explain]) for c in chosen]
    with bench.progress.stage(f"explaining with {judge.label}", total=len(tasks), unit="features") as stage:
        words = judge.explain(tasks, stage.advance)
    # grouped by explanation, so that a judge that keeps the prefix of a prompt reads each explanation once
    wanted: list[tuple[int, int]] = []  # (explained feature, scored feature)
    for index in range(len(chosen)):
        wanted.append((index, index))
        scored_by_me = (index - 1) % len(chosen)
        if scored_by_me < nulls:
            wanted.append((index, scored_by_me))
    simulate: list[SimulateTask] = []
    owners: list[tuple[int, int]] = []
    for explained, target in wanted:
        said = words[explained].text
        if said is not None:
            for fragment in (*chosen[target].top, *chosen[target].random):
                simulate.append(SimulateTask(said, reader.strings(fragment)))
                owners.append((explained, target))
    with bench.progress.stage(f"simulating with {judge.label}", total=len(simulate), unit="fragments") as stage:
        answers = judge.simulate(simulate, stage.advance)
    by_pair = {
        pair: [answer for _, answer in group]
        for pair, group in groupby(zip(owners, answers, strict=True), key=lambda both: both[0])
    }

    def scored(explained: int, target: int) -> Scored:
        c = chosen[target]
        fragments = (*c.top, *c.random)
        missing = Simulation(None, status="failed", error="the explanation failed")
        parts = ["top"] * len(c.top) + ["random"] * len(c.random)
        actual = [reader.actual(fragment, c.feature) for fragment in fragments]
        return Scored(parts, actual, by_pair.get((explained, target), [missing] * len(fragments)))

    own = [scored(index, index) for index in range(len(chosen))]
    shuffled = [scored((index + 1) % len(chosen), index) for index in range(nulls)]
    return words, own, shuffled


class _Reader:
    """Tokens and activations of fragments; each (fragment, feature) is encoded once."""

    def __init__(self, bench: Bench, dictionary: Dictionary, activations: Activations) -> None:
        self.bench, self.dictionary, self.activations = bench, dictionary, activations
        self._actual: dict[tuple[Fragment, int], np.ndarray] = {}

    def strings(self, fragment: Fragment) -> list[str]:
        ids = self.activations.tokens[fragment.window, fragment.start : fragment.start + fragment.length]
        return self.bench.model.token_strings(ids.tolist())

    def actual(self, fragment: Fragment, feature: int) -> np.ndarray:
        """(L,) float64 activations; NaN at positions that are not kept."""
        if (fragment, feature) not in self._actual:
            span = slice(fragment.start, fragment.start + fragment.length)
            x = self.activations.x[fragment.window, span]  # (L, D)
            values = self.dictionary.encode_feature(x, feature).double().numpy().copy()
            values[~self.activations.keep[fragment.window, span].numpy()] = np.nan
            self._actual[fragment, feature] = values
        return self._actual[fragment, feature]

    def example(self, fragment: Fragment, feature: int) -> Example:
        return Example(self.strings(fragment), np.nan_to_num(self.actual(fragment, feature)).tolist())

    def explanation_row(self, c: Chosen, said: Explanation, judge: Judge, lists: FragmentLists) -> dict[str, Any]:
        return {
            "feature": c.feature,
            "judge": judge.label,
            "explanation": said.text,
            "status": said.status,
            "error": said.error,
            "density": float(lists.firings[c.feature]) / lists.n_tokens,
            "max_activation": float(lists.maximum[c.feature]),
            "top_tokens": [self._peak(fragment, c.feature) for fragment in c.explain],
        }

    def _peak(self, fragment: Fragment, feature: int) -> str:
        return self.strings(fragment)[int(np.nanargmax(self.actual(fragment, feature)))]

    def prediction_rows(self, c: Chosen, scored: Scored, judge: Judge, explained_by: str) -> Iterator[dict[str, Any]]:
        fragments = (*c.top, *c.random)
        for fragment, part, actual, answer in zip(fragments, scored.part, scored.actual, scored.predicted, strict=True):
            yield {
                "feature": c.feature,
                "judge": judge.label,
                "explained_by": explained_by,
                "part": part,
                "fragment": fragment.id,
                "document": int(self.activations.document[fragment.window]),
                "tokens": self.strings(fragment),
                "actual": [None if np.isnan(value) else float(value) for value in actual],
                "predicted": answer.expected,
                "digit_mass": answer.mass,
                "digit_unseen": answer.unseen,
                "status": answer.status,
            }
