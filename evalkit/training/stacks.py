"""How the forward passes of several same-shape autoencoders are computed at once.

1. E members of one shape keep their parameters in stacked tensors (E, ...); a ``Mechanism`` turns one batch of activations
   into E losses. Members do not see each other: the gradient of the summed loss holds each member's own.
2. ``Mapped`` maps the architecture's own ``forward`` over the members (``torch.func.vmap``). It serves every architecture that
   says which settings may differ (``Trainable.vectorised``) and needs no code of its own.
3. ``StackedTopK`` keeps TopK sparse: one matrix product encodes for all members, the k largest are chosen for each member, and
   members of equal k then decode and go backward as one autoencoder whose rows are those of all of them.
4. The loss that brings back dead features depends on which are dead, so it is added member by member, where there are any.

Architectures without a mechanism are stepped one after the other (``ensemble``).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch.autograd.function import once_differentiable

from evalkit.errors import SuiteError
from evalkit.registry import Registry
from evalkit.training import losses, pooled, sparse
from evalkit.training.auxk import auxiliary_loss
from evalkit.training.base import Trainable

Leaves = dict[str, torch.nn.Parameter]
"""Parameters of some members by name, (e, ...) each."""


class Passes(NamedTuple):
    """One batch through E members."""

    loss: Float[torch.Tensor, " E"]
    """What is minimised, each member's own."""
    residual: Float[torch.Tensor, "E B D"]
    """x - x_hat, detached."""
    fired: Bool[torch.Tensor, "E F"]
    l0: Float[torch.Tensor, " E"]


class Mechanism(ABC):
    """Several members' forward pass.

    Args:
        modules: the members, all of one architecture and shape.
    """

    varies: ClassVar[frozenset[str]] = frozenset()
    """Own settings in which members may differ."""
    pooled: ClassVar[bool] = False
    """Whether it serves modules that ask other processes for more than means (``Trainable.pools``) where there are any."""

    def __init__(self, modules: Sequence[Trainable]) -> None:
        self.modules = list(modules)

    @abstractmethod
    def forward(
        self,
        x: Float[torch.Tensor, "B D"],
        stacked: dict[str, torch.Tensor],
        groups: Sequence[Leaves],
        dead: Bool[torch.Tensor, "E F"],
    ) -> Passes:
        """Losses of one scaled batch.

        Args:
            x: shared by all members.
            stacked: all members' parameters by name, (E, ...) each.
            groups: the same memory as leaves of autograd, cut as ``cuts`` says.
            dead: of each member.
        """

    def cuts(self) -> list[slice]:
        """Runs of members that have parameters of their own for autograd; their order is the members'."""
        return [slice(0, len(self.modules))]

    def extra_loss(
        self, member: int, x: Float[torch.Tensor, "B D"], residual: Float[torch.Tensor, "B D"], dead: Bool[torch.Tensor, " F"]
    ) -> Float[torch.Tensor, ""] | None:
        """What one member adds to its loss where it has dead features; a graph to the member's own parameters."""
        return None


STACKS: Registry[type[Mechanism]] = Registry("batched architecture", "evalkit.training", SuiteError)
"""Mechanisms of their own, by the architecture's name."""


class Mapped(Mechanism):
    """The architecture's ``forward``, mapped over stacked parameters and over the settings that differ."""

    def __init__(self, modules: Sequence[Trainable]) -> None:
        super().__init__(modules)
        first = modules[0]
        self.template = copy.copy(first)  # its settings are exchanged in every call, the member keeps its own
        self.settings = dict(vars(first.own))
        names = sorted(first.vectorised or ())
        device = next(first.parameters()).device
        self.varied = {name: torch.tensor([float(getattr(m.own, name)) for m in modules], device=device) for name in names}

    def forward(
        self,
        x: Float[torch.Tensor, "B D"],
        stacked: dict[str, torch.Tensor],
        groups: Sequence[Leaves],
        dead: Bool[torch.Tensor, "E F"],
    ) -> Passes:
        """Losses of one scaled batch."""

        def one(parameters: dict[str, torch.Tensor], varied: dict[str, torch.Tensor], dead: torch.Tensor) -> Any:
            self.template.own = SimpleNamespace(**{**self.settings, **varied})
            result = torch.func.functional_call(self.template, parameters, (x, dead))
            return result.loss, result.residual, result.fired, result.l0

        return Passes(*torch.func.vmap(one)(dict(groups[0]), self.varied, dead))


class _Select(torch.autograd.Function):
    """The k largest of pre-activations that were computed without a graph, and the gradients of what made them.

    ``x`` comes centred by a point that is the same for all members; ``offset`` is what is left of each one's own centre.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pre: torch.Tensor,
        x: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor,
        centre: torch.Tensor,
        offset: torch.Tensor,
        norms: torch.Tensor | None,
        k: int,
    ) -> Any:
        B, members, features = pre.shape
        ranked = pre if norms is None else pre * norms
        indices = sparse.largest(ranked.reshape(B * members, features), k).view(B, members, k)
        values = pre.gather(-1, indices).relu_()
        rows = indices + torch.arange(members, device=x.device)[:, None] * features
        ctx.save_for_backward(x, W, offset, values, rows)
        ctx.mark_non_differentiable(rows)
        return values, rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, W, offset, values, rows = ctx.saved_tensors
        shape, each = W.shape[:2], values[0].numel()  # pairs a token
        d = (gradients[0] * (values > 0)).flatten()
        flat = rows.flatten()
        order = flat.to(torch.int32).argsort(stable=True)
        counts = torch.bincount(flat, minlength=shape.numel())
        starts = counts.cumsum(0) - counts
        dW = F.embedding_bag(order // each, x, starts, per_sample_weights=d[order], mode="sum").view_as(W)
        db = torch.bincount(flat, weights=d, minlength=shape.numel()).to(d.dtype).view(shape)
        dW -= db[:, :, None] * offset[:, None, :]
        return None, None, dW, db, -torch.bmm(db[:, None, :], W)[:, 0], None, None, None


@STACKS.register("topk")
class StackedTopK(Mechanism):
    """TopK members of one number of features; k and the auxiliary loss may differ. Members of equal k stand together."""

    varies = frozenset({"k", "auxk", "auxk_weight", "auxk_form"})
    pooled = True

    def cuts(self) -> list[slice]:
        """One run for each k."""
        ks = [module.own.k for module in self.modules]
        starts = [i for i, k in enumerate(ks) if i == 0 or ks[i - 1] != k]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(ks)], strict=True)]

    def forward(
        self,
        x: Float[torch.Tensor, "B D"],
        stacked: dict[str, torch.Tensor],
        groups: Sequence[Leaves],
        dead: Bool[torch.Tensor, "E F"],
    ) -> Passes:
        """Losses of one scaled batch."""
        with torch.no_grad():
            W, centres = stacked["W_enc"], stacked["b_dec"]
            # where all members started, so that none of them, however wild, touches the others; what is left goes into biases
            middle = self.modules[0].start.centre.to(x)
            offsets, shifted = centres - middle, x - middle
            bias = stacked["b_enc"] - torch.bmm(W, offsets[:, :, None])[:, :, 0]
            pre = sparse.product(shifted, W.flatten(0, 1), bias.flatten()).view(len(x), *bias.shape)  # (B, E, F)
            norms = stacked["W_dec"].norm(dim=2) if self.modules[0].own.decoder == "free" else None
        parts = []
        for cut, leaves in zip(self.cuts(), groups, strict=True):
            k, lengths = self.modules[cut.start].own.k, None if norms is None else norms[cut]
            codes = _Select.apply(
                pre[:, cut], shifted, leaves["W_enc"], leaves["b_enc"], leaves["b_dec"], offsets[cut], lengths, k
            )
            parts.append(self._part(x, leaves, *codes))
        return parts[0] if len(parts) == 1 else Passes(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _part(self, x: torch.Tensor, leaves: Leaves, values: torch.Tensor, rows: torch.Tensor) -> Passes:
        """Members of one k, from their codes (B, e, K)."""
        B, e, k = values.shape
        W_dec = leaves["W_dec"].flatten(0, 1)
        written = sparse.decode(values.view(B * e, k), rows.view(B * e, k), W_dec).view(B, e, -1)
        residual = (x[:, None] - written - leaves["b_dec"]).transpose(0, 1)  # (e, B, D)
        error, variance = self.modules[0].error, self._variance(x)
        loss = torch.stack([losses.reconstruction(part, error, variance) for part in residual])
        fired = sparse.fired(values.view(B, e * k), rows.view(B, e * k), len(W_dec)).view(e, -1)
        return Passes(loss, residual.detach(), fired, (values.detach() > 0).sum((0, 2)) / B)

    def _variance(self, x: torch.Tensor) -> Any:
        module: Any = self.modules[0]
        return pooled.variance(module.processes, x) if module.own.variance == "batch" else module.start.variance

    def extra_loss(
        self, member: int, x: Float[torch.Tensor, "B D"], residual: Float[torch.Tensor, "B D"], dead: Bool[torch.Tensor, " F"]
    ) -> Float[torch.Tensor, ""] | None:
        """The auxiliary loss of one member."""
        module: Any = self.modules[member]
        return auxiliary_loss(module.own, x, residual, dead, module.weights, module.error, self._variance(x), module.processes)


def mechanism_of(trainable: type[Trainable], architecture: str) -> type[Mechanism] | None:
    """How members of an architecture are computed at once; None where they are stepped one after the other."""
    if architecture in STACKS.names():
        return STACKS.get(architecture)
    return Mapped if trainable.vectorised is not None else None
