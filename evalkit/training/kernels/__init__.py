"""The trainer's sparse products on a GPU: Triton kernels, each with a plain PyTorch twin of the same signature.

1. ``ops`` is what the trainer calls: an operation runs as a Triton kernel where it is ``ready``, else as its twin in ``oracles``.
2. ``gather`` (decode, error, dots), ``select`` (k largest), ``segments`` (weight gradients), ``update`` (Adam with the decoder's
   constraint) and ``counts`` hold the kernels. They are imported at the first use, so that this package needs no Triton.
3. ``functions`` makes them differentiable, for any architecture; ``step`` is a whole TopK step that never waits for the GPU, and
   ``graph`` replays it as one CUDA graph.

What the tests show: each kernel equals its twin and float64, in Triton's interpreter on a CPU or, where there is one, on a GPU,
and compiles for Hopper. How fast each is: ``benchmarks/kernels.py``; its table of an H200 is in results/reference/benchmarks.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from evalkit.dictionaries.base import SparseCodes
    from evalkit.training.kernels.step import FusedStep
    from evalkit.training.sparse import Weights
    from evalkit.training.trainer import Trainer


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs kernels as Python on the CPU (TRITON_INTERPRET=1, set before the first kernel is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def ready(tensor: torch.Tensor) -> bool:
    """Whether Triton can work on ``tensor``: it is installed, and the tensor is on a CUDA device or the interpreter is on."""
    return _installed() and (tensor.is_cuda or (interpreting() and tensor.device.type == "cpu"))


def encode(x: torch.Tensor, weights: Weights, k: int, compute: torch.dtype = torch.float32) -> SparseCodes:
    """What ``sparse.encode`` gives, by kernels: the k largest codes (B, k) of x (B, D), differentiable in the weights.

    Args:
        compute: type the product's factors are rounded to; sums are float32.
    """
    from evalkit.training.kernels.functions import encode as by_kernels

    return by_kernels(x, weights, k, compute)


def decode(values: torch.Tensor, indices: torch.Tensor, W: torch.Tensor, compute: torch.dtype = torch.float32) -> torch.Tensor:
    """What ``sparse.decode`` gives, by kernels: (B, D) from codes (B, K) and rows (F, D), differentiable in codes and rows."""
    from evalkit.training.kernels.functions import decode as by_kernels

    return by_kernels(values, indices, W, compute)


def fused_step(trainer: Trainer) -> FusedStep | None:
    """A faster ``Trainer.step`` for this trainer, or None where its architecture has none."""
    from evalkit.training.kernels.step import FusedStep

    return FusedStep(trainer) if FusedStep.fits(trainer) else None
