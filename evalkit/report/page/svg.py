"""Figures as parts of a page: the SVG that a view draws, without what only a file of its own needs.

1. A figure is drawn with a fixed salt for its identifiers, and its metadata (which has the date) is dropped, so that the same
   rows give the same bytes.
2. Identifiers get a prefix of their own: several figures share one page. Namespaces go, since HTML knows SVG by itself, and with
   them every address that might be taken for something to load.
3. The size in points becomes the widest the figure is shown; on a narrow screen it shrinks.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup

from evalkit.errors import UsageError
from evalkit.report.draw import planned
from evalkit.store.reader import Results

SALT = "evalkit"
SCALE = 1.9
"""Pixels of the page to a point of the figure: what is 8 points in print is read on a screen."""
ILLEGAL = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Letters XML does not allow; a name may hold them."""


class Figure(NamedTuple):
    """One picture of the page."""

    title: str
    svg: Markup
    width: int
    """Pixels at most."""


def run_figures(store: Results, name: str, run: str) -> list[Figure]:
    """Every figure of one view of a run; none where there is nothing to draw, as of an evaluation whose every unit failed."""
    found: list[Figure] = []
    with tempfile.TemporaryDirectory() as scratch, matplotlib.rc_context({"svg.hashsalt": SALT, "svg.fonttype": "path"}):
        for figure, path in planned(store, name, run, Path(scratch), ".svg"):
            with contextlib.suppress(UsageError):
                figure.draw(path)
                title = f"{name}: {figure.title}" if figure.title else name
                found.append(_inline(path, f"{name}-{len(found)}", title))
    return found


def _inline(path: Path, prefix: str, title: str) -> Figure:
    """The SVG file as an element that can stand among others in HTML."""
    root = ElementTree.fromstring(ILLEGAL.sub("\ufffd", path.read_text(encoding="utf-8")))
    for parent in list(root.iter()):
        for child in list(parent):
            if _bare(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _bare(element.tag)
        element.text, element.tail = (text if text and text.strip() else None for text in (element.text, element.tail))
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            name = _bare(key)
            if name == "id":
                value = f"{prefix}-{value}"
            elif name == "href":
                value = value.replace("#", f"#{prefix}-")
            else:
                value = value.replace("url(#", f"url(#{prefix}-")
            element.set(name, value)
    width = round(float(root.attrib.pop("width").removesuffix("pt")) * SCALE)
    for key in ("height", "version"):
        root.attrib.pop(key, None)
    # what the file's style sheet has for every line
    root.set("style", "stroke-linejoin:round;stroke-linecap:butt")
    root.set("role", "img")
    root.set("aria-label", title)
    return Figure(title, Markup(ElementTree.tostring(root, encoding="unicode")), width)


def _bare(name: str) -> str:
    """A name without its namespace."""
    return name.rpartition("}")[2]
