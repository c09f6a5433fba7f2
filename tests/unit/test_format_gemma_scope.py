"""Gemma Scope, both releases: the function against a float64 one on the exact layout; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evalkit.dictionaries.formats.base import FORMATS, Place
from evalkit.errors import DictionaryError

GEMMA = FORMATS.get("gemma_scope")
CONFIG = {
    "hf_hook_point_in": "model.layers.7.output",
    "hf_hook_point_out": "model.layers.7.output",
    "width": 20,
    "model_name": "google/gemma-3-270m",
    "architecture": "jump_relu",
    "l0": 7,
    "affine_connection": False,
    "type": "sae",
}


def weights(width: int = 8, features: int = 20, capitals: bool = True) -> dict[str, torch.Tensor]:
    w = "W" if capitals else "w"
    return {
        f"{w}_enc": torch.randn(width, features),
        "b_enc": torch.randn(features) * 0.3,
        f"{w}_dec": torch.randn(features, width) * 3,
        "b_dec": torch.randn(width),
        "threshold": torch.rand(features) * 2,
    }


def reference(tensors: dict[str, torch.Tensor], x: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and x_hat in float64; ``scale`` divides the input and multiplies the output."""
    encoder, decoder = (tensors.get(f"W_{n}", tensors.get(f"w_{n}")).double() for n in ("enc", "dec"))  # type: ignore[union-attr]
    pre = (x.double() / scale) @ encoder + tensors["b_enc"].double()
    codes = torch.where(pre > tensors["threshold"].double(), pre, 0.0).clamp(min=0)
    return codes, (codes @ decoder + tensors["b_dec"].double()) * scale


def npz(tensors: dict[str, torch.Tensor], folder: Path) -> Place:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    return Place(folder)


def second(tensors: dict[str, torch.Tensor], folder: Path, **changes: Any) -> Place:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return Place(folder)


@pytest.mark.parametrize(("features", "capitals"), [(20, True), (20, False), (8, True)])
def test_the_first_release_is_a_jumprelu_that_does_not_subtract_b_dec(tmp_path: Path, features: int, capitals: bool) -> None:
    tensors = weights(features=features, capitals=capitals)
    place = npz(tensors, tmp_path)
    assert GEMMA.recognise(place)
    dictionary = GEMMA.read(place)
    x = torch.randn(40, 8)
    codes, x_hat = reference(tensors, x)
    assert dictionary.kind == "jumprelu"
    assert ((codes == 0) & (x.double() @ dictionary.W_enc.double() + tensors["b_enc"].double() > 0)).any()  # the jump takes part
    torch.testing.assert_close(dictionary.encode(x).double(), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.reconstruct(x).double(), x_hat, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("folders", "hook_point", "model"),
    [
        ("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", "blocks.12.hook_resid_post", "google/gemma-2-2b"),
        ("gemma-scope-9b-it-res/layer_9/width_16k/average_l0_14", "blocks.9.hook_resid_post", "google/gemma-2-9b-it"),
        ("models--google--gemma-scope-2b-pt-mlp/snapshots/a1/layer_0/width_65k/average_l0_8", "blocks.0.hook_mlp_out", ""),
        ("gemma-scope-27b-pt-att/layer_3/width_16k/average_l0_8", "blocks.3.attn.hook_z", "google/gemma-2-27b"),
        ("mine/layer_3/width_16k/average_l0_8", "", ""),
    ],
)
def test_the_path_of_the_first_release_tells_the_hook_point(tmp_path: Path, folders: str, hook_point: str, model: str) -> None:
    dictionary = GEMMA.read(npz(weights(), tmp_path / folders))
    assert dictionary.hook_point == hook_point
    assert model in dictionary.model
    assert dictionary.details["format"] == "gemma_scope" and dictionary.details["writer"]["folder_layer"]
    assert ("heads" in dictionary.details.get("reads", "")) is hook_point.endswith("hook_z")


def test_a_file_of_the_hub_cache_is_a_link_whose_own_folders_count(tmp_path: Path) -> None:
    place = npz(weights(), tmp_path / "blobs")
    folder = tmp_path / "models--google--gemma-scope-2b-pt-res" / "snapshots" / "a1" / "layer_12" / "width_16k" / "average_l0_82"
    folder.mkdir(parents=True)
    (folder / "params.npz").symlink_to(place.folder / "params.npz")
    dictionary = GEMMA.read(Place(folder))
    assert (dictionary.hook_point, dictionary.model) == ("blocks.12.hook_resid_post", "google/gemma-2-2b")


def test_embedding_autoencoders_fit_embeddings_that_the_model_has_scaled(tmp_path: Path) -> None:
    tensors = weights()
    dictionary = GEMMA.read(npz(tensors, tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"))
    x = torch.randn(40, 8) * 8**0.5
    codes, x_hat = reference(tensors, x, scale=8**0.5)
    assert dictionary.hook_point == "hook_embed"
    torch.testing.assert_close(dictionary.encode(x).double(), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.reconstruct(x).double(), x_hat, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dictionary.directions, tensors["W_dec"] * 8**0.5)


@pytest.mark.parametrize(
    ("read", "hook_point"),
    [
        ("model.layers.7.output", "blocks.7.hook_resid_post"),
        ("model.layers.11.self_attn.o_proj.input", "blocks.11.attn.hook_z"),
        ("model.layers.0.post_feedforward_layernorm.output", "blocks.0.hook_mlp_out"),
        ("model.somewhere.else", ""),
    ],
)
def test_the_second_release_is_read_with_its_config(tmp_path: Path, read: str, hook_point: str) -> None:
    tensors = weights(capitals=False)
    place = second(tensors, tmp_path, hf_hook_point_in=read, hf_hook_point_out=read)
    assert GEMMA.recognise(place)
    dictionary = GEMMA.read(place)
    x = torch.randn(40, 8)
    codes, x_hat = reference(tensors, x)
    torch.testing.assert_close(dictionary.encode(x).double(), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.reconstruct(x).double(), x_hat, rtol=1e-5, atol=1e-4)
    assert (dictionary.hook_point, dictionary.model) == (hook_point, "google/gemma-3-270m")
    assert dictionary.details["writer"]["l0"] == 7


def test_one_function_read_from_both_releases_has_one_identity(tmp_path: Path) -> None:
    tensors = weights()
    lower = {name.lower(): tensor for name, tensor in tensors.items()}
    first, other = GEMMA.read(npz(tensors, tmp_path / "a")), GEMMA.read(second(lower, tmp_path / "b"))
    assert first.identity.hash == other.identity.hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "top_k"}, "architecture = 'top_k'"),
        ({"hf_hook_point_out": "model.layers.8.output"}, "transcoder"),
        ({"type": "transcoder"}, "transcoder"),
        ({"affine_connection": True}, "affine"),
        ({"width": 21}, "width = 21"),
    ],
)
def test_configs_of_other_things_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DictionaryError, match=message) as caught:
        GEMMA.read(second(weights(capitals=False), tmp_path, **changes))
    assert caught.value.where and caught.value.fix


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("W_dec", torch.randn(20, 3, 8), "cross-layer"),
        ("b_dec", torch.randn(6), "transcoder"),
        ("W_enc", torch.randn(20, 8), "w_enc"),
        ("W_dec", torch.randn(8, 20), "w_dec"),
        ("threshold", torch.rand(19), "threshold"),
        ("threshold", -torch.rand(20), "below 0"),
        ("b_enc", torch.full((20,), float("inf")), "infinity"),
    ],
)
def test_weights_of_other_shapes_are_refused(tmp_path: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(DictionaryError, match=message):
        GEMMA.read(npz({**weights(), name: tensor}, tmp_path))


def test_transcoders_of_the_first_release_are_refused_by_their_repository(tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match="transcoder"):
        GEMMA.read(npz(weights(), tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_2" / "width_16k" / "average_l0_9"))


def test_affine_weights_and_a_missing_config_are_refused(tmp_path: Path) -> None:
    tensors = {**weights(capitals=False), "affine_skip_connection": torch.eye(8)}
    with pytest.raises(DictionaryError, match="affine"):
        GEMMA.read(second(tensors, tmp_path / "a"))
    place = second(weights(capitals=False), tmp_path / "b")
    (tmp_path / "b" / "config.json").unlink()
    with pytest.raises(DictionaryError, match=r"no config\.json"):
        GEMMA.read(place)


def test_an_npz_with_pickled_objects_is_not_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DictionaryError, match="cannot be read"):
        GEMMA.read(Place(tmp_path))
