"""Kernel that counts how often each feature occurs, over B * K indices instead of B x F codes.

Each program adds a block of keys by integer atomics: sums of integers do not depend on their order, so counts repeat exactly.
Dead features (activations since a feature last fired) and L0 (sum of the counts over B) follow from the counts.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from evalkit.training.kernels.launch import launch, rows_of

BLOCK = 1024


@no_type_check
@triton.jit
def _count(keys, out, n, features, BLOCK: tl.constexpr):
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + position, mask=position < n, other=features)
    tl.atomic_add(out + key, tl.full([BLOCK], 1, tl.int32), mask=(key >= 0) & (key < features), sem="relaxed")


def counts(keys: torch.Tensor, features: int) -> torch.Tensor:
    """``oracles.counts``: (F,) int32, how often each of 0..features-1 occurs in ``keys`` (P,)."""
    out = torch.zeros(features, dtype=torch.int32, device=keys.device)
    launch(_count, (triton.cdiv(len(keys), BLOCK),), rows_of(keys), out, len(keys), features, BLOCK=BLOCK, num_warps=4)
    return out
