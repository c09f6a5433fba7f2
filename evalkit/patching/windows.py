"""Edit single features in windows of text and read the next token, many edits at once.

1. Each window runs once as it is, from behind the hook point where what stands there is known, and up to the last position that
   will be read in it. Keys and values of the blocks that ran are kept, and what the head reads at every position.
2. An edit is a row: a window, a direction, how much of it is added at each position, and the position whose next token is read.
   Positions before the first edited one are not run again (their keys and values are the row's past), nor are those behind the
   one that is read, nor the blocks before the hook point. A feature that fires once costs one position of the later blocks.
3. Windows, and rows, of similar length share a batch: the past is padded on the left and masked, new positions on the right,
   where no earlier one sees them. The head reads one position a row, and the last block's MLP runs at that one alone where
   nothing is edited in that block: no other position of it is read.
4. A row that changes nothing is not run: it has the window's own logits, exactly.

Models whose blocks hand on more than one tensor run from the first block; those that keep no keys and values run from the first
position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from transformers import DynamicCache

from evalkit.models.language_model import Hooks, LanguageModel, stop_here
from evalkit.patching.rerun import HEAD, edit_hooks, reach

POSITIONS = 512
"""Positions run again in one pass, about."""
OWN = 2048
"""Positions of windows as they are in one pass, about."""
ROWS = 128
"""Rows of one pass at most: their pasts are gathered."""
ALIKE, SHORT = 0.75, 4
"""Rows of a batch are at least this share of its longest; where that has few positions, a pass costs more than padding."""


class Windows:
    """W windows of T tokens, ready to be run on from ``hook_point`` with edits.

    Args:
        model: the language model.
        hook_point: where edits are made.
        tokens: (W, T) token ids.
        x: (W, T, D) what stands at ``hook_point``, where it is known: the blocks before are not run then.
        length: (W,) how many positions of each window are wanted; all T where left out.

    Attributes:
        final: (W, T, d_model) the residual stream behind the last block, unedited, in the model's dtype; anything behind
            ``length``.
        own_positions: positions of the windows' own runs.
        positions: positions run again so far.

    Raises:
        ModelError: no such hook point.
    """

    def __init__(
        self,
        model: LanguageModel,
        hook_point: str,
        tokens: Int[torch.Tensor, "W T"],
        x: Float[torch.Tensor, "W T D"] | None = None,
        length: Int[torch.Tensor, " W"] | None = None,
    ) -> None:
        model.check_hook_point(hook_point)
        self.model, self.hook_point, self.tokens = model, hook_point, tokens
        self.length = torch.full((len(tokens),), tokens.shape[1]) if length is None else length
        self.positions = self.own_positions = 0
        self._last = f"blocks.{model.n_layers - 1}.hook_resid_post"
        self._skip = reach(hook_point) if model.can_skip else 0
        self._is_output = bool(self._skip) and reach(hook_point) == int(hook_point.split(".")[1]) + 1
        self._record(x)
        self._narrow = reads_one_position(model, hook_point, self._last, self.tokens, self.final)

    @torch.no_grad()
    def _record(self, x: torch.Tensor | None) -> None:
        """``final``, what enters the first block that runs again, and keys and values of the blocks from there on."""
        model, (W, T) = self.model, self.tokens.shape
        known = x.to(model.device, model.dtype) if x is not None and self._is_output else None
        self._past: list[tuple[torch.Tensor, torch.Tensor]] = []
        if known is not None and self._skip == model.n_layers:
            self._enter = self.final = known
            return
        self.final = torch.zeros(W, T, model.d_model, device=model.device, dtype=model.dtype)
        self._enter = torch.zeros_like(self.final) if known is None else known
        length = self.length.tolist()
        order = sorted(range(W), key=lambda window: -length[window])
        whole = True
        for rows in alike(order, length, OWN, W):
            M = length[rows[0]]
            final, enter, layers = self._run_own(self.tokens[rows, :M], None if known is None else known[rows, :M])
            self.own_positions += M * len(rows)
            self.final[rows, :M] = final
            if known is None:
                self._enter[rows, :M] = enter
            whole = whole and len(layers) == model.n_layers - self._skip and all(
                isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.keys.ndim == 4 and layer.keys.shape[2] == M
                for layer in layers
            )  # fmt: skip
            if whole and not self._past:
                # positions before heads: what a row takes of its window's past then lies in one piece
                shapes = [(part.shape[1], part.shape[3]) for layer in layers for part in (layer.keys, layer.values)]
                room = [layers[0].keys.new_zeros(W, T, *shape) for shape in shapes]
                self._past = list(zip(room[::2], room[1::2], strict=True))
            for (keys, values), layer in zip(self._past if whole else [], layers, strict=whole):
                keys[rows, :M], values[rows, :M] = layer.keys.transpose(1, 2), layer.values.transpose(1, 2)
        self._past = self._past if whole else []

    def _run_own(self, tokens: torch.Tensor, known: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
        """Of windows as they are: ``final``, what enters the first block that runs again, what each block from there keeps."""
        model, found = self.model, dict[str, torch.Tensor]()
        inside = self._skip < model.n_layers
        entry = f"blocks.{self._skip if inside else self._skip - 1}.hook_resid_{'pre' if inside else 'post'}"

        def keep(name: str) -> Any:
            def note(value: torch.Tensor, hook: Any) -> None:
                found[name] = value.clone()

            return note

        names = [self._last] if known is not None else list(dict.fromkeys([entry, self._last]))
        # logits are read later, where they are wanted: those of all positions would fill the memory
        hooks: Hooks = [*((name, keep(name)) for name in names), (HEAD, lambda value, hook: value[:, -1:])]
        output = model.run(tokens, hooks, enter=None if known is None else (self._skip, known), use_cache=True)
        layers = list(getattr(getattr(output, "past_key_values", None), "layers", []))
        return found[self._last], found[entry] if known is None else known, layers[self._skip :]

    @torch.no_grad()
    def edited(
        self,
        window: Int[torch.Tensor, " J"],
        last: Int[torch.Tensor, " J"],
        amount: Float[torch.Tensor, "J T"],
        direction: Float[torch.Tensor, "J D"],
    ) -> Float[torch.Tensor, "J d_model"]:
        """The residual stream behind the last block at position ``last`` of each row.

        Args:
            window: which window each row edits.
            last: the position that is read, within the window's ``length``; edits behind it do nothing.
            amount: multiples of ``direction`` added at each position of ``hook_point``.
            direction: what is added.
        """
        device = self.model.device
        amount = amount * (torch.arange(amount.shape[1]) <= last[:, None])
        out = self.final[window.to(device), last.to(device)].clone()
        changed = (amount != 0) & (direction != 0).any(-1, keepdim=True)  # (J, T)
        first = changed.int().argmax(1)
        start = first if self._past else torch.zeros_like(first)
        rows = changed.any(1).nonzero()[:, 0]
        if self._skip == self.model.n_layers:
            moved = amount[rows, last[rows], None] * direction[rows]
            out[rows.to(device)] += moved.to(out)
            return out
        count = (last - start + 1).tolist()
        ordered = sorted(rows.tolist(), key=lambda row: (-count[row], int(start[row])))
        for rows_alike in alike(ordered, count, POSITIONS, ROWS):
            batch = torch.tensor(rows_alike)
            found = self._run(window[batch], start[batch], (last - start + 1)[batch], amount[batch], direction[batch])
            out[batch.to(device)] = found.to(out)
        return out

    def logits(self, final: Float[torch.Tensor, "J d_model"]) -> Float[torch.Tensor, "J V"]:
        """Logits of the next token from rows of the residual stream behind the last block."""
        tokens = torch.zeros(len(final), 1, dtype=torch.int64)
        edit: Hooks = [(self._last, lambda found, hook: final[:, None].to(found))]
        with torch.no_grad():
            if self.model.can_skip:
                return self.model.run(tokens, [], enter=(self.model.n_layers, final[:, None]), use_cache=False).logits[:, 0]
            return self.model.run(tokens, edit, use_cache=False).logits[:, 0]

    def _run(
        self, window: torch.Tensor, start: torch.Tensor, count: torch.Tensor, amount: torch.Tensor, direction: torch.Tensor
    ) -> torch.Tensor:
        model, device = self.model, self.model.device
        M, P = int(count.max()), int(start.max())
        self.positions += M * len(window)
        place = (start[:, None] + torch.arange(M)).clamp(max=self.tokens.shape[1] - 1)  # (J, M)
        added = (amount.gather(1, place)[..., None] * direction[:, None]).to(device, model.dtype)
        seen = torch.cat([torch.arange(P) >= P - start[:, None], torch.ones(len(window), M, dtype=torch.bool)], dim=1)
        each, read = torch.arange(len(window), device=device), (count - 1).to(device)
        found: list[torch.Tensor] = []

        def leave(value: torch.Tensor, hook: Any) -> None:
            found.append(value[each, read])
            stop_here(value, hook)

        hooks: Hooks = [] if self._is_output else [*edit_hooks(self.hook_point, lambda value: added)]
        if self._narrow:
            # one position comes out of the MLP and is added to all of them: right where it is read
            hooks.append((mlp_of(self._last), lambda value, hook: value[each, read][:, None]))
        enter = None
        if self._skip:
            value = self._enter[window[:, None].to(device), place.to(device)]
            enter = (self._skip, value + added if self._is_output else value)
        model.run(
            self.tokens[window[:, None], place],
            [*hooks, (self._last, leave)],
            enter=enter,
            attention_mask=seen.long().to(device),
            position_ids=place.to(device),
            past_key_values=self._past_of(window.to(device), start, P) if P else None,
            use_cache=bool(P),
        )
        return found[0]

    def _past_of(self, window: torch.Tensor, start: torch.Tensor, P: int) -> DynamicCache:
        """The first ``start`` positions of each row's window, moved to the right end of P; what falls before 0 is masked."""
        cache = DynamicCache()
        device = self.model.device
        source = (torch.arange(P) - (P - start[:, None])).clamp(min=0).to(device)  # (J, P)
        keys = self._past[0][0].transpose(1, 2)
        # blocks that are skipped: only the length of their past is asked for
        nothing = keys[:1, :1, :P, :1].expand(len(window), -1, -1, -1)
        for layer in range(self._skip):
            cache.update(nothing, nothing, layer)
        for layer, (keys, values) in enumerate(self._past, start=self._skip):
            keys, values = (part[window[:, None], source].transpose(1, 2) for part in (keys, values))
            cache.update(keys, values, layer)
        return cache


def mlp_of(output: str) -> str:
    """What goes into the MLP of the block whose output stands at the hook point ``output``."""
    return f"blocks.{output.split('.')[1]}.mlp.hook_in"


@torch.no_grad()
def reads_one_position(
    model: LanguageModel, edited: str, output: str, tokens: Int[torch.Tensor, "W T"], x: Float[torch.Tensor, "W T d_model"]
) -> bool:
    """Whether the MLP of the block that ends in ``output`` may run at the position alone that is read there.

    Nothing is edited in that block, and trying it on two positions gives what the whole block gives.

    Args:
        x: any residual stream, to try it on.
    """
    block = int(output.split(".")[1])
    if not model.can_skip or edited.startswith(f"blocks.{block}.") or reach(edited) > block or reach(output) != block + 1:
        return False
    if not model.has(mlp_of(output)) or tokens.shape[1] < 2:
        return False
    found: list[torch.Tensor] = []

    def leave(value: torch.Tensor, hook: Any) -> None:
        found.append(value[:, 1].float())
        stop_here(value, hook)

    narrow: Hooks = [(mlp_of(output), lambda value, hook: value[:, 1:])]
    for hooks in ([], narrow):
        model.run(tokens[:1, :2], [*hooks, (output, leave)], enter=(block, x[:1, :2]), use_cache=False)
    whole, alone = found
    return torch.allclose(alone, whole, rtol=1e-3, atol=1e-3 * float(whole.std()))


def alike(order: Sequence[int], count: Sequence[int], positions: int, most: int) -> Iterator[list[int]]:
    """``order``, the longest first, in batches of at most ``most``, and about ``positions`` in all.

    What joins a batch is not much shorter than its longest, so that batches hold little padding.
    """
    left = list(order)
    while left:
        longest = count[left[0]]
        size = max(1, min(most, positions // longest))
        batch = [row for row in left[:size] if count[row] >= ALIKE * longest or longest <= SHORT]
        yield batch
        left = left[len(batch) :]
