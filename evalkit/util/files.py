"""Durable files: what was finished before a kill is there, whole, after it.

1. ``publish`` and ``publish_once`` build a file or a folder in a temporary folder beside the target and rename it into
   place, so that a reader sees all of it or nothing. ``publish`` replaces what is there. ``publish_once`` is for what is
   named by its content: what is there is kept, so several processes may publish the same thing at once.
2. A temporary folder holds a file that its owner keeps locked. The next to publish into the same place removes those whose
   lock is free: their owner was killed. Those of living processes stay.
3. ``JsonLines`` appends JSON objects, one a line, and forces them to the disk before it returns. A kill or a full disk can
   tear only the last line; reading drops exactly that one and appending repairs it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from evalkit.errors import StoreUnreadable
from evalkit.util.disk import disk_full, disk_guard, is_full, size_text

try:
    import fcntl
except ImportError:  # a system without such locks: nothing is tidied there
    fcntl = None  # type: ignore[assignment]

OWNER = "owner.lock"
"""In every temporary folder; locked while the process that made it lives."""

_THERE = (errno.EEXIST, errno.ENOTEMPTY)
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE, AT_FDCWD
_BLOCK = 1 << 20


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to ``target``, in the place of what is there, when the block ends without an error.

    The block creates a file or a folder there. On an error nothing changes.

    Raises:
        DiskFull: there is no room; what was half-written is removed.
    """
    with _building(target) as temporary:
        yield temporary
        _flush(temporary)
        _put(temporary, target)


@contextmanager
def publish_once(target: Path, whole: str = "") -> Iterator[Path]:
    """As ``publish``, for what is named by its content: a target that is there when the block ends is kept.

    Args:
        target: the file or folder.
        whole: name of a file without which a folder is no whole one and is replaced; any is whole when left out.

    Raises:
        DiskFull: there is no room; what was half-written is removed.
    """
    with _building(target) as temporary:
        yield temporary
        _flush(temporary)
        try:
            if temporary.is_dir():
                temporary.rename(target)
            else:
                os.link(temporary, target)
            return
        except OSError:
            if target.exists() and (target / whole if target.is_dir() else target).exists():
                return
        _put(temporary, target)  # what is there is no whole one, or the file system has no hard links


def tidy(target: Path) -> None:
    """Remove what killed processes left half-written of ``target``, and beside it; a living process' work stays.

    What an evalkit before this one left of ``target`` says nothing of its owner: this is for whoever alone writes it.
    """
    sweep(target.parent)
    for path in target.parent.glob(f".{escape(target.name)}.????????.tmp"):
        if not path.is_dir():
            path.unlink(missing_ok=True)
            continue
        with suppress(OSError):
            path.rmdir()  # of another process that is about to lock it: it makes another
        if path.exists() and not (path / OWNER).exists():
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _building(target: Path) -> Iterator[Path]:
    """A path to build ``target`` at, in a folder of our own beside it; what is in that folder at the end is removed."""
    with disk_guard(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        folder, lock = _own_folder(target)
    try:
        yield folder / target.name
    except Exception as error:
        if not is_full(error):
            raise
        size = _size(folder)
        needed = f"more than {size_text(size)} needed" if size else ""
        _remove(folder)  # before the free space is looked at
        raise disk_full(target, error, needed) from error
    finally:
        _remove(folder)
        os.close(lock)


class _Own(NamedTuple):
    folder: Path
    lock: int


def _own_folder(target: Path) -> _Own:
    """A new temporary folder beside ``target`` and the descriptor that holds its lock."""
    for _ in range(100):
        folder = target.with_name(f".{target.name}.{uuid4().hex[:8]}.tmp")
        folder.mkdir(parents=True)
        try:
            lock = os.open(folder / OWNER, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # tidied away before it was locked
            continue
        if _try_lock(lock) is not False and (folder / OWNER).exists():
            return _Own(folder, lock)
        os.close(lock)
    raise OSError(errno.EAGAIN, "a temporary folder was removed again and again", str(target.parent))


def _try_lock(descriptor: int) -> bool | None:
    """Whether the lock could be had; None where the file system has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def sweep(folder: Path) -> None:
    """Remove the temporary folders in ``folder`` of processes that are no more."""
    for path in folder.glob(f".*.{'[0-9a-f]' * 8}.tmp"):
        try:
            lock = os.open(path / OWNER, os.O_RDWR)
        except OSError:
            with suppress(OSError):
                path.rmdir()  # killed before the lock was made; a living owner finds it gone and makes another
            continue
        try:
            if _try_lock(lock):
                _remove(path)
        finally:
            os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a temporary folder, the lock last: one that is removed by half can still be tidied."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != OWNER:
                path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    """Force a file, or all in a folder, to the disk: a rename must not come there before what it names."""
    for file in (path, *path.rglob("*")):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _put(temporary: Path, target: Path) -> None:
    """Rename ``temporary`` to ``target``, whatever is there and whoever else does so now."""
    while True:
        try:
            temporary.replace(target)
            return
        except OSError as error:  # a folder that is there cannot be replaced
            if error.errno not in _THERE:
                raise
        if _exchange(temporary, target):
            return
        with suppress(FileNotFoundError):
            target.rename(temporary.with_name(uuid4().hex))


def _exchange(a: Path, b: Path) -> bool:
    """Let two paths change places in one step, so that neither is ever absent; False where the system cannot."""
    try:
        done: int = ctypes.CDLL(None).renameat2(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE)
    except (AttributeError, OSError):
        return False
    return done == 0


class JsonLines:
    """An append-only file of JSON objects, one a line, each on the disk before ``append`` returns.

    Threads and processes may append at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def append(self, record: dict[str, Any]) -> None:
        """Write one record durably. NaN and infinities are refused: a missing value is ``None`` with a status.

        Raises:
            ValueError: a number is NaN or infinite.
            DiskFull: there is no room; the file is as it was.
        """
        self.append_all([record])

    def append_all(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records with one write, durably; see ``append``."""
        data = "".join(
            json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n" for record in records
        ).encode("utf-8", "replace")  # half of a character, from a message that quotes it, becomes a question mark
        if not data:
            return
        with self._lock, disk_guard(self.path, f"{size_text(len(data))} needed"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                if fcntl is not None:
                    with suppress(OSError):  # a file system without locks; closing gives the lock back
                        fcntl.flock(descriptor, fcntl.LOCK_EX)
                _append(descriptor, data)
            finally:
                os.close(descriptor)

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


def _append(descriptor: int, data: bytes) -> None:
    """Write ``data`` behind the last whole line and force it to the disk; after an error the file ends as it did."""
    end = _end_of_lines(descriptor)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, end)
        raise


def _end_of_lines(descriptor: int) -> int:
    """Drop a torn last line; the size that is left. The caller holds the lock: what looks torn is no write of a living one."""
    size = os.fstat(descriptor).st_size
    if not size or os.pread(descriptor, 1, size - 1) == b"\n":
        return size
    end = size
    while end:
        start = max(0, end - _BLOCK)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        end = start + found + 1
        if found >= 0:
            break
    os.ftruncate(descriptor, end)
    return end
