"""Windows of tokens as chunks of activation rows, at several hook points from one run of the language model.

1. A chunk is ``POSITIONS`` positions of consecutive windows. It is run through the model up to the last of the hook points that
   are asked for, once for all of them, and its kept positions become rows.
2. The rule for massive activations is that of ``activations.capture``: not among the first positions of a window, and a norm
   within the limit, which is measured on the first chunk.
3. With a folder for shards, chunks are kept on disk (``shards``), for all hook points at once, and the model is run only for
   what is not there.
4. Without one, a hook point that is behind the others keeps its chunks in memory until it takes them, or is released. Rules
   leave different numbers of rows at different hook points, so that in a long run some fall behind further and further. What
   has no room is not kept: the model is run again for it when its turn comes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int

from evalkit.activations.massive import norm_limit
from evalkit.errors import CorpusError, DictionaryError
from evalkit.models.finite import broken, broken_message
from evalkit.training.data.shards import Manifest, ShardFolder
from evalkit.util.hashing import content_hash, short

VERSION = 1
"""Raise it whenever the same request would give other rows."""

POSITIONS = 8192
"""Positions a chunk."""
FORWARD = 2048
"""Positions a forward pass."""
WAITING_BYTES = 512 << 20
"""Memory, for each hook point, for chunks that wait to be taken."""
LEAST = 8
"""Chunks there is room for however little memory is given: a sample, and a refill of one chunk."""


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
    norm_multiple: float | None = None


class Chunks:
    """Windows of tokens as chunks of activation rows, at several hook points from one pass.

    Args:
        model: the language model.
        tokens: (N, T) token ids of the windows.
        windows: identity of the windows.
        hook_points: where to read. Without shards, each should be taken by somebody or released: what is not is kept.
        rule: which positions become rows.
        shards: folder for chunks on disk; they are kept nowhere when left out.
        positions: positions a chunk.
        waiting_bytes: memory, for each hook point, for chunks that wait to be taken; ``LEAST`` chunks fit whatever it is.

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
        waiting_bytes: int = WAITING_BYTES,
    ) -> None:
        self.model, self.tokens, self.rule, self.hook_points = model, tokens, rule, tuple(hook_points)
        self._wanted = list(self.hook_points)
        """Those that are not released."""
        self.per_chunk = max(1, positions // tokens.shape[1])
        self.count = -(-len(tokens) // self.per_chunk)
        self.widths = {hook_point: model.width(hook_point) for hook_point in self.hook_points}
        rows = self.per_chunk * tokens.shape[1]
        self._room = {name: max(LEAST, waiting_bytes // (4 * rows * width)) for name, width in self.widths.items()}
        """Chunks that may wait, by hook point."""
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
                self._make(0, hook_point)
            return self._limits[hook_point]

    def peek(self, hook_point: str, number: int) -> Float[torch.Tensor, "M D"]:
        """Rows of chunk ``number``, float32, which stay for a later ``take`` where there is room.

        Raises:
            DictionaryError: activations are NaN or infinite.
            CorpusError: the rule leaves no position of the first chunk.
            DiskFailed: a chunk cannot be kept.
        """
        with self._lock:
            shard = self._shards.get(hook_point)
            if shard is not None and shard.has(number) and hook_point in self._limits:
                return shard.read(number)
            kept = self._kept.get((hook_point, number))
            return self._make(number, hook_point) if kept is None else kept

    def take(self, hook_point: str, number: int) -> Float[torch.Tensor, "M D"]:
        """As ``peek``; the chunk is not kept in memory for this hook point any longer."""
        with self._lock:
            rows = self.peek(hook_point, number)
            self._kept.pop((hook_point, number), None)
            return rows

    def release(self, hook_point: str) -> None:
        """Keep nothing for ``hook_point`` any more: nobody will take it. Shards are written on, for later runs."""
        with self._lock:
            if not self._shards:
                self._wanted = [name for name in self._wanted if name != hook_point]
                self._kept = {key: rows for key, rows in self._kept.items() if key[0] != hook_point}

    def _make(self, number: int, asked: str) -> Float[torch.Tensor, "M D"]:
        """Run chunk ``number`` through the model, keep its rows, and give those of ``asked``; the first chunk decides about the
        norms."""
        if not {*self._wanted, asked} <= set(self._limits) and number != 0:
            self._make(0, asked)
        wanted = None
        for name, x in self._forward(number, asked).items():
            rows = self._rows(name, number, x)
            shard = self._shards.get(name)
            if shard is not None:
                shard.write(number, rows)
            elif self._has_room(name):
                self._kept[name, number] = rows
            if name == asked:
                wanted = rows if shard is None else shard.read(number)
        assert wanted is not None, "what is asked for is among what is read"
        return wanted

    def _rows(self, name: str, number: int, x: Float[torch.Tensor, "B T D"]) -> Float[torch.Tensor, "M D"]:
        """What the rule leaves of a chunk at one hook point."""
        lost = broken(x)
        if lost:
            what, fix = broken_message(lost, x.shape[0] * x.shape[1], "fitting text", getattr(self.model, "dtype", None))
            raise DictionaryError(what, where=name, fix=fix)
        norms = x.norm(dim=-1)  # (B, T)
        first = self.rule.first_positions
        if name not in self._limits:
            self._limits[name] = norm_limit(norms[:, first:].flatten().cpu().numpy(), self.rule.norm_multiple)
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
        return rows

    def _has_room(self, name: str) -> bool:
        return sum(waiting == name for waiting, _ in self._kept) < self._room[name]

    def _lacks(self, name: str, number: int) -> bool:
        """Whether a chunk that is run anyway should be read at ``name`` too."""
        if name not in self._limits:
            return True
        if name in self._shards:
            return not self._shards[name].has(number)
        return (name, number) not in self._kept and self._has_room(name)

    def _forward(self, number: int, asked: str) -> dict[str, torch.Tensor]:
        """Activations (B, T, D) of a chunk's windows at ``asked`` and every other hook point that lacks it."""
        windows = self.tokens[number * self.per_chunk : (number + 1) * self.per_chunk]
        lacking = [name for name in self.hook_points if name == asked or (name in self._wanted and self._lacks(name, number))]
        parts = [self.model.activations_at(part, lacking) for part in windows.split(max(1, FORWARD // windows.shape[1]))]
        return {name: torch.cat([part[name].float() for part in parts]) for name in lacking}
