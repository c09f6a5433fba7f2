"""Run a batch of prompts from a hook point on: later layers, later positions and the last logits only.

1. Base and target prompt of a pair agree up to their first changed token, so nothing a patch can do reaches those positions.
   Their keys and values are computed once, from the base prompt, and handed to every later run as its past.
2. Blocks before the hook point hand on what enters the first block that matters; where the hook point is a block's output, that
   block is not run either.
3. A run is a row: which prompt, which side (base or target), and functions that change the activation at the hook points.
   Rows of prompts of different length share a batch: the past is padded on the left and masked, the new tokens on the right,
   where no earlier position sees them.
4. The head reads the last real position of each row and no other. Nor does the last block's MLP, where nothing is changed in
   that block: earlier positions of it reach no logit that is read.
5. To begin with, each base prompt is run whole once, for its keys, values and last logits, and each target prompt up to the last
   of the hook points.

Models whose blocks hand on more than one tensor run from the first block; those that keep no keys and values (state-space
models) run from the first position.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from transformers import DynamicCache

from evalkit.errors import ModelError
from evalkit.models.language_model import LanguageModel, stop_here
from evalkit.tasks.base import Pairs

Edit = Callable[[Float[torch.Tensor, "J M D"]], Float[torch.Tensor, "J M D"]]
"""Takes what stands at a hook point at the new positions of J rows and returns what to add to it."""

NamedHooks = list[tuple[str, Callable[..., Any]]]
"""Hook point names with functions (activation, hook) that may return another activation."""

HEAD = "unembed.hook_in"
"""Where the head reads the residual stream."""

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_OUTPUT = re.compile(r"blocks\.\d+\.hook_(resid_post|out)")
_MIDDLE = re.compile(r"blocks\.(\d+)\.hook_resid_mid")


def reach(name: str) -> int:
    """How many blocks need not run for a change at the hook point ``name``."""
    block = _BLOCK.match(name)
    return (int(block[1]) if block else 0) + bool(_OUTPUT.fullmatch(name))


def edit_hooks(name: str, edit: Edit) -> NamedHooks:
    """Hooks that add ``edit`` of what stands at ``name`` to it, for all that comes after."""
    middle = _MIDDLE.fullmatch(name)
    if middle is None:
        return [(name, lambda found, hook: found + edit(found.flatten(2)).reshape(found.shape).to(found.dtype))]
    change: list[torch.Tensor] = []

    def enter(found: torch.Tensor, hook: Any) -> torch.Tensor:
        change.append(edit(found).to(found.dtype))
        return found + change[-1]

    # TransformerLens' hook_resid_mid stands behind the residual branch: the branch needs the change as well.
    return [(name, enter), (f"blocks.{middle[1]}.hook_out", lambda found, hook: found + change.pop())]


class Rerun:
    """Base and target runs of some pairs, ready to be run again from the first of ``hook_points``.

    Args:
        model: the language model.
        hook_points: where activations will be changed.
        pairs: N pairs of prompts.
        batch: prompts of one pass of the set-up.

    Attributes:
        start: (N,) first position that is run again.
        count: (N,) number of positions that are run again.
        base, target: for each hook point (N, M, D), activations at the new positions, in the model's dtype; M = max(count).
        base_logits: (N, V) logits at the last position of the base prompts, from their whole runs.
        order: the hook points as a forward pass comes to them.

    Raises:
        ModelError: no such hook point, one outside the blocks, or a prompt too long for the model.
    """

    def __init__(self, model: LanguageModel, hook_points: Sequence[str], pairs: Pairs, *, batch: int = 64) -> None:
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
        first = min(self.hook_points, key=reach)
        self._skip = reach(first) if model.can_skip else 0
        last = self._skip == model.n_layers
        self._entry = f"blocks.{self._skip - last}.hook_resid_{'post' if last else 'pre'}"
        self.order: list[str] = []
        base, target = self._record_base(batch), self._record(pairs.target, batch)
        self.start = pairs.changed.clone() if self._past else torch.zeros_like(pairs.changed)
        self.count = pairs.last - self.start + 1
        base, target = self._cut(base), self._cut(target)
        self._enter = {False: base[self._entry], True: target[self._entry]} if self._skip else {}
        self.base, self.target = ({name: found[name] for name in self.hook_points} for found in (base, target))
        self._narrow = self._last_position_suffices()

    def logits(
        self, rows: Int[torch.Tensor, " J"], edits: dict[str, Edit] | None = None, target: bool = False
    ) -> Float[torch.Tensor, "J V"]:
        """Logits at the last position of the prompts ``rows`` (repeats are fine) with ``edits`` made at hook points.

        Gradients flow through ``edits`` where they are switched on.
        """
        hooks = [hook for name, edit in (edits or {}).items() for hook in edit_hooks(name, edit)]
        return self._run(rows, hooks, target, self._narrow)

    def _run(self, rows: torch.Tensor, hooks: NamedHooks, target: bool, narrow: bool) -> torch.Tensor:
        device = self.model.device
        start, count = self.start[rows], self.count[rows]
        M, P = int(count.max()), int(start.max())
        steps = torch.arange(M)
        place = (start[:, None] + steps).clamp(max=self.pairs.base.shape[1] - 1)  # (J, M)
        tokens = (self.pairs.target if target else self.pairs.base)[rows].gather(1, place)
        seen = torch.cat([torch.arange(P) >= P - start[:, None], torch.ones(len(rows), M, dtype=torch.bool)], dim=1)
        last = (count - 1).to(device)

        def only_last(found: torch.Tensor, hook: Any) -> torch.Tensor:
            return found[torch.arange(len(rows), device=device), last][:, None]

        hooks = [*hooks, (HEAD, only_last)]
        if narrow:
            # one position comes out of the MLP and is added to all of them: right at the last, and only there it is read
            hooks.append((self._last_mlp, only_last))
        enter = None
        if self._skip:
            value = self._enter[target][rows, :M]
            # A hook at the output of the last block that is skipped never fires: its edit is made here.
            for name in [name for name, _ in hooks if _OUTPUT.fullmatch(name) and reach(name) == self._skip]:
                change = dict(hooks)[name]
                value = change(value, None)
                hooks = [hook for hook in hooks if hook[0] != name]
            enter = (self._skip, value)
        output = self.model.run(
            tokens,
            hooks,
            enter=enter,
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

    @property
    def _last_mlp(self) -> str:
        return f"blocks.{self.model.n_layers - 1}.mlp.hook_in"

    def _last_position_suffices(self) -> bool:
        """Whether the last block's MLP can be run at the last position alone: nothing is changed in that block, and trying it
        gives the logits of the whole run."""
        last = self.model.n_layers - 1
        within = any(name.startswith(f"blocks.{last}.") for name in self.hook_points)
        if within or self._skip > last or not self.model.can_skip or not self.model.has(self._last_mlp):
            return False
        with torch.no_grad():
            found = self._run(torch.zeros(1, dtype=torch.int64), [], False, True).float()
        return torch.allclose(
            found, self.base_logits[:1].float(), rtol=1e-3, atol=1e-3 * float(self.base_logits[0].float().std())
        )

    @torch.no_grad()
    def _record_base(self, batch: int) -> dict[str, torch.Tensor]:
        """As ``_record``, with keys, values and last logits of whole runs; sets ``_past`` and ``base_logits``.

        ``_past``: keys and values (N, heads, P, d_head) of each block before each pair's first change, moved to the right end of
        P. Empty where the model keeps none, or where every pair differs from the first token on.
        """
        N, P = self.pairs.n, int(self.pairs.changed.max())
        # column c of what is kept is position c - (P - changed); what falls before 0 is masked
        source = (torch.arange(P) - (P - self.pairs.changed[:, None])).clamp(min=0).to(self.model.device)  # (N, P)
        parts: list[dict[str, torch.Tensor]] = []
        logits, pasts = [], []
        for rows in torch.arange(N).split(batch):
            tokens, last = self.pairs.base[rows], self.pairs.last[rows].to(self.model.device)

            def only_last(found: torch.Tensor, hook: Any, last: torch.Tensor = last) -> torch.Tensor:
                return found[torch.arange(len(last), device=last.device), last][:, None]

            found: dict[str, torch.Tensor] = {}
            output = self.model.run(tokens, [*self._notes(found), (HEAD, only_last)], use_cache=P > 0)
            parts.append(found)
            logits.append(output.logits[:, 0])
            pasts.append(self._moved(getattr(output, "past_key_values", None), source[rows], tokens.shape[1]) if P else [])
        self.base_logits = torch.cat(logits)
        self._past = [
            (torch.cat(keys), torch.cat(values))
            for keys, values in (zip(*layer, strict=True) for layer in zip(*pasts, strict=True))
        ]
        self.order = [name for name in parts[0] if name in self.hook_points]
        return _joined(parts)

    def _moved(self, cache: Any, source: torch.Tensor, T: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each block at the positions ``source`` (J, P); empty where the cache does not hold all T."""
        layers = getattr(cache, "layers", [])
        whole = len(layers) == self.model.n_layers and all(
            isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.keys.ndim == 4 and layer.keys.shape[2] == T
            for layer in layers
        )

        def move(found: torch.Tensor) -> torch.Tensor:
            return found.gather(2, source[:, None, :, None].expand(-1, found.shape[1], -1, found.shape[3]))

        return [(move(layer.keys), move(layer.values)) for layer in layers] if whole else []

    @torch.no_grad()
    def _record(self, tokens: torch.Tensor, batch: int) -> dict[str, torch.Tensor]:
        """Activations (N, T, D) at every hook point, and what enters the first block that runs. The passes end there."""
        parts = []
        for part in tokens.split(batch):
            found: dict[str, torch.Tensor] = {}
            self.model.run(part, self._notes(found, stop=True), use_cache=False)
            parts.append(found)
        return _joined(parts)

    def _notes(self, found: dict[str, torch.Tensor], stop: bool = False) -> NamedHooks:
        """Hooks that fill ``found``, in the order of the forward pass, and end it behind the last of them where ``stop``."""
        names = list(dict.fromkeys([*self.hook_points, *([self._entry] if self._skip else [])]))

        def keep(name: str) -> Callable[..., None]:
            def note(value: torch.Tensor, hook: Any) -> None:
                found[name] = value.flatten(2).clone()
                if stop and len(found) == len(names):
                    stop_here(value, hook)

            return note

        return [(name, keep(name)) for name in names]

    def _cut(self, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Activations at the positions that are run again, (N, M, D)."""
        M, T = int(self.count.max()), self.pairs.base.shape[1]
        place = (self.start[:, None] + torch.arange(M)).clamp(max=T - 1).to(self.model.device)
        return {name: value.gather(1, place[..., None].expand(-1, -1, value.shape[-1])) for name, value in found.items()}


def _joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
