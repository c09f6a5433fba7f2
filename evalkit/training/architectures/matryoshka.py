"""Training a Matryoshka autoencoder (Bussmann et al. 2025, arXiv 2503.17547).

1. A BatchTopK autoencoder whose features stand in groups: each prefix of groups (the first, the first two, ... all) has to
   reconstruct the activations with b_dec alone.
2. Codes are chosen once, over all features. What each group writes is added up group by group: one pass over the codes gives
   every prefix.
3. Loss: mean over prefixes of their errors + the auxiliary loss of dead features on what all groups left unexplained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from evalkit.dictionaries.matryoshka import Matryoshka
from evalkit.errors import SuiteError
from evalkit.training.architectures.base import TRAINABLES, Start
from evalkit.training.architectures.batchtopk import BatchTopKSettings, TrainableBatchTopK
from evalkit.training.sparse_ops.pairs import Pairs
from evalkit.training.sparse_ops.types import Compute
from evalkit.util.settings import Above0


def group_sizes(fractions: tuple[float, ...], features: int) -> list[int]:
    """Whole numbers of features that add up to ``features``: borders are rounded, so that no error adds up."""
    borders = [round(features * sum(fractions[: n + 1]) / sum(fractions)) for n in range(len(fractions))]
    return [border - before for border, before in zip(borders, [0, *borders], strict=False)]


@dataclass(frozen=True)
class MatryoshkaSettings(BatchTopKSettings):
    """Settings of architecture = "matryoshka"."""

    fractions: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    """Share of the features in each group, first to last; they sum to 1 (dictionary_learning's, close to Bussmann et al.'s
    sizes)."""
    prefix_weight: Above0 | None = None
    """What each prefix's error is multiplied by in the loss: one over the number of prefixes when left out (their mean); 1 gives
    their sum (SAELens)."""

    def check_together(self) -> None:
        if not self.fractions or min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise SuiteError(
                f"fractions {list(self.fractions)} do not share out the features",
                where="fractions",
                fix="choose numbers above 0 that sum to 1",
            )


@TRAINABLES.register("matryoshka")
class TrainableMatryoshka(TrainableBatchTopK):
    """BatchTopK with nested errors.

    Attributes:
        sizes: features of each group.
        group: (F,) group of each feature.
    """

    settings = MatryoshkaSettings
    group: torch.Tensor

    def __init__(self, own: Any, start: Start, error: str | None = None, compute: Compute = "float32") -> None:
        super().__init__(own, start, error, compute)
        self.sizes = group_sizes(self.own.fractions, start.features)
        of = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        self.register_buffer("group", of, persistent=False)

    @classmethod
    def check(cls, own: Any, features: int) -> None:
        """Every group needs a feature."""
        super().check(own, features)
        sizes = group_sizes(own.fractions, features)
        if min(sizes) < 1:
            raise SuiteError(
                f"{features} features shared out as {[round(f, 4) for f in own.fractions]} leave a group without any",
                where="fractions",
                fix="raise features or expansion, or choose fewer or larger groups",
            )

    def errors(self, x: Float[torch.Tensor, "B D"], kept: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """The prefixes' weighted errors, and the residual (B, D) of all groups, detached."""
        prefixes = kept.write(kept.pre, self.W_dec, self.group).cumsum(1)  # (B, G, D)
        residuals = (x - self.b_dec)[:, None] - prefixes
        count = len(self.sizes)
        weight = 1 / count if self.own.prefix_weight is None else self.own.prefix_weight
        loss = weight * count * self.reconstruction_loss(residuals.flatten(0, 1))
        return loss, residuals[:, -1].detach()

    def freeze(self, scale: float, **where: Any) -> Matryoshka:
        """The Matryoshka dictionary."""
        return Matryoshka(self.frozen(scale), self.sizes, self.wiring, **where)
