"""Losses of the trainers, each a mean over the batch.

1. ``reconstruction`` is the error in one of three scales that trainers use.
2. ``unexplained``: sum of squared errors over a fixed variance: the batch's share of the FVU (Gao et al. 2024 normalise alike).
3. ``auxiliary``: how badly the dead features explain what the live ones left over (Gao et al. 2024, appendix A.2).
"""

from __future__ import annotations

import torch
from jaxtyping import Float

from evalkit.training.parallel import reductions as pooled
from evalkit.training.parallel.group import ALONE, Group


def reconstruction(residual: Float[torch.Tensor, "B D"], scale: str, variance: float | torch.Tensor) -> Float[torch.Tensor, ""]:
    """Squared error, a mean over tokens: 'sum' over dimensions, 'mean' over dimensions, or 'fvu', the sum over ``variance``."""
    if scale == "sum":
        return residual.square().sum(-1).mean(-1)
    return residual.square().mean((-2, -1)) if scale == "mean" else unexplained(residual, variance)


def unexplained(residual: Float[torch.Tensor, "B D"], variance: float | torch.Tensor) -> Float[torch.Tensor, ""]:
    """Mean squared length of ``residual`` over ``variance``, the data's mean squared distance from its mean."""
    return residual.square().sum(-1).mean(-1) / variance


def auxiliary(
    explained: Float[torch.Tensor, "B D"], residual: Float[torch.Tensor, "B D"], group: Group = ALONE
) -> Float[torch.Tensor, ""]:
    """Squared error of ``explained`` as a guess of ``residual``, over the residual's own squared length in the whole batch.

    1 for a guess of zero. The residual is a target: no gradient passes through it.
    """
    target = residual.detach()
    return (explained - target).square().sum() / pooled.mean(group, target.square().sum()).clamp(min=1e-12)
