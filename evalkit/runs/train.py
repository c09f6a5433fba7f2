"""``evalkit train``: the trained dictionaries of a suite, and nothing else of it.

1. The suite needs no [[evaluation]]; baselines and imports in it are left alone.
2. Each dictionary that is not there yet is trained at each hook point; one that was killed goes on from its checkpoint. A
   later ``evalkit run`` with the same settings finds them all.
3. Rows of the histories go to the journal as they are made, and into the results file after each dictionary. A locked file
   stops nothing.
4. A training that fails is said, and the others go on.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, NamedTuple

from evalkit.dictionaries.base import Dictionary
from evalkit.errors import DiskFull, SuiteError, UnitFailed, UsageError, as_unit_failed, fails_one_unit
from evalkit.runs.dictionary_builder import slug
from evalkit.runs.recorder import Recorder
from evalkit.runs.run import check_log, reasons, suite_hash
from evalkit.runs.workbench import Workbench
from evalkit.suite import DictionarySpec, Suite, load_suite
from evalkit.util.disk import disk_guard
from evalkit.util.progress import Progress
from evalkit.util.registry import near_miss
from evalkit.util.user_files import DEFAULT_RESULTS, placed


class Built(NamedTuple):
    """One trained dictionary."""

    dictionary: str
    """Name in the suite."""
    hook_point: str
    folder: Path
    trained_now: bool
    """False where it was there already."""
    details: dict[str, Any]
    """How it came to be: settings, and FVU, L0 and dead share at the end."""

    def row(self) -> dict[str, Any]:
        """A row of ``report.views.training.training_table``; None for what an older evalkit did not note."""
        end = self.details.get("end", {})
        measures = {key: end.get(key) for key in ("fvu", "l0", "dead_share")}
        more = {key: self.details.get(key) for key in ("tokens_per_second", "together")}
        more["features"] = self.details["trained"]["features"]
        return {"dictionary": self.dictionary, "hook_point": self.hook_point, "folder": self.folder, **measures, **more}


class TrainOutcome(NamedTuple):
    """How ``train_suite`` ended."""

    run_id: str
    status: str
    """'done', 'partial' or 'interrupted'."""
    exit_code: int
    message: str
    """What happened, and the command that goes on."""
    store: Path
    built: list[Built]


def train_suite(
    suite: Path | str,
    results: Path | str = DEFAULT_RESULTS,
    *,
    only: str | None = None,
    progress: Progress | None = None,
) -> TrainOutcome:
    """Train the dictionaries of a suite, or go on with it.

    Args:
        suite: path of a suite file.
        results: the DuckDB file; journals, caches and dictionaries lie beside it.
        only: one trained dictionary by name.
        progress: where stages are shown; quiet by default.

    Raises:
        UsageError: suite, model or text cannot be used, or it trains no dictionary. Nothing was started.
        StoreError: the results file is damaged or not ours.
    """
    loaded = load_suite(suite, train_only=True)
    specs = _chosen(loaded, only)
    again = ["evalkit train", shlex.quote(str(suite)), "--results", shlex.quote(str(results))]
    again += ["--only", shlex.quote(only)] if only else []
    return _Training(loaded, placed(results), progress or Progress(quiet=True)).carry_out(specs, " ".join(again))


def _chosen(suite: Suite, only: str | None) -> list[DictionarySpec]:
    specs = [spec for spec in suite.dictionaries if spec.source == "train"]
    if not specs:
        raise SuiteError(
            "the suite trains no dictionary",
            where=str(suite.path),
            fix='add a [[dictionary]] with train = { architecture = "topk" }',
        )
    names = [spec.name for spec in specs]
    if only is not None and only not in names:
        raise UsageError(f"the suite trains no dictionary called '{only}'", where="--only", fix=near_miss(only, names))
    return [spec for spec in specs if only in (None, spec.name)]


class _Training:
    def __init__(self, suite: Suite, store: Path, progress: Progress) -> None:
        self.suite, self.store, self.progress = suite, store, progress
        self.run_id = f"{slug(suite.suite.name)}-train-{suite_hash(suite)[:8]}"
        self.recorder = Recorder(self.run_id, suite, store, progress)
        self.built: list[Built] = []
        self.failed: list[str] = []
        self.reasons: list[UnitFailed] = []
        self.said: set[str] = set()

    def carry_out(self, specs: list[DictionarySpec], again: str) -> TrainOutcome:
        """Train what is missing. ``again`` is the command that goes on with it."""
        self.recorder.writer.check()
        check_log(self.suite)
        with Workbench(self.suite, self.store.parent, self.progress, self.recorder.training_step) as bench:
            bench.dictionaries.wanted = frozenset(spec.name for spec in specs)
            _ = bench.inputs.streamed if self.suite.training.stream else bench.inputs.texts
            self.recorder.status("started")
            try:
                for hook_point in self.suite.hook_points:
                    for spec in specs:
                        self._one(bench, spec, hook_point)
            except KeyboardInterrupt:
                self.recorder.end("interrupted", bench)
                return self._outcome("interrupted", 130, f"interrupted; go on with: {again}")
            except DiskFull as error:
                self.recorder.end("partial", bench, after_error=True)
                return self._outcome("partial", 5, f"{error}\n  go on with: {again}")
            except Exception:
                self.recorder.end("failed", bench, after_error=True)
                raise
            self.recorder.end("partial" if self.failed else "done", bench)
        if self.recorder.locked:
            return self._outcome("partial", 5, self.recorder.how_to_unlock)
        if self.failed:
            tried = len(self.failed) + len(self.built)
            why = f"{len(self.reasons)} of {tried} dictionaries were not trained"
            if self.progress.quiet:  # the reasons were not said while it trained
                why = reasons(self.reasons, tried, "dictionaries were not trained", "")
            return self._outcome("partial", 4, f"{why}\n  not trained: {', '.join(self.failed)}\n  try them again with: {again}")
        return self._outcome("done", 0, "")

    def _one(self, bench: Workbench, spec: DictionarySpec, hook_point: str) -> None:
        failure = None
        try:
            with disk_guard(self.store.parent):
                there = (
                    bench.dictionaries.is_built(spec, hook_point)
                    and (spec.name, hook_point) not in bench.dictionaries.trained_now
                )
                dictionary: Dictionary = bench.dictionaries.get(spec, hook_point)
        except Exception as error:
            if not fails_one_unit(error):
                raise
            failure = as_unit_failed(error)
        if failure is not None:
            self.failed.append(f"'{spec.name}' at {hook_point}")
            self.reasons.append(failure)
            if str(failure) not in self.said:  # one cause may have ended many
                self.progress.say(f"failed: {failure}")
            self.said.add(str(failure))
            return
        folder = bench.dictionaries.recipe_folder(spec, hook_point)
        self.built.append(Built(spec.name, hook_point, folder, not there, dictionary.details))
        self.recorder.dictionary(dictionary)
        self.recorder.ingest()

    def _outcome(self, status: str, exit_code: int, message: str) -> TrainOutcome:
        return TrainOutcome(self.run_id, status, exit_code, message, self.store, self.built)
