"""TopK autoencoder: a fixed number of active features a token (Gao et al. 2024, arXiv 2406.04093).

1. pre = (x - b_dec) @ W_enc + b_enc.
2. codes = ReLU of the k largest of pre, zero elsewhere; so at most k are active.
3. x_hat = codes @ W_dec + b_dec.

``encode_sparse`` and ``reconstruct`` never build the dense (B, F) codes: decoding reads k rows of W_dec a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float

from evalkit.dictionaries import shapes
from evalkit.dictionaries.base import Dictionary, SparseCodes
from evalkit.dictionaries.registry import DICTIONARIES
from evalkit.errors import DictionaryError


@DICTIONARIES.register("topk")
class TopK(Dictionary):
    """A frozen TopK autoencoder.

    Args:
        W_enc: (D, F) encoder.
        b_enc: (F,) encoder bias.
        W_dec: (F, D) decoder; row f is feature f's direction.
        b_dec: (D,) subtracted before encoding, added after decoding.
        k: features kept a token, 1 <= k <= F.
        where: ``hook_point``, ``model`` and ``details``.

    Raises:
        DictionaryError: misshapen or non-finite weights, or an impossible k.
    """

    kind = "topk"

    def __init__(
        self, W_enc: torch.Tensor, b_enc: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor, k: int, **where: Any
    ) -> None:
        super().__init__(**where)
        weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        sizes = shapes.check(self.kind, weights, {"W_enc": "D F", "b_enc": "F", "W_dec": "F D", "b_dec": "D"})
        if not isinstance(k, int) or not 1 <= k <= sizes["F"]:
            raise DictionaryError(
                f"k = {k!r} is not a number of active features", where="k", fix=f"choose 1 to {sizes['F']} (all features)"
            )
        self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.k = W_enc, b_enc, W_dec, b_dec, k

    @classmethod
    def build(cls, tensors: dict[str, torch.Tensor], settings: dict[str, Any], **where: Any) -> TopK:
        """The inverse of ``tensors`` and ``settings``."""
        layout = {"W_enc": "D F", "b_enc": "F", "W_dec": "F D", "b_dec": "D"}
        shapes.check(cls.kind, tensors, layout)
        W_enc, b_enc, W_dec, b_dec = (tensors[name] for name in layout)
        return cls(W_enc, b_enc, W_dec, b_dec, settings["k"], **where)

    def tensors(self) -> dict[str, torch.Tensor]:
        """W_enc (D, F), b_enc (F,), W_dec (F, D) and b_dec (D,)."""
        return {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}

    def settings(self) -> dict[str, Any]:
        """k."""
        return {"k": self.k}

    def _largest(self, x: torch.Tensor) -> SparseCodes:
        """The k largest pre-activations after the ReLU, largest first, with their true indices also where the value is 0."""
        top = ((x - self.b_dec) @ self.W_enc + self.b_enc).topk(self.k, dim=-1)
        return SparseCodes(top.values.relu(), top.indices)

    def encode_sparse(self, x: Float[torch.Tensor, "*batch D"]) -> SparseCodes:
        """The active codes, exactly k a token, largest first; entries the ReLU cut have value 0 and index 0."""
        values, indices = self._largest(x)
        return SparseCodes(values, indices * (values > 0))

    def encode(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch F"]:
        """Codes (..., F) of activations ``x``; at most k are not zero."""
        values, indices = self._largest(x)
        return values.new_zeros(*x.shape[:-1], self.n_features).scatter_(-1, indices, values)

    def decode(self, codes: Float[torch.Tensor, "*batch F"]) -> Float[torch.Tensor, "*batch D"]:
        """Activations written by ``codes``."""
        return codes @ self.W_dec + self.b_dec

    def reconstruct(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch D"]:
        """decode(encode(x)) from the k active rows of the decoder only."""
        values, indices = self._largest(x)
        bags, weights = indices.reshape(-1, self.k), values.reshape(-1, self.k)
        return F.embedding_bag(bags, self.W_dec, per_sample_weights=weights, mode="sum").reshape(x.shape) + self.b_dec

    @property
    def directions(self) -> Float[torch.Tensor, "F D"]:
        """The decoder's rows."""
        return self.W_dec
