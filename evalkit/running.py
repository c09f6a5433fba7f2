"""Run a suite: every unit once, each finished one kept, whatever happens next.

1. Load the suite and check all that can be checked before work starts: packaged assets, model, hook points, text, judge.
2. The run's folder is named by the suite's contents, so the same suite finds its own journal again. Units whose key is
   finished in any journal of the results folder are taken over, not run again.
3. Each unit's rows go to the journal as one durable record, then into DuckDB. A locked DuckDB file stops nothing: the
   journal is the truth and the file is brought up to date at the end, or by ``evalkit rebuild``.
4. A unit that fails is recorded and the others go on. A spent budget, an interrupt or a judge that went away ends the run
   with everything finished kept; the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

import evalkit
from evalkit.bench import Workbench, slug
from evalkit.errors import BudgetReached, JudgeCallFailed, JudgeSetupError, StoreLocked, UnitFailed
from evalkit.evaluations.base import EVALUATIONS
from evalkit.hashing import content_hash
from evalkit.planning import PlannedUnit, Unit, plan, unit_key, units
from evalkit.progress import Progress, clock
from evalkit.store.journal import Journal
from evalkit.store.writer import Writer
from evalkit.suite import Suite, load_suite

DEFAULT_RESULTS = Path("results/evalkit.duckdb")

PACKAGES = ("evalkit", "torch", "transformers", "transformer-lens", "scikit-learn", "numpy", "duckdb", "openai", "gguf")


class Outcome(NamedTuple):
    """How a run ended."""

    run_id: str
    status: str
    """'done', 'partial', 'budget', 'interrupted' or 'limited'."""
    exit_code: int
    message: str
    """What happened, where the work is, how to go on."""
    store: Path
    done: int
    reused: int
    failed: int


def run(
    suite: Path | str,
    results: Path | str = DEFAULT_RESULTS,
    *,
    only: str | None = None,
    limit: int | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Run, or go on with, a suite.

    Args:
        suite: path of a suite file.
        results: the DuckDB file; journals, caches and dictionaries lie beside it.
        only: one evaluation or dictionary by name.
        limit: run at most this many units now.
        fresh: measure again, beside what is there; judge calls are never bought twice all the same.
        progress: where stages are shown; quiet by default.

    Raises:
        UsageError: suite, model, text or judge cannot be used. Nothing was started.
        StoreError: the results file is damaged or not ours.
    """
    loaded = load_suite(suite)
    work = units(loaded, only)
    return _Run(loaded, Path(results), progress or Progress(quiet=True), fresh).carry_out(work, limit)


def make_plan(
    suite: Path | str, results: Path | str = DEFAULT_RESULTS, *, only: str | None = None, progress: Progress | None = None
) -> list[PlannedUnit]:
    """Every unit of a suite with whether it is done and what it may cost. Runs nothing."""
    loaded = load_suite(suite)
    folder = Path(results).parent
    with Workbench(loaded, folder, progress or Progress(quiet=True)) as bench:
        return plan(bench, finished_units(folder), only)


def finished_units(folder: Path) -> dict[str, dict[str, Any]]:
    """Unit keys finished in any journal of the results folder, with their rows."""
    finished: dict[str, dict[str, Any]] = {}
    for journal in sorted((folder / "runs").glob("*/journal.jsonl")):
        finished.update(Journal(journal.parent).finished())
    return finished


def suite_hash(suite: Suite) -> str:
    """Hash of everything a suite says; comments and layout do not count."""
    fields = {f.name: getattr(suite, f.name) for f in dataclasses.fields(suite) if f.name not in ("path", "text")}
    return content_hash(fields)


class _Run:
    def __init__(self, suite: Suite, store: Path, progress: Progress, fresh: bool) -> None:
        self.suite, self.store, self.progress = suite, store, progress
        self.folder = store.parent
        self.run_id = f"{slug(suite.suite.name)}-{suite_hash(suite)[:8]}"
        self.salt = ""
        if fresh:
            number = 2
            while (self.folder / "runs" / f"{self.run_id}-{number}").exists():
                number += 1
            self.run_id = self.salt = f"{self.run_id}-{number}"
        self.writer = Writer(store)
        self.journal = Journal(self.folder / "runs" / self.run_id)
        self.done = self.reused = self.failed = 0
        self.store_locked = False

    def carry_out(self, work: list[Unit], limit: int | None) -> Outcome:
        again = f"evalkit run {self.suite.path} --results {self.store}"
        with Workbench(self.suite, self.folder, self.progress) as bench:
            self._check_first(bench)
            self._start()
            try:
                finished = finished_units(self.folder)
                ended = self._all(bench, work, finished, limit)
            except KeyboardInterrupt:
                self._end("interrupted", bench)
                return self._outcome("interrupted", 130, f"interrupted; go on with: {again}")
            except BudgetReached as error:
                self._end("budget", bench)
                return self._outcome("budget", 3, f"{error}\n  go on with: {again}")
            except JudgeSetupError as error:
                self._end("partial", bench)
                return self._outcome("partial", 4 if self.done or self.reused else 2, f"{error}\n  go on with: {again}")
            self._end("partial" if self.failed else ended, bench)
        if self.store_locked:
            message = (
                f"all rows are in {self.journal.path}, but {self.store} is held by another process\n"
                f"  to do: close it, then: evalkit rebuild --results {self.store}"
            )
            return self._outcome("partial", 5, message)
        if self.failed:
            return self._outcome("partial", 4, f"{self.failed} of {len(work)} units failed; try them again with: {again}")
        if ended == "limited":
            return self._outcome("limited", 0, f"stopped after --limit {limit}; go on with: {again}")
        return self._outcome("done", 0, "")

    def _check_first(self, bench: Workbench) -> None:
        """Everything that can be refused is refused before the run leaves a trace."""
        self.writer.check()
        for config in (self.suite.judge, *self.suite.references):
            bench.judge(config)
        for spec in self.suite.dictionaries:
            if spec.source == "import":
                for hook_point in self.suite.hook_points:
                    bench.dictionary(spec, hook_point)
        _ = bench.texts

    def _start(self) -> None:
        self._status("started")
        rows = []
        for spec in self.suite.evaluations:
            evaluation = EVALUATIONS.get(spec.name)
            for position, (key, metric) in enumerate(evaluation.metrics.items()):
                rows.append(
                    {
                        "evaluation": spec.name, "evaluation_version": evaluation.version, "metric": key,
                        "position": position, "title": metric.title, "better": metric.better, "chance": metric.chance,
                        "null_metric": metric.null, "transform": metric.transform, "has_interval": metric.interval,
                        "digits": metric.digits, "main": metric.main, "note": metric.note,
                    }
                )  # fmt: skip
        self.journal.write_rows("metrics", rows)

    def _all(self, bench: Workbench, work: list[Unit], finished: dict[str, Any], limit: int | None) -> str:
        started = 0
        here = self.journal.finished()
        for unit in work:
            key = unit_key(unit, bench, self.salt)
            if key in here:
                self.reused += 1
                continue
            if key in finished:
                row = self._unit_row(unit, key, bench) | {"status": "done", "seconds": finished[key]["seconds"]}
                self.journal.write_rows("units", [row])
                self.reused += 1
                continue
            if limit is not None and started >= limit:
                return "limited"
            started += 1
            self._one(unit, key, bench)
        return "done"

    def _one(self, unit: Unit, key: str, bench: Workbench) -> None:
        row = self._unit_row(unit, key, bench)
        dictionary = bench.dictionary(unit.dictionary, unit.hook_point)
        self.progress.say(f"{unit.evaluation.name}: {unit.dictionary.name} at {unit.hook_point}")
        began = time.monotonic()
        try:
            result = EVALUATIONS.get(unit.evaluation.name)().run(bench.at(unit.hook_point), dictionary, unit.evaluation.settings)
        except (UnitFailed, JudgeCallFailed) as error:
            self.failed += 1
            self._calls(bench)
            self.journal.write_rows("units", [row | {"status": "failed", "error": str(error), "seconds": None}])
            self.progress.say(f"failed: {error}")
            return
        self._calls(bench)
        identity = dictionary.identity
        self.journal.write_rows(
            "dictionaries",
            [
                {
                    "dictionary_id": identity.hash, "kind": identity.kind, "hook_point": identity.hook_point,
                    "model": identity.model, "d_in": dictionary.d_in, "n_features": dictionary.n_features,
                    "details": json.dumps(dictionary.details),
                }
            ],
        )  # fmt: skip
        seconds = time.monotonic() - began
        scores = [score._asdict() for score in result.scores]
        self.journal.write_unit(row | {"status": "done", "seconds": seconds}, scores, result.tables)
        self.done += 1
        self._ingest()
        self.progress.say(f"{unit.evaluation.name}: {unit.dictionary.name}: done in {clock(seconds)}")

    def _unit_row(self, unit: Unit, key: str, bench: Workbench) -> dict[str, Any]:
        evaluation = EVALUATIONS.get(unit.evaluation.name)
        judge = bench.at(unit.hook_point).judge if evaluation.needs_judge else None
        return {
            "unit_key": key, "run_id": self.run_id, "evaluation": unit.evaluation.name,
            "evaluation_version": evaluation.version, "dictionary": unit.dictionary.name,
            "dictionary_id": bench.dictionary(unit.dictionary, unit.hook_point).identity.hash,
            "hook_point": unit.hook_point, "seed": self.suite.suite.seed, "judge": judge.label if judge else None,
            "config": json.dumps(dataclasses.asdict(unit.evaluation.settings)), "status": "", "error": None,
            "seconds": None, "at": _now(),
        }  # fmt: skip

    def _calls(self, bench: Workbench) -> None:
        rows = [row | {"run_id": self.run_id} for row in bench.drain_calls()]
        if rows:
            self.journal.write_rows("judge_calls", rows)

    def _ingest(self) -> None:
        if self.store_locked:
            return
        try:
            self.writer.ingest(self.journal)
        except StoreLocked as error:
            self.store_locked = True
            self.progress.say(f"{error.what}; going on with the journal alone")

    def _status(self, status: str) -> None:
        self.journal.write_rows(
            "runs",
            [
                {
                    "run_id": self.run_id, "suite": self.suite.suite.name, "status": status, "at": _now(),
                    "evalkit_version": evalkit.__version__, "packages": json.dumps(_packages()),
                    "machine": json.dumps(_machine()), "suite_toml": self.suite.text,
                }
            ],
        )  # fmt: skip

    def _end(self, status: str, bench: Workbench) -> None:
        self._calls(bench)
        self._status(status)
        self.store_locked = False
        self._ingest()

    def _outcome(self, status: str, exit_code: int, message: str) -> Outcome:
        return Outcome(self.run_id, status, exit_code, message, self.store, self.done, self.reused, self.failed)


def _now() -> str:
    return datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="milliseconds")


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
