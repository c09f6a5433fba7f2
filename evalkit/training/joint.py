"""Reading the features of one batch by several autoencoders of one shape, and writing back: ``reading`` with a leading E.

1. Weights are (E, F, D) and so on. Each member reads the batch by itself, in the order of operations it has alone, so that the
   same codes are found and chosen.
2. What was found becomes one list of pairs, as if there were one autoencoder of E * F features and a batch of E * B tokens:
   pair (member * B + token, member * F + feature). All that follows - codes, writing, both weight gradients - is done once.
3. Where codes are many, all are read by one batched product instead (``JointDense``).

``read`` and ``largest`` serve one autoencoder (2-dimensional weights) by ``reading`` itself, so that an architecture's loss is
written once for both: with ``at``, ``each``, ``parts`` and ``total`` in the place of sums and per-feature numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped

from evalkit.training import reading
from evalkit.training.reading import Places, Reading
from evalkit.training.sparse import Compute, Weights, matmul

if TYPE_CHECKING:
    from evalkit.training.trainer import Group


class JointPlaces(Places):
    """Pairs of several members, ordered by member, token and feature.

    Args:
        flat: (member * B + token) * F + feature, ascending.
        shape: (E, B, F).
    """

    def __init__(self, flat: Int[torch.Tensor, " N"], shape: tuple[int, int, int]) -> None:
        E, B, F = shape
        self.shape = (E * B, E * F)
        self.tokens = torch.div(flat, F, rounding_mode="floor")
        self.features = flat - self.tokens * F + torch.div(self.tokens, B, rounding_mode="floor") * F


class _ReadPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, centred: torch.Tensor, W: torch.Tensor, b: torch.Tensor, centre: torch.Tensor, pre: torch.Tensor, places: Places
    ) -> Any:
        ctx.save_for_backward(centred, W)
        ctx.places = places
        return pre.view_as(pre)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        d = gradients[0].contiguous()  # (N,)
        centred, W = ctx.saved_tensors  # (E, B, D), (E, F, D)
        db = ctx.places.sum_by_feature(d).view(W.shape[:2])
        dW = ctx.places.rows_by_feature(ctx.places.tokens, centred.flatten(0, 1), d).view_as(W)
        return None, dW, db, -torch.bmm(db[:, None], W)[:, 0], None, None


class _ReadDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, centred: torch.Tensor, W: torch.Tensor, b: torch.Tensor, centre: torch.Tensor, compute: Compute) -> Any:
        ctx.save_for_backward(centred, W)
        ctx.compute = compute
        return matmul(centred, W.mT, compute) + b[:, None]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (d,) = gradients  # (E, B, F)
        centred, W = ctx.saved_tensors
        db = d.sum(1)
        return None, matmul(d.mT, centred, ctx.compute), db, -torch.bmm(db[:, None], W)[:, 0], None


class JointPairs(NamedTuple):
    """``reading.Pairs`` of E members."""

    pre: Float[torch.Tensor, " N"]
    places: JointPlaces
    sizes: list[int]
    """Pairs of each member."""

    def at(self, per_feature: Float[torch.Tensor, "E F"]) -> Float[torch.Tensor, " N"]:
        """A number per feature, laid out as ``pre`` is."""
        return per_feature.flatten().index_select(0, self.places.features)

    def each(self, per_member: Any) -> Any:
        """A number per member (or one for all), laid out as ``pre`` is."""
        if not isinstance(per_member, torch.Tensor):
            return per_member
        features = self.places.shape[1] // len(self.sizes)
        return per_member.index_select(0, torch.div(self.places.features, features, rounding_mode="floor"))

    def write(
        self,
        codes: Float[torch.Tensor, " N"],
        W_dec: Float[torch.Tensor, "E F D"],
        groups: Int[torch.Tensor, " F"] | None = None,
    ) -> Float[torch.Tensor, "E *bags D"]:
        """What ``codes`` write, (E, B, D); with the group of each feature, what each group writes, (E, B, G, D)."""
        E = len(self.sizes)
        one = reading.Pairs(self.pre, self.places)
        written = one.write(codes, W_dec.flatten(0, 1), None if groups is None else groups.repeat(E))
        return written.unflatten(0, (E, -1))

    def fired(self, active: Bool[torch.Tensor, " N"]) -> Bool[torch.Tensor, "E F"]:
        """Which features are active on any token."""
        return reading.Pairs(self.pre, self.places).fired(active).view(len(self.sizes), -1)

    def parts(self, values: Shaped[torch.Tensor, " N"]) -> Sequence[torch.Tensor]:
        """``values`` of each member."""
        return values.split(self.sizes)

    def total(self, values: Shaped[torch.Tensor, " N"]) -> Shaped[torch.Tensor, " E"]:
        """Sum of ``values`` over each member's pairs."""
        return torch.stack([part.sum() for part in self.parts(values)])


class JointDense(NamedTuple):
    """All pre-activations of E members, with the interface of ``JointPairs``."""

    pre: Float[torch.Tensor, "E B F"]
    compute: Compute = "float32"

    def at(self, per_feature: Float[torch.Tensor, "E F"]) -> Float[torch.Tensor, "E B F"]:
        """A number per feature, laid out as ``pre`` is."""
        return per_feature[:, None].expand_as(self.pre)

    def each(self, per_member: Any) -> Any:
        """A number per member (or one for all), laid out as ``pre`` is."""
        return per_member[:, None, None] if isinstance(per_member, torch.Tensor) else per_member

    def write(self, codes: Float[torch.Tensor, "E B F"], W_dec: Float[torch.Tensor, "E F D"]) -> Float[torch.Tensor, "E B D"]:
        """What ``codes`` write."""
        return matmul(codes, W_dec, self.compute)

    def fired(self, active: Bool[torch.Tensor, "E B F"]) -> Bool[torch.Tensor, "E F"]:
        """Which features are active on any token."""
        return active.any(1)

    def parts(self, values: Shaped[torch.Tensor, "E B F"]) -> Sequence[torch.Tensor]:
        """``values`` of each member."""
        return values.unbind()

    def total(self, values: Shaped[torch.Tensor, "E B F"]) -> Shaped[torch.Tensor, " E"]:
        """Sum of ``values`` over each member's codes."""
        return values.sum((1, 2))


JointReading = JointDense | JointPairs


def _members(weights: Weights) -> list[Weights]:
    """Each member's weights, without a graph."""
    parts = (part.detach().unbind() for part in weights[:4])
    norms = [None] * len(weights.W_enc) if weights.norms is None else weights.norms.unbind()
    return [Weights(*member) for member in zip(*parts, norms, strict=True)]


def _joined(found: Sequence[reading.Found], centred: torch.Tensor, weights: Weights) -> JointPairs:
    """One list of what each member found."""
    E, B, F = len(found), centred.shape[1], weights.b_enc.shape[1]
    places = JointPlaces(torch.cat([one.flat + i * B * F for i, one in enumerate(found)]), (E, B, F))
    pre = torch.cat([one.pre for one in found])
    pre = _ReadPairs.apply(centred, weights.W_enc, weights.b_enc, weights.b_dec, pre, places)
    return JointPairs(pre, places, [len(one.flat) for one in found])


def read(
    x: Float[torch.Tensor, "B D"],
    weights: Weights,
    floor: Float[torch.Tensor, "*E F"] | float = 0.0,
    compute: Compute = "float32",
) -> Reading | JointReading:
    """Pre-activations of a batch: all of them, or the pairs above a floor where these are few.

    Args:
        x: scaled batch; gets no gradient.
        weights: of one autoencoder or of several, without norms.
        floor: pre-activations up to this cannot matter.
        compute: type of the factors of dense products.
    """
    if weights.W_enc.dim() == 2:
        return reading.read(x, weights, floor, compute)
    centred = x - weights.b_dec.detach()[:, None]  # (E, B, D)
    left = reading.few(x) * weights.b_enc.numel() * len(x)
    found = []
    for i, member in enumerate(_members(weights)):
        one = reading.above(centred[i], member, floor[i] if isinstance(floor, torch.Tensor) else floor, left, compute)
        if one is None:
            pre = _ReadDense.apply(centred, weights.W_enc, weights.b_enc, weights.b_dec, compute)
            return JointDense(pre, compute)
        left -= len(one.flat)
        found.append(one)
    return _joined(found, centred, weights)


def largest(
    x: Float[torch.Tensor, "B D"],
    weights: Weights,
    k: Sequence[float],
    group: Group | None = None,
    compute: Compute = "float32",
) -> reading.Pairs | JointPairs:
    """The k * B largest positive pre-activations of a batch, of each member, times ``weights.norms`` where there are some.

    Args:
        x: scaled batch; gets no gradient.
        weights: of one autoencoder or of several.
        k: a token, on average, of each autoencoder.
        group: processes that hold the other parts of the batch, for one autoencoder.
        compute: type of the factors of the dense product.
    """
    if weights.W_enc.dim() == 2:
        tokens = len(x) * (1 if group is None else group.size)
        return reading.largest(x, weights, round(k[0] * tokens), group, compute)
    centred = x - weights.b_dec.detach()[:, None]  # (E, B, D)
    found = [
        reading.find_largest(centred[i], member, round(k[i] * len(x)), compute) for i, member in enumerate(_members(weights))
    ]
    return _joined(found, centred, weights)
