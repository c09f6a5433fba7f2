"""When sparse products pay: below which share of active features gathering k rows beats a dense product on the matrix unit.

1. A gather of k rows moves 2 B k D bytes or more and a dense product does 2 B F D operations, so what matters is k / F against
   bytes a second over operations a second of the device (``BREAK_EVEN``).
2. The share is measured once for a kind of device by ``measure``; ``use`` makes it the one that counts. Until then the default
   holds. Training never measures on its own: the choice changes rounding, and equal runs must give equal bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

DEFAULT = 0.005
"""Share of active features up to which sparse products are taken on a CUDA device that was not measured. An estimate: 4 to 5.5
TB/s of gathers against 800 TFLOP/s of bfloat16 on a Hopper GPU."""

BREAK_EVEN: dict[str, float] = {}
"""Measured shares by device name. On the CPU sparse products are always taken."""


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def sparse_pays(k: int, features: int, device: torch.device) -> bool:
    """Whether k active ones of ``features`` are few enough for sparse products on ``device``."""
    if device.type != "cuda":
        return True
    return k <= features * BREAK_EVEN.get(_name(device), DEFAULT)


def use(device: torch.device, share: float) -> None:
    """Take sparse products on this kind of device up to ``share`` of the features, in this process."""
    BREAK_EVEN[_name(device)] = share


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of ``work``, waiting for the device."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(repeats + 2):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


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
