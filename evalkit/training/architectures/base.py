"""The contract every trainable architecture keeps; a new one is one new module that registers a ``Trainable``.

1. It is built from its own settings and a ``Start``: sizes, a robust centre, the data's variance and a seeded generator.
2. ``main`` gives the loss with what the loop reports and what dead-feature counting needs; ``extra`` what dead features add to
   it. ``forward`` is both.
3. ``constrain_gradients`` and ``constrain_weights`` run before and after each optimiser step.
4. ``freeze`` gives the finished dictionary, with the input scale folded in.
5. Everything that a step changes is a parameter or a buffer, so that a checkpoint of the module's state is all of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float

from evalkit.dictionaries.base import Dictionary
from evalkit.errors import SuiteError
from evalkit.training.architectures import losses
from evalkit.training.parallel.group import ALONE, Group
from evalkit.training.sparse_ops.types import Compute
from evalkit.util.registry import Registry


class Start(NamedTuple):
    """What a module is built from; everything is in scaled units."""

    features: int
    """F."""
    centre: Float[torch.Tensor, " D"]
    """Geometric median of a sample of the data."""
    variance: float
    """Mean squared distance of the sample from its mean: the denominator of FVU."""
    steps: int
    """Steps of the whole run, for what changes on the way."""
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
    l0: Float[torch.Tensor, ""]
    """Mean number of active features a token, detached."""


class Trainable(ABC, torch.nn.Module):
    """Base of the trainable modules.

    Args:
        own: an instance of ``settings``.
        start: sizes and data statistics.
        error: scale of the reconstruction error ('sum', 'mean' or 'fvu'); ``default_error`` when left out.
        compute: type of the factors of matrix products.

    Attributes:
        settings: frozen dataclass of the architecture's own settings, each documented under itself.
        default_lr: peak learning rate where the run's settings leave it out.
        default_error: scale of the reconstruction error where the run's settings leave it out.
        default_betas: of Adam, where the run's settings leave them out.
    """

    settings: ClassVar[type]
    default_lr: ClassVar[float]
    default_error: ClassVar[str] = "fvu"
    default_betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    processes: Group = ALONE
    """Processes that hold the other parts of each batch: what is not a mean over tokens is asked of all (``reductions``)."""

    def __init__(self, own: Any, start: Start, error: str | None = None, compute: Compute = "float32") -> None:
        super().__init__()
        self.own, self.start, self.compute = own, start, compute
        self.error = error or self.default_error
        self.step_number: torch.Tensor
        self.register_buffer("step_number", torch.zeros((), dtype=torch.int64))

    @classmethod
    def check(cls, own: Any, features: int) -> None:
        """Refuse settings that cannot work with this number of features.

        Raises:
            SuiteError: they cannot.
        """

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 at the first step: for schedules of penalties and of k."""
        return int(self.step_number) / max(1, self.start.steps)

    def reconstruction_loss(self, residual: Float[torch.Tensor, "B D"]) -> Float[torch.Tensor, ""]:
        """The error in the scale ``error``."""
        return losses.reconstruction(residual, self.error, self.start.variance)

    @abstractmethod
    def main(self, x: Float[torch.Tensor, "B D"]) -> Forward:
        """Loss and statistics of one scaled batch, without what dead features add to the loss."""

    def extra(
        self, x: Float[torch.Tensor, "B D"], result: Forward, dead: Bool[torch.Tensor, " F"]
    ) -> Float[torch.Tensor, ""] | None:
        """What dead features add to the loss of ``main``; None where they add nothing."""
        return None

    def forward(self, x: Float[torch.Tensor, "B D"], dead: Bool[torch.Tensor, " F"]) -> Forward:
        """Loss and statistics of one scaled batch; ``dead`` marks the features that have not fired for long."""
        result = self.main(x)
        extra = self.extra(x, result, dead)
        return result if extra is None else result._replace(loss=result.loss + extra)

    def constrain_gradients(self) -> None:
        """Runs between backward and the optimiser's step."""

    def constrain_weights(self) -> None:
        """Runs after the optimiser's step."""

    def buffers_to_average(self) -> list[torch.Tensor]:
        """Buffers that follow the data (a running threshold): processes that train together average them."""
        return []

    @abstractmethod
    def freeze(self, scale: float, **where: Any) -> Dictionary:
        """The dictionary that does to x what this module does to scale * x, and writes in the units of x."""


TRAINABLES: Registry[type[Trainable]] = Registry("trainable architecture", "evalkit.training.architectures", SuiteError)
"""Trainable modules by the name used in ``train = { architecture = "..." }``."""
