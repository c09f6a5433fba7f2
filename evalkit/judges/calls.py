"""Durable judge calls in an SQLite file: nothing is bought twice, across threads, processes and kills.

1. A call's key is the hash of everything that can change its answer: which judge, endpoint, payload, prompt. Time-outs and batch
   sizes are not in it.
2. An answer is on the disk before anyone uses it. Each prompt of a batched request is a row of its own; the rows of one request
   are one transaction.
3. A key that is being asked is a row with status 'asking'. A unique index allows one of them and one answer for each key, so
   neither another thread nor another process asks it. The row of a process that was killed gives way.
4. Failures are recorded (they cost time, perhaps money) but never looked up: the next run tries again. One that is asked again
   in the same run is 'retried', not 'failed'. What a server does not say it counted is null, not 0.
5. Several runs and judges may use one folder: every row has its owner, whose ``drain`` alone returns it.
6. Memory holds no answers; they are read when asked for.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from evalkit.errors import StoreUnreadable
from evalkit.judges.cost import Usage
from evalkit.judges.sqlite_file import COLUMNS, insert, open_calls, translated

LONGEST_ERROR = 500
"""Characters of a reason that are kept."""
LEASE = timedelta(hours=1)
"""How long a call that is asked on another machine is waited for."""
_POLL_S = 0.2
_CHUNK = 500
"""Keys in one query."""


class Outcome(NamedTuple):
    """What became of one call."""

    answer: dict[str, Any] | None
    """The parsed answer; None where the call failed."""
    error: str = ""
    """Why it failed."""


class Claimed(NamedTuple):
    """What is to be done about some keys."""

    answers: dict[str, dict[str, Any]]
    """Those that are stored."""
    mine: list[str]
    """The caller must make these calls and then ``settle`` or ``release`` them."""
    others: list[str]
    """Somebody else is making these."""


class Spent(NamedTuple):
    """What one call took; with its key, a row of the ``judge_calls`` table."""

    purpose: str
    """'explain', 'simulate' or 'rate'."""
    judge: str
    """Name of the model."""
    prompt_tokens: int | None = None
    """None where the server does not say."""
    completion_tokens: int | None = None
    dollars: float | None = None
    """None where the price or the tokens are unknown."""
    seconds: float = 0.0
    attempts: int = 1
    left_out: str | None = None
    """Settings that the endpoint refuses, so that the call was made without them; None: none, or not known."""


class Settled(NamedTuple):
    """What became of a call that was made."""

    key: str
    spent: Spent
    answer: dict[str, Any] | None = None
    """None where it failed."""
    error: str = ""
    again: bool = False
    """It failed and will be asked again now: whoever waits for it goes on waiting."""
    reserved: Usage | None = None
    """Most tokens it can have cost, where ``spent`` does not say."""

    @property
    def outcome(self) -> Outcome:
        """The answer, or the reason as it is kept."""
        return Outcome(self.answer, self.error[:LONGEST_ERROR])


class CallStore:
    """Finished calls of one folder, in ``calls.sqlite``. Threads and processes may share it.

    Args:
        folder: made at the first call.
        owner: which run and judge the calls are made for; ``own`` sets it later.
        say: prints what could not be taken over from the file of an older evalkit.

    Raises:
        StoreUnreadable: the file is damaged or not ours.
        StoreLocked: another program keeps it locked.
    """

    def __init__(self, folder: Path, owner: str = "", say: Callable[[str], None] = lambda line: None) -> None:
        self.path, self.owner, self._say = folder / "calls.sqlite", owner, say
        self._lock = threading.RLock()
        self._open: sqlite3.Connection | None = None
        self._asker = f"{socket.gethostname()} {os.getpid()} {_started(os.getpid())} {uuid4().hex[:8]}"
        self._connection(make=False)

    def _connection(self, make: bool = True) -> sqlite3.Connection | None:
        """The open file; None where there is none and none is to be made."""
        with self._lock:
            if self._open is None:
                self._open = open_calls(self.path, make=make, say=self._say)
            return self._open

    def own(self, owner: str) -> None:
        """Make calls for ``owner`` from now on; those of an earlier, killed process of it come with the next ``drain``."""
        self.owner = owner

    @contextmanager
    def _changing(self, needed: int = 0) -> Iterator[sqlite3.Connection]:
        """One transaction, durable at its end. Errors undo it. ``needed`` bytes are named where the disk is full."""
        with self._lock:
            connection = self._connection()
            assert connection is not None
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            except BaseException as error:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise translated(error, self.path, needed) from error
                raise

    def _read(self, query: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            connection = self._connection(make=False)
            if connection is None:
                return []
            try:
                return connection.execute(query, tuple(values)).fetchall()
            except sqlite3.Error as error:
                raise translated(error, self.path) from error

    def __len__(self) -> int:
        return sum(count for (count,) in self._read("SELECT count(*) FROM calls WHERE answer IS NOT NULL"))

    def get(self, key: str) -> dict[str, Any] | None:
        """The stored answer of call ``key``; None where there is none."""
        return self._answers([key]).get(key)

    def _answers(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for part in _parts(keys):
            query = f"SELECT call_key, answer FROM calls WHERE answer IS NOT NULL AND call_key IN ({_marks(part)})"
            found |= {key: self._parsed(answer) for key, answer in self._read(query, part)}
        return found

    def _parsed(self, answer: str) -> dict[str, Any]:
        try:
            found = json.loads(answer)
        except ValueError as error:
            fix = "move the file aside and run again; its calls are made again"
            raise StoreUnreadable(f"a stored answer cannot be read: {error}", where=str(self.path), fix=fix) from error
        return dict(found)

    def claim(self, keys: Sequence[str]) -> Claimed:
        """Take calls on, but for those that are finished or that somebody is making."""
        answers = self._answers(keys)
        left = [key for key in dict.fromkeys(keys) if key not in answers]
        if not left:
            return Claimed(answers, [], [])
        now = _now()
        with self._changing() as connection:
            answers |= self._answers(left)  # those that came in between
            left = [key for key in left if key not in answers]
            held = {
                key: (asker, at)
                for part in _parts(left)
                for key, asker, at in self._read(
                    f"SELECT call_key, asker, at FROM calls WHERE status = 'asking' AND call_key IN ({_marks(part)})", part
                )
            }
            alive = {asker: _alive(asker) for asker, _ in held.values()}
            oldest = (datetime.now(UTC) - LEASE).isoformat(timespec="milliseconds")
            others = [key for key, (asker, at) in held.items() if alive[asker] or (alive[asker] is None and at > oldest)]
            mine = [key for key in left if key not in set(others)]
            connection.executemany(
                "DELETE FROM calls WHERE status = 'asking' AND call_key = ?", [(key,) for key in mine if key in held]
            )
            connection.executemany(
                "INSERT INTO calls (call_key, status, owner, asker, at) VALUES (?, 'asking', ?, ?, ?)",
                [(key, self.owner, self._asker, now) for key in mine],
            )
        return Claimed(answers, mine, others)

    def wait(self) -> None:
        """Give others a moment to settle their calls."""
        time.sleep(_POLL_S)

    def settle(self, calls: Sequence[Settled]) -> None:
        """Store what became of the calls of one request, in one transaction."""
        at = _now()
        rows = [_row(call, at, self.owner) for call in calls]
        with self._changing(sum(len(str(row)) for row in rows)) as connection:
            over = [(call.key,) for call in calls if not call.again]
            connection.executemany("DELETE FROM calls WHERE status = 'asking' AND call_key = ?", over)
            insert(connection, rows)

    def release(self, keys: Sequence[str]) -> None:
        """Give claimed calls up unmade: whoever waits for them makes them."""
        if keys:
            with self._changing() as connection:
                values = [(key, self._asker) for key in keys]
                connection.executemany("DELETE FROM calls WHERE status = 'asking' AND call_key = ? AND asker = ?", values)

    def reserved(self, keys: Sequence[str]) -> Usage:
        """Most tokens that calls of these keys can have cost where nobody said what they cost, as often as each is named."""
        prompt = completion = 0
        for key, times in Counter(keys).items():
            last = self._read(
                "SELECT reserved_prompt, reserved_completion FROM calls WHERE call_key = ? AND reserved_prompt IS NOT NULL "
                "ORDER BY number DESC LIMIT ?",
                (key, times),
            )
            prompt, completion = prompt + sum(row[0] for row in last), completion + sum(row[1] for row in last)
        return Usage(prompt, completion)

    def drain(self) -> list[dict[str, Any]]:
        """Rows for the ``judge_calls`` table (all columns but run_id) of the owner's calls since its last drain, oldest first.

        Calls of a run that was killed before it drained them come with the next drain of the same owner.
        """
        wanted = "owner = ? AND drained = 0 AND status != 'asking'"
        if not self._read(f"SELECT 1 FROM calls WHERE {wanted} LIMIT 1", (self.owner,)):
            return []
        with self._changing() as connection:
            rows = self._read(f"SELECT {', '.join(COLUMNS)} FROM calls WHERE {wanted} ORDER BY number", (self.owner,))
            connection.execute(f"UPDATE calls SET drained = 1 WHERE {wanted}", (self.owner,))
        return [dict(zip(COLUMNS, row, strict=True)) for row in rows]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of every call ever made in this folder, oldest first: a lost results file is rebuilt from them."""
        for row in self._read(f"SELECT {', '.join(COLUMNS)} FROM calls WHERE status != 'asking' ORDER BY number"):
            yield dict(zip(COLUMNS, row, strict=True))

    def close(self) -> None:
        """Give up what was claimed and close the file."""
        with self._lock:
            if self._open is not None:
                with suppress(sqlite3.Error):
                    self._open.execute("DELETE FROM calls WHERE status = 'asking' AND asker = ?", (self._asker,))
                self._open.close()
                self._open = None


def _row(call: Settled, at: str, owner: str) -> dict[str, Any]:
    status = "ok" if call.answer is not None else "retried" if call.again else "failed"
    unknown = call.reserved is not None and None in (call.spent.prompt_tokens, call.spent.completion_tokens)
    tokens = call.reserved if unknown and call.reserved is not None else (None, None)
    return {
        "call_key": call.key,
        **call.spent._asdict(),
        "status": status,
        "error": _whole(call.error[:LONGEST_ERROR]),
        "at": at,
        "owner": owner,
        "answer": None if call.answer is None else _whole(json.dumps(call.answer, ensure_ascii=False, allow_nan=False)),
        "reserved_prompt": tokens[0],
        "reserved_completion": tokens[1],
        "drained": 0,
    }


def _whole(text: str) -> str:
    """``text`` with half of a character, from a message that quotes it, as a question mark."""
    return text.encode("utf-8", "replace").decode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _parts(keys: Sequence[str]) -> list[Sequence[str]]:
    return [keys[start : start + _CHUNK] for start in range(0, len(keys), _CHUNK)]


def _marks(keys: Sequence[str]) -> str:
    return ", ".join("?" * len(keys))


def _alive(asker: str) -> bool | None:
    """Whether the process that asks a call lives; None where that is unknown: it is on another machine."""
    host, process, started, _ = asker.rsplit(" ", 3)
    if host != socket.gethostname():
        return None
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it belongs to another user
    return _started(int(process)) == started


def _started(process: int) -> str:
    """When a process began, as Linux counts it: numbers of processes are used again. '-' on other systems."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return "-"
    return "ended" if state in "ZX" else fields[18]
