"""Where the answer lies in an answer's text: behind reasoning, between the marks of chat templates.

1. Marks of chat templates and the names of roles in front of the answer are passed over.
2. Reasoning in front of it is passed over as far as it is closed, in the marks that models use (tags, brackets, channels).
   An answer that ends inside its reasoning is none. A closing without an opening closes what stands before it.
3. The answer ends at the next mark of a chat template.
4. A mark that the answer is about ("the token </s>", "<think> and </think> tags") is part of it: it stands in quotes, among words
   such as "token" or "the", or between blanks within a line.
5. An answer that begins as JSON is left as it is: its texts may hold any mark.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_NAMES = (
    r"(?:[a-z]+:)?(?:think(?:ing)?|thoughts?|reasoning|reason|reflection|scratch_?pad|analysis|inner_monologue|begin_of_thought)"
)
_OPEN = re.compile(
    rf"\s*(?:<\|?{_NAMES}\|?>|\[{_NAMES}\]|<\|start_thinking\|>|\u25c1{_NAMES}\u25b7|thinking\.\.\.\s*\n)", re.IGNORECASE
)
_CLOSE = re.compile(
    rf"<\|?/{_NAMES}\|?>|\[/{_NAMES}\]|<\|end_thinking\|>|<\|end_of_thought\|>|\u25c1/{_NAMES}\u25b7|\.\.\.done thinking\.?",
    re.IGNORECASE,
)
_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*(?:<\|[a-z]+\|>[^<]*)?<\|message\|>", re.IGNORECASE)
_CHANNEL = re.compile(r"\s*(?:<\|start\|>\s*assistant\s*)?<\|channel\|>", re.IGNORECASE)
_BARE_CHANNELS = re.compile(r"\s*(?:analysis|commentary).*assistantfinal(?:\s*:)?", re.DOTALL)
"""The channels where the server has taken their marks away."""
_BARE_CHANNEL = re.compile(r"\s*(?:analysis|commentary)(?=[A-Z])")
_MARK = re.compile(r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^<>]{1,40}\uff5c>|</?s>|<(?:end|start)_of_turn>|<eos>|<bos>|\[/?INST\]")
"""Marks of chat templates."""
_ROLE = re.compile(r"\s*(?:assistant|model)\s*(?:\n|$)", re.IGNORECASE)
_JSON = re.compile(r"\s*(?:```(?:json)?\s*)?\{")

_AFTER = re.compile(
    r"[ \t]*(?:(?:,|/|&|and|or|to|through)\s*[\"'`]?[<\[]"
    r"|[\"'`]?[ \t]*(?:tags?|tokens?|marks?|markers?|elements?|blocks?|brackets?|delimiters?|symbols?|markup)\b)",
    re.IGNORECASE,
)
_BEFORE = re.compile(
    r"(?:\b(?:tokens?|tags?|marks?|markers?|symbols?|delimiters?|the|an?|as|like|and|or|of|with|before|after|by|in|between)\s+"
    r"|[,/(]\s*)[\"'`(]?$",
    re.IGNORECASE,
)
_QUOTES = "\"'`\u201c\u201d"


class Span(NamedTuple):
    """Where an answer lies in its text."""

    start: int
    end: int


def mentioned(text: str, start: int, end: int) -> bool:
    """Whether the mark at ``start`` to ``end`` is what the text is about, and not a mark of it."""
    before, after = text[:start].rsplit("\n", 1)[-1], text[end:].split("\n", 1)[0]
    if before[-1:] and after[:1] and before[-1:] in _QUOTES and after[:1] in _QUOTES:
        return True
    if _AFTER.match(after) or _BEFORE.search(before):
        return True
    between = before[-1:].isspace() and after[:1].isspace() and before.strip() and after.strip()
    return bool(between) and not re.search(r"[.!?\u2026]\s*$", before)


def span_of_answer(text: str) -> Span:
    """Where the answer lies in ``text``; an empty span where there is none.

    Raises:
        ValueError: the text ends inside the reasoning.
    """
    finals = list(_FINAL.finditer(text))
    bare = _BARE_CHANNELS.match(text)
    start = finals[-1].end() if finals else bare.end() if bare else 0
    while True:
        start = _opened(text, start, channels=not finals)
        if _JSON.match(text, start):
            return Span(start, len(text))
        closed = [found for found in _CLOSE.finditer(text, start) if not mentioned(text, found.start(), found.end())]
        if not closed:
            break
        start = closed[-1].end()
    marks = (found for found in _MARK.finditer(text, start) if not mentioned(text, found.start(), found.end()))
    return Span(start, next((found.start() for found in marks), len(text)))


def _opened(text: str, start: int, *, channels: bool) -> int:
    """Where what follows the marks, roles and closed reasoning at ``start`` begins."""
    while True:
        if channels and (_CHANNEL.match(text, start) or _BARE_CHANNEL.match(text, start)):
            raise ValueError("the answer ends inside its reasoning")
        if (found := _OPEN.match(text, start)) and not mentioned(text, found.start(), found.end()):
            close = _CLOSE.search(text, found.end())
            if close is None:
                raise ValueError("the answer ends inside its reasoning")
            start = close.end()
            continue
        blank = start + len(text[start:]) - len(text[start:].lstrip())
        found = _MARK.match(text, blank) if not _CLOSE.match(text, blank) else None
        if found is not None and not mentioned(text, found.start(), found.end()) or (found := _ROLE.match(text, start)):
            start = found.end()
        else:
            return blank


def without_reasoning(text: str) -> str:
    """``text`` behind the reasoning that a model wrote in front of its answer, without the marks of chat templates.

    Raises:
        ValueError: it ends inside the reasoning.
    """
    span = span_of_answer(text)
    return text[span.start : span.end].strip()
