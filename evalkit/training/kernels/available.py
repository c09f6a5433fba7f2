"""Whether Triton can run the kernels."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def ready(tensor: torch.Tensor) -> bool:
    """Whether Triton can work on ``tensor``: it is installed, and the tensor is on a CUDA device or the interpreter is on.

    The interpreter (TRITON_INTERPRET=1, set before the first kernel is imported) runs kernels as Python on the CPU.
    """
    interpreted = tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return _installed() and (tensor.is_cuda or interpreted)
