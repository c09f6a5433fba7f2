"""Reading the results file: tables, comparisons, plain SQL.

1. Every question opens the file for reading, asks, and closes it: an open notebook never holds up a run.
2. Where a run keeps the file locked, or the file is not there or of an older layout, the journals beside it are read into
   memory instead, and ``note`` says so.
3. Tables and comparisons are of the latest run that has the evaluation, unless a run is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb
import pandas as pd

from evalkit.activations.facts import disagreements, norm_notes, short_notes
from evalkit.dictionaries.provenance import named_remarks
from evalkit.errors import StoreAbsent, StoreLocked, StoreUnreadable, UsageError
from evalkit.store.connection import connect, damaged
from evalkit.store.fits import MEASURED as fit_query
from evalkit.store.fits import fit_notes
from evalkit.store.frames import unmasked
from evalkit.store.journal import journals
from evalkit.store.migrations import columns, facts, migrate, migrations, version
from evalkit.store.scores import Side, comparison, score_table, source_table, text_of
from evalkit.store.seeds import families
from evalkit.store.sparsity import MEASURED, Sparsity, sparsity
from evalkit.store.writer import ingest
from evalkit.util.registry import near_miss
from evalkit.util.user_files import placed

DAMAGED = (duckdb.FatalException, duckdb.InternalException, duckdb.SerializationException)
"""What DuckDB raises whatever the query, where the file does not hold what it should."""
UNIT_SCORES = """
    SELECT u.run_id, u.evaluation, u.evaluation_version, u.dictionary, u.dictionary_id, u.hook_point, u.config,
           u.seed AS unit_seed, s.metric, s.kind, s.item, s.cluster, s.value, s.weight, s.status, s.n, s.seed, s.source
    FROM run_units u JOIN scores s ON s.unit_key = u.unit_key
    WHERE u.status = 'done'
"""


def open_results(path: Path | str, *, wait: float = 5.0) -> Results:
    """The results file at ``path``, ready for questions.

    Args:
        path: the DuckDB file.
        wait: seconds to wait for a process that holds it, before the journals are read instead.

    Raises:
        StoreUnreadable: it is damaged, foreign or newer than this evalkit.
        StoreAbsent, StoreLocked: it is not there, or held, and there are no journals beside it.
    """
    return Results(placed(path), wait)


class Results:
    """Answers about one results file, each a pandas DataFrame. Made by ``open_results``."""

    def __init__(self, path: Path, wait: float) -> None:
        self.path, self._wait = path, wait
        self.note = ""
        """What a reader should know about where the numbers come from; '' where it is the file."""
        self._memory: duckdb.DuckDBPyConnection | None = None
        connection = self._connect()
        if connection is not self._memory:
            connection.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free what is held in memory."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _connect(self) -> duckdb.DuckDBPyConnection:
        if self._memory is not None:
            return self._memory
        try:
            connection = connect(self.path, read_only=True, wait=self._wait)
        except (StoreLocked, StoreAbsent) as error:
            return self._from_journals(error)
        try:
            current = version(connection, self.path)
        except StoreUnreadable:
            connection.close()
            raise
        if current == migrations()[-1].number:
            return connection
        connection.close()
        what = f"the results file has layout {current}, older than this evalkit's {migrations()[-1].number}"
        return self._from_journals(StoreUnreadable(what, where=str(self.path), fix="evalkit rebuild"))

    def _from_journals(self, reason: StoreLocked | StoreUnreadable) -> duckdb.DuckDBPyConnection:
        found = journals(self.path.parent)
        if not found:
            raise reason
        memory = duckdb.connect(":memory:")
        migrate(memory, 0)
        for journal in found:
            ingest(memory, journal)
        self.note = f"{reason.what}; read from the {len(found)} journals in {self.path.parent / 'runs'} instead"
        self._memory = memory
        return memory

    def _ask(self, query: str, params: Any = None) -> pd.DataFrame:
        connection = self._connect()
        try:
            return unmasked(connection.execute(query, params).df())
        finally:
            if connection is not self._memory:
                connection.close()

    def own(self, query: str, params: Any = None) -> pd.DataFrame:
        """What one of evalkit's own queries returns.

        Raises:
            StoreUnreadable: it fails, which it does only where the file is damaged.
        """
        try:
            return self._ask(query, params)
        except duckdb.Error as error:
            raise damaged(self.path, error) from error

    def sql(self, query: str, params: Any = None) -> pd.DataFrame:
        """What ``query`` returns. The column "at" must be quoted: the word is DuckDB's.

        Raises:
            UsageError: DuckDB refuses the query.
            StoreUnreadable: the file is damaged.
        """
        try:
            return self._ask(query, params)
        except DAMAGED as error:
            raise damaged(self.path, error) from error
        except duckdb.Error as error:
            raise UsageError(f"the query failed: {error}", where=query.strip(), fix="correct the query") from error

    def run_id(self, name: str | None = None) -> str:
        """The run that ``name``, a run_id or a suite, stands for; the latest one where it is None.

        Raises:
            UsageError: there is no such run, or none at all.
        """
        known = self.own("SELECT run_id FROM run_states ORDER BY last_at DESC, run_id")["run_id"]
        if known.empty:
            raise UsageError("there is no run yet", where=str(self.path), fix="evalkit run SUITE")
        return str(known.iloc[0]) if name is None else self._run(name, known)

    def evaluations(self, run: str | None = None) -> list[str]:
        """Evaluations that have a finished unit, in the order they were first run; of ``run`` alone where it is named.

        Raises:
            UsageError: there is no such run.
        """
        units = self.own("SELECT run_id, evaluation FROM run_units WHERE status = 'done' ORDER BY unit_order")
        if run is not None:
            units = units[units["run_id"] == self.run_id(run)]
        return list(dict.fromkeys(units["evaluation"]))

    def table(self, name: str, run: str | None = None, *, sources: bool = False) -> pd.DataFrame:
        """Scores of the evaluation ``name``: one row for each dictionary, hook point and metric, in the run's order.

        Args:
            name: name of an evaluation.
            run: run_id, or a suite name for its latest run; the default is the latest run that has the evaluation.
            sources: also rows for each source of text, before the row over all of it; their column ``source`` names it.

        Returns:
            mean, low and high (95%), n ok scores, failed, undefined, chance, null_mean, null_low, null_high, judge and
            what tables need to show them; columns ``evalkit.store.scores.TABLE_COLUMNS``.

        Raises:
            UsageError: there is no such evaluation or run.
        """
        units = self._units(name, run)
        scores = self.own(f"{UNIT_SCORES} AND u.run_id = ? AND u.evaluation = ?", [units["run_id"].iloc[0], name])
        metrics = self.own("SELECT * FROM metric_descriptions WHERE evaluation = ?", [name])
        kinds = self.own("SELECT dictionary_id, kind, details FROM dictionaries")
        of_kind = dict(zip(kinds["dictionary_id"], kinds["kind"], strict=True))
        make = source_table if sources else score_table
        details = dict(zip(kinds["dictionary_id"], kinds["details"], strict=True))
        frame = make(units, scores, metrics, of_kind, self._l0(), families(details))
        pairs = ((name, details.get(key)) for name, key in zip(units["dictionary"], units["dictionary_id"], strict=True))
        of_unit = "SELECT * FROM dictionary_texts WHERE run_id = ? AND evaluation = ? ORDER BY unit_order"
        unlike = disagreements(self.own(of_unit, [units["run_id"].iloc[0], name]))
        texts = self.own("SELECT DISTINCT * FROM texts WHERE run_id = ? ORDER BY hook_point, side", [units["run_id"].iloc[0]])
        texts = texts[texts["hook_point"].isin(units["hook_point"])]
        read = [*short_notes(texts), *norm_notes(texts)]
        fits = fit_notes(name, self.own(fit_query, [units["run_id"].iloc[0]]))
        frame.attrs["notes"] = [*frame.attrs.get("notes", []), *fits, *named_remarks(pairs), *unlike, *read]
        return frame

    def features(self, evaluation: str, metric: str, run: str | None = None) -> pd.DataFrame:
        """Values of one metric feature by feature: one row for each dictionary, hook point, configuration and feature.

        Args:
            evaluation: name of an evaluation.
            metric: key of a metric that has feature scores.
            run: as for ``table``.

        Returns:
            run, evaluation, metric, dictionary, hook_point, config (JSON), feature, value (NaN where the status is not 'ok'),
            status, n (observations behind the value) and seed, in the order of the run.

        Raises:
            UsageError: there is no such evaluation or run, or the metric has no feature scores in it.
        """
        run_id = str(self._units(evaluation, run)["run_id"].iloc[0])
        of_run = "FROM run_units u JOIN scores s ON s.unit_key = u.unit_key WHERE u.status = 'done' AND s.kind = 'feature'"
        of_run += " AND u.run_id = ? AND u.evaluation = ?"
        known = set(self.own(f"SELECT DISTINCT s.metric {of_run}", [run_id, evaluation])["metric"])
        if metric not in known:
            what = f"'{evaluation}' has no feature scores called '{metric}' in run {run_id}"
            raise UsageError(what, where=str(self.path), fix=near_miss(metric, known) if known else "choose another evaluation")
        return self.own(
            "SELECT u.run_id AS run, u.evaluation, s.metric, u.dictionary, u.hook_point, u.config, s.item AS feature, s.value, "
            f"s.status, s.n, s.seed {of_run} AND s.metric = ? ORDER BY u.unit_order, s.item, s.seed",
            [run_id, evaluation, metric],
        )

    def rows(self, table: str, evaluation: str, run: str | None = None) -> pd.DataFrame:
        """Rows of a table of facts ('patching_curves', 'explanations') with what they are about.

        Args:
            table: a table whose rows belong to units.
            evaluation: name of an evaluation.
            run: as for ``table``.

        Returns:
            run, evaluation, dictionary, hook_point, config (JSON) and the columns of the table, in the order they were written.

        Raises:
            UsageError: there is no such table, evaluation or run.
        """
        if table not in facts():
            raise UsageError(f"there is no table of facts called '{table}'", where=str(self.path), fix=near_miss(table, facts()))
        run_id = str(self._units(evaluation, run)["run_id"].iloc[0])
        own = ", ".join(f't."{column}"' for column in columns()[table] if column != "unit_key")
        return self.own(
            f"SELECT u.run_id AS run, u.evaluation, u.dictionary, u.hook_point, u.config, {own} "
            f"FROM run_units u JOIN {table} t ON t.unit_key = u.unit_key "
            "WHERE u.status = 'done' AND u.run_id = ? AND u.evaluation = ? ORDER BY u.unit_order, t.rowid",
            [run_id, evaluation],
        )

    def _units(self, name: str, run: str | None) -> pd.DataFrame:
        """Units of the evaluation ``name`` in one run, in order: the run that ``run`` stands for, or the latest."""
        units = self.own("SELECT * FROM run_units ORDER BY unit_order")
        known = set(units["evaluation"])
        if not known:
            raise UsageError("there is no finished unit yet", where=str(self.path), fix="evalkit run SUITE")
        if name not in known:
            raise UsageError(f"there is no table called '{name}'", where=str(self.path), fix=near_miss(name, known))
        of_name = units[units["evaluation"] == name]
        if run is None:
            run_id = str(self.own("SELECT run_id FROM latest_runs WHERE evaluation = ?", [name])["run_id"].iloc[0])
        else:
            run_id = self._run(run, set(of_name["run_id"]), f"a run with '{name}'")
        return of_name[of_name["run_id"] == run_id]

    def _run(self, name: str, among: Iterable[str], noun: str = "a run") -> str:
        """run_id that ``name`` (a run_id or a suite) stands for among run_ids; the latest for a suite."""
        allowed = set(among)
        if name in allowed:
            return name
        states = self.own("SELECT run_id, suite FROM run_states ORDER BY last_at")
        states = states[states["run_id"].isin(allowed)]
        of_suite = states[states["suite"] == name]
        if of_suite.empty:
            known = allowed | set(states["suite"].dropna())
            raise UsageError(f"'{name}' is not the name of {noun}", where=str(self.path), fix=near_miss(name, known))
        return str(of_suite["run_id"].iloc[-1])

    def _l0(self) -> Sparsity:
        return sparsity(self.own(MEASURED))

    def compare(self, a: str, b: str | Sequence[str], evaluation: str | None = None, run: str | None = None) -> pd.DataFrame:
        """Difference a - b of every metric both have, with interval and corrected p.

        Args:
            a: a dictionary of the run, 'run:dictionary', or (if ``b`` is one too) a run, whose dictionaries are then
                compared with those of the same names.
            b: the other side, or several: p is corrected over all of them together.
            evaluation: only this one.
            run: run_id or suite of the dictionaries named without one; the default is the latest run.

        Returns:
            Columns ``evalkit.store.scores.COMPARE_COLUMNS``.

        Raises:
            UsageError: a name is unknown, or the two share no metric at one hook point.
        """
        units = self.own("SELECT run_id, evaluation, dictionary FROM run_units ORDER BY unit_order").drop_duplicates()
        states = self.own("SELECT run_id, suite_toml FROM run_states")
        if evaluation is not None and evaluation not in set(units["evaluation"]):
            fix = near_miss(evaluation, set(units["evaluation"]))
            raise UsageError(f"there is no evaluation called '{evaluation}'", where=str(self.path), fix=fix)
        if units.empty:
            raise UsageError("there is nothing to compare yet", where=str(self.path), fix="evalkit run SUITE")
        if run is None:
            default = str(self.own("SELECT run_id FROM latest_runs ORDER BY last_at")["run_id"].iloc[-1])
        else:
            default = self._run(run, set(units["run_id"]))
        texts = {str(i): text_of(toml) for i, toml in zip(states["run_id"], states["suite_toml"], strict=True)}
        others = [b] if isinstance(b, str) else list(dict.fromkeys(b))
        pairs = [pair for other in others for pair in self._pairs(a, other, units, default, texts)]
        runs = sorted({side.run for pair in pairs for side in pair})
        scores = self.own(f"{UNIT_SCORES} AND u.run_id IN (SELECT unnest(?)) ORDER BY u.unit_order", [runs])
        if evaluation is not None:
            scores = scores[scores["evaluation"] == evaluation]
        frame = comparison(pairs, scores, self.own("SELECT * FROM metric_descriptions"), self._l0())
        if frame.empty:
            within = f" in {evaluation}" if evaluation else ""
            named = "', '".join(others)
            what = f"'{a}' and '{named}' have no finished metric in common at one hook point{within}"
            raise UsageError(what, where=str(self.path), fix="run one evaluation with the same settings on both")
        return frame

    def _pairs(self, a: str, b: str, units: pd.DataFrame, default: str, texts: dict[str, str | None]) -> list[tuple[Side, Side]]:
        left, right = (self._side(name, units, default, texts) for name in (a, b))
        if left is not None and right is not None:
            if (left.run, left.dictionary) == (right.run, right.dictionary):
                raise UsageError(f"'{a}' and '{b}' are the same dictionary of the same run", fix="name two different ones")
            return [(left, right)]
        all_runs = set(units["run_id"])
        of_suites = set(self.own("SELECT suite FROM run_states")["suite"].dropna())
        if left is None and right is None and {a, b} <= all_runs | of_suites:
            one, two = self._run(a, all_runs), self._run(b, all_runs)
            names = [list(dict.fromkeys(units[units["run_id"] == run]["dictionary"])) for run in (one, two)]
            common = [name for name in names[0] if name in names[1]]
            if one == two or not common:
                what = f"runs '{a}' and '{b}' share no dictionary to compare"
                raise UsageError(what, fix="name dictionaries as run:dictionary")

            def side(run: str, name: str) -> Side:
                return Side(f"{run}:{name}", run, name, texts.get(run))

            return [(side(one, name), side(two, name)) for name in common]
        unknown = a if left is None else b
        known = set(units[units["run_id"] == default]["dictionary"])
        raise UsageError(
            f"there is no dictionary called '{unknown}' in run {default}",
            where=str(self.path),
            fix=f"{near_miss(unknown, known)}; of another run: run:dictionary",
        )

    def _side(self, name: str, units: pd.DataFrame, default: str, texts: dict[str, str | None]) -> Side | None:
        if name in set(units[units["run_id"] == default]["dictionary"]):
            return Side(name, default, name, texts.get(default))
        run_name, colon, dictionary = name.partition(":")
        if not colon:
            return None
        run = self._run(run_name, set(units["run_id"]))
        known = set(units[units["run_id"] == run]["dictionary"])
        if dictionary not in known:
            what = f"there is no dictionary called '{dictionary}' in run {run}"
            raise UsageError(what, where=str(self.path), fix=near_miss(dictionary, known))
        return Side(name, run, dictionary, texts.get(run))

    def latest_suite(self) -> str:
        """Text of the suite file of the latest run.

        Raises:
            UsageError: there is no run yet.
        """
        found = self.own("SELECT suite_toml FROM run_states WHERE suite_toml IS NOT NULL ORDER BY last_at DESC LIMIT 1")
        if found.empty:
            raise UsageError("there is no run yet", where=str(self.path), fix="evalkit run SUITE, or name a suite")
        return str(found["suite_toml"].iloc[0])

    def runs(self) -> pd.DataFrame:
        """Every run, latest first: state, times, units done and failed."""
        return self.own("SELECT * FROM run_list ORDER BY last_at DESC, run_id")

    def dictionaries(self) -> pd.DataFrame:
        """Every dictionary, with the names suites gave it."""
        return self.own("SELECT * FROM dictionary_list ORDER BY hook_point, names, dictionary_id")

    def training(self, recipes: Iterable[str] | None = None) -> pd.DataFrame:
        """How dictionaries learned: step, tokens, loss, FVU, L0, dead share and tokens a second, in order.

        Args:
            recipes: names of dictionary folders; every training in the file when left out.
        """
        order = "ORDER BY recipe, step" if recipes is None else "ORDER BY list_position($names, recipe), step"
        names = {} if recipes is None else {"names": list(recipes)}
        chosen = "" if recipes is None else "WHERE list_contains($names, recipe)"
        return self.own(f"SELECT * FROM training_curves {chosen} {order}", names or None)

    def curves(self, run: str | None = None) -> pd.DataFrame:
        """How the dictionaries that one run trained learned: the columns of ``training``, in the order they were begun.

        Args:
            run: run_id, or a suite name for its latest run; the default is the latest run that trained one.

        Raises:
            UsageError: nothing was trained, or there is no such run.
        """
        frame = self.own(
            "SELECT * FROM training_curves ORDER BY min(recorded_at) OVER (PARTITION BY recipe, hook_point), recipe, step"
        )
        if frame.empty:
            raise UsageError("there is no training to draw", where=str(self.path), fix="evalkit train SUITE")
        if run is None:
            run_id = str(frame["run_id"].iloc[int(frame["recorded_at"].to_numpy().argmax())])
        else:
            run_id = self._run(run, set(frame["run_id"]), "a run that trained a dictionary")
        return frame[frame["recipe"].isin(frame["recipe"][frame["run_id"] == run_id])].reset_index(drop=True)

    def texts(self) -> pd.DataFrame:
        """What text each run read, by side and hook point: tokens asked for and had, documents, and positions left out.

        Sides: 'fit', 'score', and 'stream' for text that trainers were streamed, whose single positions are not counted.
        """
        return self.own("SELECT DISTINCT * FROM texts ORDER BY run_id, hook_point, side, context")

    def failures(self) -> pd.DataFrame:
        """What failed and is missing: units, explanations, scores (counted by metric) and judge calls (by error).

        Explanations that were cut off are scored as they stand; they are listed with the others.
        """
        return self.own(
            "SELECT * FROM failure_list UNION ALL "
            "SELECT u.run_id, 'explanation cut, scored', u.evaluation, u.dictionary, u.hook_point, count(*), e.error "
            "FROM run_units u JOIN explanations e ON e.unit_key = u.unit_key "
            "WHERE e.status = 'ok' AND e.error <> '' AND u.status = 'done' "
            "GROUP BY u.run_id, u.evaluation, u.dictionary, u.hook_point, e.error "
            "ORDER BY run_id, what, dictionary, error"
        )

    def costs(self) -> pd.DataFrame:
        """Judge calls, tokens, dollars and seconds by run, judge and purpose."""
        return self.own("SELECT * FROM cost_list ORDER BY run_id, judge, purpose")
