"""Edit single features in windows of text and read the next token, many edits at once.

An edit is a row: a window, a direction, how much of it is added at each position, and the position whose next token is read. A
feature that is active once costs one position of the later blocks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int

from evalkit.interventions.prefix_cache import PrefixCache, residual_after, similar
from evalkit.models.language_model import LanguageModel

OWN_POSITIONS = 2048
"""Positions of windows without edits in one pass, about."""


class WindowCache(PrefixCache):
    """W windows of T tokens, ready to be run on from ``hook_point`` with edits.

    Args:
        model: the language model.
        hook_point: where edits are made.
        tokens: (W, T) token ids.
        x: (W, T, D) activations at ``hook_point``, where they are known: the blocks before are not run then.
        length: (W,) how many positions of each window are wanted; all T where left out.

    Attributes:
        final: (W, T, d_model) the residual stream after the last block, unedited, in the model's dtype; anything behind
            ``length``.

    Raises:
        ModelError: no such hook point, or T is longer than the model can read.
    """

    def __init__(
        self,
        model: LanguageModel,
        hook_point: str,
        tokens: Int[torch.Tensor, "W T"],
        x: Float[torch.Tensor, "W T D"] | None = None,
        length: Int[torch.Tensor, " W"] | None = None,
    ) -> None:
        super().__init__(model, [hook_point], residual_after(model), tokens)
        W, T = tokens.shape
        self.length = torch.full((W,), T) if length is None else length
        count = self.length.tolist()
        batches = similar(sorted(range(W), key=lambda window: -count[window]), count, OWN_POSITIONS, W)
        self.final = self._record([], self.length, batches, x)[self.sink]

    @torch.no_grad()
    def edited(
        self,
        window: Int[torch.Tensor, " J"],
        last: Int[torch.Tensor, " J"],
        amount: Float[torch.Tensor, "J T"],
        direction: Float[torch.Tensor, "J D"],
    ) -> Float[torch.Tensor, "J d_model"]:
        """The residual stream after the last block at position ``last`` of each row.

        Args:
            window: which window each row edits.
            last: the position that is read, within the window's ``length``; edits behind it do nothing.
            amount: multiples of ``direction`` added at each position of the hook point.
            direction: what is added.
        """

        def added(batch: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return amount[batch].gather(1, positions)[..., None] * direction[batch, None]

        out = self.final[window.to(self.model.device), last.to(self.model.device)].clone()
        self._edited(window, last, (amount != 0) & (direction != 0).any(-1, keepdim=True), added, out)
        return out
