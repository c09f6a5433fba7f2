"""The ``cfg.json`` of SAELens, both ways: any version of it to one description, and a dictionary to version 6.

1. A config is of version 6 where it, or its ``metadata``, names ``sae_lens_version`` 6 or later; every other one is older.
2. What SAELens' directory of published dictionaries puts over the config comes first.
3. Older names become the newer ones (hook_point -> hook_name, activation_fn_str -> activation_fn), a missing architecture is
   "standard", a missing apply_b_dec_to_input is true, normalize_activations may be a bool, and a hook name with hook_z means
   flattened heads. In any version a "standard" SAE with activation_fn = topk is a TopK SAE.
4. How the language model was loaded is ``model_kwargs``.
5. ``describe`` goes the other way: the config that SAELens needs to compute what a dictionary computes, or a refusal.

Source: SAELens (https://github.com/decoderesearch/SAELens), versions 1 to 6.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from evalkit.dictionaries.autoencoder import Autoencoder
from evalkit.dictionaries.formats.base import Place, number
from evalkit.dictionaries.formats.fields import Fields
from evalkit.dictionaries.formats.model_kwargs import CENTRE, KWARGS, RMS, STREAM, centred
from evalkit.dictionaries.matryoshka import Matryoshka
from evalkit.dictionaries.provenance import note
from evalkit.dictionaries.topk import TopK
from evalkit.errors import DictionaryError
from evalkit.util.registry import near_miss

CONFIG = "cfg.json"
WRITTEN_VERSION = "6.0.0"
"""SAELens version whose config layout is written; SAELens chooses how to read a config by it."""

ARCHITECTURES = ("standard", "topk", "batchtopk", "matryoshka_batchtopk", "jumprelu", "gated")
BATCH = ("batchtopk", "matryoshka_batchtopk")
"""Architectures that have one threshold, and that SAELens exports as "jumprelu"."""

NORMALISE = {
    "none": "none",
    "expected_average_only_in": "constant",
    "constant_norm_rescale": "token_norm",
    "layer_norm": "layer_norm",
    "covariance_whitening": "whitening",
}
"""SAELens' normalize_activations to ``Wiring.normalise``; 'whitening' is folded into the weights."""

_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_CARRIED = (
    "model_class_name",
    "hook_head_index",
    "model_from_pretrained_kwargs",
    "prepend_bos",
    "exclude_special_tokens",
    "context_size",
    "seqpos_slice",
    "dataset_path",
    "neuronpedia_id",
    "hf_hook_name",
    "sae_lens_training_version",
)
"""Metadata of a SAELens file that an export of the same dictionary repeats."""

FACTS = {
    "model_name": "model", "hook_name": "hook_point", "dataset_path": "dataset", "context_size": "context_size",
    "normalize_activations": "normalisation",
    **{
        name: name
        for name in (
            "model_class_name", KWARGS, "prepend_bos", "exclude_special_tokens", "hook_head_index", "seqpos_slice",
            "sequence_separator_token", "disable_concat_sequences", "use_chat_formatting", "from_pretrained_path",
            "training_tokens", "hf_hook_name", "sae_lens_version", "sae_lens_training_version", "dtype",
        )
    },
}  # fmt: skip
"""Fields that say how a dictionary was made, with their common names."""

TRAINING = (
    r"hook_eval|hook_(point_)?layer|neuronpedia_id|.*trust_remote_code|streaming|is_dataset_tokenized|use_cached_activations|expansion_factor"
    r"|store_batch_size.*|train_batch_size|llm_.*|model_kwargs|architecture_details|b_dec_init_method|normalize_sae_decoder|noise_scale"
    r"|scale_sparsity_penalty_by_decoder_norm|decoder_(orthogonal|heuristic)_init|use_ghost_grads|use_sparse_activations|jumprelu_.*"
    r"|use_matryoshka_aux_loss|pre_act_loss_coefficient|sparsity_.*|mean_.*_density|log_to_wandb"
    r"|tokens_per_buffer|total_training_.*|finetuning_(method|tokens)|d_head|from_checkpoint|lp_norm|k|matryoshka_widths|unique_id"
    r"|rescale_acts_by_decoder_norm|hook_point_head_index|sae_lens_.*|training_architecture.*|prompt.*_batch.*|d_out",
)
"""Patterns of fields that matter in training only, or that another field says already."""


class Description(NamedTuple):
    """What a config of any version says."""

    architecture: str
    """One of ``ARCHITECTURES``."""
    d_in: int
    d_sae: int
    k: int | None
    """Active features a token; None where the architecture has none."""
    groups: list[int] | None
    """Features of each Matryoshka group; None where the config does not give them."""
    trained_as: str
    """Architecture in training, which an exported "jumprelu" still names; '' where unknown."""
    subtract_b_dec: bool
    normalise: str
    """A value of ``NORMALISE``."""
    rescale: bool
    """rescale_acts_by_decoder_norm: pre-activations are multiplied by the decoder rows' norms."""
    finetuned: bool
    """finetuning_scaling_factor: codes are multiplied by a stored factor before decoding."""
    hook_point: str
    """TransformerLens name, or ''."""
    model: str
    reads: str
    """In words, what of the hook point's activations is read where it is not the whole vector; else ''."""
    centre: bool
    """Each token's mean is taken, as the language model's weights were centred."""
    details: dict[str, Any]
    """``writer``: the config as written, its metadata on the same level; ``notes`` on what is not followed."""


def read(place: Place) -> Description:
    """The description of the ``cfg.json`` in ``place``.

    Raises:
        DictionaryError: there is none, or it says what evalkit cannot take over.
    """
    path = place.folder / CONFIG
    raw = place.config(CONFIG)
    if not raw:
        raise DictionaryError(f"{CONFIG} is missing or empty", where=str(path), fix="fetch it: it lies beside the weights")
    inner = raw.get("metadata")
    metadata = inner if isinstance(inner, dict) else {}
    stated = {**metadata, **{name: value for name, value in raw.items() if name != "metadata"}, **place.overrides}
    raw.asked.update(raw)  # its fields are accounted for in the merged config
    config = place.track(_newer_names(stated))
    details: dict[str, Any] = {"writer": json.loads(json.dumps(config), parse_constant=str)}
    architecture, k = _architecture(config, path)
    d_sae = number(config, "d_sae", path)
    hook = str(config.get("hook_name") or "")
    point = hook if re.fullmatch(r"(\w+\.)*hook_\w+", hook) else ""
    model = str(config.get("model_name") or "")
    finetuned = config.get("finetuning_scaling_factor")
    for sentence in _other_positions(config):
        note(details, sentence)
    return Description(
        architecture=architecture,
        d_in=number(config, "d_in", path),
        d_sae=d_sae,
        k=k,
        groups=_groups(config, d_sae, path),
        trained_as=str(config.get("training_architecture") or ""),
        subtract_b_dec=_flag(config, "apply_b_dec_to_input", True, path),
        normalise=_normalise(config, path),
        # configs from before the setting existed lack it, and nothing was rescaled then
        rescale=_flag(config, "rescale_acts_by_decoder_norm", False, path) and architecture in ("topk", *BATCH),
        finetuned=finetuned is True,
        hook_point=point,
        model=model,
        reads=_reads(config, hook),
        centre=_centre(config, point, model, path, details),
        details=details,
    )


def _other_positions(config: Fields) -> list[str]:
    """What the config says of the positions and texts it was trained on, where evalkit reads others."""
    found = []
    part = config.get("seqpos_slice")
    if isinstance(part, list | tuple) and any(bound is not None for bound in part):
        found.append(f"trained on the positions seqpos_slice = {list(part)} alone; here all kept ones are read")
    without = config.get("exclude_special_tokens")
    if isinstance(without, list | tuple) and without:  # true leaves out the BOS, as is done here
        found.append(f"trained without the tokens {list(without)[:8]}; here they are read")
    for name in ("use_chat_formatting", "disable_concat_sequences"):
        if config.get(name):
            found.append(f"trained with {name}; here windows are cut from documents as they are")
    return found


def _flag(config: Fields, name: str, default: bool, path: Path) -> bool:
    """A field that is true or false.

    Raises:
        DictionaryError: it is something else.
    """
    value = config.get(name)
    if value is None:
        return default
    if value in (0, 1):  # True and False are
        return bool(value)
    raise DictionaryError(f"{name} is neither true nor false: {value!r}", where=str(path), fix="correct it in the file")


def _centre(config: Fields, hook_point: str, model: str, path: Path, details: dict[str, Any]) -> bool:
    """Whether the language model's writing weights were centred; says so where the config leaves it open."""
    kwargs, by = config.get(KWARGS), str(config.get("model_class_name") or "HookedTransformer")
    if isinstance(kwargs, dict):
        if by == "HookedTransformer":
            return centred(kwargs, hook_point, model, str(path), details)
        # arguments of transformers: they choose a model and rewrite nothing
        return centred({name: value for name, value in kwargs.items() if name != CENTRE}, hook_point, model, str(path), details)
    if kwargs is not None:
        raise DictionaryError(f"{KWARGS} = {kwargs!r} is no object", where=str(path), fix="correct the config")
    if not _of_version_6(config) and STREAM.fullmatch(hook_point) and not RMS.search(model):
        note(
            details,
            f"its config, of an older SAELens, does not say whether the language model's writing weights were centred ({CENTRE})",
        )
    return False


def _of_version_6(config: Mapping[str, Any]) -> bool:
    version = re.match(r"\d+", str(config.get("sae_lens_version") or ""))
    return version is not None and int(version.group()) >= 6


def _newer_names(config: dict[str, Any]) -> dict[str, Any]:
    if _of_version_6(config):
        return config
    newer = {name: value for name, value in config.items() if name not in _RENAMED}
    for old, new in _RENAMED.items():
        if old in config:
            newer.setdefault(new, config[old])
    layer = config.get("hook_layer", config.get("hook_point_layer"))
    if isinstance(layer, int) and isinstance(newer.get("hook_name"), str):
        newer["hook_name"] = newer["hook_name"].replace("{layer}", str(layer))
    if "reshape_activations" not in newer and "hook_z" in str(newer.get("hook_name") or ""):
        newer["reshape_activations"] = "hook_z"
    newer.setdefault("prepend_bos", True)  # so SAELens takes it, too
    return newer


def _architecture(config: Fields, path: Path) -> tuple[str, int | None]:
    """Architecture and k."""
    architecture = str(config.get("architecture") or "standard")
    out, hook_out = config.get("d_out"), config.get("hook_name_out")
    elsewhere = out not in (None, config.get("d_in")) or hook_out not in (None, "", config.get("hook_name"))
    if "transcoder" in architecture or elsewhere:
        raise DictionaryError(
            "this is a transcoder: it writes to another place than it reads from; evalkit takes autoencoders",
            where=f"{path}: architecture = {architecture}",
            fix="choose an SAE of the same model and layer",
        )
    if architecture not in ARCHITECTURES:
        raise DictionaryError(
            f"evalkit has no architecture '{architecture}'",
            where=f"{path}: architecture",
            fix=near_miss(architecture, ARCHITECTURES),
        )
    activation = str(config.get("activation_fn") or "relu")
    if activation == "topk" and architecture == "standard":
        architecture = "topk"
    if activation not in ("relu", "topk") or (activation == "topk" and architecture != "topk"):
        raise DictionaryError(
            f"a '{architecture}' SAE with activation_fn = '{activation}' is not one evalkit has",
            where=f"{path}: activation_fn",
            fix="known: relu, and topk for the architectures standard and topk",
        )
    inner = config.part("activation_fn_kwargs")
    if architecture != "topk":
        return architecture, None
    k = inner.get("k", config.get("k"))
    if k is None:
        raise DictionaryError(
            "this is a TopK SAE whose config does not say k",
            where=f"{path}: k",
            fix='add "k", the number of active features a token',
        )
    return architecture, number({"k": k}, "k", path)


def _groups(config: Mapping[str, Any], d_sae: int, path: Path) -> list[int] | None:
    """Group sizes from SAELens' cumulative widths; the last group reaches d_sae even where the widths do not."""
    details = config.get("training_architecture_details")
    widths = config.get("matryoshka_widths") or (details.get("matryoshka_widths") if isinstance(details, dict) else None)
    if not widths:
        return None
    if not isinstance(widths, list) or not all(isinstance(width, int) for width in widths):
        raise DictionaryError(f"matryoshka_widths = {widths!r} is no list of widths", where=str(path), fix="correct the config")
    ends = widths if widths[-1] == d_sae else [*widths, d_sae]
    groups = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if min(groups) < 1:
        raise DictionaryError(
            f"matryoshka_widths = {widths} do not rise to d_sae = {d_sae}", where=str(path), fix="correct the config"
        )
    return groups


def _normalise(config: Mapping[str, Any], path: Path) -> str:
    value = config.get("normalize_activations")
    if isinstance(value, bool) or value is None:
        value = "expected_average_only_in" if value else "none"
    if not isinstance(value, str) or value not in NORMALISE:
        raise DictionaryError(
            f"normalize_activations = {value!r} is not known",
            where=f"{path}: normalize_activations",
            fix=near_miss(str(value), NORMALISE),
        )
    return NORMALISE[value]


def _reads(config: Mapping[str, Any], hook: str) -> str:
    head = config.get("hook_head_index")
    if head is not None:
        return f"head {head} of {hook} alone"
    flat = config.get("reshape_activations") == "hook_z"
    return "all heads side by side: (heads, d_head) flattened to d_in" if flat else ""


def describe(dictionary: Autoencoder) -> dict[str, Any]:
    """The version 6 config of ``dictionary``.

    Raises:
        DictionaryError: its wiring has no counterpart that SAELens computes exactly.
    """
    wiring, kind = dictionary.wiring, dictionary.kind
    if wiring.normalise == "constant" and wiring.scale != 1.0:
        raise DictionaryError(
            "SAELens does not apply a constant input scale when it loads a file, so the SAE would be computed without it",
            where=f"scale = {wiring.scale:g}",
            fix="fold it first: W_enc * scale, W_dec / scale, b_dec / scale, and normalise = 'none'",
        )
    if wiring.centre and not (STREAM.fullmatch(dictionary.hook_point) and not RMS.search(dictionary.model)):
        raise DictionaryError(
            "SAELens centres activations of the residual stream of models with LayerNorm alone",
            where=f"centre = True at {dictionary.hook_point or 'no hook point'} of {dictionary.model or 'no model'}",
            fix="keep it in evalkit's own format",
        )
    rescaled = wiring.decoder_norm == "codes"
    if wiring.decoder_norm == "select" or (rescaled and kind in ("relu", "jumprelu")):
        raise DictionaryError(
            f"SAELens has no '{kind}' SAE with decoder_norm = '{wiring.decoder_norm}'",
            where="decoder_norm",
            fix="keep it in evalkit's own format, or fold the norms into encoder and decoder where that is exact",
        )
    architecture = {"relu": "standard", "batchtopk": "jumprelu", "matryoshka": "jumprelu"}.get(kind, kind)
    trained_as = {"batchtopk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}.get(kind, "")
    normalise = "none" if wiring.normalise == "constant" else wiring.normalise
    metadata = _metadata(dictionary)
    flat = str(metadata["hook_name"]).endswith("hook_z") and metadata.get("hook_head_index") is None
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": wiring.subtract_b_dec,
        "normalize_activations": next(name for name, ours in NORMALISE.items() if ours == normalise),
        "reshape_activations": "hook_z" if flat else "none",
        "metadata": metadata,
    }
    if isinstance(dictionary, TopK):
        config |= {"k": dictionary.k, "rescale_acts_by_decoder_norm": rescaled}
    widths: dict[str, Any] = {}
    if isinstance(dictionary, Matryoshka):
        widths["matryoshka_widths"] = [sum(dictionary.groups[: n + 1]) for n in range(len(dictionary.groups))]
    if trained_as:
        metadata |= {"training_architecture": trained_as, "training_architecture_details": widths}
    if trained_as and rescaled:
        # a "jumprelu" has no rescaling: only the form of a training checkpoint has
        config |= {"architecture": trained_as, "rescale_acts_by_decoder_norm": True, "k": _known_k(dictionary), **widths}
    return config


def _metadata(dictionary: Autoencoder) -> dict[str, Any]:
    writer = dictionary.details.get("writer") if dictionary.details.get("format") == "saelens" else None
    known = writer if isinstance(writer, dict) else {}
    kwargs = known.get(KWARGS)
    # the function decides: what the file it came from said of centring is brought in line with it
    how = {**(kwargs if isinstance(kwargs, dict) else {}), **({CENTRE: True} if dictionary.wiring.centre else {})}
    return {
        **{name: known[name] for name in _CARRIED if name in known},
        **({KWARGS: how} if how else {}),
        "sae_lens_version": WRITTEN_VERSION,
        "model_name": dictionary.model or None,
        "hook_name": dictionary.hook_point or known.get("hook_name"),
    }


def _known_k(dictionary: Autoencoder) -> int | float:
    """k of training, from the details: SAELens keeps it in a checkpoint, though the threshold has taken its place."""
    for part in (dictionary.details, dictionary.details.get("writer"), dictionary.details.get("trained")):
        k = part.get("k") if isinstance(part, dict) else None
        if isinstance(k, int | float) and k > 0:
            return k
    raise DictionaryError(
        "a SAELens checkpoint stores k, and this dictionary does not know the k it was trained with",
        where="details",
        fix='set dictionary.details["k"] to the average number of active features a token, and export again',
    )
