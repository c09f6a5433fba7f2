"""Dictionaries of language models whose writing weights were centred: what they read and give back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from evalkit.dictionaries.autoencoder import Autoencoder, Wiring
from evalkit.dictionaries.formats import model_kwargs
from evalkit.dictionaries.loading import export_dictionary, import_dictionary
from evalkit.dictionaries.relu import ReLU
from evalkit.errors import DictionaryError

D = 8
STREAM = "blocks.0.hook_resid_post"


def weights(d: int = D) -> dict[str, torch.Tensor]:
    """An autoencoder that rebuilds any token without a mean exactly, and never one with a mean."""
    centring = torch.eye(d) - 1 / d
    both = torch.cat([centring, -centring])  # (2 D, D)
    return {"W_enc": both.T.contiguous(), "b_enc": torch.zeros(2 * d), "W_dec": both, "b_dec": torch.zeros(d)}


def put(folder: Path, kwargs: Any, *, hook: str = STREAM, model: str = "gpt2-small", **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(weights(), folder / "sae_weights.safetensors")
    metadata = {"sae_lens_version": "6.1.0", "model_name": model, "hook_name": hook, "model_from_pretrained_kwargs": kwargs}
    text = {"architecture": "standard", "d_in": D, "d_sae": 2 * D, "metadata": metadata, **config}
    (folder / "cfg.json").write_text(json.dumps(text))
    return folder


def read(folder: Path) -> Autoencoder:
    found = import_dictionary(folder).dictionary
    assert isinstance(found, Autoencoder)
    return found


def tokens() -> torch.Tensor:
    """With a mean over the width that differs from token to token."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(40, D, generator=g) + 5 * torch.randn(40, 1, generator=g)


CENTRED = {"center_writing_weights": True}


def test_the_mean_is_taken_and_given_back(tmp_path: Path) -> None:
    x, found = tokens(), read(put(tmp_path, CENTRED))
    assert found.wiring.centre and found.settings() == {"centre": True}
    torch.testing.assert_close(found.reconstruct(x), x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.encode(x), found.encode(x + 3), atol=1e-4, rtol=1e-4)
    plain = read(put(tmp_path / "plain", {"center_writing_weights": False}))
    assert not plain.wiring.centre and plain.identity.hash != found.identity.hash
    assert float((plain.reconstruct(x) - x).square().sum()) > float((x - x.mean(0)).square().sum()) / 10
    assert any("center_writing_weights" in note for note in found.details["notes"])


def test_it_comes_back_from_every_format_that_can_hold_it(tmp_path: Path) -> None:
    given = read(put(tmp_path / "given", CENTRED))
    for to in ("evalkit", "saelens"):
        back = import_dictionary(export_dictionary(given, tmp_path / to, to)).dictionary
        assert back.identity.hash == given.identity.hash
    with pytest.raises(DictionaryError, match="centre"):
        export_dictionary(given, tmp_path / "other", "dictionary_learning")
    inside = ReLU(weights(), Wiring(centre=True), hook_point="blocks.0.attn.hook_z", model="gpt2")
    with pytest.raises(DictionaryError, match="residual stream"):
        export_dictionary(inside, tmp_path / "z", "saelens")


def test_a_layer_norm_takes_the_mean_anyway() -> None:
    both = [ReLU(weights(), Wiring(normalise="layer_norm", centre=centre)) for centre in (True, False)]
    assert both[0].identity.hash == both[1].identity.hash
    torch.testing.assert_close(both[0].reconstruct(tokens()), both[1].reconstruct(tokens()))


@pytest.mark.parametrize("hook", ["blocks.2.attn.hook_z", "blocks.2.mlp.hook_post", "blocks.2.ln1.hook_normalized"])
def test_behind_a_norm_there_is_nothing_to_centre(hook: str, tmp_path: Path) -> None:
    assert not read(put(tmp_path, CENTRED, hook=hook)).wiring.centre


@pytest.mark.parametrize(
    "model", ["gemma-2b", "meta-llama/Llama-3.1-8B", "mistral-7b", "Qwen/Qwen2.5-7B", "microsoft/Phi-3-mini"]
)
def test_models_with_rms_norm_were_never_centred(model: str, tmp_path: Path) -> None:
    found = read(put(tmp_path, CENTRED, model=model))
    assert not found.wiring.centre and any(model in note for note in found.details["notes"])


@pytest.mark.parametrize(
    "model", ["gpt2-xl", "EleutherAI/pythia-70m-deduped", "facebook/opt-125m", "microsoft/phi-2", "bloom-560m"]
)
def test_models_with_layer_norm_were(model: str, tmp_path: Path) -> None:
    assert read(put(tmp_path, CENTRED, model=model)).wiring.centre


@pytest.mark.parametrize(
    ("kwargs", "hook", "words"),
    [
        ({"fold_ln": True}, "blocks.2.ln2.hook_normalized", "fold_ln"),
        ({"fold_value_biases": True}, "blocks.2.attn.hook_z", "fold_value_biases"),
        ({"refactor_factored_attn_matrices": True}, "blocks.2.attn.hook_q", "refactor_factored"),
        (CENTRED, "blocks.2.attn.hook_result", "not known"),
        (CENTRED, "", "not named"),
        ({"center_writing_weights": "yes"}, STREAM, "neither true nor false"),
        ("center_writing_weights", STREAM, "no object"),
    ],
)
def test_what_cannot_be_followed_is_refused(kwargs: Any, hook: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match=words) as caught:
        import_dictionary(put(tmp_path, kwargs, hook=hook))
    assert "cfg.json" in caught.value.where and caught.value.fix


@pytest.mark.parametrize("name", ["fold_ln", "fold_value_biases", "center_unembed", "refactor_factored_attn_matrices"])
def test_what_changes_nothing_in_the_stream_is_taken(name: str, tmp_path: Path) -> None:
    found = read(put(tmp_path, {name: True, "device": "cuda"}))
    assert not found.wiring.centre and "notes" not in found.details
    assert found.details["made_with"]["model_from_pretrained_kwargs"] == {name: True, "device": "cuda"}


def test_another_revision_and_unknown_arguments_are_told_of(tmp_path: Path) -> None:
    notes = read(put(tmp_path, {"checkpoint_value": 3000, "n_ctx": 64, "revision": "main"})).details["notes"]
    assert [note for note in notes if "checkpoint_value = 3000" in note] and [note for note in notes if "n_ctx = 64" in note]
    assert not [note for note in notes if "revision = main" in note]


def test_arguments_of_transformers_rewrite_nothing(tmp_path: Path) -> None:
    hf = {"model_class_name": "AutoModelForCausalLM"}
    assert not read(put(tmp_path, CENTRED, **hf)).wiring.centre


def test_an_older_config_that_leaves_it_open_says_so(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "sae_weights.safetensors")
    old = {"model_name": "gpt2-small", "hook_point": STREAM, "d_in": D, "d_sae": 2 * D}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    found = read(tmp_path)
    assert "does not say" in found.details["notes"][0] and found.details["made_with"]["prepend_bos"] is True


def test_which_hook_points_are_moved_by_centring_and_which_are_not(tmp_path: Path) -> None:
    """A GPT-2 and the same with everything that it writes centred by hand say the same; their hook points tell the rule."""
    import transformers
    from judge_fakes import tiny_model

    from evalkit.models.language_model import load_model

    tiny_model(tmp_path / "plain")
    vocabulary = json.loads((tmp_path / "plain" / "config.json").read_text())["vocab_size"]
    size = transformers.GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(size)
    head = model.lm_head.weight.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(head)  # what is read is not what is written
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    tiny_model(tmp_path / "centred")
    model.save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        written = [model.transformer.wte.weight, model.transformer.wpe.weight]
        for block in model.transformer.h:
            written += [p for layer in (block.attn.c_proj, block.mlp.c_proj) for p in (layer.weight, layer.bias)]
        for parameter in written:
            parameter -= parameter.mean(-1, keepdim=True)
    model.save_pretrained(tmp_path / "centred")
    plain, centred = (load_model(str(tmp_path / name)) for name in ("plain", "centred"))
    ids = torch.arange(20).reshape(2, 10)
    torch.testing.assert_close(plain.logits(ids), centred.logits(ids), atol=1e-3, rtol=1e-3)
    forms = [
        "hook_resid_pre",
        "hook_resid_mid",
        "hook_resid_post",
        "hook_attn_out",
        "hook_mlp_out",
        "attn.hook_z",
        "mlp.hook_post",
    ]
    for name in [f"blocks.1.{form}" for form in forms] + ["hook_embed", "hook_pos_embed"]:
        x, moved = plain.activations(ids, name), centred.activations(ids, name)
        follows = bool(model_kwargs.STREAM.fullmatch(name))
        assert follows != bool(model_kwargs.INSIDE.fullmatch(name))
        expected = x - x.mean(-1, keepdim=True) if follows else x
        torch.testing.assert_close(moved, expected, atol=1e-3, rtol=1e-3)
        assert not follows or float((x - moved).abs().max()) > 0.01
