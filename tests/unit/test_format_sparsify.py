"""sparsify and the BatchTopK repository: their files are read as the functions they are, and what is none of ours is refused.

The references below are the writers' formulas in float64, on weights with decoder norms away from 1 and every bias away from 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from evalkit.dictionaries.autoencoder import Autoencoder
from evalkit.dictionaries.formats.base import FORMATS, Place
from evalkit.dictionaries.formats.sparsify import hook_point
from evalkit.dictionaries.loading import import_dictionary
from evalkit.errors import DictionaryError

D, F, K = 10, 24, 5


def weights(d: int = D, f: int = F) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(11)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return {
        "W_enc": rand(d, f) / d**0.5,
        "b_enc": 0.3 * rand(f) - 0.4,
        "W_dec": rand(f, d) * (0.3 + torch.rand(f, 1, generator=g)),
        "b_dec": 0.5 * rand(d),
    }


def tokens(w: dict[str, torch.Tensor]) -> torch.Tensor:
    g = torch.Generator().manual_seed(12)
    x = torch.randn(16, len(w["b_dec"]), generator=g) * torch.logspace(0.5, -2, 16)[:, None]
    return x + w["b_dec"]


def top(post: torch.Tensor, k: int) -> torch.Tensor:
    kept = post.topk(k, dim=-1)
    return torch.zeros_like(post).scatter(-1, kept.indices, kept.values)


def agree(dictionary: Any, x: torch.Tensor, codes: torch.Tensor, x_hat: torch.Tensor) -> None:
    torch.testing.assert_close(dictionary.encode(x).double(), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.reconstruct(x).double(), x_hat, rtol=1e-5, atol=1e-5)


def read(folder: Path, name: str) -> Autoencoder:
    place = Place(folder)
    assert [n for n in FORMATS.names() if FORMATS.get(n).recognise(place)] == [name]
    dictionary = FORMATS.get(name).read(place)
    assert isinstance(dictionary, Autoencoder)
    return dictionary


# sparsify


def sparsify(folder: Path, w: dict[str, torch.Tensor], drop: str = "", **config: Any) -> Path:
    folder.mkdir(parents=True)
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    tensors |= {name: w[name] for name in w.keys() - weights().keys()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae.safetensors")
    d, f = w["W_enc"].shape
    full = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": f,
        "k": K,
        "d_in": d,
        **config,
    }
    (folder / "cfg.json").write_text(json.dumps({name: value for name, value in full.items() if name != drop}))
    return folder


@pytest.mark.parametrize("features", [F, D])
def test_sparsify_computes_topk_after_relu_of_the_centred_input(tmp_path: Path, features: int) -> None:
    w = weights(D, features)
    x, wide = tokens(w), {name: tensor.double() for name, tensor in w.items()}
    post = ((x.double() - wide["b_dec"]) @ wide["W_enc"] + wide["b_enc"]).relu()
    assert int((post > 0).sum(-1).min()) < K
    codes = top(post, K)
    agree(read(sparsify(tmp_path / "layers.8", w), "sparsify"), x, codes, codes @ wide["W_dec"] + wide["b_dec"])


@pytest.mark.parametrize("how", [{"quant_method": "own_bits"}, {"quantization_config": {"quant_method": "own_bits", "bits": 4}}])
def test_sparsify_quantised_weights_are_refused(tmp_path: Path, how: dict[str, Any]) -> None:
    with pytest.raises(DictionaryError, match="quantised by 'own_bits'"):
        import_dictionary(sparsify(tmp_path / "layers.8", weights(), **how))


def test_sparsify_settings_of_training_do_not_change_the_function(tmp_path: Path) -> None:
    plain = read(sparsify(tmp_path / "a", weights()), "sparsify")
    more = read(sparsify(tmp_path / "b", weights(), multi_topk=True, normalize_decoder=False, signed=False), "sparsify")
    assert plain.identity.hash == more.identity.hash


def test_sparsify_number_of_latents_may_stand_as_a_multiple_of_the_width(tmp_path: Path) -> None:
    w = weights(D, 3 * D)
    found = read(sparsify(tmp_path / "a", w, num_latents=0, expansion_factor=3), "sparsify")
    assert found.n_features == 3 * D
    with pytest.raises(DictionaryError, match=r"shape \(30, 10\), not \(40, 10\)"):
        read(sparsify(tmp_path / "b", w, num_latents=0, expansion_factor=4), "sparsify")
    with pytest.raises(DictionaryError, match="expansion_factor = None"):
        read(sparsify(tmp_path / "c", w, drop="expansion_factor", num_latents=0), "sparsify")


def test_sparsify_what_the_run_says_is_kept(tmp_path: Path) -> None:
    folder = sparsify(tmp_path / "run" / "layers.8.mlp" / "seed3", weights())
    (tmp_path / "run" / "config.json").write_text(json.dumps({"sae": {}, "model": "EleutherAI/pythia-160m", "dataset": "pile"}))
    found = read(folder, "sparsify")
    assert (found.hook_point, found.model) == ("blocks.8.hook_mlp_out", "EleutherAI/pythia-160m")
    assert found.details["format"] == "sparsify"
    assert found.details["writer"]["k"] == K
    assert found.details["writer"]["hookpoint"] == "layers.8.mlp"
    assert found.details["writer"]["dataset"] == "pile"
    (tmp_path / "run" / "config.json").write_text("{ damaged")
    assert read(folder / "sae.safetensors", "sparsify").model == ""


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("layers.8", "blocks.8.hook_resid_post"),
        ("h.11", "blocks.11.hook_resid_post"),
        ("gpt_neox.layers.3", "blocks.3.hook_resid_post"),
        ("layers.8.mlp", "blocks.8.hook_mlp_out"),
        ("h.0.attn", "blocks.0.hook_attn_out"),
        ("layers.2.self_attn", "blocks.2.hook_attn_out"),
        ("layers.2.attention", "blocks.2.hook_attn_out"),
        ("layers.2.mlp.act", ""),
        ("layers.2.input_layernorm", ""),
        ("layers.x", ""),
        ("my-sae", ""),
    ],
)
def test_sparsify_hook_points_are_known_for_blocks_and_their_parts(module: str, name: str) -> None:
    assert hook_point(module) == name


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"transcode": True}, "this is a transcoder: it writes to another place"),
        ({"skip_connection": True}, "skip connection"),
        ({"activation": "groupmax"}, "'groupmax'; evalkit has no such architecture"),
        ({"activation": "gelu"}, "'gelu'; evalkit has no such architecture"),
        ({"signed": True}, "codes are signed"),
        ({"drop": "k"}, "k = None, not a whole number"),
        ({"drop": "d_in"}, "d_in = None, not a whole number"),
        ({"d_in": D + 1}, r"not \(24, 11\) as the format lays it out"),
        ({"k": F + 1}, "not a number of active features"),
        ({"k": True}, "k = True"),
    ],
)
def test_sparsify_refuses_other_functions_and_contradictions(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(DictionaryError, match=words) as refusal:
        read(sparsify(tmp_path / "layers.8", weights(), **config), "sparsify")
    assert refusal.value.where and refusal.value.fix


def test_sparsify_refuses_a_skip_matrix_a_wrong_layout_nan_and_a_missing_config(tmp_path: Path) -> None:
    w = weights()
    with pytest.raises(DictionaryError, match="skip connection"):
        read(sparsify(tmp_path / "a", {**w, "W_skip": torch.zeros(D, D)}), "sparsify")
    with pytest.raises(DictionaryError, match=r"'W_dec' has shape \(10, 24\), not \(24, 10\)"):
        read(sparsify(tmp_path / "b", {**w, "W_dec": w["W_dec"].T}), "sparsify")
    with pytest.raises(DictionaryError, match="NaN"):
        read(sparsify(tmp_path / "c", {**w, "b_enc": w["b_enc"] / 0 * 0}), "sparsify")
    folder = sparsify(tmp_path / "d", w)
    (folder / "cfg.json").unlink()
    with pytest.raises(DictionaryError, match=r"no cfg\.json"):
        read(folder, "sparsify")


def test_sparsify_a_cut_file_says_so_and_is_not_claimed(tmp_path: Path) -> None:
    folder = sparsify(tmp_path / "a", weights())
    path = folder / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    assert not FORMATS.get("sparsify").recognise(Place(folder))
    with pytest.raises(DictionaryError, match="cannot be read"):
        FORMATS.get("sparsify").read(Place(folder))


# the BatchTopK repository


def repo(folder: Path, w: dict[str, torch.Tensor], drop: str = "", **config: Any) -> Path:
    folder.mkdir(parents=True)
    torch.save({name: tensor for name, tensor in w.items() if name != drop}, folder / "sae.pt")
    d, f = w["W_enc"].shape
    full = {
        "act_size": d,
        "dict_size": f,
        "top_k": K,
        "sae_type": "topk",
        "input_unit_norm": True,
        "dtype": "torch.float32",
        "model_name": "gpt2-small",
        "hook_point": "blocks.8.hook_resid_pre",
        **config,
    }
    (folder / "config.json").write_text(json.dumps({name: value for name, value in full.items() if name != drop}))
    return folder


def reference(w: dict[str, torch.Tensor], x: torch.Tensor, sae_type: str, unit_norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and reconstruction, by the repository's formulas."""
    w, x = {name: tensor.double() for name, tensor in w.items()}, x.double()
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    read = (x - mean) / (std + 1e-5) if unit_norm else x
    if sae_type == "jumprelu":
        post = (read @ w["W_enc"] + w["b_enc"]).relu()
        codes = post * (post > w["jumprelu.log_threshold"].exp())
    elif sae_type == "vanilla":
        codes = ((read - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    else:
        codes = top(((read - w["b_dec"]) @ w["W_enc"]).relu(), K)
    x_hat = codes @ w["W_dec"] + w["b_dec"]
    return codes, x_hat * std + mean if unit_norm else x_hat


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("features", [F, D])
@pytest.mark.parametrize(("sae_type", "kind"), [("vanilla", "relu"), ("topk", "topk"), ("jumprelu", "jumprelu")])
def test_repo_computes_what_its_forward_computes(
    tmp_path: Path, sae_type: str, kind: str, features: int, unit_norm: bool
) -> None:
    w = weights(D, features)
    x = tokens(w)
    if sae_type == "jumprelu":
        w["jumprelu.log_threshold"] = torch.linspace(-2, 0, features)
    found = read(repo(tmp_path / "a", w, sae_type=sae_type, input_unit_norm=unit_norm), "batchtopk_repo")
    assert found.kind == kind
    codes, x_hat = reference(w, x, sae_type, unit_norm)
    assert bool((codes > 0).any())
    agree(found, x, codes, x_hat)


def test_repo_topk_ignores_the_encoder_bias_that_lies_in_its_file(tmp_path: Path) -> None:
    w = weights()
    one = read(repo(tmp_path / "a", w), "batchtopk_repo")
    other = read(repo(tmp_path / "b", {**w, "b_enc": w["b_enc"] + 5}), "batchtopk_repo")
    assert one.identity.hash == other.identity.hash
    vanilla = [
        read(repo(tmp_path / n, v, sae_type="vanilla"), "batchtopk_repo")
        for n, v in (("c", w), ("d", {**w, "b_enc": w["b_enc"] + 5}))
    ]
    assert vanilla[0].identity.hash != vanilla[1].identity.hash


def test_repo_values_saved_as_strings_mean_what_they_were(tmp_path: Path) -> None:
    plain = read(repo(tmp_path / "a", weights(), input_unit_norm=False), "batchtopk_repo")
    strings = {"act_size": str(D), "dict_size": str(F), "top_k": str(K), "input_unit_norm": "False"}
    texts = read(repo(tmp_path / "b", weights(), **strings), "batchtopk_repo")
    assert texts.identity.hash == plain.identity.hash
    assert texts.details["writer"]["input_unit_norm"] is False
    normed = read(repo(tmp_path / "c", weights(), input_unit_norm="True"), "batchtopk_repo")
    assert normed.settings()["normalise"] == "layer_norm"


def test_repo_where_it_was_trained_is_kept(tmp_path: Path) -> None:
    found = read(repo(tmp_path / "a", weights()) / "sae.pt", "batchtopk_repo")
    assert (found.hook_point, found.model) == ("blocks.8.hook_resid_pre", "gpt2-small")
    assert found.details["format"] == "batchtopk_repo"
    assert found.details["writer"]["top_k"] == K


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"sae_type": "batchtopk"}, "no inference threshold"),
        ({"sae_type": "quantile"}, "no sae_type 'quantile'"),
        ({"sae_type": "jumprelu"}, r"lacks the tensor 'jumprelu\.log_threshold'"),
        ({"drop": "top_k"}, "top_k = None"),
        ({"act_size": D + 1}, r"not \(11, 24\) as the format lays it out"),
        ({"input_unit_norm": "maybe"}, "input_unit_norm = 'maybe', neither true nor false"),
        ({"tied_weights": True}, "tied_weights: an early version"),
        ({"activation": "abs", "use_encoder_bias": True}, "use_encoder_bias, activation: an early version"),
    ],
)
def test_repo_refuses_what_is_no_function_of_one_token_or_contradicts_itself(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    with pytest.raises(DictionaryError, match=words) as refusal:
        read(repo(tmp_path / "a", weights(), **config), "batchtopk_repo")
    assert refusal.value.where and refusal.value.fix


def test_repo_refuses_a_wrong_layout_and_nan_and_does_not_claim_strangers(tmp_path: Path) -> None:
    w = weights()
    with pytest.raises(DictionaryError, match=r"'W_enc' has shape \(24, 10\), not \(10, 24\)"):
        read(repo(tmp_path / "a", {**w, "W_enc": w["W_enc"].T}, act_size=D, dict_size=F), "batchtopk_repo")
    with pytest.raises(DictionaryError, match="NaN"):
        read(repo(tmp_path / "b", {**w, "W_dec": w["W_dec"] * float("nan")}), "batchtopk_repo")
    repository = FORMATS.get("batchtopk_repo")
    assert not repository.recognise(Place(repo(tmp_path / "c", w, drop="W_dec")))
    assert not repository.recognise(Place(repo(tmp_path / "d", w, drop="sae_type")))
    folder = repo(tmp_path / "e", w)
    (folder / "config.json").write_text("[]")
    assert not repository.recognise(Place(folder))
    (folder / "config.json").unlink()
    with pytest.raises(DictionaryError, match=r"no config\.json"):
        repository.read(Place(folder))
    (folder / "sae.pt").unlink()
    with pytest.raises(DictionaryError, match=r"no sae\.pt"):
        repository.read(Place(folder))
