"""Goodfire's ReLU autoencoders: ``MODEL-SAE-lN.pth`` (Llama 3) and ``MODEL-SAE-lN.pt`` (DeepSeek-R1).

1. codes = ReLU(x @ encoder.weight^T + encoder.bias); x_hat = codes @ decoder.weight^T + decoder.bias. The decoder's bias is
   not subtracted before, and nothing is normalised.
2. The two layers are called encoder_linear and decoder_linear, or encoder and decoder. The second pair of names is other
   trainers' too, so that it is recognised together with the file's name only.
3. The file's name tells layer and model: all published ones read the residual stream after the block.
"""

from __future__ import annotations

import re
from pathlib import Path

from evalkit.dictionaries.autoencoder import Wiring
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats.base import FORMATS, Format, Place, matrix
from evalkit.dictionaries.formats.single_file import naming, one_file
from evalkit.dictionaries.relu import ReLU

FILES = ("*-SAE-l*.pth", "*-SAE-l*.pt", "*.pth", "*.pt")
"""Names of the weights."""

_NAME = re.compile(r"(.+)-SAE-l(\d+)\.pth?")


class Goodfire(Format):
    """Reader of Goodfire's autoencoders."""

    name = "goodfire"
    title = "Goodfire: MODEL-SAE-lN.pth"

    def recognise(self, place: Place) -> bool:
        path = place.find(*FILES)
        if path is None:
            return False
        keys = place.keys(path)
        return keys >= _layers("_linear") or (keys == _layers("") and _NAME.fullmatch(path.name) is not None)

    def read(self, place: Place) -> Dictionary:
        path = one_file(self, place, *FILES)
        with naming(path):
            return self._read(place, path)

    def _read(self, place: Place, path: Path) -> Dictionary:
        weights = place.weights(path)
        ending = "_linear" if "encoder_linear.weight" in weights else ""
        encoder = matrix(weights, f"encoder{ending}.weight", (-1, -1), place)  # (F, D)
        features, width = encoder.shape
        tensors = {
            "W_enc": encoder.T.contiguous(),
            "b_enc": matrix(weights, f"encoder{ending}.bias", (features,), place),
            "W_dec": matrix(weights, f"decoder{ending}.weight", (width, features), place).T.contiguous(),
            "b_dec": matrix(weights, f"decoder{ending}.bias", (width,), place),
        }
        named = _NAME.fullmatch(path.name)
        return ReLU(
            tensors,
            Wiring(subtract_b_dec=False),
            hook_point=f"blocks.{named.group(2)}.hook_resid_post" if named else "",
            model=named.group(1) if named else "",
            details={"format": self.name, "writer": {"file": path.name}},
        )


def _layers(ending: str) -> set[str]:
    return {f"{side}{ending}.{part}" for side in ("encoder", "decoder") for part in ("weight", "bias")}


FORMATS.register(Goodfire.name)(Goodfire())
