"""Inputs: the tokens a feature fires on, by activation, and contexts from all over its range.

1. The steps of its range, the strongest first: firings, share of its main class, the same for the closest dimension of the hook
   point, and the most frequent tokens.
2. Contexts: the top-activating ones, and some of each step.
3. ``evalkit show feature`` prints both, and what the views of the run's other evaluations write of the feature.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from markupsafe import Markup

from evalkit.report.case_studies.criteria import chosen
from evalkit.report.contexts import around, parts, read, visible
from evalkit.report.html import filled, rendered
from evalkit.report.selection import SAME, of_feature
from evalkit.report.tables import NOTHING, number
from evalkit.report.views.base import VIEWS, Block, Card, Feature, View, views_of

BAR = 24
ACROSS = 56
"""Letters of a bar, and of a context on each side of its token, in a terminal."""
SHARES = 4
"""Tokens of one step on the page."""


class Step(NamedTuple):
    """One step of the range."""

    low: float
    high: float
    n: int
    share: float
    """Of the main class among its firings."""
    dimension: float
    """The same of the closest dimension; NaN where none was compared."""
    tokens: list[tuple[str, float]]
    """The most frequent ones with their shares."""


class Histogram(NamedTuple):
    """Firings by activation."""

    main_class: str
    dimension: int | None
    """The closest dimension of the hook point."""
    steps: list[Step]
    """The strongest first."""


def histogram(rows: pd.DataFrame) -> Histogram:
    """From one feature's rows of ``input_bins``."""
    on_range = rows[rows["scale"] == "range"]
    own = on_range[on_range["of"] == "feature"].sort_values("bin", ascending=False)
    neuron = on_range[on_range["of"] == "neuron"].drop_duplicates("bin").set_index("bin")
    steps = []
    for row in own.to_dict("records"):
        tokens = [(token, share) for token, share in json.loads(row["tokens"])] if isinstance(row["tokens"], str) else []
        other = float(neuron["main_share"].get(row["bin"], math.nan)) if len(neuron) else math.nan
        steps.append(Step(row["low"], row["high"], int(row["n"]), row["main_share"], other, tokens))
    dimension = int(neuron["neuron"].iloc[0]) if len(neuron) else None
    return Histogram(str(own["main_class"].iloc[0]) if len(own) else "", dimension, steps)


@VIEWS.register("inputs")
class InputsView(View):
    """The scores; the card has the histogram and the contexts."""

    tables = ("input_bins",)
    lists_scores = True
    position = 1
    shows = ("feature",)

    def feature_card(self, feature: Feature) -> Card | None:
        def score(metric: str) -> str:
            return feature.scores.text(feature.name, self.evaluation, metric, 2)

        facts, hint, words, blocks = [], Markup(), [], []
        if density := feature.scores.value(feature.name, self.evaluation, "density"):
            facts.append(("fires on", f"{density:.2%} of the tokens"))
        rows = feature.rows.get("input_bins")
        shown = _on_page(histogram(rows)) if rows is not None else None
        if rows is not None and shown:
            hint = filled('fires on <bdi class="token">{}</bdi>', shown["main_class"])
            words = [token for step in shown["steps"] for token, _ in step["tokens"]]
            blocks.append(Block(rendered("histogram.html", histogram=shown, title=feature.title), "beside"))
            if share := score("monosemantic"):
                null = score("monosemantic_random") or NOTHING
                text = f"{shown['main_class']}: {share} of the mean tenth of its range (random tokens {null})"
                facts.append(("main class", text))
        return Card(facts, hint, words, [*blocks, *(() if rows is None else _context_blocks(rows))])

    def text(self, about: pd.Series) -> str:
        rows = of_feature(self.rows("input_bins"), about)
        return "\n".join([*_histogram_lines(histogram(rows)), "", *_context_lines(rows[rows["of"] == "feature"])])

    def show(self, what: str, name: str | None) -> str:
        """What the results file has of one feature.

        Raises:
            UsageError: no run has inputs, or there is no such feature, or there are several.
        """
        about = chosen(self.rows("input_bins").drop_duplicates(SAME).reset_index(drop=True), name)
        run = str(about["run"])
        title = f"feature {about['feature']} of {about['dictionary']} at {about['hook_point']}, run {run}"
        return "\n\n".join([title, *filter(None, (view.text(about) for view in views_of(self.results, run)))])


def _on_page(found: Histogram) -> dict[str, Any] | None:
    """What the template shows of a histogram; None where there are no steps.

    A bar is logarithmic: weak firings are many, strong ones few.
    """
    if not found.steps:
        return None
    most = math.log1p(max([1, *(step.n for step in found.steps)]))
    steps = [
        {
            "interval": _interval(step.low, step.high),
            "n": step.n,
            "bar": 100 * math.log1p(step.n) / most,
            "share": number(step.share, 2),
            "other": number(step.dimension, 2),
            "tokens": [(visible(token), f"{share:.0%}") for token, share in step.tokens[:SHARES]],
        }
        for step in found.steps
    ]
    dimension = "" if found.dimension is None else str(found.dimension)
    return {"main_class": visible(found.main_class), "dimension": dimension, "steps": steps}


def _interval(low: float, high: float) -> str:
    return f"{number(low, 2)} to {number(high, 2)}"


def _context_blocks(rows: pd.DataFrame) -> list[Block]:
    """The top-activating contexts, and those of each step, the strongest first."""
    own = rows[rows["of"] == "feature"]
    ends = own[["low", "high"]].to_numpy(np.float64)
    largest = float(np.abs(ends).max()) if ends.size else 0.0
    blocks = []
    if top := [around(context, largest) for context in read(own[own["scale"] == "top"]["contexts"])]:
        blocks.append(Block(rendered("contexts.html", note="", contexts=top), "contexts"))
    spread = []
    for row in own[own["scale"] == "range"].sort_values("bin", ascending=False).to_dict("records"):
        if contexts := [around(context, largest) for context in read([row["contexts"]])]:
            spread.append({"interval": _interval(row["low"], row["high"]), "contexts": contexts})
    if spread:
        blocks.append(Block(rendered("spread.html", spread=spread)))
    return blocks


def _histogram_lines(found: Histogram) -> list[str]:
    main = repr(found.main_class) if found.steps else NOTHING
    closest = "dimension" if found.dimension is None else f"dimension {found.dimension}"
    most = max([1, *(step.n for step in found.steps)])
    lines = [f"{'activation':>19}  {'firings':>7} {'':{BAR}}  {main:>9}  {closest:>13}  tokens"]
    for step in found.steps:
        tokens = "  ".join(f"{visible(token)} {share:.0%}" for token, share in step.tokens)
        bar = "#" * max(int(step.n > 0), round(BAR * step.n / most))
        shares = f"{number(step.share, 2):>9}  {number(step.dimension, 2):>13}"
        lines.append(f"{step.low:8.3f} - {step.high:8.3f}  {step.n:7} {bar:{BAR}}  {shares}  {tokens}".rstrip())
    note = f"{main}, {closest}: share of its main class of tokens; the dimension at as many of its strongest positions"
    return [*lines, f"  {note}"]


def _context_lines(own: pd.DataFrame) -> list[str]:
    lines = ["contexts, the strongest first:"]
    unique = {(c["window"], c["position"]): c for c in read(own[own["scale"].isin(["top", "range"])]["contexts"])}
    for context in sorted(unique.values(), key=lambda context: -context["value"]):
        before, token, after = parts(context)
        lines.append(f"{context['value']:8.3f}  {before[-ACROSS:]:>{ACROSS}}\u00bb{token}\u00ab{after[:ACROSS]}")
    return lines
