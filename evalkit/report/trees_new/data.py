"""Causal trees as pictures and as data: the significant parents of a feature, down the hook points.

1. A tree is drawn from its target, on top. Of each feature the ``BRANCHES`` largest significant parents are shown, those of
   features that are shown. A box names layer and feature, the tokens it fires on most strongly, and its explanation where the
   run has one; a line is as thick as the share of the activation that goes with the feature below it. What is carried of it (the
   feature's own vector, read again) stands in brackets: where that is most of the share, the two are one feature.
2. ``.json`` is the same tree nested; ``.graphml`` has nodes and edges for graph programs, a node's tokens as a JSON list. Both
   hold every significant parent, not the largest alone, and every number of an edge.

After figure 5 of Cunningham et al. 2023 (arXiv 2309.08600).
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from xml.etree import ElementTree

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evalkit.errors import UsageError
from evalkit.files import publish
from evalkit.outputs import writing
from evalkit.report.figures import NORMAL, SCORE, SMALL
from evalkit.report.picture import MONO, SUFFIXES, check_suffix, named, plain, save
from evalkit.report.stories import SAME, chosen, first_of
from evalkit.store.reader import Results
from evalkit.terminal import legible

BRANCHES = 3
"""Parents drawn of one feature."""
LEVEL = 0.62
"""Inches a level is high."""
WIDTH = 6.8
"""Inches: both columns of a two-column paper."""
LETTERS = 20
"""Letters of a box to an inch."""
DATA = (".json", ".graphml")
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

    tokens: dict[tuple[str, str, int], list[str]]
    explanations: dict[tuple[str, str, int], str]


def of_story(rows: pd.DataFrame, story: pd.Series) -> pd.DataFrame:
    """Rows about the story's feature, of their first configuration."""
    return first_of(rows[(rows[SAME] == story[SAME]).all(axis=1)])


def visible(token: str) -> str:
    """A token as print shows it: the space in front as a small mark, line ends as such."""
    shown = legible(token)
    return ("\u2423" + shown[1:] if shown.startswith(" ") else shown) or "(empty)"


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
    rows = of_story(rows, about)
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


def _own(part: dict[tuple[str, str, int], Said], dictionary: str) -> dict[Key, Said]:
    return {(hook, feature): said for (whose, hook, feature), said in part.items() if whose == dictionary}


def parents(rows: pd.DataFrame) -> pd.Series:
    """Which edges are parents: significant, and proposed by the gradient rather than drawn to check it."""
    return rows["significant"].astype(bool) & ~rows["checked"].eq(True)


def explanations(store: Results, run: str) -> dict[tuple[str, str, int], str]:
    """What features were explained as in the run, by dictionary, hook point and number: where autointerp scored the explanation,
    that one, the suite's judge before its references; else that of the nodes of causal trees."""
    has, found = store.evaluations(run), dict[tuple[str, str, int], str]()
    if "autointerp" in has:
        rows = store.rows("explanations", "autointerp", run)
        known: list[Any] = list(rows[rows["status"] == "ok"].itertuples())
        for row in known:
            found.setdefault((str(row.dictionary), str(row.hook_point), int(row.feature)), str(row.explanation))
    if "causal_tree" in has:
        rows = store.rows("causal_nodes", "causal_tree", run)
        known = list(rows[rows["explanation"].notna()].itertuples())
        for row in known:  # the unit's hook point is the target's, the second column the node's
            found.setdefault((str(row.dictionary), str(row.hook_point_1), int(row.feature)), str(row.explanation))
    return found


def label(node: Key) -> str:
    """Layer and feature in short: 12/305."""
    return f"{node[0].split('.')[1] if node[0].startswith('blocks.') else node[0]}/{node[1]}"


def levels_of(tree: Tree) -> dict[int, list[Key]]:
    """Features of each level, the target's first."""
    levels: dict[int, list[Key]] = {0: [tree.target]}
    for edge in tree.edges:
        level = levels.setdefault(edge.depth, [])
        if edge.parent not in level:
            level.append(edge.parent)
    return levels


def told(edge: Edge) -> str:
    """Share of the edge, and in brackets what of it is carried."""
    share, carried = edge.numbers["share"] or 0.0, edge.numbers.get("carried")
    return f"{share:.0%}" if carried is None else f"{share:.0%} ({carried:.0%})"


def draw_tree(ax: Axes, tree: Tree) -> None:
    """The tree from the target, on top, down to features of earlier hook points."""
    ax.set_axis_off()
    levels = levels_of(tree)
    place = {node: ((i + 0.5) / len(level), -depth) for depth, level in levels.items() for i, node in enumerate(level)}
    for edge in tree.edges:
        (x0, y0), (x1, y1) = place[edge.child], place[edge.parent]
        share = edge.numbers["share"] or 0.0
        ax.plot([x0, x1], [y0 - 0.16, y1 + 0.16], color=SCORE, linewidth=0.6 + 5 * max(0.0, share), alpha=0.45, zorder=1)
        style: dict[str, Any] = {"fontsize": SMALL - 1, "color": "#333333", "ha": "center", "va": "center", "zorder": 3}
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        ax.text((x0 + 2 * x1) / 3, (y0 + 2 * y1) / 3 + 0.05, told(edge), bbox=clear, **style)
    figure = ax.get_figure(root=True)
    letters = LETTERS * ax.get_position().width * (figure.get_figwidth() if figure else WIDTH)
    room = {node: max(4, min(40, int(letters / len(level)) - 2)) for level in levels.values() for node in level}
    for node, (x, y) in place.items():
        said = " ".join(visible(token) for token in tree.tokens.get(node, [])[:3])[: room[node]]
        lines = [label(node), said]
        if node in tree.explanations:
            lines.append(textwrap.shorten(legible(tree.explanations[node]), room[node], placeholder="..."))
        box = {"boxstyle": "round,pad=0.35", "facecolor": "#F4F6F8", "edgecolor": SCORE, "linewidth": 0.7}
        style = {"fontsize": SMALL - 0.9, "fontfamily": MONO, "ha": "center", "va": "center", "bbox": box, "zorder": 4}
        ax.text(x, y, plain("\n".join(lines)), **style)
    ax.set_xlim(0, 1)
    ax.set_ylim(-max(levels) - 0.4, 0.6)
    what = (
        "earlier features whose ablation takes a significant share of the activation (of it carried: no computation); "
        "layer/feature, top tokens"
    )
    ax.text(0, 0.52, what, fontsize=SMALL, color="#333333", va="center")


def tree_figure(store: Results, path: Path, *, feature: str | None = None, run: str | None = None) -> None:
    """One tree into ``path``: of ``feature`` (``stories.chosen``), or the one whose parents carry most.

    Args:
        store: a results file.
        path: .png, .svg or .pdf for a picture, .json or .graphml for the data; its folder is created.
        run: run_id or suite; the default is the latest run with trees.

    Raises:
        UsageError: there are no trees, no such feature or no such suffix.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    check_suffix(path, (*SUFFIXES, *DATA), "a tree")
    name = str(store.table("causal_tree", run)["run"].iloc[0])
    edges = first_of(store.rows("causal_edges", "causal_tree", name).rename(columns={"target": "feature"}))
    weight = edges["share"].where(parents(edges) & (edges["depth"] == 1), 0.0)
    targets = edges.assign(weight=weight).groupby(SAME, sort=False)["weight"].sum().reset_index()
    targets = targets.sort_values("weight", ascending=False, kind="stable").reset_index(drop=True)
    if targets.empty:
        raise UsageError(
            "no feature of this run has candidates for parents", where=name, fix="name other features or hook points"
        )
    tree = tree_of(store, chosen(targets, feature), name, None if suffix in DATA else BRANCHES)
    if suffix in DATA:
        with writing(path, "the tree"), publish(path) as temporary:
            if suffix == ".json":
                temporary.write_text(json.dumps(nested(tree), indent=1) + "\n", encoding="utf-8")
            else:
                graphml(tree).write(temporary, encoding="utf-8", xml_declaration=True)
        return
    height = 0.75 + LEVEL * 1.15 * (1 + tree.depth)
    figure = Figure(figsize=(WIDTH, height), dpi=300)
    draw_tree(figure.add_axes((0.02, 0.02, 0.96, 1 - 0.4 / height)), tree)
    title = f"Causes of feature {tree.target[1]} of {tree.dictionary} at {tree.target[0]}; run {name}"
    figure.text(0.02, 1 - 0.1 / height, named(title, 110, 1), fontsize=NORMAL, fontweight="bold", va="top")
    save(figure, path)


def has_tree(store: Results, run: str) -> bool:
    """Whether a feature of the run has a parent."""
    return bool(parents(store.rows("causal_edges", "causal_tree", run)).any())


def nested(tree: Tree) -> dict[str, Any]:
    """The tree as nested objects. A feature that is a parent twice is given with its own parents once, the first time."""
    below: dict[Key, list[Edge]] = {}
    for edge in tree.edges:
        below.setdefault(edge.child, []).append(edge)

    def of(node: Key) -> dict[str, Any]:
        found: dict[str, Any] = {"hook_point": node[0], "feature": node[1], "tokens": tree.tokens.get(node, [])}
        if node in tree.explanations:
            found["explanation"] = tree.explanations[node]
        found["parents"] = [{**of(edge.parent), **edge.numbers} for edge in below.pop(node, [])]
        return found

    return {"dictionary": tree.dictionary, **of(tree.target)}


def graphml(tree: Tree) -> ElementTree.ElementTree[ElementTree.Element[str]]:
    """Nodes and edges, edges from the parent to the child it raises."""
    root = ElementTree.Element("graphml", xmlns="http://graphml.graphdrawing.org/xmlns")
    kinds = {"hook_point": "string", "feature": "int", "tokens": "string", "explanation": "string"}
    for name, kind in kinds.items():
        ElementTree.SubElement(root, "key", {"id": name, "for": "node", "attr.name": name, "attr.type": kind})
    for name in NUMBERS:
        ElementTree.SubElement(root, "key", {"id": name, "for": "edge", "attr.name": name, "attr.type": "double"})
    ElementTree.SubElement(root, "key", {"id": "dictionary", "for": "graph", "attr.name": "dictionary", "attr.type": "string"})
    graph = ElementTree.SubElement(root, "graph", id="tree", edgedefault="directed")

    def data(parent: ElementTree.Element, key: str, value: object) -> None:
        if value is not None:
            clean = "".join(letter if letter.isprintable() else "\ufffd" for letter in str(value))
            ElementTree.SubElement(parent, "data", key=key).text = clean

    data(graph, "dictionary", tree.dictionary)
    for node in tree.nodes:
        element = ElementTree.SubElement(graph, "node", id=f"{node[0]}:{node[1]}")
        data(element, "hook_point", node[0])
        data(element, "feature", node[1])
        data(element, "tokens", json.dumps(tree.tokens.get(node, []), ensure_ascii=False))
        data(element, "explanation", tree.explanations.get(node))
    for edge in tree.edges:
        ends = {"source": f"{edge.parent[0]}:{edge.parent[1]}", "target": f"{edge.child[0]}:{edge.child[1]}"}
        element = ElementTree.SubElement(graph, "edge", ends)
        for name, value in edge.numbers.items():
            data(element, name, value)
    return ElementTree.ElementTree(root)
