"""Activations straight from the language model: no more of them in memory than a bounded buffer holds.

1. Each pass visits the chunks of the text (``chunks``) in a new random order. So many chunks as fill half of the buffer are a
   refill. A random half of its rows is served with it, the other half together with the next refill's: rows of neighbouring
   refills mix, and none waits longer than one refill. What is served together is shuffled, and batches are cut from it.
2. Every order is drawn from the seed and the number of the pass or refill alone. To go on, the two refills that matter are
   made again: nothing of the buffer is in a checkpoint.
3. Where the model runs on an accelerator, a thread makes the next refill while the trainer works on this one. On the CPU both
   would fight for the same cores, so they take turns.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float

from evalkit.training.data.batches import BUFFER_BYTES, DataExhausted, Supply
from evalkit.training.data.chunks import Chunks
from evalkit.util.hashing import content_hash, short

WAIT_S = 0.2
"""Seconds between looks at whether the other thread is still wanted."""


class _Refill(NamedTuple):
    """Rows to serve, shuffled, and the number they came under."""

    number: int
    rows: torch.Tensor


class StreamSupply(Supply):
    """Shuffled batches of one hook point's chunks.

    Args:
        chunks: where rows come from.
        hook_point: one of its hook points.
        batch: rows B of each batch.
        seed: seed of their order.
        repeat: whether chunks may come again once all were presented.
        buffer_bytes: memory for rows that wait.
        overlap: make the next refill in a thread meanwhile; where the model runs on an accelerator when left out.
    """

    def __init__(
        self,
        chunks: Chunks,
        hook_point: str,
        batch: int,
        seed: int,
        *,
        repeat: bool = True,
        buffer_bytes: int = BUFFER_BYTES,
        overlap: bool | None = None,
    ) -> None:
        super().__init__(batch, seed, repeat)
        self.chunks, self.hook_point = chunks, hook_point
        half = buffer_bytes // (2 * 4 * chunks.widths[hook_point])
        self.group = max(1, min(chunks.count, half // (chunks.per_chunk * chunks.tokens.shape[1])))
        self._overlap = chunks.model.device.type != "cpu" if overlap is None else overlap
        self._number, self._offset, self._given = 0, 0, 0
        self._rows: torch.Tensor | None = None
        self._refills: Iterator[_Refill] | None = None
        self._thread: _Ahead | None = None
        self._pass: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    @property
    def identity(self) -> str:
        # where rows may not come again, the last refills are made of others
        return short(content_hash([self.chunks.identity(self.hook_point), self.group, self.repeat]))

    @property
    def vectors(self) -> int:
        return self.chunks.most

    def details(self) -> dict[str, Any]:
        found = self.chunks.limit(self.hook_point)
        limit = found if found < float("inf") else None
        return {"vectors": self.vectors, "streamed": True, "norm_limit": limit}

    def sample(self, rows: int, seed: int) -> Float[torch.Tensor, "N D"]:
        """Rows of the first chunks: windows come in random order of their documents already."""
        parts: list[torch.Tensor] = []
        for number in range(self.chunks.count):
            parts.append(self.chunks.peek(self.hook_point, number).cpu())
            if sum(map(len, parts)) >= rows:
                break
        return torch.cat(parts)[:rows]

    def next(self) -> Float[torch.Tensor, "B D"]:
        if self._refills is None:
            self._refills = self._start(self._number)
        parts: list[torch.Tensor] = []
        missing = self.batch
        while missing:
            if self._rows is None or self._offset >= len(self._rows):
                self._advance()
                continue
            part = self._rows[self._offset : self._offset + missing]
            parts.append(part)
            self._offset += len(part)
            missing -= len(part)
        self._given += 1
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _advance(self) -> None:
        """The next refill's rows; on going on, the offset into them is kept."""
        assert self._refills is not None
        refill = next(self._refills, None)
        if refill is None:
            raise DataExhausted(
                f"the text gave out after {self._given:,} batches of {self.batch}",
                where=self.hook_point,
                fix="lower tokens, give more text ([training] stream_tokens), or write repeat = true",
            )
        if self._rows is not None:
            self._offset = 0
        self._number, self._rows = refill.number, refill.rows

    def state(self) -> dict[str, Any]:
        return {"refill": self._number, "offset": self._offset, "batches": self._given}

    def load_state(self, state: dict[str, Any]) -> None:
        self._stop()
        self._number, self._offset, self._given = int(state["refill"]), int(state["offset"]), int(state["batches"])
        self._rows, self._refills = None, None

    def close(self) -> None:
        """End the thread, where there is one; no chunk is kept for this hook point any more."""
        self._stop()
        self._rows, self._refills = None, None
        self.chunks.release(self.hook_point)

    def _stop(self) -> None:
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    def _start(self, first: int) -> Iterator[_Refill]:
        if not self._overlap:
            return self._make(first)
        self._thread = _Ahead(self._make(first))
        return iter(self._thread)

    def _make(self, first: int) -> Iterator[_Refill]:
        """Refills from number ``first`` on: half of the new rows, and the half that waited, shuffled together."""
        waiting = self._split(first - 1)[1] if first else None
        number = first
        while True:
            now, later = self._split(number)
            parts = [part for part in (waiting, now) if part is not None]
            if not parts:
                return
            rows = torch.cat(parts)
            yield _Refill(number, rows[self._draw("shuffle", number, len(rows)).to(rows.device)])
            waiting, number = later, number + 1

    def _split(self, number: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The rows of refill ``number`` in two random halves; None where there is none any more."""
        parts = [self.chunks.take(self.hook_point, chunk) for chunk in self._chunks_of(number)]
        if not parts:
            return None, None
        rows = torch.cat(parts)
        order = self._draw("halves", number, len(rows)).to(rows.device)
        return rows[order[: len(rows) // 2]], rows[order[len(rows) // 2 :]]

    def _chunks_of(self, number: int) -> list[int]:
        count = self.chunks.count
        places = range(number * self.group, (number + 1) * self.group)
        return [self._place(place) for place in places if self.repeat or place < count]

    def _place(self, place: int) -> int:
        """The chunk at a place of the endless order of passes."""
        turn, within = divmod(place, self.chunks.count)
        if self._pass[0] != turn:
            self._pass = (turn, self._draw("pass", turn, self.chunks.count))
        return int(self._pass[1][within])

    def _draw(self, what: str, number: int, n: int) -> torch.Tensor:
        seed = int(content_hash([self.seed, what, number])[:15], 16)
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


class _Failure(NamedTuple):
    error: Exception


class _Ahead:
    """One refill ahead of its reader, in a thread."""

    def __init__(self, refills: Iterator[_Refill]) -> None:
        self._refills = refills
        self._queue: queue.Queue[_Refill | _Failure | None] = queue.Queue(maxsize=1)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="activations", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for refill in self._refills:
                if not self._put(refill):
                    return
            self._put(None)
        except Exception as error:  # raised again where it is waited for, in the reader's thread
            self._put(_Failure(error))

    def _put(self, item: _Refill | _Failure | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=WAIT_S)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[_Refill]:
        while True:
            item = self._queue.get()
            if isinstance(item, _Failure):
                raise item.error
            if item is None:
                return
            yield item

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopped.set()
        self._thread.join()
