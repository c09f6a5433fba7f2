"""Causal trees of a results file: the significant upstream features of a feature, down the hook points.

1. A tree grows from its target. Of each feature it has the ``most`` largest significant parents, or all of them.
2. What features fire on and how they were explained is read for all trees of a run at once.

After figure 5 of Cunningham et al. 2023 (arXiv 2309.08600).
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, TypeVar

import pandas as pd

from evalkit.report.selection import Name, of_feature
from evalkit.report.views.base import explanations
from evalkit.store.reader import Results

BRANCHES = 3
"""Parents drawn of one feature."""
NUMBERS = ("share", "low", "high", "carried", "estimate", "p", "p_holm", "active", "contexts")
"""What an edge has in files."""

Said = TypeVar("Said")
Key = tuple[str, int]
"""Hook point and feature."""


class Edge(NamedTuple):
    """A parent and what its ablation takes."""

    depth: int
    child: Key
    parent: Key
    numbers: dict[str, float | None]
    """By the names in ``NUMBERS``."""


class Tree(NamedTuple):
    """One target with its parents."""

    dictionary: str
    target: Key
    edges: list[Edge]
    tokens: dict[Key, list[str]]
    explanations: dict[Key, str]

    @property
    def depth(self) -> int:
        """Levels below the target."""
        return max((edge.depth for edge in self.edges), default=0)

    @property
    def nodes(self) -> list[Key]:
        """The target and all parents, each once."""
        return list(dict.fromkeys([self.target, *(edge.parent for edge in self.edges)]))


class Nodes(NamedTuple):
    """What is known of the features of a run's trees, by dictionary, hook point and number."""

    tokens: dict[Name, list[str]]
    explanations: dict[Name, str]


def tree_of(store: Results, about: pd.Series, run: str, most: int | None = BRANCHES) -> Tree:
    """The tree of one feature: its significant edges, as far as they hang together.

    Args:
        about: dictionary, hook_point and feature.
        run: run_id.
        most: parents of one feature; all where None.
    """
    edges = store.rows("causal_edges", "causal_tree", run).rename(columns={"target": "feature"})
    return grown(edges, nodes_of(store, run), about, most)


def nodes_of(store: Results, run: str) -> Nodes:
    """Tokens and explanations of every feature in a tree of the run."""
    rows = store.rows("causal_nodes", "causal_tree", run)
    # the unit's hook point is the target's, the second column the node's
    known: list[Any] = list(rows.rename(columns={"hook_point": "unit_hook", "hook_point_1": "hook_point"}).itertuples())
    tokens = {(r.dictionary, r.hook_point, int(r.feature)): [token for token, _ in json.loads(r.tokens)] for r in known}
    return Nodes(tokens, explanations(store, run))


def grown(rows: pd.DataFrame, nodes: Nodes, about: pd.Series, most: int | None = BRANCHES) -> Tree:
    """The tree of one feature from the edges of a run, whose column of targets is called 'feature'."""
    name = str(about["dictionary"])
    target = (str(about["hook_point"]), int(about["feature"]))
    rows = of_feature(rows, about)
    rows = rows[parents(rows)].sort_values(["depth", "child", "place"])
    edges, reached, count = [], {target}, dict[Key, int]()
    found: list[Any] = list(rows.itertuples())
    for row in found:
        child, parent = (str(row.child_hook), int(row.child)), (str(row.parent_hook), int(row.parent))
        if child in reached and (most is None or count.get(child, 0) < most):
            count[child] = count.get(child, 0) + 1
            reached.add(parent)
            numbers = {name: None if pd.isna(value := getattr(row, name)) else float(value) for name in NUMBERS}
            edges.append(Edge(int(row.depth), child, parent, numbers))
    return Tree(name, target, edges, _own(nodes.tokens, name), _own(nodes.explanations, name))


def _own(part: dict[Name, Said], dictionary: str) -> dict[Key, Said]:
    return {(hook, feature): said for (whose, hook, feature), said in part.items() if whose == dictionary}


def parents(rows: pd.DataFrame) -> pd.Series:
    """Which edges are parents: significant, and proposed by the gradient rather than drawn to check it."""
    return rows["significant"].astype(bool) & ~rows["checked"].eq(True)


def has_tree(store: Results, run: str) -> bool:
    """Whether a feature of the run has a parent."""
    return bool(parents(store.rows("causal_edges", "causal_tree", run)).any())
