"""Training a JumpReLU autoencoder (Rajamanoharan et al. 2024, arXiv 2407.14435).

1. codes = pre where pre > threshold, one threshold a feature, kept at 0 or more. It is a parameter as it stands, not by its
   logarithm: Adam's steps are about lr long, and a logarithm moves a small threshold by lr times itself only.
2. Neither codes nor their number have a useful slope in the threshold. A rectangle of width ``bandwidth`` around it stands in
   (straight-through): d codes = -threshold / bandwidth, d [pre > threshold] = -1 / bandwidth, for pre-activations inside.
   ``slope_to`` = 'all' gives the pre-activations the opposite slope too (Anthropic, January 2025 update).
3. Loss: error + ``sparsity`` * penalty: 'step', the number of active features (Gemma Scope); 'target', (that number /
   target_l0 - 1)^2 (dictionary_learning); 'tanh', sum of tanh(tanh_scale * code * length of its decoder row) (Anthropic).
4. Dead features are pulled up: + ``pre_act`` * sum over them of ReLU(threshold - pre) * length of the decoder row (Anthropic).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float

from evalkit.dictionaries.jumprelu import JumpReLU
from evalkit.errors import SuiteError
from evalkit.training.architectures.base import TRAINABLES, Forward, Start
from evalkit.training.architectures.relu import PenaltyTrainable
from evalkit.training.parallel import reductions as pooled
from evalkit.training.sparse_ops.pairs import read
from evalkit.training.sparse_ops.types import Compute
from evalkit.util.settings import Above0, AtLeast0, Settings


@dataclass(frozen=True)
class JumpReLUSettings(Settings):
    """Settings of architecture = "jumprelu"."""

    penalty: Literal["step", "target", "tanh"] = "step"
    """'step': number of active features (Gemma Scope). 'target': its squared relative distance from target_l0
    (dictionary_learning). 'tanh': a smooth count (Anthropic)."""
    sparsity: AtLeast0 = 6e-4
    """Weight of the penalty. 6e-4 is Gemma Scope's middle one, for errors over the data's mean square; around 1 suits
    'target'."""
    target_l0: Above0 | None = None
    """Active features a token that penalty = 'target' aims at."""
    sparsity_warmup: AtLeast0 = 0.1
    """Share of the steps in which the penalty rises from 0; from 1 on, a number of steps (Gemma Scope: 10,000)."""
    threshold: AtLeast0 = 0.05
    """Where every threshold starts, in units in which activations have a mean square of 1 a dimension. Gemma Scope's 0.001
    belongs to a mean squared norm of 1: times the root of the width, 0.05 at 2304."""
    bandwidth: Above0 = 0.05
    """Width of the rectangle, in the same units (Gemma Scope: 0.001 in its own). Wider ones let more activations teach the
    threshold: short runs need that (Anthropic: 2)."""
    slope_to: Literal["threshold", "all"] = "threshold"
    """What learns through the rectangle: 'threshold' (Rajamanoharan et al.), or 'all', the encoder too (Anthropic)."""
    tanh_scale: Above0 = 4.0
    """Steepness of penalty = 'tanh' (Anthropic: 4)."""
    pre_act: AtLeast0 = 3e-6
    """Weight of what pulls dead features up (Anthropic: 3e-6). 0 turns it off."""
    decoder: Literal["free", "unit"] = "unit"
    """'unit': rows of unit length (Gemma Scope). 'free': any length (Anthropic)."""

    def check_together(self) -> None:
        if (self.penalty == "target") != (self.target_l0 is not None):
            raise SuiteError(
                f"penalty = '{self.penalty}' and target_l0 = {self.target_l0} do not go together",
                where="target_l0",
                fix="set both penalty = 'target' and target_l0, or neither",
            )


class _Jump(torch.autograd.Function):
    """pre where it exceeds the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float, to_all: bool) -> Any:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.to_all = bandwidth, to_all
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (d,) = gradients
        pre, threshold = ctx.saved_tensors
        through = _inside(pre, threshold, ctx.bandwidth) * threshold * d / ctx.bandwidth
        direct = (pre > threshold) * d
        return direct + through if ctx.to_all else direct, -through, None, None


class _Count(torch.autograd.Function):
    """1 where pre exceeds the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float, to_all: bool) -> Any:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.to_all = bandwidth, to_all
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (d,) = gradients
        pre, threshold = ctx.saved_tensors
        through = _inside(pre, threshold, ctx.bandwidth) * d / ctx.bandwidth
        return through if ctx.to_all else None, -through, None, None


def _inside(pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
    return (pre - threshold).abs() < bandwidth / 2


@TRAINABLES.register("jumprelu")
class TrainableJumpReLU(PenaltyTrainable):
    """A threshold a feature, in float32 whatever the products are computed in."""

    settings = JumpReLUSettings
    default_lr = 1e-3
    default_error = "fvu"
    default_betas = (0.0, 0.999)

    def __init__(self, own: Any, start: Start, error: str | None = None, compute: Compute = "float32") -> None:
        super().__init__(own, start, error, compute)
        self.threshold = torch.nn.Parameter(torch.full((start.features,), self.own.threshold))

    def main(self, x: Float[torch.Tensor, "B D"]) -> Forward:
        """Loss and statistics of one scaled batch."""
        bandwidth = self.own.bandwidth
        reading = read(x, self.weights, self.threshold.detach() - bandwidth / 2, self.compute)
        threshold = reading.at(self.threshold)
        codes = _Jump.apply(reading.pre, threshold, bandwidth, self.own.slope_to == "all")
        residual = x - reading.write(codes, self.W_dec) - self.b_dec
        share = self.own.sparsity * self.risen(self.own.sparsity_warmup)
        loss = self.reconstruction_loss(residual) + share * self._penalty(reading, threshold, codes, len(x))
        active = reading.pre.detach() > threshold.detach()
        return Forward(loss, residual.detach(), reading.fired(active), active.sum() / len(x))

    def _penalty(self, reading: Any, threshold: torch.Tensor, codes: torch.Tensor, tokens: int) -> torch.Tensor:
        if self.own.penalty == "tanh":
            norms = self.W_dec.norm(dim=1)
            return torch.tanh(self.own.tanh_scale * codes * reading.at(norms)).sum() / tokens
        count = _Count.apply(reading.pre, threshold, self.own.bandwidth, self.own.slope_to == "all").sum() / tokens
        if self.own.target_l0 is None:
            return count
        return (pooled.with_own_gradient(self.processes, count) / self.own.target_l0 - 1).square()

    def extra(
        self, x: Float[torch.Tensor, "B D"], result: Forward, dead: Bool[torch.Tensor, " F"]
    ) -> Float[torch.Tensor, ""] | None:
        """How far below their thresholds dead features stay, a token."""
        which = dead.nonzero()[:, 0]
        if not self.own.pre_act or not len(which):
            return None
        few = self.weights.rows(which)
        pre = torch.addmm(few.b_enc, x - self.b_dec, few.W_enc.T)
        pull = ((self.threshold[which] - pre).relu() * few.W_dec.norm(dim=1)).sum() / len(x)
        return self.own.pre_act * pull

    @torch.no_grad()
    def constrain_weights(self) -> None:
        """Decoder rows, and thresholds of 0 or more: below, negative codes would pass."""
        super().constrain_weights()
        self.threshold.clamp_(min=0.0)

    def frozen(self, scale: float) -> dict[str, torch.Tensor]:
        """With the thresholds, in the units of the codes."""
        return {**super().frozen(scale), "threshold": self.threshold.detach() / scale}

    def freeze(self, scale: float, **where: Any) -> JumpReLU:
        """The JumpReLU dictionary."""
        return JumpReLU(self.frozen(scale), self.wiring, **where)
