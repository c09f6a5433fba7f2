"""Run contexts from one hook point on to a later one: the effect of a change at the first on the last token at the second."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int

from evalkit.errors import ModelError
from evalkit.interventions.hooks import depth
from evalkit.interventions.prefix_cache import PrefixCache
from evalkit.models.language_model import LanguageModel


class PathCache(PrefixCache):
    """N contexts, ready to be run from ``source`` on to ``sink`` with changes at ``source``.

    Args:
        model: the language model.
        source: where changes are made.
        sink: a later hook point, read at each context's last token.
        tokens: (N, T) token ids.
        last: (N,) position of the last token of each context; what comes after it is never looked at.
        x: (N, T, D) activations at ``source``, where they are known: the blocks before are not run then.

    Attributes:
        x: (N, T, D) activations at ``source``, in the model's dtype.
        y: (N, E) activations at ``sink`` of the last token.
        runs: changed runs so far; a gradient counts 3.

    Raises:
        ModelError: no such hook point, ``sink`` does not come after ``source``, or a context is too long for the model.
    """

    batch_positions = 1024

    def __init__(
        self,
        model: LanguageModel,
        source: str,
        sink: str,
        tokens: Int[torch.Tensor, "N T"],
        last: Int[torch.Tensor, " N"],
        x: Float[torch.Tensor, "N T D"] | None = None,
    ) -> None:
        super().__init__(model, [source], sink, tokens[:, : int(last.max()) + 1])
        if depth(source) >= depth(sink):
            raise ModelError(f"{sink} does not come after {source}", where="hook_points", fix="name the earlier one first")
        self.source, self.last, self.runs = source, last, 0
        # one pass, every context as long as the longest
        found = self._record([source], torch.full_like(last, self.tokens.shape[1]), [range(self.n)], x)
        self.x, self.y = found[source], found[sink][torch.arange(self.n), last.to(model.device)]

    @torch.no_grad()
    def run(self, rows: Int[torch.Tensor, " J"], change: Float[torch.Tensor, "J T D"]) -> Float[torch.Tensor, "J E"]:
        """Activations at ``sink`` of the last token of contexts ``rows`` when ``change`` is added at ``source``.

        A row whose change is 0 up to the last token has the context's own ones, exactly.
        """
        out = self.y[rows.to(self.model.device)].clone()
        self.runs += self._edited(rows, self.last[rows], (change != 0).any(-1), lambda b, p: change[b[:, None], p], out)
        return out

    def gradient(self, read: Callable[[Float[torch.Tensor, "J E"]], Float[torch.Tensor, " J"]]) -> Float[torch.Tensor, "N T D"]:
        """d read(y) / d x, for each context that of its own number, from one pass there and back; on the CPU.

        Args:
            read: one number from each row of activations at ``sink``.
        """
        parts = []
        for rows in torch.arange(self.n).split(max(1, self.batch_positions // self.tokens.shape[1])):
            change = torch.zeros_like(self.x[rows]).requires_grad_(True)
            with torch.enable_grad():
                numbers = read(self.run_from(rows, change, torch.zeros_like(rows)))
            if numbers.requires_grad:
                parts.append(torch.autograd.grad(numbers.sum(), change)[0].cpu())
            else:
                parts.append(change.detach().cpu())
        self.runs += 3 * self.n
        return torch.cat(parts)

    def run_from(
        self, rows: Int[torch.Tensor, " J"], change: Float[torch.Tensor, "J T D"], start: Int[torch.Tensor, " J"]
    ) -> Float[torch.Tensor, "J E"]:
        """As ``run``, for every row, from position ``start`` on; gradients flow where they are switched on."""
        last = self.last[rows]
        return self._add(rows, start, last, change[torch.arange(len(rows))[:, None], self._positions(start, last)])
