"""A causal tree on the page: its layout in pixels, which the template draws, and its edges in numbers.

1. Boxes are of one size. A box whose feature has a section of its own on the page leads there.
2. What is cut for room stands whole in the box's title and in the list below.
3. A line is as thick as the share of the activation that is lost when the parent is ablated.
"""

from __future__ import annotations

from typing import NamedTuple

from evalkit.report.selection import Name
from evalkit.report.tables import NOTHING, number, with_interval
from evalkit.report.views.causal_tree.data import Edge, Tree
from evalkit.report.views.causal_tree.layout import Link, label, lay_out, tokens_of

BOX, GAP = 176, 18
"""Pixels: width of a box, and between two."""
LINE, PAD, BETWEEN = 15, 8, 44
"""Pixels: height of a line of text, above and below it in a box, and between rows."""
LETTERS, FOLDS = 24, 2
"""Letters of a line in a box, and lines of an explanation."""


class Box(NamedTuple):
    """One feature."""

    x: float
    y: float
    name: str
    lines: list[str]
    title: str
    anchor: str | None
    """Section of the page; None where there is none."""


class EdgeRow(NamedTuple):
    """One edge in numbers."""

    parent: str
    parent_anchor: str | None
    child: str
    tokens: str
    explanation: str
    share: str
    carried: str
    p: str


class Picture(NamedTuple):
    """A tree to draw."""

    width: int
    height: int
    box: tuple[int, int]
    """Width and height of every box."""
    boxes: list[Box]
    links: list[tuple[Box, Box, Link]]
    """Child, parent and what stands beside the line."""
    rows: list[EdgeRow]


def picture_of(tree: Tree, anchors: dict[Name, str]) -> Picture:
    """The picture of a tree that has edges.

    Args:
        anchors: sections of features on the page, by dictionary, hook point and number.
    """
    layout = lay_out(tree, lambda _: LETTERS, FOLDS)
    tall = 2 * PAD + LINE * (1 + max(len(box.lines) for box in layout.boxes.values()))
    boxes = {}
    for node, box in layout.boxes.items():
        x, y = box.x * layout.columns * (BOX + GAP) - (GAP + BOX) / 2, box.row * (tall + BETWEEN)
        title = f"feature {node[1]} at {node[0]}: {tokens_of(tree, node)}"
        boxes[node] = Box(x, y, box.name, box.lines, title, anchors.get((tree.dictionary, *node)) if box.row else None)
    links = [(boxes[link.child], boxes[link.parent], link) for link in layout.links]
    width, height = layout.columns * (BOX + GAP) - GAP, layout.rows * (tall + BETWEEN) - BETWEEN
    return Picture(width, height, (BOX, tall), list(boxes.values()), links, [_row(tree, edge, anchors) for edge in tree.edges])


def _row(tree: Tree, edge: Edge, anchors: dict[Name, str]) -> EdgeRow:
    numbers = {name: float("nan") if value is None else value for name, value in edge.numbers.items()}
    return EdgeRow(
        label(edge.parent),
        anchors.get((tree.dictionary, *edge.parent)),
        label(edge.child),
        tokens_of(tree, edge.parent) or NOTHING,
        tree.explanations.get(edge.parent, ""),
        with_interval(numbers["share"], numbers["low"], numbers["high"], 2),
        number(numbers["carried"], 2),
        number(numbers["p_holm"], 4),
    )
