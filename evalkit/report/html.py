"""HTML from templates: everything is escaped, and nothing in a results file can break the page.

A control character that is left in a name becomes a box.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from evalkit.report.render import Column, blocks
from evalkit.util.terminal import shown

HERE = Path(__file__).parent
FOLDERS = (HERE / "templates", HERE / "views" / "templates")
MARK = "Bold"
WIDTH, KEY = 165, 26
"""Letters of a table's widest block, in small type on a screen, and of a key column in it."""


@functools.cache
def environment() -> jinja2.Environment:
    """Where the templates are, and what they may call."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDERS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(blocks=_blocks, mark=MARK, key=KEY)
    return made


def rendered(template: str, **values: Any) -> Markup:
    """``template`` filled with ``values``."""
    return Markup(environment().get_template(template).render(**values))


def filled(pattern: str, *values: str) -> Markup:
    """The HTML ``pattern`` with each '{}' replaced by a text."""
    return Markup(pattern).format(*map(_clean, values))


def _blocks(columns: list[Column]) -> list[list[int]]:
    """Indices of the columns of each table: the keys, which come again in each, may fold, so they count as narrow."""
    longest = [max(len(text) for text in [column.heading, *(cell.text for cell in column.cells)]) for column in columns]
    return blocks(columns, [[" " * (min(n, KEY) if c.group < 0 else n)] for n, c in zip(longest, columns, strict=True)], WIDTH)


def _clean(value: Any) -> Any:
    """What a template may print: text without control characters, which HTML does not allow or browsers hide."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c == "\u00a0" else shown(c) for c in value)
