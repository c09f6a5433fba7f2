"""Dense float32 products on a CPU, by the library that uses the processor better.

1. PyTorch gives float32 products on x86 to MKL, which leaves the AVX-512 units of processors idle that Intel did not make.
   PyTorch also carries oneDNN, which does not: about twice as fast there (``benchmarks/products.py``).
2. ``pays`` decides once a process: an AVX-512 processor of another maker, and an operation that multiplies a random matrix right.
   EVALKIT_PRODUCTS=mkl or onednn decides otherwise. It never measures, so that equal runs give equal bits.
3. ``linear`` is torch.nn.functional.linear, ``times`` a matrix product; anything but float32 on a CPU goes to PyTorch's own.
   Gradients are made the same way.
4. ``quicken`` exchanges the linear layers of a module.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch.nn import functional as F

from evalkit.errors import UsageError
from evalkit.util.registry import near_miss

VARIABLE = "EVALKIT_PRODUCTS"
LIBRARIES = ("mkl", "onednn")
ROWS = 4
"""Fewer rows than this are left to PyTorch's own, which is as fast or faster for one."""

CPU_INFO = Path("/proc/cpuinfo")
"""Where Linux says who made the processor."""

CLOSE = 1e-4
"""Largest error of a product of random numbers of order 1 that is taken for rounding."""


@functools.cache
def pays() -> bool:
    """Whether float32 products on this CPU go to oneDNN."""
    asked = os.environ.get(VARIABLE, "").lower()
    if asked not in ("", *LIBRARIES):
        raise UsageError(f"there is no library '{asked}' for products", where=VARIABLE, fix=near_miss(asked, LIBRARIES))
    return asked != "mkl" and (asked == "onednn" or _slow_mkl()) and _multiplies()


def _slow_mkl() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and not _by_intel()


def _by_intel() -> bool:
    return "GenuineIntel" in (CPU_INFO.read_text() if CPU_INFO.exists() else platform.processor())


def _multiplies() -> bool:
    """Whether the operation is there and does what it is taken for."""
    generator, kind = torch.Generator("cpu").manual_seed(0), {"dtype": torch.float32, "device": "cpu"}
    x, W, b = (torch.randn(*shape, generator=generator, **kind) for shape in ((5, 7), (3, 7), (3,)))  # type: ignore[call-overload]
    try:
        found = _product(x, W, b)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(found.double(), F.linear(x.double(), W.double(), b.double()), atol=CLOSE)


def _product(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    # oneDNN is a thousand times slower on other strides of a matrix, and takes those of a bias for 1
    if not (W.is_contiguous() or W.mT.is_contiguous()):
        W = W.contiguous()
    b = None if b is None else b.expand(len(W)).contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")


class _Linear(torch.autograd.Function):
    """x W^T + b. The gradients are made by ``linear`` again, so that gradients of gradients exist; torch.func knows no rule."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        to_x, to_W, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if to_W else None, W if to_x else None)
        return _product(x, W, b)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, W = ctx.saved_tensors
        d, (to_x, to_W, to_b) = gradients[0], ctx.needs_input_grad
        flat = d.flatten(0, -2)
        return (
            times(d, W) if to_x else None,
            times(flat.mT, x.flatten(0, -2)) if to_W else None,
            flat.sum(0) if to_b else None,
        )


def linear(
    x: Float[torch.Tensor, "*batch K"], W: Float[torch.Tensor, "N K"], b: Float[torch.Tensor, " N"] | None = None
) -> Float[torch.Tensor, "*batch N"]:
    """x W^T + b, as torch.nn.functional.linear gives it to rounding."""
    tensors = (x, W) if b is None else (x, W, b)
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors) and (b is None or b.shape == W.shape[:1])
    few = x.ndim < 2 or x.numel() < ROWS * x.shape[-1] or W.ndim != 2 or W.numel() == 0
    if not plain or few or not pays():
        return F.linear(x, W, b)
    if torch.is_autocast_enabled("cpu"):
        return F.linear(x, W, b)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return _Linear.apply(x, W, b) if wanted else _product(x, W, b)


def times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, to rounding; by ``linear`` where b is one matrix and a has rows."""
    return linear(a, b.mT) if b.ndim == 2 and a.ndim >= 2 else a @ b


class Linear(torch.nn.Linear):
    """A linear layer by ``linear``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


def quicken(module: torch.nn.Module) -> None:
    """Make a ``Linear`` of each plain linear layer inside ``module``; parameters, hooks and names stay what they are."""
    if pays():
        for layer in module.modules():
            if type(layer) is torch.nn.Linear:
                layer.__class__ = Linear
