"""One feature's story as a picture: what it fires on, what its absence changes, what causes it.

1. Upper left: the feature's firings in steps of its range; each step is split into its most frequent tokens (App. D of the paper
   counts them), with the number of firings above on a logarithmic axis. The line is the share of its main token class (case and
   spaces folded); the dashed one is that of the closest dimension of the hook point, at as many of its strongest positions.
2. Upper right: the tokens whose probability ablation lowers and raises most, by the change of their log-probability, with 95%
   intervals over contexts, and the token that the text goes on with. The tokens are the extremes of the vocabulary: their
   intervals flatter, which the caption says.
3. Below: the contexts in which it fires most strongly, the firing token in colour.
4. Where a causal tree was grown: the strongest parents that are significant, down the hook points. A box names the tokens that
   its feature fires on most strongly; a line is as thick as the share of the activation that goes with the feature below it, and
   what of it is carried along, not computed, stands in brackets.

After figures 4 and 5 of Cunningham et al. 2023 (arXiv 2309.08600).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from evalkit.report.case_studies.criteria import SIDES, chosen, stories
from evalkit.report.contexts import parts, visible
from evalkit.report.figures import CHANCE, NORMAL, NULL, SCORE, SMALL
from evalkit.report.picture import MONO, bare, check_suffix, named, plain, save
from evalkit.report.selection import of_feature
from evalkit.report.views.ablation import moved
from evalkit.report.views.causal_tree.data import tree_of
from evalkit.report.views.causal_tree.figure import LEVEL, draw_tree
from evalkit.store.reader import Results
from evalkit.util.terminal import legible

WIDTH = 6.8
"""Inches: both columns of a two-column paper."""
FILLS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")
"""Okabe and Ito 2008; the rest is grey."""
OTHER = "#D9D9D9"
TOKENS, LISTED, CONTEXTS = 5, 6, 4
BEFORE, AFTER = 48, 40
"""Letters of a context before and behind the firing token."""
LEFT, RIGHT = 0.075, 0.985
BASE = 5.2
"""Inches: height without a tree."""
LETTER = 0.6021
"""Width of a letter of ``MONO`` in its size."""


def story_figure(store: Results, path: Path, *, feature: str | None = None, run: str | None = None) -> None:
    """Draw one story into ``path``: that of ``feature`` (``stories.chosen``), or the most consistent one.

    Args:
        store: a results file.
        path: .png, .svg or .pdf; its folder is created.
        run: run_id or suite; the default is the latest run with ablations.

    Raises:
        UsageError: there are no stories, no such feature or no such suffix.
    """
    path = Path(path)
    check_suffix(path)
    story = chosen(stories(store, run), feature)
    name = str(story["run"])
    bins, effects = (of_feature(store.rows(*which, name), story) for which in FACTS)
    tree = tree_of(store, story, name) if "causal_tree" in store.evaluations(name) else None
    extra = 0.45 + LEVEL * (1 + tree.depth) if tree and tree.edges else 0.0
    height = BASE + extra

    def at(inches: float) -> float:
        """A height from the bottom of a figure without a tree, as a share of this one."""
        return (inches + extra) / height

    figure = Figure(figsize=(WIDTH, height), dpi=300)
    upper = figure.add_gridspec(
        2, 2, height_ratios=[0.5, 2.2], width_ratios=[1, 0.8], hspace=0.08,
        wspace=0.42, left=LEFT, right=RIGHT, top=at(4.5), bottom=at(2.13),
    )  # fmt: skip
    counts = figure.add_subplot(upper[0, 0])
    shares = figure.add_subplot(upper[1, 0], sharex=counts)
    _histogram(counts, shares, bins, story)
    _effects(figure.add_subplot(upper[:, 1]), effects, story)
    _contexts(figure.add_axes((LEFT, at(0.25), RIGHT - LEFT, at(1.25) - at(0.25))), bins)
    if tree and tree.edges:
        draw_tree(figure.add_axes((LEFT, 0.3 / height, RIGHT - LEFT, (extra - 0.16) / height)), tree)
    _words(figure, story, height)
    save(figure, path)


FACTS = (("input_bins", "inputs"), ("logit_effects", "ablation"))


def _histogram(counts: Axes, shares: Axes, bins: pd.DataFrame, story: pd.Series) -> None:
    own = bins[(bins["of"] == "feature") & (bins["scale"] == "range")].sort_values("bin")
    tokens = [dict(json.loads(text)) if isinstance(text, str) else {} for text in own["tokens"]]
    low, high = own["low"].to_numpy(float), own["high"].to_numpy(float)
    n = own["n"].to_numpy(int)
    middle, width = (low + high) / 2, (high - low) * 0.92
    filled = max(1, int((n > 0).sum()))
    mean: dict[str, float] = {}
    for part in tokens:
        for token, share in part.items():
            mean[token] = mean.get(token, 0.0) + share / filled
    named = sorted(mean, key=lambda token: -mean[token])[:TOKENS]
    base = np.zeros(len(own))
    for token, colour in zip(named, FILLS, strict=False):
        height = np.array([part.get(token, 0.0) for part in tokens])
        shares.bar(middle, height, width, bottom=base, color=colour, linewidth=0, label=plain(visible(token)))
        base += height
    rest = np.where(n > 0, 1 - base, 0.0)
    shares.bar(middle, rest, width, bottom=base, color=OTHER, linewidth=0, label="other")
    line: dict[str, Any] = {"marker": "o", "markersize": 2.8, "linewidth": 1.1, "clip_on": False, "zorder": 4}
    shares.plot(
        middle,
        own["main_share"].to_numpy(float),
        color="#000000",
        label=plain(f"class '{visible(str(story['main_class']))}'"),
        **line,
    )
    contrast = bins[(bins["of"] == "neuron") & (bins["scale"] == "range")].sort_values("bin")
    if len(contrast):
        where = low.min() + (contrast["bin"].to_numpy(float) + 0.5) * (high.max() - low.min()) / len(contrast)
        style = {
            **line,
            "marker": "D",
            "markersize": 2.4,
            "markerfacecolor": "white",
            "linestyle": (0, (3, 1.5)),
            "linewidth": 0.9,
        }
        neuron = contrast["neuron"].iloc[0]
        label = f"dimension {int(neuron)}"
        shares.plot(where, contrast["main_share"].to_numpy(float), color=NULL, label=label, **style)
    shares.set_ylim(0, 1)
    shares.set_ylabel("share of a step", fontsize=NORMAL)
    shares.set_xlabel("activation", fontsize=NORMAL)
    key: dict[str, Any] = {"handlelength": 1.2, "columnspacing": 0.9, "handletextpad": 0.4, "borderaxespad": 0}
    shares.legend(loc="upper left", bbox_to_anchor=(-0.12, -0.21), ncols=3, fontsize=SMALL - 0.6, frameon=False, **key)
    counts.bar(middle, n, width, color="#888888", linewidth=0)
    counts.set_yscale("log")
    counts.set_ylim(bottom=0.7)
    counts.yaxis.set_minor_locator(NullLocator())
    counts.set_ylabel("firings", fontsize=SMALL)
    counts.tick_params(labelbottom=False, bottom=False)
    for ax in (counts, shares):
        _clean(ax)


def _effects(ax: Axes, effects: pd.DataFrame, story: pd.Series) -> None:
    labels, y = [], 0
    for side, colour in (("lowered", SCORE), ("raised", CHANCE)):
        rows: list[Any] = list(moved(effects, side).head(LISTED).sort_values("change").itertuples())
        for row in rows:
            ax.plot([row.low, row.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
            ax.plot(row.change, y, "o", color=colour, markersize=4)
            labels.append(plain(visible(row.token)))
            y += 1
    marks = [*range(y), y + 0.6]
    labels.append("next token")
    ax.plot([story["next_low"], story["next_high"]], [y + 0.6] * 2, color="#000000", linewidth=1.6, solid_capstyle="butt")
    ax.plot(story["next_change"], y + 0.6, "s", color="#000000", markersize=3.6)
    ax.axhline(y - 0.2, color="#BBBBBB", linewidth=0.6)
    ax.axvline(0, color="#666666", linewidth=0.7, zorder=1)
    ax.set_yticks(marks, labels, fontsize=SMALL, fontfamily=MONO)
    ax.set_ylim(y + 1.2, -0.7)
    ax.set_xlabel("change of log-probability, nats", fontsize=NORMAL)
    ax.set_title("tokens lowered and raised without the feature", fontsize=SMALL, loc="left", color="#333333", pad=4)
    _clean(ax)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#EAEAEA", linewidth=0.6)


def _contexts(ax: Axes, bins: pd.DataFrame) -> None:
    ax.set_axis_off()
    top = bins[(bins["of"] == "feature") & (bins["scale"] == "top")]
    found = json.loads(top["contexts"].iloc[0]) if len(top) else []
    ax.set_xlim(0, 1)
    ax.set_ylim(CONTEXTS, -1)
    ax.text(0, -0.65, "where it fires most strongly", fontsize=SMALL, color="#333333", va="center")
    size = SMALL - 0.3
    letter = size * LETTER / 72 / (WIDTH * (RIGHT - LEFT))
    middle = 0.055 + BEFORE * letter
    style: dict[str, Any] = {"fontsize": size, "fontfamily": MONO, "va": "center"}
    for line, context in enumerate(found[:CONTEXTS]):
        before, token, after = parts(context)
        ax.text(0.0, line + 0.35, f"{context['value']:.1f}", color="#777777", **style)
        # firing tokens stand below each other: what is before them is aligned to the right
        ax.text(middle, line + 0.35, plain(before[-BEFORE:]), ha="right", color="#444444", **style)
        ax.text(middle, line + 0.35, plain(token), ha="left", color=CHANCE, fontweight="bold", **style)
        ax.text(middle + len(token) * letter, line + 0.35, plain(after[:AFTER]), ha="left", color="#444444", **style)


def _clean(ax: Axes) -> None:
    ax.tick_params(labelsize=NORMAL - 0.8, length=2.5)
    bare(ax, "top", "right")


def _words(figure: Figure, story: pd.Series, height: float) -> None:
    title = f"Feature {story['feature']} of {story['dictionary']} at {story['hook_point']}"
    figure.text(0.01, 1 - 0.12 / height, named(title, 104, 1), fontsize=NORMAL + 1, fontweight="bold", va="top")
    words = {True: "yes", False: "no", None: "none grown"}
    sides = ", ".join(f"{side}: {words[None if story[side] is None else bool(story[side])]}" for side in SIDES)
    figure.text(0.01, 1 - 0.32 / height, plain(f"sides that agree: {sides}"), fontsize=SMALL, va="top", color="#444444")
    caption = (
        f"KL {story['kl']:.3g} nats (random directions {story['kl_null']:.3g}); {story['repeated']:.0%} of the change repeats "
        f"({story['repeated_null']:.0%}); {story['contexts']:.0f} contexts; run {legible(str(story['run']))}.\n"
        "The tokens are the extremes of the vocabulary, so that their 95% bootstrap intervals flatter; next token: 95% by t."
    )
    figure.text(0.01, 0.05 / height, plain(caption), fontsize=SMALL - 0.5, color="#444444")
