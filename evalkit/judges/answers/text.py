"""The explanation inside an answer's text: openings, labels and fences around it, and refusals in place of it.

1. Reasoning in front of the answer is dropped (``reasoning``); an explanation in JSON is taken out of it (``answer_json``).
2. ``one_line`` gives the first line that says something, without opening ("Sure! Here is ..."), label ("Feature:"), quotes and
   emphasis. An opening or a label needs a word of the task behind it: "Given names: ..." is an explanation.
3. A refusal, an error, "none", reasoning without marks, or an opening with nothing behind it is no explanation. Neither is the
   bare finding that there is no pattern, as it says nothing of the text.
"""

from __future__ import annotations

import re

from evalkit.judges.answers.as_json import phrase_of_json
from evalkit.judges.answers.reasoning import mentioned, without_reasoning
from evalkit.judges.answers.refusals import no_explanation

VERSION = 3
"""Of the rules; part of the keys of explanations and of the identity of a judge."""
LONGEST = 20_000
"""Characters of an explanation that are kept: answers can be megabytes."""

_BOX = re.compile(
    r"<(answer|final_answer|final|output|response|explanation|feature)>(.*?)(?:</\1>|\Z)", re.IGNORECASE | re.DOTALL
)

_TASK = (
    r"(?:feature|explanation|answer|phrase|description|label|concept|pattern|response|summary|neuron|detector|fragment|token|example"
    r"|text|activation|theme|data|input|context|highlighted|marked|it is|one|follow)s?"
)
"""Words of the task, in what stands in front of an explanation."""
_LABEL = re.compile(
    r"[*_\s]*(?:\d{1,2}[.)] )?(?:the |my )?(?:(?:final|short|brief|one|possible|concise) )*"
    r"(?:feature|explanation|answer|phrase|description|label|concept|pattern|response|output|summary|title|theme|topic|assistant"
    r"|detector|conclusion)(?: description)?(?: \d+| is)?\s*[*_]*\s*",
    re.IGNORECASE,
)
_COLON = re.compile(r"[:\uff1a]\s*[*_]*\s*")
_YES = (
    r"(?:sure(?: thing)?|certainly|of course|absolutely|great|okay|ok|alright|got it|gladly|no problem|understood|yes"
    r"|(?:i'm |i am |i'd be )?happy to help)"
)
_HERE = rf"here(?:'s| is| are| you go| it is)?(?: (?:the|a|an|my|one|some)?\b[^:\n]{{0,80}}\b{_TASK}\b[^:\n]{{0,40}})?"
_ONLY_OPENING = re.compile(rf"(?:{_YES}[\s,.!]*)?(?:{_HERE}[\s.!:]*)?|assistant", re.IGNORECASE)
"""A line with nothing but an opening."""
_OPENING = re.compile(
    rf"(?:{_YES}\s*(?:[!.:]+(?:\s+|$)|,\s*(?=(?:here|the|i|let|based)\b)))?"
    r"(?:(?:so,? )?(?:here(?:'s| is| are)\b[^:\n]{0,160}"
    r"|(?:based on|looking at|given|after (?:analy|look|review)|let me|i (?:think|believe|would))\b"
    rf"[^:\n]{{0,120}}\b{_TASK}\b[^:\n]{{0,60}}"
    r"|the (?:short )?(?:phrase|answer|explanation|description|feature) (?:is|would be|could be)\b[^:\n]{0,60}"
    rf"|this (?:is|would be)\b(?:[^:\n]{{0,80}}\b{_TASK}\b[^:\n]{{0,40}})?):(?:\s+|$))?",
    re.IGNORECASE,
)
_FILLER = r"(?:(?:okay|ok|alright|hmm+|so|well|now|first|wait|right)\b[,.!\u2026]*\s*)"
_MUSING = re.compile(
    rf"{_FILLER}*(?:the user (?:wants|asks|is asking|gave|provided)|let me (?:think|look|see|analy)"
    r"|let's (?:think|see|look|analy|break)|(?:we|i) (?:need to|should|have to|must|am trying to|was given|have been given)\b)"
    r"|(?:okay|ok|alright|hmm+|well|wait),? so\b|hmm+\b|wait,",
    re.IGNORECASE,
)
"""Reasoning without marks."""
_MUSING_LABEL = re.compile(
    r"(?:reasoning|thought process|thoughts?|thinking(?: process)?|analysis)\s*[*_]*:\s*(?:$|.*[.!?\u2026]\s*$|(?:\S+\s+){7})",
    re.IGNORECASE,
)
"""Reasoning under a label: whole sentences, as "Analysis: chemical" is an explanation."""
_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u2018": "'", "\u00ab": "\u00bb", "\u201e": "\u201c"}
"""Closing marks of opening ones, after right single quotes have become apostrophes."""
_HASH = re.compile(r"\s*# [a-z]")
"""A mark of its own in front of lower case, as in "# hashtags", where a heading would have a capital."""
_TAGS = re.compile(r"(?:\s*<[^<>]*>)+\s*")
_FENCE = re.compile(r"^\s*(?:```|~~~)[\w+-]*\s*\n(.*?)(?:^\s*(?:```|~~~)\s*$|\Z)", re.DOTALL | re.MULTILINE)


def one_line(text: object) -> str:
    """From a raw answer to an explanation: its first line that says something, trimmed of what stands around it.

    Raises:
        ValueError: it is no text, ends inside its reasoning, refuses, or has no word in it.
    """
    if not isinstance(text, str):
        raise ValueError("the explanation is not text")
    text = without_reasoning(text[: 10 * LONGEST].encode("utf-8", "replace").decode())
    box = next((found for found in _BOX.finditer(text) if _holds(text, found)), None)
    if box is not None:
        text = box[2]
    if found := _FENCE.search(text):
        text = found[1]
    text = phrase_of_json(text)
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and (_MUSING.match(_bare(lines[0])) or _MUSING_LABEL.match(_bare(lines[0]))):
        lines = [line for line in lines[1:] if _labelled(_bare(line)) is not None]
        if not lines:
            raise ValueError("the answer holds reasoning and nothing else")
    for place, raw in enumerate(lines):
        line = _bare(raw) if place or len(lines) > 1 or not _HASH.match(raw) else raw.strip()
        if no_explanation(line):
            raise ValueError(f"the judge refuses to answer: {line[:80]}")
        line = _bare(_OPENING.sub("", line, count=1)) if not _HASH.match(line) else line
        said = _labelled(line)
        line = line if said is None else said
        heading = raw.lstrip().startswith(("#", "**")) and place + 1 < len(lines) and _LABEL.fullmatch(line)
        if not re.search(r"\w", line) or _ONLY_OPENING.fullmatch(line) or _TAGS.fullmatch(line) or heading:
            continue
        if no_explanation(line):
            raise ValueError(f"the judge refuses to answer: {line[:80]}")
        return line[:LONGEST]
    raise ValueError("the explanation is empty")


def _holds(text: str, box: re.Match[str]) -> bool:
    """Whether tags hold an answer: they begin a line and are not what it is about."""
    opening = box.start(2)
    return not text[: box.start()].rsplit("\n", 1)[-1].strip() and not mentioned(text, box.start(), opening)


def _labelled(line: str) -> str | None:
    """What stands behind the label of a line; None where it has none."""
    label = _LABEL.match(line)
    colon = _COLON.match(line, label.end()) if label else None
    return _bare(line[colon.end() :]) if colon else None


def _bare(line: str) -> str:
    """A line without the blanks, quotes, bullet and emphasis around it."""
    line = re.sub(r"\s+", " ", line).replace("\u2019", "'").strip()
    line = re.sub(r"^(?:#{1,6}|[-*\u2022>]|1[.)]) +", "", line)  # "3. person" is no place in a list
    for mark in ("***", "**", "__", "*", "_"):
        if "_" in mark and line.isidentifier():
            break
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
