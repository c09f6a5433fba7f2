"""Kernels that find the k largest of F scores in each row, exactly, with ties by the lowest index.

1. A score and its index make one integer, a key, that orders as (score, -index) does, so that no two are equal.
2. ``_candidates``: one program a row takes the maxima of interleaved groups. At least k scores reach the k-th largest maximum,
   so whatever is below it is out (an exact bound; unlike a threshold from earlier batches it cannot miss). A second look at the
   row, then in cache, lists what reaches it. Scores are compared as they are: keys are made of the few that stay.
3. ``_order`` sorts the list and takes the first k. Places in the list depend on the order of threads; what is taken does not. A
   list that overflowed its capacity (many equal scores, or NaN) is not used: that row is searched k times for the next largest
   instead. Slower, and as exact.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from evalkit.dictionaries.base import SparseCodes
from evalkit.training.kernels.launch import launch, power_of_two, rows_of

LARGEST_K = 512
"""Above this the sorts would no longer fit a program's registers well."""

GROUPS = 256
"""Least number of groups; with more of them fewer scores beyond the k largest reach the bound."""

WIDE = 1024
"""Scores a program reads together: 16 bytes a thread of 4 warps, in bfloat16."""

NOTHING: tl.constexpr = tl.constexpr(-(2**63))


@no_type_check
@triton.jit
def _score(scores, bias, norms, allowed, row, column, F: tl.constexpr, NORMS: tl.constexpr, ALLOWED: tl.constexpr):
    """What is ranked, float32; -inf where there is nothing to take."""
    inside = column < F
    score = tl.load(scores + row * F + column, mask=inside, other=-float("inf")).to(tl.float32)
    score += tl.load(bias + column, mask=inside, other=0.0)
    if NORMS:
        score *= tl.load(norms + column, mask=inside, other=1.0)
    score = tl.where(score != score, float("inf"), score)
    if ALLOWED:
        score = tl.where(tl.load(allowed + column, mask=inside, other=0) != 0, score, -float("inf"))
    return score


@no_type_check
@triton.jit
def _key(score, column):
    """(score, -index) as int64; NOTHING where the score is -inf."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes -0.0 equal to 0.0
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return tl.where(score == -float("inf"), NOTHING, rank * 4294967296 + (2147483647 - column).to(tl.int64))


@no_type_check
@triton.jit
def _candidates(
    scores,
    bias,
    norms,
    allowed,
    lists,
    columns,
    lengths,
    F: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    CAPACITY: tl.constexpr,
    NORMS: tl.constexpr,
    ALLOWED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDE)
    maxima = tl.full([WIDE], -float("inf"), dtype=tl.float32)
    for start in range(0, F, WIDE):
        maxima = tl.maximum(maxima, _score(scores, bias, norms, allowed, row, start + column, F, NORMS, ALLOWED))
    ordered = tl.sort(tl.max(tl.reshape(maxima, [WIDE // GROUPS, GROUPS]), axis=0), descending=True)
    bound = tl.max(tl.where(tl.arange(0, GROUPS) == K - 1, ordered, -float("inf")), axis=0)
    one = tl.full([WIDE], 1, dtype=tl.int32)
    for start in range(0, F, WIDE):
        score = _score(scores, bias, norms, allowed, row, start + column, F, NORMS, ALLOWED)
        take = (score >= bound) & (score != -float("inf"))
        place = tl.atomic_add(lengths + row + one * 0, one, mask=take, sem="relaxed")
        take = take & (place < CAPACITY)
        tl.store(lists + row * CAPACITY + place, score, mask=take)
        tl.store(columns + row * CAPACITY + place, start + column, mask=take)


@no_type_check
@triton.jit
def _write(key, j, scores, bias, values, indices, row, F: tl.constexpr, K: tl.constexpr, RELU: tl.constexpr):
    """Value and index of the keys of a row that take places j of its result."""
    empty = key == NOTHING
    column = tl.where(empty, 0, 2147483647 - (key & 2147483647)).to(tl.int32)
    value = tl.load(scores + row * F + column, mask=j < K, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=j < K, other=0.0)
    value = tl.where(empty, 0.0, value)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # unlike a maximum, this keeps NaN
    tl.store(values + row * K + j, value, mask=j < K)
    tl.store(indices + row * K + j, column, mask=j < K)


@no_type_check
@triton.jit
def _order(
    scores,
    bias,
    norms,
    allowed,
    lists,
    columns,
    lengths,
    values,
    indices,
    F: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    CAPACITY: tl.constexpr,
    NORMS: tl.constexpr,
    ALLOWED: tl.constexpr,
    RELU: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row)
    if length <= CAPACITY:
        place = tl.arange(0, CAPACITY)
        score = tl.load(lists + row * CAPACITY + place, mask=place < length, other=-float("inf"))
        listed = _key(score, tl.load(columns + row * CAPACITY + place, mask=place < length, other=0))
        _write(tl.sort(listed, descending=True), place, scores, bias, values, indices, row, F, K, RELU)
    else:
        column = tl.arange(0, WIDE)
        last = tl.full([1], 9223372036854775807, dtype=tl.int64)
        j = length * 0
        while j < K:
            best = tl.full([WIDE], NOTHING, dtype=tl.int64)
            for start in range(0, F, WIDE):
                score = _score(scores, bias, norms, allowed, row, start + column, F, NORMS, ALLOWED)
                key = _key(score, start + column)
                best = tl.maximum(best, tl.where(key < last, key, NOTHING))
            last = tl.zeros([1], dtype=tl.int64) + tl.max(best, axis=0)
            _write(last, j + tl.zeros([1], dtype=tl.int32), scores, bias, values, indices, row, F, K, RELU)
            j += 1


def select(
    scores: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    norms: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    relu: bool = True,
) -> SparseCodes:
    """``oracles.select``: values (B, k) float32 and indices (B, k) int32 of the k largest of scores (B, F) + bias (F,)."""
    B, F = scores.shape
    values = torch.empty(B, k, dtype=torch.float32, device=scores.device)
    indices = torch.empty(B, k, dtype=torch.int32, device=scores.device)
    capacity = power_of_two(4 * k)
    groups = max(GROUPS, capacity)
    lists = torch.empty(B, capacity, dtype=torch.float32, device=scores.device)
    columns = torch.empty(B, capacity, dtype=torch.int32, device=scores.device)
    lengths = torch.zeros(B, dtype=torch.int32, device=scores.device)
    marks = bias if allowed is None else rows_of(allowed).view(torch.uint8)
    read = (rows_of(scores), rows_of(bias), bias if norms is None else rows_of(norms), marks, lists, columns, lengths)
    flags = {"NORMS": norms is not None, "ALLOWED": allowed is not None}
    shape = {"F": F, "K": k, "GROUPS": groups, "WIDE": max(WIDE, groups), "CAPACITY": capacity, **flags}
    launch(_candidates, (B,), *read, **shape, num_warps=4 if groups <= 1024 else 8)
    launch(_order, (B,), *read, values, indices, **shape, RELU=relu, num_warps=4 if capacity > 128 else 1)
    return SparseCodes(values, indices)
