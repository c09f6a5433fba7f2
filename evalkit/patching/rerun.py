"""Run a batch of prompts from a hook point on: later layers, later positions and the last logits only.

1. Base and target prompt of a pair agree up to their first changed token, so nothing a patch can do reaches those positions.
   Their keys and values are computed once, from the base prompt, and handed to every later run as its past.
2. Blocks before the hook point hand on what enters the first block that matters; where the hook point is a block's output, that
   block is not run either.
3. A run is a row: which prompt, which side (base or target), and functions that change the activation at the hook points.
   Rows of prompts of different length share a batch: the past is padded on the left and masked, the new tokens on the right,
   where no earlier position sees them.
4. The head reads the last real position of each row and no other.

Models whose blocks hand on more than one tensor run from the first block; those that keep no keys and values (state-space
models) run from the first position.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from transformers import DynamicCache

from evalkit.errors import ModelError
from evalkit.models.language_model import LanguageModel
from evalkit.tasks.base import Pairs

Edit = Callable[[Float[torch.Tensor, "J M D"]], Float[torch.Tensor, "J M D"]]
"""Takes what stands at a hook point at the new positions of J rows and returns what to add to it."""

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_OUTPUT = re.compile(r"blocks\.\d+\.hook_(resid_post|out)")
_MIDDLE = re.compile(r"blocks\.(\d+)\.hook_resid_mid")


class Rerun:
    """Base and target runs of some pairs, ready to be run again from the first of ``hook_points``.

    Args:
        model: the language model.
        hook_points: where activations will be changed.
        pairs: N pairs of prompts.

    Attributes:
        start: (N,) first position that is run again.
        count: (N,) number of positions that are run again.
        base, target: for each hook point (N, M, D), activations at the new positions, in the model's dtype; M = max(count).

    Raises:
        ModelError: no such hook point, one outside the blocks, or a prompt too long for the model.
    """

    def __init__(self, model: LanguageModel, hook_points: Sequence[str], pairs: Pairs) -> None:
        self.model, self.pairs = model, pairs
        self.hook_points = list(hook_points)
        for name in self.hook_points:
            model.check_hook_point(name)
            if not _BLOCK.match(name):
                raise ModelError(f"'{name}' is not inside a block", where="hook_points", fix="patch at blocks.L.hook_resid_post")
        if pairs.base.shape[1] > model.context:
            raise ModelError(
                f"a prompt of {pairs.base.shape[1]} tokens is longer than the {model.context} this model can read",
                where=model.label,
                fix="leave out the long pairs",
            )
        first = min(self.hook_points, key=self._reach)
        self._skip = self._reach(first) if model._can_skip else 0
        self._past = self._keys_and_values()
        self.start = pairs.changed.clone() if self._past else torch.zeros_like(pairs.changed)
        self.count = pairs.last - self.start + 1
        self._enter: dict[bool, torch.Tensor] = {}
        self.base, self.target = self._record(False), self._record(True)

    @staticmethod
    def _reach(name: str) -> int:
        """How many blocks need not run for a change at ``name``."""
        block = _BLOCK.match(name)
        return (int(block[1]) if block else 0) + bool(_OUTPUT.fullmatch(name))

    def logits(
        self, rows: Int[torch.Tensor, " J"], edits: dict[str, Edit] | None = None, target: bool = False
    ) -> Float[torch.Tensor, "J V"]:
        """Logits at the last position of the prompts ``rows`` (repeats are fine) with ``edits`` made at hook points.

        Gradients flow through ``edits`` where they are switched on.
        """
        hooks = [hook for name, edit in (edits or {}).items() for hook in self._hooks(name, edit)]
        return self._run(rows, hooks, target)

    def _hooks(self, name: str, edit: Edit) -> list[tuple[str, Callable[..., Any]]]:
        middle = _MIDDLE.fullmatch(name)
        if middle is None:
            return [(name, lambda found, hook: found + edit(found.flatten(2)).reshape(found.shape).to(found.dtype))]
        change: list[torch.Tensor] = []

        def enter(found: torch.Tensor, hook: Any) -> torch.Tensor:
            change.append(edit(found).to(found.dtype))
            return found + change[-1]

        # TransformerLens' hook_resid_mid stands behind the residual branch: the branch needs the change as well.
        return [(name, enter), (f"blocks.{middle[1]}.hook_out", lambda found, hook: found + change.pop())]

    def _run(self, rows: torch.Tensor, hooks: list[tuple[str, Callable[..., Any]]], target: bool) -> torch.Tensor:
        device, bridge = self.model.device, self.model._bridge
        start, count = self.start[rows], self.count[rows]
        M, P = int(count.max()), int(start.max())
        steps = torch.arange(M)
        place = (start[:, None] + steps).clamp(max=self.pairs.base.shape[1] - 1)  # (J, M)
        tokens = (self.pairs.target if target else self.pairs.base)[rows].gather(1, place)
        seen = torch.cat([torch.arange(P) >= P - start[:, None], torch.ones(len(rows), M, dtype=torch.bool)], dim=1)
        last = (count - 1).to(device)

        def only_last(found: torch.Tensor, hook: Any) -> torch.Tensor:
            return found[torch.arange(len(rows), device=device), last][:, None]

        hooks = [*hooks, ("unembed.hook_in", only_last)]
        skipping: Any = nullcontext()
        if self._skip:
            value = self._enter[target][rows, :M]
            # A hook at the output of the last block that is skipped never fires: its edit is made here.
            for name in [name for name, _ in hooks if _OUTPUT.fullmatch(name) and self._reach(name) == self._skip]:
                change = dict(hooks)[name]
                value = change(value, None)
                hooks = [hook for hook in hooks if hook[0] != name]
            skipping = self.model._skipping(self._skip, value)
        with bridge.hooks(fwd_hooks=hooks), skipping:
            output = bridge.original_model(
                input_ids=tokens.to(device),
                attention_mask=seen.long().to(device),
                position_ids=place.to(device),
                past_key_values=self._past_of(rows, P) if P else None,
                use_cache=bool(P),
            )
        return output.logits[:, 0]

    def _past_of(self, rows: torch.Tensor, P: int) -> DynamicCache:
        """The past of ``rows``: P positions, those of shorter pasts moved to the right."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._past):
            if layer < self._skip:
                # only its length is asked for
                nothing = keys[:1, :1, -P:, :1].expand(len(rows), -1, -1, -1)
                cache.update(nothing, nothing, layer)
            else:
                cache.update(keys[rows, :, -P:], values[rows, :, -P:], layer)
        return cache

    @torch.no_grad()
    def _keys_and_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values (N, heads, P, d_head) of each block before each pair's first change, moved to the right end of P.

        Empty where the model keeps none, or where every pair differs from the first token on.
        """
        P = int(self.pairs.changed.max())
        if P == 0:
            return []
        tokens = self.pairs.base[:, :P].to(self.model.device)
        cache = getattr(self.model._bridge.original_model(input_ids=tokens, use_cache=True), "past_key_values", None)
        layers = getattr(cache, "layers", [])
        whole = len(layers) == self.model.n_layers and all(
            isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.keys.ndim == 4 and layer.keys.shape[2] == P
            for layer in layers
        )
        if not whole:
            return []
        # column c of the result is position c - (P - changed); what falls before 0 is masked
        source = (torch.arange(P) - (P - self.pairs.changed[:, None])).clamp(min=0).to(self.model.device)  # (N, P)

        def move(found: torch.Tensor) -> torch.Tensor:
            return found.gather(2, source[:, None, :, None].expand(-1, found.shape[1], -1, found.shape[3]))

        return [(move(layer.keys), move(layer.values)) for layer in layers]

    @torch.no_grad()
    def _record(self, target: bool) -> dict[str, torch.Tensor]:
        """Activations of one side at every hook point, and what enters the first block that runs."""
        found: dict[str, torch.Tensor] = {}
        names = list(self.hook_points)
        entry = ""
        if self._skip:
            last = self._skip == self.model.n_layers
            entry = f"blocks.{self._skip - last}.hook_resid_{'post' if last else 'pre'}"
            names.append(entry)

        def keep(name: str) -> Callable[..., None]:
            def note(value: torch.Tensor, hook: Any) -> None:
                found[name] = value.flatten(2).clone()

            return note

        tokens = self.pairs.target if target else self.pairs.base
        with self.model._bridge.hooks(fwd_hooks=[(name, keep(name)) for name in dict.fromkeys(names)]):
            self.model._bridge.original_model(input_ids=tokens.to(self.model.device), use_cache=False)
        M = int(self.count.max())
        place = (self.start[:, None] + torch.arange(M)).clamp(max=tokens.shape[1] - 1).to(self.model.device)
        cut = {name: value.gather(1, place[..., None].expand(-1, -1, value.shape[-1])) for name, value in found.items()}
        if entry:
            self._enter[target] = cut[entry]
        return {name: cut[name] for name in self.hook_points}
