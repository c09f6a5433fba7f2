"""Journals into the results file, which is an index that can always be built again.

1. Creating a file, or bringing an old one up to date, happens under another name or after a copy (``.bak``), so that a
   kill leaves a file that opens.
2. ``ingest`` reads what a journal has beyond the last time and appends it in short transactions that also move the
   mark, so a kill loses or repeats nothing. Facts of a unit are taken once: the same key means the same rows.
3. A journal that was begun anew (its first line is another) takes the place of what its run had.
4. ``rebuild`` builds a new file beside the old one from every journal, moves the old one aside and puts the new in place.
"""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import duckdb

from evalkit.errors import StoreLocked, StoreUnreadable
from evalkit.store.connection import check_place, connect, damaged
from evalkit.store.frames import insert
from evalkit.store.journal import FACTS, ROWS, Entry, Journal, journals
from evalkit.store.migrations import migrate, migrations, version
from evalkit.util.disk import disk_guard
from evalkit.util.files import publish, publish_once

BATCH = 20_000
"""Rows in one transaction, about."""


class Rebuilt(NamedTuple):
    """What ``rebuild`` did."""

    runs: int
    """Journals read."""
    records: int
    """Records read from them."""
    moved: list[Path]
    """Where the old file and its log went; empty where there was none."""

    def __str__(self) -> str:
        aside = "".join(f"\nmoved aside: {path}" for path in self.moved)
        return f"rebuilt from {self.runs} runs, {self.records:,} records{aside}"


class _Mark(NamedTuple):
    records: int
    bytes: int


@contextmanager
def _transaction(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    connection.execute("BEGIN")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(duckdb.Error):  # a full disk may have ended the transaction; what was first said counts
            connection.execute("ROLLBACK")
        raise


def _batches(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    rows = 0
    for entry in entries:
        batch.append(entry)
        rows += 1 + sum(len(entry.record.get(key) or ()) for key in (*FACTS, "rows"))
        if rows >= BATCH:
            yield batch
            batch, rows = [], 0
    if batch:
        yield batch


def _known(connection: duckdb.DuckDBPyConnection, keys: list[str]) -> set[str]:
    """Those of ``keys`` whose facts are in the file."""
    union = " UNION ".join(f"SELECT unit_key FROM {table} WHERE unit_key IN (SELECT unnest($keys))" for table in FACTS)
    return {str(row[0]) for row in connection.execute(union, {"keys": keys}).fetchall()}


def _forget(connection: duckdb.DuckDBPyConnection, run_id: str) -> None:
    """Drop what came from a journal that is no more."""
    for table in FACTS:
        # a unit that another run took over stays: its facts are that run's numbers too
        connection.execute(
            f"DELETE FROM {table} WHERE unit_key IN (SELECT unit_key FROM units WHERE run_id = $run) "
            "AND unit_key NOT IN (SELECT unit_key FROM units WHERE run_id <> $run)",
            {"run": run_id},
        )
    for table in ("runs", "units", "judge_calls", "training_steps", "ingested"):
        connection.execute(f"DELETE FROM {table} WHERE run_id = ?", [run_id])


def _append(connection: duckdb.DuckDBPyConnection, batch: list[Entry], journal: Journal) -> None:
    """The rows of ``batch``, inside the caller's transaction."""
    facts: dict[str, list[dict[str, Any]]] = {table: [] for table in FACTS}
    rows: dict[str, list[dict[str, Any]]] = {table: [] for table in ROWS}
    known = _known(connection, [str(e.record["unit"]["unit_key"]) for e in batch if "unit" in e.record])
    for record, _ in batch:
        if "unit" in record:
            unit = record["unit"]
            rows["units"].append({"run_id": journal.run_id, **unit})
            key = unit["unit_key"]
            if unit["status"] == "done" and key not in known and any(record.get(table) for table in FACTS):
                known.add(key)
                for table in FACTS:
                    facts[table].extend({**row, "unit_key": key} for row in record.get(table) or ())
        elif record.get("table") in rows:
            rows[record["table"]].extend(record.get("rows") or ())
        else:
            raise StoreUnreadable(
                f"a journal has a record of an unknown kind: {sorted(record)}",
                where=str(journal.path),
                fix="a newer evalkit wrote it, perhaps: update evalkit",
            )
    for table in FACTS:
        insert(connection, table, facts[table])
    for table in ROWS:
        insert(connection, table, rows[table], distinct=table in ("dictionaries", "metrics"))


def ingest(connection: duckdb.DuckDBPyConnection, journal: Journal) -> int:
    """Append what ``journal`` has beyond the last time to an open file of the present layout; returns the records read."""
    first_line = journal.first_line()
    marks = connection.execute(
        "SELECT records, bytes, first_line FROM ingested WHERE run_id = ? ORDER BY bytes DESC LIMIT 1", [journal.run_id]
    ).fetchall()
    mark = _Mark(int(marks[0][0]), int(marks[0][1])) if marks else _Mark(0, 0)
    replaced = bool(marks) and bool(first_line) and (marks[0][2] != first_line or journal.size() < mark.bytes)
    if replaced:
        mark = _Mark(0, 0)
    read = 0
    for batch in _batches(journal.entries(mark.bytes)):
        with _transaction(connection):
            if replaced:
                _forget(connection, journal.run_id)
                replaced = False
            _append(connection, batch, journal)
            read += len(batch)
            row = [journal.run_id, mark.records + read, batch[-1].end, first_line]
            connection.execute("INSERT INTO ingested (run_id, records, bytes, first_line) VALUES (?, ?, ?, ?)", row)
    return read


def _create(path: Path) -> None:
    """A new file under its name in one step: a kill leaves none, and a file another process just made is kept."""
    with publish_once(path) as temporary:
        connection = connect(temporary)
        try:
            migrate(connection, 0)
        finally:
            connection.close()


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Turn what DuckDB says of the results file ``path`` into one clear error."""
    try:
        yield
    except duckdb.Error as error:
        raise damaged(path, error) from error


def _log(path: Path) -> Path:
    """DuckDB's write-ahead log of ``path``."""
    return path.with_name(path.name + ".wal")


class Writer:
    """Appends journals to the results file. Holds no connection between calls, so that readers get their turn.

    Args:
        path: the DuckDB file. The first ``ingest`` creates it (and its folder, if that one's parent exists), or brings an
            old one up to date.
        wait: seconds to wait for another process that holds it.
    """

    def __init__(self, path: Path, *, wait: float = 20.0) -> None:
        self.path, self.wait = Path(path), wait
        self._ready = False

    def check(self) -> None:
        """Refuse a file that cannot be used, without leaving a trace. One that another process holds passes: it may be
        free by the time there is something to write, and until then the journal has it.

        Raises:
            StoreUnreadable: it is damaged, foreign or newer than this evalkit, or its folder cannot be used.
        """
        if not self.path.exists():
            folder = self.path.parent if self.path.parent.exists() else self.path.parent.parent
            check_place(folder / self.path.name)
            return
        try:
            connection = connect(self.path, wait=min(self.wait, 1.0))
        except StoreLocked:
            return
        try:
            version(connection, self.path)
        finally:
            connection.close()

    def _prepare(self) -> None:
        """Create or update the file. The copy is taken without a connection: closing it would drop DuckDB's lock."""
        if not self.path.exists():
            self.check()
            self.path.parent.mkdir(exist_ok=True)
            _create(self.path)
        copied: os.stat_result | None = None
        while True:
            connection = connect(self.path, wait=self.wait)
            try:
                current = version(connection, self.path)
                if current == migrations()[-1].number:
                    return
                now = self.path.stat()
                same = copied is not None and (now.st_mtime_ns, now.st_size) == (copied.st_mtime_ns, copied.st_size)
                with disk_guard(self.path):
                    if same or current == 0:
                        migrate(connection, current)
                        return
                    connection.execute("CHECKPOINT")
            finally:
                connection.close()
            copied = self.path.stat()
            with publish(self.path.with_name(self.path.name + ".bak")) as backup:
                shutil.copyfile(self.path, backup)

    def ingest(self, journal: Journal) -> int:
        """Append what ``journal`` has beyond the last time; returns the records read. Twice is as good as once.

        The first call also catches up with the journals beside it, as their units may stand in for this run's.

        Raises:
            StoreLocked: another process held the file for ``wait`` seconds; nothing was written.
            StoreUnreadable: the file or a journal is damaged, or the folder cannot be used.
        DiskFull: there is no room; the journal has it all.
        """
        beside: list[Journal] = []
        if not self._ready:
            self._prepare()
            beside = [other for other in journals(journal.folder.parent.parent) if other.run_id != journal.run_id]
        with _usable(self.path), closing(connect(self.path, wait=self.wait)) as connection:
            for other in beside:
                ingest(connection, other)
            read = ingest(connection, journal)
        self._ready = True
        return read


def _move_aside(path: Path) -> list[Path]:
    """Give the file and its log names that say when they were set aside; the log first, as it must not meet a new file."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    moved = []
    for old in (_log(path), path):
        if old.exists():
            new = old.with_name(f"{path.name}.{stamp}-{uuid4().hex[:4]}.set-aside{'.wal' if old != path else ''}")
            old.rename(new)
            moved.append(new)
    return moved


def rebuild(results_folder: Path, path: Path, *, wait: float = 20.0) -> Rebuilt:
    """Build the results file again from all journals under ``results_folder / "runs"``; the old one is moved aside.

    Raises:
        StoreLocked: another process holds the old file; nothing was changed.
        StoreUnreadable: a journal is damaged, or the folder cannot be used; nothing was changed.
        DiskFull: there is no room for the new file beside the old one; nothing was changed.
    """
    path = Path(path)
    if path.exists():
        try:
            connect(path, wait=wait).close()
        except StoreUnreadable:
            if path.is_dir() or not os.access(path.parent, os.W_OK):
                raise
    found = journals(results_folder)
    with publish(path) as temporary:
        connection = connect(temporary)
        try:
            with _usable(path):
                migrate(connection, 0)
                records = sum(ingest(connection, journal) for journal in found)
                connection.execute("CHECKPOINT")
        finally:
            connection.close()
        moved = _move_aside(path)
    return Rebuilt(len(found), records, moved)
