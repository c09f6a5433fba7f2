"""The contract every trainable architecture keeps; a new one is one new module that registers a ``Trainable``.

1. It is built from the config and a ``Start``: sizes, a robust centre, the data's variance and a seeded generator.
2. ``forward`` gives the loss with what the loop reports and what dead-feature counting needs.
3. ``constrain_gradients`` and ``constrain_weights`` run before and after each optimiser step.
4. ``freeze`` gives the finished dictionary, with the input scale folded in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float

from evalkit.dictionaries.base import Dictionary
from evalkit.errors import SuiteError
from evalkit.registry import Registry

if TYPE_CHECKING:
    from evalkit.training.config import TrainConfig


class Start(NamedTuple):
    """What a module is built from; everything is in scaled units."""

    features: int
    """F."""
    centre: Float[torch.Tensor, " D"]
    """Geometric median of a sample of the data."""
    variance: float
    """Mean squared distance of the sample from its mean: the denominator of FVU."""
    generator: torch.Generator
    """Where initial weights are drawn from."""


class Forward(NamedTuple):
    """One batch through the autoencoder."""

    loss: Float[torch.Tensor, ""]
    """What is minimised."""
    residual: Float[torch.Tensor, "B D"]
    """x - x_hat, detached."""
    fired: Bool[torch.Tensor, " F"]
    """Which features were active anywhere in the batch."""
    l0: float
    """Mean number of active features a token."""


class Trainable(ABC, torch.nn.Module):
    """Base of the trainable modules.

    Args:
        config: the run's settings.
        start: sizes and data statistics.

    Attributes:
        default_lr: peak learning rate where the config leaves it out.
    """

    default_lr: ClassVar[float]

    def __init__(self, config: TrainConfig, start: Start) -> None:
        super().__init__()
        self.config, self.start = config, start

    @abstractmethod
    def forward(self, x: Float[torch.Tensor, "B D"], dead: Bool[torch.Tensor, " F"]) -> Forward:
        """Loss and statistics of one scaled batch; ``dead`` marks the features that have not fired for long."""

    def constrain_gradients(self) -> None:
        """Runs between backward and the optimiser's step."""

    def constrain_weights(self) -> None:
        """Runs after the optimiser's step."""

    @abstractmethod
    def freeze(self, scale: float, **where: Any) -> Dictionary:
        """The dictionary that does to x what this module does to scale * x, and writes in the units of x."""


TRAINABLES: Registry[type[Trainable]] = Registry("trainable architecture", "evalkit.training", SuiteError)
"""Trainable modules by the name used in ``train = { architecture = "..." }``."""
