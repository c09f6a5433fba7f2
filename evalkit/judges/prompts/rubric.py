"""The specificity rubric: how well a concept fits where a feature fires in a text, one digit from 0 to 3.

1. The judge is shown the concept and the text with the tokens the feature fires on in marks, after four short examples, one of
   each grade; what is marked decides, not what else is in the text.
2. An endpoint with log-probabilities writes nothing: the next token after "Grade:" is read over the digits 0 to 3, and the grade
   is their expectation over the renormalised probabilities. ``mass`` is their sum before renormalising.
3. A chat model answers one digit under a JSON schema; where the digit's alternatives come back, they give the expectation.
4. None of the four digits, or seen with less probability than those unseen could have, is a failed call, and so is another digit.
   What the alternatives under a schema are (before or after it cuts them) differs by server: their mass is unknown.

A small judge leans to the middle: on eight texts the packaged one of 1.5B gave fitting marks 1.8 to 2.3 and others 1.4 to 2.0.
Its grades order texts on average; they are no shares of texts that fit.

Raise ``VERSION`` with every change of wording. The four grades: Templeton et al. 2024 (Scaling Monosemanticity); wording and
examples are our own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from evalkit.judges.answers.as_json import json_in
from evalkit.judges.answers.explanations import alternatives_of, text_of
from evalkit.judges.asking import Call
from evalkit.judges.base import RateTask, Rating
from evalkit.judges.calls import Outcome
from evalkit.judges.config import JudgeConfig
from evalkit.judges.digits import WIDE, as_mapping, read_digits, rounded
from evalkit.judges.replies import at_next, at_slots, schema_settings
from evalkit.judges.tokens import visible

VERSION = "1"
GRADES = ("0", "1", "2", "3")
BEGIN, END = "<<", ">>"
"""Marks around what the feature fires on."""

_HEAD = f"""A feature of a language model fires on the parts of a text between {BEGIN} and {END}. Grade how well a concept tells
what those parts are, with one digit:
0: the concept has nothing to do with the text.
1: the concept is near the subject of the text, but not of the marked parts, or only vaguely.
2: the marked parts have to do with the concept loosely, or the words right beside them do.
3: the marked parts are the concept, plainly.

Concept: words for colours
Text: The <<red>> door and the <<green>> wall were new.
Grade:\t3

Concept: names of birds
Text: He was late for the meeting <<because>> of snow.
Grade:\t0

Concept: cooking
Text: She stirred the soup with a <<wooden>> spoon.
Grade:\t2

Concept: prices in money
Text: In the shop they bought bread <<and>> went home.
Grade:\t1

"""
_SCHEMA = {
    "type": "object",
    "properties": {"grade": {"type": "integer", "enum": [int(grade) for grade in GRADES]}},
    "required": ["grade"],
    "additionalProperties": False,
}
_MOST = 32
"""Most tokens of a chat answer."""


def marked(tokens: Sequence[str], fires: Sequence[bool]) -> str:
    """The text on one line, stretches of tokens that fire in marks; spaces around a stretch stay outside of them."""
    text = ""
    for on, part in groupby(zip(tokens, fires, strict=True), key=lambda pair: pair[1]):
        stretch = "".join(token for token, _ in part)
        for mark in (BEGIN, END):  # what the text itself has of the kind (program code) must not pass for a mark
            stretch = stretch.replace(mark, f"{mark[0]} {mark[1]}")
        inside = stretch.strip() or stretch
        before, after = stretch.split(inside, 1) if inside else ("", "")
        text += f"{before}{BEGIN}{inside}{END}{after}" if on and inside else stretch
    return visible(text.strip())


def _asked(task: RateTask) -> str:
    return f"{_HEAD}Concept: {visible(task.concept)}\nText: {marked(task.tokens, task.fires)}\nGrade:"


def rate_call(mode: str, config: JudgeConfig, task: RateTask) -> Call:
    """The call that grades ``task``, in the way activations are simulated."""
    settings: dict[str, Any] = {"model": config.model}
    if config.temperature >= 0:
        settings["temperature"] = 0
    if mode == "constrained":
        settings = schema_settings(config, "grade", _SCHEMA, _MOST)
        messages = [
            {"role": "system", "content": 'Answer with JSON and nothing else: {"grade": ...}, one digit from 0 to 3.'},
            {"role": "user", "content": _asked(task)},
        ]
        return Call("rate", "/chat/completions", settings, messages, _from_json, _MOST)
    prompt = _asked(task) + "\t"
    settings["logprobs"] = max(WIDE, config.top_logprobs) if mode == "one-at-a-time-wide" else config.top_logprobs
    if mode == "slots":
        settings.update(max_tokens=0, echo=True)
        # something has to stand behind the place that is read: the tab and a word make it a token's beginning
        text = f"{prompt}unknown\n"
        return Call("rate", "/completions", settings, text, at_slots(text, [len(prompt)], _first), 0, (len(prompt),))
    settings.update(max_tokens=1)
    return Call("rate", "/completions", settings, prompt, at_next(_first), 1)


def rating(outcome: Outcome) -> Rating:
    """From the outcome of its call."""
    if outcome.answer is None:
        return Rating(None, None, "failed", outcome.error)
    return Rating(float(outcome.answer["grade"]), outcome.answer["mass"])


def read_grade(top: Mapping[str, float]) -> dict[str, Any]:
    """Expected grade and mass from token strings and their log probabilities.

    Raises:
        ValueError: none of the four digits is among them, or those that are not could be more probable.
    """
    found = read_digits(top, len(GRADES))
    if found.expected is None:
        seen = f"they have {found.mass:.2g}, those not listed at most {found.unseen:.2g}" if found.mass else "none is listed"
        raise ValueError(f"no grade from 0 to 3 among the likeliest continuations: {seen}")
    return {"grade": round(found.expected, 6), "mass": rounded(found.mass)}


def _first(tops: Sequence[Any]) -> dict[str, Any]:
    return read_grade(as_mapping(tops[0]))


def _from_json(choice: dict[str, Any]) -> dict[str, Any]:
    """Parser of the constrained chat answer."""
    text = text_of(choice)
    found = json_in(text, "grade")
    grade = found.value["grade"]
    if isinstance(grade, bool) or str(grade) not in GRADES:
        raise ValueError(f"the grade is no digit from 0 to 3: {visible(str(grade))[:40]}")
    written = re.compile(r'"grade"\s*:\s*(\d)').search(text, found.start, found.end)
    tops = alternatives_of(text, [written.start(1)], choice.get("logprobs")) if written else []
    # some servers give these probabilities before the schema cuts the others off, some after: their sum says nothing
    return {"grade": read_grade(as_mapping(tops[0]))["grade"] if tops else float(grade), "mass": None}
