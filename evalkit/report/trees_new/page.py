"""Where the boxes and lines of a causal tree stand on a page, in pixels; the template draws them.

1. A row for each level, the target on top; boxes of one size, each row in the middle of the widest.
2. A box has layer and feature, the tokens it fires on most and, where the run has one, its explanation; a box whose feature has
   a section of its own on the page leads there. What is cut for room stands whole in the box's title and in the list below.
3. A line is as thick as the share of the activation that goes with the feature below it, which stands beside it.
"""

from __future__ import annotations

import textwrap
from typing import NamedTuple

from evalkit.report.tables import NOTHING, number, with_interval
from evalkit.report.trees import Edge, Key, Tree, label, levels_of, told, visible
from evalkit.terminal import legible

BOX, GAP = 176, 18
"""Pixels: width of a box, and between two."""
LINE, PAD, BETWEEN = 15, 8, 44
"""Pixels: height of a line of text, above and below it in a box, and between rows."""
LETTERS = 24
"""Letters of a line in a box."""
TOKENS = 4


class Box(NamedTuple):
    """One feature."""

    x: float
    y: float
    width: float
    height: float
    name: str
    lines: list[str]
    title: str
    anchor: str | None
    """Section of the page; None where there is none."""


class Link(NamedTuple):
    """One edge."""

    x0: float
    y0: float
    x1: float
    y1: float
    thick: float
    said: str
    x: float
    y: float
    """Where ``said`` stands."""


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
    boxes: list[Box]
    links: list[Link]
    rows: list[EdgeRow]


def lay_out(tree: Tree, anchors: dict[tuple[str, str, int], str]) -> Picture:
    """The picture of a tree that has edges.

    Args:
        anchors: sections of features on the page, by dictionary, hook point and number.
    """
    levels = levels_of(tree)
    lines = {node: _lines(tree, node) for level in levels.values() for node in level}
    tall = 2 * PAD + LINE * (1 + max(len(found) for found in lines.values()))
    widest = max(len(level) for level in levels.values())
    width = widest * (BOX + GAP) - GAP
    boxes: dict[Key, Box] = {}
    for depth, level in sorted(levels.items()):
        left = (width - (len(level) * (BOX + GAP) - GAP)) / 2
        for place, node in enumerate(level):
            anchor = anchors.get((tree.dictionary, *node))
            title = f"feature {node[1]} at {node[0]}: {_tokens(tree, node)}"
            spot = (left + place * (BOX + GAP), depth * (tall + BETWEEN))
            boxes[node] = Box(*spot, BOX, tall, label(node), lines[node], title, anchor if depth else None)
    links = [_link(edge, boxes[edge.child], boxes[edge.parent]) for edge in tree.edges]
    height = len(levels) * (tall + BETWEEN) - BETWEEN
    return Picture(width, height, list(boxes.values()), links, [_row(tree, edge, anchors) for edge in tree.edges])


def _tokens(tree: Tree, node: Key) -> str:
    return " ".join(visible(token) for token in tree.tokens.get(node, []))


def _lines(tree: Tree, node: Key) -> list[str]:
    shown = " ".join(visible(token) for token in tree.tokens.get(node, [])[:TOKENS])
    found = [shown if len(shown) <= LETTERS else f"{shown[: LETTERS - 1]}\u2026"]
    if node in tree.explanations:
        folded = textwrap.wrap(legible(tree.explanations[node]), LETTERS, max_lines=2, placeholder="\u2026")
        found += folded
    return found


def _link(edge: Edge, child: Box, parent: Box) -> Link:
    x0, y0 = child.x + child.width / 2, child.y + child.height
    x1, y1 = parent.x + parent.width / 2, parent.y
    share = max(0.0, min(1.0, edge.numbers["share"] or 0.0))
    return Link(x0, y0, x1, y1, 1 + 8 * share, told(edge), (x0 + 2 * x1) / 3, (y0 + 2 * y1) / 3 - 2)


def _row(tree: Tree, edge: Edge, anchors: dict[tuple[str, str, int], str]) -> EdgeRow:
    nan = float("nan")
    found = {name: nan if value is None else value for name, value in edge.numbers.items()}
    return EdgeRow(
        label(edge.parent),
        anchors.get((tree.dictionary, *edge.parent)),
        label(edge.child),
        _tokens(tree, edge.parent) or NOTHING,
        tree.explanations.get(edge.parent, ""),
        with_interval(found["share"], found["low"], found["high"], 2),
        number(found["carried"], 2),
        number(found["p_holm"], 4),
    )
