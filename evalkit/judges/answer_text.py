"""The answer inside an answer's text: reasoning, fences, openings and labels around it, and refusals in place of it.

1. Closed reasoning in front of the answer is dropped, in the marks that models use (tags, brackets, channels). An answer that
   ends inside its reasoning is none.
2. ``one_line`` gives an explanation: the first line that says something, without opening ("Sure! Here is ..."), label
   ("Feature:"), quotes and emphasis.
3. A refusal, a line of tags or an opening with nothing behind it is no explanation.
4. ``json_in`` gives the JSON object of an answer and where it lies in the text, whatever stands around it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

LONGEST = 20_000
"""Characters of an explanation that are kept: answers can be megabytes."""

_NAMES = (
    r"(?:[a-z]+:)?(?:think(?:ing)?|thoughts?|reasoning|reason|reflection|scratch_?pad|analysis|inner_monologue|begin_of_thought)"
)
_OPEN = re.compile(rf"\s*(?:<\|?/?{_NAMES}\|?>|\[{_NAMES}\]|<\|start_thinking\|>|\u25c1{_NAMES}\u25b7)", re.IGNORECASE)
_CLOSE = re.compile(
    rf"<\|?/{_NAMES}\|?>|\[/{_NAMES}\]|<\|end_thinking\|>|<\|end_of_thought\|>|\u25c1/{_NAMES}\u25b7", re.IGNORECASE
)
_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*(?:<\|[a-z]+\|>[^<]*)?<\|message\|>", re.IGNORECASE)
_CHANNEL = re.compile(r"\s*(?:<\|start\|>\s*assistant\s*)?<\|channel\|>", re.IGNORECASE)
_BARE_CHANNELS = re.compile(r"\s*(?:analysis|commentary).*assistant\s*final(?:\s*:)?", re.DOTALL)
"""The channels where the server has taken their marks away."""
_BARE_CHANNEL = re.compile(r"\s*(?:analysis|commentary)(?=[A-Z])")
_MARK = re.compile(r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^<>]{1,40}\uff5c>|</?s>|<(?:end|start)_of_turn>|<eos>|<bos>|\[/?INST\]")
"""Marks of chat templates."""
_ROLE = re.compile(r"\s*(?:assistant|model)\s*\n", re.IGNORECASE)
_BOX = re.compile(r"<(answer|final_answer|final|output|response|explanation|feature)>(.*?)(?:</\1>|$)", re.IGNORECASE | re.DOTALL)

_LABEL = re.compile(
    r"[*_\s]*(?:the |my )?(?:(?:final|short|brief|one|possible|concise) )*"
    r"(?:feature|explanation|answer|phrase|description|label|concept|pattern|response|output|summary)(?: description)?"
    r"(?: \d+| is)?\s*[*_]*\s*",
    re.IGNORECASE,
)
_COLON = re.compile(r"[:\uff1a]\s*[*_]*\s*")
_YES = r"(?:sure(?: thing)?|certainly|of course|absolutely|great|okay|ok|alright|gladly|no problem|understood|happy to help)"
_OPENING = re.compile(
    rf"(?:{_YES}\s*(?:[!.:]+(?:\s+|$)|,\s*(?=(?:here|the|i|let|based)\b)))?"
    r"(?:(?:so,? )?(?:here(?:'s| is| are)|based on|looking at|given|after (?:analy|look|review)|let me|i (?:think|believe|would)"
    r"|the (?:short )?(?:phrase|answer|explanation|description|feature) (?:is|would be|could be)|this (?:is|would be))\b"
    r"[^:\n]{0,160}:(?:\s+|$))?",
    re.IGNORECASE,
)
_CANNOT = (
    r"(?:can(?:not|'t| not)|could ?n[o']t|unable to|not able to|won't|will not|must decline|have to decline|not comfortable)"
)
_REFUSAL = re.compile(
    rf"(?:.{{0,40}}\b(?:sorry|apologi[sz]e|apologies|unfortunately|regret)\b.{{0,80}}\b{_CANNOT}"
    rf"|i(?:'m| am)? (?:really |very )?{_CANNOT} (?:help|assist|provide|comply|fulfil|answer|do (?:that|this)|discuss|create"
    r"|generate|engage|respond|continue|support|participate)|as an ai\b|i (?:must|have to) (?:respectfully )?decline"
    r"|i'm sorry,? but i\b|(?:i'm )?sorry,? i\b|lo siento,|je suis d\u00e9sol|es tut mir leid|desculpe,|mi dispiace,"
    r"|(?:\u5f88)?\u62b1\u6b49|\u5bf9\u4e0d\u8d77|\u7533\u3057\u8a33)",
    re.IGNORECASE,
)
_MUSING = re.compile(
    r"(?:(?:okay|ok|alright|hmm|so|well)\b[,.]* )?(?:the user (?:wants|asks|is|gave|provided)|let me (?:think|look|see|analy)"
    r"|let's (?:think|see|look|analy)|(?:we|i) (?:need to|should|have to) (?:find|figure|produce|give|identify|determine|analy"
    r"|look|write|come|say|answer|respond)|(?:reasoning|thought process|thoughts?|thinking(?: process)?|analysis)\s*[*_]*:)",
    re.IGNORECASE,
)
"""Reasoning without marks."""
_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u2018": "'", "\u00ab": "\u00bb", "\u201e": "\u201c"}
"""Closing marks of opening ones, after right single quotes have become apostrophes."""
_FENCE = re.compile(r"^\s*(?:```|~~~)[\w+-]*\s*\n(.*?)(?:^\s*(?:```|~~~)\s*$|\Z)", re.DOTALL | re.MULTILINE)


def without_reasoning(text: str) -> str:
    """``text`` behind the reasoning that a model wrote in front of its answer, without the marks of chat templates.

    Raises:
        ValueError: it ends inside the reasoning.
    """
    finals = list(_FINAL.finditer(text))
    if finals:
        text = text[finals[-1].end() :]
        return _MARK.split(text, maxsplit=1)[0].strip()
    if found := _BARE_CHANNELS.match(text):
        text = text[found.end() :]
    closed = list(_CLOSE.finditer(text))
    if closed:
        text = text[closed[-1].end() :]
    pieces = _MARK.split(text)
    if _OPEN.match(text) or _CHANNEL.match(text) or _BARE_CHANNEL.match(text) or any(_OPEN.match(piece) for piece in pieces):
        raise ValueError("the answer ends inside its reasoning")
    if len(pieces) > 1:
        pieces = [_ROLE.sub("", f"{piece}\n", count=1) for piece in pieces]
    return next((piece.strip() for piece in pieces if piece.strip()), "")


def one_line(text: object) -> str:
    """From a raw answer to an explanation: its first line that says something, trimmed of what stands around it.

    Raises:
        ValueError: it is no text, ends inside its reasoning, refuses, or has no word in it.
    """
    if not isinstance(text, str):
        raise ValueError("the explanation is not text")
    text = without_reasoning(text[: 10 * LONGEST].encode("utf-8", "replace").decode())
    if found := _BOX.search(text):
        text = found[2]
    if found := _FENCE.search(text):
        text = found[1]
    text = _phrase_of_json(text)
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and _MUSING.match(_bare(lines[0])):
        lines = [line for line in lines[1:] if _labelled(_bare(line)) is not None]
        if not lines:
            raise ValueError("the answer holds reasoning and nothing else")
    for place, raw in enumerate(lines):
        line = _bare(_OPENING.sub("", _bare(raw), count=1))
        said = _labelled(line)
        line = line if said is None else said
        heading = raw.lstrip().startswith(("#", "**")) and place + 1 < len(lines) and _LABEL.fullmatch(line)
        if not re.search(r"\w", line) or re.fullmatch(r"(?:\s*<[^<>]*>)+\s*", line) or heading:
            continue
        for words in (_bare(raw), line):
            if _REFUSAL.match(words):
                raise ValueError(f"the judge refuses to answer: {words[:80]}")
        return line[:LONGEST]
    raise ValueError("the explanation is empty")


def _labelled(line: str) -> str | None:
    """What stands behind the label of a line; None where it has none."""
    label = _LABEL.match(line)
    colon = _COLON.match(line, label.end()) if label else None
    return _bare(line[colon.end() :]) if colon else None


def _bare(line: str) -> str:
    """A line without the blanks, quotes, bullet and emphasis around it."""
    line = re.sub(r"\s+", " ", line).replace("\u2019", "'").strip()
    line = re.sub(r"^(?:#{1,6}|[-*\u2022>]|\d{1,2}[.)]) +", "", line)
    for mark in ("***", "**", "__", "*", "_"):
        if len(line) > 2 * len(mark) and line.startswith(mark) and line.endswith(mark) and mark not in line[1:-1].strip(mark):
            line = line[len(mark) : -len(mark)].strip()
    return _unquoted(line)


def _unquoted(line: str) -> str:
    """A line without quotes around the whole of it; quotes around a part stay whole."""
    line = line.strip()
    while len(line) > 1 and line[-1] == _QUOTES.get(line[0]) and not {line[0], line[-1]} & set(line[1:-1]):
        line = line[1:-1].strip()
    for mark in ('"', "`"):
        if line.count(mark) == 1:  # the other one was cut off, or stands on another line
            line = line.strip(mark).strip()
    return line


def _phrase_of_json(text: str) -> str:
    """The one text in an answer that is a JSON object or text; other answers as they are."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(found, dict):
        texts = [value for value in found.values() if isinstance(value, str)]
        if len(texts) != 1:
            raise ValueError("the explanation is not text")
        return str(texts[0])
    return found if isinstance(found, str) else text


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
    if len(text) > 50 * LONGEST:
        raise ValueError("the answer is too long to be read")
    behind = without_reasoning(text)
    start = max(text.rfind(behind), 0) if behind else 0
    found = [each for each in _objects(text, start) if name in each.value]
    if not found:
        raise ValueError(f"the answer holds no JSON object with '{name}'")
    return found[-1]


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
