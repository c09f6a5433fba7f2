"""What judges read: few-shot prompts for explaining and simulating (after Bills et al. 2023; wording and examples are our own).

1. Explaining shows the token at the peak of every fragment first, then a little context around it, then texts where the
   feature is silent. Small models handle this better than the published tables of tokens and activations (``explain_table``),
   which are there as well. The examples are of several kinds, as explanations repeat the form of what they are shown.
2. Simulating shows a fragment one token a line, token<TAB>0. The judge is not asked to write: the distribution of the next
   token is read at every 0, over the digits 0 to 9 (see ``digits``). With "unknown" in these places the packaged judge put a
   median of 0.0014 on the digits, with 0 it puts 0.9985, at no difference in r that twelve planted features could show
   (``benchmarks/slot_prompts.py``; results/reference/benchmarks/slot-prompts-cpu.md).
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

VERSION = "2"


class SlotPrompt(NamedTuple):
    """A prompt with the places its answer is read at."""

    text: str
    slots: list[int]
    """Character offsets, one for each token of the fragment, rising: each lies right behind a tab and before ``FILLER``."""


FILLER = "0"
"""What stands in the place of an activation that is not known."""

_PEAKS = 10
"""Fragments shown of each explain task."""
_AROUND = 4
"""Tokens of context shown on either side of a peak."""


class _Shown(NamedTuple):
    """One example of the explainer's prompt."""

    words: str
    passages: str
    silent: str
    feature: str


_EXAMPLES = (
    _Shown(
        "but, but, But, but, but",
        "was late, <<but>> nobody minded; small <<but>> strong; <<But>> we must not; not one <<but>> two; slow, <<but>> steady",
        "late and slow, yet nobody minded; a small and strong man",
        'the word "but"',
    ),
    _Shown(
        "',', ',', ',', ','",
        "a flat in Lyon<<,>> France; born near Lima<<,>> Peru; from Oslo<<,>> Norway; to Kyoto<<,>> Japan",
        "apples, pears and figs; Norway is cold, and Peru is high",
        "commas between a city and its country",
    ),
    _Shown(
        "ward, fever, nurse, dose, surgeon",
        "in the <<ward>> at night; the <<fever>> went down; asked the <<nurse>> for; a second <<dose>> of; the <<surgeon>> came",
        "the night train was late; asked the driver for a ticket",
        "hospitals and illness",
    ),
    _Shown(
        "to, to, to, to",
        "in order <<to>> save time; in order <<to>> be heard; In order <<to>> win; in order <<to>> stay",
        "went to Rome; wants to be heard",
        '"to" after "in order"',
    ),
    _Shown(
        "73, 1848, years, 19, aged",
        "he was <<73>> and; born in <<1848>>, the; sixty <<years>> old; the <<19>> year old; a man <<aged>> forty",
        "paid 73 dollars; room 19 upstairs",
        "when people were born and how old they are",
    ),
)

_EXPLAIN_TASK = """Each feature of a language model is active on certain tokens. From the tokens where a feature was most
active, the words around them, and texts where it is silent, say in a few words what the feature is active on. Be as specific
as the tokens allow.

"""


def _entry(words: str, passages: str, silent: str) -> str:
    silent = f"Silent in: {silent}\n" if silent else ""
    return f"Active tokens: {words}\nIn context: {passages}\n{silent}Feature:"


_EXPLAIN_HEAD = _EXPLAIN_TASK + "".join(f"{_entry(*each[:3])} {each.feature}\n\n" for each in _EXAMPLES)
_FORMS = tuple(tuple(each.feature.lower().split()[:2]) for each in _EXAMPLES)


def copies_an_example(explanation: str) -> bool:
    """Whether an explanation begins with the same two words as one of the explainer's examples."""
    return tuple(explanation.lower().split()[:2]) in _FORMS


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
    for example in (*task.examples, *task.further)[:_PEAKS]:
        if not example.activations:
            continue
        peak = max(range(len(example.activations)), key=lambda place: example.activations[place])
        tokens = [visible(token) for token in example.tokens]
        word = tokens[peak].strip()
        before, after = tokens[max(0, peak - _AROUND) : peak], tokens[peak + 1 : peak + 1 + _AROUND]
        words.append(word)
        passages.append(f"{''.join(before).strip()} <<{word}>>{''.join(after).rstrip()}".strip())
    silent = ["".join(visible(token) for token in example.tokens[-2 * _AROUND - 1 :]).strip() for example in task.silent]
    return _entry(", ".join(words), "; ".join(passages), "; ".join(silent))


def explain_prompt(task: ExplainTask, table: bool = False) -> str:
    """The completion prompt: the model goes on with the explanation and ends the line. ``table``: the published form."""
    if table:
        return f"{explain_table.SYSTEM}\n\n{explain_table.explain_text(task)}"
    return f"{_EXPLAIN_HEAD}{_peaks(task)}"


def explain_messages(task: ExplainTask, table: bool = False) -> list[dict[str, str]]:
    """The same for chat models."""
    if table:
        return [
            {"role": "system", "content": explain_table.SYSTEM},
            {"role": "user", "content": explain_table.explain_text(task)},
        ]
    return [
        {"role": "system", "content": "Answer with one short phrase and nothing else."},
        {"role": "user", "content": f"{_EXPLAIN_HEAD}{_peaks(task)}"},
    ]


def simulate_prompt(task: SimulateTask) -> SlotPrompt:
    """The completion prompt with a slot behind every token of the fragment."""
    text = f"{_SIMULATE_HEAD}Feature: {visible(task.explanation)}\nTokens:\n"
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
            "content": f"{_SIMULATE_HEAD}Feature: {visible(task.explanation)}\n"
            f"The text has {len(task.tokens)} tokens, one a line:\n{tokens}",
        },
    ]
