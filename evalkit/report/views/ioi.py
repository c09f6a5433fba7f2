"""Activation patching (IOI) as the paper draws it: KL against the number of patches, and against the size of the edit.

1. One row of two panels a hook point (and configuration), one line a dictionary: the mean KL(patched || target) over prompts
   of its first features, as one ordering has them, on a logarithmic axis of their number; beside it the same sets by how far
   they move the activation. The band is the 95% interval, over prompts, of the share of the KL with nothing patched
   that is left: how far prompts differ before anything is patched says nothing of the dictionary, and would hide what does.
2. A dashed line is the unpatched KL, that of the model as it is: the same for every dictionary, and the KL with nothing patched
   unless the error term is removed (keep_error = false). A line ends in a dot where all candidates are patched; from there a
   dotted line carries the KL reached to the edge.
3. Seeds of an ordering are drawn as one line; a prompt is resampled with all its seeds.

After figures 3 and 17 of Cunningham et al. 2023 (arXiv 2309.08600).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from evalkit.errors import UsageError
from evalkit.report.figures import CHANCE, COLOURS, NORMAL, SMALL
from evalkit.report.picture import bare, caption, checked_rows, named, save
from evalkit.report.views.base import VIEWS, View
from evalkit.store.scores import FEW, config_labels
from evalkit.util.registry import near_miss
from evalkit.util.statistics import LEAST_CLUSTERS, weighted_mean_interval

WIDTH = 6.8
"""Inches: both columns of a two-column paper."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
COLUMNS = {"run", "dictionary", "hook_point", "config", "ranking", "seed", "threshold", "size", "prompt", "kl", "edit"}


class _Line(NamedTuple):
    """One dictionary's curve; S set sizes, from 0."""

    sizes: Float[np.ndarray, " S"]
    kl: Float[np.ndarray, " S"]
    low: Float[np.ndarray, " S"]
    high: Float[np.ndarray, " S"]
    edit: Float[np.ndarray, " S"]


def patching_figure(
    frame: pd.DataFrame, path: Path, *, ranking: str | None = None, unpatched: dict[tuple[str, str], float] | None = None
) -> None:
    """Draw patching curves into ``path``.

    Args:
        frame: rows of ``patching_curves`` with what they are about (``Results.rows("patching_curves", "ioi")``).
        path: .png, .svg or .pdf; its folder is created.
        ranking: which ordering; the first of each configuration when left out.
        unpatched: mean KL of the model as it is (the metric kl_unpatched) by hook point and configuration; when left out, that
            with nothing patched where the error term is kept, and no line where it is not.

    Raises:
        UsageError: the frame is empty or holds something else, or there is no such ordering or suffix.
    """
    source = "rows('patching_curves', 'ioi')"
    path = checked_rows(path, frame, COLUMNS, "ioi", "patching curves", source)
    on_grid = frame[frame["threshold"].isna()]
    panels = [_of_ranking(part, ranking) for _, part in on_grid.groupby(["hook_point", "config"], sort=False)]
    names = list(dict.fromkeys(on_grid["dictionary"]))
    style = {
        name: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)], "linewidth": 1.2}
        for i, name in enumerate(names)
    }
    columns = max(1, min(4, int(110 / (min(44, max(map(len, names))) + 8))))
    rows_of_names = -(-(len(names) + 2) // columns)
    room = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.04, rect=(0.0, 0.0, 0.99, 0.995))
    height = 0.6 + 2.3 * len(panels) + 0.15 * rows_of_names
    figure = Figure(figsize=(WIDTH, height), dpi=200, layout=room)
    axes = figure.subplots(len(panels), 2, squeeze=False, sharey="row")
    several, configs = len(panels) > 1, config_labels(on_grid["config"])
    references = [_reference(part, unpatched or {}) for part in panels]
    for (left, right), part, reference in zip(axes, panels, references, strict=True):
        _row(left, right, part, style, 0.13 if len(names) <= 6 else 0.08, reference)
        if several:
            texts = [str(part["hook_point"].iloc[0]), configs.get(str(part["config"].iloc[0]), "")]
            heading = ", ".join(filter(None, texts if on_grid["hook_point"].nunique() > 1 else texts[1:]))
            n = part["prompt"].nunique()
            heading = f"{named(heading, 78, 1)}, {n} prompt{'s' if n != 1 else ''}"
            left.set_title(heading, fontsize=SMALL + 0.5, loc="left", color="#333333", pad=3)
    axes[-1, 0].set_xlabel("features patched", fontsize=NORMAL)
    axes[-1, 1].set_xlabel("edit: length of the change, mean over positions", fontsize=NORMAL)
    handles = [Line2D([], [], label=named(name, 44), **style[name]) for name in names]
    if any(reference is not None for reference in references):
        handles.append(Line2D([], [], color=CHANCE, linestyle=(0, (4, 2)), linewidth=1.0, label="unpatched"))
    handles.append(Line2D([], [], color="#444444", marker="o", markersize=3, linestyle=":", linewidth=0.9, label="all patched"))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize=SMALL, frameon=False, handlelength=2.6)
    figure.supxlabel(_caption(panels), fontsize=SMALL - 0.5, color="#444444")
    save(figure, path)


def _of_ranking(part: pd.DataFrame, ranking: str | None) -> pd.DataFrame:
    """Rows of one ordering."""
    known = list(dict.fromkeys(part["ranking"]))
    if ranking is not None and ranking not in known:
        raise UsageError(f"there is no ordering called '{ranking}'", where="ranking", fix=near_miss(ranking, known))
    return part[part["ranking"] == (ranking or known[0])]


def _reference(part: pd.DataFrame, unpatched: dict[tuple[str, str], float]) -> float | None:
    """Mean KL of the model as it is at the hook point of ``part``; None where it is not known."""
    config = str(part["config"].iloc[0])
    known = unpatched.get((str(part["hook_point"].iloc[0]), config))
    if known is not None or not json.loads(config or "{}").get("keep_error", True):
        return known
    return float(part[part["size"] == 0].groupby("dictionary")["kl"].mean().mean())


def _lines(part: pd.DataFrame) -> dict[str, _Line]:
    found = {}
    for name, rows in part.groupby("dictionary", sort=False):
        unpatched = rows[rows["size"] == 0].set_index(["seed", "prompt"])["kl"]
        points = []
        for size, at in rows.groupby("size", sort=True):
            weight = unpatched.reindex(pd.MultiIndex.from_frame(at[["seed", "prompt"]])).to_numpy(np.float64)
            kl = at["kl"].to_numpy(np.float64)
            share = np.divide(kl, weight, out=np.zeros(len(kl)), where=weight > 0)
            left = weighted_mean_interval(share, weight, list(at["prompt"]))
            if at["prompt"].nunique() < LEAST_CLUSTERS:
                left = left._replace(low=np.nan, high=np.nan)
            points.append([size, kl.mean(), left.low * weight.mean(), left.high * weight.mean(), at["edit"].mean()])
        found[str(name)] = _Line(*np.array(points, dtype=np.float64).T)
    return found


def _row(
    left: Axes, right: Axes, part: pd.DataFrame, style: dict[str, dict[str, Any]], shade: float, unpatched: float | None
) -> None:
    """Both panels of one hook point; ``shade`` is how dark a band is, ``unpatched`` where the reference line is."""
    lines = _lines(part)
    most = max(line.sizes[-1] for line in lines.values())
    longest = max(line.edit.max() for line in lines.values())
    ends = (most * 1.6, longest * 1.08)
    for name, line in lines.items():
        shown = line.sizes >= 1  # 0 has no logarithm
        look = style[name]
        views = ((left, line.sizes, shown), (right, line.edit, np.ones(len(shown), dtype=bool)))
        for (ax, x, kept), end in zip(views, ends, strict=True):
            if not kept.any():
                continue
            ax.fill_between(x[kept], line.low[kept], line.high[kept], color=look["color"], alpha=shade, linewidth=0)
            ax.plot(x[kept], line.kl[kept], **look)
            ax.plot(x[-1], line.kl[-1], "o", color=look["color"], markersize=3)
            ax.plot([x[-1], end], [line.kl[-1]] * 2, color=look["color"], linestyle=":", linewidth=0.9)
    left.set_xscale("log", base=2)
    left.set_xlim(1 / 1.1, ends[0])
    left.set_xticks([2.0**power for power in range(0, int(np.log2(max(most, 1))) + 1, 2 if most > 32 else 1)])
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    left.xaxis.set_minor_locator(NullLocator())
    right.set_xlim(-0.02 * ends[1], ends[1] if longest > 0 else 1.0)
    left.set_ylabel("KL(patched || target), nats", fontsize=NORMAL)
    for ax in (left, right):
        if unpatched is not None:
            ax.axhline(unpatched, color=CHANCE, linestyle=(0, (4, 2)), linewidth=1.0, zorder=1.5)
        ax.set_ylim(bottom=0)
        ax.tick_params(labelsize=NORMAL - 0.5, length=2.5)
        bare(ax, "top", "right", grid="both")


def _caption(panels: list[pd.DataFrame]) -> str:
    first = panels[0]
    hooks = list(dict.fromkeys(part["hook_point"].iloc[0] for part in panels))
    orders = ", ".join(dict.fromkeys(part["ranking"].iloc[0] for part in panels))
    seeds = int(first["seed"].nunique())
    few = all(part["prompt"].nunique() < LEAST_CLUSTERS for part in panels)
    parts = [
        hooks[0] if len(hooks) == 1 else "",
        f"features in the order of {orders}{f', {seeds} seeds' if seeds > 1 else ''}",
        "mean over prompts" if len(panels) > 1 else f"mean of {first['prompt'].nunique()} prompts",
        f"no band: {FEW}" if few else "band: 95% interval of the share of the KL with nothing patched",
        "dotted: all features patched",
        f"run {first['run'].iloc[0]}",
    ]
    return caption(parts, 140)


UNPATCHED = """
SELECT u.hook_point, u.config, avg(s.value) AS kl FROM run_units u JOIN scores s ON s.unit_key = u.unit_key
WHERE u.run_id = $run AND u.evaluation = $evaluation AND s.metric = 'kl_unpatched' AND s.status = 'ok' GROUP BY ALL
"""
"""Mean KL(base || target) of the model as it is, by hook point and configuration."""


@VIEWS.register("ioi")
class IoiView(View):
    """The patching curves; with a metric, its scores."""

    def draw(self, path: Path, metric: str | None = None, feature: str | None = None) -> None:
        if metric is not None:
            super().draw(path, metric, feature)
            return
        frame = self.rows("patching_curves")
        run = None if frame.empty else str(frame["run"].iloc[0])
        found = self.results.own(UNPATCHED, {"run": run, "evaluation": self.evaluation})
        unpatched = {(str(hook), str(config)): float(kl) for hook, config, kl in found.itertuples(index=False)}
        patching_figure(frame, path, unpatched=unpatched)
