"""From a suite to its units of work, each with the key that decides whether it is done already.

1. A unit is (evaluation, dictionary, hook point): plain data, in suite order, evaluations that need no judge first. Where an
   evaluation has nothing to measure, as at the earliest hook point for one that looks for causes before it, there is none.
2. Its key is a hash of everything that can change its rows: evaluation and version, settings, weights of the dictionary and
   of those the evaluation compares it with or reaches at other hook points, model, tokens and rule behind the activations,
   seed, and the judge's identity where it asks one. Time-outs, concurrency and addresses are not in it. Same key, same rows:
   that is resume, reuse and comparison in one.
3. ``estimate`` adds up what the units that are not done may cost at most, before anything is spent: judge calls, tokens and money
   (``judges.bounds``), and room on the disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from evalkit.errors import UsageError
from evalkit.evaluations.base import EVALUATIONS, Cost, Sizes
from evalkit.judges.bounds import Bill, Widths, bill, known_mode
from evalkit.runs.workbench import Workbench
from evalkit.suite import DictionarySpec, EvaluationSpec, Suite, measurable
from evalkit.util.hashing import content_hash, file_hash
from evalkit.util.registry import near_miss


class Unit(NamedTuple):
    """One piece of work: picklable, ordered, independent of the others."""

    evaluation: EvaluationSpec
    dictionary: DictionarySpec
    hook_point: str


class PlannedUnit(NamedTuple):
    """A unit and what is known of it before it runs."""

    unit: Unit
    done: bool
    cost: Cost
    bill: Bill
    """What it may ask of the judge and of those beside it, in calls, tokens and money."""
    seconds: float | None
    """Mean seconds of earlier units of the same evaluation; None where there were none."""


class Room(NamedTuple):
    """Bytes on the disk that a run needs besides its results, at most."""

    temporary: int
    """Unnamed files that go with the process, in the folder that TMPDIR names."""
    cache: int
    """Activations and shards that are not there yet, in the results folder; they stay."""


class Estimate(NamedTuple):
    """What the units that are not done may cost at most."""

    units: int
    bill: Bill
    room: Room
    seconds: float | None
    """None where no earlier unit tells."""


def units(suite: Suite, only: str | None = None) -> list[Unit]:
    """The suite's units; ``only`` keeps those of one evaluation or one dictionary.

    Raises:
        UsageError: ``only`` names neither.
    """
    ordered = sorted(suite.evaluations, key=lambda spec: EVALUATIONS.get(spec.name)().asks(spec.settings))
    every = [
        Unit(e, d, h)
        for e in ordered
        for h in suite.hook_points
        if measurable(e, h, suite.hook_points)
        for d in suite.dictionaries
    ]
    if only is None:
        return every
    kept = [unit for unit in every if only in (unit.evaluation.name, unit.dictionary.name)]
    if not kept:
        known = {unit.evaluation.name for unit in every} | {unit.dictionary.name for unit in every}
        raise UsageError(f"the suite has no evaluation or dictionary called '{only}'", where="--only", fix=near_miss(only, known))
    return kept


def reached(unit: Unit, suite: Suite) -> list[str]:
    """Further hook points that ``unit`` asks for."""
    evaluation = EVALUATIONS.get(unit.evaluation.name)()
    return evaluation.reaches(unit.evaluation.settings, unit.hook_point, suite.hook_points)


def unit_key(unit: Unit, bench: Workbench, salt: str = "") -> str:
    """The content key of ``unit``. Builds the dictionary and captures activations where they are not there yet.

    Args:
        salt: set by a fresh run, so that its rows stand beside the old ones.
    """
    evaluation = EVALUATIONS.get(unit.evaluation.name)
    inputs, dictionaries = bench.inputs, bench.dictionaries
    parts: dict[str, Any] = {
        "evaluation": [unit.evaluation.name, evaluation.version],
        "settings": dataclasses.asdict(unit.evaluation.settings),
        "dictionary": dictionaries.get(unit.dictionary, unit.hook_point).identity.hash,
        "hook_point": unit.hook_point,
        "model": inputs.model.identity,
        "fit": inputs.fit(unit.hook_point).identity,
        "score": inputs.score(unit.hook_point).identity,
        "seed": bench.suite.seed,
        "salt": salt,
    }
    used = evaluation().uses(unit.evaluation.settings)
    if used:
        parts["uses"] = [dictionaries.get(dictionaries.spec(name), unit.hook_point).identity.hash for name in used]
    further = reached(unit, bench.suite)
    if further:
        parts["reaches"] = [
            [
                dictionaries.get(unit.dictionary, name).identity.hash,
                name,
                inputs.fit(name).identity,
                inputs.score(name).identity,
            ]
            for name in further
        ]
    files = evaluation().reads(unit.evaluation.settings)
    if files:
        parts["files"] = [file_hash(file) for file in files]
    if evaluation().asks(unit.evaluation.settings):
        here = bench.at(unit.hook_point)
        parts["judge"] = here.judge.identity if here.judge else None
        parts["references"] = {name: judge.identity for name, judge in here.references.items()}
    return content_hash(parts)


def untried_key(key: str, finished: Mapping[str, Mapping[str, Any]]) -> str:
    """The key to look up or to measure under: ``key``, or that of the next try where earlier ones miss scores.

    A unit with failed judge calls is finished with a note of them in ``error``. Its next try has a key of its own, so that the
    rows of both stay, and a reader is given the later one.
    """
    tried, number = key, 1
    while tried in finished and finished[tried].get("error"):
        number += 1
        tried = content_hash([key, "try", number])
    return tried


def unbuilt_key(unit: Unit, run_id: str) -> str:
    """A key for the record that the dictionary of ``unit`` could not be built."""
    return content_hash([run_id, "unbuilt", unit.evaluation.name, unit.dictionary.name, unit.hook_point])


class Biller:
    """Makes a bill of what evaluations ask, once for each kind of question."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._widths: Widths | None = None
        suite, folder = bench.suite, bench.folder / "calls"
        self._modes = {config: known_mode(config, folder) for config in (suite.judge, *suite.references) if config is not None}

    @property
    def widths(self) -> Widths:
        """Of the scoring text."""
        if self._widths is None:
            model = self._bench.inputs.model
            self._widths = Widths(model.token_strings, self._bench.inputs.texts.score.tokens.numpy(), model.n_vocab)
        return self._widths

    def of(self, cost: Cost) -> Bill:
        """The bill of one unit."""
        suite, found = self._bench.suite, Bill()
        for config, asked in ((suite.judge, cost.asked), *((config, cost.beside) for config in suite.references)):
            if config is not None and any(one.tasks for one in asked):
                found = found.and_more(bill(config, self._modes[config], asked, self.widths))
        return found


def plan(bench: Workbench, finished: Mapping[str, Mapping[str, Any]], only: str | None = None) -> list[PlannedUnit]:
    """Every unit with whether it is done, without building anything that is not there."""
    seconds: dict[str, list[float]] = {}
    for row in finished.values():
        if row.get("seconds") is not None:
            seconds.setdefault(row["evaluation"], []).append(row["seconds"])
    planned, biller = [], Biller(bench)
    inputs, dictionaries = bench.inputs, bench.dictionaries
    for unit in units(bench.suite, only):
        evaluation = EVALUATIONS.get(unit.evaluation.name)()
        needed = [unit.dictionary, *(dictionaries.spec(name) for name in evaluation.uses(unit.evaluation.settings))]
        built = inputs.is_captured(unit.hook_point) and all(dictionaries.is_built(spec, unit.hook_point) for spec in needed)
        further = reached(unit, bench.suite)
        built = built and all(inputs.is_captured(name) and dictionaries.is_built(unit.dictionary, name) for name in further)
        done = built and untried_key(unit_key(unit, bench), finished) in finished
        known = seconds.get(unit.evaluation.name)
        cost = Cost() if done else evaluation.cost(unit.evaluation.settings)
        planned.append(PlannedUnit(unit, done, cost, biller.of(cost), sum(known) / len(known) if known else None))
    return planned


def estimate(planned: list[PlannedUnit], bench: Workbench) -> Estimate:
    """The sum over units that are not done."""
    left = [p for p in planned if not p.done]
    total = Bill()
    for p in left:
        total = total.and_more(p.bill)
    known = [p.seconds for p in left if p.seconds is not None]
    return Estimate(len(left), total, room(left, bench), sum(known) if len(known) == len(left) else None)


def room(left: list[PlannedUnit], bench: Workbench) -> Room:
    """Room that the units ``left`` need on the disk."""
    if not left:
        return Room(0, 0)
    suite, inputs = bench.suite, bench.inputs
    windows, context = inputs.texts.score.tokens.shape
    sizes = Sizes(windows, context, inputs.model.n_vocab, len({p.unit.hook_point for p in left}))
    # what one evaluation still holds is there while the next one works
    settings = {(p.unit.evaluation.name, repr(p.unit.evaluation.settings)): p.unit.evaluation for p in left}
    temporary = sum(EVALUATIONS.get(spec.name)().temporary(spec.settings, sizes) for spec in settings.values())
    read = [point for p in left for point in (p.unit.hook_point, *reached(p.unit, suite))]
    lacking = [point for point in dict.fromkeys(read) if not inputs.is_captured(point)]
    tokens = inputs.texts.fit.tokens.numel() + inputs.texts.score.tokens.numel()
    cache = sum(tokens * (4 * inputs.model.width(point) + 1) for point in lacking)
    # whether they are trained already is not looked up: that would capture activations
    streams = suite.training.stream and any(p.unit.dictionary.source == "train" for p in left)
    if suite.training.shards and streams:
        cache += sum(4 * inputs.streamed.tokens.numel() * inputs.model.width(point) for point in suite.hook_points)
    return Room(temporary, cache)
