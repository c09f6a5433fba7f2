"""Steering: what the model wrote as it is, and with a feature, another feature or a random direction steered, side by side.

1. One block a feature that was steered or clamped: whose it is, its words, and, for each mode and strength, the change of its
   words' log-probability, the share of texts that name it, by its words and, where it was asked, by the judge, and what they
   cost, each beside the random arm of the same length.
2. Below, the greedy replies to the same prompt under each condition; words of the feature stand in marks. Where a feature does
   not fire by itself, clamping and adding it write the same.
3. Of one concept or feature that is named, all prompts and strengths are shown; else the first prompt at the reported strength.

The side-by-side reply is that of Templeton et al. 2024 (Scaling Monosemanticity).
"""

from __future__ import annotations

import json
import textwrap
from typing import Any, NamedTuple

import pandas as pd

from evalkit.errors import UsageError
from evalkit.report.html import rendered
from evalkit.report.tables import number
from evalkit.report.views.base import VIEWS, Block, Card, Feature, View
from evalkit.store.reader import Results
from evalkit.text.words import word_pattern
from evalkit.util.registry import near_miss
from evalkit.util.terminal import legible

WIDTH = 132
"""Letters of a line."""
INDENT = 30
"""Letters that say the condition."""
SAME = ["dictionary", "hook_point", "config", "concept", "feature"]
ARMS = {
    "feature": "the feature",
    "random_feature": "another feature",
    "random_direction": "a random direction",
}
NULL = {"clamp": "random_feature", "steer": "random_direction"}
"""The arm that a mode is held against."""
UNNAMED = "none of them a whole word of three letters or more, so that no text can name it"
"""Said of words none of which counts where texts are looked through for them."""
MEASURES = {"shift": "shift", "named": "named", "judged": "judged", "cost": "cost", "distinct_tokens": "distinct"}
"""Columns and their headings; 'judged' where the judge was asked."""
NOTES = (
    "shift: change of the log-probability of its words along the unchanged reply, nats. named: share of texts that hold one",
    "(three letters or more). judged: share in which the judge sees it (half of the scale or more; failed calls left out).",
    "cost: nats a token above the unchanged model's own text; repetition is cheap. distinct: share of distinct tokens.",
    "In brackets: the random arm, as long; for clamping it is another feature, for adding (steer) a random direction.",
)
YES = 0.5
"""Share of the scale from which the judge sees the feature in a text; as the evaluation 'steering' counts it."""


def replies_text(store: Results, name: str | None = None, run: str | None = None) -> str:
    """What the model wrote when features were steered or clamped.

    Args:
        store: a results file.
        name: a concept, a feature's number or a dictionary; None shows all of them, shortly.
        run: run_id or suite; the default is the latest run with steering.

    Raises:
        UsageError: no run has steering, or nothing of that name was steered in it.
    """
    rows = steered(store, run)
    if rows.empty:
        fix = "give other features or concepts: those asked for fire nowhere"
        raise UsageError("no replies were written in this run's steering", where=str(store.path), fix=fix)
    if name is not None:
        own = (rows["concept"] == name) | (rows["feature"].astype(str) == name) | (rows["dictionary"] == name)
        if not own.any():
            known = [*rows["concept"], *rows["dictionary"], *rows["feature"].astype(str)]
            what = f"nothing called '{name}' was steered in run {rows['run'].iloc[0]}"
            raise UsageError(what, where=str(store.path), fix=near_miss(name, {text for text in known if text}))
        rows = rows[own]
    blocks = [_block(part, whole=name is not None) for _, part in rows.groupby(SAME, sort=False)]
    return "\n\n".join([f"run {rows['run'].iloc[0]}", *blocks, "\n".join(f"  {note}" for note in NOTES)])


class Piece(NamedTuple):
    """A stretch of a reply."""

    text: str
    word: bool
    """One of the feature's words."""


def steered(store: Results, run: str | None = None) -> pd.DataFrame:
    """Texts of a run's steering, with the concept or '' and whether the judge saw the feature in each.

    Raises:
        UsageError: no run has steering.
    """
    rows = store.rows("steering_texts", "steering", run)
    rate = rows["named_judge"].astype(float)
    return rows.assign(concept=rows["concept"].astype("object").fillna(""), judged=(rate >= YES).where(rate.notna()))


def _measures_of(part: pd.DataFrame) -> dict[str, str]:
    """Measures of one feature's texts and their headings."""
    judged = json.loads(part["config"].iloc[0]).get("judge")
    return {key: heading for key, heading in MEASURES.items() if key != "judged" or judged}


def _measured(part: pd.DataFrame) -> dict[str, list[str]]:
    """Means of one feature's texts by mode and strength, in the order of ``_measures_of``; last those of the unchanged model."""
    measures = _measures_of(part)
    rows = {
        f"{mode} {strength:g} times": [_beside(own, measure, NULL[str(mode)]) for measure in measures]
        for (mode, strength), own in part[part["arm"] != "none"].groupby(["mode", "strength"], sort=True)
    }
    plain = part[part["arm"] == "none"]
    plain_means = {key: number(float(plain[key].astype(float).mean()), 2) for key in ("named", "judged", "distinct_tokens")}
    return {**rows, "unchanged": [plain_means.get(measure, "") for measure in measures]}


def _unnamed(part: pd.DataFrame) -> bool:
    """Whether one feature's texts could not be looked through, because none of its words counts (``named`` is missing)."""
    return bool(part["named"].isna().all())


def _pieces(text: str, words: list[str]) -> list[Piece]:
    """A reply cut at the feature's words, as texts are looked through for them (``word_pattern``)."""
    found: list[Piece] = []
    end = 0
    for match in word_pattern([word for word in words if word.strip()]).finditer(text):
        found += [Piece(text[end : match.start()], False), Piece(match[0], True)]
        end = match.end()
    return [piece for piece in [*found, Piece(text[end:], False)] if piece.text]


def _block(part: pd.DataFrame, *, whole: bool) -> str:
    first = part.iloc[0]
    config = json.loads(first["config"])
    reported = config["reported"]
    words = list(first["words"])
    title = f"{first['concept']}: " if first["concept"] else ""
    title += (
        f"feature {first['feature']} of {first['dictionary']} at {first['hook_point']}, maximum {number(first['maximum'], 3)}"
    )
    about = textwrap.shorten(f"  its words: {legible(', '.join(words)) or 'none'}", WIDTH, placeholder=" ...")
    about += f" ({UNNAMED})" if words and _unnamed(part) else ""
    lines = [title, f"  {about.strip()}", f"  {'':16}" + "".join(f"{heading:>20}" for heading in _measures_of(part).values())]
    lines += [f"  {condition:16}" + "".join(f"{cell:>20}" for cell in cells) for condition, cells in _measured(part).items()]
    if config.get("judge") and words and (failed := int(part["judged"].isna().sum())):
        lines.append(f"  {failed} of {len(part)} texts have no rating: the judge's call failed")
    greedy = part[part["draw"] == 0]
    prompts = list(dict.fromkeys(greedy["prompt"]))
    for prompt in prompts if whole else prompts[:1]:
        lines += ["", f"  {legible(prompt)} ..."]
        own = greedy[(greedy["prompt"] == prompt) & (whole | (greedy["arm"] == "none") | (greedy["strength"] == reported))]
        rows: list[Any] = list(own.itertuples())
        clamped = {(row.arm, row.strength): row.text for row in rows if row.mode == "clamp"}
        for row in rows:
            condition = "unchanged" if row.arm == "none" else f"{ARMS[row.arm]}, {row.mode} {row.strength:g}"
            same = row.mode == "steer" and clamped.get((row.arm, row.strength)) == row.text
            lines.append(f"    {condition:{INDENT}}(as clamped)" if same else _reply_lines(condition, row.text, words))
    return "\n".join(lines)


def _beside(own: pd.DataFrame, measure: str, null: str) -> str:
    """Mean of the feature's texts and, in brackets, of the random arm's."""
    means = (own[own["arm"] == arm][measure].dropna().astype(float).mean() for arm in ("feature", null))
    return "{} ({})".format(*(number(float(mean), 2) for mean in means))


def _reply_lines(condition: str, text: str, words: list[str]) -> str:
    shown = legible(text.strip())
    shown = "".join(f"\u00bb{piece.text}\u00ab" if piece.word else piece.text for piece in _pieces(shown, words))
    folded = textwrap.wrap(shown, WIDTH - INDENT - 4, break_on_hyphens=False) or ["(nothing)"]
    return "\n".join(f"    {(condition if line == 0 else ''):{INDENT}}{piece}" for line, piece in enumerate(folded))


class Steered(NamedTuple):
    """What steering a feature did, for a page."""

    concept: str
    words: list[str]
    unnamed: str
    """Why no text can name it, where none of its words counts; else ''."""
    maximum: str
    headings: list[str]
    rows: dict[str, list[str]]
    """Means by condition."""
    arms: list[str]
    prompts: list[dict[str, Any]]
    """Text, the unchanged reply and the conditions, each with one reply an arm."""
    unrated: int
    texts: int


def summary(part: pd.DataFrame) -> Steered:
    """From one feature's rows of ``steered``, for one concept; the greedy replies."""
    first = part.iloc[0]
    words = [str(word) for word in first["words"]] if first["words"] is not None else []
    greedy = part[part["draw"] == 0]
    arms = [arm for arm in ARMS if arm in set(greedy["arm"])]
    asked = bool(json.loads(first["config"]).get("judge")) and bool(words)
    return Steered(
        concept=legible(str(first["concept"])),
        words=[legible(word) for word in words],
        unnamed=UNNAMED if words and _unnamed(part) else "",
        maximum=number(first["maximum"], 2),
        headings=list(_measures_of(part).values()),
        rows=_measured(part),
        arms=[ARMS[arm] for arm in arms],
        prompts=[_prompt(own, str(text), arms, words) for text, own in greedy.groupby("prompt", sort=False)],
        unrated=int(part["judged"].isna().sum()) if asked else 0,
        texts=len(part),
    )


def _prompt(own: pd.DataFrame, text: str, arms: list[str], words: list[str]) -> dict[str, Any]:
    """A reply is None where an arm has none, and 'as clamped' where steering wrote the same."""

    def shown(reply: str) -> list[Piece]:
        return _pieces(legible(reply.strip()) or "(nothing)", words)

    plain = own[own["arm"] == "none"]["text"]
    conditions = []
    clamped: dict[tuple[str, float], str] = {}
    groups: Any = own[own["arm"] != "none"].groupby(["mode", "strength"], sort=True)
    for (mode, strength), part in groups:
        replies: list[list[Piece] | str | None] = []
        for arm in arms:
            texts = part[part["arm"] == arm]["text"]
            reply = None if texts.empty else str(texts.iloc[0])
            if mode == "clamp" and reply is not None:
                clamped[(arm, float(strength))] = reply
            same = mode != "clamp" and reply is not None and clamped.get((arm, float(strength))) == reply
            replies.append(None if reply is None else "as clamped" if same else shown(reply))
        conditions.append({"name": f"{mode} {strength:g} times", "replies": replies})
    unchanged = shown(str(plain.iloc[0])) if len(plain) else []
    return {"text": legible(text), "unchanged": unchanged, "conditions": conditions}


@VIEWS.register("steering")
class SteeringView(View):
    """The scores; the card and ``evalkit show steering`` have the replies."""

    tables = ("steering_texts",)
    lists_scores = True
    position = 4
    shows = ("steering",)

    def feature_rows(self) -> dict[str, pd.DataFrame]:
        return {"steering_texts": steered(self.results, self.run)}

    def feature_card(self, feature: Feature) -> Card | None:
        if "steering_texts" not in feature.rows:
            return None
        found = [summary(part) for _, part in feature.rows["steering_texts"].groupby("concept", sort=False)]
        words = [*(word for one in found for word in one.words), *(one.concept for one in found)]
        html = rendered("steering.html", title=feature.title, steered=found, notes=" ".join(NOTES))
        return Card(words=words, blocks=[Block(html)])

    def show(self, what: str, name: str | None) -> str:
        return replies_text(self.results, name, self.run)
