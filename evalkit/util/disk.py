"""Room on the disk: reserved before it is needed, and said with path and sizes where there is none.

1. ``disk_guard`` turns every sign of a full disk, whichever library gives it, into one clear ``DiskFull``. ``disk_failures``
   turns whatever keeps a file from being written into the failure of one unit.
2. ``mapped_array`` reserves the space of a memory map first: a sparse file on a full disk would end the process by a
   signal, without a word.
"""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from evalkit.errors import DiskFailed, DiskFull, EvalkitError

if TYPE_CHECKING:
    import numpy as np

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|os error (28|122|27)\b|\d+ requested and \d+ written"
)
"""How libraries say it whose errors carry no number; the last is NumPy's."""

SAID_FROM = 10 << 20
"""Temporary files from this size on, in bytes, are announced."""

_BLOCK = 1 << 20


def size_text(size: int) -> str:
    """``size`` bytes as people say them: ``12 kB``, ``3.4 MB``, ``1.2 GB``."""
    for unit, bytes_of in (("GB", 1e9), ("MB", 1e6)):
        if size >= bytes_of:
            return f"{size / bytes_of:,.1f} {unit}"
    return f"{size / 1e3:,.0f} kB"


def is_full(error: BaseException | None) -> bool:
    """Whether a foreign error says that a disk, a quota or the largest size of a file is exhausted."""
    while error is not None:
        if isinstance(error, EvalkitError):
            return False
        if (isinstance(error, OSError) and error.errno in FULL) or FULL_WORDS.search(str(error)):
            return True
        error = error.__cause__
    return False


def disk_full(path: Path, error: BaseException, needed: str = "") -> DiskFull:
    """The error for a disk that ``error`` says is full; ``needed`` says how much was to be written."""
    said = FULL_WORDS.search(str(error))
    reason = error.strerror if isinstance(error, OSError) else said[0] if said else None
    if not reason or any(digit.isdigit() for digit in reason):
        reason = os.strerror(errno.ENOSPC)
    sizes = [needed] if needed else []
    with suppress(OSError):
        sizes.append(f"{size_text(shutil.disk_usage(_existing(path)).free)} free")
    fix = "free space there or choose another place (--results, or TMPDIR for temporary files), then run the same command again"
    return DiskFull(f"{reason}: {', '.join(sizes)}", where=str(path), fix=fix)


@contextmanager
def disk_guard(path: Path, needed: str = "") -> Iterator[None]:
    """Turn what says that the disk of ``path`` is full into ``DiskFull``; other errors pass."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        named = error.filename if isinstance(error, OSError) else None
        raise disk_full(Path(named) if isinstance(named, str) else path, error, needed) from error


@contextmanager
def disk_failures(path: Path, kept: str = "") -> Iterator[None]:
    """Turn the errors of writing ``path``, one unit's file, into a ``DiskFailed``; ``kept`` says what is still there."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, DiskFull) as error:
        reason = error.what if isinstance(error, DiskFull) else getattr(error, "strerror", None) or str(error)
        raise DiskFailed(
            f"nothing more can be written: {reason}",
            where=str(path),
            fix=f"free space there, or name another place with --results; {kept or 'then run the same command again'}",
        ) from error


def check_room(path: Path, size: int) -> None:
    """Refuse to begin writing ``size`` bytes at ``path`` where fewer are free.

    Raises:
        DiskFull: it does not fit.
    """
    if size > shutil.disk_usage(_existing(path)).free:
        raise disk_full(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), f"{size_text(size)} needed")


def _existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def mapped_array(shape: tuple[int, ...], path: Path | None = None, say: Callable[[str], None] = lambda words: None) -> np.ndarray:
    """A float32 array of zeros in a memory-mapped file whose space is reserved: the system may move it out of memory.

    Args:
        shape: its shape.
        path: a new .npy file; an unnamed temporary file, which goes with the array, when left out.
        say: prints the size and place of a temporary file that is not small.

    Raises:
        DiskFull: the file does not fit.
    """
    import numpy as np

    size = 4 * math.prod(shape)
    if not size:  # nothing can be mapped
        empty = np.zeros(shape, dtype=np.float32)
        if path:
            np.save(path, empty)
        return empty
    where = path or Path(tempfile.gettempdir())
    if path is None and size >= SAID_FROM:
        say(f"a temporary file of {size_text(size)} in {where} (TMPDIR chooses the place)")
    with (
        disk_guard(where, f"{size_text(size)} needed"),
        path.open("w+b") if path else tempfile.TemporaryFile(dir=where) as handle,
    ):
        if path:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(handle, header)
            handle.flush()
        start = handle.tell()
        _reserve(handle.fileno(), start, size)
        # the mapping keeps the file after the handle is closed
        return np.memmap(handle, dtype=np.float32, mode="r+", offset=start, shape=shape)


def _reserve(descriptor: int, start: int, size: int) -> None:
    """Give ``size`` bytes from ``start`` on their place on the disk, as zeros."""
    try:
        os.posix_fallocate(descriptor, start, size)
        return
    except AttributeError:  # no such call on this system
        pass
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    free = os.fstatvfs(descriptor)
    if size > free.f_bavail * free.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for done in range(0, size, _BLOCK):
        block = memoryview(bytes(min(_BLOCK, size - done)))
        while block:
            block = block[os.pwrite(descriptor, block, start + size - done - len(block)) :]
    os.fsync(descriptor)
