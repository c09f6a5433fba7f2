"""Controls whose scores are known beforehand: the perfect predictor and the constant predictor.

1. ``Identity`` gives its input back: variance unexplained 0, loss recovered 1.
2. ``Mean`` gives the mean of the fitting data whatever the input: variance unexplained 1 on that data, no active feature.
An evaluation that scores them otherwise is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from evalkit.dictionaries import shapes
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.fitting import chunks
from evalkit.dictionaries.registry import DICTIONARIES, Fitting, Vectors, baseline


@DICTIONARIES.register("identity")
class Identity(Dictionary):
    """codes = x, x_hat = codes; every dimension is a feature. ``basis`` is the (D, D) identity."""

    kind = "identity"
    signed = True

    def __init__(self, basis: torch.Tensor, **where: Any) -> None:
        super().__init__(**where)
        self.basis = basis
        shapes.check(self.kind, self.tensors(), {"basis": "D D"})

    @classmethod
    def build(cls, tensors: dict[str, torch.Tensor], settings: dict[str, Any], **where: Any) -> Identity:
        """The inverse of ``tensors``."""
        shapes.check(cls.kind, tensors, {"basis": "D D"})
        return cls(tensors["basis"], **where)

    def tensors(self) -> dict[str, torch.Tensor]:
        """basis (D, D): it fixes the width."""
        return {"basis": self.basis}

    def encode(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch D"]:
        """codes = x."""
        return self._input(x).clone()

    def decode(self, codes: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch D"]:
        """x_hat = codes."""
        return codes.clone()

    @property
    def directions(self) -> Float[torch.Tensor, "D D"]:
        """The identity."""
        return self.basis


@DICTIONARIES.register("mean")
class Mean(Dictionary):
    """x_hat = ``constant`` (D,) whatever the input; one feature that never fires and writes nothing."""

    kind = "mean"

    def __init__(self, constant: torch.Tensor, **where: Any) -> None:
        super().__init__(**where)
        self.constant = constant
        shapes.check(self.kind, self.tensors(), {"constant": "D"})

    @classmethod
    def build(cls, tensors: dict[str, torch.Tensor], settings: dict[str, Any], **where: Any) -> Mean:
        """The inverse of ``tensors``."""
        shapes.check(cls.kind, tensors, {"constant": "D"})
        return cls(tensors["constant"], **where)

    def tensors(self) -> dict[str, torch.Tensor]:
        """constant (D,)."""
        return {"constant": self.constant}

    def encode(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch 1"]:
        """All zero."""
        return self._input(x).new_zeros(*x.shape[:-1], 1)

    def decode(self, codes: Float[torch.Tensor, "*batch 1"]) -> Float[torch.Tensor, "*batch D"]:
        """The constant."""
        return self.constant.expand(*codes.shape[:-1], -1).clone()

    @property
    def directions(self) -> Float[torch.Tensor, "1 D"]:
        """One row of zeros."""
        return torch.zeros_like(self.constant)[None]


@dataclass(frozen=True)
class ControlSettings:
    """Controls have no settings."""


@baseline("identity", ControlSettings)
def fit_identity(x: Vectors, config: ControlSettings, fitting: Fitting) -> Identity:
    """The perfect predictor."""
    return Identity(torch.eye(x.shape[1]), details={"baseline": "identity"}, **fitting.where)


@baseline("mean", ControlSettings)
def fit_mean(x: Vectors, config: ControlSettings, fitting: Fitting) -> Mean:
    """The mean of the fitting data, accumulated in float64."""
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    for block in chunks(x):
        total += block.double().sum(0)
    return Mean((total / x.shape[0]).float(), details={"baseline": "mean", "vectors": int(x.shape[0])}, **fitting.where)
