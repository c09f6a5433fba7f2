"""What every figure shares: letters that its fonts have, names that fit, and a file that is written whole.

1. ``plain`` makes any text drawable: a letter that no font here has is a box, and nothing is read as mathematics. Fonts for
   Chinese, Japanese, Korean and other writing are used where the machine has one (``FURTHER``).
2. ``named`` folds a name of any length into a few short lines, so that the layout always has room for the axes.
3. ``caption`` joins facts into lines that break between them.
4. ``save`` writes the figure under a temporary name and renames it; a place that cannot be written is one clear error.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from evalkit.errors import UsageError
from evalkit.util.files import publish
from evalkit.util.outputs import writing
from evalkit.util.terminal import BOX, legible, shown

SUFFIXES = (".png", ".svg", ".pdf")
SANS = "DejaVu Sans"
"""Comes with matplotlib."""
MONO = ["DejaVu Sans Mono", SANS]
FURTHER = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "Arial Unicode MS", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic",
    "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji",
)  # fmt: skip
"""Fonts asked for the letters that ``SANS`` lacks, where they are installed."""


@functools.cache
def _further() -> tuple[str, ...]:
    installed = {font.name for font in fontManager.ttflist}
    return tuple(name for name in FURTHER if name in installed)


@functools.cache
def _letters() -> frozenset[int]:
    """Code points that can be drawn, in bold too."""

    def of(family: str, weight: str = "normal") -> frozenset[int]:
        return frozenset(FT2Font(findfont(FontProperties(family=[family], weight=weight))).get_charmap())

    return (of(SANS) & of(SANS, "bold")).union(*map(of, _further()))


def plain(text: str) -> str:
    """``text`` of one or more lines as matplotlib draws it: no mathematics, and a box for what no font has."""
    known = _letters()
    keep = "\n\u00a0"  # the space at which no line breaks
    drawn = "".join(c if c in keep or ord(c) in known else BOX for part in text for c in (part if part in keep else shown(part)))
    return drawn.replace("$", r"\$")


def named(name: str, width: int, lines: int = 2) -> str:
    """``name`` on at most so many lines of so many letters; of a longer one the middle is left out."""
    text = shortened(legible(name), width * lines - 1)
    folded = textwrap.wrap(text, width, break_on_hyphens=False)
    if len(folded) > lines:  # blanks did not fall at the ends of lines
        folded = [text[i : i + width] for i in range(0, len(text), width)]
    drawn = plain("\n".join(folded) or BOX)
    return f" {drawn}" if drawn.startswith("_") else drawn  # matplotlib would leave it out of the key


def shortened(text: str, most: int) -> str:
    """``text`` of at most so many letters; of a longer one the middle is left out."""
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}\u2026{text[-(most // 2) :]}"


def caption(parts: Iterable[str], width: int) -> str:
    """``parts`` that are not empty as lines of so many letters, broken between parts, and inside a part that is longer."""
    short = [shortened(legible(part), 2 * width) for part in parts if part]
    unbroken = (part.replace(" ", "\u00a0") if len(part) <= width - 2 else part for part in short)
    folded = textwrap.wrap("; ".join(unbroken), width, break_on_hyphens=False)
    return plain("\n".join(folded))


def bare(ax: Axes, *sides: str, grid: Literal["x", "both"] | None = None) -> None:
    """Hide ``sides`` of the frame, and draw a light grid behind the data."""
    if grid:
        ax.grid(axis=grid, color="#E4E4E4", linewidth=0.6)
    ax.set_axisbelow(True)
    for side in sides:
        ax.spines[side].set_visible(False)


def checked_rows(path: Path, frame: pd.DataFrame, columns: set[str], evaluation: str, what: str, source: str) -> Path:
    """``path``, where ``frame`` has rows with ``columns``; ``what`` they have to be, and which method of ``Results`` gives them.

    Raises:
        UsageError: there are no rows or other ones, or no figure has the suffix of ``path``.
    """
    check_suffix(Path(path))
    if frame.empty:
        raise UsageError("there is nothing to draw", where=str(path), fix=f"run a suite with the evaluation '{evaluation}'")
    if not set(frame.columns) >= columns:
        raise UsageError(f"these are not {what}", where=str(path), fix=f"give it results.{source}")
    return Path(path)


def check_suffix(path: Path, suffixes: Iterable[str] = SUFFIXES, what: str = "a figure") -> None:
    """Refuse a file name that does not say which kind of file.

    Raises:
        UsageError: its suffix is none of ``suffixes``.
    """
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{what} cannot be written as '{path.suffix}'", where=str(path), fix=f"one of {', '.join(suffixes)}")


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` as the suffix of ``path`` says, whole or not at all; its folder is made.

    Raises:
        UsageError: it cannot be written there.
    """
    further = list(_further())
    for text in figure.findobj(Text):
        text.set_fontfamily([*text.get_fontfamily(), *further])
    fonts: Any = {"font.family": ["sans-serif", *further]}  # of labels that are made while it is drawn
    with writing(path, "the figure"), publish(path) as temporary, matplotlib.rc_context(fonts):
        figure.savefig(temporary, format=path.suffix[1:].lower(), facecolor="white")
