"""How few features must be patched to make the model answer another prompt: activation patching on IOI and tasks like it.

1. Pairs of prompts are drawn (``tasks``): base and target differ in one thing, such as the name of the indirect object. The
   model's accuracy, logit difference and probability of the answer on the base prompts come first; a model that cannot do
   the task is refused with these numbers.
2. Half of the pairs find an ordering of the features (``patching.rankings``); everything reported is measured on the other
   half, so that an ordering cannot profit from its own noise. ``paper_parity`` uses all pairs for both, as published.
3. The first k features of the ordering are patched, x' = x + sum over them of (target code - base code) f at every position,
   for k from none to all, and KL(patched || target) of the next token is read: the curve.
4. Patches and edit needed for 50%, 25% and 10% of the unpatched KL, and the area under the curve (``ioi_curves``); the KL
   floor of all features; the logit difference recovered by the first ``top`` of them.
5. Faithfulness of these: the fall of the KL they cause, as a share of the fall all features cause. Completeness: the share of
   that fall which is lost when they alone are left out. References are the empty and the full set of features.
6. Null: orderings by chance, several seeds, measured in the same way. Every number of every prompt lies in
   ``patching_curves``, every ordering in ``feature_ranks``, its cost in ``patching_rankings``.

Cunningham et al. 2023 (arXiv 2309.08600, section 4 and appendix F); IOI: Wang et al. 2022 (arXiv 2211.00593); ACDC: Conmy et al.
2023 (arXiv 2304.14997); faithfulness and completeness: Marks et al. 2024 (arXiv 2403.19647).
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from evalkit.errors import DictionaryError, SuiteError, UnitFailed
from evalkit.evaluations import ioi_scores
from evalkit.evaluations.base import EVALUATIONS, Bench, Evaluation, Metric, Result
from evalkit.evaluations.ioi_measure import Plan, measure, prompts_of
from evalkit.patching.rankings import RANKINGS
from evalkit.tasks.base import TASKS

if TYPE_CHECKING:
    from evalkit.dictionaries.base import Dictionary
    from evalkit.evaluations.ioi_measure import Prompts

NULL = "random"
"""The ordering by chance."""
REFERENCE = "acdc"
"""The ordering as published, that others are held against."""


@dataclass(frozen=True)
class IOIConfig:
    """Settings of the evaluation 'ioi': activation patching, on indirect objects unless another task is named."""

    task: str = "ioi"
    """'ioi' (indirect object), 'greater_than' (years), 'agreement' (subject and verb) or 'jsonl' (pairs of your own)."""
    path: str = ""
    """File of pairs where task = "jsonl", beside the suite file unless its path is absolute."""
    counterfactual: str = ""
    """What differs between base and target, where the task has several; its usual one when left out."""
    pairs: int = 50
    """Pairs of prompts: half of them find the ordering, the others are reported (paper: the same 50 for both)."""
    paper_parity: bool = False
    """Find the ordering and report on the same prompts, as published. It flatters every dictionary, large ones most."""
    rankings: tuple[str, ...] = ("acdc-fast", "attribution", "random")
    """Orderings of the features. The first is the one the table speaks of; the area of the others stands beside it. 'random' is
    always measured, as the null."""
    seeds: int = 3
    """Seeds of the orderings that draw by chance (acdc, random)."""
    top: int = 32
    """Features whose recovered logit difference, faithfulness and completeness are reported."""
    area_to: int = 512
    """Number of patches up to which the area under the curve counts (the paper's figure ends there)."""
    keep_error: bool = True
    """Keep what the dictionary does not reconstruct of the base. false patches into the reconstruction itself."""
    least_accuracy: float = 0.7
    """Share of the base prompts whose right answer must have a larger logit than the wrong one; below it the model is refused."""

    def __post_init__(self) -> None:
        for key, least in (("pairs", 1 if self.paper_parity else 2), ("seeds", 1), ("top", 1), ("area_to", 2)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} = {getattr(self, key)} measures nothing: choose {least} or more")
        if not self.rankings or len(set(self.rankings)) != len(self.rankings):
            raise ValueError("rankings names at least one ordering, and none twice")
        if self.rankings[0] == NULL:
            raise ValueError("the first of rankings is the one the table speaks of, and 'random' is its null: name another one")
        if not 0 <= self.least_accuracy <= 1:
            raise ValueError(f"least_accuracy = {self.least_accuracy:g} is not a share")
        if (self.task == "jsonl") != bool(self.path):
            raise ValueError('path belongs to task = "jsonl", which needs one')

    @property
    def task_settings(self) -> dict[str, Any]:
        """What the task is told besides the number of pairs and the seed."""
        given = {"counterfactual": self.counterfactual, "path": self.path}
        return {key: value for key, value in given.items() if value}


def _metrics() -> dict[str, Metric]:
    names = RANKINGS.names()
    metrics: dict[str, Metric] = {}
    for percent in ioi_scores.PERCENTS:
        metrics[f"patches_{percent}"] = Metric(
            f"patches for {percent}%", "lower", null=f"patches_{percent}_random", transform="exp", digits=1, main=percent == 50,
            note="Features to patch, in the order of the first of rankings, until the mean KL is 50% of the unpatched one; "
            "undefined where all of them do not reach it. Between measured set sizes by a straight line in the logarithm; each "
            "prompt's item is its jackknife influence value." if percent == 50 else f"The same for {percent}%.",
        )  # fmt: skip
        metrics[f"patches_{percent}_random"] = Metric(
            f"patches for {percent}%, random", "neither", transform="exp", digits=1, note="The same for orderings by chance."
        )
    for percent in ioi_scores.PERCENTS:
        metrics[f"edit_{percent}"] = Metric(
            f"edit for {percent}%", "lower", null=f"edit_{percent}_random", digits=2,
            note="Length of the change these patches make, |x' - x|, mean over prompts and positions." if percent == 50
            else f"The same for {percent}%.",
        )  # fmt: skip
        metrics[f"edit_{percent}_random"] = Metric(
            f"edit for {percent}%, random", "neither", digits=2, note="The same for orderings by chance."
        )
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
        "KL unpatched", "neither", note="KL(base || target) of the next token, nats: nothing is patched."
    )
    metrics["kl_floor"] = Metric(
        "KL floor", "lower",
        note="KL(patched || target) with every feature patched whose codes differ: what the dictionary misses.",
    )  # fmt: skip
    metrics["recovered"] = Metric(
        "logit difference recovered", "higher", chance=0.0, null="recovered_random",
        note="Way from the base's logit difference to the target's that patching the first features goes (top = 32 unless set): "
        "0 none, 1 all of it.",
    )  # fmt: skip
    metrics["recovered_random"] = Metric("recovered, random", "neither", note="The same for as many features by chance.")
    for key, note in (
        ("faithfulness", "Fall of the KL when the first features are patched (top = 32 unless set), as a share of the fall when "
         "all are: 0 is the empty set, 1 the full one."),
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
                note="Passes of one prompt from the hook point on that the ordering took; seconds: table patching_rankings.",
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


@EVALUATIONS.register("ioi")
class IOI(Evaluation):
    """Patches and edit needed to turn base into target, area under the curve, KL floor, faithfulness, completeness."""

    name: ClassVar[str] = "ioi"
    version: ClassVar[int] = 1
    config: ClassVar[type] = IOIConfig
    metrics: ClassVar[dict[str, Metric]] = _metrics()

    def placed(self, config: IOIConfig, folder: Path) -> IOIConfig:
        """A relative ``path`` starts at the suite file."""
        return dataclasses.replace(config, path=str(folder / config.path)) if config.path else config

    def reads(self, config: IOIConfig) -> list[Path]:
        """The user's pairs."""
        return [Path(config.path)] if config.path else []

    def check(self, config: IOIConfig, context: int) -> None:
        """Refuse tasks and orderings that do not exist, and a file that is not there.

        Raises:
            SuiteError: one of these.
        """
        where = "[[evaluation]] 'ioi'"
        settings = inspect.signature(TASKS.get(config.task, f"{where} task")).parameters
        for key in config.task_settings:
            if key not in settings:
                raise SuiteError(f"the task '{config.task}' has no '{key}'", where=where, fix=f"leave {key} out")
        for name in config.rankings:
            RANKINGS.get(name, f"{where} rankings")
        for file in self.reads(config):
            if not file.is_file():
                what = "there is no such file of pairs"
                raise SuiteError(what, where=str(file), fix="correct path; it starts at the suite file")

    def run(self, bench: Bench, dictionary: Dictionary, config: IOIConfig) -> Result:
        """Patch ``dictionary``'s features into the model at the bench's hook point.

        Raises:
            DictionaryError: its width is not that of the hook point.
            UnitFailed: the model cannot do the task, or there are too few different prompts to split.
        """
        width = bench.model.width(bench.hook_point)
        if dictionary.d_in != width:
            raise DictionaryError(
                f"the dictionary reads activations of width {dictionary.d_in}; {bench.hook_point} has {width}",
                where=dictionary.hook_point,
                fix="use it at the hook point it was fitted on",
            )
        prompts = prompts_of(bench, config.task, config.pairs, config.task_settings, split=not config.paper_parity)
        _refuse(bench, prompts, config)
        plan = Plan(tuple(dict.fromkeys([*config.rankings, NULL])), config.seeds, config.top, config.keep_error)
        found = measure(bench, dictionary, prompts, plan)
        scores = ioi_scores.scores(found, prompts.report, config.rankings[0], config.top, config.area_to)
        return Result(list(scores), ioi_scores.tables(found))


def _refuse(bench: Bench, prompts: Prompts, config: IOIConfig) -> None:
    """Stop where the model cannot do the task: what patching changes would mean nothing."""
    report = prompts.report
    accuracy, n = float(report.accuracy.mean), report.accuracy.n
    numbers = (
        f"accuracy {accuracy:.2f}, logit difference {report.logit_difference.mean:.2f}, probability of the answer "
        f"{report.answer_probability.mean:.3f}, {n} base prompts"
    )
    bench.progress.say(f"{config.task}: {numbers}")
    if accuracy < config.least_accuracy:
        others = ", ".join(name for name in TASKS.names() if name != config.task)
        raise UnitFailed(
            f"{bench.model.label} cannot do the task '{config.task}': {numbers}; least_accuracy = {config.least_accuracy:g}",
            where=f"[[evaluation]] 'ioi' task = \"{config.task}\"",
            fix=f"choose another task ({others}) or a larger model; lower least_accuracy only if this is not chance",
        )
