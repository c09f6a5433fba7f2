"""How dictionaries learned: one figure of the curves, and one table of where they ended.

1. Four panels share the tokens presented as their x axis: loss, FVU, L0 and share of dead features.
2. One line a dictionary, distinguished by colour (Okabe and Ito 2008) and by dashes. Where there are several hook points, colours
   are dictionaries and dashes are hook points, as long as there are enough of both; else each line has a colour and dashes.
3. Loss, FVU and L0 have a logarithmic axis where they span more than a factor of ten. Losses of different architectures are
   not in the same units; FVU is.
4. The size is that of a paper's column. The file is published whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from evalkit.errors import UsageError
from evalkit.report.figures import CURVES, NORMAL, SMALL, WIDTH
from evalkit.report.picture import bare, caption, check_suffix, named, save
from evalkit.report.render import Cell, Column, Sheet, as_text
from evalkit.report.views.base import VIEWS, View

DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
COLUMNS = {"dictionary", "recipe", "hook_point", "tokens", "loss", "fvu", "l0", "dead_share"}


HALF = 27
"""Characters of a label of which two stand side by side."""


class _Curve(NamedTuple):
    dictionary: str
    hook_point: str
    part: pd.DataFrame
    """Its rows."""


class _Panel(NamedTuple):
    column: str
    title: str
    may_be_log: bool


PANELS = (
    _Panel("loss", "loss", True),
    _Panel("fvu", "FVU", True),
    _Panel("l0", "L0", True),
    _Panel("dead_share", "dead", False),
)


def training_figure(frame: pd.DataFrame, path: Path) -> None:
    """Draw the curves of a ``Results.training`` frame into ``path``.

    Args:
        frame: rows of training histories, in order.
        path: .png, .svg or .pdf; its folder is created.

    Raises:
        UsageError: the frame is empty or holds something else, or there is no such suffix.
    """
    path = Path(path)
    check_suffix(path)
    if frame.empty or not set(frame.columns) >= COLUMNS:
        raise UsageError("there is no training to draw", where=str(path), fix="evalkit train SUITE")
    of_each = [part for _, part in frame.groupby(["recipe", "hook_point"], sort=False)]
    curves = [_Curve(str(part["dictionary"].iloc[0]), str(part["hook_point"].iloc[0]), part) for part in of_each]
    styles, key = _styles(curves)
    labels = [str(entry.get_label()) for entry in key]
    columns = 2 if max(map(len, labels)) <= HALF else 1
    height = 4.0 + 0.13 * (-(-len(labels) // 2) if columns == 2 else sum(label.count("\n") + 1 for label in labels))
    room = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.025, rect=(0.0, 0.0, 0.98, 1.0))
    figure = Figure(figsize=(WIDTH, height), dpi=300, layout=room)
    axes = figure.subplots(len(PANELS), 1, sharex=True)
    for ax, panel in zip(axes, PANELS, strict=True):
        for style, (_, _, part) in zip(styles, curves, strict=True):
            single = {"marker": "o", "markersize": 2.5} if len(part) == 1 else {}
            ax.plot(part["tokens"].to_numpy(), part[panel.column].to_numpy(float), **style, **single)
        _axis(ax, panel, frame)
    figure.align_ylabels(axes)
    axes[-1].set_xlabel("activations presented", fontsize=NORMAL)
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    spacing: dict[str, Any] = {"handlelength": 2.4, "borderaxespad": 0.2, "labelspacing": 0.35}
    figure.legend(handles=key, ncols=columns, loc="outside upper left", fontsize=SMALL, frameon=False, **spacing)
    hooks = list(dict.fromkeys(frame["hook_point"]))
    parts = ["training", hooks[0] if len(hooks) == 1 else "", "loss in each architecture's own units" if len(curves) > 1 else ""]
    figure.supxlabel(caption(parts, 72), fontsize=SMALL - 0.5, color="#444444")
    save(figure, path)


def _styles(curves: Sequence[_Curve]) -> tuple[list[dict[str, Any]], list[Line2D]]:
    """How each curve is drawn, and the entries of the key."""

    def style(colour: int, dashes: int) -> dict[str, Any]:
        return {"color": CURVES[colour % len(CURVES)], "linestyle": DASHES[dashes % len(DASHES)], "linewidth": 1.1}

    names = list(dict.fromkeys(curve.dictionary for curve in curves))
    hooks = list(dict.fromkeys(curve.hook_point for curve in curves))
    unique = len({(curve.dictionary, curve.hook_point) for curve in curves}) == len(curves)
    if unique and 1 < len(hooks) <= len(DASHES) and len(names) <= len(CURVES):
        styles = [style(names.index(curve.dictionary), hooks.index(curve.hook_point)) for curve in curves]
        key = [Line2D([], [], label=_text(name), **style(i, 0)) for i, name in enumerate(names)]
        key += [Line2D([], [], label=_text(hook), **style(0, i) | {"color": "#777777"}) for i, hook in enumerate(hooks)]
        return styles, key
    styles = [style(i, i) for i in range(len(curves))]
    labels = [f"{curve.dictionary}, {curve.hook_point}" if len(hooks) > 1 else curve.dictionary for curve in curves]
    return styles, [Line2D([], [], label=_text(label), **one) for label, one in zip(labels, styles, strict=True)]


def _text(label: str) -> str:
    return named(label, 62)


def _short(value: float) -> str:
    """1.2M, 300k, 50."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _axis(ax: Axes, panel: _Panel, frame: pd.DataFrame) -> None:
    values = frame[panel.column].dropna()
    positive = len(values) > 0 and values.min() > 0
    if panel.may_be_log and positive and values.max() / values.min() > 10:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if values.max() / values.min() < 1e3 else (1.0,)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    elif panel.column == "dead_share":
        highest = float(values.max()) if len(values) else 0.0
        ax.set_ylim(-0.02 * max(highest, 0.01), 1.08 * max(highest, 0.01))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if highest > 0.04 else 1))
    else:
        ax.set_ylim(bottom=0)
    ax.set_ylabel(panel.title, fontsize=NORMAL)
    ax.tick_params(labelsize=NORMAL - 1, length=2.5)
    bare(ax, "top", "right", grid="both")


def training_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where each dictionary ended, as text.

    Args:
        rows: dictionary, hook_point, features, fvu, l0, dead_share, tokens_per_second, together (each may be None) and folder.
    """

    def cell(value: float | None, form: str) -> Cell:
        return Cell("-" if value is None or not math.isfinite(value) else format(value, form))

    several = len({row["hook_point"] for row in rows}) > 1
    columns = [Column("dictionary", [Cell(str(row["dictionary"])) for row in rows], number=False, group=-1)]
    if several:
        columns.append(Column("hook point", [Cell(str(row["hook_point"])) for row in rows], number=False, group=-1))
    measures = {
        "features": ("features", ",.0f"),
        "FVU": ("fvu", ".4f"),
        "L0": ("l0", ".1f"),
        "dead": ("dead_share", ".1%"),
        "tokens/s": ("tokens_per_second", ",.0f"),
    }
    shared = any((row.get("together") or 1) > 1 for row in rows)
    if shared:
        measures["together"] = ("together", ".0f")
    columns += [Column(heading, [cell(row.get(key), form) for row in rows]) for heading, (key, form) in measures.items()]
    columns.append(Column("folder", [Cell(str(row["folder"])) for row in rows], number=False))
    where = "" if several or not rows else f" at {rows[0]['hook_point']}"
    notes = ["FVU, L0: means over the last steps, on the activations they were trained on; dead: share of features at the end."]
    if shared:
        notes.append(
            "together: trained at once; tokens/s: activations that each of them saw a second of the time they took together."
        )
    return as_text(Sheet(f"trained dictionaries{where}", columns, notes))


@VIEWS.register("training")
class TrainingView(View):
    """The curves of the dictionaries that a run trained: the view of no evaluation, but of every run."""

    def draw(self, path: Path, metric: str | None = None, feature: str | None = None) -> None:
        if metric is None:
            training_figure(self.results.curves(self.run), path)
        else:
            super().draw(path, metric, feature)
