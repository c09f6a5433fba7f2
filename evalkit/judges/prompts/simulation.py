"""Four ways of simulating activations with an endpoint.

'slots' (Bills et al. 2023, all at once): one pass over the prompt; the distribution at every slot is read from echoed
logprobs. One call for each fragment. A slot must lie on a token boundary, which the tab before it and the digit behind it give.
'one-at-a-time': the prompt up to a slot, one token of answer with its alternatives. One call for each token; same numbers.
'one-at-a-time-wide': the same with far more alternatives, so that every digit is among them with its own probability. (A grammar
or a bias would renormalise.) The calls of a fragment are a series: each prompt begins with the one before it. A server that keeps
what it has read (llama.cpp) then reads a few tokens for each.
'constrained': a chat model repeats every token with an integer under a JSON schema. Where the integers' logprobs come back, the
expectation over digits replaces the integer. A wrong length or a token that was not repeated is a failed call, never zeros.

What is the same: 'slots' and both kinds of 'one-at-a-time' read one distribution, behind a prompt whose earlier activations are
all 0. What is not: 'constrained' predicts each activation after those it has written, in a chat, for an instruction of its own.
Without logprobs it gives whole digits, so an answer of zeros is constant and scores 0. Scores of 'constrained' judges are
compared with scores of the same way only; the judge's identity holds the way.

**The prompt** is few-shot (after Bills et al. 2023; wording and examples are our own). It shows a fragment one token a line,
token<TAB>0. The judge is not asked to write: the distribution of the next token is read at every 0, over the digits 0 to 9. With
"unknown" in these places the packaged judge put a median of 0.0014 on the digits, with 0 it puts 0.9985, at no difference in r
that twelve planted features could show (``benchmarks/slot_prompts.py``; results/reference/benchmarks/slot-prompts-cpu.md). What
is the same for all tasks comes first, then the explanation, then the fragment: servers reuse the work on a shared beginning.

A slot whose alternatives show too little of the digits is one missing token (``digits``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from evalkit.judges.answers.as_json import json_in
from evalkit.judges.answers.explanations import alternatives_of, text_of
from evalkit.judges.asking import Call
from evalkit.judges.base import SimulateTask, Simulation
from evalkit.judges.calls import Outcome
from evalkit.judges.config import JudgeConfig
from evalkit.judges.digits import SCALE, TOP, WIDE, as_mapping, read_slot
from evalkit.judges.replies import at_next, at_slots, next_alternatives, schema_settings
from evalkit.judges.tokens import visible

WAYS = ("slots", "one-at-a-time-wide", "one-at-a-time", "constrained")

_SCHEMA = {
    "type": "object",
    "properties": {
        "activations": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "token": {"type": "string"},
                    "activation": {"type": "integer", "enum": list(range(TOP + 1))},
                },
                "required": ["token", "activation"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["activations"],
    "additionalProperties": False,
}
_INTEGER = re.compile(r'"activation"\s*:\s*(\d)')


class Probe(NamedTuple):
    """A small call that shows whether an endpoint can be used in one way."""

    mode: str
    call: Call


def probes(config: JudgeConfig) -> list[Probe]:
    """One probe for each way, best first."""
    task = SimulateTask("years", ["in", " 1921"])
    found = []
    for way in WAYS[:-1]:
        call = simulate_calls(way, config, task)[0]
        found.append(Probe(way, call._replace(parse=_Usable(call.parse, WIDE if way == "one-at-a-time-wide" else 0))))
    return [*found, Probe("constrained", _chat_call(config, task)._replace(parse=_any_chat))]


class _Usable:
    """Parser of a probe: raises where the answer has no value at all, or fewer than ``alternatives`` came."""

    def __init__(self, parse: Callable[[dict[str, Any]], dict[str, Any]], alternatives: int) -> None:
        self.parse, self.alternatives = parse, alternatives

    def __call__(self, choice: dict[str, Any]) -> dict[str, Any]:
        answer = self.parse(choice)
        if all(value is None for value in answer["expected"]):
            raise ValueError("no digit among the likeliest continuations")
        if self.alternatives and len(next_alternatives(choice)) < self.alternatives:
            raise ValueError(f"fewer than {self.alternatives} alternatives")
        return answer


_HEAD = f"""Each feature of a language model is active on certain tokens. For every token of the text, rate how strongly
the feature is active, from 0 (not at all) to {TOP} (as strongly as it can be). Most tokens get 0.

Feature: words for colours
Tokens:
The\t0
 red\t9
 door\t1
 and\t0
 the\t0
 pale\t5
 green\t9
 wall\t0
 were\t0
 painted\t3
 white\t9
.\t0

Feature: the word "but"
Tokens:
It\t0
 rained\t0
,\t0
 but\t9
 they\t0
 went\t0
 out\t0
,\t0
 but\t9
 not\t0
 far\t0

"""


class SlotPrompt(NamedTuple):
    """A prompt with the places its answer is read at."""

    text: str
    slots: list[int]
    """Character offsets, one for each token of the fragment, rising: each lies right behind a tab and before ``FILLER``."""


FILLER = "0"
"""What stands in the place of an activation that is not known."""


def simulate_prompt(task: SimulateTask) -> SlotPrompt:
    """The completion prompt with a slot behind every token of the fragment."""
    text = f"{_HEAD}Feature: {visible(task.explanation)}\nTokens:\n"
    slots = []
    for token in task.tokens:
        text += f"{visible(token)}\t"
        slots.append(len(text))
        text += f"{FILLER}\n"
    return SlotPrompt(text, slots)


def simulate_messages(task: SimulateTask) -> list[dict[str, str]]:
    """For chat models that answer as JSON: one object with token and activation for every token, in order."""
    tokens = "\n".join(visible(token) for token in task.tokens)
    return [
        {
            "role": "system",
            "content": "You predict how strongly a feature is active on each token of a text, as a whole number "
            f"from 0 (not at all) to {TOP}. "
            'Answer with JSON: {"activations": [{"token": ..., "activation": ...}, ...]}, one entry for each line of the '
            "text, in order, repeating the token exactly.",
        },
        {
            "role": "user",
            "content": f"{_HEAD}Feature: {visible(task.explanation)}\n"
            f"The text has {len(task.tokens)} tokens, one a line:\n{tokens}",
        },
    ]


def simulate_calls(mode: str, config: JudgeConfig, task: SimulateTask) -> list[Call]:
    """The calls that simulate ``task`` in ``mode``; none for a fragment without tokens."""
    if not task.tokens:
        return []
    if mode == "constrained":
        return [_chat_call(config, task)]
    prompt = simulate_prompt(task)
    settings: dict[str, Any] = {"model": config.model, "logprobs": config.top_logprobs}
    if config.temperature >= 0:
        settings["temperature"] = 0
    if mode == "slots":
        settings.update(max_tokens=0, echo=True)
        slots = tuple(prompt.slots)
        return [Call("simulate", "/completions", settings, prompt.text, at_slots(prompt.text, slots, _answer), 0, slots)]
    settings.update(max_tokens=1)
    series = ""
    if mode == "one-at-a-time-wide":
        settings["logprobs"] = max(WIDE, config.top_logprobs)
        series = prompt.text
    read_next = at_next(_answer)
    return [Call("simulate", "/completions", settings, prompt.text[:slot], read_next, 1, series=series) for slot in prompt.slots]


def _chat_call(config: JudgeConfig, task: SimulateTask) -> Call:
    most = 64 + 24 * len(task.tokens) + 2 * len("".join(task.tokens).encode("utf-8", "replace"))
    settings = schema_settings(config, "activations", _SCHEMA, most)
    return Call("simulate", "/chat/completions", settings, simulate_messages(task), _ReadJson(task.tokens), most)


def _answer(tops: Sequence[Any]) -> dict[str, Any]:
    """What is stored of the alternatives at each slot."""
    slots = [read_slot(as_mapping(top)) for top in tops]
    return {name: [getattr(slot, name) for slot in slots] for name in ("expected", "mass", "unseen")}


def _any_chat(choice: dict[str, Any]) -> dict[str, Any]:
    """Parser of the chat probe: any message will do, one that is reasoning so far as well."""
    if not isinstance(choice["message"], dict):
        raise ValueError("the chat answer holds no message")
    return {}


class _ReadJson:
    """Parser of the constrained chat answer."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = list(tokens)

    def __call__(self, choice: dict[str, Any]) -> dict[str, Any]:
        text = text_of(choice)
        found = json_in(text, "activations")
        entries = found.value["activations"]
        if len(entries) != len(self.tokens):
            raise ValueError(f"{len(entries)} activations for {len(self.tokens)} tokens")
        levels = []
        for number, (entry, token) in enumerate(zip(entries, self.tokens, strict=True)):
            level, said = entry["activation"], str(entry["token"])
            if said.strip() not in (token.strip(), visible(token).strip()):
                raise ValueError(f"token {number} is not repeated: {visible(said)[:40]!r}")
            if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= TOP:
                raise ValueError(f"activation of token {number} is no whole number from 0 to {TOP}")
            levels.append(level)
        written = [place.start(1) for place in _INTEGER.finditer(text, found.start, found.end)]
        tops = alternatives_of(text, written, choice.get("logprobs"))
        expected: list[float | None] = [None]
        with suppress(ValueError):  # what is listed may be no probabilities: the integers stand
            expected = _answer(tops)["expected"] if len(tops) == len(levels) else [None]
        if None in expected:  # one measure for the whole answer
            expected = [round(level * SCALE, 6) for level in levels]
        # some servers give these probabilities before the schema cuts the others off, some after: their sum says nothing
        return {"expected": expected, "mass": None, "unseen": None}


def join_slots(outcomes: Sequence[Outcome], n_tokens: int, least_tokens: float) -> Simulation:
    """The simulation of one fragment from the outcomes of its calls.

    Args:
        outcomes: of the calls of ``simulate_calls``, in order.
        n_tokens: tokens of the fragment.
        least_tokens: share of them that must have a value.

    Returns:
        A failed one where a call failed (its token is named) or too few tokens have a value.
    """
    for number, outcome in enumerate(outcomes):
        if outcome.answer is None:
            where = f"token {number}: " if len(outcomes) > 1 else ""
            return Simulation(None, None, "failed", where + outcome.error)
    answers = [outcome.answer for outcome in outcomes if outcome.answer is not None]
    expected = [value for answer in answers for value in answer["expected"]]
    if len(expected) != n_tokens:
        return Simulation(None, None, "failed", f"{len(expected)} predictions for {n_tokens} tokens")
    there = n_tokens - expected.count(None)
    if there < least_tokens * n_tokens:
        why = "no digit among the likeliest continuations at the others"
        return Simulation(None, None, "failed", f"only {there} of {n_tokens} tokens have a value: {why}")
    if any(answer["mass"] is None for answer in answers):
        return Simulation(expected)
    mass, unseen = ([value for answer in answers for value in answer[name]] for name in ("mass", "unseen"))
    return Simulation(expected, mass, unseen=unseen)
