"""What the benchmarks train on: activations from a file, or a planted superposition that needs no model.

1. Planted: more unit directions than dimensions, their frequencies falling as a power of their rank; each vector is a sum of a
   few of them with strengths in [0.5, 1.5), plus a common offset and a little noise (the toy model of Elhage et al. 2022).
2. From a file: an (N, D) ``.npy`` array, or the (windows, tokens, D) of evalkit's cache, with the rows that its ``keep.npy``
   beside it keeps (massive activations are left out there).
3. Both are scaled so that the mean squared norm is the width, as SAE trainers expect, and cut into training and held-out rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

HELD_OUT = 8192
"""Vectors that nobody trains on."""


class Vectors(NamedTuple):
    """Training and held-out rows, and where they come from."""

    train: torch.Tensor
    """(N, D) float32."""
    held_out: torch.Tensor
    """(M, D) float32."""
    name: str


def planted(n: int, width: int, *, directions: int, active: int, seed: int) -> torch.Tensor:
    """(n, width) float32 planted vectors; only uniform draws, so that a seed means the same everywhere."""
    draw = np.random.default_rng(seed)
    rows = torch.from_numpy(draw.random((directions, width)) - 0.5)
    rows /= rows.norm(dim=1, keepdim=True)
    often = np.cumsum((1.0 + np.arange(directions)) ** -0.8)
    which = torch.from_numpy(np.searchsorted(often / often[-1], draw.random((n, active))).clip(max=directions - 1))
    strengths = torch.from_numpy(0.5 + draw.random((n, active)))
    x = torch.nn.functional.embedding_bag(which, rows, per_sample_weights=strengths, mode="sum")
    x += torch.from_numpy(draw.random(width) - 0.5) + 0.05 * torch.from_numpy(draw.random((n, width)) - 0.5)
    return scaled(x).float()


def scaled(x: torch.Tensor) -> torch.Tensor:
    """``x`` with a mean squared norm of its width."""
    return x * (x.shape[1] / x.double().square().sum(1).mean()) ** 0.5


def load(path: Path | None, n: int, width: int, features: int, seed: int) -> Vectors:
    """Vectors of a file, rows shuffled by ``seed``, or planted ones where there is none."""
    if path is None:
        x = planted(n + HELD_OUT, width, directions=2 * features, active=24, seed=seed)
        return Vectors(x[:n], x[n:], f"planted superposition: {2 * features} directions, 24 a vector, seed {seed}")
    found = np.load(path, mmap_mode="r")
    found = found.reshape(-1, found.shape[-1])
    mask = path.with_name("keep.npy")
    kept = np.flatnonzero(np.load(mask)) if mask.exists() else np.arange(len(found))
    if found.shape[1] != width or len(kept) <= 2 * HELD_OUT:
        raise SystemExit(f"{path} holds {found.shape}: {width} columns and more than {2 * HELD_OUT} rows are needed")
    order = np.random.default_rng(seed).permutation(kept)[: n + HELD_OUT]
    x = scaled(torch.from_numpy(np.ascontiguousarray(found[np.sort(order)], dtype=np.float32)))
    x = x[torch.from_numpy(np.argsort(np.argsort(order)))]
    return Vectors(x[HELD_OUT:], x[:HELD_OUT], f"{len(x)} of {len(kept)} activations of {path.name}")
