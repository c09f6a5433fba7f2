"""The share of active features at which sparse and dense weight gradients take equally long on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from evalkit.training.kernels import dense, ops


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
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

        slower = seconds(sparse, device, repeats) / seconds(plain, device, repeats) - 1
        if slower > 0:
            return last + (k / features - last) * (gap / (gap + slower) if gap + slower > 0 else 0.0)
        last, gap = k / features, -slower
        k *= 2
    return last
