"""Which way pays on a GPU: sparse or dense products, selection inside the product or after it, members stacked or one by one.

1. Sparse products: a gather of k rows moves 2 B k D bytes or more and a dense product does 2 B F D operations, so what matters is
   k / F against bytes a second over operations a second of the device (``SPARSE``).
2. Selection inside the encode (``kernels.fused``) saves writing and reading B F scores, 4 B F bytes with bfloat16 factors, and
   pays with a product of 2 B F D operations that is not cuBLAS's. Per score the first is constant and the second grows with D: it
   would pay up to a width (``FUSE``), where the scores are many enough to make up for its launches (``FUSE_LEAST``); so far it
   did at none.
3. Stacking: a member that steps alone is one CUDA graph of some thirty short kernels, and its optimiser moves 26 bytes a
   parameter; a stack is launched operation by operation, once for all members, and its optimiser moves about 110. So a stack pays
   for many members that are small (``FUSED_S``, ``STACK_S``): one member of the usual size fills the device.

The constants are estimates by this arithmetic for Hopper GPUs (3 TB/s, 800 TFLOP/s of bfloat16, 4 to 5.5 TB/s of gathers that hit
the cache), except where it says that they were measured. ``MEASURED`` has what ``benchmarks/kernels.py`` printed on a GPU.
Training never measures on its own: the choice changes rounding, and equal runs must give equal bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

SPARSE = 0.005
"""Share of active features up to which sparse products are taken. Estimate: 4 to 5.5 TB/s against 800 TFLOP/s."""

FUSE = 0
"""Width D up to which the encode selects as it goes; 0: never. On an H200 selecting after a cuBLAS product was faster at widths
256 and 512, where the scores cost most against the product."""

FUSE_LEAST = 1 << 26
"""Scores B F a batch from which it does. Estimate: about ten launches more, of 2.5 microseconds each, against 4 bytes a score."""

FUSED_S = 1e-4
"""Seconds of a fused step so small that only launches count. Estimate: thirty kernels of a graph, of 2 to 3 microseconds each."""

STACK_S = 1.5e-3
"""Seconds of a stacked step so small that only launches count. Estimate: 150 launches of 10 microseconds each."""

STACK_BYTES = 84
"""Bytes a parameter that a stack's step moves beyond a fused one's: 110 - 26."""

BANDWIDTH = 3e12
"""Bytes a second of those."""


class Share(NamedTuple):
    """What was measured on one kind of device."""

    sparse: float = SPARSE
    """As ``SPARSE``."""
    fuse: int = FUSE
    """As ``FUSE``; 0 where the unfused way was always faster."""


MEASURED: dict[str, Share] = {"NVIDIA H200": Share(sparse=0.0262, fuse=0)}
"""By device name, as ``torch.cuda.get_device_name`` gives it."""


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _of(device: torch.device) -> Share:
    return MEASURED.get(_name(device), Share())


def sparse_pays(k: int, features: int, device: torch.device) -> bool:
    """Whether k active ones of ``features`` are few enough for sparse products on ``device``. On the CPU they always are."""
    return device.type != "cuda" or k <= features * _of(device).sparse


def fusing_pays(tokens: int, width: int, features: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the encode should select as it goes. Only with bfloat16 factors: exact float32 products are no work for a matrix
    unit."""
    many = device.type == "cuda" and dtype == torch.bfloat16 and tokens * features >= FUSE_LEAST
    return many and width <= _of(device).fuse


def stacking_pays(members: int, width: int, features: int) -> bool:
    """Whether a GPU steps so many same-shape TopK members faster as one stack than one after another as fused steps."""
    slower = STACK_BYTES * 2 * features * width / BANDWIDTH
    return members * (FUSED_S - slower) > STACK_S


def use(device: torch.device, **measured: Any) -> None:
    """Go by what was measured on this kind of device, in this process: ``sparse``, ``fuse`` as in ``Share``."""
    MEASURED[_name(device)] = _of(device)._replace(**measured)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of ``work``. On a GPU that of a replayed CUDA graph, as in a step: launches from Python would hide the rest."""
    if device.type != "cuda":
        times = []
        for _ in range(repeats + 2):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return sorted(times[2:])[repeats // 2]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles kernels and fills the allocator
            work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    spans = []
    for _ in range(repeats + 2):
        start_at, end_at = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_at.record()
        graph.replay()
        end_at.record()
        end_at.synchronize()
        spans.append(start_at.elapsed_time(end_at) / 1e3)
    return sorted(spans[2:])[repeats // 2]


def measure(
    device: torch.device,
    tokens: int = 4096,
    width: int = 512,
    features: int = 16_384,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 9,
) -> float:
    """The share of active features at which both weight gradients take as long sparse as dense, on ``device``.

    Tries k = 8, 16, ... and interpolates between the last k where sparse was faster and the first where it was not.

    Returns:
        k / features: 0.0 where dense was always faster, and the largest share tried where sparse was.
    """
    from evalkit.training.kernels import dense, ops

    generator = torch.Generator(device=device).manual_seed(0)
    rows = torch.randn(tokens, width, generator=generator, device=device).to(dtype)
    last, gap = 0.0, 0.0
    k = 8
    while k <= min(features, 512):
        indices = torch.rand(tokens, features, generator=generator, device=device).topk(k).indices.int()
        values = torch.rand(tokens, k, generator=generator, device=device)
        token = torch.arange(tokens, dtype=torch.int32, device=device).repeat_interleave(k)

        def sparse(indices: torch.Tensor = indices, values: torch.Tensor = values, token: torch.Tensor = token) -> object:
            pairs = ops.by_feature(indices.flatten(), values.flatten() > 0, features)
            return ops.segment_sums(pairs, values.flatten(), token, rows, values.flatten(), token, rows)

        def plain(indices: torch.Tensor = indices, values: torch.Tensor = values) -> object:
            return dense.sums(values, values, indices, features, rows, rows)

        slower = _seconds(sparse, device, repeats) / _seconds(plain, device, repeats) - 1
        if slower > 0:
            return last + (k / features - last) * (gap / (gap + slower) if gap + slower > 0 else 0.0)
        last, gap = k / features, -slower
        k *= 2
    return last


def measure_fusing(
    device: torch.device,
    tokens: int = 8192,
    features: int = 16_384,
    k: int = 32,
    widths: Sequence[int] = (256, 512, 768, 1024, 1536, 2304),
    repeats: int = 9,
) -> int:
    """The largest of ``widths`` up to which selection inside the encode is faster than after it on ``device``; 0 for none."""
    from evalkit.training.kernels import ops

    generator = torch.Generator(device=device).manual_seed(0)
    bias, best = torch.zeros(features, device=device), 0
    for width in widths:
        x, W = (torch.randn(n, width, generator=generator, device=device).bfloat16() for n in (tokens, features))

        def inside(x: torch.Tensor = x, W: torch.Tensor = W) -> object:
            return ops.encode(x, W, bias, k)

        def after(x: torch.Tensor = x, W: torch.Tensor = W) -> object:
            return ops.select(x @ W.T, bias, k)

        if _seconds(inside, device, repeats) >= _seconds(after, device, repeats):
            return best
        best = width
    return best
