"""Which features tell a concept: found on half of its texts, checked on the others, against neurons, a probe and chance.

1. A concept is a file with pairs of texts, labelled texts, a list of words, or a question for the judge (``concepts.loading``).
2. A feature's value on a text is its largest code, over as many tokens in both texts of a pair (``pooling``). Every
   feature of the dictionary, both tails where codes are signed, is a candidate: the best ``kept`` are found on the first half of
   the texts and tested on the second, pairs as pairs (``concept_search``). Holm corrects over all concepts and found candidates.
   Features of ``feature_ids`` are tested on every concept without a search, and corrected among themselves.
3. The same for the dimensions of the hook point (neurons). A logistic probe on mean activations and a model of the texts'
   surface, which reads no activation, are fitted and tested on the same halves (``concept_linear``).
4. Null: the same search with permuted labels.
5. The top tokens of the best feature are put into texts about other things: how often does it fire (``concept_injection``)?
6. Of the best feature: precision at weak, middle and strong activation beside the share of all texts that show the concept,
   and recall. With ``rate`` above 0 the judge is shown texts on which it fires, drawn from these levels in turn, the tokens
   it fires on in marks, and grades from 0 to 3 how well the concept tells what is marked (``prompts.rubric``): over all and by
   level. A failed call among them makes the mean 'failed'.

Specificity by level and by a rubric of 0 to 3: Templeton et al. 2024 (Scaling Monosemanticity). Search, correction and nulls are
ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import numpy as np

from evalkit.concepts.loading import LEAST_TEXTS, Concept, concept_files, load_concept
from evalkit.evaluations.base import EVALUATIONS, Bench, Cost, Evaluation, Metric, Result, Score
from evalkit.evaluations.concepts.injection import Injection, inject
from evalkit.evaluations.concepts.linear import Fitted, Surface, probe, surface
from evalkit.evaluations.concepts.metrics import METRICS
from evalkit.evaluations.concepts.pooling import Values, codes_of, compared, pooled
from evalkit.evaluations.concepts.search import (
    LEVELS,
    Found,
    Levels,
    by_chance,
    divided,
    given,
    halves,
    level_of,
    levels,
    search,
    spread,
)
from evalkit.evaluations.concepts.texts import Texts, answer_scores, cut_scores, graded, labelled, rated, texts_of
from evalkit.evaluations.sampling import choose_features
from evalkit.util.settings import Above0, Count, NotNegative, Range, Settings
from evalkit.util.statistics import holm
from evalkit.util.user_files import placed

if TYPE_CHECKING:
    from evalkit.dictionaries.base import Dictionary


@dataclass(frozen=True)
class ConceptsConfig(Settings):
    """Settings of the evaluation 'concepts': which features tell a concept."""

    concepts: tuple[str, ...] = ()
    """Packaged concepts; all of them where neither these nor files are named."""
    files: tuple[str, ...] = ()
    """Concept files of your own; they start at the suite file."""
    feature_ids: tuple[int, ...] = ()
    """Features that are tested on every concept beside those that are found: rows 'given', with precision by level and recall."""
    kept: Count = 5
    """Candidates found for each concept and tested on the other half."""
    texts: Annotated[int, Range(ge=LEAST_TEXTS)] = 60
    """Most texts of either kind where they come from the scoring text."""
    probe_strength: Above0 = 0.1
    """Inverse of the L2 penalty of the probe and of the surface model, on standardised inputs."""
    null_draws: NotNegative = 10
    """Searches with permuted labels."""
    inject: NotNegative = 40
    """Texts about other things into which the best feature's top tokens are put, at most; 0 leaves this out."""
    rate: NotNegative = 0
    """Texts of each concept on which the best feature fires that the judge grades, a third of each level; 0 asks no judge."""
    alpha: Annotated[float, Range(gt=0, lt=1)] = 0.05
    """A concept counts as detected where a found feature's p, corrected by Holm, lies below this."""


class _Searched(NamedTuple):
    """One concept, searched; ``held`` and what follows are None where there are too few texts, or too few documents to divide
    them."""

    concept: Concept
    texts: Texts
    held: np.ndarray | None = None
    values: Values | None = None
    features: tuple[Found, ...] = ()
    given: tuple[Found, ...] = ()
    neurons: tuple[Found, ...] = ()
    neuron_ids: tuple[tuple[int, int], ...] = ()
    """Dimension and sign of each found neuron."""
    probe: Fitted | None = None
    surface: Surface | None = None
    injection: Injection | None = None
    null: tuple[Found, ...] = ()
    level: Levels | None = None
    level_at: np.ndarray | None = None
    """Level of the best feature on each text."""
    ratings: dict[int, float | None] | None = None
    """By row of the texts."""


@EVALUATIONS.register("concepts")
class Concepts(Evaluation):
    """Features that tell concepts, checked on held-out texts, beside neurons, a probe and chance."""

    name: ClassVar[str] = "concepts"
    version: ClassVar[int] = 8
    config: ClassVar[type] = ConceptsConfig
    metrics: ClassVar[dict[str, Metric]] = METRICS

    def check(self, config: ConceptsConfig, context: int) -> None:
        """Raises SuiteError or CorpusError where a concept does not exist or cannot be read."""
        _concepts(config)

    def placed(self, config: ConceptsConfig, folder: Path) -> ConceptsConfig:
        """``files`` start at the suite file."""
        return replace(config, files=tuple(str(placed(file, folder)) for file in config.files))

    def reads(self, config: ConceptsConfig) -> list[Path]:
        """The concept files."""
        return concept_files(config.concepts, config.files)

    def asks(self, config: ConceptsConfig) -> bool:
        """Where texts are rated, and where a concept is a question."""
        return config.rate > 0 or any(concept.source == "judge" for concept in _concepts(config))

    def cost(self, config: ConceptsConfig) -> Cost:
        """Rated texts, and the windows behind questions."""
        concepts = _concepts(config)
        grades = [rated(one, config.rate) for one in concepts]
        return Cost((*grades, *(labelled(one, config.texts) for one in concepts if one.source == "judge")))

    def run(self, bench: Bench, dictionary: Dictionary, config: ConceptsConfig) -> Result:
        """Search every concept.

        Raises:
            DictionaryError: its width is not that of the hook point.
            UnitFailed: a feature of feature_ids does not exist.
            BudgetReached, JudgeSetupError: of the judge, where it is asked.
        """
        concepts = _concepts(config)
        ids = choose_features(dictionary, bench.score(), ids=config.feature_ids) if config.feature_ids else []
        found = []
        with bench.progress.stage("searching concepts", len(concepts), "concepts") as stage:
            for number, concept in enumerate(concepts):
                found.append(_search(bench, dictionary, concept, config, number, ids))
                stage.advance(words=concept.name)
        rows = [
            row for source in ("feature", "given", "neuron", "probe", "surface", "count", "null") for row in _rows(found, source)
        ]
        scores = [score for number, searched in enumerate(found) for score in _scores(number, searched, rows, config)]
        scores += [
            score for number, searched in enumerate(found) for score in answer_scores(number, searched.texts, config.texts)
        ]
        scores += cut_scores([searched.texts for searched in found])
        return Result(scores, {"concept_features": rows, "concept_texts": list(_text_rows(found))})


def _concepts(config: ConceptsConfig) -> list[Concept]:
    return [load_concept(path) for path in concept_files(config.concepts, config.files, "[[evaluation]] concepts")]


def _search(
    bench: Bench, dictionary: Dictionary, concept: Concept, config: ConceptsConfig, number: int, ids: Sequence[int]
) -> _Searched:
    texts = texts_of(bench, concept, config.texts)
    if not texts.enough:
        return _Searched(concept, texts)
    label, group = texts.label, texts.group
    held = halves(label, group, bench.seed)
    if not divided(label, held):
        return _Searched(concept, texts)
    among = compared(texts.keep, label, group)
    values = pooled(dictionary, texts.x, texts.keep, among)
    features = search(values, label, held, group, config.kept)
    plain = pooled(None, texts.x, texts.keep, among)
    neurons = search(plain, label, held, group, config.kept)
    best = values.value[:, features[0].candidate]
    level_at = level_of(best, float(best[~held].max()))
    injection = None
    if config.inject:
        injection = inject(bench, dictionary, concept, texts, values, features[0].candidate, held, config.inject, bench.seed)
    ratings = None
    if config.rate:
        drawn = spread(np.where(held, level_at, -1), config.rate, np.random.default_rng([bench.seed, 12, number]))
        codes = codes_of(dictionary, values, features[0].candidate, texts.x[drawn], texts.keep[drawn])
        strings = [texts.tokens[n] for n in drawn]
        own = [code[: len(tokens)] for code, tokens in zip(codes, strings, strict=True)]
        ratings = dict(zip(drawn, graded(bench, concept, strings, own), strict=True))
    return _Searched(
        concept, texts, held, values, tuple(features), tuple(given(values, label, held, group, ids)), tuple(neurons),
        tuple((int(plain.feature[f.candidate]), int(plain.sign[f.candidate])) for f in neurons),
        probe(texts.x, texts.keep, label, held, group, config.probe_strength),
        surface(texts.text, [len(row) for row in texts.ids], label, held, group, config.probe_strength), injection,
        tuple(by_chance(values, label, group, held, config.null_draws, bench.seed)), levels(best, label, held), level_at,
        ratings,
    )  # fmt: skip


def _rows(found: list[_Searched], source: str) -> list[dict[str, Any]]:
    """Rows of ``concept_features`` of one source, corrected together."""
    rows: list[dict[str, Any]] = []
    for searched in found:
        if searched.values is None or searched.held is None or searched.probe is None or searched.surface is None:
            continue
        about = {"concept": searched.concept.name, "source": source, "texts": int(searched.held.sum())}
        if source in ("probe", "surface"):
            fitted = searched.probe if source == "probe" else searched.surface.model
            rows.append({**about, "place": 1, "auroc_chosen": fitted.chosen, "auroc": fitted.auroc, "p": fitted.p})
            continue
        if source == "count":
            for place, (name, sign, one) in enumerate(searched.surface.counted):
                row = {**about, "place": place + 1, "auroc_chosen": one.chosen, "auroc": one.auroc, "p": one.p}
                rows.append({**row, "sign": sign, "counted": name})
            continue
        tested = {"feature": searched.features, "given": searched.given, "neuron": searched.neurons, "null": searched.null}[
            source
        ]
        for place, one in enumerate(tested):
            row = {**about, "place": place + 1, "auroc_chosen": one.chosen, "auroc": one.auroc, "p": one.p}
            if source == "neuron":
                row |= dict(zip(("feature", "sign"), searched.neuron_ids[place], strict=True))
            else:
                row |= {"feature": int(searched.values.feature[one.candidate]), "sign": int(searched.values.sign[one.candidate])}
            if source in ("feature", "given"):
                at = levels(searched.values.value[:, one.candidate], searched.texts.label, searched.held)
                row |= {"recall": at.recall, "level_texts": at.texts, "level_precision": at.precision}
            if source == "feature" and place == 0 and searched.injection is not None:
                row |= {"threshold": searched.injection.threshold, "recall_threshold": searched.injection.recall}
                row |= {
                    "top_tokens": searched.injection.tokens,
                    "injected_texts": searched.injection.texts,
                    "injected": searched.injection.injected,
                }
            rows.append(row)
    for row, p in zip(rows, holm([row["p"] for row in rows]).tolist() if rows else [], strict=True):
        row["p_holm"] = p
    return rows


def _per_concept(config: ConceptsConfig) -> list[str]:
    """Metrics that have one score a concept under these settings."""
    left_out = ["judged_yes", "texts_cut"]
    left_out += [] if config.rate else ["rating", *(f"rating_{level}" for level in LEVELS)]
    left_out += [] if config.inject else ["recall_threshold", "injected"]
    left_out += [] if config.feature_ids else ["auroc_given", "told_given"]
    return [metric for metric in Concepts.metrics if metric not in left_out]


def _scores(number: int, searched: _Searched, rows: list[dict[str, Any]], config: ConceptsConfig) -> Iterator[Score]:
    values: dict[str, float | None] = {}
    n, failed = 1, set()
    own = [row for row in rows if row["concept"] == searched.concept.name]
    if searched.level is None or searched.probe is None or searched.surface is None or searched.held is None:
        n = max(1, len(searched.texts.text))
        failed = set(Concepts.metrics) if searched.texts.failed else set()
    else:
        n = len(searched.texts.text)
        significant = [row["p_holm"] < config.alpha for row in own if row["source"] == "given"]
        values = {
            "auroc": searched.features[0].auroc,
            "candidates": None if searched.values is None else float(searched.values.value.shape[1]),
            "auroc_null": float(np.mean([one.auroc for one in searched.null])) if searched.null else None,
            "auroc_neuron": searched.neurons[0].auroc,
            "auroc_probe": searched.probe.auroc,
            "auroc_surface": searched.surface.model.auroc,
            "auroc_count": searched.surface.counted[0].found.auroc,
            "injected": searched.injection.injected if searched.injection else None,
            "recall_threshold": searched.injection.recall if searched.injection else None,
            "told": float(any(row["p_holm"] < config.alpha for row in own if row["source"] == "feature")),
            "told_neuron": float(any(row["p_holm"] < config.alpha for row in own if row["source"] == "neuron")),
            "auroc_given": float(np.mean([one.auroc for one in searched.given])) if searched.given else None,
            "told_given": float(np.mean(significant)) if significant else None,
            "precision_strong": searched.level.precision[LEVELS.index("strong")],
            "precision_null": float(searched.texts.label[searched.held].mean()),
            "recall": searched.level.recall,
        }
        for ending, rates in _ratings(searched).items():
            known = [rate for rate in rates if rate is not None]
            if len(known) < len(rates):
                failed.add(f"rating{ending}")
            elif known:
                values[f"rating{ending}"] = float(np.mean(known))
    for metric in _per_concept(config):
        value = values.get(metric)
        yield Score(
            metric,
            value,
            number,
            "concept",
            1.0 if value is not None else 0.0,
            status="ok" if value is not None else "failed" if metric in failed else "undefined",
            n=n,
        )


def _ratings(searched: _Searched) -> dict[str, list[float | None]]:
    """What the judge said of all rated texts ('') and of those at each level; None where a call failed."""
    found: dict[str, list[float | None]] = {ending: [] for ending in ("", *(f"_{level}" for level in LEVELS))}
    for row, rate in (searched.ratings or {}).items():
        assert searched.level_at is not None
        found[""].append(rate)
        found[f"_{LEVELS[searched.level_at[row]]}"].append(rate)
    return found


def _text_rows(found: list[_Searched]) -> Iterator[dict[str, Any]]:
    """Rows of ``concept_texts``: every text with the best feature's value."""
    for searched in found:
        if searched.values is None or searched.held is None:
            continue
        candidate = searched.features[0].candidate
        for n, text in enumerate(searched.texts.text):
            yield {
                "concept": searched.concept.name,
                "feature": int(searched.values.feature[candidate]),
                "sign": int(searched.values.sign[candidate]),
                "held_out": bool(searched.held[n]),
                "label": bool(searched.texts.label[n]),
                "text": text,
                "value": float(searched.values.value[n, candidate]),
                "rating": (searched.ratings or {}).get(n),
            }
