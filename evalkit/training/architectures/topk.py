"""Training a TopK autoencoder (Gao et al. 2024, arXiv 2406.04093).

1. b_dec starts at the geometric median of the data, decoder rows at random unit vectors, the encoder as the decoder's
   transpose, b_enc at 0.
2. Loss: error of what the k largest codes write + ``auxk_weight`` * how badly the strongest dead features explain the residual.
3. decoder = 'unit': rows stay of unit length: the gradient's part along a row is removed, and rows are rescaled after each step.
   'free': rows may have any length, and the choice of the k largest is made on codes times the row's length (SAELens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float

from evalkit.dictionaries.autoencoder import Wiring
from evalkit.dictionaries.topk import TopK
from evalkit.errors import SuiteError
from evalkit.training.architectures import losses
from evalkit.training.architectures.auxk import AuxSettings, auxiliary_loss
from evalkit.training.architectures.base import TRAINABLES, Forward, Start, Trainable
from evalkit.training.parallel import reductions as pooled
from evalkit.training.sparse_ops import topk as sparse
from evalkit.training.sparse_ops.types import Compute, Weights
from evalkit.util.settings import Count


@dataclass(frozen=True)
class TopKSettings(AuxSettings):
    """Settings of architecture = "topk"."""

    k: Count = 32
    """Active features a token. 32 is the middle of Gao et al.'s range."""
    decoder: Literal["unit", "free"] = "unit"
    """'unit': decoder rows of unit length (Gao et al.). 'free': any length, and selection weighted by it (SAELens)."""
    variance: Literal["data", "batch"] = "data"
    """What error = 'fvu' is divided by: the variance of the data, or of each batch (sparsify)."""


class SparseTrainable(Trainable):
    """What TopK and its relatives share: W_enc (F, D) with rows as features, b_enc (F,), W_dec (F, D), b_dec (D,)."""

    def __init__(self, own: Any, start: Start, error: str | None = None, compute: Compute = "float32") -> None:
        super().__init__(own, start, error, compute)
        rows = torch.randn(start.features, len(start.centre), generator=start.generator)
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_enc = torch.nn.Parameter(rows.clone())
        self.b_enc = torch.nn.Parameter(torch.zeros(start.features))
        self.W_dec = torch.nn.Parameter(rows)
        self.b_dec = torch.nn.Parameter(start.centre.clone())

    @classmethod
    def check(cls, own: Any, features: int) -> None:
        """k features must be there to choose from."""
        if own.k > features:
            raise SuiteError(
                f"{features} features cannot have k = {own.k} active ones",
                where="features",
                fix="lower k or raise features or expansion",
            )

    @property
    def weights(self) -> Weights:
        """The parameters, with the rows' lengths where they weigh the selection."""
        norms = self.W_dec.detach().norm(dim=1) if self.own.decoder == "free" else None
        return Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec, norms)

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        """Remove the part of the decoder's gradient that would only change a row's length."""
        gradient = self.W_dec.grad
        if gradient is not None and self.own.decoder == "unit":
            gradient.addcmul_(self.W_dec, torch.linalg.vecdot(gradient, self.W_dec)[:, None], value=-1)

    @torch.no_grad()
    def constrain_weights(self) -> None:
        """Rescale decoder rows to unit length."""
        if self.own.decoder == "unit":
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    def frozen(self, scale: float) -> dict[str, torch.Tensor]:
        """Tensors whose codes of x are those of scale * x over ``scale``: only the two biases change."""
        return {
            "W_enc": self.W_enc.detach().T.contiguous(),
            "b_enc": self.b_enc.detach() / scale,
            "W_dec": self.W_dec.detach().clone(),
            "b_dec": self.b_dec.detach() / scale,
        }

    @property
    def wiring(self) -> Wiring:
        """As the finished dictionary is wired."""
        return Wiring(decoder_norm="codes" if self.own.decoder == "free" else "none")


@TRAINABLES.register("topk")
class TrainableTopK(SparseTrainable):
    """Exactly k features a token."""

    settings = TopKSettings
    default_lr = 2e-3
    """In runs of 300k presentations at width 576 a higher one explains a little more but leaves more features rarely used, and
    1e-3 explains less."""

    def main(self, x: Float[torch.Tensor, "B D"]) -> Forward:
        """Loss and statistics of one scaled batch."""
        values, indices, residual = sparse.autoencode(x, self.weights, self.own.k, compute=self.compute)
        loss = losses.reconstruction(residual, self.error, self.variance(x))
        fired = sparse.fired(values, indices, len(self.b_enc))
        return Forward(loss, residual.detach(), fired, (values.detach() > 0).sum() / len(x))

    def variance(self, x: Float[torch.Tensor, "B D"]) -> float | torch.Tensor:
        """What errors are divided by where their scale is 'fvu'."""
        return pooled.variance(self.processes, x) if self.own.variance == "batch" else self.start.variance

    def extra(
        self, x: Float[torch.Tensor, "B D"], result: Forward, dead: Bool[torch.Tensor, " F"]
    ) -> Float[torch.Tensor, ""] | None:
        """The auxiliary loss."""
        return auxiliary_loss(self.own, x, result, dead, self.weights, self.error, self.variance(x), self.processes)

    def freeze(self, scale: float, **where: Any) -> TopK:
        """The TopK dictionary."""
        return TopK(self.frozen(scale), self.own.k, self.wiring, **where)
