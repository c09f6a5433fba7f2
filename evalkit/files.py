"""Durable files: what was finished before a kill is there, whole, after it.

1. ``publish`` builds a file or a folder under a temporary name beside its target and renames it into place, so that a
   reader sees all of it or nothing.
2. ``JsonLines`` appends one JSON object a line and forces each to the disk before it returns. A kill can tear only the
   last line; reading drops exactly that one and appending repairs it.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

from evalkit.errors import StoreUnreadable


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; rename it to ``target`` when the block ends without an error.

    The block may create a file or a folder there. An existing target is replaced; on an error nothing changes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
        if temporary.is_dir() and target.is_dir():
            old = target.with_name(f".{target.name}.{uuid4().hex[:8]}.old")
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.replace(target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def tidy(target: Path) -> None:
    """Remove what kills left half-written of ``target``. For whoever alone writes it: another's unfinished work would go too."""
    for path in target.parent.glob(f".{escape(target.name)}.????????.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class JsonLines:
    """An append-only file of JSON objects, one a line, each on the disk before ``append`` returns. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._repaired = False

    def append(self, record: dict[str, Any]) -> None:
        """Write one record durably. NaN and infinities are refused: a missing value is ``None`` with a status."""
        self.append_all([record])

    def append_all(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records durably with one write and one fsync, all of them or, at a kill, a beginning of them."""
        lines = b"".join(
            json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n" for record in records
        )
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._repaired:
                self._drop_torn_tail()
                self._repaired = True
            with self.path.open("ab") as handle:
                handle.write(lines)
                handle.flush()
                os.fsync(handle.fileno())

    def _drop_torn_tail(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            with self.path.open("r+b") as handle:
                handle.truncate(data.rfind(b"\n") + 1)

    def read(self) -> Iterator[dict[str, Any]]:
        """Every whole record, oldest first. A torn last line is skipped.

        Raises:
            StoreUnreadable: a line other than a torn last one is not JSON.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise StoreUnreadable(
                        f"line {number} is not JSON: {error}",
                        where=str(self.path),
                        fix="move the file aside and run again; what it held is computed again",
                    ) from error
