"""Figures as parts of a page: the SVG that ``draw`` writes, without what only a file of its own needs.

1. A figure is drawn with a fixed salt for its identifiers, and its metadata (which has the date) is dropped, so that the same
   rows give the same bytes.
2. Identifiers get a prefix of their own: several figures share one page. Namespaces go, since HTML knows SVG by itself, and with
   them every address that might be taken for something to load.
3. The size in points becomes the widest the figure is shown; on a narrow screen it shrinks.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup

from evalkit.errors import UsageError
from evalkit.report.draw import draw, draw_run
from evalkit.store.reader import Results

SALT = "evalkit"
SCALE = 1.9
"""Pixels of the page to a point of the figure: what is 8 points in print is read on a screen."""
NAMES = {
    "by-concept": "by concept",
    "tree": "the tree whose parents carry most",
    "pareto": "all against L0",
    "density": "density",
}
"""Figures beside the scores, by the end of their files' names."""
ILLEGAL = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Letters XML does not allow; a name may hold them."""


class Figure(NamedTuple):
    """One picture of the page."""

    title: str
    svg: Markup
    width: int
    """Pixels at most."""


def run_figures(store: Results, name: str, run: str) -> list[Figure]:
    """Every figure that ``draw`` knows of one evaluation of a run; of 'training', the curves, where the run trained something."""
    with tempfile.TemporaryDirectory() as scratch, matplotlib.rc_context({"svg.hashsalt": SALT, "svg.fonttype": "path"}):
        folder = Path(scratch)
        drawn = _quietly(lambda: _draw_all(store, name, run, folder))
        return [_inline(path, f"{name}-{place}", _title(name, path, run)) for place, path in enumerate(drawn)]


def _draw_all(store: Results, name: str, run: str, folder: Path) -> list[Path]:
    if name == "training":
        draw(store, name, folder / "curves.svg", run=run)
        return [folder / "curves.svg"]
    drawn = draw_run(store, name, run, folder, ".svg")
    if name == "geometry":
        drawn += _quietly(lambda: _density(store, run, folder))
    return drawn


def _density(store: Results, run: str, folder: Path) -> list[Path]:
    draw(store, "geometry", folder / "geometry-density.svg", "density", run)
    return [folder / "geometry-density.svg"]


def _quietly(drawing: Callable[[], list[Path]]) -> list[Path]:
    """Nothing where there is nothing to draw, as of an evaluation whose every unit failed: its table says so."""
    try:
        return drawing()
    except UsageError:
        return []


def _title(name: str, path: Path, run: str) -> str:
    end = path.stem.removeprefix(f"{run}-").removeprefix(f"{name}-")
    return f"{name}: {NAMES[end]}" if end in NAMES else name


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
    # what the file's style sheet said of every line
    root.set("style", "stroke-linejoin:round;stroke-linecap:butt")
    root.set("role", "img")
    root.set("aria-label", title)
    return Figure(title, Markup(ElementTree.tostring(root, encoding="unicode")), width)


def _bare(name: str) -> str:
    """A name without its namespace."""
    return name.rpartition("}")[2]
