"""Operations of the trainer's sparse products: by Triton where it can run on the tensors, else by their PyTorch twins.

Signatures, shapes and meaning are those of ``oracles``.
"""

from __future__ import annotations

import torch

from evalkit.dictionaries.base import SparseCodes
from evalkit.training.kernels import oracles
from evalkit.training.kernels.available import ready
from evalkit.training.kernels.oracles import Adam, Decoded, Moments, Pairs, Sums


def decode(values: torch.Tensor, indices: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """Sum of ``values`` (B, K) times the rows of ``W`` (F, D) at ``indices`` (B, K): (B, D) float32."""
    if not ready(W):
        return oracles.decode(values, indices, W)
    from evalkit.training.kernels import gather

    return gather.decode(values, indices, W)


def dots(rows: torch.Tensor, indices: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """Each token's row (B, D) times the rows of ``W`` (F, D) at its indices (B, K): (B, K) float32."""
    if not ready(W):
        return oracles.dots(rows, indices, W)
    from evalkit.training.kernels import gather

    return gather.dots(rows, indices, W)


def decode_error(
    values: torch.Tensor, indices: torch.Tensor, W: torch.Tensor, x: torch.Tensor, b_dec: torch.Tensor, keep: torch.dtype
) -> Decoded:
    """x (B, D) minus the decoded codes and ``b_dec``, with its squared lengths and its products with the rows used."""
    if not ready(W):
        return oracles.decode_error(values, indices, W, x, b_dec, keep)
    from evalkit.training.kernels import gather

    return gather.decode_error(values, indices, W, x, b_dec, keep)


def select(
    scores: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    norms: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    relu: bool = True,
) -> SparseCodes:
    """The k largest of scores (B, F) + bias (F,) as values float32 and indices int32 (B, k).

    For k above ``select.LARGEST_K`` on a CUDA device, torch.topk chooses, and which of several equal scores it takes is its own.
    """
    if ready(scores):
        from evalkit.training.kernels import select as kernel

        if k <= kernel.LARGEST_K:
            return kernel.select(scores, bias, k, norms, allowed, relu)
    return (_by_topk if scores.is_cuda else oracles.select)(scores, bias, k, norms, allowed, relu)


def _by_topk(
    scores: torch.Tensor, bias: torch.Tensor, k: int, norms: torch.Tensor | None, allowed: torch.Tensor | None, relu: bool
) -> SparseCodes:
    pre = scores.float() + bias
    ranked = pre if norms is None else pre * norms
    if allowed is not None:
        ranked = ranked.masked_fill(~allowed, -torch.inf)
    best = ranked.topk(k, dim=1)
    empty = best.values == -torch.inf
    indices = best.indices.masked_fill(empty, 0)
    values = pre.gather(1, indices).masked_fill(empty, 0.0)
    return SparseCodes(torch.where(values < 0, 0.0, values) if relu else values, indices.int())


def by_feature(indices: torch.Tensor, live: torch.Tensor, features: int) -> Pairs:
    """The pairs (P,) in order of their feature, those that are not ``live`` last and uncounted."""
    if not ready(indices):
        return oracles.by_feature(indices, live, features)
    from evalkit.training.kernels import segments

    return segments.by_feature(indices, live, features)


def counts(keys: torch.Tensor, features: int) -> torch.Tensor:
    """How often each of 0..features-1 occurs in ``keys`` (P,): (F,) int32."""
    if not ready(keys):
        return oracles.counts(keys, features)
    from evalkit.training.kernels import counts as kernel

    return kernel.counts(keys, features)


def segment_sums(
    pairs: Pairs,
    dec_values: torch.Tensor,
    dec_rows: torch.Tensor,
    dec_source: torch.Tensor,
    enc_values: torch.Tensor | None = None,
    enc_rows: torch.Tensor | None = None,
    enc_source: torch.Tensor | None = None,
) -> Sums:
    """For each feature, the sum over its pairs of value * source[row], for two sets of values at once."""
    if not ready(dec_source):
        return oracles.segment_sums(pairs, dec_values, dec_rows, dec_source, enc_values, enc_rows, enc_source)
    from evalkit.training.kernels import segments

    return segments.segment_sums(pairs, dec_values, dec_rows, dec_source, enc_values, enc_rows, enc_source)


def row_squares(
    decoder: torch.Tensor, encoder: torch.Tensor, counts: torch.Tensor, unit: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared length (F,) of each feature's two gradient rows; 0 where ``counts`` is."""
    if not ready(decoder):
        return oracles.row_squares(decoder, encoder, counts, unit)
    from evalkit.training.kernels import update

    return update.row_squares(decoder, encoder, counts, unit)


def adam_vector(p: Moments, adam: Adam) -> None:
    """One step of Adam, in place."""
    if not ready(p.weight):
        oracles.adam_vector(p, adam)
        return
    from evalkit.training.kernels import update

    update.adam_vector(p, adam)


def adam_features(
    decoder: Moments,
    encoder: Moments,
    bias: Moments,
    counts: torch.Tensor,
    adam: Adam,
    unit: bool,
    dec_shadow: torch.Tensor | None = None,
    enc_shadow: torch.Tensor | None = None,
    norms: torch.Tensor | None = None,
) -> None:
    """One step of Adam on rows and biases of all features, in place, with the decoder's constraint where ``unit``."""
    arguments = (decoder, encoder, bias, counts, adam, unit, dec_shadow, enc_shadow, norms)
    if not ready(decoder.weight):
        oracles.adam_features(*arguments)
        return
    from evalkit.training.kernels import update

    update.adam_features(*arguments)
