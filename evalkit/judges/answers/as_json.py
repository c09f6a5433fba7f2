"""JSON inside an answer's text: the object that was asked for, or the explanation that a model has put into one.

1. ``json_in`` gives the last object with a field, behind reasoning and inside fences or words.
2. ``phrase_of_json`` gives the explanation in an object: the text under the field whose name says so, else the only text.
3. Where the length has cut an object off, the text under such a field is taken as far as it goes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from evalkit.judges.answers.reasoning import span_of_answer

MOST = 1_000_000
"""Characters of an answer that are looked at."""
_FIELDS = (
    "explanation", "final_answer", "answer", "description", "feature", "phrase", "label", "summary", "concept", "pattern",
    "output", "response", "result", "text",
)  # fmt: skip
"""Fields that hold an explanation, the likeliest first."""
_CUT = re.compile(rf'"({"|".join(_FIELDS)})"\s*:\s*"((?:[^"\\]|\\.)*)', re.IGNORECASE | re.DOTALL)
_OPENED = re.compile(r'\s*\{\s*"|[^{}]*[:\n]\s*\{\s*"(?:' + "|".join(_FIELDS) + r')"\s*:', re.IGNORECASE)
"""The beginning of an object, at the start of an answer or behind an opening."""
_HALF = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?$")


class Found(NamedTuple):
    """A JSON object and where it lies."""

    value: dict[str, Any]
    start: int
    end: int


def json_in(text: str, name: str) -> Found:
    """The last JSON object with the field ``name`` in ``text``, behind reasoning and inside fences or words.

    Raises:
        ValueError: there is none.
    """
    if len(text) > MOST:
        raise ValueError("the answer is too long to be read")
    start = span_of_answer(text).start
    # a mark inside the object is a part of it: what lies before and behind the last mark is looked at together
    found = [each for each in _objects(text, 0) if name in each.value and each.end > start]
    if not found:
        raise ValueError(f"the answer holds no JSON object with '{name}'")
    return found[-1]


def phrase_of_json(text: str) -> str:
    """The explanation in an answer that is JSON or holds an object with an explanation; other answers as they are.

    Raises:
        ValueError: it is JSON without a text, or with several of which none is named as one.
    """
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        pass
    else:
        return _phrase(whole, text)
    named = [each.value for each in _objects(text, 0) if _field(each.value) is not None]
    if named:
        return _phrase(named[-1], text)
    if not _OPENED.match(text) or text.rstrip().endswith("}"):
        return text
    cut = min(_CUT.finditer(text), key=lambda found: _FIELDS.index(found[1].lower()), default=None)
    if cut is None:
        raise ValueError("the explanation is JSON that was cut off before its text")
    return str(json.loads(f'"{_HALF.sub("", cut[2])}"', strict=False))


def _phrase(value: Any, text: str) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        return text
    named = _field(value)
    texts = [named] if named is not None else [each for each in value.values() if isinstance(each, str)]
    if len(texts) != 1:
        raise ValueError("the explanation is not text")
    return texts[0]


def _field(value: Mapping[str, Any]) -> str | None:
    """The text under the field that is likeliest to hold an explanation; None where no field is named so."""
    lower = {name.lower(): each for name, each in value.items()}
    return next((lower[name] for name in _FIELDS if isinstance(lower.get(name), str)), None)


def _objects(text: str, start: int) -> Iterator[Found]:
    """Outermost JSON objects of ``text`` from ``start`` on."""
    decoder = json.JSONDecoder()
    while (start := text.find("{", start)) >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start += 1
        else:
            yield Found(value, start, end)
            start = end
