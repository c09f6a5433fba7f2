"""A suite file as far as it can be checked in an instant: it is there, it is TOML, its sections are ones that exist.

Nothing heavy is imported here, so that a mistyped path is refused before the language model stack is loaded. What the sections
say is checked by ``suite``.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from evalkit.errors import SuiteError
from evalkit.util.registry import near_miss
from evalkit.util.user_files import placed, read_text

SECTIONS = (
    "suite", "model", "corpus", "activations", "hook_points", "dictionary", "training", "judge", "reference", "evaluation",
    "stories",
)  # fmt: skip
NEEDED = ("suite", "model", "corpus")


class SuiteFile(NamedTuple):
    """What a suite file holds."""

    table: dict[str, Any]
    text: str


def read_suite(path: Path | str) -> SuiteFile:
    """Read a suite file; a byte order mark in front is left out.

    Raises:
        SuiteError: the file is missing, cannot be read, is not TOML, or has a section that does not exist or lacks one.
    """
    path = placed(path)
    if not path.exists():
        raise SuiteError("there is no such suite file", where=str(path), fix=_instead(path))
    text = read_text(path, SuiteError)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SuiteError(f"not valid TOML: {error}", where=str(path), fix="correct that line") from error
    check_sections(table, path)
    return SuiteFile(table, text)


def check_sections(table: dict[str, Any], path: Path) -> None:
    """Refuse parsed TOML whose sections are not those of a suite.

    Raises:
        SuiteError: a section that does not exist, which names the near miss; one that is missing.
    """
    for key in table:
        if key not in SECTIONS:
            raise SuiteError(f"unknown section '{key}'", where=str(path), fix=near_miss(key, SECTIONS))
    for key in NEEDED:
        if key not in table:
            raise SuiteError(f"the section [{key}] is missing", where=str(path), fix="see evalkit suite --help")


def _instead(path: Path) -> str:
    """What may have been meant by the path of a file that is not there."""
    try:
        there = sorted(p.name for p in path.parent.glob("*.toml"))
    except OSError:
        there = []
    return near_miss(path.name, there) if there else "name a TOML file; suites/quickstart.toml is a start"
