"""OpenMOSS's Language-Model-SAEs (llamascopium) and Llama Scope (He et al. 2024, arXiv 2410.20526).

1. x is multiplied by sqrt(D) / (mean norm of x in training) where ``norm_activation`` is "dataset-wise", by sqrt(D) / its own
   norm where it is "token-wise", and not at all where it is "inference" (folded already); x_hat is divided by the same.
2. pre = x @ W_E + b_E. b_D is not subtracted before, unless ``apply_decoder_bias_to_pre_encoder`` says so.
3. With ``sparsity_include_decoder_norm`` pre * ||W_D|| decides what is active, and codes are divided by the norm again.
4. codes = ReLU, ReLU of the k largest, or JumpReLU (threshold = exp(log_jumprelu_threshold)) of that; x_hat = codes @ W_D + b_D.

Files: ``config.json`` with ``sae_weights.safetensors`` (W_E ... or, as in R1-Distill, encoder.weight ...), or with checkpoints/;
Llama Scope v1: ``hyperparams.json`` with ``checkpoints/final.safetensors``. There the one threshold for all features is in units
of x: published thresholds grow with the norm of the layer, and divided by it they agree (about 2 after the scaling of 1).
It is multiplied by sqrt(D) / norm, as the pre-activations are.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch

from evalkit.dictionaries.autoencoder import Autoencoder, Wiring
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats.base import FORMATS, Format, Place, matrix, number
from evalkit.dictionaries.formats.single_file import naming
from evalkit.dictionaries.jumprelu import JumpReLU
from evalkit.dictionaries.relu import ReLU
from evalkit.dictionaries.topk import TopK
from evalkit.errors import DictionaryError

WEIGHTS = tuple(
    f"{stem}{ending}" for stem in ("sae_weights", "checkpoints/pruned", "checkpoints/final") for ending in (".safetensors", ".pt")
)
"""Where the writer's own loader looks, in its order; its distributed .dcp folders are not read."""

CONFIGS = ("config.json", "hyperparams.json")
"""Of the library, and of Llama Scope v1."""

NORM = "dataset_average_activation_norm"
_OWN = {"norm_activation", "sparsity_include_decoder_norm", "sae_type"}
_ENCODERS = {"W_E", "encoder.weight"}
_NORMALISE: dict[str, Literal["none", "constant", "token_norm"]] = {
    "dataset-wise": "constant",
    "token-wise": "token_norm",
    "inference": "none",
}


class OpenMOSS(Format):
    """Reader of OpenMOSS's autoencoders."""

    name = "openmoss"
    title = (
        "OpenMOSS Language-Model-SAEs: config.json and sae_weights.safetensors; Llama Scope: hyperparams.json and checkpoints/"
    )
    facts = {
        "model_name": "model", "hook_point_in": "hook_point", "norm_activation": "normalisation", NORM: "average_norm",
        "prepend_bos": "prepend_bos", "max_length": "context_size", "dataset_path": "dataset",
    }  # fmt: skip
    training = (
        r"expansion_factor|.*fixed_norm|.*unit_decoder.*|strict_.*|sparsity_threshold.*|use_triton.*|jumprelu_.*|jump_relu_.*|top_k",
        r"sae_pretrained.*|remove_gradient.*|.*_from_pretrained_path|model_pretrained.*|use_flash_attn|local_files_only|tokenizer_only",
        r"backend|load_ckpt|d_model|d_sae|hook_point_out|sae_type|use_glu_encoder|use_batch_norm_mse|clip_grad.*|k_.*",
        r"use_decoder_bias|min_length|text_column|token_.*",
    )

    def recognise(self, place: Place) -> bool:
        root, path = _root(place), _weights(place)
        if path is None or root.beside(*CONFIGS) is None or root.beside("cfg.json") is not None:
            return False
        return bool(place.keys(path) & _ENCODERS) and bool(self._peek(root) & _OWN)

    def read(self, place: Place) -> Dictionary:
        path = _weights(place)
        if path is None:
            self.refuse(place, "there are no weights of this format", f"give a folder with one of: {', '.join(WEIGHTS)}")
        with naming(path):
            return self._read(place, path)

    def _read(self, place: Place, path: Path) -> Dictionary:
        root = _root(place)
        config = root.config(*CONFIGS)
        weights = place.weights(path)
        self._check_kind(place, config, weights)
        tensors = self._tensors(place, config, weights)
        width = tensors["W_enc"].shape[0]
        norm = self._norm(place, config, weights)
        wiring = Wiring(
            subtract_b_dec=config.get("apply_decoder_bias_to_pre_encoder") is True,
            normalise=_NORMALISE[config["norm_activation"]],
            scale=1.0 if norm is None else math.sqrt(width) / norm,
            decoder_norm="select" if config.get("sparsity_include_decoder_norm", True) else "none",
        )
        model = root.config("lm_config.json").get("model_name") or config.get("model_name") or ""
        where = {
            "hook_point": str(config.get("hook_point_in") or ""),
            "model": str(model),
            "details": {"format": self.name, "writer": dict(config)},
        }
        return self._activated(place, config, weights, tensors, wiring, where)

    def _peek(self, root: Place) -> set[str]:
        try:
            return set(root.config(*CONFIGS))
        except DictionaryError:
            return set()

    def _check_kind(self, place: Place, config: dict[str, Any], weights: dict[str, Any]) -> None:
        """Refuse what is no autoencoder, and what depends on the batch a token is in."""
        kind = config.get("sae_type", "sae")
        read, written = config.get("hook_point_in"), config.get("hook_point_out")
        if kind != "sae" or (written is not None and read != written):
            self.refuse(
                place,
                f"this is a transcoder or another kind of dictionary (sae_type {kind!r}): it reads {read} and writes {written}",
                "evalkit takes autoencoders, which reconstruct what they read",
            )
        if config.get("use_glu_encoder") or any("glu" in name for name in weights):
            self.refuse(
                place, "its encoder has a gate of its own (use_glu_encoder), which evalkit does not have", "choose another"
            )
        norm = config.get("norm_activation")
        if norm not in _NORMALISE:
            self.refuse(
                place,
                f"the config says norm_activation = {norm!r}: a token's codes depend on other tokens, or this is not known",
                "evalkit takes dataset-wise, token-wise and inference",
            )

    def _tensors(self, place: Place, config: dict[str, Any], weights: dict[str, Any]) -> dict[str, torch.Tensor]:
        """W_enc, b_enc, W_dec and b_dec in the canonical layout, of the size that the config declares."""
        width = number(config, "d_model", place)
        features = number(config, "d_sae", place) if "d_sae" in config else self._expanded(place, config, width)
        if "W_E" in weights:
            encoder = matrix(weights, "W_E", (width, features), place)
            decoder = matrix(weights, "W_D", (features, width), place)
            names = ("b_E", "b_D")
        else:
            encoder = matrix(weights, "encoder.weight", (features, width), place).T.contiguous()
            decoder = matrix(weights, "decoder.weight", (width, features), place).T.contiguous()
            names = ("encoder.bias", "decoder.bias")
        biased = config.get("use_decoder_bias", True)
        return {
            "W_enc": encoder,
            "b_enc": matrix(weights, names[0], (features,), place),
            "W_dec": decoder,
            "b_dec": matrix(weights, names[1], (width,), place) if biased else torch.zeros(width),
        }

    def _expanded(self, place: Place, config: dict[str, Any], width: int) -> int:
        factor = config.get("expansion_factor")
        if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < 1e9:
            self.refuse(place, f"the config says expansion_factor = {factor!r}, not a positive number", "correct the config")
        return int(width * factor)

    def _norm(self, place: Place, config: dict[str, Any], weights: dict[str, Any]) -> float | None:
        """Mean norm of x in training; None where none is used."""
        if config["norm_activation"] != "dataset-wise":
            return None
        declared = config.get(NORM)
        stored = {name.removeprefix(f"{NORM}."): value for name, value in weights.items() if name.startswith(f"{NORM}.")}
        norms = {**(declared if isinstance(declared, dict) else {}), **stored}
        hook = config.get("hook_point_in")
        found = [norms[name] for name in dict.fromkeys((hook, "in", config.get("hook_point_out"), "out")) if name in norms]
        values = [float(value) for value in found if isinstance(value, int | float) or getattr(value, "numel", lambda: 0)() == 1]
        if not values or not all(0 < value < math.inf for value in values):
            shown = ", ".join(str(value) for value in values) or "absent"
            self.refuse(
                place,
                f"activations are normalised by their mean norm in training ({NORM}), and that is {shown}",
                "fetch the checkpoint that holds it, or save the autoencoder with fold_activation_scale=True",
            )
        if not all(math.isclose(value, values[0], rel_tol=1e-2) for value in values):  # stored in the weights' precision
            self.refuse(
                place, f"the mean norms of what it reads and writes differ ({values}), though the place is one", "fetch it again"
            )
        return values[0]

    def _activated(
        self,
        place: Place,
        config: dict[str, Any],
        weights: dict[str, Any],
        tensors: dict[str, torch.Tensor],
        wiring: Wiring,
        where: dict[str, Any],
    ) -> Autoencoder:
        kind = str(config.get("act_fn", config.get("activation_fn", "relu"))).lower()
        if kind == "relu":
            return ReLU(tensors, wiring, **where)
        if kind == "topk":
            return TopK(tensors, number(config, "top_k", place), wiring, **where)
        if kind == "jumprelu":
            return JumpReLU({**tensors, "threshold": self._threshold(place, config, weights, tensors, wiring)}, wiring, **where)
        if kind == "batchtopk":
            self.refuse(
                place,
                "a BatchTopK autoencoder of this library stores no threshold: what is active on a token depends on its batch",
                "convert it with the library's topk_to_jumprelu_conversion, and import the result",
            )
        self.refuse(place, f"the config says act_fn = {kind!r}", "evalkit takes relu, topk and jumprelu of this format")

    def _threshold(
        self, place: Place, config: dict[str, Any], weights: dict[str, Any], tensors: dict[str, torch.Tensor], wiring: Wiring
    ) -> torch.Tensor:
        """(F,) in units of the normalised pre-activations."""
        features = len(tensors["b_enc"])
        for name in ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold"):
            if name in weights:
                return matrix(weights, name, (features,), place).exp()
        shared = config.get("jump_relu_threshold")
        if not isinstance(shared, int | float) or isinstance(shared, bool) or not shared >= 0:
            self.refuse(
                place,
                "this is a JumpReLU autoencoder, and neither the weights (log_jumprelu_threshold) nor the config "
                "(jump_relu_threshold) hold its threshold",
                "fetch the checkpoint that holds it",
            )
        return torch.full((features,), float(shared) * wiring.scale)


def _root(place: Place) -> Place:
    """The folder with the config, where a checkpoint inside it was named."""
    return place.above if place.folder.name == "checkpoints" else place


def _weights(place: Place) -> Path | None:
    """The file that was named, or the first that the writer's own loader would take."""
    return place.find(*WEIGHTS) if place.file is not None else _root(place).find(*WEIGHTS)


FORMATS.register(OpenMOSS.name)(OpenMOSS())
