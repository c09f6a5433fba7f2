"""The kernels' operations in plain PyTorch: what each must give, and what runs where Triton cannot.

1. ``decode_error`` and ``dots`` read k rows of W a token; ``select`` takes the k largest scores, ties by the lowest index.
2. ``by_feature`` sorts the B * K pairs (token, feature) by feature, stably; ``segment_sums`` adds up what each feature's pairs
   say of its two rows.
3. ``adam_features`` and ``adam_vector`` are Adam (Kingma and Ba 2015, arXiv 1412.6980, as torch.optim computes it) with the
   unit-norm constraint on decoder rows; ``row_squares`` is what clipping needs before it.

Nothing here waits for the device or depends on the order of threads: sums over pairs go through sorted bags.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int

from evalkit.dictionaries.base import SparseCodes


class Decoded(NamedTuple):
    """A decoded batch, held against its target."""

    residual: Float[torch.Tensor, "B D"]
    """Target minus what the codes write."""
    squares: Float[torch.Tensor, " B"]
    """Squared length of each residual, float32."""
    dots: Float[torch.Tensor, "B K"]
    """Residual times each code's row of W, float32."""


class Pairs(NamedTuple):
    """Pairs (token, feature) in the order of features; pairs that do not count stand behind them."""

    order: Int[torch.Tensor, " P"]
    """Positions of the pairs, by feature, and by position within a feature."""
    counts: Int[torch.Tensor, " F"]
    """Pairs of each feature, int32."""


class Sums(NamedTuple):
    """Gradients from pairs. Rows of features without pairs are undefined in the matrices (``Pairs.counts`` tells) and 0 in b."""

    decoder: Float[torch.Tensor, "F D"]
    encoder: Float[torch.Tensor, "F D"] | None
    bias: Float[torch.Tensor, " F"] | None


class Moments(NamedTuple):
    """A parameter with its gradient and Adam's moments, all float32 and of one shape."""

    weight: Float[torch.Tensor, "*shape"]
    gradient: Float[torch.Tensor, "*shape"]
    first: Float[torch.Tensor, "*shape"]
    second: Float[torch.Tensor, "*shape"]


class Adam(NamedTuple):
    """What an update needs besides; the first is on the device, so that a CUDA graph can follow a schedule."""

    rates: Float[torch.Tensor, 3]
    """lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), and what gradients are multiplied by (clipping)."""
    beta1: float
    beta2: float
    eps: float


def decode(
    values: Float[torch.Tensor, "B K"], indices: Int[torch.Tensor, "B K"], W: Float[torch.Tensor, "F D"]
) -> Float[torch.Tensor, "B D"]:
    """Sum of ``values`` times the rows of ``W`` at ``indices``, float32."""
    return F.embedding_bag(indices.long(), W.float(), per_sample_weights=values.float(), mode="sum")


def dots(
    rows: Float[torch.Tensor, "B D"], indices: Int[torch.Tensor, "B K"], W: Float[torch.Tensor, "F D"]
) -> Float[torch.Tensor, "B K"]:
    """Each token's row times the rows of ``W`` at its indices, float32."""
    return torch.einsum("bd,bkd->bk", rows.float(), W.float()[indices.long()])


def decode_error(
    values: Float[torch.Tensor, "B K"],
    indices: Int[torch.Tensor, "B K"],
    W: Float[torch.Tensor, "F D"],
    x: Float[torch.Tensor, "B D"],
    b_dec: Float[torch.Tensor, " D"],
    keep: torch.dtype,
) -> Decoded:
    """x minus the decoded codes and ``b_dec``, its squared lengths, and its products with the rows that wrote it.

    Args:
        keep: type the residual is kept in; lengths and products come from the float32 one.
    """
    residual = x.float() - decode(values, indices, W) - b_dec.float()
    return Decoded(residual.to(keep), residual.square().sum(1), dots(residual, indices, W))


def select(
    scores: Float[torch.Tensor, "B F"],
    bias: Float[torch.Tensor, " F"],
    k: int,
    norms: Float[torch.Tensor, " F"] | None = None,
    allowed: Bool[torch.Tensor, " F"] | None = None,
    relu: bool = True,
) -> SparseCodes:
    """The k largest of scores + bias in each row, largest first; ties go to the lowest index.

    Args:
        norms: features' weights in the choice, not in the values.
        allowed: features that may be chosen. Places that nothing can fill hold value 0 and index 0.
        relu: whether values below 0 become 0.

    Returns:
        values (B, k) float32 and indices (B, k) int32.
    """
    pre = scores.float() + bias
    ranked = pre if norms is None else pre * norms
    if allowed is not None:
        ranked = ranked.masked_fill(~allowed, -torch.inf)
    if k > ranked.shape[1]:
        ranked = F.pad(ranked, (0, k - ranked.shape[1]), value=-torch.inf)
    # a NaN is the largest, so that a run that diverges is seen to
    best = ranked.nan_to_num(torch.inf, torch.inf, -torch.inf).sort(dim=1, descending=True, stable=True)
    indices = best.indices[:, :k]
    empty = best.values[:, :k] == -torch.inf
    indices = indices.masked_fill(empty, 0)
    values = pre.gather(1, indices).masked_fill(empty, 0.0)
    return SparseCodes(torch.where(values < 0, 0.0, values) if relu else values, indices.int())


def by_feature(indices: Int[torch.Tensor, " P"], live: Bool[torch.Tensor, " P"], features: int) -> Pairs:
    """The pairs in order of their feature; those that are not ``live`` go last and are not counted."""
    keys = torch.where(live, indices.int(), features)
    return Pairs(keys.argsort(stable=True), counts(keys, features))


def counts(keys: Int[torch.Tensor, " P"], features: int) -> Int[torch.Tensor, " F"]:
    """How often each of 0..features-1 occurs in ``keys``, int32; other keys are left out."""
    clamped = keys.long().clamp(max=features)
    return torch.zeros(features + 1, dtype=torch.int32, device=keys.device).index_add_(
        0, clamped, torch.ones_like(clamped, dtype=torch.int32)
    )[:features]


def segment_sums(
    pairs: Pairs,
    dec_values: Float[torch.Tensor, " P"],
    dec_rows: Int[torch.Tensor, " P"],
    dec_source: Float[torch.Tensor, "M D"],
    enc_values: Float[torch.Tensor, " P"] | None = None,
    enc_rows: Int[torch.Tensor, " P"] | None = None,
    enc_source: Float[torch.Tensor, "N D"] | None = None,
) -> Sums:
    """For each feature, the sum over its pairs of value * source[row], for two sets of values at once, in float32.

    Args:
        dec_values: by pair, in the pairs' first order.
        dec_rows: row of ``dec_source`` of each pair.
        enc_values: the other set; its plain sums are ``Sums.bias``.
    """
    total = pairs.counts.long().cumsum(0)
    starts = total - pairs.counts
    # what does not count stands at the end and would fall into the last bag
    weigh = (torch.arange(len(pairs.order), device=total.device) < total[-1:]).float()

    def bags(values: torch.Tensor, rows: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        weights = torch.where(weigh > 0, values.float()[pairs.order], 0.0)
        return F.embedding_bag(rows.long()[pairs.order], source.float(), starts, per_sample_weights=weights, mode="sum")

    decoder = bags(dec_values, dec_rows, dec_source)
    if enc_values is None or enc_rows is None or enc_source is None:
        return Sums(decoder, None, None)
    ones = torch.ones(1, 1, device=total.device)
    bias = bags(enc_values, torch.zeros_like(enc_rows), ones)[:, 0]
    return Sums(decoder, bags(enc_values, enc_rows, enc_source), bias)


def along_rows(gradient: Float[torch.Tensor, "F D"], weight: Float[torch.Tensor, "F D"]) -> Float[torch.Tensor, "F D"]:
    """The part of each gradient row that would only change the length of a unit row."""
    return (gradient * weight).sum(1, keepdim=True) * weight


def row_squares(
    decoder: Float[torch.Tensor, "F D"],
    encoder: Float[torch.Tensor, "F D"],
    counts: Int[torch.Tensor, " F"],
    unit: Float[torch.Tensor, "F D"] | None = None,
) -> Float[torch.Tensor, " F"]:
    """Squared length of each feature's two gradient rows together; 0 where the feature has no pairs.

    Args:
        unit: decoder rows of unit length, whose direction is taken out of the decoder's gradient first.
    """
    if unit is not None:
        decoder = decoder - along_rows(decoder, unit)
    both = decoder.square().sum(1) + encoder.square().sum(1)
    return torch.where(counts > 0, both, 0.0)


def adam_vector(p: Moments, adam: Adam) -> None:
    """One step of Adam, in place."""
    gradient = p.gradient * adam.rates[2]
    p.first.lerp_(gradient, 1 - adam.beta1)
    p.second.mul_(adam.beta2).addcmul_(gradient, gradient, value=1 - adam.beta2)
    p.weight.sub_(adam.rates[0] * p.first / (p.second.sqrt() * adam.rates[1] + adam.eps))


def adam_features(
    decoder: Moments,
    encoder: Moments,
    bias: Moments,
    counts: Int[torch.Tensor, " F"],
    adam: Adam,
    unit: bool,
    dec_shadow: Float[torch.Tensor, "F D"] | None = None,
    enc_shadow: Float[torch.Tensor, "F D"] | None = None,
    norms: Float[torch.Tensor, " F"] | None = None,
) -> None:
    """One step of Adam on what belongs to features, in place; gradients of features without pairs are taken as 0.

    Args:
        unit: remove the decoder gradient's part along each row first, and rescale the row to length 1 after.
        dec_shadow: copies of the matrices in another type, brought up to date.
        norms: decoder row lengths, brought up to date.
    """
    touched = (counts > 0)[:, None]
    dec, enc = (m._replace(gradient=torch.where(touched, m.gradient, 0.0)) for m in (decoder, encoder))
    if unit:
        dec = dec._replace(gradient=dec.gradient - along_rows(dec.gradient, dec.weight))
    adam_vector(dec, adam)
    adam_vector(enc, adam)
    adam_vector(bias._replace(gradient=torch.where(touched[:, 0], bias.gradient, 0.0)), adam)
    if unit:
        dec.weight.div_(dec.weight.norm(dim=1, keepdim=True))
    for shadow, weight in ((dec_shadow, dec.weight), (enc_shadow, enc.weight)):
        if shadow is not None:
            shadow.copy_(weight)
    if norms is not None:
        norms.copy_(dec.weight.norm(dim=1))
