"""Run texts once, then run them again with edits from the first edited position and the first edited block on.

1. The first run of a text keeps what enters the first block that an edit can change, and the keys and values of that block and
   of those after it.
2. A run with edits is a row. Positions before its first edited one are its past; they, and the blocks before the hook point,
   are not run again.
3. Rows of different length share a batch: the past is padded on the left and masked. New positions are padded on the right,
   where no earlier position attends to them.
4. Each row is read at one position, at the hook point ``sink``. The pass ends there, and the MLP in front of it runs at that
   position alone where nothing is edited in its block.
5. A row without a change is not run: it has its text's own activations, exactly.

Models whose blocks pass on more than one tensor run from the first block. Those that keep no keys and values (state-space models)
run from the first position.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from transformers import DynamicCache

from evalkit.errors import ModelError
from evalkit.interventions.hooks import Edit, NamedHooks, block_of, depth, edit_hooks, is_output, reach
from evalkit.models.language_model import LanguageModel, stop_here

ROWS = 128
"""Most rows of one pass: their pasts are gathered."""
SIMILAR, SHORT = 0.75, 4
"""Rows of a batch have at least this share of its longest; where that has few positions, a pass costs more than padding."""


class PrefixCache:
    """N texts of up to T tokens, each run once, ready to be run again with edits.

    Args:
        model: the language model.
        hook_points: where activations will be edited.
        sink: where rows are read: a hook point of a block.
        tokens: (N, T) token ids.

    Attributes:
        positions: positions run again so far, padding included.
        own_positions: positions of the first runs.

    Raises:
        ModelError: no such hook point, or T is longer than the model can read.
    """

    batch_positions = 512
    """Positions run again in one pass, about."""

    def __init__(self, model: LanguageModel, hook_points: Sequence[str], sink: str, tokens: Int[torch.Tensor, "N T"]) -> None:
        for name in (*hook_points, sink):
            model.check_hook_point(name)
        if tokens.shape[1] > model.context:
            raise ModelError(
                f"{tokens.shape[1]} tokens are more than the {model.context} this model can read at once",
                where=model.label,
                fix="use shorter texts",
            )
        self.model, self.tokens, self.hook_points, self.sink = model, tokens, list(hook_points), sink
        self.positions = self.own_positions = 0
        self._skip = min(map(reach, hook_points)) if model.can_skip else 0
        last = self._skip == model.n_layers
        self._entry = f"blocks.{self._skip - last}.hook_resid_{'post' if last else 'pre'}"
        self._enter = torch.empty(0)  # (N, T, d_model), activations at _entry; kept where blocks can be skipped
        self._past: list[tuple[torch.Tensor, torch.Tensor]] = []  # (N, T, heads, d_head) keys and values, from block _skip on
        self._narrow = ""

    @property
    def n(self) -> int:
        """Number of texts N."""
        return len(self.tokens)

    @torch.no_grad()
    def logits(self, final: Float[torch.Tensor, "J d_model"]) -> Float[torch.Tensor, "J V"]:
        """Logits of the next token from rows of the residual stream after the last block."""
        return head(self.model, final)

    @torch.no_grad()
    def _record(
        self,
        names: Sequence[str],
        length: Int[torch.Tensor, " N"],
        batches: Iterable[Sequence[int]],
        x: Float[torch.Tensor, "N T D"] | None = None,
    ) -> dict[str, Float[torch.Tensor, "N T E"]]:
        """Activations at ``names`` and ``sink`` of every text as it is, up to its ``length``, in the order of a forward pass.

        Sets ``_enter``, ``_past`` and ``_narrow``.

        Args:
            batches: texts that run together.
            x: activations at the only hook point, where they are known: if it is a block's output, the blocks before are not run.
        """
        model, (N, T) = self.model, self.tokens.shape
        found: dict[str, torch.Tensor] = {}
        wanted = dict.fromkeys([*names, self.sink])
        if x is not None and self._skip and is_output(self.hook_points[0]):
            self._enter = x[:, :T].to(model.device, model.dtype)
            found[self.hook_points[0]] = self._enter
            wanted.pop(self.hook_points[0], None)
            if self._skip == model.n_layers:
                return found | {self.sink: self._enter}
        elif model.can_skip:
            wanted[self._entry] = None
        whole = True
        for rows in batches:
            M = int(length[rows].max())
            self.own_positions += M * len(rows)
            enter = (self._skip, self._enter[rows, :M]) if len(self._enter) else None
            kept, blocks = run_to_last(model, self.tokens[rows, :M], wanted, enter, cached=True)
            for name, value in kept.items():
                if name not in found:
                    found[name] = value.new_zeros(N, T, value.shape[-1])
                found[name][rows, :M] = value
            held = self._held(blocks, M)
            whole = whole and held is not None
            if not held or not whole:
                continue
            if not self._past:
                # positions before heads: the past that a row takes from its text then lies in one piece
                self._past = [(k.new_zeros(N, T, *k.shape[2:]), v.new_zeros(N, T, *v.shape[2:])) for k, v in held]
            for (keys, values), (k, v) in zip(self._past, held, strict=True):
                keys[rows, :M], values[rows, :M] = k, v
        self._past = self._past if whole else []
        self._enter = found.get(self._entry, self._enter)
        self._narrow = self._last_mlp()
        return found

    def _held(self, blocks: Sequence[Any], T: int) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Keys and values (J, T, heads, d_head) from block ``_skip`` to ``sink``; None where a block keeps others, or nothing."""
        block, rank = depth(self.sink)
        kept = list(blocks[self._skip : block + 1])
        if rank < 2 and kept and getattr(kept[-1], "keys", None) is None:
            kept.pop()  # the pass ended before the last block had keys
        for layer in kept:
            keys = getattr(layer, "keys", None)
            if not isinstance(keys, torch.Tensor) or keys.ndim != 4 or keys.shape[2] != T:
                return None
        return [(layer.keys.transpose(1, 2), layer.values.transpose(1, 2)) for layer in kept]

    def _last_mlp(self) -> str:
        """Hook point where the MLP in front of ``sink`` may be cut to the position that is read; '' where it may not.

        It may where nothing is edited in its block, and where a trial on two positions gives what the whole block gives.
        """
        model, block = self.model, reach(self.sink) - 1
        mlp = f"blocks.{block}.mlp.hook_in"
        edited = any(block_of(name) == block or reach(name) > block for name in self.hook_points)
        if edited or not (model.can_skip and is_output(self.sink) and model.has(mlp)) or self.tokens.shape[1] < 2:
            return ""
        cuts: list[NamedHooks] = [[], [(mlp, lambda x, hook: x[:, 1:])]]
        runs = (run_to_last(model, self.tokens[:1, :2], [self.sink], (block, self._enter[:1, :2]), cut) for cut in cuts)
        whole, alone = (kept[self.sink][:, 1].float() for kept, _ in runs)
        return mlp if torch.allclose(alone, whole, rtol=1e-3, atol=1e-3 * float(whole.std())) else ""

    def _edited(
        self,
        rows: Int[torch.Tensor, " J"],
        last: Int[torch.Tensor, " J"],
        changed: Bool[torch.Tensor, "J T"],
        added: Callable[[torch.Tensor, torch.Tensor], Float[torch.Tensor, "B M D"]],
        out: Float[torch.Tensor, "J E"],
    ) -> int:
        """Write activations at ``sink`` into ``out``, for the rows that change anything up to ``last``; how many these are.

        Args:
            rows: the text of each row.
            changed: positions where something is added at the only hook point.
            added: what is added in a batch of rows (B,) at positions (B, M).
        """
        changed = changed & (torch.arange(changed.shape[1]) <= last[:, None])
        live = changed.any(1).nonzero()[:, 0].tolist()
        start = self._starts(changed.int().argmax(1))
        count = (last - start + 1).tolist()
        live.sort(key=lambda row: (-count[row], int(start[row])))
        for batch in map(torch.tensor, similar(live, count, self.batch_positions, ROWS)):
            change = added(batch, self._positions(start[batch], last[batch]))
            out[batch.to(out.device)] = self._add(rows[batch], start[batch], last[batch], change).to(out)
        return len(live)

    def _add(self, rows: torch.Tensor, start: torch.Tensor, last: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """As ``_run`` with ``change`` (J, M, D) added at the only hook point."""
        change = change.to(self.model.device, self.model.dtype)
        return self._run(rows, start, last, {self.hook_points[0]: lambda x: change})

    def _starts(self, first: Int[torch.Tensor, " J"]) -> Int[torch.Tensor, " J"]:
        """``first`` edited positions, where a run can begin there; else 0. It can where the blocks have a past, or none runs."""
        return first if self._past or self._skip == self.model.n_layers else torch.zeros_like(first)

    def _positions(self, start: Int[torch.Tensor, " J"], last: Int[torch.Tensor, " J"]) -> Int[torch.Tensor, "J M"]:
        """Positions that rows from ``start`` to ``last`` are run at; those of a row beyond its ``last`` are padding."""
        return (start[:, None] + torch.arange(int((last - start).max()) + 1)).clamp(max=self.tokens.shape[1] - 1)

    def _run(
        self,
        rows: Int[torch.Tensor, " J"],
        start: Int[torch.Tensor, " J"],
        last: Int[torch.Tensor, " J"],
        edits: Mapping[str, Edit],
        prefix: Int[torch.Tensor, " J"] | None = None,
    ) -> Float[torch.Tensor, "J E"]:
        """Activations at ``sink`` at the position ``last`` of texts ``rows``, run from ``start`` on with ``edits``.

        Gradients flow through ``edits`` where they are switched on.

        Args:
            prefix: the texts whose keys and values are the rows' past; their own where left out.
        """
        model, device = self.model, self.model.device
        positions = self._positions(start, last)
        J, M = positions.shape
        row, place = torch.arange(J, device=device), (last - start).to(device)
        value = self._enter[rows[:, None].to(device), positions.to(device)] if self._skip else None
        hooks: NamedHooks = []
        for name, edit in edits.items():
            made = edit_hooks(name, edit)
            if value is not None and is_output(name) and reach(name) == self._skip:
                value = made[0][1](value, None)  # this block does not run, so that its hook never fires
            else:
                hooks += made
        if value is not None and self._skip == model.n_layers:
            return value[row, place]
        self.positions += J * M
        if self._narrow:
            # one position comes out of the MLP and is added to all of them: right where it is read, and only there
            hooks.append((self._narrow, lambda x, hook: x[row, place][:, None]))
        P = int(start.max()) if self._past else 0
        attended = torch.cat([torch.arange(P) >= P - start[:, None], torch.ones(J, M, dtype=torch.bool)], dim=1)
        read: list[torch.Tensor] = []

        def leave(x: torch.Tensor, hook: Any) -> None:
            read.append(x.flatten(2)[row, place])
            stop_here(x, hook)

        model.run(
            self.tokens[rows[:, None], positions],
            [*hooks, (self.sink, leave)],
            enter=None if value is None else (self._skip, value),
            attention_mask=attended.long().to(device),
            position_ids=positions.to(device),
            past_key_values=self._past_of((rows if prefix is None else prefix).to(device), start, P) if P else None,
            use_cache=bool(P),
        )
        return read[0]

    def _past_of(self, rows: torch.Tensor, start: torch.Tensor, P: int) -> DynamicCache:
        """The first ``start`` positions of texts ``rows``, moved to the right end of P; what falls before 0 is masked."""
        cache = DynamicCache()
        source = (torch.arange(P) - (P - start[:, None])).clamp(min=0).to(self.model.device)  # (J, P)
        # blocks that are skipped: only the length of their past is asked for
        nothing = self._past[0][0][:1, :P, :1, :1].transpose(1, 2).expand(len(rows), -1, -1, -1)
        for layer in range(self._skip):
            cache.update(nothing, nothing, layer)
        for layer, pair in enumerate(self._past, start=self._skip):
            keys, values = (part[rows[:, None], source].transpose(1, 2) for part in pair)
            cache.update(keys, values, layer)
        return cache


def head(model: LanguageModel, final: Float[torch.Tensor, "J d_model"]) -> Float[torch.Tensor, "J V"]:
    """Logits from rows of the residual stream after the last block; gradients flow where they are switched on."""
    tokens = torch.zeros(len(final), 1, dtype=torch.int64)
    if model.can_skip:
        return model.run(tokens, [], enter=(model.n_layers, final[:, None]), use_cache=False).logits[:, 0]
    replace: NamedHooks = [(residual_after(model), lambda x, hook: final[:, None].to(x))]
    return model.run(tokens, replace, use_cache=False).logits[:, 0]


def residual_after(model: LanguageModel) -> str:
    """Hook point of the residual stream after the last block."""
    return f"blocks.{model.n_layers - 1}.hook_resid_post"


@torch.no_grad()
def run_to_last(
    model: LanguageModel,
    tokens: Int[torch.Tensor, "J M"],
    names: Collection[str],
    enter: tuple[int, torch.Tensor] | None = None,
    hooks: NamedHooks | None = None,
    *,
    cached: bool = False,
) -> tuple[dict[str, Float[torch.Tensor, "J M E"]], list[Any]]:
    """Activations at ``names`` in the order of one pass, which ends at the last of them, and what each block's cache holds.

    Args:
        enter: as ``LanguageModel.run`` takes it.
        hooks: further hooks.
        cached: whether keys and values are wanted.
    """
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def note(x: torch.Tensor, hook: Any) -> None:
            kept[name] = x.flatten(2).clone()
            if len(kept) == len(names):
                stop_here(x, hook)

        return note

    cache = model.empty_cache() if cached else None
    notes: NamedHooks = [(name, keep(name)) for name in names]
    model.run(tokens, [*(hooks or []), *notes], enter=enter, past_key_values=cache, use_cache=cached)
    return kept, list(cache.layers) if cache else []


def similar(order: Sequence[int], count: Sequence[int], positions: int, most: int) -> Iterator[list[int]]:
    """``order``, the longest first, in batches of at most ``most``, and about ``positions`` in all.

    What joins a batch is not much shorter than its longest, so that batches hold little padding.
    """
    left = list(order)
    while left:
        longest = count[left[0]]
        size = max(1, min(most, positions // longest))
        batch = [row for row in left[:size] if count[row] >= SIMILAR * longest or longest <= SHORT]
        yield batch
        left = left[len(batch) :]
