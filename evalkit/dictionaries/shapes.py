"""Refuse weights that cannot be a dictionary: missing or unknown tensors, wrong shapes, NaN and infinities.

1. A kind declares its tensors with one letter a dimension: ``{"W_enc": "D F", "b_enc": "F"}``.
2. Each letter takes its size from the first tensor that has it; every other one must agree.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from evalkit.errors import DictionaryError
from evalkit.util.registry import near_miss


def check(kind: str, tensors: Mapping[str, torch.Tensor], layout: Mapping[str, str]) -> dict[str, int]:
    """Check ``tensors`` against ``layout`` and return the size of each letter.

    Raises:
        DictionaryError: a tensor is missing, unknown, misshapen, not floating point, empty or not finite; ``where`` names it.
    """
    for name in layout:
        if name not in tensors:
            raise DictionaryError(
                f"the weights of this '{kind}' dictionary lack the tensor '{name}'",
                where=name,
                fix=f"it needs: {', '.join(layout)}",
            )
    for name in tensors:
        if name not in layout:
            raise DictionaryError(f"a '{kind}' dictionary has no tensor '{name}'", where=name, fix=near_miss(name, layout))
    sizes: dict[str, int] = {}
    for name, letters in layout.items():
        tensor, want = tensors[name], letters.split()
        shape = tuple(tensor.shape)
        for letter, size in zip(want, shape, strict=False):
            sizes.setdefault(letter, size)
        if shape != tuple(sizes.get(letter, -1) for letter in want) or 0 in shape:
            known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
            raise DictionaryError(
                f"the tensor '{name}' of a '{kind}' dictionary has shape {shape}, not ({', '.join(want)}) with {known}",
                where=name,
                fix="check how the weights were stored (transposed?)",
            )
        if not tensor.is_floating_point():
            raise DictionaryError(f"the tensor '{name}' holds {tensor.dtype}, not floating-point numbers", where=name)
        if not torch.isfinite(tensor).all():
            raise DictionaryError(
                f"the tensor '{name}' holds NaN or an infinity",
                where=name,
                fix="training diverged or the file is damaged: train again with a lower learning rate, or fetch it again",
            )
    return sizes
