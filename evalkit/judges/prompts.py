"""What judges read: few-shot prompts for explaining and simulating (after Bills et al. 2023; wording and examples are our own).

1. A fragment is shown one token a line, token<TAB>activation, with activations as one digit from 0 to 9 (see ``digits``).
2. Explaining names the tokens at the peaks first and then a little context, which small models handle better than full tables.
3. Simulating puts "unknown" behind every token of the fragment. The judge is not asked to write: the distribution of the next
   token is read at every "unknown" (after the tab).
4. Whatever is the same for all tasks comes first, then the explanation, then the fragment: servers reuse the work on a shared
   beginning.

Raise ``VERSION`` with every change of wording.
"""

from __future__ import annotations

from typing import NamedTuple

from evalkit.judges.base import Example, ExplainTask, SimulateTask
from evalkit.judges.digits import TOP
from evalkit.judges.tokens import visible

VERSION = "1"


class SlotPrompt(NamedTuple):
    """A prompt with the places its answer is read at."""

    text: str
    slots: list[int]
    """Character offsets, one for each token of the fragment, rising: each lies right behind a tab and before "unknown"."""


_PEAKS = 8
"""Peaks shown of each explain task."""
_AROUND = 6
"""Tokens of context shown on either side of a peak."""

_EXPLAIN_HEAD = f"""A detector reads text and fires on some words. Below are the words it fired on, strongest first, each with its
strength (1-{TOP}), and the passages they stood in, with [[brackets]] where it fired. Say in a few words what it looks for.

Fired on: " rain" {TOP}, " storms" 8, " snow" 8
- after two days of heavy [[ rain]] the road was closed
- the forecast warned of [[ storms]] along the coast
- children played in the fresh [[ snow]] until dark
The detector looks for: words for bad weather

Fired on: " because" {TOP}, " since" 7, " as" 3
- we stayed at home [[ because]] the car would not start
- and [[ since]] nobody had objected, the plan went ahead
- they left early, [[ as]] the last train was at nine
The detector looks for: words that introduce a reason

Fired on: " 1848" {TOP}, " 1921" {TOP}, "17" 6
- revolutions swept the continent in[[ 1848]] and after
- she was born in[[ 1921]], the third of five
- a treaty signed in [[17]]63 ended the war
The detector looks for: years

"""

_SIMULATE_HEAD = f"""Each feature of a language model is active on certain tokens. For every token of the text, rate how strongly
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


def levels(example: Example, top: float) -> list[int]:
    """Activations as digits: negative ones are 0, ``top`` is 9, rounded to nearest."""
    if top <= 0:
        return [0] * len(example.activations)
    return [min(TOP, max(0, round(TOP * value / top))) for value in example.activations]


def _peaks(task: ExplainTask) -> str:
    top = max((value for example in task.examples for value in example.activations), default=0.0)
    words, lines = [], []
    for example in task.examples[:_PEAKS]:
        if not example.activations:
            continue
        digits = levels(example, top)
        peak = max(range(len(digits)), key=lambda place: example.activations[place])
        tokens = [visible(token) for token in example.tokens]
        words.append(f'"{tokens[peak]}" {digits[peak]}')
        before, after = tokens[max(0, peak - _AROUND) : peak], tokens[peak + 1 : peak + 1 + _AROUND]
        lines.append(f"- {''.join(before).lstrip()}[[{tokens[peak]}]]{''.join(after)}")
    return "Fired on: " + ", ".join(words) + "\n" + "\n".join(lines) + "\n"


def explain_prompt(task: ExplainTask) -> str:
    """The completion prompt: the model goes on with the explanation and ends the line."""
    return f"{_EXPLAIN_HEAD}{_peaks(task)}The detector looks for:"


def explain_messages(task: ExplainTask) -> list[dict[str, str]]:
    """The same for chat models."""
    return [
        {"role": "system", "content": "Answer with one short phrase and nothing else."},
        {"role": "user", "content": f"{_EXPLAIN_HEAD}{_peaks(task)}The detector looks for:"},
    ]


def simulate_prompt(task: SimulateTask) -> SlotPrompt:
    """The completion prompt with a slot behind every token of the fragment."""
    text = f"{_SIMULATE_HEAD}Feature: {visible(task.explanation)}\nTokens:\n"
    slots = []
    for token in task.tokens:
        text += f"{visible(token)}\t"
        slots.append(len(text))
        text += "unknown\n"
    return SlotPrompt(text, slots)


def simulate_messages(task: SimulateTask) -> list[dict[str, str]]:
    """For chat models that answer as JSON: one object with token and activation for every token, in order."""
    tokens = "\n".join(visible(token) for token in task.tokens)
    return [
        {
            "role": "system",
            "content": "You predict how strongly a feature is active on each token of a text, as a whole number from 0 (not at all) "
            f"to {TOP}. "
            'Answer with JSON: {"activations": [{"token": ..., "activation": ...}, ...]}, one entry for each line of the '
            "text, in order, repeating the token exactly.",
        },
        {
            "role": "user",
            "content": f"{_SIMULATE_HEAD}Feature: {visible(task.explanation)}\n"
            f"The text has {len(task.tokens)} tokens, one a line:\n{tokens}",
        },
    ]
