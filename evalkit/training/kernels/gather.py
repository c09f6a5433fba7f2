"""Kernels over tokens: decode k rows of W, hold the result against a target, and multiply it with the rows again.

1. ``_bag``: one program a token. A tile of rows is gathered, weighted and summed in float32; the squared length of target minus
   sum is taken on the way. Where one tile holds all k rows and all D columns, the products of the residual with the rows (the
   gradient of the codes) come from the same read.
2. ``_dots``: else a second program reads the rows again for those products.

Sums run in one fixed order, so equal inputs give equal bits. The design follows the embedding bags of recommender systems; the
twins are in ``oracles``.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl

from evalkit.training.kernels.launch import launch, power_of_two, rows_of
from evalkit.training.kernels.oracles import Decoded

TILE = 16_384
"""Most elements of W a program holds at once."""

THREAD = 256
"""Most of them a thread holds; more would not stay in registers."""

BLOCK_K, BLOCK_D = 8, 256
"""Rows and columns gathered together where a tile cannot hold all."""

WARP_BYTES = 512
"""Of a row that a warp reads: 16 a thread. Warps stand side by side along a row, so that each thread has all rows of its columns
and a sum over rows exchanges nothing (results/reference/benchmarks/kernels-gpu.md)."""


@no_type_check
@triton.jit
def _bag(
    values,
    indices,
    W,
    x,
    bias,
    out,
    squares,
    dots,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ERROR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start_d in range(0, D, BLOCK_D):
        columns = start_d + tl.arange(0, BLOCK_D)
        inside = columns < D
        result = tl.zeros([BLOCK_D], dtype=tl.float32)
        if WHOLE:
            j = tl.arange(0, BLOCK_K)
            index = tl.load(indices + token * K + j, mask=j < K, other=0).to(tl.int64)
            value = tl.load(values + token * K + j, mask=j < K, other=0.0).to(tl.float32)
            held = (j < K)[:, None] & inside[None, :]
            rows = tl.load(W + index[:, None] * D + columns[None, :], mask=held, other=0.0).to(tl.float32)
            result += tl.sum(value[:, None] * rows, axis=0)
        else:
            for start_k in range(0, K, BLOCK_K):
                j = start_k + tl.arange(0, BLOCK_K)
                index = tl.load(indices + token * K + j, mask=j < K, other=0).to(tl.int64)
                value = tl.load(values + token * K + j, mask=j < K, other=0.0).to(tl.float32)
                held = (j < K)[:, None] & inside[None, :]
                rows = tl.load(W + index[:, None] * D + columns[None, :], mask=held, other=0.0).to(tl.float32)
                result += tl.sum(value[:, None] * rows, axis=0)
        if ERROR:
            target = tl.load(x + token * D + columns, mask=inside, other=0.0).to(tl.float32)
            shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
            result = tl.where(inside, target - result - shift, 0.0)
            total += result * result
            if WHOLE:
                tl.store(dots + token * K + j, tl.sum(rows * result[None, :], axis=1), mask=j < K)
        tl.store(out + token * D + columns, result.to(out.dtype.element_ty), mask=inside)
    if ERROR:
        tl.store(squares + token, tl.sum(total, axis=0))


@no_type_check
@triton.jit
def _dots(source, indices, W, dots, K: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    index = tl.load(indices + token * K + j, mask=j < K, other=0).to(tl.int64)
    products = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)  # summed once, at the end: threads exchange nothing before
    for start_d in range(0, D, BLOCK_D):
        columns = start_d + tl.arange(0, BLOCK_D)
        inside = columns < D
        row = tl.load(source + token * D + columns, mask=inside, other=0.0).to(tl.float32)
        held = (j < K)[:, None] & inside[None, :]
        rows = tl.load(W + index[:, None] * D + columns[None, :], mask=held, other=0.0).to(tl.float32)
        products += rows * row[None, :]
    tl.store(dots + token * K + j, tl.sum(products, axis=1), mask=j < K)


def _tile(k: int, d: int, W: torch.Tensor) -> tuple[int, int, bool]:
    """Rows and columns a program of ``_bag`` holds at once, and whether that is all of them."""
    rows, columns = power_of_two(k), power_of_two(d)
    if rows * columns <= min(TILE, THREAD * 32 * _warps(columns, W)):
        return rows, columns, True
    return BLOCK_K, min(columns, BLOCK_D), False


def _warps(columns: int, W: torch.Tensor) -> int:
    return max(1, min(8, columns * W.element_size() // WARP_BYTES))


def _run_bag(values: torch.Tensor, indices: torch.Tensor, W: torch.Tensor, target: Any, out: torch.Tensor) -> None:
    """Launch ``_bag``; ``target`` is (x, bias, squares, dots), or None where only the sum is wanted."""
    (B, k), d = values.shape, W.shape[1]
    block_k, block_d, whole = _tile(k, d, W)
    x, bias, squares, dots_out = target or (out, out, out, out)
    constants = {"BLOCK_K": block_k, "BLOCK_D": block_d, "ERROR": target is not None, "WHOLE": whole}
    arguments = (rows_of(values), rows_of(indices), rows_of(W), x, bias, out, squares, dots_out)
    launch(_bag, (B,), *arguments, K=k, D=d, **constants, num_warps=_warps(block_d, W))


def decode(values: torch.Tensor, indices: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """``oracles.decode``: (B, D) float32 from values and indices (B, K) and W (F, D)."""
    out = torch.empty(len(values), W.shape[1], dtype=torch.float32, device=W.device)
    _run_bag(values, indices, W, None, out)
    return out


def dots(rows: torch.Tensor, indices: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """``oracles.dots``: (B, K) float32 from rows (B, D), indices (B, K) and W (F, D)."""
    (B, k), d = indices.shape, W.shape[1]
    result = torch.empty(B, k, dtype=torch.float32, device=W.device)
    block_k = min(power_of_two(k), BLOCK_K)
    block_d = min(power_of_two(d), BLOCK_D)
    grid = (B, triton.cdiv(k, block_k))
    blocks = {"BLOCK_K": block_k, "BLOCK_D": block_d, "num_warps": _warps(block_d, W)}
    launch(_dots, grid, rows_of(rows), rows_of(indices), rows_of(W), result, K=k, D=d, **blocks)
    return result


def decode_error(
    values: torch.Tensor, indices: torch.Tensor, W: torch.Tensor, x: torch.Tensor, b_dec: torch.Tensor, keep: torch.dtype
) -> Decoded:
    """``oracles.decode_error``. Where the rows are read twice, the products come from the residual as it was kept."""
    (B, k), d = values.shape, W.shape[1]
    residual = torch.empty(B, d, dtype=keep, device=W.device)
    squares = torch.empty(B, dtype=torch.float32, device=W.device)
    products = torch.empty(B, k, dtype=torch.float32, device=W.device)
    _run_bag(values, indices, W, (rows_of(x), rows_of(b_dec), squares, products), residual)
    if not _tile(k, d, W)[2]:
        products = dots(residual, indices, W)
    return Decoded(residual, squares, products)
