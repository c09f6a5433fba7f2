"""Concepts: how well the best feature of each dictionary detects each concept on held-out texts, beside its controls.

1. One row a concept, and one for the mean of all; one panel a hook point (and configuration).
2. A mark a dictionary: AUROC, on the half of the texts that did not choose, of the feature that was best on the other half. It is
   filled where the feature detects the concept significantly (Holm over all concepts and detected features of the dictionary).
3. The square is the best dimension of the hook point, of either sign, by the same search; the bar the logistic probe on the same
   halves. The cross is the model of the texts' surface (length, marks, words), where the run has measured one.
4. The grey band is the middle nine tenths of the same search with permuted labels, all dictionaries together: what one split
   of so few texts gives when there is nothing to tell. The dashed line is chance.
5. Rows are ordered by the first dictionary, the concept it detects best on top.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from evalkit.report.figures import CHANCE, COLOURS, NORMAL, SMALL
from evalkit.report.html import filled, rendered
from evalkit.report.picture import bare, caption, checked_rows, named, save
from evalkit.report.tables import number
from evalkit.report.views.base import VIEWS, Block, Card, Feature, RunFigure, View
from evalkit.store.scores import ALPHA, config_labels
from evalkit.util.terminal import legible

WIDTH = 5.2
"""Inches."""
MARKS = "oD^v<>P"
BAND, PROBE = "#D9D9D9", "#000000"
SURFACE = "x"
COLUMNS = {"dictionary", "hook_point", "config", "run", "concept", "source", "place", "auroc", "p_holm", "texts"}
MEAN = "mean"


def concepts_figure(frame: pd.DataFrame, path: Path) -> None:
    """Draw held-out AUROC by concept into ``path``.

    Args:
        frame: rows of ``concept_features`` with what they are about (``Results.rows("concept_features", "concepts")``).
        path: .png, .svg or .pdf; its folder is created.

    Raises:
        UsageError: the frame is empty or holds something else, or there is no such suffix.
    """
    source = "rows('concept_features', 'concepts')"
    path = checked_rows(path, frame, COLUMNS, "concepts", "features of concepts", source)
    panels = [part for _, part in frame.groupby(["hook_point", "config"], sort=False)]
    names = list(dict.fromkeys(frame["dictionary"]))
    style = {name: (COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]) for i, name in enumerate(names)}
    rows = [_order(part) for part in panels]
    room = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.04, rect=(0.0, 0.0, 0.99, 0.995))
    height = 1.05 + sum(0.3 * len(order) + (0.22 if len(panels) > 1 else 0.0) for order in rows) + 0.14 * (len(names) // 3)
    figure = Figure(figsize=(WIDTH, height), dpi=200, layout=room)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=[len(order) for order in rows])[:, 0]
    configs = config_labels(frame["config"])
    for ax, part, order in zip(axes, panels, rows, strict=True):
        _panel(ax, part, order, style)
        if len(panels) > 1:
            heading = ", ".join(filter(None, (str(part["hook_point"].iloc[0]), configs.get(str(part["config"].iloc[0]), ""))))
            ax.set_title(named(heading, 80, 1), fontsize=SMALL + 0.5, loc="left", color="#333333", pad=3)
    axes[-1].set_xlabel("AUROC on held-out texts (higher is better)", fontsize=NORMAL)
    _words(figure, frame, style)
    save(figure, path)


def by_concept(part: pd.DataFrame, source: str, dictionary: str | None = None) -> pd.DataFrame:
    """AUROC and corrected p of the candidate that was best where it was chosen, by concept; all dictionaries share neurons and
    probe, so the first one's stand for them."""
    own = part[(part["source"] == source) & (part["place"] == 1)]
    own = own[own["dictionary"] == dictionary] if dictionary is not None else own
    return own.drop_duplicates("concept").set_index("concept")[["auroc", "p_holm"]]


def _order(part: pd.DataFrame) -> list[str]:
    """Concepts from top to bottom, the mean last."""
    first = by_concept(part, "feature", str(part["dictionary"].iloc[0]))["auroc"]
    rest = [name for name in dict.fromkeys(part["concept"]) if name not in first.index]
    return [*first.sort_values(ascending=False, kind="stable").index, *rest, MEAN]


def _with_mean(values: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """(AUROC, corrected p) by concept; the mean has no p."""
    found = {str(name): (float(row["auroc"]), float(row["p_holm"])) for name, row in values.iterrows()}
    return {**found, MEAN: (float(values["auroc"].mean()), float("nan"))}


def _panel(ax: Axes, part: pd.DataFrame, order: list[str], style: dict[str, tuple[str, str]]) -> None:
    null = part[part["source"] == "null"]
    for y, name in enumerate(order):
        drawn = null[null["concept"] == name]["auroc"] if name != MEAN else null.groupby(["dictionary", "place"])["auroc"].mean()
        if len(drawn):
            low, high = np.quantile(drawn.to_numpy(np.float64), [0.05, 0.95])
            ax.barh(y, high - low, left=low, height=0.72, color=BAND, linewidth=0)
    places = {name: y for y, name in enumerate(order)}
    for name, (auroc, _) in _with_mean(by_concept(part, "probe")).items():
        ax.plot([auroc, auroc], [places[name] - 0.36, places[name] + 0.36], color=PROBE, linewidth=1.6, solid_capstyle="butt")
    surface = by_concept(part, "surface")  # from version 6 of the evaluation on
    for name, (auroc, _) in (_with_mean(surface) if len(surface) else {}).items():
        ax.plot(auroc, places[name], SURFACE, color=PROBE, markersize=5, markeredgewidth=1.0, zorder=3, clip_on=False)
    for name, (auroc, p) in _with_mean(by_concept(part, "neuron")).items():
        _mark(ax, auroc, places[name], "s", "#444444", p, name)
    shown = [name for name in style if name in set(part["dictionary"])]
    for place, name in enumerate(shown):
        up = (place - (len(shown) - 1) / 2) * min(0.14, 0.5 / max(1, len(shown)))
        for concept, (auroc, p) in _with_mean(by_concept(part, "feature", name)).items():
            colour, mark = style[name]
            _mark(ax, auroc, places[concept] + up, mark, colour, p, concept)
    ax.axvline(0.5, color=CHANCE, linestyle=(0, (4, 2)), linewidth=1.0, zorder=1.5)
    ax.axhline(len(order) - 1.5, color="#BBBBBB", linewidth=0.6)
    ax.set_yticks(range(len(order)), [named(concept, 30) for concept in order], fontsize=NORMAL - 0.5)
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_xlim(right=1.02)
    ax.tick_params(axis="x", labelsize=NORMAL - 0.5, length=2.5)
    ax.tick_params(axis="y", length=0)
    bare(ax, "top", "right", "left", grid="x")


def _mark(ax: Axes, x: float, y: float, mark: str, colour: str, p: float, concept: str) -> None:
    filled = concept == MEAN or p < ALPHA
    face = colour if filled else "white"
    ax.plot(x, y, mark, color=colour, markerfacecolor=face, markersize=4.2, markeredgewidth=0.9, zorder=3, clip_on=False)


def _words(figure: Figure, frame: pd.DataFrame, style: dict[str, tuple[str, str]]) -> None:
    """Key and caption."""
    loose: dict[str, Any] = {"linewidth": 0, "markersize": 4.2}
    handles: list[Any] = [
        Line2D([], [], color=look[0], marker=look[1], label=named(name, 44), **loose) for name, look in style.items()
    ]
    if (frame["source"] == "surface").any():
        handles.append(Line2D([], [], color=PROBE, marker=SURFACE, label="surface", **loose))
    handles += [
        Line2D([], [], color="#444444", marker="s", label="best dimension", **loose),
        Line2D([], [], color=PROBE, marker="|", markersize=8, markeredgewidth=1.6, linewidth=0, label="probe"),
        Patch(color=BAND, label="permuted labels"),
        Line2D([], [], color=CHANCE, linestyle=(0, (4, 2)), linewidth=0.9, label="chance"),
    ]
    longest = max(len(line) for handle in handles for line in str(handle.get_label()).splitlines())
    columns = max(2, min(4, 92 // (longest + 8)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize=SMALL, frameon=False, handlelength=1.8)
    hooks = list(dict.fromkeys(frame["hook_point"]))
    parts = [
        "best feature of each dictionary, found on one half of the texts, tested on the other",
        "filled: significant (Holm)",
        "band: 90% of searches with permuted labels",
        f"{_span(frame['texts'])} held-out texts a concept",
        hooks[0] if len(hooks) == 1 else "",
        f"run {frame['run'].iloc[0]}",
    ]
    figure.supxlabel(caption(parts, 112), fontsize=SMALL - 0.5, color="#444444")


def _span(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low}-{high}"


TEXTS = 6
"""Texts of one concept in a card."""


@VIEWS.register("concepts")
class ConceptsView(View):
    """AUROC by concept; the card has the concepts that a feature detects best of its dictionary."""

    tables = ("concept_features", "concept_texts")
    position = 5

    def draw(self, path: Path, metric: str | None = None, feature: str | None = None) -> None:
        if metric is None:
            concepts_figure(self.rows("concept_features"), path)
        else:
            super().draw(path, metric, feature)

    def figures(self) -> Iterator[RunFigure]:
        yield RunFigure(lambda path: self.draw(path, "auroc"))
        if len(self.rows("concept_features")):
            yield RunFigure(self.draw, "by-concept", "by concept")

    def feature_rows(self) -> dict[str, pd.DataFrame]:
        rows = super().feature_rows()
        features = rows["concept_features"]
        best = (features["source"] == "feature") & (features["place"] == 1)
        return {**rows, "concept_features": features[best]}

    def feature_card(self, feature: Feature) -> Card | None:
        if "concept_features" not in feature.rows:
            return None
        texts = feature.rows.get("concept_texts")
        detected = [_detected(row, texts) for row in feature.rows["concept_features"].to_dict("records")]
        names = [concept["name"] for concept in detected]
        hint = filled(" ".join(["tells {}"] * len(names)), *names)
        return Card(hint=hint, words=names, blocks=[Block(rendered("concepts.html", title=feature.title, concepts=detected))])


def _detected(row: Mapping[Any, Any], texts: pd.DataFrame | None) -> dict[str, Any]:
    """One concept of a feature, with the held-out texts it is most active on."""
    top: list[tuple[str, str, str]] = []
    if texts is not None:
        own = texts[(texts["concept"] == row["concept"]) & texts["held_out"].astype(bool)]
        ordered = own.sort_values(["value", "text"], ascending=[False, True]).head(TEXTS)
        top = [
            (number(text["value"], 2), "shows it" if text["label"] else "does not", legible(text["text"]))
            for text in ordered.to_dict("records")
        ]
    shown = {"auroc": number(row["auroc"], 2), "p": number(row["p_holm"], 4), "recall": number(row["recall"], 2)}
    return {"name": str(row["concept"]), **shown, "texts": int(row["texts"]), "top": top}
