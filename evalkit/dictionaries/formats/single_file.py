"""Formats whose dictionary is one file: which file is meant, and errors that name it.

1. A file that the user named is taken. In a folder, the first pattern that matches decides, and it must match one file only:
   the layers of a model lie side by side under some writers, and none of them is the obvious one.
2. A dictionary that refuses its weights knows the tensor, not the file; ``naming`` puts the file before it.
3. Some writers say in the path alone what a file was trained on; ``folders_of`` gives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evalkit.dictionaries.formats.base import Format, Place
from evalkit.errors import DictionaryError

SHOWN = 8
"""Files that a message lists."""


def one_file(format: Format, place: Place, *names: str) -> Path:
    """The file of the dictionary at ``place``.

    Args:
        format: whose refusal it is.
        place: what the user named.
        names: glob patterns, the most specific first.

    Raises:
        DictionaryError: no file matches, or a folder holds several that do.
    """
    if place.file is not None and (path := place.find(*names)) is not None:
        return path
    for name in names if place.file is None else ():
        found = sorted(place.folder.glob(name))
        if len(found) > 1:
            shown = ", ".join(str(path.relative_to(place.folder)) for path in found[:SHOWN])
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            format.refuse(place, f"the folder holds {len(found)} dictionaries: {shown}{more}", "name one of the files")
        if found:
            return found[0]
    format.refuse(place, f"there is no file of the format '{format.name}' here", f"name a file such as {names[0]}")


def folders_of(path: Path) -> tuple[str, ...]:
    """The parts of the file's full path. Links among the folders are followed, the file's own is not: in the hub's cache every
    file is a link to a nameless blob, while its folders are those of the repository."""
    return (*path.parent.resolve().parts, path.name)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put ``path`` before what an error of the block is about, unless the error names it already."""
    try:
        yield
    except DictionaryError as error:
        if str(path) in error.where or str(path.parent) in error.where:
            raise
        raise DictionaryError(error.what, where=f"{path}: {error.where}" if error.where else str(path), fix=error.fix) from error
