"""Patching one dictionary: orderings found on some prompts, curves measured on others.

1. Pairs are drawn once a process for each model, task and seed, in three arms (``tasks.base``). Orderings are found on the first.
   They are reported on the second, other sentences with the same small stock of names: a feature for a single name, which is
   what a sparse dictionary is for, can be found there and counts.
2. Beside it stand the arms 'parity', the prompts that the ordering was found on, and 'names', other sentences with other names.
   Pairs of a file are split so that the halves share no text, and have no arm 'names'. Pairs with a text in common, directly or
   through others, stay together.
3. Features whose codes differ on the reported prompts alone are unseen. The ordering says nothing about them, so they come behind
   all others in an order drawn by seed: without them the curve would not end with all features. They are patched alone, and
   left out alone, too: between what the one brings and the other loses lies what no ordering could have found.
4. The order by chance is drawn from all features of both sides alike, seen or not, ``NULL_DRAWS`` times at least.
5. A set is the first k features of the ordering, counted whether or not a feature differs on the reported prompts: what an
   ordering needlessly asks for costs patches. How many of them differ on a prompt is counted beside ('active').
6. Beside the curve: the sets accepted at each threshold, where the ordering has thresholds, and all features but the first
   ``top``.
7. The set-up is made once for each side and handed to each ordering afresh; each ordering's cost has it in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from evalkit.errors import CorpusError, ModelError, SuiteError, UnitFailed
from evalkit.evaluations.base import Bench
from evalkit.patching.curves import grid
from evalkit.patching.patching import Patching, Point
from evalkit.patching.rankings import Groups, Ranking, rank
from evalkit.tasks.base import (
    FOUND,
    NEW_NAMES,
    NEW_SENTENCES,
    Pairs,
    TaskReport,
    build_pairs,
    last_logits,
    logit_difference,
    report,
)
from evalkit.tasks.jsonl import read_pairs
from evalkit.util.caching import Recent
from evalkit.util.hashing import content_hash, file_hash

BY_CHANCE = ("acdc", "random")
"""Orderings that depend on their seed; the others are found once."""

NULL, NULL_DRAWS = "random", 5
"""The ordering by chance, and how often it is drawn at least."""

KEPT_PROMPTS = 4
"""Sets of prompts remembered in this process, with what the model makes of them."""

MEASURED = ("kl", "kl_reverse", "logit_difference", "recovered", "edit")
"""What is measured of every set and prompt."""

ACTIVE = "active"
"""Beside it: how many features of the set differ on the prompt, which is how many change its activation."""

PARITY, NAMES = "parity", "names"
"""Arms beside the reported one."""


class Prompts(NamedTuple):
    """The pairs of one task, split."""

    ranked: Pairs
    """Pairs the orderings are found on."""
    shown: Pairs
    """Pairs that are reported."""
    target_difference: Float[np.ndarray, " N"]
    """Logit difference of the target prompts among them, float64: where patching everything leads."""
    report: TaskReport
    """How the model does the task on the base prompts of all pairs."""
    names: Pairs | None = None
    """Pairs with other sentences and other names; None where the task has no such arm, or all pairs are ranked."""


class Plan(NamedTuple):
    """What to measure."""

    rankings: tuple[str, ...]
    """Orderings, the main one first."""
    seeds: int
    """Seeds of the orderings that depend on one."""
    top: int
    """Size of the set that is left out of all features."""
    keep_error: bool
    """Whether what the dictionary does not reconstruct stays in."""
    acdc_most: int = 0
    """Most candidates that ``acdc`` is run on; 0: any number."""
    settings: Mapping[str, Mapping[str, float]] = MappingProxyType({})
    """Settings of each ordering that has other ones than its own."""


class Curve(NamedTuple):
    """S sets of rising size and N reported prompts."""

    sizes: Int[np.ndarray, " S"]
    """Number of features in each set."""
    values: dict[str, Float[np.ndarray, "S N"]]
    """``MEASURED`` and ``ACTIVE`` of each set and prompt."""
    thresholds: list[float | None]
    """What accepted each set; None for the first features of the ordering."""


class Ordering(NamedTuple):
    """One ordering with its curves."""

    ranking: str
    seed: int
    features: list[int]
    """Every candidate of either side, most important first."""
    effects: list[float | None]
    """What the ordering makes of each (``Ranking.effect``); None where a feature does not differ on the ranking prompts."""
    curve: Curve
    """The first k features."""
    accepted: Curve | None
    """The sets of each threshold, where the ordering has them."""
    without_top: dict[str, Float[np.ndarray, " N"]]
    """All features but the first ``top``."""
    prompts: int
    """Prompts the ordering was found on."""
    candidates: int
    """Features that differ on them."""
    passes: float
    """Forward passes of one prompt from the hook point on, set-up included."""
    seconds: float
    """Wall time, set-up included."""


class Arm(NamedTuple):
    """Curves on prompts beside the reported ones."""

    orderings: list[Ordering]
    """The main one, and those by chance."""
    reference: Float[np.ndarray, " N"]
    """KL(base || target) of the model as it is."""


class Measured(NamedTuple):
    """All orderings of one dictionary on one set of prompts."""

    orderings: list[Ordering]
    candidates: int
    """Features that differ on the reported prompts."""
    target_difference: Float[np.ndarray, " N"]
    """As in ``Prompts``."""
    reference: Float[np.ndarray, " N"]
    """KL(base || target) of the model as it is: the same for every dictionary."""
    unseen: int
    """How many features differ on the reported prompts only."""
    unseen_kl: Float[np.ndarray, " N"]
    """KL with these alone patched."""
    seen_kl: Float[np.ndarray, " N"]
    """KL with all others patched."""
    left_out: tuple[str, ...] = ()
    """Orderings that the plan names and that were too dear."""
    beside: Mapping[str, Arm] = MappingProxyType({})
    """Further arms by name."""

    def of(self, ranking: str) -> list[Ordering]:
        """The orderings of one name, by seed."""
        return named(self.orderings, ranking)


def named(orderings: Sequence[Ordering], ranking: str) -> list[Ordering]:
    """Those of ``orderings`` that have one name, by seed."""
    return [ordering for ordering in orderings if ordering.ranking == ranking]


_prompts: Recent[Prompts] = Recent(KEPT_PROMPTS)


def prompts_of(bench: Bench, task: str, count: int, settings: dict[str, Any], *, split: bool) -> Prompts:
    """``count`` pairs of ``task`` by the bench's seed, in arms where ``split``.

    Raises:
        UnitFailed: the pairs cannot be made for this model or are longer than it reads, or too few differ to be split.
    """
    file = file_hash(Path(settings["path"])) if "path" in settings else ""
    key = content_hash([bench.model.identity, bench.model.bos, task, count, settings, file, bench.seed, split])

    def make() -> Prompts:
        try:
            pairs = build_pairs(task, bench.model.tokenise, count, bench.seed, bos=bench.model.bos, **settings)
        except (CorpusError, ModelError, SuiteError) as error:
            raise UnitFailed(error.what, where=error.where, fix=error.fix) from error
        _refuse_long(pairs, bench.model.context, settings.get("path", ""))
        ranked, shown, others = _arms(pairs, bench.seed) if split else (pairs, pairs, None)
        target = last_logits(bench.model, shown.target, shown.last).double()
        aim = logit_difference(target, shown.base_answer, shown.wrong).numpy()
        return Prompts(ranked, shown, aim, report(bench.model, pairs), others)

    return _prompts.get(key, make)


def _refuse_long(pairs: Pairs, most: int, path: str) -> None:
    """Stop where a prompt has more than the ``most`` tokens that the model reads."""
    long = (pairs.last >= most).nonzero()[:, 0].tolist()
    if not long:
        return
    numbers = {(spec.base, spec.target): number for number, spec in read_pairs(Path(path))} if path else {}
    names = [f"line {numbers[pairs.texts[row]]}" if path else f"pair {row + 1}" for row in long]
    lengths = [f"{name}: {int(pairs.last[row]) + 1}" for name, row in zip(names, long, strict=True)]
    raise UnitFailed(
        f"{len(long)} of {pairs.n} pairs have more tokens than the {most:,} that this model reads at once: "
        f"{', '.join(lengths[:5])}{', ...' if len(long) > 5 else ''}",
        where=f"{path}, {names[0]}" if path else f"[[evaluation]] 'ioi' task, {names[0]}",
        fix="shorten or leave out these pairs" if path else "choose another task or a model that reads more",
    )


def _arms(pairs: Pairs, seed: int) -> tuple[Pairs, Pairs, Pairs | None]:
    """Pairs that orderings are found on, pairs that are reported, and those with other names where there are any.

    Without sources there are two halves that share no text, drawn by seed; the first is the larger one where they differ.
    """
    if pairs.sources:
        rows = [
            [row for row, source in enumerate(pairs.sources) if source.arm == arm] for arm in (FOUND, NEW_SENTENCES, NEW_NAMES)
        ]
        if not all(rows):
            raise UnitFailed(
                f"{pairs.n} pairs are too few for three arms",
                where="[[evaluation]] 'ioi' pairs",
                fix="give 3 or more, or set paper_parity = true to rank and report on the same ones",
            )
        templates = [{pairs.sources[row].template for row in arm} for arm in rows]
        words = [{word for row in arm for word in pairs.sources[row].words} for arm in rows]
        assert not templates[0] & (templates[1] | templates[2]), "arms of a task share a sentence"
        assert not words[2] & (words[0] | words[1]), "arms of a task share a name"
        found, shown, others = (pairs.take(arm) for arm in rows)
        return found, shown, others
    sides: tuple[list[int], list[int]] = ([], [])
    groups = _sharing(pairs.texts)
    if len(groups) < 2:
        raise UnitFailed(
            f"{pairs.n} pairs that all share their texts cannot be split into halves",
            where="[[evaluation]] 'ioi' pairs",
            fix="give more pairs with other texts, or set paper_parity = true to rank and report on the same ones",
        )
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    # the largest first, each to the smaller side: halves as equal as the groups allow
    for group in sorted((groups[number] for number in order), key=len, reverse=True):
        min(sides, key=len).extend(group)
    first, second = sorted(sides, key=len, reverse=True)
    return pairs.take(sorted(first)), pairs.take(sorted(second)), None


def _sharing(texts: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Rows in groups: two pairs with a text in common stand in one group, and no text stands in two."""
    above: dict[str, str] = {}

    def top(text: str) -> str:
        while (higher := above.setdefault(text, text)) != text:
            above[text] = above[higher]  # half the way for the next time
            text = higher
        return text

    for base, target in texts:
        above[top(base)] = top(target)
    groups: dict[str, list[int]] = {}
    for row, (base, _) in enumerate(texts):
        groups.setdefault(top(base), []).append(row)
    return list(groups.values())


def measure(bench: Bench, points: Sequence[Point], prompts: Prompts, plan: Plan) -> Measured:
    """Every ordering of ``plan`` and its curves on the reported prompts.

    Args:
        points: where is patched, with the dictionary there.

    Raises:
        UnitFailed: an ordering cannot be found with its settings.
    """
    ranked = Patching(bench.model, points, prompts.ranked, keep_error=plan.keep_error)
    parity = prompts.shown is prompts.ranked
    shown = ranked.fresh() if parity else Patching(bench.model, points, prompts.shown, keep_error=plan.keep_error)
    beside = {} if parity else {PARITY: ranked.fresh()}
    if prompts.names is not None:
        beside[NAMES] = Patching(bench.model, points, prompts.names, keep_error=plan.keep_error)
    elsewhere: dict[str, list[Ordering]] = {arm: [] for arm in beside}
    C = len(ranked.candidates)
    left_out = tuple(name for name in plan.rankings if name == "acdc" and 0 < plan.acdc_most < C)
    for name in left_out:
        bench.progress.say(f"{name}: left out, {C:,} candidates are more than acdc_most = {plan.acdc_most:,}")
    wanted = [(name, seed) for name in plan.rankings if name not in left_out for seed in range(_draws(name, plan.seeds))]
    orderings = []
    with bench.progress.stage(f"patching features of {points[0].dictionary.kind}", len(wanted), "orderings") as stage:
        for name, number in wanted:
            seed = bench.seed + number
            # runs are remembered: on the same object the next ordering would seem to cost less than it does
            try:
                ranking = rank(name, ranked.fresh(), seed=seed, **plan.settings.get(name, {})) if C else None
            except SuiteError as error:
                raise UnitFailed(f"{name}: {error.what}", where="[[evaluation]] 'ioi' settings", fix=error.fix) from error
            orderings.append(_ordering(name, seed, ranking, ranked, shown, plan.top))
            if name in (plan.rankings[0], NULL):
                for arm, patching in beside.items():
                    elsewhere[arm].append(_ordering(name, seed, ranking, ranked, patching, plan.top))
            stage.advance(words=name)
    unseen = ~torch.isin(shown.ids, ranked.ids)
    alone, others = shown.measure(torch.stack([unseen, ~unseen])).kl.numpy()
    return Measured(
        orderings,
        len(shown.candidates),
        prompts.target_difference,
        shown.reference.kl[0].numpy(),
        int(unseen.sum()),
        alone,
        others,
        left_out,
        {arm: Arm(elsewhere[arm], patching.reference.kl[0].numpy()) for arm, patching in beside.items()},
    )


def _draws(name: str, seeds: int) -> int:
    """How many orderings of this name there are."""
    if name == NULL:
        return max(seeds, NULL_DRAWS)
    return seeds if name in BY_CHANCE else 1


def _ordering(name: str, seed: int, ranking: Ranking | None, ranked: Patching, shown: Patching, top: int) -> Ordering:
    """``ranking`` with its curves on the reported prompts."""
    known, here = ranked.ids.tolist(), shown.ids.tolist()
    features = [known[i] for i in ranking.order.tolist()] if ranking else []
    effects = dict(zip(known, ranking.effect.tolist(), strict=True)) if ranking else {}
    random = np.random.default_rng([seed, 5])
    features += random.permutation(sorted(set(here) - set(features))).tolist()
    if name == NULL:  # by chance means all of them: an unseen feature is as likely in front as any other
        features = random.permutation(sorted(features)).tolist()
        effects = {feature: float(len(features) - number) for number, feature in enumerate(features)}
    place = {feature: number for number, feature in enumerate(features)}
    places = torch.tensor([place[feature] for feature in here], dtype=torch.int64)  # (C,)
    sizes = np.array(sorted({*grid(len(features)), min(top, len(features))}), dtype=np.int64)
    sets = places[None] < torch.from_numpy(sizes)[:, None]
    values = _measured(shown, torch.cat([sets, (places >= top)[None]]))
    values[ACTIVE] = _active(shown, torch.cat([sets, (places >= top)[None]]))
    curve = Curve(sizes, {key: value[:-1] for key, value in values.items()}, [None] * len(sizes))
    accepted = None
    if ranking and ranking.groups:
        accepted = _accepted(ranking.groups, known, shown)
    return Ordering(
        name, seed, features, [effects.get(feature) for feature in features], curve, accepted,
        {key: value[-1] for key, value in values.items()}, ranked.n, len(known),
        float(ranking.passes) if ranking else 0.0, float(ranking.seconds) if ranking else 0.0,
    )  # fmt: skip


def _accepted(groups: Groups, known: list[int], shown: Patching) -> Curve:
    """The sets of the thresholds on the reported prompts."""
    place = {feature: number for number, feature in enumerate(known)}
    found = torch.tensor([place.get(feature, -1) for feature in shown.ids.tolist()], dtype=torch.int64)  # (C,)
    sets = groups.sets[:, found.clamp(min=0)] & (found >= 0)
    sizes = groups.sets.sum(1).numpy().astype(np.int64)
    return Curve(sizes, _measured(shown, sets), [float(threshold) for threshold in groups.thresholds])


def _measured(shown: Patching, sets: Bool[torch.Tensor, "S C"]) -> dict[str, Float[np.ndarray, "S N"]]:
    measures = shown.measure(sets)
    return {key: getattr(measures, key).numpy() for key in MEASURED}


def _active(shown: Patching, sets: Bool[torch.Tensor, "S C"]) -> Float[np.ndarray, "S N"]:
    """How many features of each set differ on each prompt."""
    return (sets.double() @ shown.affected.double().T).numpy()
