"""One feature in words: its histogram with tokens, its contexts, and what its absence does, as text for a terminal.

1. The steps of its range, the strongest first: firings, share of its main class, the same for the closest dimension of the hook
   point, and the most frequent tokens.
2. Contexts drawn from all over the range, the firing token in marks.
3. Tokens lowered and raised by ablation, with 95% intervals over contexts, where the run has ablations.
"""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from evalkit.report.stories import SAME, chosen
from evalkit.report.story_figure import moved, of_story, visible
from evalkit.report.tables import number, with_interval
from evalkit.store.reader import Results
from evalkit.terminal import legible

BAR = 24
LISTED = 8
ACROSS = 56


def feature_text(store: Results, feature: str, run: str | None = None) -> str:
    """What the results file knows of one feature.

    Args:
        feature: 'NUMBER', 'HOOK POINT:NUMBER' or 'DICTIONARY:HOOK POINT:NUMBER'.
        run: run_id or suite; the default is the latest run with inputs.

    Raises:
        UsageError: no run has inputs, or there is no such feature, or there are several.
    """
    bins = store.rows("input_bins", "inputs", run)
    about = chosen(bins.drop_duplicates(SAME).reset_index(drop=True), feature)
    own = of_story(bins, about)
    parts = [f"feature {about['feature']} of {about['dictionary']} at {about['hook_point']}, run {about['run']}", ""]
    parts += _histogram(own) + ["", *_contexts(own[own["of"] == "feature"])]
    if "ablation" in store.evaluations(str(about["run"])):
        effects = of_story(store.rows("logit_effects", "ablation", str(about["run"])), about)
        if len(effects):
            parts += ["", *_effects(effects)]
    return "\n".join(parts)


def _histogram(own: pd.DataFrame) -> list[str]:
    steps = own[(own["of"] == "feature") & (own["scale"] == "range")].sort_values("bin", ascending=False)
    neuron = own[(own["of"] == "neuron") & (own["scale"] == "range")].set_index("bin")
    main = repr(str(steps["main_class"].iloc[0])) if len(steps) else "-"
    closest = f"dimension {int(neuron['neuron'].iloc[0])}" if len(neuron) else "dimension"
    most = max([1, *steps["n"].astype(int)])
    lines = [f"{'activation':>19}  {'firings':>7} {'':{BAR}}  {main:>9}  {closest:>13}  tokens"]
    rows: list[Any] = list(steps.itertuples())
    for row in rows:
        other = float(neuron["main_share"].get(row.bin, float("nan"))) if len(neuron) else float("nan")
        tokens = json.loads(row.tokens) if isinstance(row.tokens, str) else []
        named = "  ".join(f"{visible(token)} {share:.0%}" for token, share in tokens)
        bar = "#" * max(int(row.n > 0), round(BAR * row.n / most))
        share = number(row.main_share, 2)
        lines.append(
            f"{row.low:8.3f} - {row.high:8.3f}  {row.n:7} {bar:{BAR}}  {share:>9}  {number(other, 2):>13}  {named}".rstrip()
        )
    note = f"{main}, {closest}: share of its main class of tokens; the dimension at as many of its strongest positions"
    return [*lines, f"  {note}"]


def _contexts(own: pd.DataFrame) -> list[str]:
    lines = ["contexts, the strongest first:"]
    ranked = own[own["scale"].isin(["top", "range"])]
    found = [context for text in ranked["contexts"] if isinstance(text, str) for context in json.loads(text)]
    seen = {(c["window"], c["position"]): c for c in found}
    for context in sorted(seen.values(), key=lambda c: -c["value"]):
        tokens, at = context["tokens"], context["at"]
        before, token, after = (legible("".join(p)) for p in (tokens[:at], tokens[at : at + 1], tokens[at + 1 :]))
        lines.append(f"{context['value']:8.3f}  {before[-ACROSS:]:>{ACROSS}}\u00bb{token}\u00ab{after[:ACROSS]}")
    return lines


def _effects(effects: pd.DataFrame) -> list[str]:
    lines = ["without it: change of log-probability in nats, and of probability"]
    for side in ("lowered", "raised"):
        rows: list[Any] = list(moved(effects, side).head(LISTED).itertuples())
        lines += [
            f"  {side:8} {visible(row.token):20} {with_interval(row.change, row.low, row.high, 3):26} {row.mass:+.5f}"
            for row in rows
        ]
    return lines
