"""Neurons as a dictionary: the default basis of the hook point (baseline of Cunningham et al. 2023, section 3).

1. codes = ReLU(x), one feature a dimension, as published; signed x where ``rectified = false``.
2. The published form has no decoder. Rectified codes are written back as x_hat = gain * codes + constant, with the scalar
   gain and the constant that fit the fitting data best (least squares); unrectified codes give x back exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from evalkit.dictionaries import shapes
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.fitting import chunks, read_out
from evalkit.dictionaries.registry import DICTIONARIES, Fitting, Vectors, baseline

LAYOUT = {"gain": "", "constant": "D"}


@DICTIONARIES.register("neurons")
class Neurons(Dictionary):
    """The identity basis.

    Args:
        gain: scalar tensor; what one unit of a neuron's code writes on its own dimension.
        constant: (D,) written when every code is zero.
        rectified: whether codes pass a ReLU.
        where: ``hook_point``, ``model`` and ``details``.
    """

    kind = "neurons"

    def __init__(self, gain: torch.Tensor, constant: torch.Tensor, rectified: bool, **where: Any) -> None:
        super().__init__(**where)
        self.gain, self.constant, self.rectified = gain, constant, bool(rectified)
        shapes.check(self.kind, self.tensors(), LAYOUT)

    @property
    def signed(self) -> bool:  # type: ignore[override]  # the contract's class variable depends on a setting here
        """Whether codes can be negative: yes unless they are rectified."""
        return not self.rectified

    @classmethod
    def build(cls, tensors: dict[str, torch.Tensor], settings: dict[str, Any], **where: Any) -> Neurons:
        """The inverse of ``tensors`` and ``settings``."""
        shapes.check(cls.kind, tensors, LAYOUT)
        return cls(tensors["gain"], tensors["constant"], settings["rectified"], **where)

    def tensors(self) -> dict[str, torch.Tensor]:
        """gain () and constant (D,)."""
        return {"gain": self.gain, "constant": self.constant}

    def settings(self) -> dict[str, Any]:
        """Whether codes are rectified."""
        return {"rectified": self.rectified}

    def encode(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch D"]:
        """codes = ReLU(x), or x itself."""
        x = self._input(x)
        return x.relu() if self.rectified else x.clone()

    def decode(self, codes: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch D"]:
        """x_hat = gain * codes + constant."""
        return codes * self.gain + self.constant

    @property
    def directions(self) -> Float[torch.Tensor, "D D"]:
        """gain times the identity."""
        return torch.eye(self.n_features, dtype=self.constant.dtype) * self.gain

    @property
    def d_in(self) -> int:
        """Width D."""
        return self.constant.shape[0]

    @property
    def n_features(self) -> int:
        """As many as dimensions."""
        return self.constant.shape[0]


@dataclass(frozen=True)
class NeuronsSettings:
    """Settings of ``baseline = "neurons"``."""

    rectified: bool = True
    """Pass the neurons through a ReLU before reading them, as published. false keeps their sign."""


@baseline("neurons", NeuronsSettings)
def fit_neurons(x: Vectors, config: NeuronsSettings, fitting: Fitting) -> Neurons:
    """The neuron basis with, where rectified, its least-squares gain and constant."""
    d = x.shape[1]
    gain, constant = 1.0, torch.zeros(d)
    if config.rectified:
        with fitting.progress.stage("fitting neurons", x.shape[0], "vectors") as stage:
            gain, constant = read_out(x, torch.relu)
            stage.advance(x.shape[0])
    else:
        for _ in chunks(x):
            continue
    details = {"baseline": "neurons", "vectors": int(x.shape[0]), "gain": gain}
    return Neurons(torch.tensor(gain, dtype=torch.float32), constant, config.rectified, details=details, **fitting.where)
