"""Training a BatchTopK autoencoder (Bussmann et al. 2024, arXiv 2412.06410).

1. Weights start as TopK's. Of all pre-activations of a batch of B tokens, the k * B largest positive ones are kept: k a token on
   average, more where a token needs more.
2. The smallest kept one, followed over the batches, becomes the threshold of the finished dictionary: a plain mean over the
   first batches, then an average that moves by ``threshold_rate``.
3. Loss: error of what the kept codes write + the auxiliary loss of dead features, as TopK's (``auxk``).

Processes that train together choose the largest of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float

from evalkit.dictionaries.batchtopk import BatchTopK
from evalkit.training.architectures.auxk import AuxSettings, auxiliary_loss
from evalkit.training.architectures.base import TRAINABLES, Forward, Start
from evalkit.training.architectures.topk import SparseTrainable
from evalkit.training.parallel import reductions as pooled
from evalkit.training.sparse_ops.pairs import Pairs, largest
from evalkit.training.sparse_ops.types import Compute
from evalkit.util.settings import Above0, Range


@dataclass(frozen=True)
class BatchTopKSettings(AuxSettings):
    """Settings of architecture = "batchtopk"."""

    k: Above0 = 32.0
    """Active features a token, on average over a batch. 32 is the value of Bussmann et al.'s comparisons."""
    decoder: Literal["unit", "free"] = "unit"
    """'unit': decoder rows of unit length (Bussmann et al.). 'free': any length, and selection weighted by it (SAELens)."""
    threshold_rate: Annotated[float, Range(gt=0, le=1)] = 0.01
    """How fast the threshold follows the smallest kept activation, a batch (SAELens; dictionary_learning has 0.001, for longer
    runs)."""


@TRAINABLES.register("batchtopk")
class TrainableBatchTopK(SparseTrainable):
    """k active features a token, on average over the batch.

    Attributes:
        threshold: running mean of the smallest kept activation, in the units that are ranked.
    """

    settings = BatchTopKSettings
    default_lr = 2e-3
    """TopK's."""
    threshold: torch.Tensor

    def __init__(self, own: Any, start: Start, error: str | None = None, compute: Compute = "float32") -> None:
        super().__init__(own, start, error, compute)
        self.register_buffer("threshold", torch.zeros(()))

    def main(self, x: Float[torch.Tensor, "B D"]) -> Forward:
        """Loss and statistics of one scaled batch; in training mode, the threshold moves."""
        weights = self.weights
        count = round(self.own.k * len(x) * self.processes.size)
        kept = largest(x, weights, count, self.processes, self.compute)
        if self.training:
            ranked = kept.pre.detach() if weights.norms is None else kept.pre.detach() * kept.at(weights.norms)
            self.follow(ranked)
        loss, residual = self.errors(x, kept)
        active = kept.pre.detach() > 0
        return Forward(loss, residual, kept.fired(active), active.sum() / len(x))

    def extra(
        self, x: Float[torch.Tensor, "B D"], result: Forward, dead: Bool[torch.Tensor, " F"]
    ) -> Float[torch.Tensor, ""] | None:
        """The auxiliary loss."""
        return auxiliary_loss(self.own, x, result, dead, self.weights, self.error, self.start.variance, self.processes)

    def errors(self, x: Float[torch.Tensor, "B D"], kept: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """The error's loss, and the residual (B, D), detached."""
        residual = x - kept.write(kept.pre, self.W_dec) - self.b_dec
        return self.reconstruction_loss(residual), residual.detach()

    def follow(self, ranked: Float[torch.Tensor, " N"]) -> None:
        """Move the threshold towards the smallest that was kept."""
        none = ranked.new_full((), float("inf"))
        smallest = pooled.lowest(self.processes, ranked.min() if len(ranked) else none)
        smallest = torch.where(torch.isfinite(smallest), smallest.to(self.threshold), self.threshold)
        self.threshold.lerp_(smallest, max(self.own.threshold_rate, 1 / (int(self.step_number) + 1)))

    def frozen(self, scale: float) -> dict[str, torch.Tensor]:
        """With the threshold, in the units of the codes."""
        return {**super().frozen(scale), "threshold": self.threshold.detach() / scale}

    def freeze(self, scale: float, **where: Any) -> BatchTopK:
        """The BatchTopK dictionary."""
        return BatchTopK(self.frozen(scale), self.wiring, **where)
