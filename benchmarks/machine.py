"""What a benchmark's table says about where it ran, and how memory and time are taken there."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

L2_BYTES = 5.5e12
"""Bytes a second from the cache of an H100 or H200: an assumption, not measured."""


class Ceilings(NamedTuple):
    """What one GPU can do at most."""

    bytes: float
    """Read and written a second."""
    operations: float
    """Of a bfloat16 product, a second."""


class Timing(NamedTuple):
    """One round of steps."""

    seconds: float
    """A step."""
    peak: int
    """Bytes above what was held before the round."""


def wait(device: str) -> None:
    """Until the GPU has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _linux_peak(reset: bool) -> int:
    """Bytes of memory this process holds now (``reset``, which forgets the peak), or held at most since then.

    What others freed goes back to the system first: a contestant that takes it over would seem to need nothing.
    """
    if reset:
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return 0
    status = Path("/proc/self/status").read_text().splitlines()
    key = "VmRSS:" if reset else "VmHWM:"
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def timed(run: Callable[[], None], steps: int, device: str, clock: str = "wall") -> Timing:
    """Seconds a step of ``run``, which does ``steps`` steps, and its peak of memory (0 where it cannot be told).

    clock = 'cpu' takes the processor time of this process in place of the time that passed.
    """
    cuda, linux = device.startswith("cuda"), sys.platform == "linux"
    wait(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else _linux_peak(True) if linux else 0
    now = time.process_time if clock == "cpu" else time.perf_counter
    start = now()
    run()
    wait(device)
    seconds = (now() - start) / steps
    after = torch.cuda.max_memory_allocated() if cuda else _linux_peak(False) if linux else 0
    return Timing(seconds, max(0, after - before) if before else 0)


def milliseconds(work: Callable[[], Any], repeats: int) -> float:
    """Median time of ``work`` on the GPU, by its own clock, after a warm-up."""
    for _ in range(5):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def ceilings() -> Ceilings:
    """Measured: a large copy, and a large product of random matrices."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    moved = 2 * source.nbytes / (milliseconds(lambda: target.copy_(source), 20) / 1e3)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return Ceilings(moved, 2 * 8192**3 / (milliseconds(lambda: a @ b, 20) / 1e3))


def floor_seconds(batch: int, width: int, features: int, k: int, most: Ceilings) -> float:
    """Least time of a TopK step on a GPU: encoder's product, gathers, both weight gradients and Adam one after the other.

    Rows of one token that fit the shared memory (220 KB) are gathered once for decoding and for the codes' gradients. Weight
    gradients are sums of rows or dense products, whichever is shorter. Adam reads and writes 26 bytes a parameter.
    """
    product = 2 * batch * width * features / most.operations
    gather = 2 * batch * k * width / L2_BYTES
    gathers = gather * (1 if k * width * 2 <= 220_000 else 2)
    gradients = min(2 * gather, 2 * product)
    return product + gathers + gradients + 26 * 2 * width * features / most.bytes


@contextmanager
def plain_products() -> Iterator[None]:
    """PyTorch's own products, as anybody's loop has them, in place of those that evalkit takes on this processor."""
    from evalkit.util import matmul as products

    before = os.environ.get(products.VARIABLE)
    os.environ[products.VARIABLE] = "mkl"
    products.pays.cache_clear()
    try:
        yield
    finally:
        del os.environ[products.VARIABLE]
        os.environ.update({} if before is None else {products.VARIABLE: before})
        products.pays.cache_clear()


def processor() -> str:
    """Name of the CPU, as the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    return names[0] if names else platform.processor() or platform.machine()


def described(device: str) -> str:
    """The machine in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{processor()}, {cores} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the start"
    if device.startswith("cuda"):
        text += f", {torch.cuda.get_device_name()}"
    return text
