"""The contract every judge keeps, on one screen (Bills et al. 2023; Cunningham et al. 2023, section 3).

1. ``explain`` reads a few fragments with a feature's activations and says in words what the feature fires on.
2. ``simulate`` reads an explanation and the bare tokens of a fragment and predicts the activation (0-10) of every token.
3. ``rate`` reads a concept and a text with the tokens a feature fires on, and grades from 0 to 3 how well the concept fits them
   (``rubric``). A judge that has no such answer fails every task.
4. All take a list of tasks and return one answer for each, in order. A call that failed after its retries is an answer
   with status 'failed' and no value: never a zero, never dropped.

An OpenAI-compatible endpoint, the packaged local model, the lexical judge and the scripted fake are all judges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from evalkit.errors import JudgeSetupError
from evalkit.judges.config import JudgeConfig
from evalkit.util.registry import Registry


class Example(NamedTuple):
    """One fragment with a feature's activation on each of its tokens."""

    tokens: list[str]
    """Token strings, leading spaces kept."""
    activations: list[float]
    """Raw activation per token: any scale, signed where the dictionary is."""


class ExplainTask(NamedTuple):
    """What the explainer sees of one feature."""

    examples: list[Example]
    """Fragments from the explain split, strongest first."""
    silent: list[Example] = []
    """Fragments on which the feature is not active."""
    further: list[Example] = []
    """More strong fragments, for explainers that are shown the peak of each and not all its tokens."""


class Explanation(NamedTuple):
    """What the explainer said."""

    text: str | None
    """One short phrase; None where the call failed."""
    status: str = "ok"
    """'ok' or 'failed'."""
    error: str = ""
    """Why it failed."""
    cut: bool | None = None
    """Whether it was cut off by the limit on its length; None where the judge does not say how it ended."""


class SimulateTask(NamedTuple):
    """What the simulator sees: an explanation and a fragment's bare tokens."""

    explanation: str
    tokens: list[str]


class Simulation(NamedTuple):
    """Predicted activation of every token of one fragment."""

    expected: list[float | None] | None
    """Expected activation on the 0-10 scale, one for each token; None where the call failed. A token without a value is None:
    it is missing, not 0."""
    mass: list[float] | None = None
    """Probability that was seen on the digit tokens before renormalising, one for each token; None where it cannot be known."""
    status: str = "ok"
    """'ok' or 'failed'."""
    error: str = ""
    """Why it failed."""
    unseen: list[float] | None = None
    """Bound, one for each token: digits that the endpoint did not list have at most this probability. None as for ``mass``."""

    @property
    def values(self) -> np.ndarray:
        """(L,) float64 expected activations, NaN where a token is missing; all of a failed simulation is missing: (0,)."""
        return np.array([np.nan if value is None else value for value in self.expected or []], dtype=np.float64)


class RateTask(NamedTuple):
    """What the judge sees of one text on which a feature fires."""

    concept: str
    """What the feature is held to be about."""
    tokens: list[str]
    """Token strings of the text, leading spaces kept."""
    fires: list[bool]
    """Whether the feature fires on each of them."""


class Rating(NamedTuple):
    """How well the concept fits the tokens on which the feature fires."""

    grade: float | None
    """Expected grade, from 0 (nothing to do with the text) to 3 (plainly what fires); None where the call failed."""
    mass: float | None = None
    """Probability that fell on the four digits before renormalising; None where it cannot be known."""
    status: str = "ok"
    """'ok' or 'failed'."""
    error: str = ""
    """Why it failed."""


class Questions(NamedTuple):
    """Tasks of one kind that an evaluation may ask of a judge, at most."""

    purpose: str
    """'explain', 'simulate' or 'rate'."""
    tasks: int
    fragments: int = 1
    """Fragments that a task shows."""
    tokens: int = 0
    """Tokens of a fragment; 0: a whole window."""
    silent: int = 0
    """Fragments besides, on which the feature is silent."""
    further: int = 0
    """Fragments besides, of which explainers see the peak."""
    text_bytes: int = 0
    """Most bytes of a fragment; 0: as many as tokens in a row of the scoring text can have."""
    written: bool = False
    """The model writes the text: any token may stand in it."""
    words: int = 0
    """Bytes of the explanation or concept that is shown; 0: as long as the judge's own explanations can be."""


Done = Callable[[int], None]
"""Called with the number of tasks just finished."""


class Judge(ABC):
    """Base of all judges. ``close`` frees what it holds; a judge is also a context manager."""

    asks_no_model: ClassVar[bool] = False
    """Whether answers cost nothing, so that an evaluation may ask for every feature."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that can change an answer (provider, model, weights, prompt versions), JSON-able; nothing else."""

    @property
    def label(self) -> str:
        """Short name for tables ("Qwen2.5-Coder-1.5B")."""
        return str(self.identity.get("model", self.identity.get("provider", "judge")))

    @abstractmethod
    def explain(self, tasks: Sequence[ExplainTask], done: Done = lambda n: None) -> list[Explanation]:
        """One explanation for each task, in order.

        Raises:
            BudgetReached: the next call could exceed the budget. Finished calls are kept.
            JudgeSetupError: the judge cannot be reached at all or refuses the key.
        """

    @abstractmethod
    def simulate(self, tasks: Sequence[SimulateTask], done: Done = lambda n: None) -> list[Simulation]:
        """One simulation for each task, in order; raises as ``explain`` does."""

    def rate(self, tasks: Sequence[RateTask], done: Done = lambda n: None) -> list[Rating]:
        """One grade for each task, in order; raises as ``explain`` does. Judges that do not overwrite this have no grades."""
        done(len(tasks))
        return [Rating(None, None, "failed", "this judge gives no grades") for _ in tasks]

    @property
    def models(self) -> frozenset[str]:
        """Names that its calls have in the column ``judge`` of the table ``judge_calls``."""
        return frozenset({self.label})

    def own(self, owner: str) -> None:  # noqa: B027 (most keep no calls)
        """Make calls for ``owner`` from now on: one judge of one run, which alone gets them (``drain_calls``)."""

    def drain_calls(self) -> list[dict[str, Any]]:
        """Rows for the table ``judge_calls`` (all columns but run_id): calls made since the last time this was asked."""
        return []

    def charge(self, prompt_tokens: int, completion_tokens: int, unknown: Sequence[str] = ()) -> None:  # noqa: B027 (most have no budget)
        """Count what earlier starts of the same run spent against the budget.

        Args:
            prompt_tokens: of calls whose cost is known.
            completion_tokens: of the same.
            unknown: keys of calls whose cost nobody said; they count at the most they can have cost.
        """

    def close(self) -> None:  # noqa: B027 (most judges hold nothing)
        """Free models and connections."""

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


JUDGES: Registry[Any] = Registry("judge provider", "evalkit.judges", JudgeSetupError)
"""Provider name to a factory ``(JudgeConfig, folder: Path, progress) -> Judge``; ``folder`` keeps durable calls."""


def settings_class(provider: Any, where: str = "") -> type[JudgeConfig]:
    """The dataclass of a provider's settings: the attribute ``settings`` of its factory, ``JudgeConfig`` where it has none.

    Raises:
        JudgeSetupError: there is no such provider.
    """
    found: type[JudgeConfig] = getattr(JUDGES.get(provider, where), "settings", JudgeConfig)
    return found
