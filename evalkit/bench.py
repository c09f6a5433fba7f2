"""The workbench: what the units of a suite share, each thing built once, on first use.

1. Language model, and windows of fitting and scoring text (disjoint by document).
2. Activations of both at each hook point (``activations.capture``; cached by content).
3. Dictionaries, trained or fitted on the fitting activations and kept in a folder named by their recipe: everything that
   determines the weights. The same recipe later is a look-up, and a training that was killed goes on from its checkpoint.
   With [training] stream the activations of the fitting text come straight from the model (``training.stream``).
4. The judge and its references.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evalkit.activations.capture import Activations, capture, capture_folder
from evalkit.building import companions, round_of, train_round, unfinished
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.fitting import mean_active
from evalkit.dictionaries.loading import load_dictionary
from evalkit.dictionaries.registry import BASELINES
from evalkit.dictionaries.storage import CARD, save_dictionary
from evalkit.dictionaries.storage import load_dictionary as load_kept
from evalkit.disk import is_full
from evalkit.errors import DictionaryError, SuiteError, UnitFailed, as_unit_failed, fails_one_unit
from evalkit.files import sweep
from evalkit.hashing import content_hash, short
from evalkit.judges.base import JUDGES, Judge
from evalkit.judges.config import JudgeConfig
from evalkit.model_names import other_model
from evalkit.models.language_model import LanguageModel
from evalkit.progress import Progress
from evalkit.provenance import made_with
from evalkit.suite import DictionarySpec, Suite, matched_to
from evalkit.text.corpora import Document
from evalkit.text.split import split_documents
from evalkit.text.windows import TokenWindows, cut_windows, join_windows
from evalkit.text_facts import SIDES, Reader, capture_line, disagreement, text_line, text_row
from evalkit.training.chunks import Chunks, Rule
from evalkit.training.config import TrainConfig
from evalkit.training.observers import Logged, open_log
from evalkit.training.stream import StreamSupply
from evalkit.training.supply import Supply, VectorSupply

RECIPE_VERSION = 1
"""Raise it whenever the same recipe would give other weights."""


class Texts(NamedTuple):
    """Windows to fit on and windows to score on."""

    fit: TokenWindows
    score: TokenWindows


def slug(name: str) -> str:
    """``name`` as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


class Workbench:
    """Shared, lazily built parts of one suite. A context manager: leaving it closes the judges.

    Args:
        suite: what to build.
        folder: results folder; caches and dictionaries live below it.
        progress: where long steps are shown.
        watch: is given each row of a training's history, as rows of ``training_steps`` without run and time.
        owner: run that judges are asked for: their calls are its alone.
    """

    def __init__(
        self,
        suite: Suite,
        folder: Path,
        progress: Progress,
        watch: Callable[[dict[str, Any]], None] | None = None,
        owner: str = "",
    ) -> None:
        self.owner = owner
        self.suite, self.folder, self.progress, self.watch = suite, folder, progress, watch
        self._model: LanguageModel | None = None
        self._texts: Texts | None = None
        self._streamed: TokenWindows | None = None
        self._activations: dict[tuple[str, str], Activations] = {}
        self._dictionaries: dict[tuple[str, str], Dictionary] = {}
        self._unbuilt: dict[tuple[str, str], UnitFailed] = {}
        self._judges: dict[JudgeConfig, Judge] = {}
        self.wanted: frozenset[str] | None = None
        """Names of the dictionaries that this run is about; all of the suite's when None."""
        self.trained_now: set[tuple[str, str]] = set()
        """Name and hook point of what this workbench set about training."""
        self._streams: set[str] = set()
        """Hook points at which trainers were streamed."""
        self._tidy = False

    def __enter__(self) -> Workbench:
        for folder in (self.folder, self._cache, self.folder / "dictionaries"):
            sweep(folder)
        return self

    @property
    def _cache(self) -> Path:
        return self.folder / "cache" / "activations"

    def __exit__(self, *exc: object) -> None:
        for judge in self._judges.values():
            judge.close()

    @property
    def model(self) -> LanguageModel:
        """The language model, loaded on first use; every hook point of the suite is checked then."""
        if self._model is None:
            model = LanguageModel.load(self.suite.model, self.progress, self.suite.corpus.bos)
            for hook_point in self.suite.hook_points:
                model.check_hook_point(hook_point)
            if self.suite.corpus.context > model.context:
                raise SuiteError(
                    f"windows of {self.suite.corpus.context} tokens are longer than the {model.context} the model can read",
                    where=f"{self.suite.path} [corpus] context",
                    fix=f"choose a context of {model.context} or less",
                )
            self._model = model
        return self._model

    @property
    def texts(self) -> Texts:
        """Fitting and scoring windows.

        Raises:
            CorpusError: a source is missing or too small, or a text would stand on both sides.
        """
        if self._texts is None:
            corpus, seed = self.suite.corpus, self.suite.suite.seed
            split = split_documents(corpus.fit, list(corpus.score), share=corpus.score_share, seed=seed)
            fit = self._cut(split.fit, corpus.fit_tokens)
            share = corpus.score_tokens // len(corpus.score)
            parts = [self._cut(part, share) for part in split.score_by_source]
            named = zip(parts, split.sources, strict=True)
            score = join_windows([part._replace(sources=(source,) * len(part.names)) for part, source in named])
            self._texts = Texts(fit, score)
            self.progress.say(text_line("fit", fit))
            self.progress.say(text_line("score", score))
        return self._texts

    @property
    def streamed(self) -> TokenWindows:
        """Windows of fitting text that trainers are streamed: those of ``texts.fit`` and, where more are asked for, more."""
        corpus, wanted = self.suite.corpus, self.suite.training.stream_tokens
        if wanted <= corpus.fit_tokens:
            return self.texts.fit
        if self._streamed is None:
            seed = self.suite.suite.seed
            split = split_documents(corpus.fit, list(corpus.score), share=corpus.score_share, seed=seed)
            self._streamed = self._cut(split.fit, wanted)
            self.progress.say(text_line("stream", self._streamed))
        return self._streamed

    def _cut(self, documents: Sequence[Document], tokens: int) -> TokenWindows:
        corpus, seed = self.suite.corpus, self.suite.suite.seed
        most = corpus.windows_per_document or None
        return cut_windows(documents, self.model.tokenise, corpus.context, tokens, seed, most, self.model.bos)

    def passes(self, config: TrainConfig, hook_point: str) -> float:
        """How often a training with ``config`` presents each activation of the fitting text, on average."""
        if self.suite.training.stream:
            windows, context = self.streamed.tokens.shape
            rows = windows * (context - self.suite.activations.left_out(self.streamed.opening))
        else:
            rows = int(self.fit(hook_point).keep.sum())
        return config.tokens / max(1, rows)

    def supplies(self, config: TrainConfig, hook_points: Sequence[str]) -> dict[str, Supply]:
        """What trainings with the batch and order of ``config`` are fed from, by hook point; streamed ones share one pass of the
        language model.

        Raises:
            CorpusError: there is no text, or the rule for massive activations leaves nothing of it.
        """
        if self.suite.training.stream:
            self._streams |= set(hook_points)
            return self._stream(config, hook_points)
        order: dict[str, Any] = {"batch": config.batch, "seed": config.data_seed, "repeat": self.suite.training.repeat}
        found = {hook_point: self.fit(hook_point) for hook_point in hook_points}
        return {name: VectorSupply(x.kept(), **order, identity=x.identity, where=name) for name, x in found.items()}

    def _stream(self, config: TrainConfig, hook_points: Sequence[str]) -> dict[str, Supply]:
        session, rule = self.suite.training, self.suite.activations
        windows = self.streamed
        chunks = Chunks(
            self.model,
            windows.tokens,
            windows.identity,
            # on disk for all hook points at once; in memory only what is taken
            self.suite.hook_points if session.shards else hook_points,
            Rule(rule.left_out(windows.opening), rule.norm_multiple),
            shards=self.folder / "cache" / "shards" if session.shards else None,
            waiting_bytes=session.buffer_mb << 20,
        )
        more: dict[str, Any] = {"repeat": session.repeat, "buffer_bytes": session.buffer_mb << 20}
        return {name: StreamSupply(chunks, name, config.batch, config.data_seed, **more) for name in hook_points}

    def fit(self, hook_point: str) -> Activations:
        """Activations of the fitting text."""
        return self._captured("fit", hook_point)

    def score(self, hook_point: str) -> Activations:
        """Activations of the scoring text, under the norm limit measured on the fitting text."""
        return self._captured("score", hook_point)

    def _captured(self, side: str, hook_point: str) -> Activations:
        if (side, hook_point) not in self._activations:
            limit = None if side == "fit" else self.fit(hook_point).limit
            self._activations[side, hook_point] = capture(
                self.model,
                self.texts.fit if side == "fit" else self.texts.score,
                hook_point,
                self.suite.activations,
                self._cache,
                self.progress,
                name=SIDES[side],
                limit=limit,
            )
            self.progress.say(capture_line(side, hook_point, self._activations[side, hook_point]))
        return self._activations[side, hook_point]

    @property
    def bos(self) -> str:
        """The token that texts begin with, as the tokenizer spells it; '' where there is none."""
        return "" if self.model.bos is None else self.model.token_string(self.model.bos)

    def text_rows(self) -> list[dict[str, Any]]:
        """Rows of ``texts``: one for each capture that this workbench has read, and for each hook point that was streamed."""
        sides = {"fit": lambda: self.texts.fit, "score": lambda: self.texts.score}
        if not self._activations and not self._streams:
            return []
        by = Reader(self.bos, self.suite.model.called, self.model.identity)
        rows = [text_row(side, name, sides[side](), x, by) for (side, name), x in self._activations.items()]
        return rows + [text_row("stream", name, self.streamed, None, by) for name in sorted(self._streams)]

    def is_captured(self, hook_point: str) -> bool:
        """Whether both captures at ``hook_point`` would be look-ups."""
        folder, rule = self._cache, self.suite.activations
        if not capture_folder(self.model, self.texts.fit, hook_point, rule, folder, None).exists():
            return False
        return capture_folder(self.model, self.texts.score, hook_point, rule, folder, self.fit(hook_point).limit).exists()

    def recipe_folder(self, spec: DictionarySpec, hook_point: str) -> Path:
        """Where the dictionary of this recipe is kept once it has been built."""
        streamed = spec.source == "train" and self.suite.training.stream
        matched = matched_to(spec)
        recipe: list[Any] = [
            RECIPE_VERSION, spec.source, spec.kind, self._settings(spec), hook_point, self.model.identity,
            self._stream(spec.settings, [hook_point])[hook_point].identity if streamed else self.fit(hook_point).identity,
            self.suite.suite.seed,
        ]  # fmt: skip
        if matched is not None:
            recipe.append(self._recipe_of(self.spec(matched), hook_point))
        return self.folder / "dictionaries" / f"{slug(spec.name)}-{short(content_hash(recipe))}"

    def _recipe_of(self, spec: DictionarySpec, hook_point: str) -> str:
        """What determines another dictionary: its recipe, or what was imported."""
        if spec.source == "import":
            return self.dictionary(spec, hook_point).identity.hash
        return self.recipe_folder(spec, hook_point).name

    def _settings(self, spec: DictionarySpec) -> dict[str, object]:
        return dataclasses.asdict(spec.settings) if spec.settings is not None else {}

    def is_built(self, spec: DictionarySpec, hook_point: str) -> bool:
        """Whether ``dictionary`` would be a look-up."""
        return spec.source == "import" or (self.recipe_folder(spec, hook_point) / CARD).exists()

    def wants(self, spec: DictionarySpec, hook_point: str) -> bool:
        """Whether this run is about a dictionary that has not failed in it."""
        return (self.wanted is None or spec.name in self.wanted) and (spec.name, hook_point) not in self._unbuilt

    def spec(self, name: str) -> DictionarySpec:
        """The suite's dictionary called ``name``; the suite has checked that there is one."""
        return next(spec for spec in self.suite.dictionaries if spec.name == name)

    def dictionary(self, spec: DictionarySpec, hook_point: str) -> Dictionary:
        """The dictionary of ``spec`` at ``hook_point``: imported, looked up, or built now.

        Raises:
            UnitFailed: it cannot be built (training diverged, more components than dimensions, any exception), or, imported, does
                not fit the model at this hook point. It is not tried again by this workbench.
        """
        key = (spec.name, hook_point)
        if key in self._unbuilt:
            raise self._unbuilt[key]
        if key not in self._dictionaries:
            try:
                self._dictionaries[key] = self._import_or_build(spec, hook_point)
            except Exception as error:
                if not fails_one_unit(error) or is_full(error):
                    raise
                self._unbuilt[key] = as_unit_failed(error)
            if key in self._unbuilt:
                raise self._unbuilt[key]
        return self._dictionaries[key]

    def _import_or_build(self, spec: DictionarySpec, hook_point: str) -> Dictionary:
        width = self.model.width(hook_point)
        if spec.source == "import":
            dictionary = load_dictionary(spec.kind, spec.settings.format or None)
            if dictionary.d_in != width:
                raise DictionaryError(
                    f"the dictionary reads vectors of width {dictionary.d_in}, {hook_point} has {width}",
                    where=spec.kind,
                    fix="use the model and hook point it was trained on",
                )
            if dictionary.hook_point and dictionary.hook_point != hook_point and not spec.settings.any_hook_point:
                raise DictionaryError(
                    f"the dictionary was trained at {dictionary.hook_point}, not at {hook_point}",
                    where=spec.kind,
                    fix=f'write hook_points = ["{dictionary.hook_point}"], or any_hook_point = true beside the import',
                )
            for other in (
                other_model(spec.name, dictionary.model, self.suite.model.called, self.model.identity),
                disagreement(spec.name, made_with(dictionary.details), self.bos, self.suite.corpus.context),
            ):
                if other:
                    self.progress.say(f"note: {other}")
            return dictionary
        target = self.recipe_folder(spec, hook_point)
        if (target / CARD).exists():
            if spec.source == "train" and not self._tidy:
                unfinished(target.parent)  # removes the checkpoint of a round that ended with everything there
                self._tidy = True
            return load_kept(target)
        if spec.source == "train":
            return self._train(spec, hook_point, target)
        x = self.fit(hook_point).kept()  # (M, D)
        seed, identity = self.suite.suite.seed, self.model.identity
        settings, about = self._settings(spec), {}
        if (matched := matched_to(spec)) is not None:
            active = mean_active(self.dictionary(self.spec(matched), hook_point), x, seed)
            settings["top_k"], about = max(1, round(active)), {"top_k_of": matched, "top_k_of_active": active}
        with self.progress.stage(f"fitting {spec.name}"):
            built = BASELINES.get(spec.kind).fit(
                x, seed=seed, hook_point=hook_point, model=identity, progress=self.progress, **settings
            )
        built.details |= about
        if not (target / CARD).exists():  # another process may have made the same dictionary meanwhile
            save_dictionary(built, target)
        return load_kept(target)

    def _train(self, spec: DictionarySpec, hook_point: str, target: Path) -> Dictionary:
        """Train, or go on with it, with all that can be fed from the same batches."""
        work = round_of(companions(self, spec, hook_point))
        self.trained_now |= {(m.spec.name, m.hook_point) for m in work.missing}
        self._unbuilt |= train_round(self, work)
        if (spec.name, hook_point) in self._unbuilt:
            raise self._unbuilt[spec.name, hook_point]
        return load_kept(target)

    def open_log(self, spec: DictionarySpec, config: TrainConfig, key: str) -> Logged | None:
        """The log that the suite asks for, if any, for one training."""
        log = self.suite.training.log
        return open_log(log, self.folder, spec.name, key, dataclasses.asdict(config)) if log else None

    def observe(self, spec: DictionarySpec, hook_point: str, recipe: str, row: dict[str, float], logged: Logged | None) -> None:
        """Hand a row of a history on to who watches, and to the log."""
        if self.watch is not None:
            self.watch({"dictionary": spec.name, "recipe": recipe, "hook_point": hook_point, **row})
        if logged is not None:
            logged.observe(row)

    def judge(self, config: JudgeConfig | None) -> Judge | None:
        """The judge of ``config``, made once. Making it checks names and keys; the first call may load a model."""
        if config is None:
            return None
        if config not in self._judges:
            judge: Judge = JUDGES.get(config.provider)(config, self.folder / "calls", self.progress)
            judge.own(f"{self.owner} {config.name}")
            self._judges[config] = judge
        return self._judges[config]

    def drain_calls(self) -> list[dict[str, Any]]:
        """Rows for ``judge_calls``: the calls made since the last time this was asked."""
        return [row for judge in self._judges.values() for row in judge.drain_calls()]

    def at(self, hook_point: str, name: str = "") -> HookBench:
        """What an evaluation of the dictionary called ``name`` is given."""
        return HookBench(self, hook_point, name)


class HookBench:
    """A ``Workbench`` seen from one hook point: the ``evaluations.base.Bench`` of a run."""

    def __init__(self, bench: Workbench, hook_point: str, name: str) -> None:
        self._bench = bench
        self.hook_point, self.name = hook_point, name
        self.hook_points = bench.suite.hook_points
        self.seed = bench.suite.suite.seed
        self.progress = bench.progress

    def at(self, hook_point: str) -> HookBench:
        return HookBench(self._bench, hook_point, self.name)

    @property
    def model(self) -> LanguageModel:
        return self._bench.model

    @property
    def judge(self) -> Judge | None:
        return self._bench.judge(self._bench.suite.judge)

    @property
    def references(self) -> dict[str, Judge]:
        made = {config.name: self._bench.judge(config) for config in self._bench.suite.references}
        return {name: judge for name, judge in made.items() if judge is not None}

    def dictionary(self, name: str) -> Dictionary:
        return self._bench.dictionary(self._bench.spec(name), self.hook_point)

    def fit(self) -> Activations:
        return self._bench.fit(self.hook_point)

    def score(self) -> Activations:
        return self._bench.score(self.hook_point)
