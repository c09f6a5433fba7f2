"""The SQLite file of finished judge calls: its schema, its errors, and the file ``calls.jsonl`` that it takes the place of.

1. The file is in WAL mode: readers do not wait for writers, and a commit is on the disk when it returns.
2. What SQLite says of a full disk, a lock or a damaged file becomes one of evalkit's errors.
3. ``calls.jsonl`` of an older evalkit is read once, in one transaction, and renamed to ``calls.jsonl.old``. A line that is no
   call is left out, and their number is printed. Reading it again after a kill adds nothing twice.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from evalkit.errors import EvalkitError, StoreLocked, StoreUnreadable
from evalkit.util.disk import disk_full, disk_guard, size_text

VERSION = 1
"""Of the schema."""
WAIT_S = 60.0
"""Seconds to wait for another process that writes."""

_SCHEMA = """
CREATE TABLE calls (
    number INTEGER PRIMARY KEY,      -- order in which they were finished
    call_key TEXT NOT NULL,
    purpose TEXT,                    -- 'explain', 'simulate' or 'rate'
    judge TEXT,
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    dollars REAL,
    seconds REAL,
    attempts INTEGER,
    left_out TEXT,
    status TEXT NOT NULL,            -- 'asking', 'ok', 'retried' or 'failed'
    error TEXT,
    at TEXT NOT NULL,
    answer TEXT,                     -- JSON, or null where the call has none
    reserved_prompt INTEGER,         -- most tokens it can have cost, where nobody counted
    reserved_completion INTEGER,
    owner TEXT NOT NULL,             -- run and judge
    drained INTEGER NOT NULL DEFAULT 0,
    asker TEXT                       -- of 'asking': machine, process, its start, store
);
CREATE UNIQUE INDEX one_answer ON calls (call_key) WHERE answer IS NOT NULL;
CREATE UNIQUE INDEX one_asker ON calls (call_key) WHERE status = 'asking';
CREATE INDEX of_key ON calls (call_key);
CREATE INDEX of_owner ON calls (owner) WHERE drained = 0;
"""

COLUMNS = (
    "call_key", "purpose", "judge", "prompt_tokens", "completion_tokens", "dollars", "seconds", "attempts", "left_out",
    "status", "error", "at",
)  # fmt: skip
"""Of the table ``judge_calls``, without run_id."""
_INSERTED = (*COLUMNS, "owner", "answer", "reserved_prompt", "reserved_completion", "drained")

_ASIDE = "move the file aside and run again; its calls are made again"
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)
"""A quota and the largest size of a file are errors of writing to SQLite."""


def open_calls(path: Path, *, make: bool, say: Callable[[str], None]) -> sqlite3.Connection | None:
    """The file at ``path`` with its schema, and in it what an older file beside it holds.

    Args:
        path: of the SQLite file.
        make: make it where there is none; else there is None.
        say: prints how many lines of an older file could not be read.

    Raises:
        StoreUnreadable: it is damaged, not ours, or written by a newer evalkit.
        StoreLocked: another program keeps it locked.
        DiskFull: there is no room for it.
    """
    older = path.with_name("calls.jsonl")
    if not make and not path.exists() and not older.exists():
        return None
    with disk_guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # commits are written as they stand; transactions are begun by name
        connection = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise translated(error, path) from error
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        _with_schema(connection, path)
        if older.exists():
            _take_over(connection, older, say)
    except sqlite3.Error as error:
        connection.close()
        raise translated(error, path) from error
    except EvalkitError:
        connection.close()
        raise
    return connection


def _with_schema(connection: sqlite3.Connection, path: Path) -> None:
    if connection.execute("PRAGMA user_version").fetchone()[0] == VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found > VERSION:
        raise StoreUnreadable(
            "the judge's finished calls were written by a newer evalkit", where=str(path), fix="install the newer evalkit"
        )
    if found == 0:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise StoreUnreadable("this file holds other things than judge calls", where=str(path), fix=_ASIDE)
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def insert(connection: sqlite3.Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Add finished calls. Where another process has answered a call meanwhile, its answer stays and the row has none."""
    marks = ", ".join(
        "CASE WHEN EXISTS (SELECT 1 FROM calls WHERE call_key = :call_key AND answer IS NOT NULL) THEN NULL ELSE :answer END"
        if name == "answer"
        else f":{name}"
        for name in _INSERTED
    )
    connection.executemany(f"INSERT INTO calls ({', '.join(_INSERTED)}) VALUES ({marks})", rows)


def translated(error: sqlite3.Error, path: Path, needed: int = 0) -> EvalkitError:
    """``error`` of the file at ``path`` as one of evalkit's. ``needed``: bytes that were to be written."""
    code = getattr(error, "sqlite_errorcode", 0)
    if code in _FULL:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return disk_full(path, full, f"{size_text(needed)} needed" if needed else "")
    if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreLocked(
            f"the judge's finished calls are locked by another program: {error}",
            where=str(path),
            fix="close that program (an SQLite shell, perhaps) and run the command again",
        )
    if code & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return StoreUnreadable(
            f"the judge's finished calls cannot be opened: {error}", where=str(path), fix="make the file and its folder writable"
        )
    return StoreUnreadable(f"the judge's finished calls cannot be read: {error}", where=str(path), fix=_ASIDE)


def _take_over(connection: sqlite3.Connection, older: Path, say: Callable[[str], None]) -> None:
    """Add the calls of the file of an older evalkit, all or none, and set that file aside."""
    connection.execute("BEGIN IMMEDIATE")
    (before,) = connection.execute("SELECT coalesce(max(number), 0) FROM calls").fetchone()
    drained: dict[str, int] = {}
    calls = unread = 0
    try:
        for number, record in enumerate(_lines(older)):
            if record is not None and "drained" in record:
                drained[record.get("owner", "")] = number
        for number, record in enumerate(_lines(older)):
            if record is None:
                unread += 1
            elif "call_key" in record:
                calls += 1
                _add(connection, record, before, number < drained.get(record.get("owner", ""), -1))
    except FileNotFoundError:  # another process has just taken it over
        connection.execute("ROLLBACK")
        return
    if unread and not calls and not drained:
        connection.execute("ROLLBACK")
        raise StoreUnreadable("the judge's finished calls cannot be read: no line is a call", where=str(older), fix=_ASIDE)
    connection.execute("COMMIT")
    if older.exists():
        os.replace(older, older.with_name("calls.jsonl.old"))
    if unread:
        say(f"{unread} line{'s' * (unread > 1)} of {older} could not be read: the judge calls in them are made again")


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The records of a file, None for a line that is none. A last line without an end was torn by a kill and is left out."""
    with path.open("rb") as handle:
        for line in handle:
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            ours = isinstance(record, dict) and ("drained" in record or isinstance(record.get("call_key"), str))
            yield record if ours else None


def _add(connection: sqlite3.Connection, record: dict[str, Any], before: int, drained: bool) -> None:
    """Add one record, unless it is among the first ``before`` rows: the same file may have been read before a kill."""
    row: dict[str, Any] = {name: record.get(name) for name in _INSERTED}
    row |= {"status": record.get("status", "ok"), "at": record.get("at", ""), "owner": record.get("owner", "")}
    row["reserved_prompt"], row["reserved_completion"] = record.get("reserved", (None, None))
    row["answer"] = json.dumps(record["answer"], ensure_ascii=False) if "answer" in record else None
    row["drained"] = int(drained)
    there = connection.execute(
        "SELECT 1 FROM calls WHERE call_key = :call_key AND at = :at AND status = :status AND owner = :owner "
        "AND number <= :before",
        row | {"before": before},
    ).fetchone()
    if not there:
        insert(connection, [row])
