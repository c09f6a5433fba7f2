"""Gemma Scope (Lieberum et al. 2024, arXiv 2408.05147) and Gemma Scope 2: JumpReLU autoencoders of Gemma models.

1. codes = ReLU(x @ W_enc + b_enc) where it is above the feature's threshold; x_hat = codes @ W_dec + b_dec. b_dec is not
   subtracted before, and nothing is normalised.
2. The first release is ``params.npz`` without a config, in REPO/layer_L/width_W/average_l0_X: the path tells what it was
   trained on. Names may be in capitals or not.
3. Its embedding autoencoders were trained on embeddings that are not yet multiplied by sqrt(D), as the model does at once:
   their input is divided by sqrt(D) and their output multiplied, so that they fit ``hook_embed``.
4. The second release is ``params.safetensors`` with ``config.json``, which names the places read and written.
5. Transcoders, affine ones and cross-layer ones are refused: they write to another place than they read from.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from evalkit.dictionaries.autoencoder import Wiring
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats.base import FORMATS, Format, Place, matrix, number
from evalkit.dictionaries.formats.fields import Fields
from evalkit.dictionaries.formats.single_file import folders_of, naming, one_file
from evalkit.dictionaries.jumprelu import JumpReLU

HOOKS = {"res": "blocks.{}.hook_resid_post", "mlp": "blocks.{}.hook_mlp_out", "att": "blocks.{}.attn.hook_z"}
"""Ending of a first-release repository's name: what was read there. hook_z is read with its heads side by side."""

HOOKS_2 = {
    r"model\.layers\.(\d+)\.output": "blocks.{}.hook_resid_post",
    r"model\.layers\.(\d+)\.self_attn\.o_proj\.input": "blocks.{}.attn.hook_z",
    r"model\.layers\.(\d+)\.post_feedforward_layernorm\.output": "blocks.{}.hook_mlp_out",
}
"""Hugging Face names in a second-release config: what TransformerLens calls them."""

READS_HEADS = "all heads side by side: (heads, d_head) flattened to d_in"
"""What a dictionary of hook_z reads, for its details."""

PUBLISHED = {"context_size": 1024, "prepend_bos": True}
"""How the published ones' activations were made (so SAELens reads them)."""

_NEEDED = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
_ONE_PLACE = "evalkit takes autoencoders, which reconstruct what they read: choose a residual, MLP or attention one"


class GemmaScope(Format):
    """Reader of both releases."""

    name = "gemma_scope"
    title = "Gemma Scope: params.npz; Gemma Scope 2: params.safetensors and config.json"
    facts = {"model_name": "model", "hf_hook_point_in": "hook_point", "num_tokens_trained": "training_tokens"}
    training = (r"hf_hook_point_out|l0|l0_.*|layer|target_.*",)

    def recognise(self, place: Place) -> bool:
        path = place.find("params.npz", "params.safetensors", "*.npz")
        keys = place.keys(path)
        if path is None or path.suffix == ".npz":
            return {name.lower() for name in keys} >= _NEEDED
        return keys >= _NEEDED

    def read(self, place: Place) -> Dictionary:
        path = one_file(self, place, "params.npz", "params.safetensors", "*.npz", "*.safetensors")
        with naming(path):
            return self._read(place, path)

    def _read(self, place: Place, path: Path) -> Dictionary:
        stored = place.weights(path)
        weights = Fields({name.lower(): tensor for name, tensor in stored.items()}, stored.prefix)
        stored.asked.update(stored)  # accounted for under their names in lower case
        place.read.append(weights)
        writer: dict[str, Any] = {}
        found = self._first(place, path, writer) if path.suffix == ".npz" else self._second(place, weights, writer)
        tensors = self._tensors(place, weights)
        width, features = tensors["W_enc"].shape
        if "width" in writer and number(place.config("config.json"), "width", place) != features:
            self.refuse(
                place, f"the config says width = {writer['width']}, the weights have {features} features", "fetch it again"
            )
        details: dict[str, Any] = {"format": self.name, "writer": writer}
        if found["model"]:
            details["made_with"] = dict(PUBLISHED)
        if found["hook_point"].endswith("hook_z"):
            details["reads"] = READS_HEADS
        wiring = Wiring(subtract_b_dec=False)
        if found["hook_point"] == "hook_embed":
            wiring = Wiring(subtract_b_dec=False, normalise="constant", scale=width**-0.5)
        return JumpReLU(tensors, wiring, **found, details=details)

    def _tensors(self, place: Place, weights: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The five tensors, checked against each other; a decoder of another shape is no autoencoder's."""
        b_dec = matrix(weights, "b_dec", (-1,), place)
        b_enc = matrix(weights, "b_enc", (-1,), place)
        w_enc = matrix(weights, "w_enc", (-1, len(b_enc)), place)
        decoder = weights.get("w_dec")
        if isinstance(decoder, torch.Tensor) and decoder.ndim == 3:
            self.refuse(place, "the decoder writes to several layers: this is a cross-layer transcoder", _ONE_PLACE)
        if w_enc.shape[0] != len(b_dec):
            what = f"it reads vectors of width {w_enc.shape[0]} and writes vectors of width {len(b_dec)}: this is a transcoder"
            self.refuse(place, what, _ONE_PLACE)
        scaling = weights.get("scaling_factor")
        if isinstance(scaling, torch.Tensor) and not torch.equal(scaling, torch.ones_like(scaling)):
            self.refuse(place, "the codes are multiplied by a scaling_factor, which evalkit does not have", "fold it into W_dec")
        threshold = matrix(weights, "threshold", (len(b_enc),), place)
        if (threshold < 0).any():
            self.refuse(place, "a threshold is below 0, which a JumpReLU's cannot be", "fetch the file again")
        return {
            "W_enc": w_enc,
            "b_enc": b_enc,
            "W_dec": matrix(weights, "w_dec", (len(b_enc), len(b_dec)), place),
            "b_dec": b_dec,
            "threshold": threshold,
        }

    def _first(self, place: Place, path: Path, writer: dict[str, Any]) -> dict[str, str]:
        """hook_point and model, from the path of the first release."""
        folders = "/".join(folders_of(path))
        repo = re.search(r"gemma-scope-(\d+b)-(pt|it)-([a-z]+)", folders)
        layer = re.search(r"/layer_(\d+)/", folders)
        for name, pattern in (("width", r"/width_(\w+)/"), ("average_l0", r"/average_l0_(\d+)"), ("layer", r"/layer_(\d+)/")):
            if match := re.search(pattern, folders):
                writer[f"folder_{name}"] = match.group(1)
        if repo is None:
            return {"hook_point": "", "model": ""}
        size, tuning, site = repo.groups()
        writer["repository"] = repo.group(0)
        model = f"google/gemma-2-{size}" + ("-it" if tuning == "it" else "")
        if site.startswith("transcoder"):
            self.refuse(place, "this is a transcoder: it writes to another place than it reads from", _ONE_PLACE)
        if site == "res" and "/embedding/" in folders:
            return {"hook_point": "hook_embed", "model": model}
        hook = HOOKS.get(site, "")
        return {"hook_point": hook.format(layer.group(1)) if layer else "", "model": model}

    def _second(self, place: Place, weights: dict[str, Any], writer: dict[str, Any]) -> dict[str, str]:
        """hook_point and model, from the config of the second release."""
        config = place.config("config.json")
        if not config:
            fix = "fetch config.json too, into the same folder"
            self.refuse(place, "there is no config.json beside params.safetensors, which says what it was trained on", fix)
        writer.update(config)
        if config.get("architecture") != "jump_relu":
            what = f"the config says architecture = {config.get('architecture')!r}, not 'jump_relu'"
            self.refuse(place, what, "check that the config belongs to the weights")
        read, written = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
        if config.get("type", "sae") != "sae" or (written is not None and written != read):
            what = f"this is a transcoder: it reads {read} and writes {written}, another place than it reads from"
            self.refuse(place, what, _ONE_PLACE)
        if config.get("affine_connection") or "affine_skip_connection" in weights:
            self.refuse(place, "it passes its input on through an affine connection: this is a transcoder", _ONE_PLACE)
        hook = ""
        for pattern, name in HOOKS_2.items():
            if match := re.fullmatch(pattern, str(read)):
                hook = name.format(match.group(1))
        return {"hook_point": hook, "model": str(config.get("model_name") or "")}


FORMATS.register(GemmaScope.name)(GemmaScope())
