"""Whether sparse or dense products are faster on a device.

A gather of k rows moves 2 B k D bytes or more and a dense product does 2 B F D operations, so what matters is k / F against bytes
a second over operations a second of the device.

Training never measures on its own: the choice changes rounding, and equal runs must give equal bits. ``benchmarks/kernels.py``
measures the break-even of a GPU.
"""

from __future__ import annotations

import torch

SPARSE = 0.005
"""Share of active features up to which sparse products are taken on a GPU that was not measured. Estimate for Hopper GPUs: 4 to
5.5 TB/s of gathers that hit the cache against 800 TFLOP/s of bfloat16."""

MEASURED = {"NVIDIA H200": 0.0262}
"""The same share as ``benchmarks/kernels.py`` measured it, by the name that ``torch.cuda.get_device_name`` gives."""


def sparse_pays(k: int, features: int, device: torch.device) -> bool:
    """Whether k active ones of ``features`` are few enough for sparse products on ``device``. On the CPU they always are."""
    return device.type != "cuda" or k <= features * MEASURED.get(torch.cuda.get_device_name(device), SPARSE)
