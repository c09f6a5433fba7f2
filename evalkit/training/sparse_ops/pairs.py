"""Reading the features of a batch, and writing back what few of them are active: one dense product, then only what matters.

1. pre = (x - b_dec) @ W_enc^T + b_enc is the one dense product, made and forgotten for a few tokens at a time. Everything after
   it concerns the codes that can be active: those above a floor (ReLU, gated, JumpReLU with its window) or the largest of the
   batch (BatchTopK).
2. Where they are few, they become ``Pairs`` of token and feature: written back by bags of decoder rows, and both weight
   gradients are sums over the tokens of a feature. Sums run in a fixed order: equal inputs give equal bits on one CPU.
3. Where they are many (early in a run with L1), dense products are faster, and ``Dense`` is given. Both have the same
   interface and the same gradients.
4. The centre's gradient is -(sum over tokens of d) @ W_enc in both: no (B, D) product is needed for it.
5. The largest n codes of a batch (Bussmann et al. 2024, arXiv 2412.06410) without sorting all B * F: a sample of rows gives a
   bound that more than n codes should pass, and only those are compared. Where too few pass, all positive ones are.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int

from evalkit.training.parallel import reductions as pooled
from evalkit.training.parallel.group import ALONE, Group
from evalkit.training.sparse_ops.topk import at_pairs, matmul
from evalkit.training.sparse_ops.types import Compute, Weights
from evalkit.util.matmul import linear

FEW = 0.03
"""Share of codes up to which pairs are faster than dense products on a CPU."""

FEW_ON_GPU = 0.004
"""The same where dense products run on tensor cores: memory reads against arithmetic; an estimate that awaits a measurement."""

BLOCK = 1 << 20
"""Most pre-activations held at a time on the CPU (4 MB: they stay in the cache), as long as pairs are few."""

SAMPLE_ROWS = 64
"""Rows that the bound on the largest codes of a batch is taken from."""

SURPLUS = 1.5
"""How many times the wanted codes should pass that bound: the sample is not the batch."""


class _ReadDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, centred: torch.Tensor, W: torch.Tensor, b: torch.Tensor, centre: torch.Tensor, compute: Compute) -> Any:
        ctx.save_for_backward(centred, W)
        ctx.compute = compute
        return linear(centred, W, b) if compute == "float32" else matmul(centred, W.T, compute) + b

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (d,) = gradients  # (B, F)
        centred, W = ctx.saved_tensors
        db = d.sum(0)
        return None, matmul(d.T, centred, ctx.compute), db, -(db @ W), None


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
        (d,) = gradients  # (N,)
        centred, W = ctx.saved_tensors
        d = d.contiguous()
        db = ctx.places.sum_by_feature(d)
        return None, ctx.places.rows_by_feature(ctx.places.tokens, centred, d), db, -(db @ W), None, None


class _RowGradient(torch.autograd.Function):
    """Passes what was written through, and gives the decoder its gradient."""

    @staticmethod
    def forward(
        ctx: Any, written: torch.Tensor, W_dec: torch.Tensor, codes: torch.Tensor, bags: torch.Tensor, places: Places
    ) -> Any:
        ctx.save_for_backward(codes, bags)
        ctx.places = places
        return written.view_as(written)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (d,) = gradients  # (bags, D)
        codes, bags = ctx.saved_tensors
        rows = ctx.places.rows_by_feature(bags, d.contiguous(), codes) if ctx.needs_input_grad[1] else None
        return d, rows, None, None, None


class Places:
    """Some (token, feature) pairs of a batch, ordered by token and then by feature.

    Args:
        flat: token * F + feature, ascending.
        shape: (B, F).

    Attributes:
        tokens: (N,).
        features: (N,).
    """

    def __init__(self, flat: Int[torch.Tensor, " N"], shape: tuple[int, int]) -> None:
        self.shape = shape
        self.tokens = torch.div(flat, shape[1], rounding_mode="floor")
        self.features = flat - self.tokens * shape[1]

    @cached_property
    def _grouped(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The pairs' order by feature, and where each feature's begin."""
        counts = torch.bincount(self.features, minlength=self.shape[1])
        return self.features.argsort(stable=True), counts.cumsum(0) - counts

    def rows_by_feature(
        self, rows: Int[torch.Tensor, " N"], source: Float[torch.Tensor, "R D"], weights: Float[torch.Tensor, " N"]
    ) -> Float[torch.Tensor, "F D"]:
        """For each feature, the sum over its pairs of ``weights`` times the row of ``source`` that ``rows`` names."""
        order, starts = self._grouped
        return F.embedding_bag(rows[order], source, starts, per_sample_weights=weights[order], mode="sum")

    def sum_by_feature(self, values: Float[torch.Tensor, " N"]) -> Float[torch.Tensor, " F"]:
        """Sum of ``values`` over each feature's pairs."""
        return torch.bincount(self.features, weights=values, minlength=self.shape[1]).to(values.dtype)


class Pairs(NamedTuple):
    """The pre-activations of a few (token, feature) pairs."""

    pre: Float[torch.Tensor, " N"]
    places: Places

    def at(self, per_feature: Float[torch.Tensor, " F"]) -> Float[torch.Tensor, " N"]:
        """A number per feature, laid out as ``pre`` is."""
        return per_feature.index_select(0, self.places.features)

    def write(
        self, codes: Float[torch.Tensor, " N"], W_dec: Float[torch.Tensor, "F D"], groups: Int[torch.Tensor, " F"] | None = None
    ) -> Float[torch.Tensor, "*bags D"]:
        """What ``codes`` write, (B, D); with the group of each feature (ascending), what each group writes, (B, G, D)."""
        B, places = self.places.shape[0], self.places
        G = 1 if groups is None else int(groups[-1]) + 1
        bags = places.tokens if groups is None else places.tokens * G + groups[places.features]
        counts = torch.bincount(bags, minlength=B * G)
        starts = counts.cumsum(0) - counts
        written = F.embedding_bag(places.features, W_dec.detach(), starts, per_sample_weights=codes, mode="sum")
        written = _RowGradient.apply(written, W_dec, codes.detach(), bags, places)
        return written if groups is None else written.view(B, G, -1)

    def fired(self, active: Bool[torch.Tensor, " N"]) -> Bool[torch.Tensor, " F"]:
        """Which features are active on any token."""
        found = active.new_zeros(self.places.shape[1])
        found[self.places.features[active]] = True
        return found


class Dense(NamedTuple):
    """All pre-activations of a batch, with the interface of ``Pairs``."""

    pre: Float[torch.Tensor, "B F"]
    compute: Compute = "float32"

    def at(self, per_feature: Float[torch.Tensor, " F"]) -> Float[torch.Tensor, "B F"]:
        """A number per feature, laid out as ``pre`` is."""
        return per_feature.expand_as(self.pre)

    def write(self, codes: Float[torch.Tensor, "B F"], W_dec: Float[torch.Tensor, "F D"]) -> Float[torch.Tensor, "B D"]:
        """What ``codes`` write."""
        return matmul(codes, W_dec, self.compute)

    def fired(self, active: Bool[torch.Tensor, "B F"]) -> Bool[torch.Tensor, " F"]:
        """Which features are active on any token."""
        return active.any(0)


Reading = Dense | Pairs


class _Found(NamedTuple):
    """Codes above a floor."""

    flat: Int[torch.Tensor, " N"]
    """token * F + feature, ascending."""
    pre: Float[torch.Tensor, " N"]


def _ranked(pre: torch.Tensor, norms: torch.Tensor | None) -> torch.Tensor:
    return pre if norms is None else pre * norms


def _product(centred: torch.Tensor, weights: Weights) -> torch.Tensor:
    return linear(centred, weights.W_enc.detach(), weights.b_enc.detach())


def _above(
    centred: Float[torch.Tensor, "B D"], weights: Weights, floor: torch.Tensor | float, limit: float, compute: Compute
) -> _Found | None:
    """Codes above ``floor`` (times the norms, where there are some); None if they are more than ``limit``.

    A product of bfloat16 factors only proposes them: values, and whether they are above, are those of float32.
    """
    features, low = len(weights.b_enc), compute == "bfloat16"
    rounded = Weights(*(part.detach().bfloat16() for part in weights[:4])) if low else weights
    rows = len(centred) if centred.is_cuda else max(1, BLOCK // features)
    found, count = [], 0
    for start in range(0, len(centred), rows):
        x = centred[start : start + rows]
        pre = _product(x.bfloat16() if low else x, rounded)
        flat = (_ranked(pre, weights.norms) > floor).flatten().nonzero()[:, 0]
        count += len(flat)
        if count > limit:
            return None
        found.append((flat + start * features, pre.flatten()[flat]))
    result = _Found(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    return _exactly(result, centred, weights, floor) if low else result


def _exactly(found: _Found, centred: torch.Tensor, weights: Weights, floor: torch.Tensor | float) -> _Found:
    tokens = torch.div(found.flat, len(weights.b_enc), rounding_mode="floor")
    features = found.flat - tokens * len(weights.b_enc)
    pre = at_pairs(centred, weights.W_enc.detach(), tokens, features) + weights.b_enc.detach()[features]
    ranked = pre if weights.norms is None else pre * weights.norms[features]
    kept = ranked > (floor[features] if isinstance(floor, torch.Tensor) else floor)
    return _Found(found.flat[kept], pre[kept])


def _pairs(found: _Found, centred: torch.Tensor, weights: Weights) -> Pairs:
    places = Places(found.flat, (len(centred), len(weights.b_enc)))
    return Pairs(_ReadPairs.apply(centred, weights.W_enc, weights.b_enc, weights.b_dec, found.pre, places), places)


def read(
    x: Float[torch.Tensor, "B D"],
    weights: Weights,
    floor: Float[torch.Tensor, " F"] | float = 0.0,
    compute: Compute = "float32",
) -> Reading:
    """Pre-activations of a batch: all of them, or the pairs above a floor where these are few.

    Args:
        x: scaled batch; gets no gradient.
        weights: of the autoencoder, without norms.
        floor: pre-activations up to this cannot matter.
        compute: type of the factors of dense products.
    """
    centred = x - weights.b_dec.detach()
    few = FEW_ON_GPU if x.is_cuda else FEW
    found = _above(centred, weights, floor, few * len(x) * len(weights.b_enc), compute)
    if found is None:
        return Dense(_ReadDense.apply(centred, weights.W_enc, weights.b_enc, weights.b_dec, compute), compute)
    return _pairs(found, centred, weights)


def largest(
    x: Float[torch.Tensor, "B D"], weights: Weights, count: int, group: Group = ALONE, compute: Compute = "float32"
) -> Pairs:
    """The ``count`` largest positive pre-activations of a batch, times ``weights.norms`` where there are some.

    With several processes, ``count`` is of the whole batch and those of this process's part are given. Fewer where fewer are
    positive.
    ``pre`` of the result is not multiplied by the norms.
    """
    centred = x - weights.b_dec.detach()
    found = _find_largest(centred, weights, count, compute)
    if group.size > 1:
        values = found.pre if weights.norms is None else found.pre * weights.norms[found.flat % len(weights.b_enc)]
        chosen = pooled.largest(group, values, count)
        found = _Found(found.flat[chosen], found.pre[chosen])
    return _pairs(found, centred, weights)


def _find_largest(centred: Float[torch.Tensor, "B D"], weights: Weights, count: int, compute: Compute) -> _Found:
    """``largest`` of one process, without a graph."""
    sample = centred[:: max(1, len(centred) // SAMPLE_ROWS)]
    ranked = _ranked(_product(sample, weights), weights.norms).flatten()
    rank = min(len(ranked), 1 + round(SURPLUS * count * len(sample) / len(centred)))
    bound = float(ranked.topk(rank, sorted=False).values.min())
    found = _above(centred, weights, bound, float("inf"), compute) if bound > 0 else None
    if found is None or len(found.flat) < count:
        found = _above(centred, weights, 0.0, float("inf"), compute)
    assert found is not None  # nothing exceeds an infinite limit
    if len(found.flat) > count:
        values = found.pre if weights.norms is None else found.pre * weights.norms[found.flat % len(weights.b_enc)]
        kept = values.topk(count, sorted=False).indices.sort().values
        found = _Found(found.flat[kept], found.pre[kept])
    return found
