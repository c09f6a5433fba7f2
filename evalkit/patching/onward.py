"""Run contexts from one hook point on to a later one: what a change at the first does to the last token at the second.

1. Each context is run once as it is, from behind the first hook point where what stands there is known. What stands at both is
   kept, with the keys and values of the blocks between them.
2. A changed run is a row: which context, and what is added at the first hook point at every position. Positions before the
   first change are not run again, their keys and values are the row's past; blocks before the first hook point are not run,
   nor is anything behind the second, nor the MLP in front of it at positions that are not read. Rows of similar length share a
   batch: the past is padded on the left and masked, new tokens on the right, where no earlier position sees them.
3. Gradients of numbers read at the second hook point with respect to the first come from one pass there and back for each
   context.

Models whose blocks hand on more than one tensor run from the first block; those that keep no keys and values run from the first
position.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from transformers import DynamicCache

from evalkit.errors import ModelError
from evalkit.models.language_model import Hooks, LanguageModel, stop_here
from evalkit.patching.rerun import edit_hooks, reach
from evalkit.patching.windows import ROWS, alike, mlp_of, reads_one_position

_PLACES = (
    "hook_(resid_pre|in)",
    "(ln1|attn|hook_[qkv]|hook_attn_in).*",
    "hook_attn_out",
    "hook_resid_mid",
    "(ln2|mlp|hook_mlp_in).*",
    "hook_mlp_out",
    "hook_(resid_post|out)",
)
"""Hook points of a block in the order in which a run comes to them."""

POSITIONS = 1024
"""Positions of one pass, about."""


def depth(hook_point: str) -> tuple[int, int]:
    """Block and place in it: of two hook points, the one a run comes to first has the smaller.

    Raises:
        ModelError: it is not inside a block, or its place in a block is not known.
    """
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_point)
    places = [place for place, form in enumerate(_PLACES) if block and re.fullmatch(form, block[2])]
    if not block or not places:
        raise ModelError(
            f"it is not known what comes before and after '{hook_point}'",
            where="hook_points",
            fix="use blocks.L.hook_resid_post or another hook point of the residual stream, of attn or of mlp",
        )
    return int(block[1]), places[0]


class Onward:
    """N contexts, ready to be run from ``source`` on to ``sink`` with changes at ``source``.

    Args:
        model: the language model.
        source: where changes are made.
        sink: a later hook point, read at each context's last token.
        tokens: (N, T) token ids.
        last: (N,) position of the last token of each context; what comes after it is never looked at.
        x: (N, T, D) what stands at ``source``, where it is known: the blocks before are not run then.

    Attributes:
        x: (N, T, D) activations at ``source``, in the model's dtype.
        y: (N, E) activations at ``sink`` of the last token.
        runs: changed runs so far; a gradient counts 3.
        positions: positions run again so far, gradients and padding included.

    Raises:
        ModelError: no such hook point, ``sink`` does not come after ``source``, or a context is too long for the model.
    """

    def __init__(
        self,
        model: LanguageModel,
        source: str,
        sink: str,
        tokens: Int[torch.Tensor, "N T"],
        last: Int[torch.Tensor, " N"],
        x: Float[torch.Tensor, "N T D"] | None = None,
    ) -> None:
        for name in (source, sink):
            model.check_hook_point(name)
        if depth(source) >= depth(sink):
            raise ModelError(f"{sink} does not come after {source}", where="hook_points", fix="name the earlier one first")
        self.model, self.source, self.sink, self.last = model, source, sink, last
        self.tokens = tokens[:, : int(last.max()) + 1]
        if self.tokens.shape[1] > model.context:
            raise ModelError(
                f"{self.tokens.shape[1]} tokens are more than the {model.context} this model can read at once",
                where=model.label,
                fix="make the context shorter",
            )
        self._skip = reach(source) if model.can_skip else 0
        self._is_output = bool(self._skip) and reach(source) == depth(source)[0] + 1
        self.runs = 0
        self._past: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.positions = 0
        known = x[:, : self.tokens.shape[1]].to(model.device, model.dtype) if x is not None and self._is_output else None
        self._record(known)
        self._narrow = reads_one_position(model, source, sink, self.tokens, self._enter)

    @property
    def n(self) -> int:
        """Number of contexts N."""
        return len(self.tokens)

    @torch.no_grad()
    def run(self, rows: Int[torch.Tensor, " J"], change: Float[torch.Tensor, "J T D"]) -> Float[torch.Tensor, "J E"]:
        """Activations at ``sink`` of the last token of contexts ``rows`` when ``change`` is added at ``source``.

        A row whose change is 0 up to the last token has the context's own ones, exactly.
        """
        behind = torch.arange(change.shape[1]) > self.last[rows][:, None]
        changed = (change != 0).any(-1) & ~behind  # (J, T)
        out = self.y[rows.to(self.model.device)].clone()
        first = changed.int().argmax(1)
        left = changed.any(1).nonzero()[:, 0]
        count = self.last[rows] - (first if self._past else 0) + 1
        ordered = sorted(left.tolist(), key=lambda row: (-int(count[row]), int(first[row])))
        for part in alike(ordered, count.tolist(), POSITIONS, ROWS):
            batch = torch.tensor(part)
            out[batch.to(out.device)] = self._run(rows[batch], change[batch], first[batch])
        self.runs += len(left)
        return out

    def gradient(self, read: Callable[[Float[torch.Tensor, "J E"]], Float[torch.Tensor, " J"]]) -> Float[torch.Tensor, "N T D"]:
        """d read(y) / d x, for each context that of its own number; on the CPU.

        Args:
            read: one number from each row of activations at ``sink``.
        """
        parts = []
        for rows in torch.arange(self.n).split(max(1, POSITIONS // self.tokens.shape[1])):
            change = torch.zeros_like(self.x[rows]).requires_grad_(True)
            with torch.enable_grad():
                numbers = read(self._run(rows, change, torch.zeros_like(rows)))
            if numbers.requires_grad:
                parts.append(torch.autograd.grad(numbers.sum(), change)[0].cpu())
            else:
                parts.append(change.detach().cpu())
        self.runs += 3 * self.n
        return torch.cat(parts)

    def _run(self, rows: torch.Tensor, change: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        device = self.model.device
        start = first if self._past else torch.zeros_like(first)
        count = self.last[rows] - start + 1
        M, P = int(count.max()), int(start.max())
        place = (start[:, None] + torch.arange(M)).clamp(max=self.tokens.shape[1] - 1)  # (J, M)
        added = change.to(device, self.model.dtype)[torch.arange(len(rows))[:, None], place]
        seen = torch.cat([torch.arange(P) >= P - start[:, None], torch.ones(len(rows), M, dtype=torch.bool)], dim=1)
        self.positions += M * len(rows)
        each, read = torch.arange(len(rows), device=device), (count - 1).to(device)
        found: list[torch.Tensor] = []

        def leave(value: torch.Tensor, hook: Any) -> None:
            found.append(value.flatten(2)[each, read])
            stop_here(value, hook)

        hooks: Hooks = [] if self._is_output else [*edit_hooks(self.source, lambda value: added)]
        if self._narrow:
            # one position comes out of the MLP and is added to all of them: right where it is read
            hooks.append((mlp_of(self.sink), lambda value, hook: value[each, read][:, None]))
        enter = None
        if self._skip:
            value = self._enter[rows[:, None].to(device), place.to(device)]
            enter = (self._skip, value + added if self._is_output else value)
        self.model.run(
            self.tokens[rows[:, None], place],
            [*hooks, (self.sink, leave)],
            enter=enter,
            attention_mask=seen.long().to(device),
            position_ids=place.to(device),
            past_key_values=self._past_of(rows.to(device), start, P) if P else None,
            use_cache=bool(P),
        )
        return found[0]

    def _past_of(self, rows: torch.Tensor, start: torch.Tensor, P: int) -> DynamicCache:
        """The first ``start`` positions of contexts ``rows``, moved to the right end of P; what falls before 0 is masked."""
        cache, device = DynamicCache(), self.model.device
        source = (torch.arange(P) - (P - start[:, None])).clamp(min=0).to(device)  # (J, P)
        keys = self._past[0][0]
        # blocks that are skipped: only the length of their past is asked for
        nothing = keys[:1, :1, :P, :1].expand(len(rows), -1, -1, -1)
        for layer in range(self._skip):
            cache.update(nothing, nothing, layer)
        for layer, (keys, values) in enumerate(self._past, start=self._skip):
            # rows first, then positions: (J, P, heads, d_head)
            k, v = (part.transpose(1, 2)[rows[:, None], source].transpose(1, 2) for part in (keys, values))
            cache.update(k, v, layer)
        return cache

    @torch.no_grad()
    def _record(self, known: torch.Tensor | None) -> None:
        """Both activations, what enters the first block that runs, and keys and values up to the second hook point's block."""
        model, T = self.model, self.tokens.shape[1]
        kept: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def note(value: torch.Tensor, hook: Any) -> None:
                kept[name] = value.flatten(2).clone()

            return note

        last = self._skip == model.n_layers
        entry = f"blocks.{self._skip - last}.hook_resid_{'post' if last else 'pre'}"
        names = dict.fromkeys([self.source, self.sink, entry] if known is None else [self.sink])
        cache = DynamicCache()
        # notes first: at the sink itself the pass ends, and keys and values of the blocks before it are in the cache
        hooks: Hooks = [*((name, keep(name)) for name in names), (self.sink, stop_here)]
        enter = None if known is None else (self._skip, known)
        model.run(self.tokens, hooks, enter=enter, past_key_values=cache, use_cache=True)
        self.x, self._enter = (kept[self.source], kept[entry]) if known is None else (known, known)
        self.y = kept[self.sink][torch.arange(self.n), self.last.to(model.device)]
        layers: list[Any] = list(cache.layers)
        # a block that keeps something else, or nothing, in front of the sink: no past for any
        whole = len(layers) >= depth(self.sink)[0] and all(
            isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.keys.ndim == 4 and layer.keys.shape[2] == T
            for layer in layers[self._skip :]
        )
        self._past = [(layer.keys, layer.values) for layer in layers[self._skip :]] if whole else []
