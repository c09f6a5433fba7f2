"""Losses of the trainers, each a mean over the batch.

1. ``unexplained``: sum of squared errors over a fixed variance: the batch's share of the FVU (Gao et al. 2024 normalise alike).
2. ``l1``: the paper's sparsity loss in the scale of its code (Cunningham et al. 2023): mean over dimensions for the error,
   sum over features for the penalty.
3. ``auxiliary``: how badly the dead features explain what the live ones left over (Gao et al. 2024, appendix A.2).
"""

from __future__ import annotations

import torch
from jaxtyping import Float


def unexplained(residual: Float[torch.Tensor, "B D"], variance: float) -> Float[torch.Tensor, ""]:
    """Mean squared length of ``residual`` over ``variance``, the data's mean squared distance from its mean."""
    return residual.square().sum(-1).mean() / variance


def l1(residual: Float[torch.Tensor, "B D"], codes: Float[torch.Tensor, "B F"], weight: float) -> Float[torch.Tensor, ""]:
    """mean over tokens of (mean over D of residual^2 + weight * sum over F of |codes|)."""
    return residual.square().mean() + weight * codes.abs().sum(-1).mean()


def auxiliary(explained: Float[torch.Tensor, "B D"], residual: Float[torch.Tensor, "B D"]) -> Float[torch.Tensor, ""]:
    """Squared error of ``explained`` as a guess of ``residual``, over the residual's own squared length.

    1 for a guess of zero. The residual is a target: no gradient passes through it.
    """
    target = residual.detach()
    return (explained - target).square().sum() / target.square().sum().clamp(min=1e-12)
