"""BatchTopK autoencoder at inference: one threshold for all features (Bussmann et al. 2024, arXiv 2412.06410).

1. In training the k * B largest pre-activations of a batch are kept, so that a token has k active features on average.
2. The smallest one kept, averaged over batches, is the threshold, so that at inference a token does not depend on its batch:
   codes = ReLU(pre) where pre > threshold.

That is a JumpReLU whose thresholds are equal, and its identity is the JumpReLU's: some trainers save it as one.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float

from evalkit.dictionaries.autoencoder import Autoencoder, Wiring
from evalkit.dictionaries.jumprelu import JumpReLU
from evalkit.dictionaries.registry import DICTIONARIES
from evalkit.errors import DictionaryError


@DICTIONARIES.register("batchtopk")
class BatchTopK(Autoencoder):
    """A frozen BatchTopK autoencoder: W_enc (D, F), b_enc (F,), threshold (), W_dec (F, D), b_dec (D,).

    Args:
        tensors: the weights; the threshold is a scalar, 0 or more.
        wiring: how input and output are connected.
        where: ``hook_point``, ``model`` and ``details`` (k belongs there: it does not take part in the function).

    Raises:
        DictionaryError: misshapen or non-finite weights, or a threshold below 0, which trainers write before they have one.
    """

    kind = "batchtopk"
    layout = {**Autoencoder.layout, "threshold": ""}

    def __init__(self, tensors: dict[str, torch.Tensor], wiring: Wiring | None = None, **where: Any) -> None:
        super().__init__(tensors, wiring, **where)
        threshold = float(self._tensors["threshold"])
        if threshold < 0:
            raise DictionaryError(
                f"the threshold is {threshold:g}: it was never tracked in training, and without one this is a plain ReLU SAE",
                where="threshold",
                fix="train it longer (trainers set the threshold late), or write the right one into the file",
            )

    def activate(self, pre: Float[torch.Tensor, "*batch F"]) -> Float[torch.Tensor, "*batch F"]:
        """ReLU above the threshold, zero at and below it."""
        return pre.relu() * (pre > self._tensors["threshold"])

    def canonical(self) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
        """As the JumpReLU that it is."""
        threshold = self._tensors["threshold"].expand(self.n_features).contiguous()
        return JumpReLU({**self._tensors, "threshold": threshold}, self.wiring).canonical()
