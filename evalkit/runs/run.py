"""Run a suite: every unit once, each finished one kept, whatever happens next.

1. Load the suite and check all that can be checked before work starts: packaged assets, model, hook points, text, judge.
2. The run's folder is named by the suite's contents, so the same suite finds its own journal again. Units whose key is
   finished in any journal of the results folder are taken over, not run again.
3. Each unit's rows go to the journal as one durable record, then into DuckDB. A locked DuckDB file stops nothing: the
   journal is the truth and the file is brought up to date at the end, or by ``evalkit rebuild``.
4. A unit that fails by whatever exception, or whose dictionary cannot be built, is recorded with it, the others go on, and
   the next start tries it again. A unit with failed judge calls is kept with its missing values and measured again by the
   next start, which asks only the calls that failed. A spent budget, an interrupt, a full disk or a judge that went away
   ends the run with everything finished kept; the same command goes on.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evalkit.dictionaries.base import Dictionary
from evalkit.errors import (
    BudgetReached,
    DiskFull,
    JudgeSetupError,
    UnitFailed,
    as_unit_failed,
    fails_one_unit,
)
from evalkit.evaluations.base import EVALUATIONS
from evalkit.judges.config import JudgeConfig, in_key
from evalkit.runs.dictionary_builder import slug
from evalkit.runs.plan import Estimate, PlannedUnit, Unit, estimate, plan, unbuilt_key, unit_key, units, untried_key
from evalkit.runs.recorder import Recorder, now
from evalkit.runs.workbench import Workbench
from evalkit.store.journal import Journal
from evalkit.suite import Suite, load_suite
from evalkit.training.loop.loggers import library
from evalkit.util.disk import disk_guard
from evalkit.util.hashing import content_hash
from evalkit.util.progress import Progress, clock
from evalkit.util.user_files import DEFAULT_RESULTS, placed

MOST_REASONS = 5
"""Reasons for failed units that the end of a run names."""


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
    words = ["evalkit run", shlex.quote(str(suite)), "--results", shlex.quote(str(results))]
    words += ["--only", shlex.quote(only)] if only else []
    words += ["--fresh"] if fresh else []
    return _Run(loaded, placed(results), progress or Progress(quiet=True), fresh).carry_out(work, " ".join(words), limit)


class Plan(NamedTuple):
    """What a run would do."""

    units: list[PlannedUnit]
    estimate: Estimate
    suite: Suite


def make_plan(
    suite: Path | str, results: Path | str = DEFAULT_RESULTS, *, only: str | None = None, progress: Progress | None = None
) -> Plan:
    """Every unit of a suite with whether it is done, and what those that are not may cost at most. Runs nothing."""
    loaded = load_suite(suite)
    folder = placed(results).parent
    with Workbench(loaded, folder, progress or Progress(quiet=True)) as bench:
        planned = plan(bench, finished_units(folder), only)
        return Plan(planned, estimate(planned, bench), loaded)


def finished_units(folder: Path) -> dict[str, dict[str, Any]]:
    """Unit keys whose facts are in a journal of the results folder, with their rows."""
    finished: dict[str, dict[str, Any]] = {}
    for journal in sorted((folder / "runs").glob("*/journal.jsonl")):
        finished.update(Journal(journal.parent).measured())
    return finished


NO_MATTER_IN_TRAINING = ("shards", "checkpoint_s", "log")
"""Settings of [training] that change no weight beyond rounding."""


def suite_hash(suite: Suite) -> str:
    """Hash of everything in a suite that can change a number; comments, layout, budgets and time-outs do not count."""
    fields = {f.name: getattr(suite, f.name) for f in dataclasses.fields(suite) if f.name not in ("path", "text", "training")}
    fed = {key: value for key, value in dataclasses.asdict(suite.training).items() if key not in NO_MATTER_IN_TRAINING}
    if fed["stream"]:
        fields["training"] = fed

    def answers(judge: JudgeConfig | None) -> dict[str, Any]:
        return in_key(judge) if judge else {}

    return content_hash(fields | {"judge": answers(suite.judge), "references": [answers(r) for r in suite.references]})


class _Run:
    def __init__(self, suite: Suite, store: Path, progress: Progress, fresh: bool) -> None:
        self.suite, self.store, self.progress = suite, store, progress
        self.folder = store.parent
        self.run_id = f"{slug(suite.suite.name)}-{suite_hash(suite)[:8]}"
        self.salt = ""
        if fresh:
            number = 2
            while self._last_status(f"{self.run_id}-{number}") == "done":
                number += 1
            self.run_id = self.salt = f"{self.run_id}-{number}"
        self.recorder = Recorder(self.run_id, suite, store, progress)
        self.journal = self.recorder.journal
        self.done = self.reused = self.missing = 0
        self.failures: list[UnitFailed] = []

    def _last_status(self, run_id: str) -> str:
        rows = [row for r in Journal(self.folder / "runs" / run_id).records() if r.get("table") == "runs" for row in r["rows"]]
        return str(rows[-1]["status"]) if rows else ""

    def carry_out(self, work: list[Unit], again: str, limit: int | None) -> Outcome:
        """Do the work. ``again`` is the command that goes on with it."""
        with Workbench(self.suite, self.folder, self.progress, self.recorder.training_step, self.run_id) as bench:
            bench.dictionaries.wanted = frozenset(unit.dictionary.name for unit in work)
            self._check_first(bench)
            self._start(bench)
            try:
                ended = self._all(bench, work, limit)
            except KeyboardInterrupt:
                self.recorder.end("interrupted", bench)
                return self._outcome("interrupted", 130, f"interrupted; go on with: {again}")
            except BudgetReached as error:
                self.recorder.end("budget", bench)
                return self._outcome("budget", 3, f"{error}\n  go on with: {again}")
            except JudgeSetupError as error:
                self.recorder.end("partial", bench)
                return self._outcome("partial", 4 if self.done or self.reused else 2, f"{error}\n  go on with: {again}")
            except DiskFull as error:
                self.recorder.end("partial", bench, after_error=True)
                return self._outcome("partial", 5, f"{error}\n  go on with: {again}")
            except Exception:
                self.recorder.end("failed", bench, after_error=True)
                raise
            self.recorder.end("partial" if self.failures or self.missing else ended, bench)
        if self.recorder.locked:
            return self._outcome("partial", 5, self.recorder.how_to_unlock)
        if self.failures:
            return self._outcome("partial", 4, f"{reasons(self.failures, len(work))}\n  try them again with: {again}")
        if self.missing:
            message = f"{self.missing} units miss scores because judge calls failed; only those are asked again with: {again}"
            return self._outcome("partial", 4, message)
        if ended == "limited":
            return self._outcome("limited", 0, f"stopped after --limit {limit}; go on with: {again}")
        return self._outcome("done", 0, "")

    def _check_first(self, bench: Workbench) -> None:
        """Everything that can be refused is refused before the run leaves a trace."""
        self.recorder.writer.check()
        check_log(self.suite)
        for config in (self.suite.judge, *self.suite.references):
            judge = bench.judge(config)
            if judge is not None:
                _ = judge.identity  # an endpoint whose ways are not known yet is asked once: it is down or refuses now, not later
        for spec in self.suite.dictionaries:
            if spec.source == "import":
                for hook_point in self.suite.hook_points:
                    bench.dictionaries.get(spec, hook_point)
        _ = bench.inputs.texts

    def _start(self, bench: Workbench) -> None:
        self.recorder.calls(bench)  # those of a killed start, kept by the judge until now
        spent = [row for r in self.journal.records() if r.get("table") == "judge_calls" for row in r["rows"]]
        for config in (self.suite.judge, *self.suite.references):
            judge = bench.judge(config)
            if judge is None:
                continue
            own = [row for row in spent if row["judge"] in judge.models]
            unknown = [row["call_key"] for row in own if None in (row["prompt_tokens"], row["completion_tokens"])]
            known = [row for row in own if None not in (row["prompt_tokens"], row["completion_tokens"])]
            judge.charge(sum(row["prompt_tokens"] for row in known), sum(row["completion_tokens"] for row in known), unknown)
        self.recorder.status("started")
        rows = []
        for spec in self.suite.evaluations:
            evaluation = EVALUATIONS.get(spec.name)
            metrics = evaluation.described([config.name for config in self.suite.references])
            for position, (key, metric) in enumerate(metrics.items()):
                rows.append(
                    {
                        "evaluation": spec.name, "evaluation_version": evaluation.version, "metric": key,
                        "position": position, "title": metric.title, "better": metric.better, "chance": metric.chance,
                        "null_metric": metric.null, "transform": metric.transform, "has_interval": metric.interval,
                        "digits": metric.digits, "main": metric.main, "note": metric.note, "flag_below": metric.flag_below,
                        "flag": metric.flag, "lowest": metric.lowest, "highest": metric.highest,
                    }
                )  # fmt: skip
        self.journal.write_rows("metrics", rows)

    def _all(self, bench: Workbench, work: list[Unit], limit: int | None) -> str:
        started = 0
        finished = finished_units(self.folder)
        here = self.journal.finished()
        for unit in work:
            row = self._unit_row(unit, unbuilt_key(unit, self.run_id), None, None)
            failure = None
            try:
                with disk_guard(self.folder):
                    key = untried_key(unit_key(unit, bench, self.salt), finished)
                    dictionary = bench.dictionaries.get(unit.dictionary, unit.hook_point)
                    row = self._unit_row(unit, key, dictionary, self._judge_label(unit, bench))
                    if key in finished:
                        if key not in here:
                            self.journal.write_rows("units", [row | {"status": "done", "seconds": finished[key]["seconds"]}])
                        self.reused += 1
                        continue
                    if limit is not None and started >= limit:
                        return "limited"
                    started += 1
                    finished[key] = self._one(unit, row, bench, dictionary)
            except Exception as error:
                if not fails_one_unit(error):
                    raise
                failure = as_unit_failed(error)
            # outside the handler: what the exception held in memory is free again
            if failure is not None:
                self.recorder.calls(bench)
                self._fail(row, failure)
            else:
                self.recorder.ingest()
        return "done"

    def _one(self, unit: Unit, row: dict[str, Any], bench: Workbench, dictionary: Dictionary) -> dict[str, Any]:
        """Measure ``unit`` and record it; its row."""
        self.progress.say(f"{unit.evaluation.name}: {unit.dictionary.name} at {unit.hook_point}")
        began = time.monotonic()
        result = EVALUATIONS.get(unit.evaluation.name)().run(
            bench.at(unit.hook_point, unit.dictionary.name), dictionary, unit.evaluation.settings
        )
        self.recorder.calls(bench)
        self.recorder.dictionary(dictionary)
        seconds = time.monotonic() - began
        scores = [score._asdict() for score in result.scores]
        missing = sum(score.status == "failed" for score in result.scores)
        row = row | {"status": "done", "seconds": seconds, "error": f"{missing} scores failed" if missing else None}
        self.journal.write_unit(row, scores, result.tables)
        self.done += 1
        self.missing += bool(missing)
        self.progress.say(f"{unit.evaluation.name}: {unit.dictionary.name}: done in {clock(seconds)}")
        return row

    def _fail(self, row: dict[str, Any], error: UnitFailed) -> None:
        self.failures.append(error)
        self.journal.write_rows("units", [row | {"status": "failed", "error": str(error)}])
        self.progress.say(f"failed: {row['evaluation']}: {row['dictionary']} at {row['hook_point']}: {error}")

    def _judge_label(self, unit: Unit, bench: Workbench) -> str | None:
        asked = EVALUATIONS.get(unit.evaluation.name)().asks(unit.evaluation.settings)
        judge = bench.at(unit.hook_point).judge if asked else None
        return judge.label if judge else None

    def _unit_row(self, unit: Unit, key: str, dictionary: Dictionary | None, judge: str | None) -> dict[str, Any]:
        return {
            "unit_key": key, "run_id": self.run_id, "evaluation": unit.evaluation.name,
            "evaluation_version": EVALUATIONS.get(unit.evaluation.name).version, "dictionary": unit.dictionary.name,
            "dictionary_id": dictionary.identity.hash if dictionary else None,
            "hook_point": unit.hook_point, "seed": self.suite.seed, "judge": judge,
            "config": json.dumps(dataclasses.asdict(unit.evaluation.settings)), "status": "", "error": None,
            "seconds": None, "at": now(),
        }  # fmt: skip

    def _outcome(self, status: str, exit_code: int, message: str) -> Outcome:
        return Outcome(self.run_id, status, exit_code, message, self.store, self.done, self.reused, len(self.failures))


def reasons(
    failures: Sequence[UnitFailed], total: int, what: str = "units failed", more_in: str = ": evalkit show failures"
) -> str:
    """Why units (or what is ``what``) failed, each reason once.

    One reason of all is given in full, of several the most frequent ones in a line each.
    """
    counts = Counter(str(failure) for failure in failures)
    said = f"{len(failures)} of {total} {what}"
    if len(counts) == 1:
        return f"{next(iter(counts))}\n{said}"
    lines = [f"  {count}: {reason.splitlines()[0]}" for reason, count in counts.most_common(MOST_REASONS)]
    more = len(counts) - len(lines)
    return "\n".join([f"{said}:", *lines, *([f"  and {more} other reasons{more_in}"] if more else [])])


def check_log(suite: Suite) -> None:
    """Raise UsageError where the suite's trainings are to be logged by a library that is not installed."""
    if suite.training.log and any(spec.source == "train" for spec in suite.dictionaries):
        library(suite.training.log)
