"""JumpReLU autoencoder: each feature has a threshold of its own (Rajamanoharan et al. 2024, arXiv 2407.14435).

1. pre = (x - b_dec) @ W_enc + b_enc.
2. codes = ReLU(pre) where pre > threshold, zero elsewhere.
3. x_hat = codes @ W_dec + b_dec.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float

from evalkit.dictionaries.autoencoder import Autoencoder
from evalkit.dictionaries.registry import DICTIONARIES


@DICTIONARIES.register("jumprelu")
class JumpReLU(Autoencoder):
    """A frozen JumpReLU autoencoder: W_enc (D, F), b_enc (F,), threshold (F,), W_dec (F, D), b_dec (D,)."""

    kind = "jumprelu"
    layout = {**Autoencoder.layout, "threshold": "F"}

    def canonical(self) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
        """Without thresholds, as a ReLU autoencoder, where no threshold cuts anything the ReLU lets through."""
        kind, tensors, settings = super().canonical()
        if bool((tensors["threshold"] > 0).any()):
            return kind, tensors, settings
        del tensors["threshold"]
        return "relu", tensors, settings

    def activate(self, pre: Float[torch.Tensor, "*batch F"]) -> Float[torch.Tensor, "*batch F"]:
        """ReLU above the threshold, zero at and below it."""
        return pre.relu() * (pre > self._tensors["threshold"])
