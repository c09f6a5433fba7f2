"""EleutherAI's sparsify: TopK autoencoders (Gao et al. 2024, arXiv 2406.04093), one folder a hook point.

1. ``HOOKPOINT/cfg.json`` holds k, d_in and num_latents (0: d_in * expansion_factor); ``HOOKPOINT/sae.safetensors`` holds
   encoder.weight (F, D), encoder.bias (F,), W_dec (F, D) and b_dec (D,). With several seeds a folder ``seedN`` stands between.
2. codes = the k largest of ReLU((x - b_dec) @ encoder.weight.T + encoder.bias); b_dec is always subtracted.
3. x_hat = codes @ W_dec + b_dec: W_dec is stored the way it is used, and only the encoder is transposed.
4. The hook point is the folder's name, a module of the Hugging Face model ("layers.8.mlp"); its output is what is read. The model
   is named in the run's ``config.json``, one folder up.

``normalize_decoder`` changes training only, and so does ``multi_topk``: with it the library's ``forward`` returns the
reconstruction from 4 k codes that is trained on, while its ``encode`` keeps k; here both keep k. Transcoders, skip connections,
signed and groupmax codes are other functions and are refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from evalkit.dictionaries.autoencoder import Wiring
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats import safe
from evalkit.dictionaries.formats.base import FORMATS, Format, Place, matrix, number
from evalkit.dictionaries.provenance import note
from evalkit.dictionaries.topk import TopK
from evalkit.errors import DictionaryError

WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"
_SITES = {"": "hook_resid_post", "mlp": "hook_mlp_out", **dict.fromkeys(("attn", "self_attn", "attention"), "hook_attn_out")}
_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)(?:\.(\w+))?")


def hook_point(module: str) -> str:
    """The TransformerLens name of a block's, an MLP's or an attention's output; "" for any other module.

    Args:
        module: name of a submodule of the Hugging Face model: "layers.8", "h.8", "layers.8.mlp", "layers.8.self_attn".
    """
    found = _BLOCK.fullmatch(module)
    site = _SITES.get(found[2] or "") if found else None
    return f"blocks.{found[1]}.{site}" if found and site else ""


class Sparsify(Format):
    """Reader of sparsify's folders."""

    name = "sparsify"
    title = "EleutherAI sparsify: cfg.json + sae.safetensors"
    facts = {
        "model": "model", "dataset": "dataset", "ctx_len": "context_size", "revision": "revision", "split": "split",
        "exclude_tokens": "exclude_tokens", "load_in_8bit": "load_in_8bit", "data_args": "data_args",
    }  # fmt: skip
    training = (
        r"normalize_decoder|multi_topk|expansion_factor|num_latents|hookpoints?|layers?|layer_stride|.*acc_steps|distribute_modules",
        r"max_examples|max_seq.*|hf_token|data_preprocessing.*|shuffle.*|text_column|transcode|skip_connection|k_decay.*|activation|signed",
        r"force_lr_.*|max_.*_norm",
    )

    def recognise(self, place: Place) -> bool:
        """sae.safetensors with a linear encoder, and no config of another trainer beside it."""
        return {"encoder.weight", "encoder.bias"} <= place.keys(place.find(WEIGHTS)) and not _foreign(place)

    def read(self, place: Place) -> Dictionary:
        """The TopK autoencoder; see the module's docstring for what is refused."""
        path = place.find(WEIGHTS)
        if path is None:
            self.refuse(place, f"there is no {WEIGHTS} here", "give the folder of one hook point, such as RUN/layers.8")
        config = place.config(CONFIG)
        if not config:
            self.refuse(place, f"there is no {CONFIG} beside {path.name}: k is not known", "copy it from the run's folder")
        tensors = place.weights(path)
        self._refuse_others(place, config, tensors)

        width, k = number(config, "d_in", place), number(config, "k", place)
        features = number({"num_latents": 0, **config}, "num_latents", place, least=0)
        features = features or width * number(config, "expansion_factor", place)
        weights = {
            "W_enc": matrix(tensors, "encoder.weight", (features, width), place).T.contiguous(),
            "b_enc": matrix(tensors, "encoder.bias", (features,), place),
            "W_dec": matrix(tensors, "W_dec", (features, width), place),
            "b_dec": matrix(tensors, "b_dec", (width,), place),
        }
        module, run = _module(place.folder.resolve())
        run = place.track(run)
        stated = {name: run.get(name) for name in ("model", "dataset", "ctx_len") if isinstance(run.get(name), str | int)}
        details: dict[str, Any] = {"format": self.name, "writer": {"hookpoint": module, **stated, **config}}
        if run.get("revision") not in (None, "main"):
            note(details, f"its language model was loaded at revision {run['revision']}: give the suite's model that revision")
        where = {"hook_point": hook_point(module), "model": str(stated.get("model", "")), "details": details}
        try:
            return TopK(weights, k, Wiring(subtract_b_dec=True), **where)
        except DictionaryError as error:
            raise DictionaryError(error.what, where=f"{path}: {error.where}", fix=error.fix) from error

    def _refuse_others(self, place: Place, config: dict[str, Any], tensors: dict[str, Any]) -> None:
        if config.get("transcode"):
            self.refuse(
                place,
                "this is a transcoder: it writes to another place than it reads from; evalkit takes autoencoders",
                "train it with transcode off",
            )
        if config.get("skip_connection") or "W_skip" in tensors:
            self.refuse(
                place,
                "this has a skip connection: part of what it writes bypasses its features; evalkit takes autoencoders",
                "train it with skip_connection off",
            )
        if config.get("signed"):
            self.refuse(
                place, "its codes are signed: the k largest by magnitude; evalkit has no such architecture", "train without it"
            )
        activation = config.get("activation", "topk")
        if activation != "topk":
            self.refuse(
                place,
                f"its activation is {activation!r}; evalkit has no such architecture (groupmax keeps one feature in each group)",
                "train it with activation = 'topk'",
            )


def _foreign(place: Place) -> bool:
    try:
        return "architecture" in place.config(CONFIG)
    except DictionaryError:
        # unreadable: reading it says so, in full
        return False


def _module(folder: Path) -> tuple[str, dict[str, Any]]:
    """The module's name, from the folder's, and the run's config, without the part that ``cfg.json`` repeats."""
    owner = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    path = owner.parent / "config.json"
    try:
        found = safe.json_object(path) if path.is_file() else {}
    except DictionaryError:
        # a damaged record of the run takes nothing away from the weights
        found = {}
    ours = isinstance(found.get("sae"), dict)
    return owner.name, {name: value for name, value in found.items() if ours and name != "sae"}


FORMATS.register(Sparsify.name)(Sparsify())
