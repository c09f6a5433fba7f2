"""ReLU autoencoder with L1: the sparse autoencoder of Bricken et al. 2023 and, decoder-norm weighted, Templeton et al. 2024.

1. codes = ReLU((x - b_dec) @ W_enc + b_enc).
2. x_hat = codes @ W_dec + b_dec.

Weighting the L1 penalty by decoder norms changes training only; what is trained is this function.
"""

from __future__ import annotations

import torch
from jaxtyping import Float

from evalkit.dictionaries.autoencoder import Autoencoder
from evalkit.dictionaries.registry import DICTIONARIES


@DICTIONARIES.register("relu")
class ReLU(Autoencoder):
    """A frozen ReLU autoencoder: W_enc (D, F), b_enc (F,), W_dec (F, D), b_dec (D,)."""

    kind = "relu"

    def activate(self, pre: Float[torch.Tensor, "*batch F"]) -> Float[torch.Tensor, "*batch F"]:
        """ReLU."""
        return pre.relu()
