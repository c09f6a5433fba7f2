"""The published explainer (Bills et al. 2023, as used by Cunningham et al. 2023): tables of tokens and activations.

1. Activations are quantised to 0-10: floor(10 * max(a, 0) / A), at most 10, with A the largest activation of the fragments
   shown. A positive activation below a tenth of A shows as 0.
2. Each fragment is a record between markers, one token a line, token<TAB>activation.
3. Where fewer than a fifth of the values shown are above 0, the records are repeated without their zeros.
4. Two worked features come first; the answer is primed, so that it begins as theirs do.

The wording and the examples are our own. Models of a few billion parameters make little of such tables (see ``prompts``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from evalkit.judges.base import Example, ExplainTask
from evalkit.judges.tokens import visible

TOP = 10
SYSTEM = (
    "You study the features of a language model. A feature responds to one particular thing in text. You are shown fragments of "
    "text, one token a line, each with the feature's activation behind a tab, from 0 (silent) to 10 (strongest). Say in one "
    "short sentence what the feature responds to; do not give a list of words."
)
PRIMED = "Explanation: this feature responds to"

_WORKED: list[tuple[list[list[tuple[str, int]]], str]] = [
    (
        [
            [("We", 0), (" sailed", 3), (" past", 0), (" the", 0), (" harbour", 8), (" at", 0), (" dawn", 0)],
            [("Two", 0), (" ferries", 10), (" left", 0), (" the", 0), (" quay", 9), (" late", 0)],
        ],
        " ships and the places where they land",
    ),
    (
        [
            [("He", 0), (" was", 0), (" run", 0), ("ning", 9), (" and", 0), (" sing", 0), ("ing", 10)],
            [("Nothing", 2), (" was", 0), (" miss", 0), ("ing", 10), (",", 0), (" she", 0), (" said", 0)],
        ],
        " the ending -ing of verbs",
    ),
]


def quantised(example: Example, top: float) -> list[int]:
    """Activations on the 0-10 scale; all 0 where nothing shown is positive."""
    if top <= 0:
        return [0] * len(example.activations)
    return [min(TOP, math.floor(TOP * max(value, 0.0) / top)) for value in example.activations]


def _records(rows: Sequence[Sequence[tuple[str, int]]], heading: str) -> str:
    blocks = "".join("<start>\n" + "".join(f"{visible(t)}\t{a}\n" for t, a in record) + "<end>\n" for record in rows)
    return f"{heading}\n{blocks}"


def _feature(records: Sequence[Sequence[tuple[str, int]]]) -> str:
    shown = [a for record in records for _, a in record]
    text = _records(records, "Activations:")
    if shown and sum(a > 0 for a in shown) < len(shown) / 5:
        text += _records([[(t, a) for t, a in record if a > 0] for record in records], "The same, zeros left out:")
    return text


def explain_text(task: ExplainTask) -> str:
    """The worked features, then the records of ``task``, then the primed answer."""
    parts = [f"{_feature(records)}{PRIMED}{answer}\n\n" for records, answer in _WORKED]
    top = max((value for example in task.examples for value in example.activations), default=0.0)
    records = [list(zip(example.tokens, quantised(example, top), strict=True)) for example in task.examples]
    return "".join(parts) + _feature(records) + PRIMED
