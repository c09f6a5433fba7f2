"""The ``config.json`` of dictionary_learning, both ways: where it lies, which hook point it means, what an export says.

1. The config lies beside the weights, or one folder up where these are in ``checkpoints``. Only one with a "trainer" is theirs.
2. ``trainer.submodule_name`` ("resid_post_layer_8", or the module's path in the language model) with ``buffer.io`` gives the
   hook point; where they leave it open it stays ''.
3. An export repeats what the file it was read from said, brought up to date.

Source: dictionary_learning (https://github.com/saprmarks/dictionary_learning).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evalkit.dictionaries.autoencoder import Autoencoder
from evalkit.dictionaries.formats import safe
from evalkit.dictionaries.matryoshka import Matryoshka
from evalkit.dictionaries.topk import TopK
from evalkit.errors import DictionaryError

CONFIG = "config.json"

FACTS = {
    "trainer.lm_name": "model", "trainer.submodule_name": "hook_point", "trainer.layer": "layer",
    "trainer.norm_factor": "norm_factor", "buffer.ctx_len": "context_size", "buffer.add_special_tokens": "add_special_tokens",
    "buffer.remove_bos": "remove_bos",
    "buffer.remove_bos_token": "remove_bos", "buffer.io": "io", "buffer.rescale_acts": "rescale_acts",
    "buffer.max_activation_norm_multiple": "max_activation_norm_multiple", "trainer.dataset_name": "dataset",
    "trainer.dataset": "dataset",
}  # fmt: skip
"""Fields that say how a dictionary was made. The biases of a file are multiplied by its norm_factor already."""

TRAINING = (
    r"n_ctxs|(refresh|out)_batch_size|d_submodule|l1_.*|group_.*|k|k_.*|threshold|threshold_.*|.*anneal.*|submodule.*|expansion_factor|dict_.*",
)
"""Patterns of fields that matter in training only, or that the weights say already."""

_PLACES = {
    "resid_post": "hook_resid_post",
    "resid_out": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
    "attention_out": "hook_attn_out",
}
"""Names of places in submodule_name to TransformerLens names; the first name of a place is the one that is written."""


def find(path: Path) -> dict[str, Any]:
    """The config of the weights at ``path``; {} where there is none of the library's.

    Raises:
        DictionaryError: the config is not JSON.
    """
    for folder in (path.parent, path.parent.parent):
        if (folder / CONFIG).is_file():
            found = safe.json_object(folder / CONFIG)
            if isinstance(found.get("trainer"), dict):
                return json.loads(json.dumps(found), parse_constant=str)
    return {}


def hook_point(trainer: Mapping[str, Any], buffer: Mapping[str, Any]) -> str:
    """TransformerLens name of the submodule whose activations were read; '' where the config does not tell for certain."""
    name, layer, io = str(trainer.get("submodule_name") or ""), trainer.get("layer"), buffer.get("io", "")
    if re.fullmatch(r"(\w+\.)*hook_\w+", name):
        return name
    if found := re.fullmatch(r"(?:gpt_neox\.layers|model\.layers|transformer\.h)\.(?P<layer>\d+)", name):
        hook = {"out": "hook_resid_post", "in": "hook_resid_pre"}.get(io, "")
    elif found := re.fullmatch(r"(?P<place>\w+?)_layer_?(?P<layer>\d+)", name):
        said = found["place"]
        hook = _PLACES.get(said, "") if io in ("", "out") or said == "resid_pre" else ""
    else:
        return ""
    agrees = layer is None or str(layer) == found["layer"]
    return f"blocks.{found['layer']}.{hook}" if hook and agrees else ""


def describe(dictionary: Autoencoder, dict_class: str) -> dict[str, Any]:
    """The config of ``dictionary`` as the library's ``dict_class``; with k where ``dictionary`` has or remembers one."""
    known = dictionary.details.get("writer") if dictionary.details.get("format") == "dictionary_learning" else None
    trainer: dict[str, Any] = dict(known) if isinstance(known, dict) else {}
    buffer = trainer.pop("buffer", {})
    trainer |= {
        "dict_class": dict_class,
        "activation_dim": dictionary.d_in,
        "dict_size": dictionary.n_features,
        "lm_name": dictionary.model,
    }
    if isinstance(dictionary, TopK):
        trainer["k"] = dictionary.k
    elif dictionary.kind in ("batchtopk", "matryoshka"):
        trainer["k"] = _known_k(dictionary)
    if isinstance(dictionary, Matryoshka):
        trainer["group_sizes"] = dictionary.groups
    if hook_point(trainer, buffer) != dictionary.hook_point:
        trainer["submodule_name"], trainer["layer"] = _submodule(dictionary.hook_point)
        buffer = {}
    return {"trainer": trainer, **({"buffer": buffer} if buffer else {})}


def _submodule(hook: str) -> tuple[str, int | None]:
    """submodule_name and layer from which ``hook_point`` gives ``hook``."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if found is None:
        return hook, None
    place = next((place for place, name in _PLACES.items() if name == found[2]), None)
    return hook if place is None else f"{place}_layer_{found[1]}", int(found[1])


def _known_k(dictionary: Autoencoder) -> int:
    """k of training, from the details: the library's class needs it, though the threshold has taken its place."""
    writer = dictionary.details.get("writer")
    in_training = writer.get("training_architecture_details") if isinstance(writer, dict) else None
    for part in (dictionary.details, writer, in_training, dictionary.details.get("trained")):
        k = part.get("k") if isinstance(part, dict) else None
        if isinstance(k, int | float) and k > 0 and float(k).is_integer():
            return int(k)
    raise DictionaryError(
        "a dictionary_learning file stores k, and this dictionary does not know the k it was trained with",
        where="details",
        fix='set dictionary.details["k"] to the average number of active features a token, and export again',
    )
