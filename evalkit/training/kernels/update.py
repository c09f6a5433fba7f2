"""Kernels that update parameters: Adam, the decoder's constraint and the copies in another type, in one pass over memory.

1. ``_features``: one program a feature holds its decoder row in registers: clipping, removal of the gradient's part along the
   row, Adam, rescaling to length 1, the row's copy; then the encoder row and the encoder bias. Features without pairs have a zero
   gradient that is not read; their moments decay and move the weights as in exact Adam.
2. ``_vector``: the same without a constraint, for the decoder bias.
3. ``_squares``: squared lengths of the gradient rows, what clipping by the global norm must know before.

Adam is Kingma and Ba 2015 (arXiv 1412.6980) in the order of operations of torch.optim. The learning rate comes from device
memory, so that a CUDA graph can follow a schedule. Moved a parameter: 30 bytes, with its gradient and a 2-byte copy.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from evalkit.training.kernels.launch import launch, power_of_two
from evalkit.training.kernels.oracles import Adam, Moments

BLOCK = 1024


@no_type_check
@triton.jit
def _adam(weight, gradient, first, second, at, mask, step, inverse, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    """The moved weight; the moments are stored."""
    m = tl.load(first + at, mask=mask, other=0.0)
    v = tl.load(second + at, mask=mask, other=0.0)
    m += (gradient - m) * (1 - BETA1)
    v = v * BETA2 + gradient * gradient * (1 - BETA2)
    tl.store(first + at, m, mask=mask)
    tl.store(second + at, v, mask=mask)
    return weight - step * (m / (tl.sqrt(v) * inverse + EPS))


@no_type_check
@triton.jit
def _features(
    dec,
    dec_gradient,
    dec_first,
    dec_second,
    enc,
    enc_gradient,
    enc_first,
    enc_second,
    bias,
    bias_gradient,
    bias_first,
    bias_second,
    counts,
    rates,
    dec_shadow,
    enc_shadow,
    norms,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    UNIT: tl.constexpr,
    SHADOW: tl.constexpr,
    NORMS: tl.constexpr,
):
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    at = feature * D + columns
    inside = columns < D
    step = tl.load(rates)
    inverse = tl.load(rates + 1)
    clip = tl.load(rates + 2)
    read = tl.where(tl.load(counts + feature) > 0, D, 0)  # columns of the gradient that are defined

    w = tl.load(dec + at, mask=inside, other=0.0)
    g = tl.load(dec_gradient + at, mask=columns < read, other=0.0) * clip
    if UNIT:
        g -= tl.sum(g * w, axis=0) * w
    w = _adam(w, g, dec_first, dec_second, at, inside, step, inverse, BETA1, BETA2, EPS)
    if UNIT:
        w = w / tl.sqrt(tl.sum(tl.where(inside, w * w, 0.0), axis=0))
    tl.store(dec + at, w, mask=inside)
    if SHADOW:
        tl.store(dec_shadow + at, w.to(dec_shadow.dtype.element_ty), mask=inside)
    if NORMS:
        tl.store(norms + feature, tl.sqrt(tl.sum(tl.where(inside, w * w, 0.0), axis=0)))

    w = tl.load(enc + at, mask=inside, other=0.0)
    g = tl.load(enc_gradient + at, mask=columns < read, other=0.0) * clip
    w = _adam(w, g, enc_first, enc_second, at, inside, step, inverse, BETA1, BETA2, EPS)
    tl.store(enc + at, w, mask=inside)
    if SHADOW:
        tl.store(enc_shadow + at, w.to(enc_shadow.dtype.element_ty), mask=inside)

    one = tl.arange(0, 1)
    w = tl.load(bias + feature + one)
    g = tl.load(bias_gradient + feature + one, mask=one < read, other=0.0) * clip
    w = _adam(w, g, bias_first, bias_second, feature + one, one == 0, step, inverse, BETA1, BETA2, EPS)
    tl.store(bias + feature + one, w)


@no_type_check
@triton.jit
def _vector(
    weight,
    gradient,
    first,
    second,
    rates,
    n,
    BLOCK: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    w = tl.load(weight + at, mask=inside, other=0.0)
    g = tl.load(gradient + at, mask=inside, other=0.0) * tl.load(rates + 2)
    w = _adam(w, g, first, second, at, inside, tl.load(rates), tl.load(rates + 1), BETA1, BETA2, EPS)
    tl.store(weight + at, w, mask=inside)


@no_type_check
@triton.jit
def _squares(decoder, encoder, counts, unit, out, D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr):
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    read = columns < tl.where(tl.load(counts + feature) > 0, D, 0)
    dec = tl.load(decoder + feature * D + columns, mask=read, other=0.0)
    enc = tl.load(encoder + feature * D + columns, mask=read, other=0.0)
    if UNIT:
        w = tl.load(unit + feature * D + columns, mask=read, other=0.0)
        dec -= tl.sum(dec * w, axis=0) * w
    tl.store(out + feature, tl.sum(dec * dec, axis=0) + tl.sum(enc * enc, axis=0))


def _warps(block: int) -> int:
    """One for 64 columns a thread: of 1, 2, 4, 8 and 16 the fastest at 512 and 2304 columns on an H200."""
    return max(1, min(16, block // 2048))


def row_squares(
    decoder: torch.Tensor, encoder: torch.Tensor, counts: torch.Tensor, unit: torch.Tensor | None = None
) -> torch.Tensor:
    """``oracles.row_squares``: (F,) from gradients (F, D) and counts (F,)."""
    features, d = decoder.shape
    out = torch.empty(features, dtype=torch.float32, device=decoder.device)
    block = power_of_two(d)
    tensors = (decoder, encoder, counts, decoder if unit is None else unit, out)
    launch(_squares, (features,), *tensors, D=d, BLOCK_D=block, UNIT=unit is not None, num_warps=_warps(block))
    return out


def adam_vector(p: Moments, adam: Adam) -> None:
    """``oracles.adam_vector``: one step of Adam on a vector (N,), in place."""
    n = p.weight.numel()
    settings = {"BETA1": adam.beta1, "BETA2": adam.beta2, "EPS": adam.eps}
    launch(_vector, (triton.cdiv(n, BLOCK),), *p, adam.rates, n, BLOCK=BLOCK, **settings, num_warps=4)


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
    """``oracles.adam_features``: one step of Adam on rows (F, D) and biases (F,), in place. Tensors must be contiguous."""
    features, d = decoder.weight.shape
    block = power_of_two(d)
    shadows = (decoder.weight, encoder.weight) if dec_shadow is None or enc_shadow is None else (dec_shadow, enc_shadow)
    flags = {"UNIT": unit, "SHADOW": dec_shadow is not None and enc_shadow is not None, "NORMS": norms is not None}
    settings = {"D": d, "BLOCK_D": block, "BETA1": adam.beta1, "BETA2": adam.beta2, "EPS": adam.eps, **flags}
    tensors = (*decoder, *encoder, *bias, counts, adam.rates, *shadows, bias.weight if norms is None else norms)
    launch(_features, (features,), *tensors, **settings, num_warps=_warps(block))
