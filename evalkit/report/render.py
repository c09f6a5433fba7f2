"""A sheet of cells as plain text, Markdown or LaTeX.

1. A ``Sheet`` is what the reader should see, format aside: a title, columns of cells, notes.
2. Text is cut into blocks where it would be wider than ``WIDTH``: the key columns come again, and columns that belong
   together stay together.
3. Markdown and LaTeX (booktabs) mark the best value in bold where text has a star.
4. Names are the user's, tokens the studied text's. What a format or a terminal would act on is shown instead
   (``terminal.legible``).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len

from evalkit.util.terminal import legible

WIDTH = 140
"""Widest line of a text table."""
GAP = "  "
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


class Cell(NamedTuple):
    """One value as shown."""

    text: str
    best: bool = False


class Column(NamedTuple):
    """One column of a sheet."""

    heading: str
    cells: list[Cell]
    number: bool = True
    """Aligned to the right."""
    group: int = 0
    """Columns of one group are not torn apart; group -1 are keys, shown in every block."""


class Sheet(NamedTuple):
    """A table before it has a format."""

    title: str
    columns: list[Column]
    notes: list[str]

    def all_notes(self, mark: str) -> list[str]:
        """The notes, and what ``mark`` means where a best value is marked with it."""
        marked = any(cell.best for column in self.columns for cell in column.cells)
        return [
            *(
                [f"{mark}: best of its column among dictionaries within 20 % in L0, different from each at p < 0.05 (Holm)."]
                if marked
                else []
            ),
            *self.notes,
        ]


def _padded(column: Column) -> list[str]:
    """Heading and cells of one width; room for a star is kept where any cell has one."""
    starred = any(cell.best for cell in column.cells)
    texts = [legible(cell.text) + ("*" if cell.best else " " if starred and column.number else "") for cell in column.cells]
    texts = [legible(column.heading), *texts]
    width = max(map(cell_len, texts))
    blank = [" " * (width - cell_len(text)) for text in texts]
    return [f"{space}{text}" if column.number else f"{text}{space}" for text, space in zip(texts, blank, strict=True)]


def blocks(columns: Sequence[Column], padded: Sequence[list[str]] | None = None, width: int = WIDTH) -> list[list[int]]:
    """Indices of the columns of each block, so that none is wider than ``width`` letters where a single group fits."""
    padded = padded or [_padded(column) for column in columns]
    keys = [i for i, column in enumerate(columns) if column.group < 0]
    room = width - sum(cell_len(padded[i][0]) + len(GAP) for i in keys)
    found: list[list[int]] = []
    used = 0
    for group in sorted({column.group for column in columns if column.group >= 0}):
        members = [i for i, column in enumerate(columns) if column.group == group]
        wide = sum(cell_len(padded[i][0]) + len(GAP) for i in members)
        if not found or used + wide > room:
            found.append(list(keys))
            used = 0
        found[-1].extend(members)
        used += wide
    return found or [keys]


def as_text(sheet: Sheet) -> str:
    """Aligned columns, ``WIDTH`` wide at most where a single group fits, notes wrapped below."""
    padded = [_padded(column) for column in sheet.columns]
    parts = textwrap.wrap(legible(sheet.title), WIDTH)
    for block in blocks(sheet.columns, padded):
        lines = [GAP.join(padded[i][row] for i in block).rstrip() for row in range(len(padded[0]))]
        rule = "-" * max(map(cell_len, lines))
        parts += ["", lines[0], rule, *lines[1:], rule]
    for note in sheet.all_notes("*"):
        parts += textwrap.wrap(legible(note), WIDTH, subsequent_indent="  ")
    return "\n".join(parts)


def as_markdown(sheet: Sheet) -> str:
    """A GitHub table with a bold title and notes below."""

    def escaped(text: str) -> str:
        shown = re.sub(r"([|*_<>`\\&~$])", r"\\\1", legible(text))
        return re.sub(r"\](?=[(\[:])", r"\]", shown)  # a link has one of these behind its text

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def value(cell: Cell) -> str:
        return f"**{escaped(cell.text)}**" if cell.best else escaped(cell.text)

    rows = [[value(column.cells[row]) for column in sheet.columns] for row in range(len(sheet.columns[0].cells))]
    head = [line([escaped(column.heading) for column in sheet.columns])]
    head.append(line(["---:" if column.number else ":---" for column in sheet.columns]))
    notes = [f"- {escaped(note)}" for note in sheet.all_notes("Bold")]
    return "\n".join([f"**{escaped(sheet.title)}**", "", *head, *map(line, rows), "", *notes]).rstrip()


def latex_escaped(text: str) -> str:
    """``text`` with LaTeX's special characters made harmless, minus signs as such, and codes for what cannot be printed."""
    shown = "".join(c if c.isprintable() else " " if c in " \n\t\u00a0" else f"U+{ord(c):04X}" for c in text)
    return re.sub(r"(?<![\w.)])-(?=\d)", "$-$", "".join(LATEX.get(character, character) for character in shown))


def _latex_row(cells: Sequence[str]) -> str:
    """One row. An empty group keeps the commands before it from taking a bracket or a star that it begins with for their own."""
    row = " & ".join(cells)
    return f"{'{}' if row.lstrip().startswith(('[', '*')) else ''}{row} \\\\"


def as_latex(sheet: Sheet) -> str:
    """A floating table in the manner of booktabs; needs ``\\usepackage{booktabs}``."""
    rows = []
    for row in range(len(sheet.columns[0].cells)):
        cells = [column.cells[row] for column in sheet.columns]
        shown = [rf"\textbf{{{latex_escaped(c.text)}}}" if c.best else latex_escaped(c.text) for c in cells]
        rows.append(_latex_row(shown))
    alignment = "".join("r" if column.number else "l" for column in sheet.columns)
    notes = [rf"\par\smallskip\footnotesize {latex_escaped(note)}" for note in sheet.all_notes("Bold")]
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering",
            rf"\caption{{{latex_escaped(sheet.title)}}}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            _latex_row([latex_escaped(column.heading) for column in sheet.columns]),
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            *notes,
            r"\end{table}",
        ]
    )
