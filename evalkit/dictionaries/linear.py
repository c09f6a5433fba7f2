"""A linear read, an optional ReLU, a linear write: the form that PCA, ICA and random directions share.

1. codes = x @ encoder^T + bias, rectified where the setting says so.
2. x_hat = codes @ writes + constant.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float

from evalkit.dictionaries import shapes
from evalkit.dictionaries.base import Dictionary

LAYOUT = {"encoder": "F D", "bias": "F", "writes": "F D", "constant": "D"}


class LinearDictionary(Dictionary):
    """Base of the linear baselines; a subclass gives its ``kind``.

    Args:
        encoder: (F, D); row f reads feature f.
        bias: (F,) added to what is read.
        writes: (F, D); row f is what one unit of feature f writes.
        constant: (D,) written when every code is zero.
        rectified: whether codes pass a ReLU.
        where: ``hook_point``, ``model`` and ``details``.

    Raises:
        DictionaryError: misshapen or non-finite weights.
    """

    def __init__(
        self,
        encoder: torch.Tensor,
        bias: torch.Tensor,
        writes: torch.Tensor,
        constant: torch.Tensor,
        rectified: bool,
        **where: Any,
    ) -> None:
        super().__init__(**where)
        self.encoder, self.bias, self.writes, self.constant = encoder, bias, writes, constant
        self.rectified = bool(rectified)
        shapes.check(self.kind, self.tensors(), LAYOUT)

    @property
    def signed(self) -> bool:  # type: ignore[override]  # the contract's class variable depends on a setting here
        """Whether codes can be negative: yes unless they are rectified."""
        return not self.rectified

    @classmethod
    def build(cls, tensors: dict[str, torch.Tensor], settings: dict[str, Any], **where: Any) -> LinearDictionary:
        """The inverse of ``tensors`` and ``settings``."""
        shapes.check(cls.kind, tensors, LAYOUT)
        encoder, bias, writes, constant = (tensors[name] for name in LAYOUT)
        return cls(encoder, bias, writes, constant, settings["rectified"], **where)

    def tensors(self) -> dict[str, torch.Tensor]:
        """encoder (F, D), bias (F,), writes (F, D) and constant (D,)."""
        return {"encoder": self.encoder, "bias": self.bias, "writes": self.writes, "constant": self.constant}

    def settings(self) -> dict[str, Any]:
        """Whether codes are rectified."""
        return {"rectified": self.rectified}

    def encode(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch F"]:
        """codes = x @ encoder^T + bias, rectified where ``rectified``."""
        codes = self._input(x) @ self.encoder.T + self.bias
        return codes.relu_() if self.rectified else codes

    def decode(self, codes: Float[torch.Tensor, "*batch F"]) -> Float[torch.Tensor, "*batch D"]:
        """x_hat = codes @ writes + constant."""
        return codes @ self.writes + self.constant

    @property
    def directions(self) -> Float[torch.Tensor, "F D"]:
        """The rows that features write."""
        return self.writes
