"""A causal tree as a figure: the target on top, below it its largest significant parents, and theirs.

1. Of each feature the ``BRANCHES`` largest significant parents are drawn; ``layout`` says what boxes and lines hold.
2. A line is as thick as the share of the activation that is lost when the parent is ablated.
3. As .json or .graphml the tree is written as data instead (``files``), with every significant parent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evalkit.errors import UsageError
from evalkit.report.case_studies.criteria import chosen
from evalkit.report.figures import NORMAL, SCORE, SMALL
from evalkit.report.picture import MONO, SUFFIXES, check_suffix, named, plain, save
from evalkit.report.selection import SAME, first_of
from evalkit.report.views.causal_tree.data import BRANCHES, Tree, parents, tree_of
from evalkit.report.views.causal_tree.files import DATA, write_tree
from evalkit.report.views.causal_tree.layout import lay_out
from evalkit.store.reader import Results

LEVEL = 0.62
"""Inches a level is high."""
WIDTH = 6.8
"""Inches: both columns of a two-column paper."""
LETTERS = 20
"""Letters of a box to an inch."""


def draw_tree(ax: Axes, tree: Tree) -> None:
    """The tree from the target, on top, down to features of earlier hook points."""
    ax.set_axis_off()
    figure = ax.get_figure(root=True)
    letters = LETTERS * ax.get_position().width * (figure.get_figwidth() if figure else WIDTH)
    layout = lay_out(tree, lambda boxes: max(4, min(40, int(letters / boxes) - 2)), folds=1)
    for link in layout.links:
        (x0, y0), (x1, y1) = ((box.x, -box.row) for box in (layout.boxes[link.child], layout.boxes[link.parent]))
        ax.plot([x0, x1], [y0 - 0.16, y1 + 0.16], color=SCORE, linewidth=0.6 + 5 * link.share, alpha=0.45, zorder=1)
        style: dict[str, Any] = {"fontsize": SMALL - 1, "color": "#333333", "ha": "center", "va": "center", "zorder": 3}
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        ax.text((x0 + 2 * x1) / 3, (y0 + 2 * y1) / 3 + 0.05, link.label, bbox=clear, **style)
    for box in layout.boxes.values():
        frame = {"boxstyle": "round,pad=0.35", "facecolor": "#F4F6F8", "edgecolor": SCORE, "linewidth": 0.7}
        style = {"fontsize": SMALL - 0.9, "fontfamily": MONO, "ha": "center", "va": "center", "bbox": frame, "zorder": 4}
        ax.text(box.x, -box.row, plain("\n".join([box.name, *box.lines])), **style)
    ax.set_xlim(0, 1)
    ax.set_ylim(0.6 - layout.rows, 0.6)
    what = (
        "earlier features whose ablation takes a significant share of the activation (of it carried: no computation); "
        "layer/feature, top tokens"
    )
    ax.text(0, 0.52, what, fontsize=SMALL, color="#333333", va="center")


def tree_figure(store: Results, path: Path, *, feature: str | None = None, run: str | None = None) -> None:
    """One tree into ``path``: of ``feature`` (``case_studies.criteria.chosen``), or the one whose parents carry most.

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
        write_tree(tree, path)
        return
    height = 0.75 + LEVEL * 1.15 * (1 + tree.depth)
    figure = Figure(figsize=(WIDTH, height), dpi=300)
    draw_tree(figure.add_axes((0.02, 0.02, 0.96, 1 - 0.4 / height)), tree)
    title = f"Causes of feature {tree.target[1]} of {tree.dictionary} at {tree.target[0]}; run {name}"
    figure.text(0.02, 1 - 0.1 / height, named(title, 110, 1), fontsize=NORMAL, fontweight="bold", va="top")
    save(figure, path)
