"""JumpReLU autoencoder: each feature has a threshold of its own (Rajamanoharan et al. 2024, arXiv 2407.14435).

1. pre = (x - b_dec) @ W_enc + b_enc.
2. codes = ReLU(pre) where pre > threshold, zero elsewhere.
3. x_hat = codes @ W_dec + b_dec.
"""

from __future__ import annotations

import torch
from jaxtyping import Float

from evalkit.dictionaries.autoencoder import Autoencoder
from evalkit.dictionaries.registry import DICTIONARIES


@DICTIONARIES.register("jumprelu")
class JumpReLU(Autoencoder):
    """A frozen JumpReLU autoencoder: W_enc (D, F), b_enc (F,), threshold (F,), W_dec (F, D), b_dec (D,)."""

    kind = "jumprelu"
    layout = {**Autoencoder.layout, "threshold": "F"}

    def activate(self, pre: Float[torch.Tensor, "*batch F"]) -> Float[torch.Tensor, "*batch F"]:
        """ReLU above the threshold, zero at and below it."""
        return pre.relu() * (pre > self._tensors["threshold"])
