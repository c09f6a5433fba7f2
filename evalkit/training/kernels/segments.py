"""Kernels for weight gradients: sums over the pairs (token, feature) of each feature, without float atomics.

1. Pairs are sorted by feature (a stable radix sort of B * K integers); ``counts`` gives each feature's stretch.
2. A stretch is cut into chunks of ``CHUNK`` pairs, because how often features fire is heavy-tailed: ``_plan`` writes whose each
   chunk is, and which features have several. The tables have a fixed capacity, so nothing waits for the device.
3. ``_sum``: one program a chunk and block of columns reads the tokens' rows once and adds value * row for both matrices. A row of
   the block is 16 bytes a thread, so that each thread adds up its own columns and nothing is exchanged. A lone chunk writes its
   feature's gradient; others write partial sums.
4. ``_combine`` adds the partial sums of a feature in the order of its chunks.

Every sum has one fixed order: equal inputs give equal bits. Rows of features without pairs are never written.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from evalkit.training.kernels.counts import counts
from evalkit.training.kernels.launch import launch, power_of_two, rows_of
from evalkit.training.kernels.oracles import Pairs, Sums

CHUNK = 64
"""Pairs a program adds up."""

BLOCK_P = 4
"""Pairs it reads together."""

WARP_D = 256
"""Columns a warp adds up: 16 bytes of bfloat16 a thread. With more warps a block of rows would be split among them, and each
sum would have to be exchanged: many times slower (results/reference/benchmarks/kernels-gpu.md)."""

WIDE_D = 1024
"""Columns of a row from which on two warps share a program."""

PLAN = 128
"""Features a program of ``_plan`` writes the chunks of."""


@no_type_check
@triton.jit
def _plan(chunks, chunk_ends, hot_ends, chunk_feature, hot_feature, features, BLOCK: tl.constexpr):
    feature = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features
    n = tl.load(chunks + feature, mask=inside, other=0)
    first = tl.load(chunk_ends + feature, mask=inside, other=0) - n
    part = 0
    most = tl.max(n, axis=0)
    while part < most:
        tl.store(chunk_feature + first + part, feature, mask=part < n)
        part += 1
    rank = tl.load(hot_ends + feature, mask=inside, other=1) - 1
    tl.store(hot_feature + rank, feature, mask=inside & (n > 1))


@no_type_check
@triton.jit
def _sum(
    order,
    dec_values,
    dec_rows,
    dec_source,
    enc_values,
    enc_rows,
    enc_source,
    counts,
    ends,
    chunks,
    chunk_ends,
    slot_ends,
    chunk_feature,
    decoder,
    encoder,
    bias,
    dec_parts,
    enc_parts,
    bias_parts,
    features,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BOTH: tl.constexpr,
):
    chunk = tl.program_id(0)
    feature = tl.load(chunk_feature + chunk)
    if feature < features:
        n = tl.load(chunks + feature)
        part = chunk - (tl.load(chunk_ends + feature) - n)
        end = tl.load(ends + feature)
        position = end - tl.load(counts + feature) + part * CHUNK
        last = tl.minimum(position + CHUNK, end)
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = columns < D
        dec = tl.zeros([BLOCK_D], dtype=tl.float32)
        enc = tl.zeros([BLOCK_D], dtype=tl.float32)
        plain = tl.zeros([BLOCK_P], dtype=tl.float32)
        while position < last:
            p = position + tl.arange(0, BLOCK_P)
            held = p < last
            pair = tl.load(order + p, mask=held, other=0)
            tile = held[:, None] & inside[None, :]
            value = tl.load(dec_values + pair, mask=held, other=0.0).to(tl.float32)
            row = tl.load(dec_rows + pair, mask=held, other=0).to(tl.int64)
            source = tl.load(dec_source + row[:, None] * D + columns[None, :], mask=tile, other=0.0).to(tl.float32)
            dec += tl.sum(value[:, None] * source, axis=0)
            if BOTH:
                value = tl.load(enc_values + pair, mask=held, other=0.0).to(tl.float32)
                row = tl.load(enc_rows + pair, mask=held, other=0).to(tl.int64)
                source = tl.load(enc_source + row[:, None] * D + columns[None, :], mask=tile, other=0.0).to(tl.float32)
                enc += tl.sum(value[:, None] * source, axis=0)
                plain += value
            position += BLOCK_P
        if n == 1:
            at = feature.to(tl.int64) * D + columns
            tl.store(decoder + at, dec, mask=inside)
            if BOTH:
                tl.store(encoder + at, enc, mask=inside)
                if tl.program_id(1) == 0:
                    tl.store(bias + feature, tl.sum(plain, axis=0))
        else:
            slot = tl.load(slot_ends + feature) - n + part
            at = slot.to(tl.int64) * D + columns
            tl.store(dec_parts + at, dec, mask=inside)
            if BOTH:
                tl.store(enc_parts + at, enc, mask=inside)
                if tl.program_id(1) == 0:
                    tl.store(bias_parts + slot, tl.sum(plain, axis=0))


@no_type_check
@triton.jit
def _combine(
    chunks,
    slot_ends,
    hot_feature,
    decoder,
    encoder,
    bias,
    dec_parts,
    enc_parts,
    bias_parts,
    features,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BOTH: tl.constexpr,
):
    feature = tl.load(hot_feature + tl.program_id(0))
    if feature < features:
        end = tl.load(slot_ends + feature)
        slot = end - tl.load(chunks + feature)
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = columns < D
        dec = tl.zeros([BLOCK_D], dtype=tl.float32)
        enc = tl.zeros([BLOCK_D], dtype=tl.float32)
        plain = tl.zeros([1], dtype=tl.float32)
        while slot < end:
            at = slot.to(tl.int64) * D + columns
            dec += tl.load(dec_parts + at, mask=inside, other=0.0)
            if BOTH:
                enc += tl.load(enc_parts + at, mask=inside, other=0.0)
                plain += tl.load(bias_parts + slot)
            slot += 1
        at = feature.to(tl.int64) * D + columns
        tl.store(decoder + at, dec, mask=inside)
        if BOTH:
            tl.store(encoder + at, enc, mask=inside)
            if tl.program_id(1) == 0:
                tl.store(bias + feature, tl.sum(plain, axis=0))


class _Tables(NamedTuple):
    """Where each feature's pairs, chunks and partial sums lie."""

    ends: torch.Tensor
    chunks: torch.Tensor
    chunk_ends: torch.Tensor
    slot_ends: torch.Tensor
    chunk_feature: torch.Tensor
    hot_feature: torch.Tensor
    slots: int


def _tables(pairs: Pairs) -> _Tables:
    features, n = len(pairs.counts), len(pairs.order)
    chunks = (pairs.counts + (CHUNK - 1)) // CHUNK
    hot = chunks > 1
    stacked = torch.stack([pairs.counts, chunks, torch.where(hot, chunks, 0), hot.int()])
    # one long scan, which fills a GPU as four short ones do not; each row then begins at 0 again
    ends = stacked.flatten().cumsum(0, dtype=torch.int32).view_as(stacked)
    ends[1:] -= ends[:-1, -1:].clone()
    # a feature with m pairs has at most 1 + m / CHUNK chunks, and a hot one, having more than CHUNK pairs, less than 2 m / CHUNK
    capacity, hot_capacity = min(features, n) + n // CHUNK, max(1, n // CHUNK)
    chunk_feature = torch.full((capacity,), features, dtype=torch.int32, device=chunks.device)
    hot_feature = torch.full((hot_capacity,), features, dtype=torch.int32, device=chunks.device)
    grid = (triton.cdiv(features, PLAN),)
    launch(_plan, grid, chunks, ends[1], ends[3], chunk_feature, hot_feature, features, BLOCK=PLAN, num_warps=1)
    return _Tables(ends[0], chunks, ends[1], ends[2], chunk_feature, hot_feature, max(1, 2 * n // CHUNK))


def by_feature(indices: torch.Tensor, live: torch.Tensor, features: int) -> Pairs:
    """``oracles.by_feature``: the pairs (P,) in order of their feature, with counts (F,) int32."""
    keys = torch.where(live, indices.int(), features)
    return Pairs(keys.argsort(stable=True), counts(keys, features))


def segment_sums(
    pairs: Pairs,
    dec_values: torch.Tensor,
    dec_rows: torch.Tensor,
    dec_source: torch.Tensor,
    enc_values: torch.Tensor | None = None,
    enc_rows: torch.Tensor | None = None,
    enc_source: torch.Tensor | None = None,
) -> Sums:
    """``oracles.segment_sums``: gradients (F, D), (F, D) and (F,) from values and rows (P,) and sources (M, D), (N, D)."""
    features, d = len(pairs.counts), dec_source.shape[1]
    both = enc_values is not None and enc_rows is not None and enc_source is not None
    tables = _tables(pairs)
    made: dict[str, Any] = {"dtype": torch.float32, "device": dec_source.device}
    decoder, dec_parts = torch.empty(features, d, **made), torch.empty(tables.slots, d, **made)
    encoder, enc_parts = (torch.empty_like(decoder), torch.empty_like(dec_parts)) if both else (decoder, dec_parts)
    bias, bias_parts = torch.zeros(features, **made), torch.empty(tables.slots, **made)
    first = [rows_of(t) for t in (dec_values, dec_rows, dec_source)]
    second = [rows_of(t) for t in (enc_values, enc_rows, enc_source) if t is not None] if both else first
    outputs = (decoder, encoder, bias, dec_parts, enc_parts, bias_parts)
    warps = 1 if d < WIDE_D else 2
    block_d = min(power_of_two(d), warps * WARP_D)
    columns = triton.cdiv(d, block_d)
    where = (pairs.counts, tables.ends, tables.chunks, tables.chunk_ends, tables.slot_ends, tables.chunk_feature)
    shape = {"D": d, "BLOCK_D": block_d, "BOTH": both, "num_warps": warps}
    grid = (len(tables.chunk_feature), columns)
    launch(_sum, grid, pairs.order, *first, *second, *where, *outputs, features, CHUNK=CHUNK, BLOCK_P=BLOCK_P, **shape)
    hot_grid = (len(tables.hot_feature), columns)
    launch(_combine, hot_grid, tables.chunks, tables.slot_ends, tables.hot_feature, *outputs, features, **shape)
    return Sums(decoder, encoder if both else None, bias if both else None)
