"""Explain-and-simulate scoring (Bills et al. 2023; Cunningham et al. 2023, arXiv 2309.08600, section 3 and appendix A).

1. Features are drawn uniformly from those that are active in enough windows (the released code takes the first 150). Their
   fragments are chosen as in ``autointerp_sample``; explained and scored ones share no document.
2. The judge explains the feature from the n explain fragments, then predicts the activation of every token of the scored
   fragments from the explanation alone.
3. The score is the Pearson correlation of predicted and real activations over all kept tokens of the scored fragments at
   once: top-and-random (the paper's), and for each half alone. Fragments with much variance decide such a pooled correlation,
   so the mean of the fragments' own correlations stands beside it.
4. A constant prediction predicts nothing: its correlation counts as 0, and such features are counted (``constant``). A constant
   activation has no correlation: 'undefined'. A failed call makes the score 'failed'. Neither enters a mean, both are counted.
5. Null: fragments of every feature are simulated from the explanation of another one that is about as dense and as strong. What
   is left of the own score above it, on the same fragments, is what explanations say about their own features (``above_null``).
6. Specific r: correlation with the own prediction where the null's prediction is partialled out. What a judge predicts for a
   token under any explanation then counts for nothing.
7. Reference: each further judge explains and simulates the same fragments. One that asks no model (the word list) does so for
   every eligible feature, with a null of its own. ``adjusted`` uses its scores as a control variate for the judge's mean.

A token for which the judge showed no digit is left out and counted (``missing``). An explanation that the limit on its length cut
off is scored as it stands and counted (``cut``). Signed codes are scored signed; fragments are ranked by their positive part, as
published. Other departures: random fragments exclude the top pool; activations in prompts are one digit, 0-9; small judges are
shown the peak of each fragment with a little context instead of the published table of its tokens (``judges.explain_table``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from evalkit.activations.capture import Activations
from evalkit.activations.fragments import Fragment, FragmentLists, fragment_lists
from evalkit.dictionaries.base import Dictionary
from evalkit.errors import SuiteError, UnitFailed
from evalkit.evaluations.autointerp_sample import SPARE, Chosen, donors, eligible_features, sample
from evalkit.evaluations.base import CUT, EVALUATIONS, Bench, Cost, Evaluation, Metric, Result, Score, cut_share
from evalkit.judges.base import Example, ExplainTask, Explanation, Judge, SimulateTask, Simulation
from evalkit.judges.prompts import copies_an_example
from evalkit.statistics import pearson

OWN, SHUFFLED = "own", "shuffled"
LEAST_ADJUSTED = 12
"""Scored features from which on the control variate is used: its slope is estimated from them."""
SILENT = 2
"""Fragments without the feature that the explainer is shown."""


@dataclass(frozen=True)
class AutointerpConfig:
    """Explain-and-simulate scoring by the judge."""

    features: int = 20
    """Features drawn from those active in enough windows. The paper takes 150 per dictionary."""
    fragments: int = 5
    """Fragments explained, scored from the top, and scored at random: this many of each (the paper: 5)."""
    fragment: int = 24
    """Tokens a fragment (the paper: 64)."""
    null_fragments: int = 0
    """Scored fragments of each half that are also simulated from another feature's explanation, for every feature; 0: all."""
    null_features: int = -1
    """0 leaves the null out. Any other number is taken for all features; it is kept for older suite files."""
    same_document: bool = False
    """Let explained and scored fragments share documents, for a text of very few documents."""

    def __post_init__(self) -> None:
        if min(self.features, self.fragments, self.fragment) < 1:
            raise ValueError("features, fragments and fragment are at least 1")
        if not 0 <= self.null_fragments <= self.fragments:
            raise ValueError("null_fragments is between 0 (all) and fragments")

    @property
    def nulls(self) -> int:
        """Fragments of each half that have a null."""
        return 0 if self.null_features == 0 else self.null_fragments or self.fragments


class Scored(NamedTuple):
    """One feature's simulated fragments under one explanation."""

    fragments: list[Fragment]
    part: list[str]
    actual: list[np.ndarray]
    predicted: list[Simulation]

    def where(self, part: str | None) -> Scored:
        """The fragments of one part; all of them for None."""
        return self._at([i for i, each in enumerate(self.part) if part in (None, each)])

    def of(self, fragments: Sequence[Fragment]) -> Scored:
        """These fragments, in this order."""
        return self._at([self.fragments.index(fragment) for fragment in fragments])

    def _at(self, places: Sequence[int]) -> Scored:
        return Scored(
            [self.fragments[i] for i in places],
            [self.part[i] for i in places],
            [self.actual[i] for i in places],
            [self.predicted[i] for i in places],
        )

    @property
    def failed(self) -> bool:
        """Whether a simulation failed."""
        return any(answer.expected is None for answer in self.predicted)


class Asked(NamedTuple):
    """What one judge answered."""

    words: list[Explanation]
    own: list[Scored]
    null: list[Scored]
    """Under the donors' explanations; empty where there is no null."""


@EVALUATIONS.register("autointerp")
class Autointerp(Evaluation):
    """Are the features interpretable? Correlation of real activations with those simulated from an explanation."""

    name: ClassVar[str] = "autointerp"
    version: ClassVar[int] = 3
    config: ClassVar[type] = AutointerpConfig
    needs_judge: ClassVar[bool] = True
    metrics: ClassVar[dict[str, Metric]] = {
        "top_and_random": Metric(
            "top-and-random r", "higher", lowest=-1.0, highest=1.0, null="shuffled",
            note="Pearson correlation of real and simulated activations, strongest and random active fragments together",
        ),
        "above_null": Metric(
            "r above null", "higher", chance=0.0, main=True,
            note="r minus the r of the same fragments simulated from another feature's explanation, paired by feature",
        ),
        "specific": Metric(
            "specific r", "higher", lowest=-1.0, highest=1.0, chance=0.0,
            note="partial correlation with the own prediction, given what the judge predicts for the same tokens under another "
            "feature's explanation",
        ),
        "top": Metric("top r", "higher", lowest=-1.0, highest=1.0, note="the same over the strongest fragments alone"),
        "random": Metric("random r", "higher", lowest=-1.0, highest=1.0, note="the same over the random active fragments alone"),
        "per_fragment": Metric(
            "r by fragment", "higher", lowest=-1.0, highest=1.0,
            note="mean of the correlations of single fragments: none weighs more because its activations vary more",
        ),
        "shuffled": Metric(
            "null r", "neither", lowest=-1.0, highest=1.0,
            note="r of fragments simulated from the explanation of another feature, about as dense and as strong",
        ),
        "lexical": Metric(
            "lexical r", "higher", lowest=-1.0, highest=1.0, null="lexical_shuffled",
            note="top-and-random r of a word list of the explained fragments in place of explanation and judge, for every "
            "eligible feature. It is shown all activations of these fragments, the judge their peaks",
        ),
        "over_lexical": Metric(
            "r minus lexical r", "neither",
            note="the difference on the same features", flag_below=0.0,
            flag="the judge loses what a word list of the explained fragments keeps, so r measures the judge there",
        ),
        "adjusted": Metric(
            "adjusted r", "higher", lowest=-1.0, highest=1.0,
            note="top-and-random r corrected for how the sampled features' lexical r differs from that of all eligible ones "
            f"(regression estimator); from {LEAST_ADJUSTED} features on",
        ),
        "lexical_shuffled": Metric(
            "null lexical r", "neither", lowest=-1.0, highest=1.0, note="lexical r with the word list of another feature"
        ),
        "digit_mass": Metric(
            "digit mass", "neither", interval=False,
            note="median probability that the judge put on the ten digits where one was read", flag_below=0.5,
            flag="most of what the judge expected where a digit was read was no digit, so scores come from the remainder",
        ),
        "constant": Metric(
            "constant", "neither", interval=False, digits=2,
            note="share of the features for which the judge predicted one value for all tokens: their r counts as 0",
        ),
        "lexical_constant": Metric(
            "lexical constant", "neither", interval=False, digits=2,
            note="the same of the word list: none of its words is in the scored fragments",
        ),
        "template": Metric(
            "template", "neither", interval=False, digits=2,
            note="share of the explanations that have the form of an example in the prompt",
        ),
        "missing": Metric(
            "missing", "neither", interval=False,
            note="share of the scored tokens that the judge gave no value for (no digit among the alternatives its endpoint "
            "lists): left out of every r. Shown where there are any",
        ),
        "eligible": Metric(
            "eligible", "neither", interval=False, digits=2,
            note="share of the dictionary's features active in enough windows, of enough documents, to be explained and scored",
        ),
        "cut": CUT,
    }  # fmt: skip

    @classmethod
    def described(cls, references: Sequence[str]) -> dict[str, Metric]:
        """The metrics, and one of each reference judge that has none yet."""
        found = dict(cls.metrics)
        for name in references:
            note = f"top-and-random r of the same fragments, explained and simulated by the reference judge {name}"
            found.setdefault(name, Metric(f"{name} r", "higher", null=f"{name}_shuffled", note=note))
            found.setdefault(f"{name}_shuffled", Metric(f"null {name} r", "neither", note="with another feature's explanation"))
            found.setdefault(f"over_{name}", Metric(f"r minus {name} r", "neither", note="the difference on the same features"))
            constant = "share of the features for which it predicted one value for all tokens: their r counts as 0"
            found.setdefault(f"{name}_constant", Metric(f"{name} constant", "neither", interval=False, digits=2, note=constant))
        return found

    def check(self, config: AutointerpConfig, context: int) -> None:
        if config.fragment > context:
            raise SuiteError(
                f"a fragment of {config.fragment} tokens does not fit into a window of {context}",
                where="[corpus] context, [[evaluation]] fragment",
                fix="make the context longer or the fragment shorter",
            )

    def cost(self, config: AutointerpConfig) -> Cost:
        # one call a fragment, as a judge that reads all slots in one pass makes; others make more, which their budget sees
        simulations = 2 * config.features * (config.fragments + config.nulls)
        per_slot, prompt = 4, 350
        explain = config.features * (prompt + (config.fragments + SILENT) * config.fragment)
        return Cost(config.features + simulations, explain + simulations * (prompt + per_slot * config.fragment))

    def run(self, bench: Bench, dictionary: Dictionary, config: AutointerpConfig) -> Result:
        """Score ``config.features`` features of ``dictionary``.

        Raises:
            UnitFailed: no feature is active in enough windows, or in enough documents.
        """
        assert bench.judge is not None
        n = config.fragments
        activations = bench.score()
        lists = fragment_lists(
            dictionary, activations, length=config.fragment, top=SPARE * n, random=SPARE * n, seed=bench.seed,
            progress=bench.progress,
        )  # fmt: skip
        eligible = eligible_features(lists, n, activations.document.tolist(), config.same_document)
        if not eligible.features:
            where = f"{dictionary.kind} at {bench.hook_point}"
            if eligible.of_one_document:
                documents = len(activations.document.unique())
                raise UnitFailed(
                    f"no feature has explained and scored fragments of different documents; the text has {documents}",
                    where=where,
                    fix="give more documents, fewer fragments, or same_document = true below [[evaluation]]",
                )
            raise UnitFailed(
                f"no feature is active in {4 * n} windows of the scoring text",
                where=where,
                fix="give more scoring tokens ([corpus] score_tokens) or fewer fragments",
            )
        chosen = sample(eligible.features, config.features, bench.seed)
        reader = _Reader(bench, dictionary, activations)
        scores = [Score("eligible", len(eligible.features) / dictionary.n_features, n=dictionary.n_features)]
        explanations: list[dict[str, Any]] = []
        predictions: list[dict[str, Any]] = []
        judge = bench.judge
        asked = _ask(bench, judge, reader, chosen, donors(chosen, lists) if config.nulls else [], config.nulls)
        scores += _judged(chosen, asked, bench.seed)
        explanations += [reader.explanation_row(c, said, judge, lists) for c, said in zip(chosen, asked.words, strict=True)]
        for kind, answers in ((OWN, asked.own), (SHUFFLED, asked.null)):
            for c, scored in zip(chosen, answers, strict=False):
                predictions += reader.prediction_rows(c, scored, judge, kind)
        own = {s.item: s.value for s in scores if s.metric == "top_and_random" and s.value is not None}
        for name, reference in bench.references.items():
            every = eligible.features if reference.asks_no_model else chosen
            reader.remember(every)
            given = _ask(bench, reference, reader, every, donors(every, lists) if config.nulls else [], n)
            beside = [correlation(name, c.feature, scored, bench.seed) for c, scored in zip(every, given.own, strict=True)]
            scores += beside
            scores += [
                correlation(f"{name}_shuffled", c.feature, scored, bench.seed)
                for c, scored in zip(every, given.null, strict=False)
            ]
            scores.append(constant_share(f"{name}_constant", given.own))
            listed = {s.item: s.value for s in beside if s.value is not None}
            scores += _over(f"over_{name}", own, listed, bench.seed)
            if reference.asks_no_model:
                scores += adjusted(own, listed, bench.seed)
            sampled = {c.feature for c in chosen}
            for c, said, scored in zip(every, given.words, given.own, strict=True):
                if c.feature in sampled:  # the predictions for all eligible features would outgrow the results
                    explanations.append(reader.explanation_row(c, said, reference, lists))
                    predictions += reader.prediction_rows(c, scored, reference, OWN)
        return Result(scores, {"explanations": explanations, "predictions": predictions})


def _judged(chosen: Sequence[Chosen], asked: Asked, seed: int) -> list[Score]:
    """Every score of the judge."""
    scores = [
        cut_share(asked.words),
        template_share(asked.words),
        digit_mass(asked.own),
        constant_share("constant", asked.own),
        *missing_tokens(chosen, asked.own),
    ]
    for c, scored in zip(chosen, asked.own, strict=True):
        scores.append(correlation("top_and_random", c.feature, scored, seed))
        scores.append(correlation("top", c.feature, scored, seed, "top"))
        scores.append(correlation("random", c.feature, scored, seed, "random"))
        scores.append(by_fragment(c.feature, scored, seed))
    for c, scored, null in zip(chosen, asked.own, asked.null, strict=False):
        same = scored.of(null.fragments)
        own, other = correlation("above_null", c.feature, same, seed), correlation("shuffled", c.feature, null, seed)
        scores.append(other)
        if own.value is not None and other.value is not None:
            own = own._replace(value=own.value - other.value)
        elif own.value is not None:
            own = own._replace(value=None, status=other.status)
        scores.append(own)
        scores.append(specific(c.feature, same, null, seed))
    return scores


def _tokens(scored: Scored) -> tuple[np.ndarray, np.ndarray]:
    """Real and predicted activations (L,) of all tokens, NaN where one is missing."""
    return np.concatenate(scored.actual), np.concatenate([answer.values for answer in scored.predicted])


def correlation_of(actual: np.ndarray, predicted: np.ndarray) -> float | None:
    """Pearson's r of values (L,); 0 for a constant prediction, which predicts nothing; None for a constant activation."""
    if len(actual) < 2 or actual.min() == actual.max():
        return None
    return pearson(actual, predicted) or 0.0


def correlation(metric: str, feature: int, scored: Scored, seed: int, part: str | None = None) -> Score:
    """``correlation_of`` over all tokens of the fragments of ``part`` (None: all), flattened as published.

    A failed simulation among them makes it 'failed', a constant activation 'undefined'. Positions that are not kept and tokens
    without a value are left out; ``n`` counts the others.
    """
    picked = scored.where(part)
    if picked.failed:
        return Score(metric, None, feature, "feature", status="failed", n=0, seed=seed)
    actual, predicted = _tokens(picked)
    seen = ~np.isnan(actual) & ~np.isnan(predicted)
    value = correlation_of(actual[seen], predicted[seen])
    return Score(metric, value, feature, "feature", status="undefined" if value is None else "ok", n=int(seen.sum()), seed=seed)


def by_fragment(feature: int, scored: Scored, seed: int) -> Score:
    """Mean of the single fragments' correlations, over those whose activation varies."""
    if scored.failed:
        return Score("per_fragment", None, feature, "feature", status="failed", n=0, seed=seed)
    found = []
    for actual, answer in zip(scored.actual, scored.predicted, strict=True):
        seen = ~np.isnan(actual) & ~np.isnan(answer.values)
        value = correlation_of(actual[seen], answer.values[seen])
        found += [] if value is None else [value]
    if not found:
        return Score("per_fragment", None, feature, "feature", status="undefined", n=0, seed=seed)
    return Score("per_fragment", float(np.mean(found)), feature, "feature", n=len(found), seed=seed)


def specific(feature: int, own: Scored, null: Scored, seed: int) -> Score:
    """Partial correlation of real and own predicted activations, given the predictions under another explanation."""
    if own.failed or null.failed:
        return Score("specific", None, feature, "feature", status="failed", n=0, seed=seed)
    (actual, predicted), (_, prior) = _tokens(own), _tokens(null)
    seen = ~np.isnan(actual) & ~np.isnan(predicted) & ~np.isnan(prior)
    value = partial(actual[seen], predicted[seen], prior[seen])
    return Score(
        "specific", value, feature, "feature", status="undefined" if value is None else "ok", n=int(seen.sum()), seed=seed
    )


def partial(actual: np.ndarray, predicted: np.ndarray, prior: np.ndarray) -> float | None:
    """Correlation (L,) of ``actual`` and ``predicted`` with a linear part of ``prior`` taken out of both.

    0 where nothing of the prediction is left; None where nothing of the activation is.
    """
    if len(actual) < 3 or actual.min() == actual.max():
        return None
    with_prior, between = pearson(actual, prior) or 0.0, pearson(predicted, prior) or 0.0
    own = pearson(actual, predicted) or 0.0
    if 1 - with_prior**2 < 1e-12:
        return None
    left = (1 - with_prior**2) * (1 - between**2)
    return float(np.clip((own - with_prior * between) / np.sqrt(left), -1.0, 1.0)) if 1 - between**2 > 1e-12 else 0.0


def missing_tokens(chosen: Sequence[Chosen], own: Sequence[Scored]) -> list[Score]:
    """Share of each feature's kept tokens without a value, over fragments whose calls did not fail; none where all have one."""
    shares = []
    for c, scored in zip(chosen, own, strict=True):
        pairs = [(a, p.values) for a, p in zip(scored.actual, scored.predicted, strict=True) if p.expected is not None]
        lost = [np.isnan(predicted[~np.isnan(actual)]) for actual, predicted in pairs]
        n = sum(map(len, lost))
        value = sum(int(part.sum()) for part in lost) / n if n else None
        shares.append(Score("missing", value, c.feature, "feature", status="failed" if value is None else "ok", n=n))
    return shares if any(score.value for score in shares) else []


def constant_share(metric: str, own: Sequence[Scored]) -> Score:
    """Share of the features without a failed call whose prediction is one value for all tokens."""
    answered = [_tokens(scored)[1] for scored in own if not scored.failed]
    known = [values[~np.isnan(values)] for values in answered]
    constant = [len(values) > 0 and values.min() == values.max() for values in known]
    if not constant:
        return Score(metric, None, status="undefined", n=0)
    return Score(metric, sum(constant) / len(constant), n=len(constant))


def template_share(words: Sequence[Explanation]) -> Score:
    """Share of the explanations that have the form of an example in the explainer's prompt."""
    said = [explanation.text for explanation in words if explanation.text is not None]
    if not said:
        return Score("template", None, status="undefined", n=0)
    return Score("template", sum(map(copies_an_example, said)) / len(said), n=len(said))


def digit_mass(own: Sequence[Scored]) -> Score:
    """Median probability of the digits over all slots; 'undefined' where the judge shows none."""
    mass = [value for scored in own for answer in scored.predicted for value in answer.mass or []]
    if not mass:
        return Score("digit_mass", None, status="undefined", n=0)
    return Score("digit_mass", float(np.median(mass)), n=len(mass))


def _over(metric: str, own: dict[int, float], listed: dict[int, float], seed: int) -> list[Score]:
    """Own score minus the reference's, of features that have both."""
    return [Score(metric, own[f] - listed[f], f, "feature", seed=seed) for f in own if f in listed]


def adjusted(own: dict[int, float], listed: dict[int, float], seed: int) -> list[Score]:
    """Regression estimator of the judge's mean over all eligible features (Cochran 1977, Sampling Techniques, chapter 7).

    Each score is r - b (x - X), x the feature's lexical r and X its mean over all: their mean is the estimate, and their
    spread is what the control variate leaves.
    """
    both = [feature for feature in own if feature in listed]
    if len(both) < LEAST_ADJUSTED:
        return []
    r, x = np.array([own[f] for f in both]), np.array([listed[f] for f in both])
    if x.min() == x.max():
        return []
    slope = float(np.cov(r, x)[0, 1] / x.var(ddof=1))
    values = r - slope * (x - float(np.mean(list(listed.values()))))
    return [Score("adjusted", float(v), f, "feature", seed=seed) for f, v in zip(both, values, strict=True)]


def _ask(bench: Bench, judge: Judge, reader: _Reader, chosen: Sequence[Chosen], given_by: Sequence[int], nulls: int) -> Asked:
    """Explanations, own simulations, and simulations from the donors' explanations.

    Args:
        chosen: the features.
        given_by: donor of each; empty for no null.
        nulls: fragments of each half that are simulated from the donor's explanation.
    """
    tasks = [
        ExplainTask(
            [reader.example(fragment, c.feature) for fragment in c.explain], [] if judge.asks_no_model else reader.silent(c)
        )
        for c in chosen
    ]
    with bench.progress.stage(f"explaining with {judge.label}", total=len(tasks), unit="features") as stage:
        words = judge.explain(tasks, stage.advance)
    # grouped by explanation, so that a judge that keeps the prefix of a prompt reads each explanation once
    receives = {donor: target for target, donor in enumerate(given_by)}
    wanted: dict[tuple[int, int], list[Fragment]] = {}  # (explained feature, scored feature)
    for index, c in enumerate(chosen):
        wanted[index, index] = [*c.top, *c.random]
        if index in receives:
            target = chosen[receives[index]]
            wanted[index, receives[index]] = [*target.top[:nulls], *target.random[:nulls]]
    asked = [(pair, fragment) for pair, fragments in wanted.items() for fragment in fragments if words[pair[0]].text is not None]
    simulate = [SimulateTask(str(words[pair[0]].text), reader.strings(fragment)) for pair, fragment in asked]
    with bench.progress.stage(f"simulating with {judge.label}", total=len(simulate), unit="fragments") as stage:
        answers = judge.simulate(simulate, stage.advance)
    answered = dict(zip(asked, answers, strict=True))
    missing = Simulation(None, status="failed", error="the explanation failed")

    def of(explained: int, target: int) -> Scored:
        c, fragments = chosen[target], wanted[explained, target]
        return Scored(
            fragments,
            ["top" if fragment in c.top else "random" for fragment in fragments],
            [reader.actual(fragment, c.feature) for fragment in fragments],
            [answered.get(((explained, target), fragment), missing) for fragment in fragments],
        )

    own = [of(index, index) for index in range(len(chosen))]
    return Asked(words, own, [of(donor, target) for target, donor in enumerate(given_by)])


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

    def remember(self, chosen: Sequence[Chosen]) -> None:
        """Encode all fragments of many features, each window once."""
        wanted: dict[int, list[tuple[Fragment, int]]] = {}
        for c in chosen:
            for fragment in (*c.explain, *c.top, *c.random):
                if (fragment, c.feature) not in self._actual:
                    wanted.setdefault(fragment.window, []).append((fragment, c.feature))
        for window, pairs in wanted.items():
            codes = self.dictionary.encode(self.activations.x[window]).double().numpy()  # (T, F)
            keep = self.activations.keep[window].numpy()
            for fragment, feature in pairs:
                span = slice(fragment.start, fragment.start + fragment.length)
                self._actual[fragment, feature] = np.where(keep[span], codes[span, feature], np.nan)

    def silent(self, c: Chosen) -> list[Example]:
        """Fragments of windows that are not scored and on which the feature is not active, at most ``SILENT``."""
        seen = {fragment.window for fragment in (*c.explain, *c.top, *c.random)}
        documents = {int(self.activations.document[fragment.window]) for fragment in (*c.top, *c.random)}
        length, found = c.explain[0].length, []
        order = np.random.default_rng([self.bench.seed, c.feature]).permutation(len(self.activations.x))
        for window in order[: 10 * SILENT].tolist():
            if window in seen or int(self.activations.document[window]) in documents:
                continue
            fragment = Fragment(window, self.activations.x.shape[1] - length, length)
            if np.nan_to_num(self.actual(fragment, c.feature)).max() <= 0:
                found.append(self.example(fragment, c.feature))
            if len(found) == SILENT:
                break
        return found

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
        for fragment, part, actual, answer in zip(*scored, strict=True):
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
