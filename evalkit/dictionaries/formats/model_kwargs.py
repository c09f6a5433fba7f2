"""How the language model of a SAELens dictionary was loaded: what ``model_from_pretrained_kwargs`` does to its activations.

The kwargs go to TransformerLens, which may rewrite a model's weights so that it says the same and holds other activations:

1. ``center_writing_weights`` takes from everything that is written to the residual stream its mean over the width, in models with
   LayerNorm; it does nothing in models with RMSNorm. What is read from the stream goes through a LayerNorm, which takes the mean
   anyway, so activations inside attention and MLP are the same.
2. ``fold_ln`` moves a norm's weights behind it and changes hook_normalized alone. ``fold_value_biases`` takes the value bias
   out of hook_v and hook_z. ``refactor_factored_attn_matrices`` changes the basis of what attention reads and writes.
3. A ``revision`` or a checkpoint is another model.

``centred`` says what a dictionary has to do about it; what cannot be followed is refused, and the rest is reported.

Source: TransformerLens (https://github.com/TransformerLensOrg/TransformerLens), versions 1 to 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from evalkit.dictionaries.provenance import note
from evalkit.errors import DictionaryError

KWARGS = "model_from_pretrained_kwargs"
CENTRE = "center_writing_weights"

STREAM = re.compile(
    r"(blocks\.\d+\.)?hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out|in|out|embed|pos_embed)|blocks\.\d+\.(attn|mlp)\.hook_out"
)
"""Hook points that hold what is written to the residual stream, or its sum."""

INSIDE = re.compile(
    r"blocks\.\d+\.(attn\.hook_(q|k|v|z|rot_q|rot_k)|mlp\.hook_(pre|post|pre_linear|mid)|ln[12]\.hook_normalized)|ln_final\.hook_normalized"
)
"""Hook points behind a norm: centring changes nothing there."""

RMS = re.compile(
    r"llama|vicuna|alpaca|mistral|mixtral|ministral|gemma|qwen|qwq|phi-?[34]|(^|/)yi-|olmo-?[23]|olmoe|smollm|deepseek|granite|apertus"
    r"|internlm|baichuan|(^|/)t5|gpt-oss|glm|zephyr|nemo|exaone|hunyuan|minicpm|mamba",
    re.IGNORECASE,
)
"""Names of models with RMSNorm: TransformerLens does not centre them, though it is asked to."""

_SAME = {
    "center_unembed", "fold_ln", "fold_value_biases", "refactor_factored_attn_matrices", CENTRE,
    "device", "n_devices", "move_to_device", "device_map", "dtype", "torch_dtype", "default_padding_side", "default_prepend_bos",
    "trust_remote_code", "cache_dir", "local_files_only", "token", "use_auth_token", "low_cpu_mem_usage", "attn_implementation",
    "load_in_8bit", "load_in_4bit",
}  # fmt: skip
_OTHER_MODEL = ("revision", "checkpoint_index", "checkpoint_value")
_CHANGED = {
    "fold_ln": (r".*hook_normalized", "without the norm's weight and bias"),
    "fold_value_biases": (r".*attn\.hook_(v|z|result)", "without the value bias"),
    "refactor_factored_attn_matrices": (r".*attn\.hook_(q|k|v|z|rot_q|rot_k|attn_scores)", "in another basis"),
}
"""Kwargs, the hook points that they change, and how."""


def centred(kwargs: Mapping[str, Any], hook_point: str, model: str, where: str, details: dict[str, Any]) -> bool:
    """Whether a dictionary has to centre each token, as its language model's weights were centred.

    Args:
        kwargs: model_from_pretrained_kwargs of the config.
        hook_point: what the dictionary reads; '' where the config does not say.
        model: name of its language model.
        where: the file, for messages.
        details: gets notes on what is not followed.

    Raises:
        DictionaryError: the kwargs change the activations at ``hook_point`` in a way that evalkit cannot follow.
    """
    for name, (changed, how) in _CHANGED.items():
        if kwargs.get(name) and re.fullmatch(changed, hook_point):
            raise DictionaryError(
                f"its language model was loaded with {name}: {hook_point} held its activations {how}, and here it does not",
                where=f"{where}: {KWARGS}",
                fix="choose a dictionary of another hook point, or of a model that was loaded as it is",
            )
    for name in _OTHER_MODEL:
        if kwargs.get(name) not in (None, "main"):
            note(details, f"its language model was loaded with {name} = {kwargs[name]}: give the suite's model that revision")
    for name in ("load_in_8bit", "load_in_4bit"):
        if kwargs.get(name):
            note(details, f"its language model was quantised as it was loaded ({name}): activations differ a little")
    for name in kwargs:
        if name not in _SAME and name not in _OTHER_MODEL and kwargs[name] is not None:
            note(details, f"not followed: its language model was loaded with {name} = {str(kwargs[name])[:60]}")
    return _centre(kwargs.get(CENTRE), hook_point, model, where, details)


def _centre(asked: Any, hook_point: str, model: str, where: str, details: dict[str, Any]) -> bool:
    if asked in (None, False) or INSIDE.fullmatch(hook_point):
        return False
    if asked is not True:
        raise DictionaryError(
            f"{CENTRE} = {asked!r} is neither true nor false", where=f"{where}: {KWARGS}", fix="correct the config"
        )
    if RMS.search(model):
        note(details, f"{CENTRE} was asked for; models with RMSNorm such as {model} are not centred by TransformerLens, nor here")
        return False
    if not STREAM.fullmatch(hook_point):
        at = hook_point or "a hook point that is not named"
        raise DictionaryError(
            f"its language model was loaded with {CENTRE}, and what that changes at {at} is not known",
            where=f"{where}: {KWARGS}",
            fix="name the hook point in the config (hook_name), or choose a dictionary of the residual stream",
        )
    note(details, f"each token's mean over the width is taken and given back: its language model was loaded with {CENTRE}")
    return True
