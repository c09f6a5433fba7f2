"""How the forward passes of several same-shape autoencoders are computed at once.

1. E members of one shape keep their parameters in stacked tensors (E, ...). A ``Joint`` pass turns one batch of activations into
   E losses. Members do not see each other: the gradient of the summed loss holds each member's own.
2. An architecture's ``main`` is written for parameters with or without the leading E (``Trainable.stackable``), so a pass is
   ``main`` of a module that has the stacked parameters in the place of its own. Settings that differ are tensors (E,) there, or
   are asked of each member.
3. Sparse codes stay sparse: each member finds its own as it does alone, and then they are written, and go backward, as those
   of one autoencoder whose rows are those of all (``joint``, ``sparse.autoencode``).
4. Settings that give tensors another shape (TopK's k: ``Trainable.shaping``) cut the members into runs: one pass each.
5. What dead features add to the loss depends on which are dead, so ``extra`` is asked member by member (``ensemble``).

An architecture that cannot be computed so has ``stackable = None`` and is stepped member by member; ``ALONE`` says why.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float

from evalkit.training.base import Trainable

Leaves = dict[str, torch.nn.Parameter]
"""Parameters of some members by name, (e, ...) each."""

ALONE: dict[str, str] = {}
"""Why an architecture is stepped member by member. Empty: all that are shipped can be stacked."""


class Passes(NamedTuple):
    """One batch through E members."""

    loss: Float[torch.Tensor, " E"]
    """What is minimised, each member's own, without what dead features add."""
    residual: Float[torch.Tensor, "E B D"]
    """x - x_hat, detached."""
    fired: Bool[torch.Tensor, "E F"]
    l0: Float[torch.Tensor, " E"]


def shaped(module: Trainable) -> tuple[Any, ...]:
    """What members of one pass have in common beside their shape."""
    return tuple(getattr(module.own, name) for name in sorted(module.shaping))


class Joint:
    """Several members' forward pass.

    Args:
        modules: the members, all of one architecture and shape; those with equal ``shaping`` settings are neighbours.

    Attributes:
        cuts: runs of members that are computed at once.
    """

    def __init__(self, modules: Sequence[Trainable]) -> None:
        self.modules = list(modules)
        starts = [i for i, one in enumerate(modules) if i == 0 or shaped(modules[i - 1]) != shaped(one)]
        self.cuts = [slice(a, b) for a, b in zip(starts, [*starts[1:], len(self.modules)], strict=True)]
        self._passes = [self._pass(self.modules[cut]) for cut in self.cuts]

    @staticmethod
    def _pass(members: list[Trainable]) -> Trainable:
        """A module that stands for the members; its parameters are exchanged for the stacked ones."""
        first = members[0]
        like = next(first.parameters())
        own = dict(vars(first.own))
        for name in first.stackable or ():
            values = [getattr(member.own, name) for member in members]
            if len(set(values)) > 1 and all(isinstance(value, float) for value in values):
                own[name] = like.new_tensor(values)
        joint = copy.copy(first)
        joint.own, joint.stacked = SimpleNamespace(**own), members
        return joint

    def forward(self, x: Float[torch.Tensor, "B D"], groups: Sequence[Leaves]) -> Passes:
        """Losses of one scaled batch.

        Args:
            x: shared by all members.
            groups: their stacked parameters, cut as ``cuts`` says.
        """
        results = []
        for joint, leaves in zip(self._passes, groups, strict=True):
            joint._parameters = dict(leaves)
            loss, residual, fired, l0 = joint.main(x)
            results.append(Passes(loss, residual, fired, l0))
        return results[0] if len(results) == 1 else Passes(*(torch.cat(parts) for parts in zip(*results, strict=True)))
