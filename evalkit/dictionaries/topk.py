"""TopK autoencoder: a fixed number of active features a token (Gao et al. 2024, arXiv 2406.04093).

1. pre = (x - b_dec) @ W_enc + b_enc.
2. codes = ReLU of the k largest of pre, zero elsewhere; so at most k are active.
3. x_hat = codes @ W_dec + b_dec.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float

from evalkit.dictionaries.autoencoder import Autoencoder, Wiring
from evalkit.dictionaries.base import SparseCodes
from evalkit.dictionaries.registry import DICTIONARIES
from evalkit.errors import DictionaryError


@DICTIONARIES.register("topk")
class TopK(Autoencoder):
    """A frozen TopK autoencoder: W_enc (D, F), b_enc (F,), W_dec (F, D), b_dec (D,).

    Args:
        tensors: the weights.
        k: features kept a token, 1 <= k <= F.
        wiring: how input and output are connected.
        where: ``hook_point``, ``model`` and ``details``.

    Raises:
        DictionaryError: misshapen or non-finite weights, or an impossible k.
    """

    kind = "topk"
    own = ("k",)
    independent = False

    def __init__(self, tensors: dict[str, torch.Tensor], k: int, wiring: Wiring | None = None, **where: Any) -> None:
        super().__init__(tensors, wiring, **where)
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= self.n_features:
            raise DictionaryError(
                f"k = {k!r} is not a number of active features", where="k", fix=f"choose 1 to {self.n_features} (all features)"
            )
        self.k = k

    def activate(self, pre: Float[torch.Tensor, "*batch F"]) -> Float[torch.Tensor, "*batch F"]:
        """ReLU of the k largest."""
        top = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())

    def _active(self, x: Float[torch.Tensor, "B D"]) -> SparseCodes:
        """Exactly k a token, largest pre-activation first; entries the ReLU cut have value 0 and index 0."""
        top = self.pre_activations(x).topk(self.k, dim=-1)
        values = top.values.relu()
        if self.wiring.decoder_norm == "select" and self._row_norms is not None:
            values = values / self._row_norms[top.indices]
        return SparseCodes(values, top.indices * (values > 0))
