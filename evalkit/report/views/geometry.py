"""Geometry: its scores, and how often features fire as a histogram of log10 density for each dictionary.

1. Density is the share of tokens a feature fires on. Bins are a fifth of a decade wide, the same for every panel; height is
   the share of the dictionary's features, to the panel's own scale, whose top is written at its left.
2. Features that never fired have no logarithm: they stand apart on the left, hollow, and are named in numbers.
3. A dotted line is the smallest density that could be seen: one token.
4. A density is the same under every configuration of the evaluation, and drawn once. The file is published whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

from evalkit.errors import UsageError
from evalkit.report.figures import CHANCE, NORMAL, NULL, SCORE, SMALL, WIDTH
from evalkit.report.picture import bare, caption, checked_rows, named, save
from evalkit.report.views.base import VIEWS, RunFigure, View

BIN = 0.2
"""Decades."""
LINE = 58
"""Characters of a name and the facts beside it that fit in one line."""
COLUMNS = {"dictionary", "hook_point", "feature", "value", "n", "run"}


def density_figure(frame: pd.DataFrame, path: Path) -> None:
    """Draw the densities of a ``Results.features`` frame into ``path``.

    Args:
        frame: one row a feature; value is its density, n the tokens behind it.
        path: .png, .svg or .pdf; its folder is created.

    Raises:
        UsageError: the frame is empty, holds something else than densities, or there is no such suffix.
    """
    source = "features('geometry', 'density')"
    path = checked_rows(path, frame, COLUMNS, "geometry", "densities of features", source)
    if not frame["value"].between(0, 1).all():
        raise UsageError("these are not densities of features", where=str(path), fix=f"give it results.{source}")
    once = frame.drop_duplicates(["hook_point", "dictionary", "feature"])
    panels = list(once.groupby(["hook_point", "dictionary"], sort=False))
    scale = _scale(once)
    hooks = list(dict.fromkeys(once["hook_point"]))
    headings = []
    for number, ((hook_point, name), part) in enumerate(panels):
        begins = len(hooks) > 1 and (number == 0 or panels[number - 1][0][0] != hook_point)
        headings.append(_heading(str(name), str(hook_point) if begins else "", part))
    lines = sum(heading.left.count("\n") + 1 for heading in headings)
    room = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.02, rect=(0.0, 0.0, 0.98, 0.985))
    figure = Figure(figsize=(WIDTH, 0.7 + 0.48 * len(panels) + 0.12 * lines), dpi=300, layout=room)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, heading, (_, part) in zip(axes, headings, panels, strict=True):
        _panel(ax, part, scale)
        ax.set_title(heading.left, fontsize=SMALL + 0.5, loc="left", color="#222222", pad=2)
        ax.set_title(heading.right, fontsize=SMALL - 0.5, loc="right", color="#555555", pad=2)
    _axis(axes[-1], scale)
    parts = ["geometry", hooks[0] if len(hooks) == 1 else "", f"run {once['run'].iloc[0]}", "height: share of features"]
    parts += [
        "each panel to its own scale" if len(panels) > 1 else "",
        "dotted: one token" if any(ax.lines for ax in axes) else "",
    ]
    figure.supxlabel(caption(parts, 72), fontsize=SMALL - 0.5, color="#444444")
    save(figure, path)


class Scale(NamedTuple):
    """The x axis, in decades."""

    first: float
    """Where the bins begin: a multiple of ``BIN`` at or below every density that is not zero."""
    apart: float
    """Middle of the bar of features that never fired; NaN where there is none."""
    width: float
    """Width of that bar."""


class Heading(NamedTuple):
    """Words above a panel."""

    left: str
    right: str


def _heading(name: str, hook_point: str, part: pd.DataFrame) -> Heading:
    """The dictionary's name, below its hook point where one begins; in a line of its own where it is long."""
    silent = int((part["value"] == 0).sum())
    share = f"{silent / len(part):.0%}" if silent >= 0.005 * len(part) else str(silent)
    facts = f"{len(part):,} features" + (f", {share} never fire" if silent else "")
    wrapped = named(name, LINE) + ("\n" if len(name) + len(facts) > LINE else "")
    return Heading(f"{named(hook_point, LINE)}\n{wrapped}" if hook_point else wrapped, facts)


def _scale(frame: pd.DataFrame) -> Scale:
    seen = frame["value"][frame["value"] > 0]
    smallest = math.log10(float(seen.min())) if len(seen) else -1.0
    first = min(-1.0, BIN * math.floor(smallest / BIN + 1e-6))
    apart = 1.11 * first if (frame["value"] == 0).any() else float("nan")
    return Scale(first, apart, max(0.06 * -first, BIN / 2))


def _panel(ax: Axes, part: pd.DataFrame, scale: Scale) -> None:
    """One dictionary's histogram."""
    values = part["value"].to_numpy(np.float64)
    edges = np.linspace(scale.first, 0.0, round(-scale.first / BIN) + 1)
    # a density that is a bin's edge must not fall below it for its last digit
    logs = np.minimum(np.log10(values[values > 0]) + 1e-9, 0.0)
    shares = np.histogram(logs, bins=edges)[0] / len(values)
    silent = float((values == 0).mean())
    ax.bar(edges[:-1], shares, width=BIN, align="edge", color=SCORE, edgecolor="white", linewidth=0.4)
    if silent:
        hollow: dict[str, Any] = {"facecolor": "white", "edgecolor": NULL, "linewidth": 0.8, "hatch": "/////"}
        ax.bar(scale.apart, silent, width=scale.width, **hollow)
    tokens = int(part["n"].max())
    if -math.log10(tokens) >= scale.first:
        ax.axvline(-math.log10(tokens), color=CHANCE, linestyle=(0, (1, 1.5)), linewidth=0.9, zorder=0.5)
    top = max(float(shares.max()), silent)
    ax.set_ylim(0, top * 1.12)
    ax.set_yticks([top], [f"{top:.0%}" if top >= 0.095 else f"{top:.1%}"], fontsize=SMALL)
    ax.tick_params(axis="y", length=2, pad=1.5)
    ax.tick_params(axis="x", labelsize=NORMAL - 0.5, length=2.5)
    bare(ax, "top", "right", "left", grid="x")


def _axis(ax: Axes, scale: Scale) -> None:
    """Decades below the last panel, and 'never' below the bar that stands apart."""
    has_apart = not math.isnan(scale.apart)
    ax.set_xlim(scale.apart - scale.width if has_apart else scale.first - 0.02 * -scale.first, 0.02 * -scale.first)
    ax.set_xticks(([scale.apart] if has_apart else []) + [float(decade) for decade in range(math.ceil(scale.first - 1e-9), 1)])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "never" if x < scale.first - 1e-6 else f"{x:.0f}"))
    ax.set_xlabel("log10 of the share of tokens a feature fires on", fontsize=NORMAL)


@VIEWS.register("geometry")
class GeometryView(View):
    """The scores; the metric 'density' is a histogram of every feature's."""

    def draw(self, path: Path, metric: str | None = None, feature: str | None = None) -> None:
        if metric == "density":
            density_figure(self.results.features(self.evaluation, "density", self.run), path)
        else:
            super().draw(path, metric, feature)

    def figures(self) -> Iterator[RunFigure]:
        yield from super().figures()
        yield RunFigure(lambda path: self.draw(path, "density"), "density", "density", page_only=True)
