"""What all sparse autoencoders share: normalise, centre, project, activate, write back.

1. x is centred (``Wiring.centre``) and normalised (``Wiring.normalise``), and b_dec subtracted where ``Wiring.subtract_b_dec``.
2. pre = x @ W_enc + b_enc, times the decoder row's norm where ``Wiring.decoder_norm`` says so.
3. codes = the architecture's ``activate(pre)``: the only thing that differs between most of them.
4. x_hat = codes @ W_dec + b_dec, the normalisation is undone, and the mean that centring took is given back.

Trainers disagree about 1, 2 and 4, so these are settings; importers set them to what the writer of a file does.
"""

from __future__ import annotations

import dataclasses
import sys
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float

from evalkit.dictionaries import shapes
from evalkit.dictionaries.base import Dictionary
from evalkit.errors import DictionaryError
from evalkit.util.matmul import times
from evalkit.util.registry import near_miss

EPSILON = 1e-5
"""Added to a token's standard deviation before dividing by it; SAELens and OpenAI use the same."""

SMALLEST = 1e-30
"""Norms are taken to be at least this: a token of zeros stays one."""


def _deviation(centred: torch.Tensor) -> torch.Tensor:
    """Unbiased standard deviation (..., 1) of centred tokens."""
    return (centred.square().sum(-1, keepdim=True) / (centred.shape[-1] - 1)).sqrt()


@dataclass(frozen=True)
class Wiring:
    """How an autoencoder's input and output are connected. The default is x - b_dec in, + b_dec out, nothing normalised."""

    subtract_b_dec: bool = True
    """Subtract b_dec before encoding."""
    normalise: Literal["none", "constant", "token_norm", "layer_norm"] = "none"
    """'constant': x * scale, and x_hat / scale (so does the expected-average form, with scale = sqrt(D) / mean norm of x).
    'token_norm': each token scaled to norm sqrt(D). 'layer_norm': each token's mean subtracted, divided by its unbiased
    standard deviation + 1e-5; x_hat times the deviation, plus the mean."""
    scale: float = 1.0
    """Factor of normalise = 'constant'."""
    decoder_norm: Literal["none", "select", "codes"] = "none"
    """'codes': codes = activate(pre * ||W_dec||), and decoding divides by the norm again. 'select': the same, but codes are
    divided by the norm, so that it only takes part in the choice of what is active."""
    centre: bool = False
    """Take from each token its mean over the width before anything else, and give it back to x_hat: for dictionaries that were
    trained on a language model whose writing weights were centred (TransformerLens' center_writing_weights)."""

    def __post_init__(self) -> None:
        for name, known in (
            ("normalise", ("none", "constant", "token_norm", "layer_norm")),
            ("decoder_norm", ("none", "select", "codes")),
        ):
            if getattr(self, name) not in known:
                raise DictionaryError(
                    f"{name} = {getattr(self, name)!r} is not known", where=name, fix=f"known: {', '.join(known)}"
                )
        for name in ("subtract_b_dec", "centre"):
            if not isinstance(getattr(self, name), bool):
                raise DictionaryError(f"{name} = {getattr(self, name)!r} is neither true nor false", where=name, fix="correct it")
        if not (isinstance(self.scale, int | float) and 0 < self.scale <= sys.float_info.max):
            raise DictionaryError(
                f"scale = {self.scale!r} is not a positive number", where="scale", fix="check how it was measured"
            )
        if self.normalise != "constant" and self.scale != 1.0:
            raise DictionaryError(
                "scale belongs to normalise = 'constant'", where="scale", fix="set normalise, or leave scale out"
            )

    def changed(self) -> dict[str, Any]:
        """The settings that are not at their default."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}


class Autoencoder(Dictionary):
    """Base of the sparse autoencoders; a subclass gives ``kind``, ``layout``, ``activate`` and settings of its own.

    Args:
        tensors: the weights by the names of ``layout``.
        wiring: how input and output are connected.
        where: ``hook_point``, ``model`` and ``details``.

    Raises:
        DictionaryError: missing, misshapen or non-finite weights.
    """

    layout: ClassVar[dict[str, str]] = {"W_enc": "D F", "b_enc": "F", "W_dec": "F D", "b_dec": "D"}
    own: ClassVar[tuple[str, ...]] = ()
    """Names of the architecture's own settings: arguments of its constructor, and attributes."""
    sparse = True
    independent: ClassVar[bool] = True
    """Whether a feature's code depends on its own pre-activation alone, so that one can be computed without the others."""

    def __init__(self, tensors: dict[str, torch.Tensor], wiring: Wiring | None = None, **where: Any) -> None:
        super().__init__(**where)
        shapes.check(self.kind, tensors, self.layout)
        self._tensors = {name: tensors[name].float() for name in self.layout}
        self.wiring = wiring or Wiring()
        self.W_enc, self.W_dec, self.b_dec = (self._tensors[name] for name in ("W_enc", "W_dec", "b_dec"))
        self._row_norms = self.W_dec.norm(dim=1).clamp(min=1e-8) if self.wiring.decoder_norm != "none" else None
        self._directions = self.W_dec
        self._alone: dict[int, Autoencoder] = {}
        if self.wiring.decoder_norm == "codes" and self._row_norms is not None:
            self._directions = self._directions / self._row_norms[:, None]
        if self.wiring.normalise == "constant":
            self._directions = self._directions / self.wiring.scale

    @abstractmethod
    def activate(self, pre: Float[torch.Tensor, "*batch F"]) -> Float[torch.Tensor, "*batch F"]:
        """Codes of pre-activations."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by the names of ``layout``."""
        return dict(self._tensors)

    def settings(self) -> dict[str, Any]:
        """The architecture's own settings, and the wiring where it is not the default one."""
        return {**{name: getattr(self, name) for name in self.own}, **self.wiring.changed()}

    def canonical(self) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
        """Without settings that change nothing: a b_dec of zeros that is subtracted, a mean that layer_norm takes anyway."""
        settings = self.settings()
        if self.wiring.normalise == "layer_norm":
            settings.pop("centre", None)
        if not self.b_dec.any():
            settings.pop("subtract_b_dec", None)
        return self.kind, self.tensors(), settings

    def settings_of_one(self) -> dict[str, Any]:
        """The settings of the dictionary of one of the features alone."""
        return self.settings()

    @classmethod
    def build(cls, tensors: dict[str, torch.Tensor], settings: dict[str, Any], **where: Any) -> Autoencoder:
        """The inverse of ``tensors`` and ``settings``."""
        names = {f.name for f in dataclasses.fields(Wiring)}
        for name in cls.own:
            if name not in settings:
                raise DictionaryError(
                    f"the settings of this '{cls.kind}' dictionary lack '{name}'", fix=near_miss(name, settings)
                )
        for name in settings:
            if name not in names and name not in cls.own:
                what = f"a '{cls.kind}' dictionary has no setting '{name}'"
                raise DictionaryError(what, fix=near_miss(name, [*cls.own, *names]))
        wiring = Wiring(**{name: value for name, value in settings.items() if name in names})
        return cls(tensors, wiring=wiring, **{name: settings[name] for name in cls.own}, **where)

    def normalise(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch D"]:
        """``x`` as the encoder reads it."""
        x = self._centred(self._input(x))
        match self.wiring.normalise:
            case "constant":
                return x * self.wiring.scale
            case "token_norm":
                return x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True).clamp(min=SMALLEST))
            case "layer_norm":
                centred = x - x.mean(-1, keepdim=True)
                return centred / (_deviation(centred) + EPSILON)
        return x

    def restore(
        self, x_hat: Float[torch.Tensor, "*batch D"], x: Float[torch.Tensor, "*batch D"]
    ) -> Float[torch.Tensor, "*batch D"]:
        """Decoded ``x_hat`` with the statistics of the tokens ``x`` put back; a constant scale is in ``decode`` already."""
        x = self._input(x)
        match self.wiring.normalise:
            case "token_norm":
                x_hat = x_hat * (self._centred(x).norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5)
            case "layer_norm":
                mean = x.mean(-1, keepdim=True)
                return x_hat * _deviation(x - mean) + mean
        return x_hat + x.mean(-1, keepdim=True) if self.wiring.centre else x_hat

    def _centred(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` (..., D) without each token's mean, where the wiring takes it."""
        return x - x.mean(-1, keepdim=True) if self.wiring.centre else x

    def project(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch F"]:
        """Normalised and centred ``x`` on the encoder, without bias."""
        read = self.normalise(x)
        return times(read - self.b_dec if self.wiring.subtract_b_dec else read, self.W_enc)

    def pre_activations(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch F"]:
        """What ``activate`` is given."""
        pre = self.project(x) + self._tensors["b_enc"]
        return pre if self._row_norms is None else pre * self._row_norms

    def encode(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch F"]:
        """Codes (..., F) of activations ``x``."""
        codes = self.activate(self.pre_activations(x))
        return codes / self._row_norms if self.wiring.decoder_norm == "select" and self._row_norms is not None else codes

    def decode(self, codes: Float[torch.Tensor, "*batch F"]) -> Float[torch.Tensor, "*batch D"]:
        """Activations written by ``codes``; in normalised units where tokens are normalised one by one."""
        if self.wiring.decoder_norm == "codes" and self._row_norms is not None:
            codes = codes / self._row_norms
        x_hat = times(codes, self.W_dec) + self.b_dec
        return x_hat / self.wiring.scale if self.wiring.normalise == "constant" else x_hat

    def encode_feature(self, x: Float[torch.Tensor, "*batch D"], feature: int) -> Float[torch.Tensor, "*batch"]:
        """Codes of one feature, from its own weights where features are independent."""
        if not self.independent:
            return super().encode_feature(x, feature)
        if feature not in self._alone:
            self._alone.clear()  # features are read one after another, many times each
            own = {
                name: tensor.narrow(letters.split().index("F"), feature, 1) if "F" in letters.split() else tensor
                for name, tensor in self._tensors.items()
                for letters in (self.layout[name],)
            }
            self._alone[feature] = type(self).build(own, self.settings_of_one())
        return self._alone[feature].encode(x)[..., 0]

    @property
    def directions(self) -> Float[torch.Tensor, "F D"]:
        """What one unit of each feature writes: the decoder's rows, in the units of ``decode``."""
        return self._directions

    @property
    def encoders(self) -> Float[torch.Tensor, "F D"]:
        """What each feature reads: the encoder's columns."""
        return self.W_enc.T

    @property
    def d_in(self) -> int:
        """Width D."""
        return self.W_dec.shape[1]

    @property
    def n_features(self) -> int:
        """Number of features F."""
        return self.W_dec.shape[0]
