"""Provider 'scripted': a fake judge for tests and for trying a suite out. Its answers come from functions or from lists.

1. A function is asked for every task; a list is used up in order.
2. An answer of ``None`` is a failed call; an exception is raised, as a budget or a judge that is gone would raise it.
3. A simulation may hold ``None`` for a token: it is missing.
4. Without a script it explains a feature by its strongest token, predicts 10 for tokens the explanation quotes and 0 for others,
   and grades a text 3 where a token that fires is quoted, else 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from evalkit.judges.base import JUDGES, Done, ExplainTask, Explanation, Judge, RateTask, Rating, SimulateTask, Simulation
from evalkit.judges.config import JudgeConfig
from evalkit.util.hashing import content_hash
from evalkit.util.progress import Progress

Words = str | Exception | None
Levels = Sequence[float | None] | Exception | None
Grade = float | Exception | None
T = TypeVar("T", ExplainTask, SimulateTask, RateTask)
A = TypeVar("A")


def strongest_token(task: ExplainTask) -> str:
    """The default explanation: the token at the highest activation, quoted."""
    pairs = [pair for example in task.examples for pair in zip(example.activations, example.tokens, strict=True)]
    return f"the token '{max(pairs)[1]}'" if pairs else "nothing"


def quoted_tokens(task: SimulateTask) -> list[float]:
    """The default simulation: 10 for a token the explanation quotes, else 0."""
    return [10.0 if f"'{token}'" in task.explanation else 0.0 for token in task.tokens]


def quoted_fires(task: RateTask) -> float:
    """The default grade: 3 where the concept quotes a token that fires, else 0."""
    pairs = zip(task.tokens, task.fires, strict=True)
    return 3.0 if any(on and f"'{token.strip()}'" in task.concept for token, on in pairs) else 0.0


class ScriptedJudge(Judge):
    """A judge with scripted answers.

    Args:
        explain: answers to explain tasks.
        simulate: answers to simulate tasks, activations on the 0-10 scale; None for a missing token.
        rate: answers to rate tasks, grades from 0 to 3.
        name: tells scripted judges apart in identities.
    """

    def __init__(
        self,
        explain: Callable[[ExplainTask], Words] | Iterable[Words] = strongest_token,
        simulate: Callable[[SimulateTask], Levels] | Iterable[Levels] = quoted_tokens,
        name: str = "scripted",
        rate: Callable[[RateTask], Grade] | Iterable[Grade] = quoted_fires,
    ) -> None:
        self._explain, self._simulate, self._rate = _answers(explain), _answers(simulate), _answers(rate)
        self.name = name
        self.explained: list[ExplainTask] = []
        self.simulated: list[SimulateTask] = []
        self.rated: list[RateTask] = []
        self._rows: list[dict[str, Any]] = []

    @property
    def identity(self) -> dict[str, Any]:
        """Provider and name."""
        return {"provider": "scripted", "model": self.name}

    def explain(self, tasks: Sequence[ExplainTask], done: Done = lambda n: None) -> list[Explanation]:
        """The scripted explanations; ``explained`` remembers the tasks."""
        answers = []
        for task in tasks:
            said = _say(self._explain(task))
            self.explained.append(task)
            self._record("explain", task, said is not None)
            answers.append(Explanation(None, "failed", "scripted failure") if said is None else Explanation(said))
            done(1)
        return answers

    def simulate(self, tasks: Sequence[SimulateTask], done: Done = lambda n: None) -> list[Simulation]:
        """The scripted simulations; ``simulated`` remembers the tasks."""
        answers = []
        for task in tasks:
            said = _say(self._simulate(task))
            self.simulated.append(task)
            self._record("simulate", task, said is not None)
            answers.append(Simulation(None, None, "failed", "scripted failure") if said is None else Simulation(list(said)))
            done(1)
        return answers

    def rate(self, tasks: Sequence[RateTask], done: Done = lambda n: None) -> list[Rating]:
        """The scripted grades; ``rated`` remembers the tasks."""
        answers = []
        for task in tasks:
            said = _say(self._rate(task))
            self.rated.append(task)
            self._record("rate", task, said is not None)
            answers.append(Rating(None, None, "failed", "scripted failure") if said is None else Rating(said))
            done(1)
        return answers

    def _record(self, purpose: str, task: ExplainTask | SimulateTask | RateTask, ok: bool) -> None:
        self._rows.append(
            {
                "call_key": content_hash([self.name, purpose, task]),
                "purpose": purpose,
                "judge": self.name,
                "prompt_tokens": 0,
                "completion_tokens": 0,
                "dollars": 0.0,
                "seconds": 0.0,
                "attempts": 1,
                "status": "ok" if ok else "failed",
                "error": "" if ok else "scripted failure",
                "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            }
        )

    def drain_calls(self) -> list[dict[str, Any]]:
        """Rows of the calls answered since the last drain."""
        rows, self._rows = self._rows, []
        return rows


def _answers(script: Callable[[T], A] | Iterable[A]) -> Callable[[T], A]:
    if callable(script):
        return script
    left: Iterator[A] = iter(script)

    def following(task: T) -> A:
        for answer in left:
            return answer
        raise AssertionError("the script has no answer left")

    return following


def _say(answer: A | Exception) -> A:
    if isinstance(answer, Exception):
        raise answer
    return answer


@JUDGES.register("scripted")
def scripted_judge(config: JudgeConfig, folder: Path, progress: Progress) -> ScriptedJudge:
    """The unscripted fake, under the name in ``config.model``."""
    return ScriptedJudge(name=config.model or "scripted")
