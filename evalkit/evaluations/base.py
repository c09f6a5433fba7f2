"""The contract every evaluation keeps, on one screen.

An evaluation measures one dictionary at one hook point and returns rows:

1. A ``Score`` is a fact about one item: a feature, a window of text, or the dictionary as a whole. Every metric is the
   weighted mean of its items, sum(value * weight) / sum(weight); a ratio of sums (FVU, loss recovered) has its denominator
   as the weight. So one jackknife, over items or over clusters of items, gives every interval, and pairing by item gives
   every comparison.
2. A value that could not be had is ``None`` with status 'failed' (a call failed) or 'undefined' (no such number exists,
   as the correlation with a constant); it is counted and never enters a mean.
3. Raw material (explanations, predictions, curves) goes to tables of its own, so that numbers can be recomputed without new
   calls.
4. ``metrics`` describes each metric for the reader: title, direction, chance level or null metric.

Raise ``version`` whenever the same input would give other rows: it is part of every unit's key.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from evalkit.errors import SuiteError
from evalkit.judges.base import Questions
from evalkit.util.registry import Registry

if TYPE_CHECKING:
    from evalkit.activations.capture import Activations
    from evalkit.dictionaries.base import Dictionary
    from evalkit.judges.base import Explanation, Judge
    from evalkit.models.language_model import LanguageModel
    from evalkit.util.progress import Progress


class Score(NamedTuple):
    """One fact about one item."""

    metric: str
    """Key of the metric in ``Evaluation.metrics``."""
    value: float | None
    """The number; None unless status is 'ok' or 'censored'."""
    item: int = 0
    """Which feature or window it is about."""
    kind: str = "dictionary"
    """What ``item`` counts: 'feature', 'window', 'prompt', 'concept', 'node' (of a tree), 'draw' (``evalkit.util.bootstrap``) or
    'dictionary'."""
    weight: float = 1.0
    """Its weight in the metric's mean (the denominator, where the metric is a ratio of sums)."""
    cluster: int | None = None
    """Items of one cluster (windows of one document) are resampled together; None: each on its own."""
    status: str = "ok"
    """'ok', 'undefined', 'failed', or 'censored': the number lies above ``value``, where the measurement ended."""
    n: int = 1
    """Number of observations (tokens, slots) behind the value."""
    seed: int = 0
    """Seed of the draw it belongs to."""
    source: str = ""
    """Source of the text it was measured on, where scores of one source make a mean of their own."""

    @classmethod
    def of(cls, metric: str, value: float | None, *about: Any, **named: Any) -> Score:
        """A score that is 'undefined' where ``value`` is None or not finite; arguments as those of ``Score``."""
        defined = value is not None and math.isfinite(value)
        score = cls(metric, value if defined else None, *about, **named)
        return score if defined else score._replace(status="undefined")


class Metric(NamedTuple):
    """How a metric is read and shown."""

    title: str
    """Column heading."""
    better: str
    """'higher', 'lower' or 'neither'."""
    chance: float | None = None
    """The value a judge or dictionary that knows nothing would get, where it is known."""
    null: str = ""
    """Key of the metric that measures the null on the same items ("shuffled explanations"), where there is one."""
    transform: str = ""
    """'exp' where the number shown is exp of the mean (perplexity); 'counts' where values are shares of as many counted cases as
    their weights say, and the interval is the exact binomial one."""
    interval: bool = True
    """Whether an interval over items makes sense."""
    digits: int = 3
    """Digits after the point in tables."""
    main: bool = False
    """The metric that figures and headlines show."""
    note: str = ""
    """One line under the table: definition, thresholds, source."""
    flag_below: float | None = None
    """Means below this are named under the table with ``flag``."""
    flag: str = ""
    """What such a mean says."""
    lowest: float | None = None
    """The least value it can have: no interval goes below."""
    highest: float | None = None
    """The largest value it can have."""


CUT = Metric(
    "cut", "neither", interval=False, digits=2,
    note="Share of the explanations that the judge's limit on their length cut off (explanation_tokens); they are taken as they "
    "stand. Undefined where the judge does not say how its answers ended.",
)  # fmt: skip
"""The metric of ``cut_share``."""


def cut_share(words: Sequence[Explanation]) -> Score:
    """Share of explanations that were cut off, of those whose ending is known, as the score 'cut'."""
    known = [said.cut for said in words if said.text is not None and said.cut is not None]
    return Score.of("cut", sum(known) / len(known) if known else None, n=len(known))


class Result(NamedTuple):
    """What one unit produced."""

    scores: list[Score]
    tables: dict[str, list[dict[str, Any]]]
    """Rows of the store's other tables, by table ('explanations', 'patching_curves'; columns: store/schema); empty where there
    are none."""


class Cost(NamedTuple):
    """What one unit may ask of judges at most; ``judges.bounds`` makes calls, tokens and money of it."""

    asked: tuple[Questions, ...] = ()
    """Of the suite's judge."""
    beside: tuple[Questions, ...] = ()
    """Of each judge beside it (``Bench.references``)."""

    @property
    def calls(self) -> int:
        """Tasks of the suite's judge."""
        return sum(one.tasks for one in self.asked)


class Sizes(NamedTuple):
    """What the size of temporary files follows from."""

    windows: int
    """Of the scoring text."""
    context: int
    vocabulary: int
    hook_points: int


class Bench(Protocol):
    """What an evaluation is given besides the dictionary. Built by ``running``; a fake in tests."""

    hook_point: str
    name: str
    """Name in the suite of the dictionary that is measured."""
    hook_points: tuple[str, ...]
    """All hook points of the suite."""
    seed: int
    progress: Progress

    def at(self, hook_point: str) -> Bench:
        """The bench at another hook point: one that ``Evaluation.reaches`` named. ``at(h).dictionary(name)`` is the dictionary
        there that has the name of the one that is measured."""
        ...

    @property
    def model(self) -> LanguageModel:
        """The language model."""
        ...

    @property
    def judge(self) -> Judge | None:
        """The suite's judge."""
        ...

    @property
    def references(self) -> dict[str, Judge]:
        """Further judges printed beside the first, by name ('lexical', 'openai:MODEL')."""
        ...

    def dictionary(self, name: str) -> Dictionary:
        """Another dictionary of the suite at ``hook_point``: one that ``Evaluation.uses`` named."""
        ...

    def fit(self) -> Activations:
        """Activations of the fitting text at ``hook_point``: x (N, T, D) and keep (N, T)."""
        ...

    def score(self) -> Activations:
        """Activations of the scoring text, disjoint by document from the fitting text."""
        ...


class Evaluation(ABC):
    """Base of all evaluations. Stateless: everything it needs comes through ``run``."""

    name: ClassVar[str]
    version: ClassVar[int]
    config: ClassVar[type]
    """Frozen dataclass of its suite settings, every field documented under itself."""
    metrics: ClassVar[dict[str, Metric]]
    headline: ClassVar[tuple[str, ...]] = ()
    """Keys of the metrics in the table that a run ends with, where these are not all."""
    needs_judge: ClassVar[bool] = False
    needs_reach: ClassVar[bool] = False
    """There is nothing to measure at a hook point from where ``reaches`` names no other: it has no unit there."""

    @classmethod
    def described(cls, references: Sequence[str]) -> dict[str, Metric]:
        """``metrics``, and those that a run with these judges beside its own has besides (``Bench.references``)."""
        return cls.metrics

    @abstractmethod
    def run(self, bench: Bench, dictionary: Dictionary, config: Any) -> Result:
        """Measure ``dictionary``. Same inputs and seed, same rows."""

    def check(self, config: Any, context: int) -> None:  # noqa: B027 (most have nothing to refuse)
        """Refuse settings that cannot work with windows of ``context`` tokens, before anything runs.

        Raises:
            SuiteError: they cannot.
        """

    def placed(self, config: Any, folder: Path) -> Any:
        """``config`` with file names that start at ``folder``, where the suite file lies."""
        return config

    def reads(self, config: Any) -> list[Path]:
        """Files that ``run`` reads: their contents enter the unit's key. ``check`` has made sure that they exist."""
        return []

    def uses(self, config: Any) -> list[str]:
        """Names of further dictionaries of the suite that ``run`` asks the bench for.

        The suite checks that they exist, and their weights enter the unit's key.
        """
        return []

    def reaches(self, config: Any, hook_point: str, hook_points: Sequence[str]) -> list[str]:
        """Those of the suite's ``hook_points`` at which ``run`` at ``hook_point`` asks the bench for the dictionary of the same
        name, or for activations. Both enter the unit's key."""
        return []

    def asks(self, config: Any) -> bool:
        """Whether ``run`` asks the suite's judge under these settings."""
        return self.needs_judge

    def cost(self, config: Any) -> Cost:
        """The most one unit can ask of judges."""
        return Cost()

    def temporary(self, config: Any, sizes: Sizes) -> int:
        """Most bytes of temporary files that its units hold at once."""
        return 0


EVALUATIONS: Registry[type[Evaluation]] = Registry("evaluation", "evalkit.evaluations", SuiteError)
"""Evaluation classes by the name used in ``[[evaluation]]``."""
