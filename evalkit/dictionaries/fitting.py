"""What the fits of the baselines share: one pass over the data in bounded memory, and the fair read-out.

1. ``chunks`` reads (N, D) rows a few thousand at a time from memory or a memory-mapped file and refuses NaN and infinities.
2. ``moments`` accumulates the mean and the covariance in float64. It and the read-out move a stage on as they read.
3. ``sample`` draws rows without replacement by seed; ``mean_active`` measures a dictionary's L0 on them.
4. ``read_out`` finds, for codes that were published without a decoder (random directions, rectified neurons, one-sided
   ICA), the scalar gain g and the constant that minimise sum ||x - g * codes @ rows - constant||^2 over the fitting data.
   One scalar, not a full regression: the directions stay the published ones, and only their common scale is made fair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.registry import Vectors
from evalkit.errors import DictionaryError
from evalkit.util.batching import block_rows
from evalkit.util.progress import Stage

CHUNK = 8192
"""Rows read at a time: 19 MB at a width of 576."""


ACTIVE_ROWS = 20_000
"""Rows that a dictionary's L0 is measured on, where a baseline is given as much."""


class Moments(NamedTuple):
    """First and second moments of the fitting data, float64."""

    mean: Float[torch.Tensor, " D"]
    """Mean over the rows."""
    covariance: Float[torch.Tensor, "D D"]
    """Covariance with the divisor N - 1."""


class ReadOut(NamedTuple):
    """How codes without a published decoder are turned back into activations."""

    gain: float
    """Scale of the written rows."""
    constant: Float[torch.Tensor, " D"]
    """What is written when every code is zero, float32."""


def take(x: Vectors, rows: slice | np.ndarray) -> Float[torch.Tensor, "B D"]:
    """Some rows of ``x`` as a float32 tensor on the CPU that shares no memory with a file."""
    if isinstance(x, torch.Tensor):
        index = torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows
        return x[index].detach().to("cpu", torch.float32)
    return torch.from_numpy(np.array(x[rows], dtype=np.float32))


def chunks(x: Vectors, size: int = CHUNK) -> Iterator[Float[torch.Tensor, "B D"]]:
    """The rows of ``x`` in order, ``size`` at a time.

    Raises:
        DictionaryError: a row holds NaN or an infinity.
    """
    for start in range(0, x.shape[0], size):
        block = take(x, slice(start, start + size))
        if not torch.isfinite(block).all():
            bad = start + int((~torch.isfinite(block)).any(1).nonzero()[0])
            raise DictionaryError(
                f"activation vector {bad} holds NaN or an infinity", fix="check the model's dtype and the hook point"
            )
        yield block


def sample(x: Vectors, rows: int, seed: int) -> Float[torch.Tensor, "B D"]:
    """At most ``rows`` rows of ``x``, drawn without replacement, in file order."""
    n = x.shape[0]
    if n <= rows:
        return torch.cat(list(chunks(x)))
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    return torch.cat(list(chunks(take(x, chosen.numpy()))))


def mean_active(dictionary: Dictionary, x: Vectors, seed: int) -> float:
    """Mean number of non-zero codes of ``dictionary`` on at most ``ACTIVE_ROWS`` rows of ``x``, drawn by seed."""
    drawn = sample(x, ACTIVE_ROWS, seed)
    with torch.inference_mode():
        return float(
            torch.cat([(dictionary.encode_sparse(rows).values != 0).sum(1) for rows in drawn.split(1024)]).double().mean()
        )


def moments(x: Vectors, stage: Stage | None = None) -> Moments:
    """Mean and covariance of the rows of ``x``; ``stage``, counted in vectors, moves on with them.

    The sums are taken about the first chunk's mean, so that a large common offset costs no digits.
    """
    first = next(chunks(x)).double().mean(0)
    d = x.shape[1]
    total, outer = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for block in chunks(x):
        shifted = block.double() - first
        total += shifted.sum(0)
        outer += shifted.T @ shifted
        if stage is not None:
            stage.advance(len(block))
    n = x.shape[0]
    drift = total / n
    return Moments(first + drift, (outer - n * torch.outer(drift, drift)) / (n - 1))


def read_out(
    x: Vectors,
    encode: Callable[[torch.Tensor], torch.Tensor],
    rows: Float[torch.Tensor, "F D"] | None = None,
    stage: Stage | None = None,
) -> ReadOut:
    """The gain and the constant that reconstruct ``x`` best from ``gain * encode(x) @ rows + constant``.

    ``rows`` left out stands for the identity. ``stage``, counted in vectors, moves on as they are read.

    With written = encode(x) @ rows, the least-squares solution is gain = cov(x, written) / var(written), summed over the D
    dimensions, and constant = mean(x) - gain * mean(written). The gain is 0 where the codes never vary.
    """
    d = x.shape[1]
    sum_x, sum_w = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    cross, power = 0.0, 0.0
    for block in chunks(x, CHUNK if rows is None else max(1, min(CHUNK, block_rows(2 * rows.shape[0])))):
        codes = encode(block)
        written = (codes if rows is None else codes @ rows).double()
        wide = block.double()
        sum_x += wide.sum(0)
        sum_w += written.sum(0)
        cross += float((wide * written).sum())
        power += float((written * written).sum())
        if stage is not None:
            stage.advance(len(block))
    n = x.shape[0]
    covariance = cross - float(sum_x @ sum_w) / n
    variance = power - float(sum_w @ sum_w) / n
    gain = covariance / variance if variance > 1e-12 * max(power, 1e-300) else 0.0
    return ReadOut(gain, ((sum_x - gain * sum_w) / n).float())
