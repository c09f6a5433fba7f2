"""Edit single features in windows of text and read the next token, many edits at once.

1. Each window runs once as it is, from behind the hook point where what stands there is known. Keys and values of the blocks that
   ran are kept, and what the head reads at every position.
2. An edit is a row: a window, a direction, how much of it is added at each position, and the position whose next token is read.
   Positions before the first edited one are not run again (their keys and values are the row's past), nor are those behind the
   one that is read, nor the blocks before the hook point. A feature that fires once costs one position of the later blocks.
3. Rows of different length share a batch: the past is padded on the left and masked, new positions on the right, where no
   earlier one sees them. The head reads one position a row.
4. A row that changes nothing is not run: it has the window's own logits, exactly.

Models whose blocks hand on more than one tensor run from the first block; those that keep no keys and values run from the first
position.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from transformers import DynamicCache

from evalkit.models.language_model import Hooks, LanguageModel, stop_here
from evalkit.patching.rerun import HEAD, edit_hooks, reach

POSITIONS = 512
"""Positions run again in one pass, about."""
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

    Attributes:
        final: (W, T, d_model) the residual stream behind the last block, unedited, in the model's dtype.
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
    ) -> None:
        model.check_hook_point(hook_point)
        self.model, self.hook_point, self.tokens = model, hook_point, tokens
        self.positions = 0
        self._last = f"blocks.{model.n_layers - 1}.hook_resid_post"
        self._skip = reach(hook_point) if model.can_skip else 0
        self._is_output = bool(self._skip) and reach(hook_point) == int(hook_point.split(".")[1]) + 1
        self._record(x)

    @torch.no_grad()
    def _record(self, x: torch.Tensor | None) -> None:
        """``final``, what enters the first block that runs again, and keys and values of the blocks from there on."""
        model, T = self.model, self.tokens.shape[1]
        found: dict[str, torch.Tensor] = {}
        inside = self._skip < model.n_layers
        entry = f"blocks.{self._skip if inside else self._skip - 1}.hook_resid_{'pre' if inside else 'post'}"

        def keep(name: str) -> Any:
            def note(value: torch.Tensor, hook: Any) -> None:
                found[name] = value.clone()

            return note

        known = x.to(model.device, model.dtype) if x is not None and self._is_output else None
        if known is not None and not inside:
            self._enter = self.final = known
            self._past: list[tuple[torch.Tensor, torch.Tensor]] = []
            return
        names = [self._last] if known is not None else list(dict.fromkeys([entry, self._last]))
        # logits are read later, where they are wanted: those of all positions would fill the memory
        hooks: Hooks = [*((name, keep(name)) for name in names), (HEAD, lambda value, hook: value[:, -1:])]
        enter = None if known is None else (self._skip, known)
        output = model.run(self.tokens, hooks, enter=enter, use_cache=True)
        self.final = found[self._last]
        self._enter = known if known is not None else found[entry]
        layers = getattr(getattr(output, "past_key_values", None), "layers", [])[self._skip :]
        whole = len(layers) == model.n_layers - self._skip and all(
            isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.keys.ndim == 4 and layer.keys.shape[2] == T
            for layer in layers
        )
        self._past = [(layer.keys, layer.values) for layer in layers] if whole else []

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
            last: the position that is read; edits behind it do nothing.
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
        # the longest first; what joins it is not much shorter, so that batches hold little padding
        count = last - start + 1
        ordered = sorted(rows.tolist(), key=lambda row: (-int(count[row]), int(start[row])))
        while ordered:
            longest = int(count[ordered[0]])
            most = max(1, min(ROWS, POSITIONS // longest))
            alike = [row for row in ordered[:most] if int(count[row]) >= ALIKE * longest or longest <= SHORT]
            batch, ordered = torch.tensor(alike), ordered[len(alike) :]
            found = self._run(window[batch], start[batch], count[batch], amount[batch], direction[batch])
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
        found: list[torch.Tensor] = []

        def leave(value: torch.Tensor, hook: Any) -> None:
            found.append(value[torch.arange(len(window), device=device), (count - 1).to(device)])
            stop_here(value, hook)

        hooks: Hooks = [] if self._is_output else [*edit_hooks(self.hook_point, lambda value: added)]
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
        keys = self._past[0][0]
        # blocks that are skipped: only the length of their past is asked for
        nothing = keys[:1, :1, :P, :1].expand(len(window), -1, -1, -1)
        for layer in range(self._skip):
            cache.update(nothing, nothing, layer)
        for layer, (keys, values) in enumerate(self._past, start=self._skip):
            # rows first, then positions: (J, P, heads, d_head)
            keys, values = (part.transpose(1, 2)[window[:, None], source].transpose(1, 2) for part in (keys, values))
            cache.update(keys, values, layer)
        return cache
