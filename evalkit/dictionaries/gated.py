"""Gated autoencoder: one path decides what is active, the other how strongly (Rajamanoharan et al. 2024, arXiv 2404.16014).

1. read = (x - b_dec) @ W_enc, shared by both paths.
2. active = read + b_gate > 0.
3. codes = ReLU(exp(r_mag) * read + b_mag) where active, zero elsewhere.
4. x_hat = codes @ W_dec + b_dec.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float

from evalkit.dictionaries.autoencoder import Autoencoder, Wiring
from evalkit.dictionaries.registry import DICTIONARIES
from evalkit.errors import DictionaryError


@DICTIONARIES.register("gated")
class Gated(Autoencoder):
    """A frozen gated autoencoder: W_enc (D, F), b_gate, r_mag, b_mag (F,), W_dec (F, D), b_dec (D,).

    Args:
        tensors: the weights.
        wiring: how input and output are connected; decoder norms have no meaning here, as two paths read one projection.
        where: ``hook_point``, ``model`` and ``details``.

    Raises:
        DictionaryError: misshapen or non-finite weights, or a wiring with decoder norms.
    """

    kind = "gated"
    layout = {"W_enc": "D F", "b_gate": "F", "r_mag": "F", "b_mag": "F", "W_dec": "F D", "b_dec": "D"}

    def __init__(self, tensors: dict[str, torch.Tensor], wiring: Wiring | None = None, **where: Any) -> None:
        super().__init__(tensors, wiring, **where)
        if self.wiring.decoder_norm != "none":
            raise DictionaryError("a gated autoencoder is not scaled by decoder norms", where="decoder_norm", fix="leave it out")

    def pre_activations(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch F"]:
        """What both paths read."""
        return self.project(x)

    def activate(self, pre: Float[torch.Tensor, "*batch F"]) -> Float[torch.Tensor, "*batch F"]:
        """Magnitudes where the gate is open."""
        magnitude = (pre * self._tensors["r_mag"].exp() + self._tensors["b_mag"]).relu()
        return magnitude * (pre + self._tensors["b_gate"] > 0)
