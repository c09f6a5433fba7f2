"""Parts of one feature's section of a page: histogram, contexts, effects, replies, as plain values that a template shows.

1. Histogram: tenths of the range, the strongest first: firings, share of the main class, that of the closest dimension, tokens.
2. Contexts: text around a firing. The firing token is shaded by its share of the feature's largest activation, which also stands
   beside it in numbers; what is kept of a context is that one activation. Fragments that a judge was shown have one a token.
3. Effects: tokens lowered and raised with 95% intervals over contexts, and through the unembedding alone.
4. Replies: what was written under each condition, side by side, the feature's words marked.

A token is shown as ``legible`` text: no control character and no mark that turns the writing round reaches the page.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from evalkit.report.replies import ARMS, UNNAMED, Piece, measured, measures_of, pieces, unnamed
from evalkit.report.story_figure import moved
from evalkit.report.tables import NOTHING, number, with_interval
from evalkit.report.trees.layout import visible
from evalkit.terminal import legible

LISTED = 8
"""Tokens of one side."""
SIDES = ("lowered", "raised")
FRAGMENTS = 4
SHARES = 4
"""Tokens named of one tenth of the range."""


class Named(NamedTuple):
    """A token with its number, apart: a token written from right to left does not carry the number along."""

    token: str
    said: str


class Tenth(NamedTuple):
    """One step of the range."""

    interval: str
    n: int
    bar: float
    """Length of the bar, of 100: logarithmic, since weak firings are many and strong ones few."""
    main: str
    other: str
    tokens: list[Named]


class Histogram(NamedTuple):
    """Firings by activation."""

    main_class: str
    dimension: str
    """The closest dimension of the hook point; '' where none was compared."""
    tenths: list[Tenth]


class Shade(NamedTuple):
    """A stretch of text and its activation."""

    text: str
    share: float
    """Of the largest activation; 0 is not shaded."""
    value: str


class Context(NamedTuple):
    """Text around a firing."""

    value: str
    text: list[Shade]


class Spread(NamedTuple):
    """Contexts of one tenth of the range."""

    interval: str
    contexts: list[Context]


class Effect(NamedTuple):
    """What a token gains or loses."""

    token: str
    change: str
    low: float
    middle: float
    high: float
    """Places on an axis from 0 to 100."""
    mass: str
    direct: str


class Effects(NamedTuple):
    """Tokens lowered and raised, on one axis."""

    zero: float
    sides: dict[str, list[Effect]]


class Ablated(NamedTuple):
    """One context in which the feature was ablated."""

    text: str
    token: str
    code: str
    kl: str
    next_token: str
    next_change: str
    lowered: Named | None


class Condition(NamedTuple):
    """Replies of one mode and strength, by arm; None where there is none, 'as clamped' where it wrote the same."""

    name: str
    replies: list[list[Piece] | str | None]


class Prompt(NamedTuple):
    """One prompt with what was written."""

    text: str
    unchanged: list[Piece]
    conditions: list[Condition]


class Steering(NamedTuple):
    """What steering a feature did."""

    concept: str
    words: list[str]
    unnamed: str
    """Why no text can name it, where none of its words counts; else ''."""
    maximum: str
    headings: list[str]
    rows: dict[str, list[str]]
    arms: list[str]
    prompts: list[Prompt]
    unrated: int
    texts: int


def histogram(own: pd.DataFrame) -> Histogram | None:
    """From a feature's rows of ``input_bins``."""
    steps = own[(own["of"] == "feature") & (own["scale"] == "range")].sort_values("bin", ascending=False)
    if steps.empty:
        return None
    neuron = own[(own["of"] == "neuron") & (own["scale"] == "range")].drop_duplicates("bin").set_index("bin")
    most = math.log1p(max(1, int(steps["n"].max())))
    tenths = []
    rows: list[Any] = list(steps.itertuples())
    for row in rows:
        other = float(neuron["main_share"].get(row.bin, math.nan)) if len(neuron) else math.nan
        tokens = json.loads(row.tokens)[:SHARES] if isinstance(row.tokens, str) else []
        named = [Named(visible(token), f"{share:.0%}") for token, share in tokens]
        bar = 100 * math.log1p(int(row.n)) / most
        tenths.append(Tenth(interval(row.low, row.high), int(row.n), bar, number(row.main_share, 2), number(other, 2), named))
    dimension = f"{int(neuron['neuron'].iloc[0])}" if len(neuron) else ""
    return Histogram(visible(str(steps["main_class"].iloc[0])), dimension, tenths)


def interval(low: float, high: float) -> str:
    """'1.87 to 3.73'."""
    return f"{number(low, 2)} to {number(high, 2)}"


def top_contexts(own: pd.DataFrame) -> list[Context]:
    """The strongest contexts of a feature's rows of ``input_bins``, the strongest first."""
    rows = own[(own["of"] == "feature") & (own["scale"] == "top")]
    return _contexts(rows, largest(own))


def spread(own: pd.DataFrame) -> list[Spread]:
    """Contexts from each tenth of the range, the strongest first."""
    rows = own[(own["of"] == "feature") & (own["scale"] == "range")].sort_values("bin", ascending=False)
    top = largest(own)
    found = [Spread(interval(row["low"], row["high"]), _contexts(rows.loc[[at]], top)) for at, row in rows.iterrows()]
    return [one for one in found if one.contexts]


def largest(own: pd.DataFrame) -> float:
    """The largest activation, either sign, in a feature's rows of ``input_bins``."""
    ends = own[own["of"] == "feature"][["low", "high"]].to_numpy(np.float64)
    return float(np.abs(ends).max()) if ends.size else 0.0


def _contexts(rows: pd.DataFrame, top: float) -> list[Context]:
    found = [context for text in rows["contexts"] if isinstance(text, str) for context in json.loads(text)]
    found.sort(key=lambda context: (-abs(context["value"]), context["window"], context["position"]))
    return [_context(one["tokens"], one["at"], one["value"], top) for one in found]


def _context(tokens: list[str], at: int, value: float, top: float) -> Context:
    before, token, after = (legible("".join(part)) for part in (tokens[:at], tokens[at : at + 1], tokens[at + 1 :]))
    said = number(value, 2)
    return Context(said, [Shade(before, 0.0, ""), Shade(token or "(empty)", _share(value, top), said), Shade(after, 0.0, "")])


def _share(value: float, top: float) -> float:
    """How dark a token is shaded; a position that was left out (NaN) is not."""
    return round(min(1.0, abs(value) / top), 3) if top > 0 and not math.isnan(value) else 0.0


def fragments(rows: pd.DataFrame) -> list[Context]:
    """Fragments a judge was shown or asked about, with the activation of each token, from a feature's rows of ``predictions``."""
    rows = rows[rows["part"].isin(["explain", "top"])].drop_duplicates(["part", "fragment"])
    found = []
    for row in rows.to_dict("records"):
        tokens, actual = list(row["tokens"]), [float(value) for value in row["actual"]]
        known = [value for value in actual if not math.isnan(value)]
        if known and len(tokens) == len(actual):
            found.append((max(known, key=abs), tokens, actual))
    found.sort(key=lambda one: -abs(one[0]))
    top = max((abs(one[0]) for one in found), default=0.0)

    def shades(tokens: list[str], actual: list[float]) -> list[Shade]:
        pairs = zip(tokens, actual, strict=True)
        return [Shade(legible(token) or "(empty)", _share(value, top), number(value, 2)) for token, value in pairs]

    return [Context(number(most, 2), shades(tokens, actual)) for most, tokens, actual in found[:FRAGMENTS]]


def effects(rows: pd.DataFrame) -> Effects | None:
    """Tokens lowered and raised by ablation, from a feature's rows of ``logit_effects``."""
    sides = {side: moved(rows, side).head(LISTED) for side in SIDES}
    both = pd.concat(list(sides.values()))
    if both.empty:
        return None
    reach = both[["low", "high", "change"]].to_numpy(np.float64)
    low, high = min(0.0, float(np.nanmin(reach))), max(0.0, float(np.nanmax(reach)))
    long = (high - low) or 1.0

    def place(value: float) -> float:
        return round(100 * (value - low) / long, 1)

    def one(row: Any) -> Effect:
        # where a single context has no interval, the bar is a point
        ends = [row.change if math.isnan(end) else end for end in (row.low, row.high)]
        change = with_interval(row.change, row.low, row.high, 3)
        spots = (place(ends[0]), place(row.change), place(ends[1]))
        return Effect(visible(row.token), change, *spots, f"{row.mass:+.4f}", _direct(row.direct))

    return Effects(place(0.0), {side: [one(row) for row in part.itertuples()] for side, part in sides.items()})


def _direct(value: Any) -> str:
    return NOTHING if value is None or pd.isna(value) else f"{float(value):+.3f}"


def direct(rows: pd.DataFrame, edit: str = "ablate") -> dict[str, list[Named]]:
    """Tokens whose logit the edit lowers and raises most through the residual stream alone; {} off the residual stream."""
    own = rows[(rows["edit"] == edit) & (rows["ranked_by"] == "direct") & rows["direct"].notna()]
    ordered = own.sort_values("place", kind="stable")
    found = {side: _named(ordered[ordered["side"] == side].head(LISTED), "direct") for side in SIDES}
    return found if any(found.values()) else {}


def other_edits(rows: pd.DataFrame) -> dict[str, dict[str, list[Named]]]:
    """Tokens lowered and raised most, in probability, where the feature was added or clamped instead."""
    edits = [str(edit) for edit in rows["edit"].unique() if edit != "ablate"]
    found = {edit: {side: _named(moved(rows, side, edit).head(LISTED), "change") for side in SIDES} for edit in edits}
    return {edit: sides for edit, sides in found.items() if any(sides.values())}


def _named(rows: pd.DataFrame, column: str) -> list[Named]:
    return [Named(visible(str(token)), f"{value:+.3f}") for token, value in zip(rows["token"], rows[column], strict=True)]


def ablated(rows: pd.DataFrame) -> list[Ablated]:
    """From a feature's rows of ``ablation_contexts``; the largest loss of the next token first."""
    own = rows[rows["edit"] == "ablate"].sort_values(["next_change", "window", "position"], kind="stable")
    found = []
    known: list[Any] = list(own.itertuples())
    for row in known:
        tokens = json.loads(row.tokens) if isinstance(row.tokens, str) else list(row.tokens)
        lowered = Named(visible(row.lowered), f"{row.lowered_change:+.3f}") if isinstance(row.lowered, str) else None
        last = visible(tokens[-1]) if tokens else "(empty)"
        following = visible(row.next_token) if isinstance(row.next_token, str) else NOTHING
        told = (number(row.code, 2), number(row.kl, 4), following, number(row.next_change, 3), lowered)
        found.append(Ablated(legible("".join(tokens[:-1])), last, *told))
    return found


def steering(part: pd.DataFrame) -> Steering:
    """From one feature's rows of ``replies.steered``, for one concept; the greedy replies."""
    first = part.iloc[0]
    words = [str(word) for word in first["words"]] if first["words"] is not None else []
    greedy = part[part["draw"] == 0]
    arms = [arm for arm in ARMS if arm in set(greedy["arm"])]
    prompts = [_prompt(own, str(text), arms, words) for text, own in greedy.groupby("prompt", sort=False)]
    asked = bool(json.loads(first["config"]).get("judge")) and bool(words)
    return Steering(
        legible(str(first["concept"])),
        [legible(word) for word in words],
        UNNAMED if words and unnamed(part) else "",
        number(first["maximum"], 2),
        list(measures_of(part).values()),
        measured(part),
        [ARMS[arm] for arm in arms],
        prompts,
        int(part["judged"].isna().sum()) if asked else 0,
        len(part),
    )


def _prompt(own: pd.DataFrame, text: str, arms: list[str], words: list[str]) -> Prompt:
    plain = own[own["arm"] == "none"]
    conditions = []
    clamped: dict[tuple[str, float], str] = {}
    groups: Any = own[own["arm"] != "none"].groupby(["mode", "strength"], sort=True)
    for (mode, strength), part in groups:
        replies: list[list[Piece] | str | None] = []
        for arm in arms:
            texts = part[part["arm"] == arm]["text"]
            if texts.empty:
                replies.append(None)
                continue
            reply = str(texts.iloc[0])
            if mode == "clamp":
                clamped[(arm, float(strength))] = reply
            same = mode != "clamp" and clamped.get((arm, float(strength))) == reply
            replies.append("as clamped" if same else _reply(reply, words))
        conditions.append(Condition(f"{mode} {strength:g} times", replies))
    unchanged = _reply(str(plain["text"].iloc[0]), words) if len(plain) else []
    return Prompt(legible(text), unchanged, conditions)


def _reply(text: str, words: list[str]) -> list[Piece]:
    shown = legible(text.strip()) or "(nothing)"
    return pieces(shown, words)
