"""The auxiliary loss that brings dead features back (Gao et al. 2024, arXiv 2406.04093, appendix A.2).

1. Of the features that have not fired for long, the ``auxk`` with the largest pre-activations are taken for each token.
2. What they would write is held against what the live ones left unexplained. The residual is a target: no gradient passes.
3. Forms: 'normalised' divides by the residual's own squared length, so that guessing zero costs 1; 'variance' by its variance
   over the batch (OpenAI's code, dictionary_learning: nearly the same once b_dec is learned); 'error' is the error in the scale
   of the main loss, less while fewer than auxk are dead (SAELens, sparsify).
4. Where the dead are few against auxk, dense products over them are cheaper than sums of chosen rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float

from evalkit.training.architectures import losses
from evalkit.training.architectures.base import Forward
from evalkit.training.parallel import reductions as pooled
from evalkit.training.parallel.group import ALONE, Group
from evalkit.training.sparse_ops import topk as sparse
from evalkit.training.sparse_ops.types import Weights
from evalkit.util.settings import AtLeast0, NotNegative, Settings

DENSE = 8
"""Dead features per auxk up to which dense products are taken: about where they cost the same on a CPU."""


@dataclass(frozen=True)
class AuxSettings(Settings):
    """Settings of the auxiliary loss."""

    auxk: NotNegative | None = None
    """Dead features that try to explain the residual at each step; half the width when left out, as Gao et al. advise. 0 turns
    it off."""
    auxk_weight: AtLeast0 = 1 / 32
    """Weight of that auxiliary loss (Gao et al.)."""
    auxk_form: Literal["normalised", "variance", "error"] = "normalised"
    """'normalised': over the residual's squared length (Gao et al.). 'variance': over its variance in the batch
    (dictionary_learning). 'error': in the scale of the main loss (SAELens, sparsify)."""
    auxk_relu: bool = True
    """Whether the dead features' codes pass the ReLU; SAELens lets negative ones through."""

    auxk_silent: bool = False
    """Whether a dead feature that fires in a batch is left out in that batch already (dictionary_learning)."""


def auxiliary_loss(
    own: AuxSettings,
    x: Float[torch.Tensor, "B D"],
    result: Forward,
    dead: Bool[torch.Tensor, " F"],
    weights: Weights,
    error: str,
    variance: float | torch.Tensor,
    group: Group = ALONE,
) -> Float[torch.Tensor, ""] | None:
    """The weighted loss, or None where it is off or nothing is dead.

    Args:
        x: scaled batch.
        result: what the live features left unexplained, and which fired.
        dead: features that may take part.
        weights: of the whole autoencoder; gradients reach the dead rows only.
        error: scale of the main loss.
        variance: of the data, for that scale.
        group: processes that hold the other parts of the batch.
    """
    most = x.shape[1] // 2 if own.auxk is None else own.auxk
    if not most or not own.auxk_weight:
        return None
    if own.auxk_silent:
        dead = dead & ~group.any(result.fired)
    which = dead.nonzero()[:, 0]
    if not len(which):
        return None
    few, residual = weights.rows(which), result.residual
    if len(which) <= DENSE * most:
        guess = sparse.dense_codes(x, few, most, relu=own.auxk_relu) @ few.W_dec
    else:
        guess = sparse.decode(*sparse.encode(x, few, most, relu=own.auxk_relu), few.W_dec)
    if own.auxk_form == "normalised":
        return own.auxk_weight * losses.auxiliary(guess, residual, group)
    if own.auxk_form == "variance":
        scatter = pooled.variance(group, residual).clamp(min=1e-12)
        return own.auxk_weight * losses.reconstruction(guess - residual, "sum", 1.0) / scatter
    share = min(1.0, len(which) / most)
    return own.auxk_weight * share * losses.reconstruction(guess - residual, error, variance)
