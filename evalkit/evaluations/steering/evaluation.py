"""Clamping and steering: what the model writes when a feature is set or added, beside what a random feature and direction do.

1. Features are named, drawn (``sampling``), or the best ones of concepts, and each has words (``targets``).
2. At each strength v, in units of the feature's maximum (over the scoring text and its concept's texts), the feature is clamped
   to it or added (``interventions.generate``). So are, with the same length of v times maximum times direction, another feature
   drawn at random and a random direction (which has no code and is only added). A negative strength turns all of them round;
   where codes are signed, a concept's feature may be a lower tail, the other feature is always an upper one. A feature that
   fires nowhere has no maximum: nothing is written for it, its scores are undefined, and the run says so.
3. The model continues prompts of our own: greedily, and ``draws`` times sampled with common random numbers.
4. Along the greedy reply of the unchanged model, the change of the log-probability of the feature's words is read at every
   position, and KL(as it is || changed).
5. A text names the feature where one of its words is in it (whole words, three letters or more). With ``judge``, the judge
   simulates on every text a feature that fires on the words or concept: it sees it there where a token reaches half of the
   scale. A failed call among an arm's texts makes that arm's share 'failed'.
   A text with tokens that have no value, and no yes on another, is left out of the share.
6. The cost is what the unchanged model thinks of the text: nats a token, above its own text of the same draw. What moves words
   and costs much has broken the model, not steered it. Repetition costs little: the share of distinct tokens is kept beside.

Templeton et al. 2024 (Scaling Monosemanticity); prompts, measures and nulls are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch

from evalkit.concepts.loading import Concept, concept_files, load_concept
from evalkit.evaluations.base import EVALUATIONS, Bench, Cost, Evaluation, Metric, Result, Score
from evalkit.evaluations.concepts.texts import JUDGED_YES, TEXTS_CUT, YES, answer_scores, cut_scores, labelled, seen
from evalkit.evaluations.sampling import LEAST_WINDOWS, activity
from evalkit.evaluations.steering.targets import TEXTS, Target, names, targets_of, word_ids
from evalkit.interventions.generate import Change, generate, log_probabilities, uniforms
from evalkit.judges.base import Questions
from evalkit.util.settings import Count, NotNegative, Range, Settings
from evalkit.util.user_files import placed

if TYPE_CHECKING:
    from evalkit.dictionaries.base import Dictionary

PROMPTS = (
    "This morning I want to tell you about",
    "The most important thing in my life is",
    "When people ask me who I am, I say that",
    "The report begins with a description of",
)
"""Openings that leave the subject open; our own."""
LISTED = 5
"""Tokens listed as raised and lowered."""
SILENT = "it fires nowhere in the scoring text or its concept's texts, so that it has no maximum to steer by"
"""Why a feature is not steered."""


@dataclass(frozen=True)
class SteeringConfig(Settings):
    """Settings of the evaluation 'steering': what the model writes when features are steered or clamped."""

    features: Count = 4
    """Features drawn from those active in enough windows; a smaller sample is part of a larger one."""
    feature_ids: tuple[int, ...] = ()
    """Use these features instead of a sample."""
    concepts: tuple[str, ...] = ()
    """Use the best feature of each of these packaged concepts instead."""
    files: tuple[str, ...] = ()
    """Concept files of your own; they start at the suite file."""
    least_windows: Count = LEAST_WINDOWS
    """Windows of scoring text a drawn feature must be active in."""
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0)
    """How far features are steered or clamped, in units of their maximum; negative ones to the other side."""
    reported: float = 2.0
    """The strength whose numbers are scores; one of ``strengths``."""
    prompts: tuple[str, ...] = PROMPTS
    """What the model continues."""
    tokens: Annotated[int, Range(ge=2)] = 24
    """Tokens it writes."""
    draws: NotNegative = 1
    """Sampled texts for each prompt beside the greedy one."""
    judge: bool = False
    """Also ask the suite's judge how clearly each text is about the feature's words or concept."""

    def check_together(self) -> None:
        if not self.strengths or not self.prompts or any(len(prompt.split()) < 2 for prompt in self.prompts):
            raise ValueError("give at least one strength, and prompts of two words or more")
        if self.reported not in self.strengths:
            raise ValueError(f"reported = {self.reported:g} is not among strengths")
        if self.feature_ids and (self.concepts or self.files):
            raise ValueError("name features (feature_ids) or concepts, not both")


class Arm(NamedTuple):
    """How the model is changed, and along which vector."""

    mode: str | None
    """'clamp' or 'steer'; None: not at all."""
    vector: str
    """'feature', 'random_feature' or 'random_direction'; 'none' for the unchanged model."""


UNCHANGED = Arm(None, "none")
ARMS = (
    Arm("clamp", "feature"),
    Arm("clamp", "random_feature"),
    Arm("steer", "feature"),
    Arm("steer", "random_feature"),
    Arm("steer", "random_direction"),
)
NULLS = {"clamp": Arm("clamp", "random_feature"), "steer": Arm("steer", "random_direction")}
"""What the feature is compared with."""


class Measure(NamedTuple):
    """A number of each text."""

    column: str
    """Of ``steering_texts``."""
    title: str
    better: str
    """'higher' or 'lower', for the feature itself."""
    note: str
    """Where {change} is what is done."""
    unchanged: str = ""
    """Note of the unchanged model's own number, where it has one."""


MEASURES = {
    "shift": Measure(
        "shift", "concept log-prob shift", "higher",
        "Change of the log-probability of the feature's words along the unchanged reply, nats, when {change} (at the reported "
        "strength, in units of the maximum). Undefined where it fires nowhere and so has no maximum.",
    ),
    "named": Measure(
        "named", "named", "higher", "Share of texts that hold one of the feature's words (three letters or more) when {change}.",
        "Share of the unchanged model's texts that hold a word.",
    ),
    "judged": Measure(
        "named_judge", "judged", "higher",
        "Share of texts in which the judge sees the feature's words or concept when {change} (by simulation, at or above half of "
        "the scale; with judge = true).",
        "Share of the unchanged model's texts in which the judge sees the words or concept.",
    ),
    "cost": Measure(
        "cost", "cost", "lower", "Nats a token that the unchanged model finds the text less likely than its own, when {change}."
    ),
}  # fmt: skip


def metric_key(measure: str, arm: Arm) -> str:
    """Key of the metric that is the mean of ``measure`` over the texts of ``arm``."""
    vector = {"random_feature": "_feature_random", "random_direction": "_random"}.get(arm.vector, "")
    return f"{measure}_{arm.mode or 'none'}{vector}"


CONDITIONS = {metric_key(measure, arm): (measure, arm) for arm in ARMS for measure in MEASURES}
CONDITIONS |= {metric_key(key, UNCHANGED): (key, UNCHANGED) for key, measure in MEASURES.items() if measure.unchanged}
"""Measure and arm of each metric that has one score a target."""


class _Row(NamedTuple):
    """One condition."""

    place: int
    """Which target; -1 for the unchanged model."""
    arm: Arm
    strength: float | None
    change: Change | None


class _Text(NamedTuple):
    """What was written under a condition, and read."""

    row: _Row
    prompt: int
    draw: int
    ids: list[int]
    nll: float
    words: dict[int, float]
    """Draw 0: mean log-probability of each target's words along the unchanged reply, by target."""
    kl: float
    raised: list[str]
    lowered: list[str]


def _metrics() -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for key, (name, arm) in CONDITIONS.items():
        measure = MEASURES[name]
        if arm.mode is None:
            metrics[key] = Metric(f"{measure.title}, unchanged", "neither", note=measure.unchanged)
            continue
        verb = {"clamp": "clamped", "steer": "added"}[arm.mode]
        ending, change = {
            "feature": ("", f"the feature is {verb}"),
            "random_feature": (", other feature", f"another feature is {verb}, as long"),
            "random_direction": (", random", "a random direction is added, as long"),
        }[arm.vector]
        own = arm.vector == "feature"
        metrics[key] = Metric(
            f"{measure.title}, {arm.mode}{ending}", measure.better if own else "neither",
            null=metric_key(name, NULLS[arm.mode]) if own else "", main=(name, arm) == ("shift", ARMS[0]),
            note=measure.note.format(change=change),
        )  # fmt: skip
    return metrics | {"judged_yes": JUDGED_YES, "texts_cut": TEXTS_CUT}


@EVALUATIONS.register("steering")
class Steering(Evaluation):
    """Words moved, texts that name the feature and what they cost, clamped and steered, with random arms."""

    name: ClassVar[str] = "steering"
    version: ClassVar[int] = 8
    config: ClassVar[type] = SteeringConfig
    metrics: ClassVar[dict[str, Metric]] = _metrics()

    def check(self, config: SteeringConfig, context: int) -> None:
        """Raises SuiteError or CorpusError where a concept does not exist or cannot be read."""
        _concepts(config)

    def placed(self, config: SteeringConfig, folder: Path) -> SteeringConfig:
        """``files`` start at the suite file."""
        return replace(config, files=tuple(str(placed(file, folder)) for file in config.files))

    def reads(self, config: SteeringConfig) -> list[Path]:
        """The concept files."""
        return concept_files(config.concepts, config.files) if config.concepts or config.files else []

    def asks(self, config: SteeringConfig) -> bool:
        """Where texts are judged, and where a concept is a question."""
        return config.judge or any(concept.source == "judge" for concept in _concepts(config))

    def cost(self, config: SteeringConfig) -> Cost:
        """Judged texts (the unchanged model's once for each feature), and the windows behind questions."""
        concepts = _concepts(config)
        count = len(concepts) or len(config.feature_ids) or config.features
        conditions = count * (1 + len(config.strengths) * 5)
        calls = conditions * len(config.prompts) * (1 + config.draws) if config.judge else 0
        # what was written is cut into tokens anew, which may be more
        judged = Questions("simulate", calls, tokens=2 * config.tokens, written=True, words=_most_words(concepts))
        return Cost((judged, *(labelled(concept, TEXTS) for concept in concepts if concept.source == "judge")))

    def run(self, bench: Bench, dictionary: Dictionary, config: SteeringConfig) -> Result:
        """Steer and clamp features and let the model write.

        Raises:
            UnitFailed: no feature is active in enough windows, or a named one does not exist.
            DictionaryError: its width is not that of the hook point.
            BudgetReached, JudgeSetupError: of the judge, where it is asked.
        """
        concepts = _concepts(config)
        targets, read = targets_of(bench, dictionary, concepts, config.feature_ids, config.features, config.least_windows)
        live, silent = [one for one in targets if one.maximum > 0], [one for one in targets if one.maximum <= 0]
        texts = _write_all(bench, dictionary, live, _rows(bench, dictionary, live, config), config) if live else []
        rows = _facts(bench, live, texts, config)
        scores = [*_scores(live, rows, config)]
        for target in silent:
            whose = f", the best one of {target.concept}," if target.concept else ""
            bench.progress.say(f"steering: feature {target.feature}{whose} is undefined: {SILENT}")
            scores += [Score(metric, None, target.item, _kind(target), 0.0, status="undefined") for metric in _arms(config)]
        found = {target.item for target in targets if target.concept}
        for item, own in enumerate(read):
            if item not in found:
                status = "failed" if own.failed else "undefined"
                scores += [Score(metric, None, item, "concept", 0.0, status=status) for metric in _arms(config)]
            scores += answer_scores(item, own, TEXTS)
        scores += cut_scores(read)
        for _, row in rows:
            if row["named_judge"] is not None and math.isnan(row["named_judge"]):
                row["named_judge"] = None
        return Result(scores, {"steering_texts": [row for _, row in rows]})


def _most_words(concepts: Sequence[Concept]) -> int:
    """Bytes of what the judge reads of a target: a concept's question, or else words of a feature."""
    return max((len(concept.asked.encode()) for concept in concepts), default=0)


def _concepts(config: SteeringConfig) -> list[Concept]:
    if not (config.concepts or config.files):
        return []
    return [load_concept(path) for path in concept_files(config.concepts, config.files, "[[evaluation]] steering")]


def _kind(target: Target) -> str:
    return "concept" if target.concept else "feature"


def _arms(config: SteeringConfig) -> dict[str, tuple[str, Arm]]:
    """Measure and arm of the metrics that have one score a target, as far as they are asked for."""
    return {metric: (measure, arm) for metric, (measure, arm) in CONDITIONS.items() if config.judge or measure != "judged"}


def _rows(bench: Bench, dictionary: Dictionary, targets: Sequence[Target], config: SteeringConfig) -> list[_Row]:
    """Every condition; the first is the model as it is."""
    rows = [_Row(-1, UNCHANGED, None, None)]
    often = activity(dictionary, bench.score()).windows >= 1
    for place, target in enumerate(targets):
        random = np.random.default_rng([bench.seed, 14, target.feature])
        own = dictionary.edit_directions[target.feature]
        pool = [f for f in often.nonzero()[:, 0].tolist() if f != target.feature] or [target.feature]
        other = int(random.choice(pool))
        noise = torch.from_numpy(random.normal(size=len(own))).to(own)
        noise *= own.norm() / noise.norm()
        for strength in config.strengths:
            amount = target.sign * strength * target.maximum
            as_long = strength * target.maximum * float(own.norm() / dictionary.edit_directions[other].norm().clamp(min=1e-12))
            for clamp, mode in ((True, "clamp"), (False, "steer")):
                rows.append(_Row(place, Arm(mode, "feature"), strength, Change(target.feature, own, amount, clamp)))
                change = Change(other, dictionary.edit_directions[other], as_long, clamp)
                rows.append(_Row(place, Arm(mode, "random_feature"), strength, change))
            rows.append(_Row(place, Arm("steer", "random_direction"), strength, Change(target.feature, noise, amount, False)))
    return rows


def _write_all(
    bench: Bench, dictionary: Dictionary, targets: Sequence[Target], rows: Sequence[_Row], config: SteeringConfig
) -> list[_Text]:
    model, hook_point = bench.model, bench.hook_point
    changes = [row.change for row in rows]
    still = Change(0, torch.zeros_like(dictionary.edit_directions[0]), 0.0, False)
    written = [change or still for change in changes]
    ids = [word_ids(bench, target.words) for target in targets]
    texts: list[_Text] = []
    with bench.progress.stage("steering", len(config.prompts) * (1 + config.draws) * len(rows), "texts") as stage:
        for number, prompt in enumerate(config.prompts):
            begin = model.opened(prompt)
            for draw in range(1 + config.draws):
                drawn = uniforms(bench.seed, number, draw, config.tokens)
                new = generate(model, hook_point, dictionary, written, begin, config.tokens, drawn)
                whole = torch.cat([torch.tensor(begin).repeat(len(rows), 1), new], dim=1)
                nll = _nll(bench, dictionary, whole, len(begin))
                along = _along(bench, dictionary, changes, whole[0], len(begin), ids) if draw == 0 else None
                for place, row in enumerate(rows):
                    seen = along[place] if along else _Along({}, float("nan"), [], [])
                    texts.append(_Text(row, number, draw, new[place].tolist(), nll[place], *seen))
                stage.advance(len(rows))
    return texts


def _nll(bench: Bench, dictionary: Dictionary, whole: torch.Tensor, begin: int) -> list[float]:
    """Nats a token of what was written, under the unchanged model."""
    found: list[float] = []
    for rows, log_p in log_probabilities(bench.model, bench.hook_point, dictionary, [None] * len(whole), whole, begin):
        found += (-log_p.gather(-1, whole[rows, begin:, None])[..., 0].mean(1)).tolist()
    return found


class _Along(NamedTuple):
    """One condition along the unchanged reply."""

    words: dict[int, float]
    kl: float
    raised: list[str]
    lowered: list[str]


def _along(
    bench: Bench,
    dictionary: Dictionary,
    changes: Sequence[Change | None],
    text: torch.Tensor,
    begin: int,
    ids: Sequence[Sequence[int]],
) -> list[_Along]:
    out: list[_Along] = []
    base: torch.Tensor | None = None
    for _, log_p in log_probabilities(bench.model, bench.hook_point, dictionary, changes, text.repeat(len(changes), 1), begin):
        for row in log_p.double():
            base = row if base is None else base  # the first row is the model as it is
            moved = (row - base).mean(0)
            order = moved.argsort()
            words = {place: float(row[:, list(own)].logsumexp(-1).mean()) for place, own in enumerate(ids) if own}
            kl = float((base.exp() * (base - row)).sum(-1).mean())
            strings = bench.model.token_strings
            out.append(_Along(words, kl, strings(order[-LISTED:].flip(0).tolist()), strings(order[:LISTED].tolist())))
    return out


def _facts(
    bench: Bench, targets: Sequence[Target], texts: Sequence[_Text], config: SteeringConfig
) -> list[tuple[int, dict[str, Any]]]:
    """Rows of ``steering_texts`` with the place of their target; the unchanged text stands once for each target."""
    plain = {(text.prompt, text.draw): text for text in texts if text.row.place < 0}
    rows: list[tuple[int, dict[str, Any]]] = []
    for text in texts:
        own = plain[text.prompt, text.draw]
        for place in range(len(targets)) if text.row.place < 0 else [text.row.place]:
            target = targets[place]
            said = bench.model.tokenizer.decode(text.ids, skip_special_tokens=True)
            shift = text.words[place] - own.words[place] if place in text.words and text.row.place >= 0 else None
            change = text.row.change
            rows.append((place, {
                "feature": target.feature,
                "concept": target.concept or None,
                "mode": text.row.arm.mode,
                "strength": text.row.strength,
                "arm": text.row.arm.vector,
                "prompt": config.prompts[text.prompt],
                "draw": text.draw,
                "text": said,
                "named": names(said, target.naming),
                "named_judge": None,
                "nll": text.nll,
                "cost": text.nll - own.nll,
                "distinct_tokens": len(set(text.ids)) / len(text.ids),
                "shift": shift,
                "kl": text.kl if text.kl == text.kl and text.row.place >= 0 else None,
                "edit": None if change is None else abs(change.amount) * float(change.direction.norm()),
                "raised": text.raised if text.row.place >= 0 else [],
                "lowered": text.lowered if text.row.place >= 0 else [],
                "words": list(target.words),
                "maximum": target.maximum,
            }))  # fmt: skip
    if config.judge:
        _judge(bench, targets, rows)
    return rows


def _judge(bench: Bench, targets: Sequence[Target], rows: list[tuple[int, dict[str, Any]]]) -> None:
    """Fill ``named_judge``: None where a call failed, NaN where it is undefined."""
    for place, target in enumerate(targets):
        own = [row for at, row in rows if at == place and target.words]
        concept = Concept("", target.about, target.words, "", ())
        strings = [bench.model.token_strings(bench.model.tokenise(row["text"])) for row in own]
        for row, found in zip(own, seen(bench, concept, strings), strict=True):
            row["named_judge"] = math.nan if found.status == "undefined" else found.share


def _scores(targets: Sequence[Target], rows: Sequence[tuple[int, dict[str, Any]]], config: SteeringConfig) -> Iterator[Score]:
    for place, target in enumerate(targets):
        for metric, (measure, arm) in _arms(config).items():
            condition = (arm.vector, arm.mode, config.reported if arm.mode else None)
            texts = [row for at, row in rows if at == place and (row["arm"], row["mode"], row["strength"]) == condition]
            yield _score(metric, measure, [row[MEASURES[measure].column] for row in texts], target)


def _score(metric: str, measure: str, found: Sequence[float | None], target: Target) -> Score:
    """Mean of what was ``found`` of texts; a judged text counts as 1 or 0, and one without an answer fails the share."""
    values = [float(value) for value in found if value is not None]
    if measure == "judged":
        values = [float(value >= YES) for value in values if not math.isnan(value)]
    status = "ok" if target.words and values else "undefined"
    if target.words and measure == "judged" and None in found:
        status = "failed"
    ok = status == "ok"
    return Score(
        metric,
        float(np.mean(values)) if ok else None,
        target.item,
        _kind(target),
        float(ok),
        status=status,
        n=max(1, len(values)),
    )
