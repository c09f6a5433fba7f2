"""Explaining a feature: few-shot prompts (after Bills et al. 2023; wording and examples are our own), and reading the phrase.

1. The token at the peak of every fragment comes first, then a little context around it, then texts where the feature is
   silent. Small models handle this better than the published tables of tokens and activations (``explain_table``), which are
   there as well. The examples are of several kinds, as explanations repeat the form of what they are shown.
2. A fragment's newlines and tabs are shown as visible escapes.
3. What is the same for all tasks comes first: servers reuse the work on a shared beginning.
4. One cleaned line of the answer is kept, and whether it was cut off.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from evalkit.judges.answers.explanations import ended, text_of
from evalkit.judges.answers.text import one_line
from evalkit.judges.asking import Call
from evalkit.judges.base import ExplainTask
from evalkit.judges.config import JudgeConfig
from evalkit.judges.prompts import explain_table
from evalkit.judges.replies import limit_name
from evalkit.judges.tokens import visible

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


def explains_by_chat(config: JudgeConfig, mode: str = "") -> bool:
    """Whether explanations are asked for on the chat endpoint, where activations are simulated in ``mode``."""
    if config.explain_with != "auto":
        return config.explain_with == "chat"
    return (config.explainer_model or config.model) != config.model or mode == "constrained"


def shows_table(config: JudgeConfig, by_chat: bool) -> bool:
    """Whether the explainer is shown tables of tokens and activations."""
    return by_chat if config.explain_from == "auto" else config.explain_from == "table"


def explain_call(config: JudgeConfig, mode: str, task: ExplainTask) -> Call:
    """The call that explains ``task``, where activations are simulated in ``mode``."""
    by_chat = explains_by_chat(config, mode)
    table, most = shows_table(config, by_chat), config.explanation_tokens
    settings: dict[str, Any] = {"model": config.explainer_model or config.model}
    if config.temperature >= 0:
        settings["temperature"] = config.temperature
    if config.temperature > 0:
        settings["seed"] = config.seed
    if by_chat:
        settings[limit_name(config)] = most
        return Call("explain", "/chat/completions", settings, explain_messages(task, table), _phrase, most)
    settings.update(max_tokens=most, stop=["\n"])
    return Call("explain", "/completions", settings, explain_prompt(task, table), _phrase, most)


def _phrase(choice: dict[str, Any]) -> dict[str, Any]:
    """Parser of an explanation. ``cut``: whether its length ended it; None where the answer does not say."""
    how, text = ended(choice), text_of(choice)
    line = one_line(text)
    at_the_end = " ".join(text.split()).rstrip("\"'`*_ ").endswith(line[-20:])  # what follows a whole line may be cut
    return {"text": line, "cut": how == "length" and at_the_end if how else None}


def shortened(line: str, characters: int) -> str:
    """``line`` cut at a word boundary. Done after the answer is stored, so that another limit needs no other call."""
    return line if len(line) <= characters else line[: characters + 1].rsplit(" ", 1)[0][:characters]
