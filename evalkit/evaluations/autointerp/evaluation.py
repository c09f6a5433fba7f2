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
   every eligible feature, at most ``MOST_LISTED`` of them, with a null of its own. ``adjusted`` uses its scores as a control
   variate for the judge's mean.

A token for which the judge showed no digit is left out and counted (``missing``). An explanation that the limit on its length cut
off is scored as it stands and counted (``cut``). Signed codes are scored signed; fragments are ranked by their positive part, as
published. Other departures: random fragments exclude the top pool; activations in prompts are one digit, 0-9; small judges are
shown the peak of each fragment with a little context instead of the published table of its tokens (``explain_table``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from evalkit.activations.fragments import Fragment, fragment_lists
from evalkit.dictionaries.base import Dictionary
from evalkit.errors import SuiteError, UnitFailed
from evalkit.evaluations.autointerp.fragments import PEAKS, SPARE, Chosen, donors, eligible_features, sample
from evalkit.evaluations.autointerp.reader import SILENT, Reader
from evalkit.evaluations.autointerp.scores import (
    LEAST_ADJUSTED,
    Scored,
    adjusted,
    by_fragment,
    constant_share,
    correlation,
    digit_mass,
    missing_tokens,
    over,
    specific,
    template_share,
)
from evalkit.evaluations.base import CUT, EVALUATIONS, Bench, Cost, Evaluation, Metric, Result, Score, cut_share
from evalkit.judges.base import ExplainTask, Explanation, Judge, Questions, SimulateTask, Simulation
from evalkit.util.settings import Count, NotNegative, Settings

OWN, SHUFFLED = "own", "shuffled"
MOST_LISTED = 4096
"""Eligible features that a reference which asks no model is asked about: all of them, or so many drawn."""


@dataclass(frozen=True)
class AutointerpConfig(Settings):
    """Explain-and-simulate scoring by the judge."""

    features: Count = 20
    """Features drawn from those active in enough windows. The paper takes 150 per dictionary."""
    fragments: Count = 5
    """Fragments explained, scored from the top, and scored at random: this many of each (the paper: 5)."""
    fragment: Count = 24
    """Tokens a fragment (the paper: 64)."""
    null_fragments: NotNegative = 0
    """Scored fragments of each half that are also simulated from another feature's explanation, for every feature; 0: all."""
    null_features: int = -1
    """0 leaves the null out. Any other number is taken for all features; it is kept for older suite files."""
    same_document: bool = False
    """Let explained and scored fragments share documents, for a text of very few documents."""

    def check_together(self) -> None:
        if self.null_fragments > self.fragments:
            raise ValueError("null_fragments is between 0 (all) and fragments")

    @property
    def nulls(self) -> int:
        """Fragments of each half that have a null."""
        return 0 if self.null_features == 0 else self.null_fragments or self.fragments


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
    version: ClassVar[int] = 4
    config: ClassVar[type] = AutointerpConfig
    needs_judge: ClassVar[bool] = True
    headline = ("top_and_random", "above_null", "lexical", "digit_mass", "eligible")
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
            f"eligible feature (of more than {MOST_LISTED}, so many drawn). It is shown all activations of these fragments, "
            "the judge their peaks",
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
        "one_document": Metric(
            "one document", "neither", interval=False, digits=2,
            note="share of the features active in enough windows that are left out, as their explained and scored fragments "
            "would share a document",
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
        """Explanations and simulated fragments, own and null; references simulate every scored fragment of a null."""
        n, own, length = config.features, config.fragments, config.fragment
        explained = Questions("explain", n, own, length, SILENT, max(0, PEAKS - own))
        simulated, beside = (
            Questions("simulate", 2 * n * (own + nulls), tokens=length) for nulls in (config.nulls, own if config.nulls else 0)
        )
        return Cost((explained, simulated), (explained, beside))

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
        reader = Reader(bench, dictionary, activations)
        enough = len(eligible.features) + eligible.of_one_document
        scores = [
            Score("eligible", len(eligible.features) / dictionary.n_features, n=dictionary.n_features),
            Score("one_document", eligible.of_one_document / enough, n=enough),
        ]
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
            every = sample(eligible.features, MOST_LISTED, bench.seed) if reference.asks_no_model else chosen
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
            scores += over(f"over_{name}", own, listed, bench.seed)
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


def _ask(bench: Bench, judge: Judge, reader: Reader, chosen: Sequence[Chosen], given_by: Sequence[int], nulls: int) -> Asked:
    """Explanations, own simulations, and simulations from the donors' explanations.

    Args:
        chosen: the features.
        given_by: donor of each; empty for no null.
        nulls: fragments of each half that are simulated from the donor's explanation.
    """
    tasks = [
        ExplainTask(
            [reader.example(fragment, c.feature) for fragment in c.explain],
            [] if judge.asks_no_model else reader.silent(c),
            [] if judge.asks_no_model else [reader.example(fragment, c.feature) for fragment in c.further],
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
