"""The workbench: what the units of a suite share, each thing built once, on first use.

1. Language model, and windows of fitting and scoring text (disjoint by document).
2. Activations of both at each hook point (``activations.capture``; cached by content).
3. Dictionaries, trained or fitted on the fitting activations and kept in a folder named by their recipe: everything that
   determines the weights. The same recipe later is a look-up.
4. The judge and its references.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

from evalkit.activations.capture import Activations, capture, capture_folder
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.loading import load_dictionary
from evalkit.dictionaries.registry import BASELINES
from evalkit.dictionaries.storage import load_dictionary as load_kept
from evalkit.dictionaries.storage import save_dictionary
from evalkit.errors import DictionaryError, SuiteError, UnitFailed
from evalkit.hashing import content_hash, short
from evalkit.judges.base import JUDGES, Judge
from evalkit.judges.config import JudgeConfig
from evalkit.models.language_model import LanguageModel
from evalkit.progress import Progress
from evalkit.suite import DictionarySpec, Suite
from evalkit.text.split import split_documents
from evalkit.text.windows import TokenWindows, cut_windows, join_windows
from evalkit.training.loop import train

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
    """Shared, lazily built parts of one suite. A context manager: leaving it stops the judge's server.

    Args:
        suite: what to build.
        folder: results folder; caches and dictionaries live below it.
        progress: where long steps are shown.
    """

    def __init__(self, suite: Suite, folder: Path, progress: Progress) -> None:
        self.suite, self.folder, self.progress = suite, folder, progress
        self._model: LanguageModel | None = None
        self._texts: Texts | None = None
        self._activations: dict[tuple[str, str], Activations] = {}
        self._dictionaries: dict[tuple[str, str], Dictionary] = {}
        self._unbuilt: dict[tuple[str, str], UnitFailed] = {}
        self._judges: dict[JudgeConfig, Judge] = {}

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *exc: object) -> None:
        for judge in self._judges.values():
            judge.close()

    @property
    def model(self) -> LanguageModel:
        """The language model, loaded on first use; every hook point of the suite is checked then."""
        if self._model is None:
            model = LanguageModel.load(self.suite.model, self.progress)
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
            tokenise = self.model.tokenise
            fit = cut_windows(split.fit, tokenise, corpus.context, corpus.fit_tokens, seed)
            share = corpus.score_tokens // len(corpus.score)
            score = join_windows([cut_windows(part, tokenise, corpus.context, share, seed) for part in split.score_by_source])
            self._texts = Texts(fit, score)
        return self._texts

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
                self.folder / "cache" / "activations",
                self.progress,
                name="fitting text" if side == "fit" else "scoring text",
                limit=limit,
            )
        return self._activations[side, hook_point]

    def is_captured(self, hook_point: str) -> bool:
        """Whether both captures at ``hook_point`` would be look-ups."""
        folder, rule = self.folder / "cache" / "activations", self.suite.activations
        if not capture_folder(self.model, self.texts.fit, hook_point, rule, folder, None).exists():
            return False
        return capture_folder(self.model, self.texts.score, hook_point, rule, folder, self.fit(hook_point).limit).exists()

    def recipe_folder(self, spec: DictionarySpec, hook_point: str) -> Path:
        """Where the dictionary of this recipe is kept once it has been built."""
        recipe = [
            RECIPE_VERSION, spec.source, spec.kind, self._settings(spec), hook_point, self.model.identity,
            self.fit(hook_point).identity, self.suite.suite.seed,
        ]  # fmt: skip
        return self.folder / "dictionaries" / f"{slug(spec.name)}-{short(content_hash(recipe))}"

    def _settings(self, spec: DictionarySpec) -> dict[str, object]:
        return dataclasses.asdict(spec.settings) if spec.settings is not None else {}

    def is_built(self, spec: DictionarySpec, hook_point: str) -> bool:
        """Whether ``dictionary`` would be a look-up."""
        return spec.source == "import" or (self.recipe_folder(spec, hook_point) / "dictionary.json").exists()

    def spec(self, name: str) -> DictionarySpec:
        """The suite's dictionary called ``name``; the suite has checked that there is one."""
        return next(spec for spec in self.suite.dictionaries if spec.name == name)

    def dictionary(self, spec: DictionarySpec, hook_point: str) -> Dictionary:
        """The dictionary of ``spec`` at ``hook_point``: imported, looked up, or built now.

        Raises:
            UnitFailed: it cannot be built (training diverged, more components than dimensions), or, imported, does not fit the
                model at this hook point. It is not tried again by this workbench.
        """
        key = (spec.name, hook_point)
        if key in self._unbuilt:
            raise self._unbuilt[key]
        if key not in self._dictionaries:
            try:
                self._dictionaries[key] = self._import_or_build(spec, hook_point)
            except UnitFailed as error:
                self._unbuilt[key] = error
                raise
            except DictionaryError as error:
                self._unbuilt[key] = UnitFailed(error.what, where=error.where, fix=error.fix)
                raise self._unbuilt[key] from error
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
            return dictionary
        target = self.recipe_folder(spec, hook_point)
        if (target / "dictionary.json").exists():
            return load_kept(target)
        x = self.fit(hook_point).kept()  # (M, D)
        seed, identity = self.suite.suite.seed, self.model.identity
        if spec.source == "train":
            config = dataclasses.replace(spec.settings, seed=spec.settings.seed + seed)
            built = train(config, x, hook_point=hook_point, model=identity, progress=self.progress, name=spec.name).dictionary
        else:
            with self.progress.stage(f"fitting {spec.name}"):
                built = BASELINES.get(spec.kind).fit(
                    x, seed=seed, hook_point=hook_point, model=identity, progress=self.progress, **self._settings(spec)
                )
        save_dictionary(built, target)
        return load_kept(target)

    def judge(self, config: JudgeConfig | None) -> Judge | None:
        """The judge of ``config``, made once. Making it checks names and keys; the first call may start a server."""
        if config is None:
            return None
        if config not in self._judges:
            self._judges[config] = JUDGES.get(config.provider)(config, self.folder / "calls", self.progress)
        return self._judges[config]

    def drain_calls(self) -> list[dict[str, Any]]:
        """Rows for ``judge_calls``: the calls made since the last time this was asked."""
        return [row for judge in self._judges.values() for row in judge.drain_calls()]

    def at(self, hook_point: str) -> HookBench:
        """What an evaluation is given."""
        return HookBench(self, hook_point)


class HookBench:
    """A ``Workbench`` seen from one hook point: the ``evaluations.base.Bench`` of a run."""

    def __init__(self, bench: Workbench, hook_point: str) -> None:
        self._bench = bench
        self.hook_point = hook_point
        self.seed = bench.suite.suite.seed
        self.progress = bench.progress

    @property
    def model(self) -> LanguageModel:
        return self._bench.model

    @property
    def judge(self) -> Judge | None:
        return self._bench.judge(self._bench.suite.judge)

    @property
    def references(self) -> dict[str, Judge]:
        made = {config.provider: self._bench.judge(config) for config in self._bench.suite.references}
        return {name: judge for name, judge in made.items() if judge is not None}

    def dictionary(self, name: str) -> Dictionary:
        return self._bench.dictionary(self._bench.spec(name), self.hook_point)

    def fit(self) -> Activations:
        return self._bench.fit(self.hook_point)

    def score(self) -> Activations:
        return self._bench.score(self.hook_point)
