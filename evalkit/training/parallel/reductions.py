"""What a step needs of the whole batch where several processes hold a part each.

1. Most of a loss is a mean over tokens. Parts are equal, so means over parts average to the mean over the batch, and so do their
   gradients (``Trainer.step``). What is not such a mean is computed here: the variance of a batch, a squared mean, a choice
   among all codes of the batch, which features fired.
2. Gradients: a pooled number is a constant, except through this process's own part (``with_own_gradient``). Averaged over the
   processes that is the gradient of the number of the whole batch.
3. The largest codes of a batch: each process offers its own candidates, all see all values, and the smallest that is kept is
   the same everywhere. Exact; equal values go to the earlier process.

Every process has to call each function, in the same order.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float

from evalkit.training.parallel.group import Group


def mean(group: Group, value: torch.Tensor) -> torch.Tensor:
    """Mean over the processes, without a gradient."""
    pooled = value.detach().clone()
    group.average([pooled])
    return pooled


def with_own_gradient(group: Group, value: torch.Tensor) -> torch.Tensor:
    """Mean over the processes, with the gradient of this process's ``value``."""
    return value + (mean(group, value) - value.detach())


def variance(group: Group, x: Float[torch.Tensor, "B D"]) -> Float[torch.Tensor, ""]:
    """Mean squared distance of the whole batch's rows from their mean; ``x`` is this process's part."""
    if group.size == 1:  # one pass over the batch
        return x.var(0, correction=0).sum()
    return mean(group, (x - mean(group, x.mean(0))).square().sum(-1).mean())


def lowest(group: Group, value: Float[torch.Tensor, ""]) -> Float[torch.Tensor, ""]:
    """The smallest of the processes' values."""
    return torch.stack(group.gather(value)).min()


def largest(group: Group, values: Float[torch.Tensor, " N"], count: int) -> Bool[torch.Tensor, " N"]:
    """Which of this process's positive ``values`` are among the ``count`` largest of all processes."""
    offered = values.new_zeros(count)
    own = values if len(values) <= count else values.topk(count, sorted=False).values
    offered[: len(own)] = own
    parts = group.gather(offered)
    bound = torch.cat(parts).topk(count, sorted=False).values.min()
    kept = values > bound
    if bound > 0:  # what is left of the count goes to values equal to the bound
        before = sum(int((part == bound).sum()) for part in parts[: group.rank])
        left = count - sum(int((part > bound).sum()) for part in parts) - before
        kept[(values == bound).nonzero()[: max(0, left), 0]] = True
    return kept
