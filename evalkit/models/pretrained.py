"""The one place where transformers reads a stranger's folder or hub name: config, tokenizer, weights.

1. No code of a model's own is run, and nobody is asked whether it should be: ``trust_remote_code`` is False throughout. No
   package is installed either (``text_only``).
2. Whatever a library raises on the way becomes a ModelError with the library's first line. There are too many kinds to list:
   missing packages of quantised weights, damaged files, unknown model types, sizes that disagree, HTTP.
3. Weights that the folder lacks are an error here: transformers would make them up and only log it.
4. Quantised weights of a method that the installed transformers does not have are refused: it would load their numbers as they
   stand and only log it.
5. ``check_causal`` refuses a model that sees the future: every evaluation takes an activation for a function of the text so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from evalkit.errors import EvalkitError, ModelError, reason

LOOK = 8
"""Tokens of the text on which causality is tried."""
LEAK = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Change of earlier logits, as a share of the change at the changed token, from which a model sees the future."""
LEAK_SHORT = 0.05
"""The same in a half-precision dtype."""


class Pretrained(NamedTuple):
    """A transformers model in evaluation mode, without gradients, on the CPU, and its tokenizer."""

    model: Any
    tokenizer: Any


@contextmanager
def seam(what: str, where: str, fix: str) -> Iterator[None]:
    """Whatever a library raises inside the block is raised as a ModelError: ``what``, and the library's first line.

    Raises:
        ModelError: with the exception as its cause. evalkit's own errors pass unchanged.
    """
    try:
        yield
    except EvalkitError:
        raise
    except Exception as error:
        said = reason(error)
        if "trust_remote_code" in str(error):
            said, fix = "it needs code of its own, which evalkit never runs", "use a model of a type that transformers knows"
        raise ModelError(f"{what}: {said}", where=where, fix=fix) from error


@contextmanager
def text_only() -> Iterator[None]:
    """Inside the block TransformerLens loads no image or audio processor, which evalkit has no use for.

    Where torchvision is missing, loading one runs ``pip install``, which may replace the user's PyTorch.
    """
    from transformer_lens.model_bridge.sources.transformers import source

    loader = source.load_modality_processor
    source.load_modality_processor = lambda *args, **options: None
    try:
        yield
    finally:
        source.load_modality_processor = loader


def pretrained(
    where: str,
    dtype: torch.dtype,
    *,
    local: bool,
    revision: str = "",
    random_seed: int | None = None,
    attention: str = "eager",
) -> Pretrained:
    """The causal LM and the tokenizer at ``where``, a Hugging Face folder or a hub name.

    Args:
        local: touch no network.
        revision: branch, tag or commit of a hub name.
        random_seed: draw all weights anew with this seed and read none.
        attention: transformers' attn_implementation; its own choice where empty.

    Raises:
        ModelError: one of them is not there, cannot be reached, is not whole, or needs what is not installed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from evalkit.assets.hub_errors import hub_errors

    hub_errors()  # quiets the hub's log of attempts
    fix = (
        "check that the folder is whole (config, weights, tokenizer) and of a causal language model"
        if local
        else "check the name and the connection to the hub, or give a local folder (path) or a packaged model (package)"
    )
    common: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    if revision:
        common["revision"] = revision
    settings: dict[str, Any] = {"dtype": dtype} | ({"attn_implementation": attention} if attention else {})
    weights: Any = AutoModelForCausalLM
    tokenizer = read_tokenizer(where, fix=fix, **common)
    with seam("the model cannot be loaded", where, fix):
        architecture = AutoConfig.from_pretrained(where, **common)
        if random_seed is not None:
            with torch.random.fork_rng():
                torch.manual_seed(random_seed)
                model = weights.from_config(architecture, trust_remote_code=False, **settings)
            return Pretrained(model.eval().requires_grad_(False), tokenizer)
        _check_quantised(architecture, where)
        model, report = weights.from_pretrained(where, output_loading_info=True, **settings, **common)
        missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{len(missing)} weights are missing, the first is {missing[0]}",
            where=where,
            fix="copy or save the model again",
        )
    return Pretrained(model.eval().requires_grad_(False), tokenizer)


def _check_quantised(architecture: Any, where: str) -> None:
    """Raise ModelError where the weights are quantised in a way that transformers would pass over."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    for config in (architecture, architecture.get_text_config()):
        how = getattr(config, "quantization_config", None) or {}
        method = (how if isinstance(how, dict) else how.to_dict()).get("quant_method")
        name = str(getattr(method, "value", method))
        if method is not None and not any(known.startswith(name) for known in AUTO_QUANTIZATION_CONFIG_MAPPING):
            known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
            raise ModelError(
                f"its weights are quantised by '{name}', which the installed transformers does not know",
                where=where,
                fix=f"use the model in float32 or bfloat16, or one quantised by {known}",
            )


def read_tokenizer(where: str, *, fix: str, **options: Any) -> Any:
    """The tokenizer at ``where``; ``options`` are those of transformers.

    Raises:
        ModelError: there is none, or it makes no tokens.
    """
    from transformers import AutoTokenizer

    options = {**options, "trust_remote_code": False}
    with seam("the tokenizer cannot be loaded", where, fix):
        tokenizer: Any = AutoTokenizer.from_pretrained(where, **options)
        known = {*tokenizer.all_special_ids}
        words = tokenizer("a text of words", add_special_tokens=False)["input_ids"]
    if known.issuperset(words):  # what transformers builds where the vocabulary is missing
        raise ModelError("the tokenizer has no vocabulary", where=where, fix="copy the tokenizer's files beside the weights")
    return tokenizer


@torch.no_grad()
def check_causal(model: Any, where: str) -> None:
    """Change the last token of a text and see whether the logits before it change.

    Raises:
        ModelError: they do, as in a masked language model, or the model cannot be run on a text at all.
    """
    fix = "use a causal (decoder-only) language model, such as GPT-2, Pythia, Llama, Qwen or Gemma"
    with seam("the model cannot be run on a text", where, fix):
        text = model.config.get_text_config()
        most = min(LOOK, int(getattr(text, "max_position_embeddings", LOOK) or LOOK))
        tokens = torch.arange(most + 1, device=model.device) % int(model.get_input_embeddings().weight.shape[0])
        # one row at a time: the same computation for what is the same in both
        one, two = (model(input_ids=row[None], use_cache=False).logits[0].double().cpu() for row in (
            tokens[:most], torch.cat([tokens[: most - 1], tokens[most:]])
        ))  # fmt: skip
    change = (one - two).abs()
    change = change.masked_fill(~change.isfinite(), 0.0)  # an overflow is said where activations are captured
    own, earlier = float(change[-1].max()), float(change[:-1].max()) if most > 1 else 0.0
    if earlier > LEAK.get(model.dtype, LEAK_SHORT) * own:
        raise ModelError(
            "the model sees the future: another last token changes what it makes of the tokens before it", where=where, fix=fix
        )
