"""Reconstruction: its scores, and sparsity against fidelity of a sweep with the Pareto front.

1. x is L0, on a logarithmic axis; one panel below the other for FVU and for the loss recovered against mean ablation.
2. Dictionaries of one sweep ("SAE k=16", "SAE k=32") share colour and marker and are joined by a thin line; what varies is
   written beside each dot.
3. The thick grey line steps along the best that can be had for each L0: a dictionary on it is beaten by none that is sparser.
4. Intervals are the 95% ones of the table. The size is that of a paper's column; colours differ without colour vision
   (Okabe and Ito 2008), markers in grey. The file is published whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from evalkit.errors import UsageError
from evalkit.report.figures import CURVES, NORMAL, SMALL, WIDTH, intervals_text
from evalkit.report.picture import bare, caption, check_suffix, named, save
from evalkit.report.views.base import VIEWS, RunFigure, View

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PANELS = ("fvu", "loss_recovered_mean")
"""Metrics of the panels; one that was not measured has none."""
MOST = 400.0
"""L0 further right than this many times the smallest is not drawn: dense baselines would squeeze the sweep together."""


def family(name: str) -> str:
    """What the dictionaries of one sweep have in common: the name without its "key=value" words."""
    return " ".join(word for word in name.split() if "=" not in word) or name


def _varying(name: str) -> str:
    return " ".join(word for word in name.split() if "=" in word)


def has_sweep(frame: pd.DataFrame) -> bool:
    """Whether ``frame`` holds a sweep: two or more dictionaries of one family with L0 and FVU."""
    if frame.empty or not {"metric", "dictionary", "mean"} <= set(frame.columns):
        return False
    names = [set(frame[(frame["metric"] == metric) & frame["mean"].notna()]["dictionary"]) for metric in ("l0", "fvu")]
    families = [family(name) for name in set.intersection(*names) if _varying(name)]
    return len(families) > len(set(families))


def front(points: pd.DataFrame, better: str) -> pd.DataFrame:
    """The rows (l0, mean) that no row with at most their l0 beats, by l0; ``better`` is 'lower' or 'higher'."""
    sign = 1 if better == "lower" else -1
    ordered = points.assign(cost=sign * points["mean"]).sort_values(["l0", "cost"])
    return ordered[ordered["cost"] < ordered["cost"].cummin().shift(fill_value=float("inf"))].drop(columns="cost")


def pareto_figure(frame: pd.DataFrame, path: Path) -> None:
    """Draw a ``Results.table`` frame of the evaluation 'reconstruction' into ``path``.

    Args:
        frame: scores; one hook point and configuration a column of panels.
        path: .png, .svg or .pdf; its folder is created.

    Raises:
        UsageError: the frame holds no L0 and FVU, or there is no such suffix.
    """
    path = Path(path)
    check_suffix(path)
    found = frame[frame["mean"].notna()] if len(frame) else frame
    metrics = [metric for metric in PANELS if len(found) and (found["metric"] == metric).any()]
    if not metrics or not (found["metric"] == "l0").any():
        raise UsageError("there is nothing to draw", where=str(path), fix="run a suite with the evaluation 'reconstruction'")
    columns = [part for _, part in found.groupby(["hook_point", "config"], sort=False)]
    families = list(dict.fromkeys(family(name) for name in found["dictionary"]))
    styles = {name: (CURVES[i % len(CURVES)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(families)}
    room = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.04, rect=(0.0, 0.0, 0.99, 1.0))
    rows_of_key = -(-len(families) // 2)
    size = (WIDTH * len(columns), 0.75 + 1.75 * len(metrics) + 0.13 * rows_of_key)
    figure = Figure(figsize=size, dpi=300, layout=room)
    axes = figure.subplots(len(metrics), len(columns), sharex="col", squeeze=False)
    left_out: set[str] = set()
    for column, part in enumerate(columns):
        for row, metric in enumerate(metrics):
            left_out |= _panel(axes[row, column], part, metric, styles)
        axes[-1, column].set_xlabel("L0: mean number of active features a token", fontsize=NORMAL)
        if len(columns) > 1:
            axes[0, column].set_title(
                named(str(part["hook_point"].iloc[0]), 44), fontsize=SMALL + 0.5, loc="left", color="#333333"
            )
    _key(figure, axes[0, 0], families, rows_of_key)
    _caption(figure, found, left_out, len(columns))
    save(figure, path)


def _points(part: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row a dictionary: its scores of ``metric`` and its l0."""
    sparsity = part[part["metric"] == "l0"].drop_duplicates("dictionary").set_index("dictionary")["mean"]
    rows = part[part["metric"] == metric].drop_duplicates("dictionary")
    rows = rows.assign(l0=rows["dictionary"].map(sparsity))
    return rows[rows["l0"] > 0]


def _panel(ax: Axes, part: pd.DataFrame, metric: str, styles: dict[str, tuple[str, str]]) -> set[str]:
    """Draw one metric against L0; the names of dictionaries that are too far right."""
    points = _points(part, metric)
    if points.empty:
        ax.set_axis_off()
        return set()
    swept = points[[bool(_varying(name)) for name in points["dictionary"]]]
    near = points["l0"] <= MOST * (swept if len(swept) else points)["l0"].min()
    left_out = set(points[~near]["dictionary"])
    points = points[near].assign(family=points["dictionary"].map(family))
    ax.set_xscale("log", base=2)
    better = str(points["better"].iloc[0])
    best = front(points, better)
    ax.plot(best["l0"], best["mean"], color="#C9C9C9", linewidth=3.2, drawstyle="steps-post", zorder=1, solid_capstyle="round")
    for name, rows in points.sort_values("l0").groupby("family", sort=False):
        colour, marker = styles[str(name)]
        bars = [(rows["mean"] - rows["low"]).fillna(0.0).clip(lower=0), (rows["high"] - rows["mean"]).fillna(0.0).clip(lower=0)]
        style: dict[str, Any] = {"color": colour, "elinewidth": 0.9, "linewidth": 0.8, "markersize": 4.2, "zorder": 3}
        ax.errorbar(rows["l0"], rows["mean"], yerr=bars, marker=marker, label=named(str(name), 44), **style)
        inside = 2 * rows.index.isin(best.index).sum() >= len(rows)  # the side where no worse curve runs
        right, up = (-1, better == "higher") if inside else (1, better == "lower")
        for _, row in rows.iterrows():
            place: dict[str, Any] = {"xytext": (4 * right, 3 if up else -3), "textcoords": "offset points"}
            place |= {"ha": "left" if right > 0 else "right", "va": "bottom" if up else "top", "fontsize": SMALL - 1.0}
            if varying := _varying(row["dictionary"]):
                ax.annotate(named(varying, 24), (row["l0"], row["mean"]), color=colour, **place)
    _axis(ax, points)
    return left_out


def _axis(ax: Axes, points: pd.DataFrame) -> None:
    first = points.iloc[0]
    way = {"higher": "higher is better", "lower": "lower is better"}[first["better"]]
    ax.set_ylabel(f"{named(first['title'], 26)}\n({way})", fontsize=NORMAL)
    low, high = points["l0"].min(), points["l0"].max()
    ticks = [2.0**power for power in range(-3, 16) if low / 1.5 <= 2.0**power <= high * 1.5]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(low / 1.9, high * 1.9)  # room for labels
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.margins(y=0.12)
    ax.tick_params(labelsize=NORMAL - 0.5, length=2.5)
    bare(ax, "top", "right", grid="both")


def _key(figure: Figure, ax: Axes, families: list[str], rows: int) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) < 2 and len(families) < 2:
        return
    spacing: dict[str, Any] = {"handlelength": 1.8, "columnspacing": 1.2, "borderaxespad": 0.2}
    columns = -(-len(labels) // max(rows, 1))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=SMALL, frameon=False, **spacing)


def _caption(figure: Figure, frame: pd.DataFrame, left_out: set[str], columns: int) -> None:
    hooks = list(dict.fromkeys(frame["hook_point"]))
    parts = ["reconstruction", hooks[0] if len(hooks) == 1 else "", "grey: best for each L0"]
    parts += [intervals_text(frame[frame["metric"].isin(PANELS)])]
    parts += [f"too dense to show: {', '.join(sorted(left_out))}" if left_out else "", f"run {frame['run'].iloc[0]}"]
    figure.supxlabel(caption(parts, 72 * columns), fontsize=SMALL - 0.5, color="#444444")


@VIEWS.register("reconstruction")
class ReconstructionView(View):
    """The scores; the metric 'pareto' is all of a sweep against L0."""

    def draw(self, path: Path, metric: str | None = None, feature: str | None = None) -> None:
        if metric == "pareto":
            pareto_figure(self.results.table(self.evaluation, self.run), path)
        else:
            super().draw(path, metric, feature)

    def figures(self) -> Iterator[RunFigure]:
        yield from super().figures()
        frame = self.results.table(self.evaluation, self.run)
        if has_sweep(frame):
            yield RunFigure(lambda path: pareto_figure(frame, path), "pareto", "all against L0")
