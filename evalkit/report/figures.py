"""One figure: a score by dictionary, with everything needed to doubt it.

1. One row a dictionary, in the order of the run, with n in its label; one panel a hook point (and configuration).
2. A filled dot with its 95% interval is the score. A hollow diamond with a thin interval is its null, measured on the same
   items. A dashed line is chance.
3. A dictionary without a value keeps its row and says so.
4. The size is that of a paper's column; colours differ without colour vision (Okabe and Ito 2008) and in grey.
   The file is published whole. matplotlib's global state is not touched.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from evalkit.errors import UsageError
from evalkit.report.picture import bare, caption, check_suffix, named, save
from evalkit.util.registry import near_miss

WIDTH = 3.4
"""Inches: one column of a two-column paper."""
SCORE, NULL, CHANCE = "#0072B2", "#6B6B6B", "#D55E00"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#8C6D1F")
"""Different without colour vision (Okabe and Ito 2008); a reference line has the eighth, ``CHANCE``."""
CURVES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The same colours without a reference line."""
SMALL, NORMAL = 6.5, 8.0
"""Points."""
LETTERS = 26
"""Letters of a line of a dictionary's name."""


def score_figure(frame: pd.DataFrame, path: Path, *, metric: str | None = None) -> None:
    """Draw one metric of a ``Results.table`` frame into ``path``.

    Args:
        frame: one evaluation's scores.
        path: .png, .svg or .pdf; its folder is created.
        metric: key of the metric, or its title as the table prints it; the default is the evaluation's main one.

    Raises:
        UsageError: the frame is empty, or there is no such metric or suffix.
    """
    path = Path(path)
    check_suffix(path)
    if frame.empty:
        raise UsageError("there is nothing to draw", where=str(path), fix="evalkit run SUITE")
    rows = _rows(frame, metric)
    panels = [part for _, part in rows.groupby(["hook_point", "config"], sort=False)]
    # what stands over and under the axes has the room that the names beside them leave
    beside = max(len(line) for name in rows["dictionary"] for line in named(name, LETTERS).splitlines())
    letters = max(22, 52 - beside)
    headings = [0.12 + 0.1 * len(_heading(part, letters).splitlines()) if len(panels) > 1 else 0.0 for part in panels]
    title, below = _title(rows, letters), _caption(rows)
    lines = title.count("\n") + max(0, below.count("\n") - 2)
    height = 0.85 + 0.13 * lines + sum(0.3 * len(part) + heading for part, heading in zip(panels, headings, strict=True))
    room = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.03, rect=(0.0, 0.0, 0.98, 1.0))  # the last tick's label ends in it
    figure = Figure(figsize=(WIDTH, height), dpi=300, layout=room)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=[len(part) + 0.4 for part in panels])[:, 0]
    logarithmic = _wants_log(rows)
    for ax, part in zip(axes, panels, strict=True):
        if logarithmic:
            ax.set_xscale("log")
        _panel(ax, part, _heading(part, letters) if len(panels) > 1 else "")
    axes[-1].set_xlabel(title, fontsize=NORMAL)
    figure.supxlabel(below, fontsize=SMALL - 0.5, color="#444444")
    _key(figure, rows)
    save(figure, path)


def intervals_text(rows: pd.DataFrame) -> str:
    """What a caption says of the intervals of the ``rows`` of ``Results.table`` that it is about."""
    few = "; ".join(dict.fromkeys(reason for reason in rows["no_interval"] if reason))
    text = "95% intervals" if rows["low"].notna().any() else ""
    if not few:
        return text
    return f"{text}, none where there are {few}" if text else f"no intervals: {few}"


def _rows(frame: pd.DataFrame, metric: str | None) -> pd.DataFrame:
    """Rows of the metric to draw: the one named, the main one, or the first."""
    if metric is None:
        main = frame[frame["main"]]
        metric = (main if len(main) else frame)["metric"].iloc[0]
    rows = frame[(frame["metric"] == metric) | (frame["title"] == metric)]
    if rows.empty:
        raise UsageError(f"there is no metric called '{metric}'", where="--metric", fix=near_miss(metric, set(frame["metric"])))
    return rows


def _wants_log(rows: pd.DataFrame) -> bool:
    """Whether values of one sign span too much for a straight axis."""
    drawn = rows[["mean", "low", "high", "null_mean", "chance"]].stack()
    return bool(len(drawn) and drawn.min() > 0 and drawn.max() / drawn.min() > 50)


def _bar(ax: Axes, low: float, high: float, y: float, **style: Any) -> None:
    if not math.isnan(low):
        ax.plot([low, high], [y, y], solid_capstyle="butt", **style)


def _panel(ax: Axes, part: pd.DataFrame, heading: str) -> None:
    """Draw the rows of one hook point, first on top."""
    labels = []
    for y, (_, row) in enumerate(part.iterrows()):
        has_null = not math.isnan(row["null_mean"])
        up = -0.13 if has_null else 0.0
        if math.isnan(row["mean"]):
            words = "unit failed" if row["units_failed"] else "no value"
            clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            style: dict[str, Any] = {"fontsize": SMALL, "style": "italic", "color": NULL}
            ax.annotate(words, (0.02, y), xycoords=("axes fraction", "data"), va="center", bbox=clear, **style)
        else:
            _bar(ax, row["low"], row["high"], y + up, color=SCORE, linewidth=1.8)
            ax.plot(row["mean"], y + up, "o", color=SCORE, markersize=4.5)
        if has_null:
            _bar(ax, row["null_low"], row["null_high"], y + 0.2, color=NULL, linewidth=0.8)
            ax.plot(row["null_mean"], y + 0.2, "D", color=NULL, markerfacecolor="white", markersize=3.6, markeredgewidth=0.8)
        missing = int(row["failed"] + row["undefined"])
        counts = f"(n={row['n']}{f', {missing} missing' if missing else ''})"
        labels.append(f"{named(row['dictionary'], LETTERS)} {counts}")
    for chance in part["chance"].dropna().unique():
        ax.axvline(chance, color=CHANCE, linestyle=(0, (4, 2)), linewidth=1.0, zorder=1.5)
    ax.set_yticks(range(len(labels)), labels, fontsize=NORMAL - 0.5)
    ax.set_ylim(len(labels) - 0.45, -0.55)
    ax.tick_params(axis="x", labelsize=NORMAL - 0.5, length=2.5)
    ax.tick_params(axis="y", length=0)
    bare(ax, "top", "right", "left", grid="x")
    if heading:
        ax.set_title(heading, fontsize=SMALL + 0.5, loc="left", color="#333333", pad=3)


def _heading(part: pd.DataFrame, letters: int) -> str:
    """Hook point and configuration of a panel, folded to its width."""
    text = ", ".join(text for text in (part["hook_point"].iloc[0], part["config"].iloc[0]) if text)
    return named(text, letters, 3)


def _title(rows: pd.DataFrame, letters: int) -> str:
    """Label of the axis."""
    first = rows.iloc[0]
    way = {"higher": " (higher is better)", "lower": " (lower is better)"}.get(first["better"], "")
    return named(f"{first['title']}{way}", letters, 3)


def _key(figure: Figure, rows: pd.DataFrame) -> None:
    first = rows.iloc[0]
    shown: list[Line2D] = [Line2D([], [], color=SCORE, marker="o", markersize=4.5, linewidth=1.8, label="mean, 95% interval")]
    if rows["null_mean"].notna().any():
        hollow: dict[str, Any] = {"marker": "D", "markersize": 3.6, "markerfacecolor": "white", "linewidth": 0.8}
        shown.append(Line2D([], [], color=NULL, label=named(f"null ({first['null_metric'].replace('_', ' ')})", 44), **hollow))
    if rows["chance"].notna().any():
        shown.append(Line2D([], [], color=CHANCE, linestyle=(0, (4, 2)), linewidth=0.9, label="chance"))
    if len(shown) > 1:
        fits = sum(len(str(line.get_label())) for line in shown) <= 44
        spacing: dict[str, Any] = {"handlelength": 2.0, "columnspacing": 1.2, "borderaxespad": 0.2}
        columns = len(shown) if fits else 2
        figure.legend(handles=shown, loc="outside upper center", ncols=columns, fontsize=SMALL, frameon=False, **spacing)


def _caption(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    judges = ", ".join(name for name in dict.fromkeys(rows["judge"]) if isinstance(name, str))
    hooks = list(dict.fromkeys(rows["hook_point"]))
    parts = [str(first["evaluation"]), hooks[0] if len(hooks) == 1 else "", f"judge {judges}" if judges else ""]
    parts += [intervals_text(rows), f"run {first['run']}"]
    return caption(parts, 72)
