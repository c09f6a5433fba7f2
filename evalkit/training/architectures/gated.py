"""Training a gated autoencoder (Rajamanoharan et al. 2024, arXiv 2404.16014).

1. gate = (x - b_dec) @ W_enc + b_enc decides what is active: gate > 0. Magnitudes share the projection:
   ReLU(exp(r_mag) * (gate - b_enc) + b_mag). No gradient passes through the decision.
2. Loss: error of what the magnitudes write + l1 * sum of ReLU(gate) + error of what ReLU(gate) writes with a frozen copy of the
   decoder. The last two teach the gate; the first, free of any penalty, learns how strong a feature is, so that codes do not
   shrink.
3. The penalty rises linearly from 0 over the first steps. Adam's first decay is 0, as published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float

from evalkit.dictionaries.gated import Gated
from evalkit.training.architectures.base import TRAINABLES, Forward, Start
from evalkit.training.architectures.relu import L1Settings, PenaltyTrainable
from evalkit.training.sparse_ops.pairs import read
from evalkit.training.sparse_ops.types import Compute


@dataclass(frozen=True)
class GatedSettings(L1Settings):
    """Settings of architecture = "gated"."""

    decoder: Literal["free", "unit"] = "unit"
    """'unit': rows of unit length (Rajamanoharan et al.). 'free': any length, and the gate's penalty weighted by it (SAELens)."""


@TRAINABLES.register("gated")
class TrainableGated(PenaltyTrainable):
    """Gate and magnitude; ``b_enc`` is the gate's bias."""

    settings = GatedSettings
    default_lr = 1e-3
    default_error = "sum"
    default_betas = (0.0, 0.999)

    def __init__(self, own: Any, start: Start, error: str | None = None, compute: Compute = "float32") -> None:
        super().__init__(own, start, error, compute)
        self.r_mag = torch.nn.Parameter(torch.zeros(start.features))
        self.b_mag = torch.nn.Parameter(torch.zeros(start.features))

    def main(self, x: Float[torch.Tensor, "B D"]) -> Forward:
        """Loss and statistics of one scaled batch."""
        reading = read(x, self.weights, compute=self.compute)
        gate = reading.pre.relu()
        is_open = gate.detach() > 0
        magnitude = reading.at(self.r_mag.exp()) * (reading.pre - reading.at(self.b_enc)) + reading.at(self.b_mag)
        codes = magnitude.relu() * is_open
        residual = x - reading.write(codes, self.W_dec) - self.b_dec
        by_gate = x - reading.write(gate, self.W_dec.detach()) - self.b_dec.detach()
        norms = self.norms
        weighed = gate if norms is None else gate * reading.at(norms)
        penalty = self.own.l1 * self.risen(self.own.l1_warmup) * weighed.sum() / len(x)
        loss = self.reconstruction_loss(residual) + penalty + self.reconstruction_loss(by_gate)
        active = codes.detach() > 0
        return Forward(loss, residual.detach(), reading.fired(active), active.sum() / len(x))

    def frozen(self, scale: float) -> dict[str, torch.Tensor]:
        """Three biases change with the scale; ``r_mag`` is a ratio and does not."""
        tensors = super().frozen(scale)
        tensors["b_gate"] = tensors.pop("b_enc")
        return {**tensors, "r_mag": self.r_mag.detach().clone(), "b_mag": self.b_mag.detach() / scale}

    def freeze(self, scale: float, **where: Any) -> Gated:
        """The gated dictionary."""
        return Gated(self.frozen(scale), self.wiring, **where)
