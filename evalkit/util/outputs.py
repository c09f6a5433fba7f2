"""Files and folders that cannot be read or written: what the system says becomes one clear error, at one place.

1. ``path_error`` turns an OSError into a ``UsageError`` or, for what holds results, a ``StoreError``: what, where, what to do.
2. ``writing`` does so around the making of one named output (figure, page, exported dictionary). The error names the output's
   own path: the file is written under a temporary name, which says nothing to anybody.
3. ``checked`` looks at a file that a user named before the work for it begins. It is refused where its folder is missing, which
   is a mistyped path more often than a wish. Default places are made.

The command line turns what passes here too: a lock, a cache, a folder of packaged models.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evalkit.errors import EvalkitError, StoreError, UsageError
from evalkit.util.disk import disk_full, is_full

TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?:tmp|old)")
"""Name under which ``files.publish`` writes."""
DENIED = "change its permissions, or name another place"
FIXES = {
    errno.EACCES: DENIED,
    errno.EPERM: DENIED,
    errno.EROFS: "name a place that can be written",
    errno.ENOENT: "correct the path",
    errno.ENOTDIR: "correct the path: a part of it is a file, not a folder",
    errno.EISDIR: "name a file, not a folder",
    errno.EEXIST: "name another place, or move what is there aside",
    errno.ENOTEMPTY: "name another place, or move what is there aside",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def path_error(error: OSError, *, what: str = "", where: Path | None = None, stored: bool = False) -> EvalkitError:
    """``error`` of the system about a file or folder, in evalkit's form.

    Args:
        what: what cannot be done, as in "the figure cannot be written".
        where: the path as the user knows it; the default is the one that the error names.
        stored: it is about results, and something may have been started: exit code 5.
    """
    if is_full(error):
        return disk_full(Path(_place(error)) if where is None else where, error)
    reason = error.strerror or str(error) or type(error).__name__
    place = str(where) if where is not None else _place(error)
    kind = StoreError if stored else UsageError
    said = f"{what or 'a file or folder cannot be used'}: {reason}"
    return kind(said, where=place, fix=FIXES.get(error.errno or 0, "check that path, or name another place"))


def _place(error: OSError) -> str:
    """The path that the error names, whole; '' where it names none."""
    if error.filename is None:
        return ""
    *folders, name = Path(os.fsdecode(error.filename)).parts or ("",)
    inside = TEMPORARY.fullmatch(name)
    # what is built in a temporary folder gets its name beside it
    return os.path.abspath(Path(*(part for part in folders if not TEMPORARY.fullmatch(part)), inside["name"] if inside else name))


def checked(path: Path, what: str, name: str) -> Path:
    """``path`` of a file that a user asked for, where it can be written.

    Args:
        what: what it is ("the figure").
        name: what a file in a folder named by mistake may be called.

    Raises:
        UsageError: it is a folder, its folder is missing, or one cannot write there.
    """
    with writing(path, what):
        if path.is_dir():
            raise UsageError("this is a folder, not a file", where=str(path), fix=f"-o {path / name}")
        if not path.parent.is_dir():
            raise UsageError(
                f"the folder of {what} does not exist", where=str(path.parent), fix="make it, or name another file with -o"
            )
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return path


@contextmanager
def writing(path: Path, what: str) -> Iterator[None]:
    """Around the writing of ``path``: an error of the system names it.

    Args:
        path: what the user named, or the default said in the help.
        what: what it is ("the figure").

    Raises:
        UsageError: it cannot be written; nothing half-written is left.
    """
    try:
        yield
    except OSError as error:
        raise path_error(error, what=f"{what} cannot be written", where=path) from error
