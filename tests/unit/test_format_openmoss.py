"""OpenMOSS's files: the function against a float64 one in the writer's order of steps, on the exact layouts; and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from evalkit.dictionaries.formats.base import FORMATS, Place
from evalkit.errors import DictionaryError

OPENMOSS = FORMATS.get("openmoss")
HOOK = "blocks.4.hook_resid_post"
NORM = "dataset_average_activation_norm"
CONFIG: dict[str, Any] = {
    "sae_type": "sae",
    "d_model": 8,
    "expansion_factor": 2.5,
    "use_decoder_bias": True,
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "top_k": 5,
    "use_glu_encoder": False,
    "hook_point_in": HOOK,
    "hook_point_out": HOOK,
}


def weights(features: int = 20, width: int = 8, linear: bool = False) -> dict[str, torch.Tensor]:
    """A state_dict: the library's names, or those of Llama Scope (``linear``), which are transposed."""
    encoder, decoder = torch.randn(width, features), torch.randn(features, width) * 1.5
    matrices = (
        {"encoder.weight": encoder.T, "encoder.bias": torch.randn(features) * 0.3, "decoder.weight": decoder.T}
        if linear
        else {"W_E": encoder, "b_E": torch.randn(features) * 0.3, "W_D": decoder}
    )
    name = "decoder.bias" if linear else "b_D"
    return {n: t.contiguous() for n, t in {**matrices, name: torch.randn(width)}.items()}


def reference(
    tensors: dict[str, torch.Tensor], x: torch.Tensor, factor: float | torch.Tensor, activate: Any, by_norm: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and x_hat in float64; ``activate`` is given the gated pre-activations."""
    if "W_E" in tensors:
        encoder, bias, decoder, out = (tensors[name].double() for name in ("W_E", "b_E", "W_D", "b_D"))
    else:
        encoder, decoder = tensors["encoder.weight"].double().T, tensors["decoder.weight"].double().T
        bias, out = tensors["encoder.bias"].double(), tensors["decoder.bias"].double()
    lengths = decoder.pow(2).sum(1).sqrt() if by_norm else torch.ones(len(decoder), dtype=torch.float64)
    pre = (x.double() * factor) @ encoder + bias
    codes = activate(pre * lengths) / lengths
    return codes, (codes @ decoder + out) / factor


def folder(path: Path, tensors: dict[str, Any], name: str = "sae_weights.safetensors", **changes: Any) -> Place:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).parent.mkdir(exist_ok=True)
    save_file(tensors, path / name)
    made = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
    (path / ("hyperparams.json" if name.startswith("checkpoints") else "config.json")).write_text(json.dumps(made))
    return Place(path)


def same(place: Place, expected: Any, x: torch.Tensor, kind: str) -> None:
    assert OPENMOSS.recognise(place)
    dictionary = OPENMOSS.read(place)
    codes, x_hat = expected
    assert dictionary.kind == kind and dictionary.hook_point == HOOK
    assert 0 < (codes > 0).double().mean() < 0.9
    torch.testing.assert_close(dictionary.encode(x).double(), codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dictionary.reconstruct(x).double(), x_hat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("features", [20, 8])
def test_jumprelu_is_gated_by_decoder_norm_in_normalised_units(tmp_path: Path, by_norm: bool, features: int) -> None:
    log_threshold = torch.randn(features) * 0.3 + 0.8
    tensors = {**weights(features), f"{NORM}.{HOOK}": torch.tensor(11.0)}
    tensors["activation_function.log_jumprelu_threshold"] = log_threshold
    place = folder(tmp_path, tensors, sparsity_include_decoder_norm=by_norm, expansion_factor=features / 8)
    x = torch.randn(40, 8) * 4
    limit = log_threshold.double().exp()
    expected = reference(tensors, x, math.sqrt(8) / 11, lambda pre: torch.where(pre > limit, pre, 0.0), by_norm)
    same(place, expected, x, "jumprelu")


def test_topk_chooses_by_decoder_norm(tmp_path: Path) -> None:
    tensors = {**weights(), f"{NORM}.{HOOK}": torch.tensor(5.0)}
    tensors["b_E"] -= 2.5  # fewer positive pre-activations than k on some tokens

    def activate(pre: torch.Tensor) -> torch.Tensor:
        keep = pre.topk(5).indices
        return torch.zeros_like(pre).scatter(-1, keep, pre.gather(-1, keep)).clamp(min=0)

    x = torch.randn(40, 8) * 2
    expected = reference(tensors, x, math.sqrt(8) / 5, activate)
    assert (expected[0] > 0).sum(-1).min() < 5
    same(folder(tmp_path, tensors, act_fn="topk"), expected, x, "topk")


def test_relu_token_wise_and_inference(tmp_path: Path) -> None:
    tensors, x = weights(), torch.randn(40, 8) * 4
    relu = lambda pre: pre.clamp(min=0)  # noqa: E731
    by_token = math.sqrt(8) / x.double().norm(dim=-1, keepdim=True)
    place = folder(tmp_path / "a", tensors, act_fn="relu", norm_activation="token-wise")
    same(place, reference(tensors, x, by_token, relu), x, "relu")
    place = folder(tmp_path / "b", tensors, act_fn="relu", norm_activation="inference")
    same(place, reference(tensors, x, 1.0, relu), x, "relu")


def test_a_missing_decoder_bias_is_none_where_the_config_says_so(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["b_D"]
    place = folder(tmp_path, tensors, act_fn="relu", norm_activation="inference", use_decoder_bias=False)
    assert OPENMOSS.read(place).tensors()["b_dec"].abs().max() == 0
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "act_fn": "relu", "norm_activation": "inference"}))
    with pytest.raises(DictionaryError, match="b_D"):
        OPENMOSS.read(Place(tmp_path))


@pytest.mark.parametrize("subtract", [True, False])
def test_llama_scope_v1_has_one_threshold_in_units_of_x(tmp_path: Path, subtract: bool) -> None:
    tensors = weights(linear=True)
    config = {
        "sae_type": ...,
        "expansion_factor": ...,
        "d_sae": 20,
        "jump_relu_threshold": 1.5,
        NORM: {"in": 7.0, "out": 7.0},
        "apply_decoder_bias_to_pre_encoder": subtract,
    }
    place = folder(tmp_path, tensors, "checkpoints/final.safetensors", **config)
    (tmp_path / "lm_config.json").write_text(json.dumps({"model_name": "meta-llama/Llama-3.1-8B"}))
    # in units of x: the writer's folding divides b_E by the factor, multiplies nothing else, and compares with the threshold
    factor = math.sqrt(8) / 7
    x = torch.randn(40, 8) * 3
    moved = x - tensors["decoder.bias"] / factor if subtract else x
    encoder, decoder = tensors["encoder.weight"].double().T, tensors["decoder.weight"].double().T
    pre = moved.double() @ encoder + tensors["encoder.bias"].double() / factor
    lengths = decoder.norm(dim=1)
    raw = torch.where(pre * lengths > 1.5, pre, 0.0)
    expected = raw * factor, raw @ decoder + tensors["decoder.bias"].double() / factor
    same(place, expected, x, "jumprelu")
    assert OPENMOSS.read(place).model == "meta-llama/Llama-3.1-8B"
    by_file = OPENMOSS.read(Place(tmp_path / "checkpoints" / "final.safetensors"))
    assert by_file.identity.hash == OPENMOSS.read(Place(tmp_path / "checkpoints")).identity.hash


def test_r1_distill_has_the_linear_names_and_a_log_threshold(tmp_path: Path) -> None:
    tensors = {**weights(linear=True), "log_jumprelu_threshold": torch.full((20,), 0.4), f"{NORM}.in": torch.tensor(9.0)}
    x, limit = torch.randn(40, 8) * 4, math.exp(float(torch.tensor(0.4)))
    expected = reference(tensors, x, math.sqrt(8) / 9, lambda pre: torch.where(pre > limit, pre, 0.0))
    same(folder(tmp_path, tensors), expected, x, "jumprelu")


def test_pt_checkpoints_keep_the_weights_under_sae(tmp_path: Path) -> None:
    tensors = weights()
    config = {**CONFIG, "act_fn": "relu", "norm_activation": "inference"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"sae": tensors, "version": "1.0"}, tmp_path / "sae_weights.pt")
    x = torch.randn(40, 8)
    same(Place(tmp_path), reference(tensors, x, 1.0, lambda pre: pre.clamp(min=0)), x, "relu")


def test_files_of_saelens_are_left_to_it(tmp_path: Path) -> None:
    place = folder(tmp_path, weights(), act_fn="relu")
    (tmp_path / "cfg.json").write_text("{}")
    assert not OPENMOSS.recognise(place)
    (tmp_path / "cfg.json").unlink()
    assert OPENMOSS.recognise(place)
    (tmp_path / "config.json").write_text("no json")
    assert not OPENMOSS.recognise(Place(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "relu"}, "mean norm.*absent"),
        ({"act_fn": "relu", NORM: {"in": 0.0, "out": 0.0}}, "mean norm.*0.0"),
        ({"act_fn": "relu", NORM: {"in": 3.0, "out": 4.0}}, "differ"),
        ({"norm_activation": "inference"}, "hold its threshold"),
        ({"norm_activation": "inference", "act_fn": "batchtopk"}, "depends on its batch"),
        ({"norm_activation": "inference", "act_fn": "gelu"}, "act_fn = 'gelu'"),
        ({"norm_activation": "inference", "act_fn": "topk", "top_k": ...}, "top_k = None"),
        ({"norm_activation": "batch-wise", "act_fn": "relu"}, "batch-wise"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"sae_type": "clt"}, "'clt'"),
        ({"hook_point_out": "blocks.4.hook_mlp_out"}, "transcoder"),
        ({"norm_activation": "inference", "act_fn": "relu", "expansion_factor": 3}, "W_E"),
        ({"norm_activation": "inference", "act_fn": "relu", "expansion_factor": None}, "expansion_factor = None"),
        ({"norm_activation": "inference", "act_fn": "relu", "d_model": 9}, "W_E"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DictionaryError, match=message) as caught:
        OPENMOSS.read(folder(tmp_path, weights(), **changes))
    assert caught.value.where and caught.value.fix
