"""Provider 'lexical': the reference that uses no language model.

It is shown every activation of the explained fragments, an explainer often one token of each. A judge with lower scores loses
what these fragments hold, so that its scores measure the judge.

1. The explanation is a word list: the tokens that fired in the shown fragments, each with its mean activation over all its
   occurrences there, on a 0-10 scale, strongest first ("tokens: the 9.1, of 4.0"). Case and surrounding spaces are ignored.
2. The simulation looks every token up; a token that is not in the list gets 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from evalkit.judges.base import JUDGES, Done, ExplainTask, Explanation, Judge, SimulateTask, Simulation
from evalkit.judges.config import JudgeConfig
from evalkit.judges.tokens import visible
from evalkit.util.progress import Progress

LONGEST = 24
"""Most words of one list."""
_HEAD = "tokens: "
_ENTRY = re.compile(r"(\S+) (\d+\.\d)(?:, |$)")


@lru_cache(maxsize=1 << 16)  # it is asked about every eligible feature, in the same few thousand tokens
def word(token: str) -> str:
    """A token as the list holds it: lower case, no surrounding spaces, visible, without a space inside."""
    return visible((token.strip() or token).lower()).replace(" ", "\\s").replace("\u00a0", "\\s")


class LexicalJudge(Judge):
    """Explains by listing words and simulates by looking them up. Deterministic; makes no calls."""

    asks_no_model: ClassVar[bool] = True

    @property
    def identity(self) -> dict[str, Any]:
        """Provider, version of the rule, length of the list."""
        return {"provider": "lexical", "model": "word list", "version": 1, "longest": LONGEST}

    def explain(self, tasks: Sequence[ExplainTask], done: Done = lambda n: None) -> list[Explanation]:
        """Word lists, one for each task; negative activations count as 0."""
        answers = [Explanation(_list(task)) for task in tasks]
        done(len(answers))
        return answers

    def simulate(self, tasks: Sequence[SimulateTask], done: Done = lambda n: None) -> list[Simulation]:
        """Look-ups, one simulation for each task; failed where the explanation is no word list."""
        answers = [_look_up(task) for task in tasks]
        done(len(answers))
        return answers


def _list(task: ExplainTask) -> str:
    top = max((value for example in task.examples for value in example.activations), default=0.0)
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for example in task.examples:
        for token, value in zip(example.tokens, example.activations, strict=True):
            name = word(token)
            sums[name] = sums.get(name, 0.0) + max(0.0, value)
            counts[name] = counts.get(name, 0) + 1
    means = {name: round(10 * sums[name] / (counts[name] * top), 1) for name in sums} if top > 0 else {}
    strongest = sorted((name for name in means if means[name] > 0), key=lambda name: (-means[name], name))[:LONGEST]
    return _HEAD + (", ".join(f"{name} {means[name]:.1f}" for name in strongest) or "none")


def _look_up(task: SimulateTask) -> Simulation:
    if not task.explanation.startswith(_HEAD):
        return Simulation(None, None, "failed", "the explanation is no word list: the lexical judge reads only its own")
    levels = {match[1]: float(match[2]) for match in _ENTRY.finditer(task.explanation, len(_HEAD))}
    return Simulation([levels.get(word(token), 0.0) for token in task.tokens])


@JUDGES.register("lexical")
def lexical_judge(config: JudgeConfig, folder: Path, progress: Progress) -> LexicalJudge:
    """The lexical judge; nothing of the config concerns it."""
    return LexicalJudge()
