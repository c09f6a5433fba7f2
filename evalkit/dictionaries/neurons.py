"""Neurons as a dictionary: the default basis of the hook point (baseline of Cunningham et al. 2023, section 3).

1. codes = ReLU(x), one feature a dimension, as published; signed x where ``rectified = false``, two features a dimension
   where ``split = true``, and the largest only where ``top_k`` is given.
2. Signed and split codes give x back exactly.
3. Codes that lose something (rectified, or cut to the top k) were published without a decoder. They are written back as
   x_hat = gain * codes + constant, with the scalar gain and the constant that fit the fitting data best (least squares).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from evalkit.dictionaries import shapes
from evalkit.dictionaries.fitting import chunks, read_out
from evalkit.dictionaries.forms import Form, Formed, FormSettings, kept_count
from evalkit.dictionaries.registry import DICTIONARIES, Fitting, Vectors, baseline

LAYOUT = {"gain": "", "constant": "D"}


@DICTIONARIES.register("neurons")
class Neurons(Formed):
    """The identity basis.

    Args:
        gain: scalar tensor; what one unit of a neuron's code writes on its own dimension.
        constant: (D,) written when every code is zero.
        rectified: whether codes pass a ReLU.
        split: whether a neuron makes two features, one for each sign; F = 2D then, else F = D.
        top_k: codes kept a token, largest magnitude first; all of them when left out.
        where: ``hook_point``, ``model`` and ``details``.

    Raises:
        DictionaryError: misshapen or non-finite tensors, or an impossible form.
    """

    kind = "neurons"

    def __init__(
        self,
        gain: torch.Tensor,
        constant: torch.Tensor,
        rectified: bool,
        split: bool = False,
        top_k: int | None = None,
        **where: Any,
    ) -> None:
        super().__init__(Form(bool(rectified), bool(split), top_k), **where)
        self.gain, self.constant = gain, constant
        shapes.check(self.kind, self.tensors(), LAYOUT)
        self.form.features(constant.shape[0])

    @classmethod
    def build(cls, tensors: dict[str, torch.Tensor], settings: dict[str, Any], **where: Any) -> Neurons:
        """The inverse of ``tensors`` and ``settings``."""
        shapes.check(cls.kind, tensors, LAYOUT)
        form = {"split": settings.get("split", False), "top_k": settings.get("top_k")}
        return cls(tensors["gain"], tensors["constant"], settings["rectified"], **form, **where)

    def tensors(self) -> dict[str, torch.Tensor]:
        """gain () and constant (D,)."""
        return {"gain": self.gain, "constant": self.constant}

    def scores(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch D"]:
        """A copy of ``x``."""
        return self._input(x).clone()

    def decode(self, codes: Float[torch.Tensor, "*batch F"]) -> Float[torch.Tensor, "*batch D"]:
        """x_hat = gain * codes + constant."""
        return self.form.fold(codes) * self.gain + self.constant

    @property
    def directions(self) -> Float[torch.Tensor, "F D"]:
        """gain times the identity, and minus that for the negative sides of split codes."""
        return self.form.unfold(torch.eye(self.d_in, dtype=self.constant.dtype) * self.gain)

    @property
    def edit_directions(self) -> Float[torch.Tensor, "F D"]:
        """The identity: a neuron's code is its activation, whatever ``decode`` makes of it."""
        return self.encoders

    @property
    def encoders(self) -> Float[torch.Tensor, "F D"]:
        """The identity, and minus that for the negative sides of split codes."""
        return self.form.unfold(torch.eye(self.d_in, dtype=self.constant.dtype))

    @property
    def d_in(self) -> int:
        """Width D."""
        return self.constant.shape[0]

    @property
    def n_features(self) -> int:
        """As many as dimensions, or twice as many."""
        return self.form.features(self.d_in)


@dataclass(frozen=True)
class NeuronsSettings(FormSettings):
    """Settings of ``baseline = "neurons"``."""

    rectified: bool = True
    """Pass the neurons through a ReLU before reading them, as published. false keeps their sign."""
    split: bool = False
    """Make two features of every neuron, ReLU(x) and ReLU(-x), first all positive sides, then all negative ones. The
    reconstruction is the one of rectified = false; ``rectified`` is not asked."""

    def form(self) -> Form:
        return Form(rectified=self.rectified or self.split, split=self.split, top_k=kept_count(self.top_k))


@baseline("neurons", NeuronsSettings)
def fit_neurons(x: Vectors, config: NeuronsSettings, fitting: Fitting) -> Neurons:
    """The neuron basis with, where codes lose something, its least-squares gain and constant."""
    d = x.shape[1]
    form = config.form()
    form.features(d)
    gain, constant = 1.0, torch.zeros(d)
    with fitting.progress.stage("fitting neurons", x.shape[0], "vectors") as stage:
        if form.top_k is not None or (form.rectified and not form.split):
            gain, constant = read_out(x, lambda block: form.fold(form.codes(block.clone())), stage=stage)
        else:
            for block in chunks(x):
                stage.advance(len(block))
    details = {"baseline": "neurons", "vectors": int(x.shape[0]), "gain": gain, **form.extras()}
    return Neurons(
        torch.tensor(gain, dtype=torch.float32),
        constant,
        rectified=form.rectified,
        **form.extras(),
        details=details,
        **fitting.where,
    )
