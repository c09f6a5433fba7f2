"""How few features must be patched to make the model answer another prompt: activation patching on IOI and tasks like it.

1. Pairs of prompts are drawn (``tasks``): base and target differ in one thing, such as the name of the indirect object. The
   model's accuracy, logit difference and probability of the answer on the base prompts come first; a model that cannot do
   the task is refused with these numbers.
2. A third of the pairs finds an ordering of the features (``patching.rankings``). Everything reported is measured on another
   third, other sentences with the same small stock of names, so that an ordering cannot profit from its own noise. Beside it
   stand patches on the same prompts, and on the last third, whose names are other ones. Pairs of a file have halves instead.
   ``paper_parity`` uses all pairs for both, as published.
3. The first k features of the ordering are patched, x' = x + sum over them of (target code - base code) f at every position,
   for k from none to all, and KL(patched || target) of the next token is read: the curve.
4. Patches, patches active on a prompt, and edit needed for 50%, 25% and 10% of KL(base || target), which is the model's own.
   Patches by chance over these: one scale for dictionaries of any size. Patches until the median prompt, and until the logit
   difference, is half way. The area under the curve (``curves``); the KL with all features patched, and the lowest of the
   curve; the logit difference recovered by the first ``top`` features.
5. Faithfulness of these: the fall of the KL they cause, as a share of the fall all features cause. Completeness: the share of
   that fall which is lost when they alone are left out. References are the empty and the full set of features.
6. Null: orderings by chance, at least five, measured in the same way. Every number of every prompt lies in ``patching_curves``,
   every ordering in ``feature_ranks``, its cost in ``patching_rankings``.
7. Features that differ on the reported prompts only cannot have been ranked: they are counted, with the share of the fall of the
   KL that they bring when they alone are patched, and the share that is lost when they alone are left out.

Cunningham et al. 2023 (arXiv 2309.08600, section 4 and appendix F); IOI: Wang et al. 2022 (arXiv 2211.00593); ACDC: Conmy et al.
2023 (arXiv 2304.14997); faithfulness and completeness: Marks et al. 2024 (arXiv 2403.19647).
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

from evalkit.errors import SuiteError, UnitFailed
from evalkit.evaluations.base import EVALUATIONS, Bench, Evaluation, Metric, Result
from evalkit.evaluations.ioi import scores as ioi_scores
from evalkit.evaluations.ioi.measure import NULL, Plan, measure, prompts_of
from evalkit.evaluations.ioi.metrics import REFERENCE, described
from evalkit.patching.patching import Point
from evalkit.patching.rankings import RANKINGS
from evalkit.tasks.base import TASKS
from evalkit.util.registry import near_miss
from evalkit.util.settings import Count, NotNegative, Range, Settings, Share
from evalkit.util.user_files import placed

if TYPE_CHECKING:
    from evalkit.dictionaries.base import Dictionary
    from evalkit.evaluations.ioi.measure import Prompts


@dataclass(frozen=True)
class IOIConfig(Settings):
    """Settings of the evaluation 'ioi': activation patching, on indirect objects unless another task is named."""

    task: str = "ioi"
    """'ioi' (indirect object), 'greater_than' (years), 'agreement' (subject and verb) or 'jsonl' (pairs of your own)."""
    path: str = ""
    """File of pairs where task = "jsonl", beside the suite file unless its path is absolute."""
    counterfactual: str = ""
    """What differs between base and target where task = "ioi": 'io' (the indirect object's name, as published, and when left
    out), 's' (the subject's) or 'abc' (three unrelated names)."""
    orders: tuple[str, ...] = ()
    """Orders of the names where task = "ioi": 'abba', 'baba'; both when left out."""
    distractor: str = ""
    """Number of the noun in between where task = "agreement": 'any' (when left out), or the 'same' as or 'other' than the
    subject's."""
    pairs: Count = 60
    """Pairs of prompts: a third finds the ordering, a third with other sentences is reported, a third has other names too (paper:
    the same 50 for all). Of a file: half and half, which share no text."""
    paper_parity: bool = False
    """Find the ordering and report on the same prompts alone, as published. It flatters every dictionary, large ones most."""
    together: tuple[str, ...] = ()
    """Further hook points of the suite that are patched at the same time as the one in question, each with the dictionary of the
    same name there. At the later ones codes are set to the target's, so that what is already brought is not added twice.
    Features of these are numbered on behind the unit's own, in the order they are named in."""
    rankings: tuple[str, ...] = ("acdc-fast", "attribution", "largest-edit", "random")
    """Orderings of the features: 'acdc' (as published: dear), 'acdc-fast', 'attribution', 'integrated-gradients', 'single',
    'greedy', 'largest-edit'. The first is the one of the headline; patches and area of the others stand beside it, with the gap
    of each to 'acdc' where that is named. 'random' is always measured, as the null."""
    settings: tuple[str, ...] = ()
    """Settings of the orderings that are to differ from their own, each as "ordering.setting=value": "acdc-fast.points=4",
    "acdc.count=20"."""
    seeds: Count = 3
    """Seeds of the orderings that draw by chance: acdc, and random, of which there are five at least."""
    acdc_most: NotNegative = 0
    """Most candidates that 'acdc' is run on, because it takes several passes of every prompt for each; where a dictionary has
    more, its 'acdc' is left out and shown as undefined. 0: any number."""
    top: Count = 32
    """Features whose recovered logit difference, faithfulness and completeness are reported."""
    area_to: Annotated[int, Range(ge=2)] = 512
    """Number of patches up to which the area under the curve counts (the paper's figure ends there)."""
    keep_error: bool = True
    """Keep what the dictionary does not reconstruct of the base. false patches into the reconstruction itself; the shares of the
    KL are shares of the model's own KL(base || target) all the same."""
    least_accuracy: Share = 0.7
    """Share of the base prompts whose right answer must have a larger logit than the wrong one; below it the model is refused."""

    def check_together(self) -> None:
        if self.pairs < 2 and not self.paper_parity:
            raise ValueError(f"pairs = {self.pairs} measures nothing: choose 2 or more")
        if not self.rankings or len(set(self.rankings)) != len(self.rankings):
            raise ValueError("rankings names at least one ordering, and none twice")
        if self.rankings[0] == NULL:
            raise ValueError("rankings[0] is reported in the table and cannot be 'random', its null: name another one")
        if self.acdc_most and self.rankings[0] == REFERENCE:
            raise ValueError("acdc_most can leave out 'acdc', which then cannot be the first of rankings: name another one first")
        if len(set(self.together)) != len(self.together):
            raise ValueError("together names a hook point twice")
        if (self.task == "jsonl") != bool(self.path):
            raise ValueError('path belongs to task = "jsonl", which needs one')

    @property
    def task_settings(self) -> dict[str, Any]:
        """What the task receives besides the number of pairs and the seed."""
        keys = ("counterfactual", "orders", "distractor", "path")
        given = {key: getattr(self, key) for key in keys}
        return {key: value for key, value in given.items() if value}


@EVALUATIONS.register("ioi")
class IOI(Evaluation):
    """Patches and edit needed to turn base into target, area under the curve, KL reached, faithfulness, completeness."""

    name: ClassVar[str] = "ioi"
    version: ClassVar[int] = 5
    config: ClassVar[type] = IOIConfig
    metrics: ClassVar[dict[str, Metric]] = described()

    def placed(self, config: IOIConfig, folder: Path) -> IOIConfig:
        """A relative ``path`` starts at the suite file."""
        return dataclasses.replace(config, path=str(placed(config.path, folder))) if config.path else config

    def reads(self, config: IOIConfig) -> list[Path]:
        """The user's pairs."""
        return [Path(config.path)] if config.path else []

    def reaches(self, config: IOIConfig, hook_point: str, hook_points: Sequence[str]) -> list[str]:
        """Those of ``together``.

        Raises:
            SuiteError: one of them is not a hook point of the suite.
        """
        for name in config.together:
            if name not in hook_points:
                raise SuiteError(
                    f"together names '{name}', which is not one of the suite's hook points",
                    where="[[evaluation]] 'ioi' together",
                    fix=near_miss(name, hook_points),
                )
        return [name for name in config.together if name != hook_point]

    def check(self, config: IOIConfig, context: int) -> None:
        """Refuse tasks, orderings and settings that do not exist, and a file that is not there.

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
        _settings(config)
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
        points = [Point(bench.hook_point, dictionary)]
        for name in config.together:
            if name != bench.hook_point:
                points.append(Point(name, bench.at(name).dictionary(bench.name)))
        for point in points:
            point.dictionary.check_width(bench.model.width(point.hook_point), point.hook_point)
        prompts = prompts_of(bench, config.task, config.pairs, config.task_settings, split=not config.paper_parity)
        _refuse(bench, prompts, config)
        rankings = tuple(dict.fromkeys([*config.rankings, NULL]))
        plan = Plan(rankings, config.seeds, config.top, config.keep_error, config.acdc_most, _settings(config))
        found = measure(bench, points, prompts, plan)
        scores = ioi_scores.scores(found, prompts.report, config.rankings[0], config.top, config.area_to, config.keep_error)
        return Result(list(scores), ioi_scores.tables(found))


def _settings(config: IOIConfig) -> dict[str, dict[str, float]]:
    """``config.settings`` by ordering, as numbers of the type that the ordering's parameter has.

    Raises:
        SuiteError: an entry has another form, names what is not there or names it twice, or its value is no such number.
    """
    where, found = "[[evaluation]] 'ioi' settings", dict[str, dict[str, float]]()
    for entry in config.settings:
        left, equals, value = (part.strip() for part in entry.partition("="))
        name, dot, setting = (part.strip() for part in left.partition("."))
        if not (equals and dot):
            raise SuiteError(f"'{entry}' sets nothing", where=where, fix='write "ordering.setting=value": "acdc-fast.points=4"')
        if name not in config.rankings:
            raise SuiteError(f"'{name}' is not one of rankings", where=where, fix=near_miss(name, config.rankings))
        hints = get_type_hints(RANKINGS.get(name, where))
        types = {key: hint for key, hint in hints.items() if hint in (int, float) and key != "seed"}
        if setting not in types:
            fix = near_miss(setting, types) if types else "leave it out"
            raise SuiteError(f"the ranking '{name}' has no setting '{setting}'", where=where, fix=fix)
        if setting in found.setdefault(name, {}):
            raise SuiteError(f"{name}.{setting} is set twice", where=where, fix="leave one out")
        try:
            number = types[setting](value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            kind = "whole number" if types[setting] is int else "number"
            raise SuiteError(f"'{value}' is no {kind}", where=where, fix=f"write a {kind} behind {name}.{setting}=")
        found[name][setting] = number
    return found


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
