"""Activations that are not finite: the number format overflowed, or the model's weights are damaged.

They are no massive activations, which are large numbers: no rule may leave them out in silence. ``broken`` counts the positions
that have any, ``broken_message`` says what that means and what to do, whoever finds them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float


class BrokenMessage(NamedTuple):
    """The words of an error."""

    what: str
    fix: str


def broken(x: Float[torch.Tensor, "*batch T D"]) -> int:
    """Positions with a value that is NaN or infinite."""
    return int((~x.isfinite()).any(-1).sum())


def broken_message(count: int, positions: int, text: str, dtype: torch.dtype | None) -> BrokenMessage:
    """What to say of ``count`` broken positions.

    Args:
        positions: how many were looked at.
        text: what they are positions of ("fitting text").
        dtype: what the model computes in, where that is known.
    """
    what = f"{count:,} of {positions:,} positions of the {text} have activations that are not finite"
    if dtype == torch.float16:
        return BrokenMessage(f"{what}: float16 overflows above 65,504", 'write dtype = "bfloat16" or "float32" in [model]')
    where = f", in {str(dtype).removeprefix('torch.')}" if dtype else ""
    return BrokenMessage(f"{what}{where}", "check the weights and the dtype of the model: NaN and infinities cannot be studied")
