"""Running the rest of the model with activations replaced, and the passes that no dictionary takes part in.

1. ``drawn_windows`` are the scoring windows that are run on, drawn by seed.
2. ``Passes`` replaces the activations of given positions and reads cross-entropy, KL and log-probabilities at others, one
   number a position.
3. ``remembered`` keeps what was made for one dictionary for the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from evalkit.evaluations.base import Bench
from evalkit.util.caching import Recent
from evalkit.util.disk import mapped_array
from evalkit.util.progress import Stage

if TYPE_CHECKING:
    from evalkit.activations.capture import Activations

KEPT_REFERENCES = 4
"""Sets of shared passes remembered in this process. The distributions lie in an unnamed temporary file, not in memory."""

references: Recent[Any] = Recent(KEPT_REFERENCES)
"""Shared passes, by all that they depend on."""


def drawn_windows(score: Activations, count: int, seed: int) -> Int[torch.Tensor, " W"]:
    """Which scoring windows are run on, rising."""
    return torch.randperm(len(score.x), generator=torch.Generator().manual_seed(seed))[:count].sort().values


class Read(NamedTuple):
    """What a pass gave at each read position, float64; P positions in all."""

    ce: Float[torch.Tensor, " P"]
    """Cross-entropy of the next token, nats."""
    kl: Float[torch.Tensor, " P"]
    """KL(given || these), nats; 0 where nothing was given."""


class Passes:
    """Runs of the rest of the model over some windows.

    Args:
        windows: (W,) which scoring windows.
        batch: windows a forward pass.
        replaced: (W, T) positions whose activation is replaced.
        read: (W, T) positions that are read; the last of a window has no next token and is never read.
    """

    def __init__(
        self,
        bench: Bench,
        score: Activations,
        windows: Int[torch.Tensor, " W"],
        batch: int,
        replaced: Bool[torch.Tensor, "W T"],
        read: Bool[torch.Tensor, "W T"],
    ) -> None:
        self.bench, self.score, self.windows, self.batch, self.replaced = bench, score, windows, batch, replaced
        self.read = read.clone()
        self.read[:, -1] = False
        self.row, self.place = self.read.nonzero(as_tuple=True)
        """(P,) which of the windows, and which position of it, each read position is."""

    def sums(self, values: Float[torch.Tensor, " P"], among: Bool[torch.Tensor, " P"] | None = None) -> torch.Tensor:
        """Sum of ``values`` of each window (W,), float64; over the positions ``among`` alone where they are given."""
        values = values.double() if among is None else values.double() * among
        return torch.zeros(len(self.windows), dtype=torch.float64).index_add_(0, self.row, values)

    def distributions(self) -> np.ndarray:
        """Memory for log-probabilities (P, V) at the read positions, mapped to an unnamed file."""
        return mapped_array((len(self.row), self.bench.model.n_vocab), say=self.bench.progress.say)

    def run(
        self,
        replace: Callable[[torch.Tensor], torch.Tensor],
        stage: Stage,
        *,
        into: np.ndarray | None = None,
        against: np.ndarray | None = None,
    ) -> Read:
        """Cross-entropy at each read position; write log-probabilities ``into``, or give KL(``against`` || these)."""
        found = Read(*(torch.zeros(len(self.row), dtype=torch.float64) for _ in range(2)))
        position = 0
        for start in range(0, len(self.windows), self.batch):
            part = slice(start, start + self.batch)
            chosen = self.windows[part]
            tokens, replaced, x = self.score.tokens[chosen], self.replaced[part], self.score.x[chosen].clone()
            x[replaced] = replace(x[replaced])
            window, t = self.read[part].nonzero(as_tuple=True)
            logits = self.bench.model.logits_with(tokens, self.bench.hook_point, x)
            log_q = logits[window.to(logits.device), t.to(logits.device)].float().log_softmax(-1).cpu()  # (P, V)
            rows = slice(position, position + len(window))
            found.ce[rows] = -log_q.gather(1, tokens[window, t + 1][:, None])[:, 0].double()
            if into is not None:
                into[rows] = log_q.numpy()
            if against is not None:
                log_p = torch.from_numpy(np.array(against[rows]))
                found.kl[rows] = (log_p.exp() * (log_p - log_q)).double().sum(1)
            position += len(window)
            stage.advance(len(chosen))
        return found
