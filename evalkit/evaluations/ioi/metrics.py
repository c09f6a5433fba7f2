"""How each number of the evaluation 'ioi' is read: title, direction, null and definition.

1. What the claim rests on comes first: patches and edit needed, with the same for orderings by chance as their null.
2. Each ordering has its area, its cost and, where the published ordering was run too, its gap to that.
3. The model's own numbers (accuracy, logit difference) are the same for every dictionary and come last.
"""

from __future__ import annotations

from typing import NamedTuple

from evalkit.evaluations.base import Metric
from evalkit.evaluations.ioi.curves import DRAWS
from evalkit.evaluations.ioi.measure import NAMES, NULL, PARITY
from evalkit.evaluations.ioi.scores import PERCENTS
from evalkit.patching.rankings import RANKINGS

REFERENCE = "acdc"
"""The ordering as published, that others are held against."""


class _About(NamedTuple):
    title: str
    note: str


ARMS = {
    PARITY: _About("same prompts", "On the prompts that the order was found on, as published: it profits from its own noise."),
    NAMES: _About("unseen names", "On other sentences with other names: a feature for a single name cannot have been ranked."),
}
"""Arms beside the reported one."""

EDIT = (
    "Length of the change the patches of this set make: |x' - x|, mean over all positions of a prompt, then over prompts. The "
    "released code takes one mean over all positions of all prompts, the same where prompts are equally long, and reads it off "
    "the last set it tried."
)


BY_CHANCE = "The same for orderings by chance."


def _patches(names: list[str]) -> dict[str, Metric]:
    """Patches needed: of the reported prompts, over chance, by other measures, by other orderings, and in the other arms."""
    metrics: dict[str, Metric] = {}

    def add(key: str, title: str, note: str, main: bool = False) -> None:
        metrics[key] = Metric(title, "lower", null=f"{key}_random", transform="exp", digits=1, main=main, note=note)
        metrics[f"{key}_random"] = Metric(f"{title}, random", "neither", transform="exp", digits=1, note=BY_CHANCE)

    def over_chance(key: str, title: str, note: str) -> None:
        metrics[key] = Metric(title, "higher", chance=1.0, transform="exp", digits=1, note=note)

    for percent in PERCENTS:
        add(
            f"patches_{percent}", f"patches for {percent}%",
            "Features to patch, in the order of the first of rankings, until the mean KL is 50% of the unpatched one; other "
            "sentences than those the order was found on, the same names. Between measured set sizes by a straight line in the "
            f"logarithm. Interval: {DRAWS} bootstrap draws of the prompts." if percent == 50 else f"The same for {percent}%.",
            main=percent == 50,
        )  # fmt: skip
    for percent in PERCENTS:
        over_chance(
            f"chance_{percent}", f"chance / own, {percent}%",
            "Patches by chance over patches in the order: one scale for dictionaries of any number of features. 1 is no "
            "better than chance. Undefined where the order never gets there." if percent == 50 else f"The same for {percent}%.",
        )  # fmt: skip
    add("patches_difference", "patches for half the logit difference",
        "Features to patch until the mean logit difference of the answers has gone half of the way from base to target: the KL "
        "counts also what has nothing to do with the answers.")  # fmt: skip
    add(
        "patches_median",
        "patches for 50%, median",
        "Features to patch until half of the prompts have at most 50% of their own KL left: prompts of large KL do not decide.",
    )
    for name in names:
        if name != NULL:
            metrics[f"patches_50_{name}"] = Metric(
                f"patches for 50%, {name}", "neither", transform="exp", digits=1, note=f"In the order of '{name}'."
            )
    for arm, about in ARMS.items():
        add(f"patches_50_{arm}", f"patches for 50%, {about.title}", about.note)
        over_chance(f"chance_50_{arm}", f"chance / own, 50%, {about.title}", "The ratio there.")
    return metrics


def described() -> dict[str, Metric]:
    """Every metric that a unit can have, in the order of the table."""
    names = RANKINGS.names()
    metrics: dict[str, Metric] = {}
    metrics |= _patches(names)
    for percent in PERCENTS:
        metrics[f"edit_{percent}"] = Metric(
            f"edit for {percent}%", "lower", null=f"edit_{percent}_random", digits=2,
            note=EDIT if percent == 50 else f"The same for {percent}%.",
        )  # fmt: skip
        metrics[f"edit_{percent}_random"] = Metric(
            f"edit for {percent}%, random", "neither", digits=2, note="The same for orderings by chance."
        )
    for percent in PERCENTS:
        for ending, by in (("", "in the order of the first of rankings"), ("_random", "in orders by chance")):
            metrics[f"missed_{percent}{ending}"] = Metric(
                f"{percent}% missed{', random' if ending else ''}", "neither", interval=False, digits=2,
                note=f"Share of {DRAWS} bootstrap draws of the prompts in which the mean KL never falls to {percent}%, {by}.",
            )  # fmt: skip
            metrics[f"active_{percent}{ending}"] = Metric(
                f"active for {percent}%{', random' if ending else ''}", "neither", digits=1,
                null="" if ending else f"active_{percent}_random",
                note=f"Patches for {percent}% that differ on a prompt, mean over prompts, {by}: the others change nothing there.",
            )  # fmt: skip
    metrics["area"] = Metric(
        "area", "lower", chance=1.0, null="area_random",
        note="Mean share of the unpatched KL that is left, over log2 of the number of patches from 1 to area_to (512 unless "
        "set).",
    )  # fmt: skip
    for name in names:
        metrics[f"area_{name}"] = Metric(f"area, {name}", "neither", note=f"The same in the order of '{name}'.")
    for name in names:
        if name not in (REFERENCE, NULL):
            metrics[f"gap_{name}"] = Metric(
                f"{name} - {REFERENCE}", "lower",
                note=f"Area in the order of '{name}' minus that of '{REFERENCE}', prompt by prompt.",
            )  # fmt: skip
    metrics["kl_unpatched"] = Metric(
        "KL unpatched", "neither",
        note="KL(base || target) of the next token, nats: the model as it is, the same for every dictionary.",
    )  # fmt: skip
    metrics["kl_nothing"] = Metric(
        "KL, error removed", "neither", note="KL with the error term removed and nothing patched (keep_error = false)."
    )
    metrics["kl_floor"] = Metric(
        "KL, all patched", "lower",
        note="KL(patched || target) with every feature patched whose codes differ. Not the least there is: some features lead "
        "away from the target, and fewer can come closer.",
    )  # fmt: skip
    metrics["kl_lowest"] = Metric(
        "KL, lowest", "lower",
        note="The lowest mean KL of any number of first features that was measured, in the order of the first of rankings: each "
        "prompt's KL at that number.",
    )  # fmt: skip
    metrics["unseen"] = Metric(
        "unseen features", "neither", interval=False, digits=0,
        note="Features whose codes differ on the reported prompts only: no ordering could rank them. They come "
        "last, in an order drawn by seed.",
    )  # fmt: skip
    metrics["unseen_share"] = Metric(
        "share of unseen", "neither",
        note="Fall of the KL when these alone are patched, as a share of the fall when all are.",
    )  # fmt: skip
    metrics["unseen_lost"] = Metric(
        "lost without unseen", "neither",
        note="Share of the fall of the KL by all features that is lost when the unseen ones are left out. What orderings could "
        "not find lies between this and the share of unseen, whichever is larger.",
    )  # fmt: skip
    metrics["recovered"] = Metric(
        "logit difference recovered", "higher", chance=0.0, null="recovered_random",
        note="Way from the base's logit difference to the target's that patching the first features goes (top = 32 unless set): "
        "0 none, 1 all of it.",
    )  # fmt: skip
    metrics["recovered_random"] = Metric("recovered, random", "neither", note="The same for as many features by chance.")
    for key, note in (
        ("faithfulness", "Fall of the KL when the first features are patched (top = 32 unless set), as a share of the fall when "
         "all are, means over prompts: 0 is the empty set, 1 the full one. Undefined where the interval of that fall holds 0."),
        ("completeness", "Share of the fall of the KL by all features that is lost when the first ones alone are left out: 0 "
         "where the others can do without them, 1 where they can do nothing."),
    ):  # fmt: skip
        metrics[key] = Metric(key, "higher", null=f"{key}_random", note=note)
        metrics[f"{key}_random"] = Metric(f"{key}, random", "neither", note="The same for as many features by chance.")
    metrics["candidates"] = Metric(
        "candidates", "neither", interval=False, digits=0, note="Features whose codes differ between base and target."
    )
    for name in names:
        if name != NULL:
            metrics[f"passes_{name}"] = Metric(
                f"passes, {name}", "lower", interval=False, digits=0,
                note="Passes of one prompt from the hook point on that the ordering took, its set-up (two a pair) included.",
            )  # fmt: skip
            metrics[f"seconds_{name}"] = Metric(
                f"seconds, {name}", "lower", interval=False, digits=1,
                note="Wall time that the ordering took, its set-up included; of each seed: table patching_rankings.",
            )  # fmt: skip
    metrics["accuracy"] = Metric(
        "accuracy", "neither", chance=0.5,
        note="Base prompts whose right answer has a larger logit than the wrong one; all pairs.",
    )  # fmt: skip
    metrics["logit_difference"] = Metric(
        "logit difference", "neither", note="Right minus wrong answer on the base prompts, the model as it is."
    )
    metrics["answer_probability"] = Metric(
        "p(answer)", "neither", note="Probability of the right answer on the base prompts, the model as it is."
    )
    return metrics
