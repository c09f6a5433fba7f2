"""Opening the results file, so that every way it can fail is one clear error.

1. DuckDB lets one process write, or several read, and refuses the rest. Connections are therefore short, and ``connect``
   waits for a lock with jittered pauses before it gives up and names the holder.
2. A file that cannot be opened for another reason is damaged or foreign: the journals of the runs can rebuild it.
3. New files are written in a layout that DuckDB 1.4 and later can read.
"""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path

import duckdb

from evalkit.errors import DiskFull, StoreAbsent, StoreLocked, StoreUnreadable
from evalkit.util.disk import disk_full, is_full
from evalkit.util.registry import near_miss

LAYOUT = {"storage_compatibility_version": "v1.4.0"}
"""DuckDB settings of every file evalkit creates."""
HOLDER = re.compile(r"held in (?P<program>.+?) \(PID (?P<pid>\d+)\)")


def _locked(error: duckdb.Error) -> bool:
    message = str(error)
    return "Could not set lock" in message or "with a different configuration" in message


def holder(error: duckdb.Error) -> str:
    """Who holds the file, in words, from DuckDB's message."""
    found = HOLDER.search(str(error))
    return f"process {found['pid']} ({found['program']})" if found else f"another connection of this process ({os.getpid()})"


def check_place(path: Path, *, read_only: bool = False) -> None:
    """Refuse a path that cannot be a results file, before DuckDB says so in its own words.

    Raises:
        StoreAbsent: it is not there (``read_only``).
        StoreUnreadable: it is a folder, without a folder, or not permitted.
    """
    if read_only and not path.exists():
        raise StoreAbsent("there is no results file", where=str(path), fix=_instead(path))
    if path.is_dir():
        raise StoreUnreadable("the results file is a folder", where=str(path), fix="name a file, such as results/evalkit.duckdb")
    if not path.parent.is_dir():
        raise StoreUnreadable("the folder of the results file does not exist", where=str(path.parent), fix="create the folder")
    if not os.access(path if path.exists() else path.parent, os.R_OK if read_only else os.W_OK):
        verb = "read" if read_only else "written"
        raise StoreUnreadable(f"the results file cannot be {verb}", where=str(path), fix="change its permissions or name another")


def _instead(path: Path) -> str:
    """What to do where no results file has the name ``path``."""
    try:
        there = sorted(other.name for other in path.parent.glob("*.duckdb"))
    except OSError:
        there = []
    other = f", or --results with another file ({near_miss(path.name, there)})" if there else ""
    return f"evalkit run SUITE{other}"


def damaged(path: Path, error: Exception) -> StoreUnreadable | DiskFull:
    """The error for a file DuckDB refuses: it can be had again from the journals, unless the disk is full."""
    if is_full(error):
        return disk_full(path, error)
    reason = str(error).strip().splitlines()[0]
    return StoreUnreadable(
        f"the results file cannot be opened: {reason}",
        where=str(path),
        fix="evalkit rebuild (moves this file aside and builds it again from the journals of the runs)",
    )


def connect(path: Path, *, read_only: bool = False, wait: float = 20.0) -> duckdb.DuckDBPyConnection:
    """A connection to the results file; close it soon.

    Args:
        path: the file; created where absent, unless ``read_only``.
        read_only: several processes may read together; none while one writes.
        wait: seconds to wait for a lock.

    Raises:
        StoreLocked: the lock was not free within ``wait``; names the holder.
        StoreUnreadable: the file is absent, damaged or foreign, or its folder cannot be used.
    """
    deadline = time.monotonic() + wait
    pause = 0.02
    while True:
        check_place(path, read_only=read_only)
        try:
            return duckdb.connect(str(path), read_only=read_only, config={} if read_only else dict(LAYOUT))
        except duckdb.Error as error:
            if not _locked(error):
                raise damaged(path, error) from error
            left = deadline - time.monotonic()
            if left <= 0:
                raise StoreLocked(
                    f"the results file is held by {holder(error)}",
                    where=str(path),
                    fix="close that program (a notebook or a DuckDB shell, perhaps) and run the command again",
                ) from error
            time.sleep(min(left, pause * random.uniform(0.5, 1.5)))
            pause = min(0.5, pause * 1.6)


def read(connection: duckdb.DuckDBPyConnection, path: Path, query: str) -> list[tuple[object, ...]]:
    """Rows of one of evalkit's own queries; a failure means a damaged or foreign file, not a wrong query."""
    try:
        return connection.execute(query).fetchall()
    except duckdb.Error as error:
        raise damaged(path, error) from error
