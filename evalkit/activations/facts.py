"""What text a run read, in numbers, and whether a dictionary was made on text that was read in the same way.

1. Of each side (fitting, scoring, streamed): tokens asked for and had, documents, and those too short for a window. A note
   where text fell short of what was asked for.
2. At each hook point: positions left out as BOS, as first positions, and as massive activations.
3. What a dictionary's file says of the text it was made on (``details["made_with"]``) and of its model is held against the
   run's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from evalkit.activations.massive import HIGH, MOST_HIGH
from evalkit.dictionaries.provenance import made_with
from evalkit.models.names import other_model

if TYPE_CHECKING:
    import pandas as pd

    from evalkit.activations.capture import Activations
    from evalkit.text.windows import TokenWindows

SIDES = {"fit": "fitting text", "score": "scoring text", "stream": "streamed fitting text"}
"""Names of the sides for people."""
SHORT = 0.01
"""Share of the tokens asked for from which text that is missing is noted; less is what windows of one length leave over."""


class LeftOut(NamedTuple):
    """Positions of a capture that nothing is fitted or scored on, by reason."""

    bos: int
    first: int
    massive: int


def left_out(activations: Activations) -> LeftOut:
    """What the rule for massive activations left out of a capture."""
    windows, context = activations.keep.shape
    opening, first = windows * activations.opening, windows * min(activations.first, context)
    return LeftOut(opening, first - opening, windows * context - first - int(activations.keep[:, activations.first :].sum()))


def text_line(side: str, windows: TokenWindows) -> str:
    """One line on the text of a side: how much there is of what was asked for."""
    count, context = windows.tokens.shape
    short = f"; {windows.skipped:,} documents are shorter than a window" if windows.skipped else ""
    return (
        f"{SIDES[side]}: {windows.tokens.numel():,} tokens ({windows.asked:,} asked for) in {count:,} windows of {context} "
        f"from {len(windows.names):,} documents{short}"
    )


def capture_line(side: str, hook_point: str, activations: Activations) -> str:
    """One line on the positions of a capture that are left out."""
    lost = left_out(activations)
    kept = (
        f"{SIDES[side]} at {hook_point}: {int(activations.keep.sum()):,} of {activations.keep.numel():,} positions kept; "
        f"left out: {lost.bos:,} BOS, {lost.first:,} first, {lost.massive:,} massive"
    )
    if activations.norms is None:
        return kept
    found = activations.norms
    limit = f"norm limit {activations.limit:.4g}" if math.isfinite(activations.limit) else "no norm limit"
    line = (
        f"{kept} ({limit}, median norm {found.median:.4g}; massive positions hold {found.massive_variance:.1%} of the variance)"
    )
    warning = high_variance(hook_point, SIDES[side], found.high_variance)
    return f"{line}\nwarning: {warning}" if warning else line


def high_variance(hook_point: str, text: str, share: float) -> str:
    """A warning where kept positions of high norm have much of the kept variance; '' where they do not.

    Args:
        text: which text it is ("fitting text").
        share: of the kept variance, above ``HIGH`` times the median norm.
    """
    if not share > MOST_HIGH:  # NaN where nothing was measured
        return ""
    return (
        f"at {hook_point}, kept positions above {HIGH:g} times the median norm have {share:.0%} of the kept variance of "
        f"the {text}: FVU and fitted baselines depend on them (norm_multiple in [activations] leaves them out)."
    )


class Reader(NamedTuple):
    """The language model that read a text, for the row about it."""

    bos: str
    """Token that windows begin with, as the tokenizer spells it; '' for none."""
    model: str
    """As the suite names it."""
    identity: str


def text_row(side: str, hook_point: str, windows: TokenWindows, activations: Activations | None, by: Reader) -> dict[str, Any]:
    """A row of ``texts``; without activations, as of streamed text, nothing is said of single positions."""
    row = {
        "side": side, "hook_point": hook_point, "bos": by.bos, "context": windows.tokens.shape[1], "asked": windows.asked,
        "tokens": windows.tokens.numel(), "documents": len(windows.names), "too_short": windows.skipped,
        "model": by.model, "model_identity": by.identity,
    }  # fmt: skip
    if activations is None:
        return row
    lost = left_out(activations)
    return row | {
        "kept": int(activations.keep.sum()), "left_bos": lost.bos, "left_first": lost.first, "left_massive": lost.massive,
        **_norms(activations),
    }  # fmt: skip


def _norms(activations: Activations) -> dict[str, float | None]:
    """The columns of ``texts`` about norms; None where there is no limit, or nothing was looked at."""
    found = activations.norms
    known = {
        "norm_limit": activations.limit,
        "norm_median": found.median if found else math.nan,
        "massive_variance": found.massive_variance if found else math.nan,
        "high_variance": found.high_variance if found else math.nan,
    }
    return {name: value if math.isfinite(value) else None for name, value in known.items()}


def norm_notes(rows: pd.DataFrame) -> list[str]:
    """The limit on norms at each hook point and what it left out, and warnings, from rows of ``texts``."""
    found = []
    every: list[Any] = list(rows[rows["norm_median"].notna()].drop_duplicates(["hook_point", "side"]).itertuples())
    for row in every:
        text = SIDES.get(row.side, row.side)
        if row.side == "score":
            where = f"Massive positions at {row.hook_point}"
            if not math.isnan(row.norm_limit):
                limit = f"norm above {row.norm_limit:.4g}, {row.norm_limit / row.norm_median:.1f} times the median of the {text}"
                found.append(
                    f"{where}: {limit}; {row.left_massive:,} of {row.kept + row.left_massive:,}, "
                    f"with {row.massive_variance:.1%} of the variance, are left out."
                )
            else:
                found.append(f"{where}: no limit on norms, none is left out.")
        if warning := high_variance(row.hook_point, text, row.high_variance):
            found.append(f"Warning: {warning}")
    return found


def short_notes(rows: pd.DataFrame) -> list[str]:
    """Where text fell short of what was asked for, one note a side, from rows of ``texts``."""
    found = []
    every: list[Any] = list(rows.drop_duplicates(["side", "asked", "tokens"]).itertuples())
    for row in every:
        missing = row.asked - row.tokens
        if missing >= row.context and missing > SHORT * row.asked:
            short = f", and {int(row.too_short):,} more are shorter than a window" if row.too_short else ""
            found.append(
                f"The {SIDES.get(row.side, row.side)} has {int(row.tokens):,} of the {int(row.asked):,} tokens asked for: "
                f"{int(row.documents):,} documents gave no more windows of {int(row.context)}{short}."
            )
    return found


def disagreement(name: str, made_with: Mapping[str, Any], bos: str, context: int) -> str:
    """What a dictionary's file says of its text and the run does otherwise, in one line; '' where they agree.

    Args:
        name: what the dictionary is called.
        made_with: ``prepend_bos`` and ``context_size``, as far as the file has them.
        bos: the token that the run's windows begin with, '' for none.
        context: tokens of a window.
    """
    parts = []
    if isinstance(begun := made_with.get("prepend_bos"), bool) and begun != bool(bos):
        here = f"with '{bos}'" if bos else "without one"
        parts.append(f"{'behind a BOS' if begun else 'without a BOS'}, here {here} ([corpus] bos)")
    if isinstance(size := made_with.get("context_size"), int) and not isinstance(size, bool) and size != context:
        parts.append(f"in windows of {size}, here of {context} ([corpus] context)")
    return f"{name} was made on text that was read {'; '.join(parts)}." if parts else ""


def disagreements(rows: pd.DataFrame) -> list[str]:
    """``disagreement`` and ``other_model`` of each row of ``dictionary_texts``, every note once."""
    notes = []
    every: list[Any] = list(rows.itertuples())
    for row in every:
        model = [value if isinstance(value, str) else "" for value in (row.made_for, row.model, row.model_identity)]
        notes.append(other_model(row.dictionary, *model))
        notes.append(disagreement(row.dictionary, made_with(json.loads(row.details)), row.bos, row.context))
    return [note for note in dict.fromkeys(notes) if note]
