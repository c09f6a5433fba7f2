"""Durable judge calls: nothing is bought twice, across threads, runs and kills.

1. A call's key is the hash of everything that can change its answer: which judge, endpoint, payload, prompt. Time-outs, batch
   sizes and addresses of local servers are not in it.
2. An answer is on the disk before anyone uses it. Each prompt of a batched request is a call of its own.
3. A key that is being asked right now is not asked again: the second asker waits for the first.
4. Failures are recorded (they cost time, perhaps money) but never looked up: the next run tries again. One that is asked again
   in the same run is 'retried', not 'failed'. What a server does not say it counted is null, not 0.
5. Several runs and judges may use one folder: every record has its owner, and only the owner is told of it (``drain``).
6. Memory holds keys and file offsets only; answers are read back when asked for.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from evalkit.errors import StoreUnreadable
from evalkit.files import JsonLines
from evalkit.judges.cost import Usage

LONGEST_ERROR = 500
"""Characters of a reason that are kept."""


class Outcome(NamedTuple):
    """What became of one call."""

    answer: dict[str, Any] | None
    """The parsed answer; None where the call failed."""
    error: str = ""
    """Why it failed."""


class Claim(NamedTuple):
    """The right to make a call, or where its answer is or will be."""

    mine: bool
    """True: the caller must make the call and then ``finish``, ``fail`` or ``abandon`` it."""
    outcome: Future[Outcome]
    """Resolves to the outcome; raises what ended the asker's run where the call was abandoned."""


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


class CallStore:
    """Finished calls of one folder, in ``calls.jsonl``. Thread-safe; several processes may append to one file.

    Args:
        folder: made at the first call.
        owner: which run and judge the calls are made for; ``own`` sets it later.

    Raises:
        StoreUnreadable: the file holds a line that is not ours.
    """

    def __init__(self, folder: Path, owner: str = "") -> None:
        self.path = folder / "calls.jsonl"
        self._lines = JsonLines(self.path)
        self._lock = threading.Lock()
        self._offsets: dict[str, int] = {}
        self._end = 0
        self.owner = owner
        self._undrained: dict[str, list[dict[str, Any]]] = {}
        """Rows that nobody was told of when this was made, by owner."""
        self._running: dict[str, Future[Outcome]] = {}
        with self._lock:
            for record in self._index():
                of_owner = self._undrained.setdefault(record.get("owner", ""), [])
                if "drained" in record:
                    of_owner.clear()
                else:
                    of_owner.append(_row(record))

    def own(self, owner: str) -> None:
        """Make calls for ``owner`` from now on; those of an earlier, killed process of it come with the next ``drain``."""
        self.owner = owner

    def _index(self) -> Iterator[dict[str, Any]]:
        """Records behind ``_end``, noting where each answer lies. The caller holds the lock and exhausts the iterator."""
        if not self.path.exists():
            return
        with self.path.open("rb") as handle:
            handle.seek(self._end)
            for line in handle:
                if not line.endswith(b"\n"):
                    return
                record = self._parse(line)
                if "answer" in record:
                    self._offsets[record["call_key"]] = self._end
                self._end += len(line)
                yield record

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise self._damaged(str(error)) from error
        if not isinstance(record, dict) or not ("call_key" in record or "drained" in record):
            raise self._damaged("no call")
        return record

    def _damaged(self, why: str) -> StoreUnreadable:
        return StoreUnreadable(
            f"a line of the judge's finished calls cannot be read: {why}",
            where=str(self.path),
            fix="move the file aside and run again; its calls are made again",
        )

    def __len__(self) -> int:
        return len(self._offsets)

    def get(self, key: str) -> dict[str, Any] | None:
        """The stored answer of call ``key``; None where there is none."""
        with self._lock:
            offset = self._offsets.get(key)
        if offset is None:
            return None
        with self.path.open("rb") as handle:
            handle.seek(offset)
            answer: dict[str, Any] = self._parse(handle.readline())["answer"]
            return answer

    def claim(self, key: str) -> Claim:
        """Take the call ``key`` on, unless it is finished or somebody is making it."""
        answer = self.get(key)
        if answer is not None:
            done: Future[Outcome] = Future()
            done.set_result(Outcome(answer))
            return Claim(False, done)
        with self._lock:
            if key in self._running:
                return Claim(False, self._running[key])
            if key not in self._offsets:
                self._running[key] = Future()
                return Claim(True, self._running[key])
        return self.claim(key)

    def finish(self, key: str, answer: dict[str, Any], spent: Spent) -> None:
        """Store an answer durably, then hand it to whoever waits for it."""
        self.settle([Settled(key, spent, answer)])

    def fail(self, key: str, error: str, spent: Spent) -> None:
        """Record a failed call. Its key may be claimed again."""
        self.settle([Settled(key, spent, error=error)])

    def settle(self, calls: Sequence[Settled]) -> None:
        """Store what became of the calls of one request, with one append, then hand it to whoever waits for it."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        records = []
        for call in calls:
            status = "ok" if call.answer is not None else "retried" if call.again else "failed"
            told: dict[str, Any] = {"status": status, "error": call.error[:LONGEST_ERROR], "at": at}
            record = {"call_key": call.key, **call.spent._asdict(), **told, "owner": self.owner}
            if call.answer is not None:
                record["answer"] = call.answer
            if call.reserved is not None and None in (call.spent.prompt_tokens, call.spent.completion_tokens):
                record["reserved"] = list(call.reserved)
            records.append(record)
        with self._lock:
            self._lines.append_all(records)
            for _ in self._index():
                pass
            self._undrained.setdefault(self.owner, []).extend(map(_row, records))
        for call in calls:
            if not call.again:
                self._resolve(call.key).set_result(Outcome(call.answer, call.error[:LONGEST_ERROR]))

    def reserved(self, keys: Sequence[str]) -> Usage:
        """Most tokens that calls of these keys can have cost where nobody said what they cost, as often as each is named."""
        wanted = Counter(keys)
        every: dict[str, list[list[int]]] = {}
        for record in self._lines.read() if wanted else ():
            if record.get("call_key") in wanted and "reserved" in record:
                every.setdefault(record["call_key"], []).append(record["reserved"])
        kept = [tokens for key, times in wanted.items() for tokens in every.get(key, [])[-times:]]
        return Usage(sum(tokens[0] for tokens in kept), sum(tokens[1] for tokens in kept))

    def abandon(self, key: str, reason: BaseException) -> None:
        """Give a claimed call up unmade; whoever waits for it gets ``reason`` raised."""
        self._resolve(key).set_exception(reason)

    def _resolve(self, key: str) -> Future[Outcome]:
        with self._lock:
            return self._running.pop(key, None) or Future()

    def drain(self) -> list[dict[str, Any]]:
        """Rows for the ``judge_calls`` table (all columns but run_id) of the owner's calls since its last drain, oldest first.

        Calls of a run that was killed before it drained them come with the next drain of the same owner.
        """
        with self._lock:
            rows = self._undrained.pop(self.owner, [])
            if rows:
                self._lines.append({"drained": len(rows), "owner": self.owner})
                for _ in self._index():
                    pass
        return rows

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of every call ever made in this folder, oldest first: a lost results file is rebuilt from them."""
        for record in self._lines.read():
            if "call_key" in record:
                yield _row(record)


def _row(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("answer", "reserved", "owner")}
