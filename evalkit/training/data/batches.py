"""Shuffled batches of activations in bounded memory, the same for the same seed, and where a run stands in them.

1. ``Supply`` is what a training run is fed from: batches, a sample for the starting point, an identity, and a state to go on
   from. ``VectorSupply`` reads rows from memory or from a memory-mapped file; ``stream.StreamSupply`` asks a language model.
2. Rows are cut into short runs; each pass visits the runs in a new random order.
3. Runs fill a buffer of at most ``buffer`` rows, the buffer is shuffled, and batches are cut from it. Data that fit the
   buffer are shuffled exactly. A run is short against the buffer, so neighbours in the file (tokens of one text) land in
   different batches.
4. What a pass leaves over starts the next pass's first batch, so that every batch is full and no row is favoured.
5. To go on at batch n, the same order is drawn again and its first n batches are passed over without reading a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from evalkit.dictionaries.fitting import sample, take
from evalkit.dictionaries.registry import Vectors
from evalkit.errors import DictionaryError, SuiteError, UnitFailed
from evalkit.util.hashing import short, tensors_hash

BUFFER_BYTES = 512 << 20
"""Memory the shuffle buffer may take; two buffers can be alive at the border between them."""

RUN = 32
"""Neighbouring rows read together: long enough for a disk, short against any buffer."""

FINGERPRINT = 4096
"""Rows that stand for the data where nobody names them."""


class DataExhausted(UnitFailed):
    """The text gave out before the run's last step, and repeating it is not allowed."""


class Supply(ABC):
    """Where a training run's batches come from.

    Args:
        batch: rows B of each batch.
        seed: seed of their order.
        repeat: whether rows may come again once all were presented.
    """

    def __init__(self, batch: int, seed: int, repeat: bool) -> None:
        self.batch, self.seed, self.repeat = batch, seed, repeat

    @property
    @abstractmethod
    def identity(self) -> str:
        """Names the rows: a checkpoint made with others is refused."""

    @property
    @abstractmethod
    def vectors(self) -> int:
        """Rows of one pass, or the most there can be."""

    @abstractmethod
    def sample(self, rows: int, seed: int) -> Float[torch.Tensor, "N D"]:
        """About ``rows`` rows, float32 on the CPU, that move the supply on by nothing.

        Raises:
            DictionaryError: one of them holds NaN or an infinity.
        """

    @abstractmethod
    def next(self) -> Float[torch.Tensor, "B D"]:
        """The next batch, float32.

        Raises:
            DataExhausted: there is none, and ``repeat`` is false.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Where the supply stands, to go on from."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken: the same batches follow, bit for bit."""

    def details(self) -> dict[str, Any]:
        """Facts that belong into the finished dictionary."""
        return {"vectors": self.vectors}

    def close(self) -> None:  # noqa: B027 - most supplies hold nothing
        """Let go of what was held. A supply that was closed is not asked again."""

    def note(self, wanted: int) -> str:
        """What a reader should know where ``wanted`` rows are more than one pass has; '' where they are not.

        Raises:
            SuiteError: they are, and ``repeat`` is false.
        """
        if wanted <= self.vectors:
            return ""
        if not self.repeat:
            raise SuiteError(
                f"{wanted:,} activations are to be presented, and the text has {self.vectors:,}",
                where="[training] repeat = false",
                fix="lower tokens, give more text ([corpus] fit_tokens or [training] stream_tokens), or write repeat = true",
            )
        return f"{self.vectors:,} activations are presented about {wanted / self.vectors:.1f} times each"


class VectorSupply(Supply):
    """Batches of rows that lie in memory or in a memory-mapped file.

    Args:
        x: (N, D) activations.
        batch: rows B of each batch; may exceed N.
        seed: seed of their order.
        repeat: whether rows may come again once all were presented.
        identity: names the rows; made from their number and some of them when left out.
        buffer: rows shuffled together; as many as ``BUFFER_BYTES`` hold when left out.

    Raises:
        DictionaryError: ``x`` does not hold at least two rows.
    """

    def __init__(
        self,
        x: Vectors,
        batch: int,
        seed: int,
        *,
        repeat: bool = True,
        identity: str = "",
        buffer: int | None = None,
        where: str = "",
    ) -> None:
        super().__init__(batch, seed, repeat)
        if x.ndim != 2 or x.shape[0] < 2:
            raise DictionaryError(
                f"training needs at least two activation vectors as rows, not an array of shape {tuple(x.shape)}",
                where=where,
                fix="give it more fitting text",
            )
        self._x, self._identity, self._buffer = x, identity, buffer
        self._given = 0
        self._batches: Iterator[torch.Tensor] | None = None

    @property
    def identity(self) -> str:
        if not self._identity:
            rows = sample(self._x, FINGERPRINT, 0)
            self._identity = short(tensors_hash({"rows": rows}, list(self._x.shape)))
        return self._identity

    @property
    def vectors(self) -> int:
        return int(self._x.shape[0])

    def sample(self, rows: int, seed: int) -> Float[torch.Tensor, "N D"]:
        return sample(self._x, rows, seed)

    def next(self) -> Float[torch.Tensor, "B D"]:
        if not self.repeat and (self._given + 1) * self.batch > self.vectors:
            raise DataExhausted(
                f"all {self.vectors:,} activations were presented after {self._given:,} batches",
                fix="lower tokens, give more text, or write repeat = true",
            )
        if self._batches is None:
            passed = self._given * self.batch
            self._batches = batches(self._x, self.batch, self.seed, buffer=self._buffer, passed=passed)
        self._given += 1
        return next(self._batches)

    def state(self) -> dict[str, Any]:
        return {"batches": self._given}

    def load_state(self, state: dict[str, Any]) -> None:
        self._given, self._batches = int(state["batches"]), None


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


def batches(
    x: Vectors, size: int, seed: int, *, buffer: int | None = None, passed: int = 0
) -> Iterator[Float[torch.Tensor, "B D"]]:
    """Endless shuffled batches of exactly ``size`` rows, float32 on the CPU.

    Args:
        x: (N, D) activations.
        size: rows a batch; may exceed N.
        seed: seed of the order.
        buffer: rows shuffled together; as many as ``BUFFER_BYTES`` hold when left out.
        passed: rows of the order to pass over before the first batch.
    """
    n, width = x.shape
    rows = buffer if buffer is not None else max(size, BUFFER_BYTES // (4 * width))
    in_memory = isinstance(x, torch.Tensor) or not isinstance(x, np.memmap)
    waiting: list[torch.Tensor] = []
    have = 0
    for order in orders(n, n if in_memory else rows, torch.Generator().manual_seed(seed)):
        if passed >= len(order):
            passed -= len(order)
            continue
        order, passed = order[passed:], 0
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
