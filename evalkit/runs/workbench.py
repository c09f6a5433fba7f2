"""The workbench: what the units of a suite share, each thing built once, on first use.

1. ``inputs``: model, texts and activations.
2. ``dictionaries``: what is compared, imported or built.
3. The judge and its references.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from evalkit.activations.capture import Activations
from evalkit.dictionaries.base import Dictionary
from evalkit.judges.base import JUDGES, Judge
from evalkit.judges.config import JudgeConfig
from evalkit.models.language_model import LanguageModel
from evalkit.runs.dictionary_builder import DictionaryBuilder
from evalkit.runs.inputs import Inputs
from evalkit.suite import Suite
from evalkit.util.files import sweep
from evalkit.util.progress import Progress


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
        self.suite, self.folder, self.progress, self.owner = suite, folder, progress, owner
        self.inputs = Inputs(suite, folder, progress)
        self.dictionaries = DictionaryBuilder(self.inputs, watch)
        self._judges: dict[JudgeConfig, Judge] = {}

    def __enter__(self) -> Workbench:
        for folder in (self.folder, self.inputs.cache, self.dictionaries.folder):
            sweep(folder)
        return self

    def __exit__(self, *exc: object) -> None:
        for judge in self._judges.values():
            judge.close()

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
        self.seed = bench.suite.seed
        self.progress = bench.progress

    def at(self, hook_point: str) -> HookBench:
        return HookBench(self._bench, hook_point, self.name)

    @property
    def model(self) -> LanguageModel:
        return self._bench.inputs.model

    @property
    def judge(self) -> Judge | None:
        return self._bench.judge(self._bench.suite.judge)

    @property
    def references(self) -> dict[str, Judge]:
        made = {config.name: self._bench.judge(config) for config in self._bench.suite.references}
        return {name: judge for name, judge in made.items() if judge is not None}

    def dictionary(self, name: str) -> Dictionary:
        return self._bench.dictionaries.get(self._bench.dictionaries.spec(name), self.hook_point)

    def fit(self) -> Activations:
        return self._bench.inputs.fit(self.hook_point)

    def score(self) -> Activations:
        return self._bench.inputs.score(self.hook_point)
