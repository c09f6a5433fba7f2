"""Settings of a training run: those shared by all architectures, and the architecture's own.

1. ``TrainConfig`` holds the shared settings; ``own`` holds those of the architecture (``Trainable.settings``).
2. ``train_config`` makes both from one flat table: ``train = { architecture = "topk", k = 32, lr = 2e-3 }``.
3. A recipe fills in what is left out with another trainer's choices (``recipes``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from evalkit.errors import SuiteError, UnitFailed
from evalkit.training.architectures.base import TRAINABLES
from evalkit.training.settings.recipes import RECIPES
from evalkit.util.registry import near_miss
from evalkit.util.settings import Above0, AtLeast0, Count, NotNegative, Range, Settings, parse


class TrainingFailed(UnitFailed):
    """Training diverged; nothing was written, and the last good checkpoint is kept."""


SHORTEST_SILENCE, LONGEST_SILENCE = 50_000, 10_000_000
"""Bounds of ``dead_after`` where it is left out, in activations."""

Decay = Annotated[float, Range(ge=0, lt=1)]


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Settings of ``train = {...}`` that all architectures share.

    Raises:
        SuiteError: an unknown architecture or an impossible number.
    """

    architecture: str = "topk"
    """Which autoencoder; its own settings stand in the same table."""
    features: Count | None = None
    """Number of features; expansion times the width when left out."""
    expansion: Above0 = 4.0
    """Features per dimension where ``features`` is left out. The paper finds residual ones alive up to 4."""
    normalise: bool = True
    """Scale inputs so that their mean squared norm is the width, and fold the scale into the finished dictionary. Makes lr and
    l1 mean the same at every layer. Published values of l1 are for raw activations: recipe = "paper" sets false."""
    error: Literal["fvu", "sum", "mean"] | None = None
    """Scale of the reconstruction error, a mean over tokens: 'sum' of squares over dimensions (SAELens, dictionary_learning),
    'mean' over dimensions (the paper's code), 'fvu' the sum over the data's variance (Gao et al., sparsify). The architecture's
    usual one when left out."""
    lr: Above0 | None = None
    """Peak learning rate of Adam; the architecture's usual one when left out."""
    beta1: Decay | None = None
    """Adam's first decay; the architecture's usual one when left out."""
    beta2: Decay | None = None
    """Adam's second decay; the architecture's usual one when left out."""
    clip: Above0 | None = None
    """Longest gradient, over all parameters; longer ones are shortened to it. No clipping when left out."""
    batch: Count = 512
    """Activations a step. The paper uses 256 to 2048; in short runs more steps are worth more than larger ones."""
    tokens: Count = 300_000
    """Activations presented in all, repeats counted; the last step is filled to a whole batch. The paper presents millions."""
    warmup: AtLeast0 = 0.05
    """Share of the steps in which the learning rate rises from 0; from 1 on, a number of steps."""
    idle_start: bool = False
    """Whether the warm-up begins at rate 0, so that the first step only fills Adam's moments (dictionary_learning, sparsify)."""
    decay: AtLeast0 = 0.2
    """Share of the steps, at the end, in which the learning rate falls to 0; from 1 on, a number of steps."""
    dead_after: NotNegative = 0
    """A feature is dead while it has not fired for this many presented activations. 0: a quarter of ``tokens``, at least 50,000
    and at most 10 million. One that fires at a rate of 1e-5 is silent for 100,000 on average. Gao et al. use 10 million, in
    runs of billions."""
    seed: int = 0
    """Seed of the weights and of the order of the data: same seed and data, same weights on one machine."""
    order: int | None = None
    """Seed of the order of the data and of the sample behind scale and centre; ``seed`` when left out. Runs with the same order
    can be trained in one pass over the data."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Type of the factors of matrix products; weights, moments and sums stay float32. 'bfloat16' pays where the processor has it
    (measured for topk). On a CPU topk and batchtopk only propose features by it, whose values are float32 ones; the others round
    their products."""
    recipe: str = ""
    """'saelens', 'dictionary_learning', 'sparsify' or 'paper': what is left out is set as that trainer does."""
    own: Any = None
    """The architecture's own settings; its defaults when left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        architecture = TRAINABLES.get(self.architecture, where="architecture")
        if self.own is None:
            object.__setattr__(self, "own", architecture.settings())
        if self.dead_after == 0:
            object.__setattr__(self, "dead_after", min(max(self.tokens // 4, SHORTEST_SILENCE), LONGEST_SILENCE))
        if sum(value for value in (self.warmup, self.decay) if value < 1) > 1:
            raise SuiteError(
                f"warmup = {self.warmup} and decay = {self.decay} do not fit into one run",
                where="warmup, decay",
                fix="choose shares of the steps that sum to 1 at most, or numbers of steps",
            )

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return -(-self.tokens // self.batch)

    @property
    def data_seed(self) -> int:
        """Seed of the order of the data."""
        return self.seed if self.order is None else self.order

    @property
    def peak_lr(self) -> float:
        """The learning rate between warm-up and decay."""
        return TRAINABLES.get(self.architecture).default_lr if self.lr is None else self.lr

    @property
    def betas(self) -> tuple[float, float]:
        """Adam's decays."""
        usual = TRAINABLES.get(self.architecture).default_betas
        return (usual[0] if self.beta1 is None else self.beta1, usual[1] if self.beta2 is None else self.beta2)

    def n_features(self, width: int) -> int:
        """Number of features at a given width.

        Raises:
            SuiteError: too few for the architecture's settings.
        """
        count = self.features if self.features is not None else round(self.expansion * width)
        if count < 1:
            raise SuiteError(f"{count} features cannot be trained", where="features", fix="raise features or expansion")
        TRAINABLES.get(self.architecture).check(self.own, count)
        return count


def train_config(table: Mapping[str, Any], where: str = "train") -> TrainConfig:
    """Shared and own settings from one flat table, the recipe's choices filled in.

    Raises:
        SuiteError: an unknown key (with the near miss), architecture or recipe, or an impossible value.
    """
    table = dict(table)
    name = table.get("architecture", "topk")
    architecture = TRAINABLES.get(name if isinstance(name, str) else str(name), f"{where} architecture")
    shared = {f.name for f in dataclasses.fields(TrainConfig)} - {"own"}
    own = {f.name for f in dataclasses.fields(architecture.settings)}
    for key in table:
        if key not in shared | own:
            raise SuiteError(f"'{name}' has no setting '{key}'", where=where, fix=near_miss(key, shared | own))
    if table.get("recipe"):
        recipe = RECIPES.get(str(table["recipe"]))
        if recipe is None:
            raise SuiteError(f"there is no recipe '{table['recipe']}'", where=where, fix=near_miss(str(table["recipe"]), RECIPES))
        table = {**recipe(table), **table}
    settings: Any = parse(architecture.settings, {k: v for k, v in table.items() if k in own}, where)
    return dataclasses.replace(parse(TrainConfig, {k: v for k, v in table.items() if k in shared}, where), own=settings)
