"""The one place where kernels are started, so that a test can compile a launch instead of running it."""

from __future__ import annotations

from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run ``kernel`` over ``grid``; nothing where the grid is empty."""
    if 0 not in grid:
        kernel[grid](*args, **constants)


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``: the widths Triton's blocks can have."""
    return 1 << max(0, n - 1).bit_length()


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as kernels address it: rows one after the other."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()
