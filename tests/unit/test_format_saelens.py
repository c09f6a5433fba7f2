"""SAELens files: every layout computes what SAELens computes, and what is written comes back to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evalkit.dictionaries.autoencoder import Autoencoder, Wiring
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.batchtopk import BatchTopK
from evalkit.dictionaries.formats.base import FORMATS, Place
from evalkit.dictionaries.gated import Gated
from evalkit.dictionaries.jumprelu import JumpReLU
from evalkit.dictionaries.matryoshka import Matryoshka
from evalkit.dictionaries.relu import ReLU
from evalkit.dictionaries.tied import Tied
from evalkit.dictionaries.topk import TopK
from evalkit.errors import DictionaryError

D, F = 6, 10
HOOK = "blocks.3.hook_resid_post"
Weights = dict[str, torch.Tensor]


def weights(d: int = D, f: int = F, seed: int = 0, **more: torch.Tensor) -> Weights:
    """Decoder norms away from 1, biases away from 0, so that no part of the function can be left out unnoticed."""
    g = torch.Generator().manual_seed(seed)
    stretch = torch.linspace(0.3, 2.5, f)[:, None]
    return {
        "W_enc": torch.randn(d, f, generator=g),
        "b_enc": torch.randn(f, generator=g),
        "W_dec": torch.randn(f, d, generator=g) * stretch,
        "b_dec": torch.randn(d, generator=g) + 1.0,
        **more,
    }


def gated() -> Weights:
    g = torch.Generator().manual_seed(5)
    return {
        **{name: tensor for name, tensor in weights().items() if name != "b_enc"},
        **{name: torch.randn(F, generator=g) for name in ("b_gate", "b_mag", "r_mag")},
    }


def threshold() -> torch.Tensor:
    return torch.linspace(0.1, 2.0, F)


def tracked(value: float) -> Weights:
    """As a batchtopk checkpoint: one threshold, in float64."""
    return weights(topk_threshold=torch.tensor(value, dtype=torch.float64))


def put(folder: Path, tensors: Weights, **config: Any) -> Place:
    metadata = {"sae_lens_version": "6.54.0", "model_name": "pythia-70m-deduped", "hook_name": HOOK}
    config = {
        "d_in": tensors["W_enc"].shape[0],
        "d_sae": tensors["W_enc"].shape[1],
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **config,
    }
    config["metadata"] = {**metadata, **config.get("metadata", {})}
    return put_raw(folder, tensors, config)


def put_raw(folder: Path, tensors: Weights, config: dict[str, Any]) -> Place:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return Place(folder)


def read(place: Place) -> Autoencoder:
    saelens = FORMATS.get("saelens")
    assert saelens.recognise(place)
    found = saelens.read(place)
    assert isinstance(found, Autoencoder)
    return found


def inputs(d: int = D) -> torch.Tensor:
    return torch.randn(50, d, generator=torch.Generator().manual_seed(9)) * 2 + 0.5


def keep(codes: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row, by sorting; then ReLU."""
    least = codes.sort(dim=-1, descending=True).values[..., k - 1 : k]
    return codes.clamp(min=0) * (codes >= least)


def function(
    t: Weights, x: torch.Tensor, activate: Any, subtract: bool = True, rescale: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and x_hat in float64 by the formulas, without evalkit."""
    w = {name: tensor.double() for name, tensor in t.items()}
    pre = (x.double() - subtract * w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    norms = w["W_dec"].pow(2).sum(1).sqrt() if rescale else torch.ones(len(w["W_dec"]), dtype=torch.float64)
    codes = activate(pre * norms)
    return codes, (codes / norms) @ w["W_dec"] + w["b_dec"]


def same(dictionary: Dictionary, x: torch.Tensor, codes: torch.Tensor, x_hat: torch.Tensor) -> None:
    torch.testing.assert_close(dictionary.encode(x).double(), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dictionary.reconstruct(x).double(), x_hat, atol=1e-5, rtol=1e-5)


def relu(pre: torch.Tensor) -> torch.Tensor:
    return pre.clamp(min=0)


def jump(at: torch.Tensor) -> Any:
    return lambda pre: pre.clamp(min=0) * (pre > at.double())


@pytest.mark.parametrize("subtract", [True, False])
def test_standard(subtract: bool, tmp_path: Path) -> None:
    found = read(put(tmp_path, weights(), architecture="standard", apply_b_dec_to_input=subtract))
    assert isinstance(found, ReLU) and found.hook_point == HOOK and found.model == "pythia-70m-deduped"
    assert found.details["format"] == "saelens" and found.details["writer"]["sae_lens_version"] == "6.54.0"
    same(found, inputs(), *function(weights(), inputs(), relu, subtract))


@pytest.mark.parametrize("rescale", [True, False])
def test_topk_also_where_fewer_than_k_are_positive(rescale: bool, tmp_path: Path) -> None:
    tensors = {**weights(), "b_enc": weights()["b_enc"] - 4.0}
    found = read(put(tmp_path, tensors, architecture="topk", k=4, rescale_acts_by_decoder_norm=rescale))
    expected = function(tensors, inputs(), lambda pre: keep(pre, 4), rescale=rescale)
    active = (expected[0] > 0).sum(-1)
    assert isinstance(found, TopK) and found.k == 4 and active.max() == 4 and active.min() < 4
    same(found, inputs(), *expected)


def test_jumprelu_by_threshold_and_by_its_logarithm(tmp_path: Path) -> None:
    plain = read(put(tmp_path / "a", {**weights(), "threshold": threshold()}, architecture="jumprelu"))
    old = read(put(tmp_path / "b", {**weights(), "log_threshold": threshold().log()}, architecture="jumprelu"))
    for found in (plain, old):
        assert type(found) is JumpReLU
        same(found, inputs(), *function(weights(), inputs(), jump(threshold())))


@pytest.mark.parametrize("rescale", [True, False])
def test_batchtopk_checkpoint(rescale: bool, tmp_path: Path) -> None:
    place = put(tmp_path, tracked(0.7), architecture="batchtopk", k=3.5, rescale_acts_by_decoder_norm=rescale)
    found = read(place)
    assert type(found) is BatchTopK and found.details["writer"]["k"] == 3.5
    same(found, inputs(), *function(weights(), inputs(), jump(torch.tensor(0.7)), rescale=rescale))


@pytest.mark.parametrize("widths", [[2, 5, F], [2, 5]])
def test_matryoshka_checkpoint_and_export_have_groups_and_one_identity_with_batchtopk(widths: list[int], tmp_path: Path) -> None:
    checkpoint = read(put(tmp_path / "a", tracked(0.7), architecture="matryoshka_batchtopk", matryoshka_widths=widths))
    said: dict[str, Any] = {
        "training_architecture": "matryoshka_batchtopk",
        "training_architecture_details": {"matryoshka_widths": widths},
    }
    exported = weights(threshold=torch.full((F,), 0.7))
    export = read(put(tmp_path / "b", exported, architecture="jumprelu", metadata=said))
    for found in (checkpoint, export):
        assert isinstance(found, Matryoshka) and found.groups == [2, 3, 5]
        same(found, inputs(), *function(weights(), inputs(), jump(torch.tensor(0.7))))
    said.pop("training_architecture_details")
    bare = read(put(tmp_path / "c", exported, architecture="jumprelu", metadata=said))
    batch = read(put(tmp_path / "d", exported, architecture="jumprelu", metadata={"training_architecture": "batchtopk"}))
    as_is = read(put(tmp_path / "e", exported, architecture="jumprelu"))
    assert type(bare) is type(batch) is BatchTopK and type(as_is) is JumpReLU
    assert len({found.identity.hash for found in (checkpoint, export, bare, batch, as_is)}) == 1


def test_thresholds_that_differ_stay_a_jumprelu_whatever_the_training_was_called(tmp_path: Path) -> None:
    tensors = weights(threshold=threshold())
    place = put(tmp_path, tensors, architecture="jumprelu", metadata={"training_architecture": "batchtopk"})
    assert type(read(place)) is JumpReLU


def test_gated(tmp_path: Path) -> None:
    found = read(put(tmp_path, gated(), architecture="gated"))
    w = {name: tensor.double() for name, tensor in gated().items()}
    inner = (inputs().double() - w["b_dec"]) @ w["W_enc"]
    codes = relu(inner * w["r_mag"].exp() + w["b_mag"]) * (inner + w["b_gate"] > 0)
    assert isinstance(found, Gated)
    same(found, inputs(), codes, codes @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("how", ["expected_average_only_in", "constant_norm_rescale", "layer_norm"])
def test_normalisation(how: str, subtract: bool, tmp_path: Path) -> None:
    place = put(tmp_path, weights(), architecture="standard", normalize_activations=how, apply_b_dec_to_input=subtract)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.37}')
    x = inputs().double()
    if how == "layer_norm":
        mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        z, back = (x - mean) / (deviation + 1e-5), lambda out: out * deviation + mean
    else:
        factor = 0.37 if how == "expected_average_only_in" else D**0.5 / x.pow(2).sum(-1, keepdim=True).sqrt()
        z, back = x * factor, lambda out: out / factor
    codes, out = function(weights(), z, relu, subtract)
    same(read(place), inputs(), codes, back(out))


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "gated", "standard"])
@pytest.mark.parametrize("subtract", [True, False])
def test_whitening_is_folded_exactly(architecture: str, subtract: bool, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(3)
    M, mean = torch.randn(D, D, generator=g, dtype=torch.float64) + 2 * torch.eye(D), torch.randn(D, generator=g).double()
    tensors = {"gated": gated(), "batchtopk": tracked(0.7)}.get(architecture, weights())
    rescale = architecture in ("topk", "batchtopk")
    place = put(
        tmp_path,
        tensors,
        architecture=architecture,
        normalize_activations="covariance_whitening",
        apply_b_dec_to_input=subtract,
        rescale_acts_by_decoder_norm=rescale,
        k=3,
    )
    with pytest.raises(DictionaryError, match="activation_whitening.safetensors, is missing"):
        read(place)
    file = tmp_path / "activation_whitening.safetensors"
    save_file({"mean": mean, "matrix": M, "inverse_matrix": M.inverse().contiguous()}, file)
    z = (inputs().double() - mean) @ M
    if architecture == "gated":
        w = {name: tensor.double() for name, tensor in tensors.items()}
        inner = (z - subtract * w["b_dec"]) @ w["W_enc"]
        codes = relu(inner * w["r_mag"].exp() + w["b_mag"]) * (inner + w["b_gate"] > 0)
        out = codes @ w["W_dec"] + w["b_dec"]
    else:
        activate = {"topk": lambda pre: keep(pre, 3), "batchtopk": jump(torch.tensor(0.7)), "standard": relu}[architecture]
        codes, out = function(tensors, z, activate, subtract, rescale)
    found, x_hat = read(Place(tmp_path)), out @ M.inverse() + mean
    torch.testing.assert_close(found.encode(inputs()).double(), codes, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(found.reconstruct(inputs()).double(), x_hat, atol=5e-5, rtol=1e-4)
    save_file({"mean": mean, "matrix": M, "inverse_matrix": M.clone()}, file)
    with pytest.raises(DictionaryError, match="not the inverse"):
        read(Place(tmp_path))


def test_a_missing_factor_is_refused_and_named(tmp_path: Path) -> None:
    place = put(tmp_path, weights(), architecture="standard", normalize_activations="expected_average_only_in")
    with pytest.raises(DictionaryError, match="is missing") as caught:
        read(place)
    assert caught.value.where.endswith("activation_scaler.json")
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": null}')
    with pytest.raises(DictionaryError, match="has none"):
        read(Place(tmp_path))


OLD = {
    "hook_point": "blocks.{layer}.hook_resid_pre",
    "hook_point_layer": 7,
    "model_name": "gpt2-small",
    "d_in": D,
    "d_sae": F,
    "dtype": "torch.float32",
}


def test_old_configs(tmp_path: Path) -> None:
    found = read(put_raw(tmp_path / "a", weights(scaling_factor=torch.ones(F)), OLD))
    assert isinstance(found, ReLU) and found.wiring == Wiring()
    assert found.hook_point == "blocks.7.hook_resid_pre" and found.model == "gpt2-small"
    same(found, inputs(), *function(weights(), inputs(), relu))
    kwargs = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "architecture": "standard"}
    topk = read(put_raw(tmp_path / "b", weights(), {**OLD, **kwargs, "normalize_activations": False}))
    assert isinstance(topk, TopK)
    same(topk, inputs(), *function(weights(), inputs(), lambda pre: keep(pre, 4)))
    place = put_raw(tmp_path / "c", weights(), {**OLD, "normalize_activations": True})
    (tmp_path / "c" / "activation_scaler.json").write_text('{"scaling_factor": 0.5}')
    assert read(place).wiring == Wiring(normalise="constant", scale=0.5)
    heads = read(put_raw(tmp_path / "d", weights(), {**OLD, "hook_point": "blocks.2.attn.hook_z"}))
    assert "flattened" in heads.details["reads"] and heads.hook_point == "blocks.2.attn.hook_z"


def test_old_finetuning_factors_multiply_codes_before_decoding(tmp_path: Path) -> None:
    factor = torch.linspace(0.5, 3.0, F)
    found = read(put_raw(tmp_path, weights(scaling_factor=factor), {**OLD, "finetuning_scaling_factor": True}))
    codes, _ = function(weights(), inputs(), relu)
    w = weights()
    same(found, inputs(), codes, (codes * factor.double()) @ w["W_dec"].double() + w["b_dec"].double())
    with pytest.raises(DictionaryError, match="which function was meant"):
        read(put_raw(tmp_path, weights(scaling_factor=factor), OLD))


def test_a_square_sae_is_read_in_the_declared_layout(tmp_path: Path) -> None:
    square = weights(8, 8)
    same(read(put(tmp_path, square, architecture="standard")), inputs(8), *function(square, inputs(8), relu))


BAD: dict[str, tuple[Weights, dict[str, Any], str]] = {
    "a transposed encoder": ({**weights(), "W_enc": weights()["W_enc"].T.contiguous()}, {"d_in": D, "d_sae": F}, "W_enc.*shape"),
    "a transposed decoder": ({**weights(), "W_dec": weights()["W_dec"].T.contiguous()}, {}, "W_dec.*shape"),
    "another width in the config": (weights(), {"d_in": D + 1}, "shape"),
    "no d_sae": (weights(), {"d_sae": None}, "d_sae = None"),
    "no k": (weights(), {"architecture": "topk"}, "does not say k"),
    "an impossible k": (weights(), {"architecture": "topk", "k": F + 1}, "k = 11"),
    "a threshold never tracked": (tracked(0.0), {"architecture": "batchtopk"}, "never tracked"),
    "a negative threshold": (tracked(-1.0), {"architecture": "batchtopk"}, "never tracked"),
    "no threshold": (weights(), {"architecture": "jumprelu"}, "lacks the tensor 'threshold'"),
    "NaN": ({**weights(), "b_enc": torch.full((F,), float("nan"))}, {}, "NaN"),
    "a tensor of another architecture": (weights(threshold=threshold()), {}, "has no tensor threshold"),
    "a skip connection": (weights(W_skip=torch.ones(D, D)), {}, "transcoder"),
    "a transcoder": (weights(), {"architecture": "jumprelu_transcoder", "d_out": D}, "transcoder"),
    "another output": (weights(), {"metadata": {"hook_name_out": "blocks.3.hook_mlp_out"}}, "transcoder"),
    "abstopk": (weights(), {"architecture": "abstopk"}, "no architecture 'abstopk'"),
    "tanh-relu": (weights(), {"activation_fn": "tanh-relu"}, "tanh-relu"),
    "an unknown normalisation": (weights(), {"normalize_activations": "magic"}, "magic"),
    "a normalisation of another type": (weights(), {"normalize_activations": ["layer_norm"]}, "is not known"),
    "widths that fall": (tracked(0.5), {"architecture": "matryoshka_batchtopk", "matryoshka_widths": [5, 2]}, "do not rise"),
}


@pytest.mark.parametrize("what", BAD)
def test_refusals_say_where_and_what_to_do(what: str, tmp_path: Path) -> None:
    tensors, config, message = BAD[what]
    place = put(tmp_path, tensors, **{"d_in": D, "d_sae": F, "architecture": "standard", **config})
    with pytest.raises(DictionaryError, match=message) as caught:
        FORMATS.get("saelens").read(place)
    assert str(tmp_path) in caught.value.where and caught.value.fix


def test_only_its_own_files_are_recognised(tmp_path: Path) -> None:
    saelens = FORMATS.get("saelens")
    put(tmp_path / "a", weights(), architecture="standard")
    assert all(saelens.recognise(Place(tmp_path / "a" / file)) for file in ("", "sae_weights.safetensors", "cfg.json"))
    (tmp_path / "a" / "other.safetensors").write_bytes(b"")
    assert not saelens.recognise(Place(tmp_path / "a" / "other.safetensors"))
    assert not saelens.recognise(put_raw(tmp_path / "b", {"W_E": torch.ones(2, 3), "W_D": torch.ones(3, 2)}, {}))
    with pytest.raises(DictionaryError, match="cfg.json is missing or empty"):
        saelens.read(Place(tmp_path / "b"))


WHERE: dict[str, Any] = {"hook_point": HOOK, "model": "toy"}
WRITTEN: dict[str, Autoencoder] = {
    "relu": ReLU(weights(), **WHERE),
    "relu-layer-norm": ReLU(weights(), Wiring(subtract_b_dec=False, normalise="layer_norm"), **WHERE),
    "relu-token-norm": ReLU(weights(8, 8), Wiring(normalise="token_norm"), **WHERE),
    "topk": TopK(weights(), 4, **WHERE),
    "topk-rescaled": TopK(weights(), 4, Wiring(decoder_norm="codes"), **WHERE),
    "batchtopk": BatchTopK(weights(threshold=torch.tensor(0.7)), **WHERE),
    "batchtopk-rescaled": BatchTopK(
        weights(threshold=torch.tensor(0.7)), Wiring(decoder_norm="codes"), details={"trained": {"k": 3}}, **WHERE
    ),
    "matryoshka": Matryoshka(weights(threshold=torch.tensor(0.7)), [2, 3, 5], **WHERE),
    "matryoshka-rescaled": Matryoshka(
        weights(threshold=torch.tensor(0.7)), [2, 3, 5], Wiring(decoder_norm="codes"), details={"k": 3}, **WHERE
    ),
    "jumprelu": JumpReLU(weights(threshold=threshold()), Wiring(subtract_b_dec=False), **WHERE),
    "jumprelu-constant": JumpReLU(weights(threshold=torch.full((F,), 0.5)), **WHERE),
    "gated": Gated(gated(), **WHERE),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    ours = WRITTEN[name]
    FORMATS.get("saelens").write(ours, tmp_path)
    back = read(Place(tmp_path))
    assert type(back) is type(ours) and back.identity == ours.identity and back.settings() == ours.settings()
    assert all(torch.equal(tensor, back.tensors()[key]) for key, tensor in ours.tensors().items())
    x = inputs(ours.d_in)
    assert torch.equal(back.encode(x), ours.encode(x)) and torch.equal(back.reconstruct(x), ours.reconstruct(x))
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == HOOK and int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    (tmp_path / "again").mkdir()
    FORMATS.get("saelens").write(back, tmp_path / "again")
    assert read(Place(tmp_path / "again")).identity == ours.identity


def test_batchtopk_is_written_as_saelens_exports_it(tmp_path: Path) -> None:
    FORMATS.get("saelens").write(WRITTEN["batchtopk"], tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu" and config["metadata"]["training_architecture"] == "batchtopk"
    assert torch.equal(load_file(tmp_path / "sae_weights.safetensors")["threshold"], torch.full((F,), 0.7))


REFUSED: dict[str, tuple[Dictionary, str]] = {
    "constant": (ReLU(weights(), Wiring(normalise="constant", scale=0.5)), "does not apply a constant input scale"),
    "select": (TopK(weights(), 4, Wiring(decoder_norm="select")), "decoder_norm = 'select'"),
    "relu-codes": (ReLU(weights(), Wiring(decoder_norm="codes")), "decoder_norm = 'codes'"),
    "k unknown": (BatchTopK(weights(threshold=torch.tensor(0.7)), Wiring(decoder_norm="codes")), "does not know the k"),
    "tied": (Tied(torch.eye(4), torch.zeros(4)), "kind 'tied'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_saelens_cannot_compute_is_not_written(name: str, tmp_path: Path) -> None:
    ours, message = REFUSED[name]
    with pytest.raises(DictionaryError, match=message) as caught:
        FORMATS.get("saelens").write(ours, tmp_path)
    assert caught.value.fix and not list(tmp_path.iterdir())
