"""Tied autoencoder: the sparse autoencoder of Cunningham et al. 2023 (arXiv 2309.08600, section 2).

1. c = ReLU(M x + b), with the rows of M of unit length.
2. x_hat = M^T c: the direction that detects a feature is the one that writes it, and there is no decoder bias.
3. Optionally a centre is subtracted before and added after; the paper uses none.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float

from evalkit.dictionaries import shapes
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.registry import DICTIONARIES
from evalkit.errors import DictionaryError
from evalkit.util.matmul import linear, times

UNIT_TOLERANCE = 1e-3
"""How far a row of M may be from unit length: room for weights stored in half precision."""


@DICTIONARIES.register("tied")
class Tied(Dictionary):
    """A frozen tied autoencoder.

    Args:
        M: (F, D) with rows of unit length; row f is feature f's direction.
        b: (F,) encoder bias.
        centre: (D,) subtracted before encoding and added after decoding, or None.
        where: ``hook_point``, ``model`` and ``details``.

    Raises:
        DictionaryError: misshapen or non-finite weights, or rows that are not of unit length.
    """

    kind = "tied"
    sparse = True

    def __init__(self, M: torch.Tensor, b: torch.Tensor, centre: torch.Tensor | None = None, **where: Any) -> None:
        super().__init__(**where)
        self.M, self.b, self.centre = M, b, centre
        shapes.check(self.kind, self.tensors(), _layout(centre is not None))
        worst = float((M.norm(dim=1) - 1).abs().max())
        if worst > UNIT_TOLERANCE:
            raise DictionaryError(
                f"a row of M has length off by {worst:.3g}; a tied autoencoder's rows have unit length",
                where="M",
                fix="divide each row of M by its length, and check that b belongs to the normalised rows",
            )

    @classmethod
    def build(cls, tensors: dict[str, torch.Tensor], settings: dict[str, Any], **where: Any) -> Tied:
        """The inverse of ``tensors`` and ``settings``."""
        shapes.check(cls.kind, tensors, _layout("centre" in tensors))
        return cls(tensors["M"], tensors["b"], tensors.get("centre"), **where)

    def tensors(self) -> dict[str, torch.Tensor]:
        """M (F, D), b (F,) and, where there is one, centre (D,)."""
        centre = {} if self.centre is None else {"centre": self.centre}
        return {"M": self.M, "b": self.b, **centre}

    def encode(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch F"]:
        """c = ReLU(M (x - centre) + b)."""
        x = self._input(x)
        centred = x if self.centre is None else x - self.centre
        return linear(centred, self.M, self.b).relu_()

    def decode(self, codes: Float[torch.Tensor, "*batch F"]) -> Float[torch.Tensor, "*batch D"]:
        """x_hat = M^T c + centre."""
        written = times(codes, self.M)
        return written if self.centre is None else written + self.centre

    @property
    def directions(self) -> Float[torch.Tensor, "F D"]:
        """The rows of M."""
        return self.M

    @property
    def encoders(self) -> Float[torch.Tensor, "F D"]:
        """The rows of M."""
        return self.M


def _layout(centred: bool) -> dict[str, str]:
    return {"M": "F D", "b": "F", **({"centre": "D"} if centred else {})}
