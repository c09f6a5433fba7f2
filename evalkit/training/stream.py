"""Activations straight from the language model: no more of them in memory than a bounded buffer holds.

1. Windows of tokens are taken in chunks of ``POSITIONS`` positions. A chunk is run through the model up to the last of the
   hook points that are asked for, once for all of them, and its kept positions become rows.
2. The rule for massive activations is that of ``activations.capture``: not among the first positions of a window, and a norm
   of at most a multiple of the median, which is measured on the first chunk.
3. Each pass visits the chunks in a new random order. So many chunks as fill half of the buffer are a refill. A random half of
   its rows is served with it, the other half together with the next refill's: rows of neighbouring refills mix, and none
   waits longer than one refill. What is served together is shuffled, and batches are cut from it.
4. Every order is drawn from the seed and the number of the pass or refill alone. To go on, the two refills that matter are
   made again: nothing of the buffer is in a checkpoint.
5. With a folder for shards, chunks are kept on disk (``shards``), for all hook points at once; without one, a hook point that
   is behind the others keeps its chunks in memory until it takes them.
6. Where the model runs on an accelerator, a thread makes the next refill while the trainer works on this one. On the CPU both
   would fight for the same cores, so they take turns.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int

from evalkit.errors import CorpusError, DictionaryError
from evalkit.hashing import content_hash, short
from evalkit.training.shards import Manifest, ShardFolder
from evalkit.training.supply import BUFFER_BYTES, DataExhausted, Supply

VERSION = 1
"""Raise it whenever the same request would give other rows."""

POSITIONS = 8192
"""Positions a chunk."""
FORWARD = 2048
"""Positions a forward pass."""
WAIT_S = 0.2
"""Seconds between looks at whether the other thread is still wanted."""


@runtime_checkable
class Source(Protocol):
    """A language model as the stream needs it: ``models.language_model.LanguageModel``."""

    identity: str
    device: torch.device

    def width(self, hook_point: str) -> int:
        """Width D at ``hook_point``."""
        ...

    def activations_at(self, tokens: torch.Tensor, hook_points: Sequence[str]) -> dict[str, torch.Tensor]:
        """Activations (B, T, D) of tokens (B, T) at each of ``hook_points``, from one run that ends at the last of them."""
        ...


class Rule(NamedTuple):
    """Which positions are left out as massive activations; see ``activations.capture.ExclusionConfig``."""

    first_positions: int = 2
    norm_multiple: float = 5.0


class Chunks:
    """Windows of tokens as chunks of activation rows, at several hook points from one pass.

    Args:
        model: the language model.
        tokens: (N, T) token ids of the windows.
        windows: identity of the windows.
        hook_points: where to read. Without shards, each must be taken by somebody: what is not is kept.
        rule: which positions become rows.
        shards: folder for chunks on disk; they are kept nowhere when left out.
        positions: positions a chunk.

    Raises:
        ModelError: no such hook point.
    """

    def __init__(
        self,
        model: Source,
        tokens: Int[torch.Tensor, "N T"],
        windows: str,
        hook_points: Sequence[str],
        rule: Rule,
        *,
        shards: Path | None = None,
        positions: int = POSITIONS,
    ) -> None:
        self.model, self.tokens, self.rule, self.hook_points = model, tokens, rule, tuple(hook_points)
        self.per_chunk = max(1, positions // tokens.shape[1])
        self.count = -(-len(tokens) // self.per_chunk)
        self.widths = {hook_point: model.width(hook_point) for hook_point in self.hook_points}
        self._key = [VERSION, model.identity, windows, list(rule), self.per_chunk]
        self._kept: dict[tuple[str, int], torch.Tensor] = {}
        self._limits: dict[str, float] = {}
        self._lock = threading.RLock()
        self._shards: dict[str, ShardFolder] = {}
        if shards is not None:
            self._shards = {name: ShardFolder(shards / self.identity(name)) for name in self.hook_points}
            known = {name: folder.manifest() for name, folder in self._shards.items()}
            self._limits = {name: manifest.limit for name, manifest in known.items() if manifest is not None}

    def identity(self, hook_point: str) -> str:
        """Short hash of everything that determines the rows at ``hook_point``."""
        return short(content_hash([*self._key, hook_point]))

    @property
    def most(self) -> int:
        """Rows of all chunks, if only the first positions are left out."""
        windows, context = self.tokens.shape
        return windows * max(0, context - self.rule.first_positions)

    def limit(self, hook_point: str) -> float:
        """Largest norm kept at ``hook_point``, infinite where there is no limit.

        Raises:
            CorpusError: the rule leaves no position.
        """
        with self._lock:
            if hook_point not in self._limits:
                self._make(0)
            return self._limits[hook_point]

    def peek(self, hook_point: str, number: int) -> Float[torch.Tensor, "M D"]:
        """Rows of chunk ``number``, float32, which stay for a later ``take``.

        Raises:
            DictionaryError: activations are NaN or infinite.
            CorpusError: the rule leaves no position of the first chunk.
            DiskFailed: a chunk cannot be kept.
        """
        with self._lock:
            shard = self._shards.get(hook_point)
            if shard is not None and shard.has(number) and hook_point in self._limits:
                return shard.read(number)
            if (hook_point, number) not in self._kept:
                self._make(number)
            return shard.read(number) if shard is not None else self._kept[hook_point, number]

    def take(self, hook_point: str, number: int) -> Float[torch.Tensor, "M D"]:
        """As ``peek``; the chunk is not kept in memory for this hook point any longer."""
        with self._lock:
            rows = self.peek(hook_point, number)
            self._kept.pop((hook_point, number), None)
            return rows

    def _make(self, number: int) -> None:
        """Run chunk ``number`` through the model and keep its rows; the first one decides about the norms."""
        if not set(self.hook_points) <= set(self._limits) and number != 0:
            self._make(0)
        found = self._forward(number)
        for name, x in found.items():
            if not torch.isfinite(x).all():
                raise DictionaryError(
                    "activations hold NaN or an infinity", where=name, fix="check the model's dtype and the hook point"
                )
            norms = x.norm(dim=-1)  # (B, T)
            first = self.rule.first_positions
            if name not in self._limits:
                later = norms[:, first:]
                some = bool(self.rule.norm_multiple) and later.numel() > 0
                self._limits[name] = float(later.median()) * self.rule.norm_multiple if some else float("inf")
                if name in self._shards:
                    self._shards[name].begin(Manifest(self._limits[name], x.shape[-1]))
            keep = norms <= self._limits[name]
            keep[:, :first] = False
            rows = x[keep]
            if number == 0 and not len(rows):
                raise CorpusError(
                    f"the rule for massive activations leaves no position at {name}",
                    where="[activations]",
                    fix="use longer windows ([corpus] context) or a smaller first_positions",
                )
            if name in self._shards:
                self._shards[name].write(number, rows)
            else:
                self._kept[name, number] = rows

    def _forward(self, number: int) -> dict[str, torch.Tensor]:
        """Activations (B, T, D) of a chunk's windows at every hook point that lacks it."""
        windows = self.tokens[number * self.per_chunk : (number + 1) * self.per_chunk]
        lacking = [name for name in self.hook_points if name not in self._shards or not self._shards[name].has(number)]
        lacking += [name for name in self.hook_points if name not in self._limits and name not in lacking]
        parts = [self.model.activations_at(part, lacking) for part in windows.split(max(1, FORWARD // windows.shape[1]))]
        return {name: torch.cat([part[name].float() for part in parts]) for name in lacking}


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
        self.close()
        self._number, self._offset, self._given = int(state["refill"]), int(state["offset"]), int(state["batches"])
        self._rows, self._refills = None, None

    def close(self) -> None:
        """End the thread, where there is one."""
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


def together(supplies: dict[str, Supply]) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of several hook points side by side, as long as all have one; from one pass where they share ``Chunks``."""
    while True:
        yield {hook_point: supply.next() for hook_point, supply in supplies.items()}
