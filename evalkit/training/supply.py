"""Shuffled batches of activations from memory or from a memory-mapped file, in bounded memory, the same for the same seed.

1. Rows are cut into short runs; each pass visits the runs in a new random order.
2. Runs fill a buffer of at most ``buffer`` rows, the buffer is shuffled, and batches are cut from it. Data that fit the
   buffer are shuffled exactly. A run is short against the buffer, so neighbours in the file (tokens of one text) land in
   different batches.
3. What a pass leaves over starts the next pass's first batch, so that every batch is full and no row is favoured.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float

from evalkit.dictionaries.fitting import take
from evalkit.dictionaries.registry import Vectors

BUFFER_BYTES = 512 << 20
"""Memory the shuffle buffer may take; two buffers can be alive at the border between them."""

RUN = 32
"""Neighbouring rows read together: long enough for a disk, short against any buffer."""


def orders(n: int, buffer: int, generator: torch.Generator, run: int = RUN) -> Iterator[torch.Tensor]:
    """Endless passes over range(n) as shuffled blocks of at most ``buffer`` indices (more only where one run is longer)."""
    if n <= buffer:
        while True:
            yield torch.randperm(n, generator=generator)
    starts = torch.arange(0, n, run)
    together = max(1, buffer // run)
    while True:
        for group in starts[torch.randperm(len(starts), generator=generator)].split(together):
            indices = (group[:, None] + torch.arange(run)).flatten()
            indices = indices[indices < n]
            yield indices[torch.randperm(len(indices), generator=generator)]


def batches(x: Vectors, size: int, seed: int, *, buffer: int | None = None) -> Iterator[Float[torch.Tensor, "B D"]]:
    """Endless shuffled batches of exactly ``size`` rows, float32 on the CPU.

    Args:
        x: (N, D) activations.
        size: rows a batch; may exceed N.
        seed: seed of the order.
        buffer: rows shuffled together; as many as ``BUFFER_BYTES`` hold when left out.
    """
    n, width = x.shape
    rows = buffer if buffer is not None else max(size, BUFFER_BYTES // (4 * width))
    in_memory = isinstance(x, torch.Tensor) or not isinstance(x, np.memmap)
    waiting: list[torch.Tensor] = []
    have = 0
    for order in orders(n, n if in_memory else rows, torch.Generator().manual_seed(seed)):
        if in_memory:
            pieces = (take(x, part.numpy()) for part in order.split(size))
        else:
            position = order.argsort()  # read the file forwards, then put the rows in shuffled order
            block = torch.empty(len(order), width)
            block[position] = take(x, order[position].numpy())
            pieces = iter(block.split(size))
        for piece in pieces:
            waiting.append(piece)
            have += len(piece)
            while have >= size:
                joined = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
                yield joined[:size]
                waiting, have = [joined[size:]], have - size
