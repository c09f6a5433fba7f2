"""Run base and target prompts again with edits at several hook points, and read the logits of the last token.

Base and target prompt of a pair agree up to their first changed token, so no patch can change those positions. Their keys and
values are computed once, from the base prompt; runs of both prompts begin behind them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int

from evalkit.errors import ModelError
from evalkit.interventions.hooks import Edit, block_of
from evalkit.interventions.prefix_cache import PrefixCache, head, residual_after, run_to_last
from evalkit.models.language_model import LanguageModel
from evalkit.tasks.base import Pairs


class PairCache(PrefixCache):
    """Base and target runs of N pairs, ready to be run again from the first of ``hook_points``.

    Args:
        model: the language model.
        hook_points: where activations will be edited.
        pairs: N pairs of prompts.
        batch: prompts of one pass of the set-up.

    Attributes:
        start: (N,) first position that is run again.
        count: (N,) number of positions that are run again.
        base, target: for each hook point (N, M, D), activations at the new positions, in the model's dtype; M = max(count).
        base_logits: (N, V) logits at the last position of the base prompts, from their whole runs.
        order: the hook points in the order of a forward pass.

    Raises:
        ModelError: no such hook point, one outside the blocks, or a prompt too long for the model.
    """

    def __init__(self, model: LanguageModel, hook_points: Sequence[str], pairs: Pairs, *, batch: int = 64) -> None:
        super().__init__(model, hook_points, residual_after(model), pairs.base)
        for name in hook_points:
            if block_of(name) is None:
                raise ModelError(f"'{name}' is not inside a block", where="hook_points", fix="patch at blocks.L.hook_resid_post")
        self.pairs = pairs
        batches = [part.tolist() for part in torch.arange(pairs.n).split(batch)]
        base = self._record(hook_points, pairs.last + 1, batches)
        final = base[self.sink][torch.arange(pairs.n), pairs.last.to(model.device)]
        self.base_logits = torch.cat([self.logits(final[rows]) for rows in batches])
        wanted = dict.fromkeys([*hook_points, *([self._entry] if self._skip else [])])
        parts = [run_to_last(model, pairs.target[rows], wanted)[0] for rows in batches]
        target = {name: torch.cat([part[name] for part in parts]) for name in wanted}
        self.order = [name for name in base if name in hook_points]
        self.start = self._starts(pairs.changed)
        self.count = pairs.last - self.start + 1
        new = self._positions(self.start, pairs.last).to(model.device)
        every = torch.arange(pairs.n, device=model.device)[:, None]
        self.base, self.target = ({name: side[name][every, new] for name in self.order} for side in (base, target))
        if self._skip:
            # texts from N on are the target prompts
            self._enter = torch.cat([base[self._entry], target[self._entry]])
        self.tokens = torch.cat([pairs.base, pairs.target])

    def logits_with(
        self, rows: Int[torch.Tensor, " J"], edits: Mapping[str, Edit] | None = None, target: bool = False
    ) -> Float[torch.Tensor, "J V"]:
        """Logits at the last position of the prompts ``rows`` (repeats are fine) with ``edits`` made at hook points.

        Gradients flow through ``edits`` where they are switched on.
        """
        texts = rows + self.pairs.n if target else rows
        return head(self.model, self._run(texts, self.start[rows], self.pairs.last[rows], edits or {}, prefix=rows))
