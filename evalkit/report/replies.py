"""Replies side by side: what the model wrote as it is, and with a feature, another feature or a random direction steered.

1. One block a feature that was steered or clamped: whose it is, its words, and, for each mode and strength, the change of its
   words' log-probability, the share of texts that name it, by its words and, where it was asked, by the judge, and what they
   cost, each beside the random arm of the same length.
2. Below, the greedy replies to the same prompt under each condition; words of the feature stand in marks. Where a feature does
   not fire by itself, clamping and adding it write the same.
3. Told everything of one concept or feature, all prompts and strengths are shown; else the first prompt at the reported strength.

The side-by-side reply is that of Templeton et al. 2024 (Scaling Monosemanticity).
"""

from __future__ import annotations

import json
import textwrap
from typing import Any, NamedTuple

import pandas as pd

from evalkit.errors import UsageError
from evalkit.registry import near_miss
from evalkit.report.tables import number
from evalkit.store.reader import Results
from evalkit.terminal import legible
from evalkit.words import word_pattern

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


def measures_of(part: pd.DataFrame) -> dict[str, str]:
    """Measures of one feature's texts and their headings."""
    judged = json.loads(part["config"].iloc[0]).get("judge")
    return {key: heading for key, heading in MEASURES.items() if key != "judged" or judged}


def measured(part: pd.DataFrame) -> dict[str, list[str]]:
    """Means of one feature's texts by mode and strength, in the order of ``measures_of``; last those of the unchanged model."""
    measures = measures_of(part)
    rows = {
        f"{mode} {strength:g} times": [_beside(own, measure, NULL[str(mode)]) for measure in measures]
        for (mode, strength), own in part[part["arm"] != "none"].groupby(["mode", "strength"], sort=True)
    }
    plain = part[part["arm"] == "none"]
    said = {key: number(float(plain[key].astype(float).mean()), 2) for key in ("named", "judged", "distinct_tokens")}
    return {**rows, "unchanged": [said.get(measure, "") for measure in measures]}


def unnamed(part: pd.DataFrame) -> bool:
    """Whether one feature's texts could not be looked through, because none of its words counts (``named`` is missing)."""
    return bool(part["named"].isna().all())


def pieces(text: str, words: list[str]) -> list[Piece]:
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
    about += f" ({UNNAMED})" if words and unnamed(part) else ""
    lines = [title, f"  {about.strip()}", f"  {'':16}" + "".join(f"{heading:>20}" for heading in measures_of(part).values())]
    lines += [f"  {told:16}" + "".join(f"{cell:>20}" for cell in cells) for told, cells in measured(part).items()]
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
            told = "unchanged" if row.arm == "none" else f"{ARMS[row.arm]}, {row.mode} {row.strength:g}"
            same = row.mode == "steer" and clamped.get((row.arm, row.strength)) == row.text
            lines.append(f"    {told:{INDENT}}(as clamped)" if same else _reply(told, row.text, words))
    return "\n".join(lines)


def _beside(own: pd.DataFrame, measure: str, null: str) -> str:
    """Mean of the feature's texts and, in brackets, of the random arm's."""
    means = (own[own["arm"] == arm][measure].dropna().astype(float).mean() for arm in ("feature", null))
    return "{} ({})".format(*(number(float(mean), 2) for mean in means))


def _reply(told: str, text: str, words: list[str]) -> str:
    shown = legible(text.strip())
    shown = "".join(f"\u00bb{piece.text}\u00ab" if piece.word else piece.text for piece in pieces(shown, words))
    folded = textwrap.wrap(shown, WIDTH - INDENT - 4, break_on_hyphens=False) or ["(nothing)"]
    return "\n".join(f"    {(told if line == 0 else ''):{INDENT}}{piece}" for line, piece in enumerate(folded))
