"""Where the boxes and lines of a causal tree stand and what they say; figure and page draw the same layout.

1. A row for each level, the target in the first. The boxes of a row share the width evenly.
2. A box has layer and feature, the tokens that it fires on most and, where the run has one, its explanation.
3. A line goes from a feature to a parent. Beside it stands the share of the activation that is lost when the parent is ablated,
   and in brackets how much of it is carried (the feature's own vector, read again). Where that is most of it, the two are one
   feature.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import NamedTuple

from evalkit.report.contexts import visible
from evalkit.report.views.causal_tree.data import Edge, Key, Tree
from evalkit.util.terminal import legible

TOKENS = 4
"""Tokens of a box."""
CUT = "\u2026"
"""Stands where a line was cut."""


class Box(NamedTuple):
    """One feature."""

    row: int
    x: float
    """Centre, as a share of the width."""
    name: str
    lines: list[str]


class Link(NamedTuple):
    """One edge."""

    child: Key
    parent: Key
    share: float
    """Of the activation, from 0 to 1."""
    label: str


class Layout(NamedTuple):
    """A tree to draw."""

    rows: int
    columns: int
    """Boxes of the fullest row."""
    boxes: dict[Key, Box]
    links: list[Link]


def lay_out(tree: Tree, letters: Callable[[int], int], folds: int) -> Layout:
    """The layout of a tree.

    Args:
        letters: letters of a line, by the number of boxes in the row.
        folds: most lines of an explanation.
    """
    rows: dict[int, list[Key]] = {0: [tree.target]}
    for edge in tree.edges:
        row = rows.setdefault(edge.depth, [])
        if edge.parent not in row:
            row.append(edge.parent)
    boxes = {
        node: Box(depth, (i + 0.5) / len(row), label(node), _lines(tree, node, letters(len(row)), folds))
        for depth, row in sorted(rows.items())
        for i, node in enumerate(row)
    }
    return Layout(len(rows), max(map(len, rows.values())), boxes, [_link(edge) for edge in tree.edges])


def label(node: Key) -> str:
    """Layer and feature in short: 12/305."""
    return f"{node[0].split('.')[1] if node[0].startswith('blocks.') else node[0]}/{node[1]}"


def tokens_of(tree: Tree, node: Key, most: int | None = None) -> str:
    """The tokens that a feature fires on, as print shows them."""
    return " ".join(visible(token) for token in tree.tokens.get(node, [])[:most])


def _lines(tree: Tree, node: Key, letters: int, folds: int) -> list[str]:
    tokens = tokens_of(tree, node, TOKENS)
    lines = [tokens if len(tokens) <= letters else f"{tokens[: letters - 1]}{CUT}"]
    if node in tree.explanations:
        lines += textwrap.wrap(legible(tree.explanations[node]), letters, max_lines=folds, placeholder=CUT)
    return lines


def _link(edge: Edge) -> Link:
    share, carried = edge.numbers["share"] or 0.0, edge.numbers.get("carried")
    said = f"{share:.0%}" if carried is None else f"{share:.0%} ({carried:.0%})"
    return Link(edge.child, edge.parent, max(0.0, min(1.0, share)), said)
