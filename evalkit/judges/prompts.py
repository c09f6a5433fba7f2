"""What judges read: few-shot prompts for explaining and simulating (after Bills et al. 2023; wording and examples are our own).

1. Explaining shows the token at the peak of every fragment first and then a little context around it, which small models
   handle better than the published tables of tokens and activations (``explain_table``), which are there as well.
2. Simulating shows a fragment one token a line, token<TAB>unknown. The judge is not asked to write: the distribution of the
   next token is read at every "unknown", over the digits 0 to 9 (see ``digits``). Two short examples with every activation
   given did better for a 1.5B judge than three or five, than "unknown" in their first halves, and than shorter placeholders.
3. The explanation comes as it is; a fragment's newlines and tabs are shown as visible escapes.
4. Whatever is the same for all tasks comes first, then the explanation, then the fragment: servers reuse the work on a shared
   beginning.

Raise ``VERSION`` with every change of wording.
"""

from __future__ import annotations

from typing import NamedTuple

from evalkit.judges import explain_table
from evalkit.judges.base import ExplainTask, SimulateTask
from evalkit.judges.digits import TOP
from evalkit.judges.tokens import visible

VERSION = "1"


class SlotPrompt(NamedTuple):
    """A prompt with the places its answer is read at."""

    text: str
    slots: list[int]
    """Character offsets, one for each token of the fragment, rising: each lies right behind a tab and before "unknown"."""


_PEAKS = 8
"""Fragments shown of each explain task."""
_AROUND = 4
"""Tokens of context shown on either side of a peak."""

_EXPLAIN_HEAD = """Each feature of a language model is active on certain tokens. From the tokens where a feature was most
active, and the words around them, say in a few words what the feature is active on. Be as specific as the tokens allow.

Active tokens: but, but, But, but, but
In context: was late, <<but>> nobody minded; small <<but>> strong; <<But>> we must not; not one <<but>> two; slow, <<but>> steady
Feature: the word "but"

Active tokens: bring, brought, Bringing, brings, bring
In context: please <<bring>> your own; had <<brought>> the letter; <<Bringing>> it home; she <<brings>> luck; to <<bring>> about
Feature: forms of the verb bring

Active tokens: 73, 1848, years, 19, aged
In context: he was <<73>> and; born in <<1848>>, the; sixty <<years>> old; the <<19>> year old; a man <<aged>> forty
Feature: numbers of years and ages

Active tokens: red, green, blue, White, grey
In context: the <<red>> door of; fields of <<green>> wheat; a <<blue>> coat and; the <<White>> House said; old <<grey>> stones
Feature: words for colours

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


def _peaks(task: ExplainTask) -> str:
    words, passages = [], []
    for example in task.examples[:_PEAKS]:
        if not example.activations:
            continue
        peak = max(range(len(example.activations)), key=lambda place: example.activations[place])
        tokens = [visible(token) for token in example.tokens]
        word = tokens[peak].strip()
        before, after = tokens[max(0, peak - _AROUND) : peak], tokens[peak + 1 : peak + 1 + _AROUND]
        words.append(word)
        passages.append(f"{''.join(before).strip()} <<{word}>>{''.join(after).rstrip()}".strip())
    return f"Active tokens: {', '.join(words)}\nIn context: {'; '.join(passages)}\n"


def explain_prompt(task: ExplainTask, table: bool = False) -> str:
    """The completion prompt: the model goes on with the explanation and ends the line. ``table``: the published form."""
    if table:
        return f"{explain_table.SYSTEM}\n\n{explain_table.explain_text(task)}"
    return f"{_EXPLAIN_HEAD}{_peaks(task)}Feature:"


def explain_messages(task: ExplainTask, table: bool = False) -> list[dict[str, str]]:
    """The same for chat models."""
    if table:
        return [
            {"role": "system", "content": explain_table.SYSTEM},
            {"role": "user", "content": explain_table.explain_text(task)},
        ]
    return [
        {"role": "system", "content": "Answer with one short phrase and nothing else."},
        {"role": "user", "content": f"{_EXPLAIN_HEAD}{_peaks(task)}Feature:"},
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
            "content": "You predict how strongly a feature is active on each token of a text, as a whole number "
            f"from 0 (not at all) to {TOP}. "
            'Answer with JSON: {"activations": [{"token": ..., "activation": ...}, ...]}, one entry for each line of the '
            "text, in order, repeating the token exactly.",
        },
        {
            "role": "user",
            "content": f"{_SIMULATE_HEAD}Feature: {visible(task.explanation)}\n"
            f"The text has {len(task.tokens)} tokens, one a line:\n{tokens}",
        },
    ]
