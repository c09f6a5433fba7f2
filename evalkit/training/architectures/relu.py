"""Training a ReLU autoencoder with an L1 penalty (Bricken et al. 2023; with decoder norms, Templeton et al. 2024).

1. b_dec starts at the geometric median of the data, decoder rows in random directions, the encoder as the decoder's transpose.
2. decoder = 'free': the loss is error + l1 * sum of codes times the lengths of their decoder rows, so that no length has to be
   held and shrinking codes against growing rows gains nothing (Anthropic, April 2024 update; Templeton et al. 2024).
   'unit': rows stay of unit length, and the penalty is l1 * sum of codes (Bricken et al. 2023).
3. The penalty rises linearly from 0 over the first steps.
4. penalty = 'anneal': the sum of codes^p, p falling from 1 to ``p_end`` (Karvonen et al. 2024, arXiv 2408.00113).

The untied form of the paper's loss (Cunningham et al. 2023) is decoder = "unit" with error = "mean".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float

from evalkit.dictionaries.autoencoder import Wiring
from evalkit.dictionaries.relu import ReLU
from evalkit.training.architectures.base import TRAINABLES, Forward, Start
from evalkit.training.architectures.penalties import Annealed, risen
from evalkit.training.architectures.topk import SparseTrainable
from evalkit.training.sparse_ops.pairs import read
from evalkit.training.sparse_ops.types import Compute, Weights
from evalkit.util.settings import AtLeast0, Range, Settings

ROW = 0.1
"""Length that free decoder rows start with (Anthropic's April 2024 update allows 0.05 to 1; SAELens has 0.1)."""


@dataclass(frozen=True)
class L1Settings(Settings):
    """What the architectures with an L1 penalty share."""

    l1: AtLeast0 = 5.0
    """Weight of the sparsity penalty, a mean over tokens, beside the error in the scale of ``error``. 5 is Anthropic's, for
    errors summed over dimensions and normalised inputs; higher gives fewer active features."""
    l1_warmup: AtLeast0 = 0.05
    """Share of the steps in which the penalty rises from 0 (Anthropic: 5 %); from 1 on, a number of steps."""
    decoder: Literal["free", "unit"] = "free"
    """'free': decoder rows of any length, penalty weighted by it (Templeton et al.). 'unit': rows of unit length."""


@dataclass(frozen=True)
class ReLUSettings(L1Settings):
    """Settings of architecture = "relu"."""

    penalty: Literal["l1", "anneal"] = "l1"
    """'l1': sum of codes. 'anneal': sum of codes^p, p falling from 1 to p_end."""
    p_end: Annotated[float, Range(gt=0, le=1)] = 0.2
    """Last exponent of penalty = 'anneal' (Karvonen et al.)."""
    anneal_from: Annotated[float, Range(ge=0, lt=1)] = 0.2
    """Share of the steps before p begins to fall; it arrives in the last tenth of the rest."""


class PenaltyTrainable(SparseTrainable):
    """An untied autoencoder whose sparsity comes from a penalty, not from a choice of k."""

    def __init__(self, own: Any, start: Start, error: str | None = None, compute: Compute = "float32") -> None:
        super().__init__(own, start, error, compute)
        if self.own.decoder == "free":
            with torch.no_grad():
                self.W_enc.mul_(ROW)
                self.W_dec.mul_(ROW)

    @classmethod
    def check(cls, own: Any, features: int) -> None:
        """Any number of features works."""

    @property
    def weights(self) -> Weights:
        """The parameters; what is active does not depend on the rows' lengths."""
        return Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec)

    @property
    def norms(self) -> Float[torch.Tensor, " F"] | None:
        """Lengths of the decoder rows, with their gradient, where the penalty is weighted by them."""
        return self.W_dec.norm(dim=1) if self.own.decoder == "free" else None

    def risen(self, warmup: float) -> float:
        """The penalty's share at this step."""
        return risen(int(self.step_number), self.start.steps, warmup)

    @property
    def wiring(self) -> Wiring:
        """The norms take part in training only."""
        return Wiring()


@TRAINABLES.register("relu")
class TrainableReLU(PenaltyTrainable):
    """ReLU codes under an L1 or annealed Lp penalty."""

    settings = ReLUSettings
    default_lr = 1e-3
    default_error = "sum"

    def __init__(self, own: Any, start: Start, error: str | None = None, compute: Compute = "float32") -> None:
        super().__init__(own, start, error, compute)
        self.annealed = Annealed(self.own.p_end, self.own.anneal_from) if self.own.penalty == "anneal" else None

    def main(self, x: Float[torch.Tensor, "B D"]) -> Forward:
        """Loss and statistics of one scaled batch."""
        reading = read(x, self.weights, compute=self.compute)
        codes = reading.pre.relu()
        residual = x - reading.write(codes, self.W_dec) - self.b_dec
        norms = self.norms
        weighed = codes if norms is None else codes * reading.at(norms)
        if self.annealed is None:
            penalty = weighed.sum() / len(x)
        else:
            penalty = self.annealed(weighed, len(x), int(self.step_number), self.start.steps)
        loss = self.reconstruction_loss(residual) + self.own.l1 * self.risen(self.own.l1_warmup) * penalty
        active = codes.detach() > 0
        return Forward(loss, residual.detach(), reading.fired(active), active.sum() / len(x))

    def buffers_to_average(self) -> list[torch.Tensor]:
        """The sums that the annealed penalty's weight follows."""
        return [] if self.annealed is None else [self.annealed.recent]

    def freeze(self, scale: float, **where: Any) -> ReLU:
        """The ReLU dictionary."""
        return ReLU(self.frozen(scale), self.wiring, **where)
