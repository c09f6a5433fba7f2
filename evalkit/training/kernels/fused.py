"""Kernels that encode and select in one: the k largest codes of each token, without ever writing its F pre-activations.

1. ``_bounds``: every ``STRIDE``-th feature's score is computed by an ordinary product. The ``rank``-th largest of these is a
   bound that, features being in no order, more than k scores of the row reach and few more than ``rank`` * ``STRIDE``.
2. ``_propose``: a tiled product x W^T whose tiles stay in registers. What reaches its row's bound goes to the end of the row's
   list; the rest is forgotten.
3. ``_best``: one program a row takes the k largest of the list, as integers that order as (score, -index, place) does. That is
   exact where at least k scores were listed and none was lost, since all equal to the k-th reach the bound with it. Any other
   row is written down for a second look.
4. ``_rescue``: for those rows alone the product is made in full, some rows at a time, and ``select`` searches it. Where there are
   none, which is usual, its programs end at once: the host is never asked how many there are.

The bound decides about speed only. Places in a list depend on the order of threads; what is taken from it does not.

Ties: scores are float32 sums of exact products, plus the bias in float32; equal ones are taken by the lowest index. With bfloat16
factors the unfused way ranks sums that a matrix product rounded to bfloat16, of which many are equal at the k-th place (by the
lowest index again): there this way takes the truly larger ones.

The design follows the exact filter of candidates in ``select``, moved into the product's epilogue. On an H200 it was slower than
a cuBLAS product and ``select`` at widths 256 and 512, so that it is used only where it is asked for (``compute.FUSE``).
"""

from __future__ import annotations

import math
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from evalkit.dictionaries.base import SparseCodes
from evalkit.training.kernels import interpreting, select
from evalkit.training.kernels.launch import launch, power_of_two, rows_of
from evalkit.training.kernels.select import LARGEST_K, NOTHING

STRIDE = 16
"""One of so many features is in the sample behind the bound: 1/16 more of the product."""

SPREAD = 4.0
"""Standard deviations between what a list must hold and what is expected in it; with 4 about one row in 10,000 is rescued."""

LARGEST_F = 1 << 20
"""More features have no room in a list's integers."""

PLACES: tl.constexpr = tl.constexpr(4096)
"""Longest list: 12 bits of place beside 20 of index."""

RESCUED = 16
"""Rows that are rescued together: the least a matrix unit takes."""

ROUNDS = 2
"""The rescue has memory for one of so many rows at a time. With bfloat16 factors that is as much as the unfused scores need."""


class Tile(NamedTuple):
    """Shape of the product's programs. An estimate for Hopper GPUs; other shapes were not tried on one."""

    rows: int = 128
    features: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 3
    swath: int = 8
    """Blocks of rows that neighbouring programs share: their rows of W are read while they are in the cache."""


TILE = Tile()


class Filter(NamedTuple):
    """How many candidates a row is to have."""

    rank: int
    """Place of the bound in the sample; 0: no bound, all are candidates."""
    capacity: int
    """Length of a row's list."""


def filter_of(k: int, features: int) -> Filter:
    """A bound that is too high in about one row of 10,000, and a list that overflows as seldom.

    The bound is too high where ``rank`` of the k largest are in the sample, of which k / ``STRIDE`` are expected there.
    """
    share = k / STRIDE
    rank = math.ceil(share + SPREAD * math.sqrt(share) + 2)
    capacity = power_of_two(max(k, 2, math.ceil(STRIDE * (rank + SPREAD * math.sqrt(rank) + 2))))
    return Filter(rank if rank <= -(-features // STRIDE) else 0, min(capacity, int(PLACES)))


@no_type_check
@triton.jit
def _product(
    x,
    W,
    row,
    column,
    F,
    D: tl.constexpr,
    B_ROWS: tl.constexpr,
    B_FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Float32 sums of rows of x times rows of W, (B_ROWS, B_FEATURES). Rows must exist; columns from F on give 0."""
    total = tl.zeros([B_ROWS, B_FEATURES], dtype=tl.float32)
    for start in range(0, D, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = depth < D
        a = tl.load(x + row[:, None] * D + depth[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(W + column[None, :] * D + depth[:, None], mask=inside[:, None] & (column < F)[None, :], other=0.0)
        if WIDEN:
            total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(a, b, total, input_precision="ieee")
    return total


@no_type_check
@triton.jit
def _keep(
    score,
    row,
    column,
    bias,
    norms,
    bounds,
    columns,
    scores,
    ranks,
    lengths,
    B,
    F,
    CAPACITY: tl.constexpr,
    NORMS: tl.constexpr,
):
    """Append what reaches its row's bound to the row's list. Rows from B on are read as the last one and not kept."""
    kept = tl.minimum(row, B - 1)
    score += tl.load(bias + column, mask=column < F, other=0.0)[None, :]
    ranked = score
    if NORMS:
        ranked *= tl.load(norms + column, mask=column < F, other=0.0)[None, :]
    reached = (ranked >= tl.load(bounds + kept)[:, None]) | (ranked != ranked)
    take = reached & (ranked != -float("inf")) & (row < B)[:, None] & (column < F)[None, :]
    ones = tl.full(score.shape, 1, tl.int32)
    place = tl.atomic_add(lengths + kept[:, None] * ones, ones, mask=take)
    take = take & (place < CAPACITY)
    at = kept[:, None] * CAPACITY + place
    tl.store(columns + at, column[None, :] * ones, mask=take)
    tl.store(scores + at, score, mask=take)
    if NORMS:
        tl.store(ranks + at, ranked, mask=take)


@no_type_check
@triton.jit
def _halves(score, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The first and the second half of the columns. They stay in the registers they are in."""
    return tl.split(tl.permute(tl.reshape(score, [ROWS, 2, HALF]), (0, 2, 1)))


@no_type_check
@triton.jit
def _propose(
    x,
    W,
    bias,
    norms,
    bounds,
    columns,
    scores,
    ranks,
    lengths,
    B,
    F,
    D: tl.constexpr,
    CAPACITY: tl.constexpr,
    B_ROWS: tl.constexpr,
    B_FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
    SWATH: tl.constexpr,
    NORMS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    across = tl.cdiv(F, B_FEATURES)
    swath = tl.program_id(0) // (SWATH * across)
    within = tl.program_id(0) % (SWATH * across)
    height = tl.minimum(tl.cdiv(B, B_ROWS) - swath * SWATH, SWATH)
    row = (swath * SWATH + within % height) * B_ROWS + tl.arange(0, B_ROWS)
    first = (within // height) * B_FEATURES
    kept, column = tl.minimum(row, B - 1).to(tl.int64), (first + tl.arange(0, B_FEATURES)).to(tl.int64)
    total = _product(x, W, kept, column, F, D, B_ROWS, B_FEATURES, DEPTH, WIDEN)
    # a quarter of the tile at a time: the places of all of it would not fit the registers beside it
    QUARTER: tl.constexpr = B_FEATURES // 4
    column = first + tl.arange(0, QUARTER)
    left, right = _halves(total, B_ROWS, B_FEATURES // 2)
    one, two = _halves(left, B_ROWS, QUARTER)
    three, four = _halves(right, B_ROWS, QUARTER)
    _keep(one, row, column, bias, norms, bounds, columns, scores, ranks, lengths, B, F, CAPACITY, NORMS)
    _keep(two, row, column + QUARTER, bias, norms, bounds, columns, scores, ranks, lengths, B, F, CAPACITY, NORMS)
    _keep(three, row, column + 2 * QUARTER, bias, norms, bounds, columns, scores, ranks, lengths, B, F, CAPACITY, NORMS)
    _keep(four, row, column + 3 * QUARTER, bias, norms, bounds, columns, scores, ranks, lengths, B, F, CAPACITY, NORMS)


@no_type_check
@triton.jit
def _best(
    bounds,
    columns,
    scores,
    ranks,
    lengths,
    values,
    indices,
    which,
    number,
    K: tl.constexpr,
    K_WIDE: tl.constexpr,
    CAPACITY: tl.constexpr,
    RELU: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row)
    enough = (length >= K) | (tl.load(bounds + row) == -float("inf"))
    if enough & (length <= CAPACITY):
        place = tl.arange(0, CAPACITY)
        at, inside = row * CAPACITY + place, place < length
        rank = tl.load(ranks + at, mask=inside, other=0.0)
        rank = tl.where(rank != rank, float("inf"), rank + 0.0)  # + 0.0 makes -0.0 equal to 0.0
        bits = rank.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) * 4294967296
        key += (1048575 - tl.load(columns + at, mask=inside, other=0)).to(tl.int64) * PLACES + place
        key = tl.topk(tl.where(inside, key, NOTHING), K_WIDE)
        j = tl.arange(0, K_WIDE)
        empty = key == NOTHING
        low = key & 4294967295
        value = tl.load(scores + row * CAPACITY + tl.where(empty, 0, low % PLACES), mask=(j < K) & (~empty), other=0.0)
        if RELU:
            value = tl.where(value < 0, 0.0, value)  # unlike a maximum, this keeps NaN
        tl.store(values + row * K + j, value, mask=j < K)
        tl.store(indices + row * K + j, tl.where(empty, 0, 1048575 - low // PLACES).to(tl.int32), mask=j < K)
    else:
        tl.store(which + tl.atomic_add(number, 1), tl.program_id(0))


@no_type_check
@triton.jit
def _rescue(
    x,
    W,
    which,
    number,
    scores,
    first,
    most,
    F,
    D: tl.constexpr,
    B_ROWS: tl.constexpr,
    B_FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Scores of rows ``first`` to ``first`` + ``most`` of those in need, in full."""
    column = (tl.program_id(0) * B_FEATURES + tl.arange(0, B_FEATURES)).to(tl.int64)
    last = tl.minimum(tl.load(number) - first, most)
    start = last * 0
    while start < last:
        j = start + tl.arange(0, B_ROWS)
        row = tl.load(which + first + j, mask=j < last, other=0).to(tl.int64)
        total = _product(x, W, row, column, F, D, B_ROWS, B_FEATURES, DEPTH, WIDEN)
        tl.store(scores + j.to(tl.int64)[:, None] * F + column[None, :], total, mask=(j < last)[:, None] & (column < F)[None, :])
        start += B_ROWS


def _bounds(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor, norms: torch.Tensor | None, rank: int) -> torch.Tensor:
    """(B,) what candidates must reach."""
    if not rank:
        return torch.full((len(x),), -torch.inf, device=x.device)
    weights = None if norms is None else norms[::STRIDE].contiguous()
    values, indices = select.select(x @ W[::STRIDE].T, bias[::STRIDE].contiguous(), rank, weights, relu=False)
    return (values if weights is None else values * weights[indices.long()])[:, -1].contiguous()


def fits(k: int, features: int) -> bool:
    """Whether a list has room for such rows."""
    return k <= min(LARGEST_K, features) and features <= LARGEST_F


def encode(
    x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor, k: int, norms: torch.Tensor | None = None, relu: bool = True
) -> SparseCodes:
    """``oracles.encode``: values (B, k) float32 and indices (B, k) int32 of the k largest of x (B, D) W^T (F, D) + bias (F,).

    ``fits`` must hold. Never waits for the device.
    """
    (B, D), F, device = x.shape, len(W), x.device
    rank, capacity = filter_of(k, F)
    x, W, bias = rows_of(x), rows_of(W), rows_of(bias)
    norms = None if norms is None else rows_of(norms)
    bounds = _bounds(x, W, bias, norms, rank)
    columns = torch.empty(B, capacity, dtype=torch.int32, device=device)
    scores = torch.empty(B, capacity, dtype=torch.float32, device=device)
    lists = (columns, scores, scores if norms is None else torch.empty_like(scores))
    lengths = torch.zeros(B, dtype=torch.int32, device=device)
    values = torch.empty(B, k, dtype=torch.float32, device=device)
    indices = torch.empty(B, k, dtype=torch.int32, device=device)
    which, number = torch.empty(B, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    # the interpreter multiplies the bits of bfloat16 numbers; as float32 their products are the same
    shape = {"D": D, "DEPTH": TILE.depth, "B_FEATURES": TILE.features, "WIDEN": interpreting()}
    how = {"num_warps": TILE.warps, "num_stages": TILE.stages}
    grid = (triton.cdiv(B, TILE.rows) * triton.cdiv(F, TILE.features),)
    read = (x, W, bias, bias if norms is None else norms, bounds)
    flags = {"SWATH": TILE.swath, "NORMS": norms is not None}
    launch(_propose, grid, *read, *lists, lengths, B, F, CAPACITY=capacity, B_ROWS=TILE.rows, **flags, **shape, **how)
    found = (bounds, *lists, lengths, values, indices, which, number)
    wide = max(2, power_of_two(k))
    launch(_best, (B,), *found, K=k, K_WIDE=wide, CAPACITY=capacity, RELU=relu, num_warps=4 if capacity > 128 else 1)
    most = -(-B // ROUNDS)
    whole = torch.empty(most, F, dtype=torch.float32, device=device)
    across = (triton.cdiv(F, TILE.features),)
    for first in range(0, B, most):
        launch(_rescue, across, x, W, which, number, whole, first, most, F, B_ROWS=RESCUED, **shape, num_warps=4, num_stages=3)
        select.into(SparseCodes(values, indices), whole, bias, norms, relu, select.Some(which, number, first))
    return SparseCodes(values, indices)
