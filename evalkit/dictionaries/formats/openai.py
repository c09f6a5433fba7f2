"""OpenAI's sparse_autoencoder (Gao et al. 2024, arXiv 2406.04093): ``{layer}.pt``, a state_dict with the activation in it.

1. x is layer-normalised token by token (unbiased deviation, + 1e-5) where the activation is TopK, and only there.
2. pre = (x - pre_bias) @ encoder.weight^T + latent_bias; codes = ReLU(pre), or the ReLU of its k largest.
3. x_hat = codes @ decoder.weight^T + pre_bias, and the normalisation is undone. A tied model stores ``decoder.linear.weight``,
   which is the encoder's weight again.
4. k and the function after the selection lie in ``activation_state_dict``; a file without ``activation`` is a ReLU one.

The path of a published file tells the place: ``resid_post_mlp_v5_32k/autoencoders/8.pt`` is blocks.8.hook_resid_post.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from evalkit.dictionaries.autoencoder import Wiring
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats.base import FORMATS, Format, Place, matrix, number
from evalkit.dictionaries.formats.single_file import folders_of, naming, one_file
from evalkit.dictionaries.relu import ReLU
from evalkit.dictionaries.topk import TopK

LOCATIONS = {
    "resid_post_mlp": "blocks.{}.hook_resid_post",
    "resid_post_attn": "blocks.{}.hook_resid_mid",
    "resid_delta_mlp": "blocks.{}.hook_mlp_out",
    "resid_delta_attn": "blocks.{}.hook_attn_out",
    "mlp_post_act": "blocks.{}.mlp.hook_post",
}
"""The writer's names of places, as TransformerLens calls them."""

CONTEXT = 64
"""Tokens a sequence that the published ones were trained on (Gao et al. 2024, section 2.1)."""

_NEEDED = {"pre_bias", "latent_bias", "encoder.weight"}
_DECODERS = ("decoder.weight", "decoder.linear.weight")


class OpenAI(Format):
    """Reader of OpenAI's autoencoders."""

    name = "openai"
    title = "openai/sparse_autoencoder: LAYER.pt"
    training = (r"stats_.*|latents_.*",)

    def recognise(self, place: Place) -> bool:
        keys = place.keys(place.find("*.pt"))
        return keys >= _NEEDED and any(name in keys for name in _DECODERS)

    def read(self, place: Place) -> Dictionary:
        path = one_file(self, place, "*.pt")
        with naming(path):
            return self._read(place, path, place.weights(path))

    def _read(self, place: Place, path: Path, weights: dict[str, Any]) -> Dictionary:
        encoder = matrix(weights, "encoder.weight", (-1, -1), place)  # (F, D)
        features, width = encoder.shape
        tensors = {
            "W_enc": encoder.T.contiguous(),
            "b_enc": matrix(weights, "latent_bias", (features,), place),
            "W_dec": self._decoder(place, weights, encoder),
            "b_dec": matrix(weights, "pre_bias", (width,), place),
        }
        activation = weights.get("activation", "ReLU")
        inner = weights.get("activation_state_dict", {})
        writer: dict[str, Any] = {"activation": activation, "file": path.name}
        located = _place_in_model(path)
        details: dict[str, Any] = {"format": self.name, "writer": writer}
        if located["model"]:
            details["made_with"] = {"context_size": CONTEXT}
        where = {**located, "details": details}
        if activation == "ReLU":
            return ReLU(tensors, Wiring(), **where)
        if activation != "TopK" or not isinstance(inner, dict):
            self.refuse(
                place,
                f"the activation is {str(activation)[:60]!r}, which makes no sparse codes that are 0 or more",
                "evalkit takes the activations ReLU and TopK of this format",
            )
        after = inner.get("postact_fn")
        if after != "ReLU":
            self.refuse(
                place,
                f"the k largest are followed by postact_fn = {str(after)[:60]!r}, not by a ReLU",
                "evalkit takes TopK files with postact_fn = 'ReLU'",
            )
        k = _as_int(inner.get("k"))
        writer.update(k=k, postact_fn=after)
        return TopK(tensors, number({"k": k}, "k", place), Wiring(normalise="layer_norm"), **where)

    def _decoder(self, place: Place, weights: dict[str, Any], encoder: torch.Tensor) -> torch.Tensor:
        """W_dec (F, D)."""
        features, width = encoder.shape
        if "decoder.weight" in weights:
            return matrix(weights, "decoder.weight", (width, features), place).T.contiguous()
        tied = matrix(weights, "decoder.linear.weight", (features, width), place)
        if not torch.equal(tied, encoder):
            self.refuse(
                place,
                "the file says that its decoder is the encoder (decoder.linear.weight), but their weights differ",
                "fetch the file again, or save the decoder as decoder.weight",
            )
        return encoder.clone()


def _as_int(value: Any) -> Any:
    """A whole number that was stored as a tensor, as a number; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_floating_point():
        return int(value)
    return value


def _place_in_model(path: Path) -> dict[str, str]:
    """hook_point and model as far as the folders of a published file tell them."""
    parts = folders_of(path)
    layer = re.fullmatch(r"(\d+)\.pt", path.name)
    location = next((hook for name, hook in LOCATIONS.items() if any(re.fullmatch(rf"{name}(_v\w+)?", p) for p in parts)), "")
    return {
        "hook_point": location.format(layer.group(1)) if layer and location else "",
        "model": "gpt2-small" if "gpt2-small" in parts else "",
    }


FORMATS.register(OpenAI.name)(OpenAI())
