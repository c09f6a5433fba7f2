"""A linear read, a form of the codes, a linear write: what PCA, ICA and random directions share.

1. scores = x @ encoder^T + bias.
2. codes = the scores signed, rectified or split in two, all of them or the k largest (``forms``).
3. x_hat = codes @ writes + constant, where the negative half of split codes writes -writes.
4. An edit of one component moves its own score by the edit's size: its direction is writes / (encoder . writes). A common
   scale of ``writes``, fitted for reconstruction, is not in it: it is w / |w|^2 for random directions.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float

from evalkit.dictionaries import shapes
from evalkit.dictionaries.forms import Form, Formed
from evalkit.util.matmul import linear, times

SMALLEST = 1e-6
"""Cosine of reading and writing row below which a component does not read what it writes; it is edited along what it reads."""

LAYOUT = {"encoder": "C D", "bias": "C", "writes": "C D", "constant": "D"}


class LinearDictionary(Formed):
    """Base of the linear baselines; a subclass gives its ``kind``.

    Args:
        encoder: (C, D); row c reads component c.
        bias: (C,) added to what is read.
        writes: (C, D); row c is what one unit of component c writes.
        constant: (D,) written when every code is zero.
        rectified: whether codes pass a ReLU.
        split: whether a component makes two features, one for each sign; F = 2C then, else F = C.
        top_k: codes kept a token, largest magnitude first; all of them when left out.
        where: ``hook_point``, ``model`` and ``details``.

    Raises:
        DictionaryError: misshapen or non-finite weights, or an impossible form.
    """

    def __init__(
        self,
        encoder: torch.Tensor,
        bias: torch.Tensor,
        writes: torch.Tensor,
        constant: torch.Tensor,
        rectified: bool,
        split: bool = False,
        top_k: int | None = None,
        **where: Any,
    ) -> None:
        super().__init__(Form(bool(rectified), bool(split), top_k), **where)
        self.encoder, self.bias, self.writes, self.constant = encoder, bias, writes, constant
        shapes.check(self.kind, self.tensors(), LAYOUT)
        self.form.features(encoder.shape[0])
        self._directions = self.form.unfold(writes)
        read = (encoder * writes).sum(1, keepdim=True)  # (C, 1): what a unit of each component's writing adds to its own score
        reads = read.abs() > SMALLEST * encoder.norm(dim=1, keepdim=True) * writes.norm(dim=1, keepdim=True)
        own = encoder / encoder.square().sum(1, keepdim=True).clamp(min=1e-30)
        self._edit_directions = self.form.unfold(torch.where(reads, writes / torch.where(reads, read, 1.0), own))

    @classmethod
    def build(cls, tensors: dict[str, torch.Tensor], settings: dict[str, Any], **where: Any) -> LinearDictionary:
        """The inverse of ``tensors`` and ``settings``."""
        shapes.check(cls.kind, tensors, LAYOUT)
        encoder, bias, writes, constant = (tensors[name] for name in LAYOUT)
        form = {"split": settings.get("split", False), "top_k": settings.get("top_k")}
        return cls(encoder, bias, writes, constant, settings["rectified"], **form, **where)

    def tensors(self) -> dict[str, torch.Tensor]:
        """encoder (C, D), bias (C,), writes (C, D) and constant (D,)."""
        return {"encoder": self.encoder, "bias": self.bias, "writes": self.writes, "constant": self.constant}

    def scores(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch C"]:
        """x @ encoder^T + bias."""
        return linear(self._input(x), self.encoder, self.bias)

    def decode(self, codes: Float[torch.Tensor, "*batch F"]) -> Float[torch.Tensor, "*batch D"]:
        """x_hat = codes @ writes + constant."""
        return times(self.form.fold(codes), self.writes) + self.constant

    @property
    def directions(self) -> Float[torch.Tensor, "F D"]:
        """The rows that features write."""
        return self._directions

    @property
    def edit_directions(self) -> Float[torch.Tensor, "F D"]:
        """The rows that features write, each scaled so that its own score moves by 1; what it reads where it writes nothing."""
        return self._edit_directions

    @property
    def encoders(self) -> Float[torch.Tensor, "F D"]:
        """The rows that read features; the negative ones for the negative sides of split codes."""
        return self.form.unfold(self.encoder)
