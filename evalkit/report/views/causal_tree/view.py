"""Causal trees: the scores, one feature's tree as a figure or as data, and the tree in the card of a feature."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from evalkit.report.html import rendered
from evalkit.report.selection import SAME, Name
from evalkit.report.tables import NOTHING
from evalkit.report.views.base import VIEWS, Block, Card, Feature, RunFigure, View
from evalkit.report.views.causal_tree.data import Nodes, grown, has_tree, nodes_of
from evalkit.report.views.causal_tree.figure import tree_figure
from evalkit.report.views.causal_tree.page import Picture, picture_of


@VIEWS.register("causal_tree")
class CausalTreeView(View):
    """A feature's tree; with a metric, the scores."""

    tables = ("causal_edges",)
    lists_scores = True
    by_feature = True
    position = 3

    def draw(self, path: Path, metric: str | None = None, feature: str | None = None) -> None:
        if metric is None:
            tree_figure(self.results, path, feature=feature, run=self.run)
        else:
            super().draw(path, metric)

    def figures(self) -> Iterator[RunFigure]:
        yield RunFigure(lambda path: self.draw(path, "cause_share"))
        if self.run is not None and has_tree(self.results, self.run):
            yield RunFigure(self.draw, "tree", "the tree whose parents carry most")

    def feature_rows(self) -> dict[str, pd.DataFrame]:
        return {"causal_edges": self.rows("causal_edges").rename(columns={"target": "feature"})}

    def explanations(self) -> dict[Name, str]:
        rows = self.rows("causal_nodes")
        found: dict[Name, str] = {}
        known: list[Any] = list(rows[rows["explanation"].notna()].itertuples())
        for row in known:  # the unit's hook point is the target's, the second column the node's
            found.setdefault((str(row.dictionary), str(row.hook_point_1), int(row.feature)), str(row.explanation))
        return found

    @functools.cached_property
    def nodes(self) -> Nodes:
        """Tokens and explanations of every feature in a tree of the run."""
        assert self.run is not None
        return nodes_of(self.results, self.run)

    def feature_card(self, feature: Feature) -> Card | None:
        def score(metric: str) -> str:
            return feature.scores.text(feature.name, self.evaluation, metric, 2)

        facts, blocks = [], []
        if share := score("parent_share"):
            null, carried = (score(metric) or NOTHING for metric in ("parent_share_random", "parent_carried"))
            beside = f"a random direction {null}; carried {carried}"
            text = f"{share} of its activation goes with the strongest of the significant earlier features ({beside})"
            facts.append(("strongest parent", text))
        tree, note = self._tree(feature)
        if tree or note:
            blocks.append(Block(rendered("causal_tree.html", tree=tree, note=note, title=feature.title)))
        return Card(facts, blocks=blocks)

    def _tree(self, feature: Feature) -> tuple[Picture | None, str]:
        """The picture of the tree, and a sentence about what it leaves out or why there is none."""
        edges = feature.rows.get("causal_edges")
        if edges is None:
            asked = feature.scores.has(feature.name, self.evaluation)
            return None, "No feature of an earlier hook point was a candidate." if asked else ""
        about = pd.Series(dict(zip(SAME, feature.name, strict=True)))
        tree, whole = (grown(edges, self.nodes, about, *most) for most in ((), (None,)))
        if not tree.edges and edges["p"].isna().all():
            return None, f"Its {int(edges['contexts'].max())} contexts are too few for a test: nothing is known of its parents."
        if not tree.edges:
            tested = int((~edges["checked"].eq(True)).sum())
            return None, f"None of the {tested} features that were ablated has a significant effect on it."
        more = len(whole.edges) - len(tree.edges)
        note = f"{len(tree.edges)} significant edges are shown" if len(tree.edges) > 1 else "The one significant edge is shown"
        left = f"; {more} weaker ones are left out (evalkit figure causal_tree --feature NUMBER -o tree.json has all)."
        return picture_of(tree, feature.anchors), note + (left if more else ".")
