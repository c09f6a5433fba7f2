"""Files that a user wrote and named: where a name points to, and what stands in the file.

1. ``placed`` turns a name of a suite into a path: ``~`` is the home folder, a relative name starts at the suite file.
2. ``read_text`` reads UTF-8. A byte order mark, as Windows editors write one, is passed over; line ends become line feeds.
3. ``half_character`` finds half of a character, which JSON can spell ("\\ud83d") and no text can hold.

Whoever reads such a file says which kind of error its reader expects.
"""

from __future__ import annotations

import re
from pathlib import Path

from evalkit.errors import EvalkitError, UsageError

DEFAULT_RESULTS = Path("results/evalkit.duckdb")
"""The results file where none is named."""
_HALF = re.compile("[\ud800-\udfff]")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def placed(name: str | Path, folder: Path = Path()) -> Path:
    """The path that ``name`` means in a file that lies in ``folder``.

    Raises:
        UsageError: it begins with the home folder of somebody who has none.
    """
    try:
        return folder / Path(name).expanduser()
    except RuntimeError as error:
        raise UsageError(f"there is no such home folder: {error}", where=str(name), fix="write the whole path") from error


def read_text(path: Path, error: type[EvalkitError] = UsageError) -> str:
    """What stands in ``path``, without a byte order mark, with line feeds for line ends.

    Raises:
        error: the file cannot be read, or is not UTF-8; the first byte that is not is named.
    """
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as wrong:
        kept = "utf-16" if data.startswith(_UTF16) else "latin1"
        raise error(
            f"byte {wrong.start} (0x{wrong.object[wrong.start]:02x}) is not UTF-8"
            + (": the file is UTF-16" if kept == "utf-16" else ""),
            where=str(path),
            fix=f"save the file as UTF-8, for example: iconv -f {kept} -t utf8 {path.name}",
        ) from wrong
    except OSError as wrong:
        raise error(f"the file cannot be read: {wrong.strerror or wrong}", where=str(path), fix="check the path") from wrong


def half_character(text: str) -> str | None:
    """The first half of a character in ``text``, as JSON spells it; None where there is none."""
    found = _HALF.search(text)
    return f"\\u{ord(found[0]):04x}" if found else None
