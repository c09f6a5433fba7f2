"""The results file: ingest once, survive, refuse, rebuild."""

from __future__ import annotations

import shutil
import subprocess
import sys

import duckdb
import pytest
from store_case import PREDICTIONS, RUN, score, unit, write_run

from evalkit.errors import StoreLocked, StoreUnreadable
from evalkit.store.connection import connect
from evalkit.store.journal import Journal
from evalkit.store.migrations import columns, migrations
from evalkit.store.writer import Writer, rebuild


def ask(path, query):
    connection = duckdb.connect(str(path), read_only=True)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def counts(path):
    tables = ("runs", "dictionaries", "metrics", "units", "scores", "explanations", "predictions", "judge_calls")
    return {table: ask(path, f"SELECT count(*) FROM {table}")[0][0] for table in tables}


EXPECTED = {
    "runs": 2, "dictionaries": 2, "metrics": 5, "units": 5, "scores": 18 + 16, "explanations": 2, "predictions": 2,
    "judge_calls": 4,
}  # fmt: skip


@pytest.fixture
def store(tmp_path):
    """A results file with one run in it, and the run's journal."""
    journal = write_run(tmp_path)
    path = tmp_path / "evalkit.duckdb"
    Writer(path).ingest(journal)
    return path, journal


def test_every_row_arrives_once(store):
    path, journal = store
    assert counts(path) == EXPECTED
    assert Writer(path).ingest(journal) == 0
    assert counts(path) == EXPECTED
    Journal(journal.folder).write_rows("judge_calls", [{"call_key": "4"}])
    assert Writer(path).ingest(journal) == 1
    assert counts(path) == {**EXPECTED, "judge_calls": 5}


def test_lists_nulls_and_times_survive(store):
    path, _ = store
    rows = ask(path, "SELECT tokens, actual, predicted, digit_mass FROM predictions ORDER BY fragment")
    assert rows == [tuple(p[k] for k in ("tokens", "actual", "predicted", "digit_mass")) for p in PREDICTIONS]
    assert ask(path, "SELECT count(*), count(value), count(cluster) FROM scores WHERE metric = 'fvu'") == [(8, 7, 8)]
    assert ask(path, 'SELECT "at"::VARCHAR FROM judge_calls ORDER BY call_key') == [(None,)] * 3 + [("2026-03-01 12:00:05",)]
    assert ask(path, "SELECT typeof(tokens), typeof(digit_mass) FROM predictions LIMIT 1") == [("VARCHAR[]", "DOUBLE[]")]


def test_a_value_that_appears_late_keeps_its_type(tmp_path):
    journal = Journal(tmp_path / "runs" / "r")
    rows = [score("m", i, None, "window") for i in range(3000)] + [score("m", 3000, 2.5, "window", cluster=7)]
    predictions = [{"feature": i} for i in range(1500)] + [{"feature": 1500, "tokens": ["a"], "predicted": [1, None]}]
    journal.write_unit(unit("k", "e", "d"), rows, {"predictions": predictions})
    path = tmp_path / "evalkit.duckdb"
    Writer(path).ingest(journal)
    assert ask(path, "SELECT value, cluster FROM scores WHERE value IS NOT NULL") == [(2.5, 7)]
    assert ask(path, "SELECT tokens, predicted FROM predictions WHERE tokens IS NOT NULL") == [(["a"], [1.0, None])]


def test_facts_of_a_key_are_taken_once(tmp_path):
    first, second = Journal(tmp_path / "runs" / "first"), Journal(tmp_path / "runs" / "second")
    first.write_rows("units", [unit("k", "e", "d", status="failed")])
    first.write_unit(unit("k", "e", "d"), [score("m", 0, 1.0, "window")])
    first.write_unit(unit("k", "e", "d"), [score("m", 0, 1.0, "window")])
    second.write_rows("units", [unit("k", "e", "d")])
    path = tmp_path / "evalkit.duckdb"
    Writer(path).ingest(second)
    assert ask(path, "SELECT unit_key, value FROM scores") == [("k", 1.0)]
    assert ask(path, "SELECT run_id, count(*) FROM units GROUP BY run_id ORDER BY run_id") == [("first", 3), ("second", 1)]


def test_a_long_journal_goes_in_several_transactions(store, monkeypatch):
    path, journal = store
    monkeypatch.setattr("evalkit.store.writer.BATCH", 5)
    other = path.with_name("other.duckdb")
    Writer(other).ingest(journal)
    assert counts(other) == EXPECTED
    assert ask(other, "SELECT count(*) FROM ingested")[0][0] > 3


def test_an_error_in_the_middle_leaves_the_transaction_out(store, monkeypatch):
    path, journal = store
    journal.write_rows("judge_calls", [{"call_key": "good"}])
    with journal.path.open("a") as handle:
        handle.write('{"table": "judge_calls", "rows": [{"colour": "red"}]}\n')
    with pytest.raises(StoreUnreadable, match="colour"):
        Writer(path).ingest(journal)
    assert counts(path) == EXPECTED


def test_a_journal_begun_anew_replaces_what_its_run_had(store):
    path, journal = store
    shutil.rmtree(journal.folder)
    anew = write_run(path.parent, day=2, shift=0.1)
    assert Writer(path).ingest(anew) > 0
    assert counts(path) == EXPECTED
    assert ask(path, "SELECT value FROM scores WHERE metric = 'fvu' AND item = 0 ORDER BY value") == [(0.2,), (0.4,)]


def test_a_run_of_its_own_file_catches_up_with_its_neighbours(tmp_path):
    write_run(tmp_path, "first")
    path = tmp_path / "evalkit.duckdb"
    Writer(path).ingest(write_run(tmp_path, "second", day=2))
    assert [row[0] for row in ask(path, "SELECT run_id FROM run_states ORDER BY run_id")] == ["first", "second"]


def test_files_of_duckdb_one_can_be_read(store):
    path, _ = store
    tags = ask(path, "SELECT tags FROM duckdb_databases() WHERE path IS NOT NULL")[0][0]
    assert tags["storage_version"].startswith("v1.")


@pytest.mark.parametrize("spoil", [b"garbage" * 5000, b""])
def test_a_damaged_file_is_refused_and_rebuilt(store, spoil):
    path, _ = store
    path.write_bytes(spoil)
    for use in (lambda: Writer(path).check(), lambda: Writer(path).ingest(Journal(path.parent / "runs" / RUN))):
        with pytest.raises(StoreUnreadable, match="cannot be opened") as caught:
            use()
        assert "evalkit rebuild" in str(caught.value)
    done = rebuild(path.parent, path)
    assert counts(path) == EXPECTED
    assert (done.runs, len(done.moved)) == (1, 1)
    assert done.moved[0].read_bytes() == spoil
    assert Writer(path).ingest(Journal(path.parent / "runs" / RUN)) == 0


def test_rebuild_takes_an_old_log_away_too(store):
    path, _ = store
    path.write_bytes(b"x" * 9000)
    log = path.with_name(path.name + ".wal")
    log.write_bytes(b"y" * 100)
    done = rebuild(path.parent, path)
    assert sorted(p.read_bytes()[:1] for p in done.moved) == [b"x", b"y"]
    assert not log.exists()
    assert "moved aside" in str(done)


def test_rebuild_with_a_spoilt_journal_changes_nothing(store):
    path, journal = store
    before = path.read_bytes()
    with journal.path.open("ab") as handle:
        handle.write(b"}\n")
    with pytest.raises(StoreUnreadable, match="not JSON"):
        rebuild(path.parent, path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["evalkit.duckdb", "runs"]


def test_foreign_and_newer_files_are_refused(store, tmp_path):
    path, _ = store
    connection = connect(path)
    connection.execute("INSERT INTO schema_version VALUES (999)")
    connection.close()
    with pytest.raises(StoreUnreadable, match="layout 999"):
        Writer(path).check()
    foreign = tmp_path / "foreign.duckdb"
    connection = duckdb.connect(str(foreign))
    connection.execute("CREATE TABLE mine (a INT)")
    connection.close()
    with pytest.raises(StoreUnreadable, match="not written by evalkit"):
        Writer(foreign).check()


def test_an_old_file_is_copied_then_brought_up_to_date(tmp_path):
    journal = write_run(tmp_path)
    path = tmp_path / "evalkit.duckdb"
    connection = connect(path)
    connection.execute("CREATE TABLE schema_version (version BIGINT)")
    connection.execute(migrations()[0].sql)
    connection.execute("INSERT INTO schema_version VALUES (1)")
    connection.execute("INSERT INTO judge_calls (call_key) VALUES ('kept')")
    connection.close()
    Writer(path).ingest(journal)
    assert ask(path, "SELECT max(version) FROM schema_version") == [(migrations()[-1].number,)]
    assert ask(path, "SELECT count(*) FROM judge_calls") == [(5,)]
    backup = tmp_path / "evalkit.duckdb.bak"
    assert ask(backup, "SELECT max(version) FROM schema_version") == [(1,)]
    assert ask(backup, "SELECT call_key FROM judge_calls") == [("kept",)]


def test_a_failing_migration_leaves_the_file_as_it_was(store, monkeypatch):
    path, journal = store
    bad = migrations()[-1]._replace(number=900, sql="CREATE TABLE half (a INT); SELECT nothing FROM nowhere;")
    monkeypatch.setattr("evalkit.store.migrations.migrations", lambda: (*migrations(), bad))
    monkeypatch.setattr("evalkit.store.writer.migrations", lambda: (*migrations(), bad))
    with pytest.raises(duckdb.Error, match="nowhere"):
        Writer(path).ingest(journal)
    assert ask(path, "SELECT count(*) FROM duckdb_tables() WHERE table_name = 'half'") == [(0,)]
    assert ask(path, "SELECT max(version) FROM schema_version") == [(migrations()[-1].number,)]


def test_the_holder_of_a_lock_is_named(store):
    path, journal = store
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(StoreLocked, match=f"process {child.pid}"):
            Writer(path, wait=0.2).ingest(journal)
        with pytest.raises(StoreLocked):
            rebuild(path.parent, path, wait=0.1)
        Writer(path).check()
    finally:
        child.communicate()
    assert Writer(path).ingest(journal) == 0


def test_a_connection_of_this_process_is_a_lock_too(store):
    path, journal = store
    reader = duckdb.connect(str(path), read_only=True)
    try:
        with pytest.raises(StoreLocked, match="another connection of this process"):
            Writer(path, wait=0.1).ingest(journal)
    finally:
        reader.close()


def test_places_that_cannot_be_used(tmp_path):
    journal = write_run(tmp_path)
    with pytest.raises(StoreUnreadable, match="folder of the results file does not exist"):
        Writer(tmp_path / "no" / "such" / "evalkit.duckdb").check()
    with pytest.raises(StoreUnreadable, match="is a folder"):
        Writer(tmp_path).check()
    fresh = Writer(tmp_path / "results" / "evalkit.duckdb")
    fresh.check()
    assert not (tmp_path / "results").exists()
    fresh.ingest(journal)
    assert counts(tmp_path / "results" / "evalkit.duckdb") == EXPECTED


def test_layout_has_no_keys_indexes_or_defaults():
    connection = duckdb.connect(":memory:")
    for migration in migrations():
        connection.execute(migration.sql)
    assert connection.execute("SELECT count(*) FROM duckdb_constraints()").fetchall() == [(0,)]
    assert connection.execute("SELECT count(*) FROM duckdb_indexes()").fetchall() == [(0,)]
    defaults = "SELECT count(*) FROM duckdb_columns() WHERE column_default IS NOT NULL AND NOT internal"
    assert connection.execute(defaults).fetchall() == [(0,)]
    assert columns()["predictions"]["tokens"] == "VARCHAR[]"
    connection.close()


def test_every_change_of_layout_has_a_number_of_its_own():
    assert [migration.number for migration in migrations()] == list(range(1, len(migrations()) + 1))
