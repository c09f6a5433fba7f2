"""OpenAI's files: the function against a float64 one written from the paper, on the exact layout; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats.base import FORMATS, Place
from evalkit.errors import DictionaryError

OPENAI = FORMATS.get("openai")


def state(width: int = 8, features: int = 20, **changes: Any) -> dict[str, Any]:
    """A state_dict as the writer lays it out: decoder norms away from 1, a pre_bias that matters."""
    made = {
        "pre_bias": torch.randn(width) * 0.7,
        "latent_bias": torch.randn(features) * 0.3,
        "stats_last_nonzero": torch.zeros(features, dtype=torch.long),
        "latents_activation_frequency": torch.ones(features),
        "latents_mean_square": torch.zeros(features),
        "encoder.weight": torch.randn(features, width),
        "decoder.weight": torch.randn(width, features) * 3,
        "activation": "TopK",
        "activation_state_dict": {"k": 5, "postact_fn": "ReLU"},
    }
    made.update(changes)
    return {name: value for name, value in made.items() if value is not None}


def reference(weights: dict[str, Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and x_hat in float64, token by token."""
    names = ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight")
    pre_bias, latent_bias, encoder, decoder = (weights[name].double() for name in names)
    codes, written = [], []
    for token in x.double():
        mean, deviation = token.mean(), token.std(unbiased=True)
        normed = weights["activation"] == "TopK"
        read = (token - mean) / (deviation + 1e-5) if normed else token
        pre = encoder @ (read - pre_bias) + latent_bias
        code = pre.clamp(min=0)
        if normed:
            keep = pre.sort(descending=True).indices[: weights["activation_state_dict"]["k"]]
            code = torch.zeros_like(code).index_copy(0, keep, code[keep])
        out = decoder @ code + pre_bias
        codes.append(code)
        written.append(out * deviation + mean if normed else out)
    return torch.stack(codes), torch.stack(written)


def saved(weights: dict[str, Any], path: Path) -> Place:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)
    return Place(path)


def same(dictionary: Dictionary, weights: dict[str, Any], width: int) -> None:
    x = torch.randn(16, width) * 4 + 1.5
    codes, x_hat = reference(weights, x)
    torch.testing.assert_close(dictionary.encode(x).double(), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.reconstruct(x).double(), x_hat, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("features", [20, 8])
def test_topk_is_layer_normalised_by_the_unbiased_deviation(tmp_path: Path, features: int) -> None:
    weights = state(features=features)
    dictionary = OPENAI.read(saved(weights, tmp_path / "3.pt"))
    assert dictionary.kind == "topk" and dictionary.settings()["k"] == 5
    same(dictionary, weights, 8)


def test_k_above_the_number_of_positive_pre_activations_keeps_the_positive_ones(tmp_path: Path) -> None:
    weights = state(latent_bias=torch.full((20,), -2.0), activation_state_dict={"k": 18, "postact_fn": "ReLU"})
    dictionary = OPENAI.read(saved(weights, tmp_path / "0.pt"))
    assert (dictionary.encode(torch.randn(32, 8)) > 0).sum(-1).max() < 18
    same(dictionary, weights, 8)


@pytest.mark.parametrize("named", [True, False])
def test_relu_files_are_not_normalised(tmp_path: Path, named: bool) -> None:
    weights = state(activation="ReLU" if named else None, activation_state_dict={} if named else None)
    dictionary = OPENAI.read(saved(weights, tmp_path / "0.pt"))
    assert dictionary.kind == "relu"
    same(dictionary, {**weights, "activation": "ReLU"}, 8)


def test_a_tied_decoder_is_the_encoder(tmp_path: Path) -> None:
    weights = state(features=8, activation="ReLU", **{"decoder.weight": None})
    weights["decoder.linear.weight"] = weights["encoder.weight"]
    same(OPENAI.read(saved(weights, tmp_path / "0.pt")), {**weights, "decoder.weight": weights["encoder.weight"].T}, 8)
    weights["decoder.linear.weight"] = weights["encoder.weight"] + 1
    with pytest.raises(DictionaryError, match="decoder is the encoder"):
        OPENAI.read(saved(weights, tmp_path / "1.pt"))


def test_the_folders_of_a_published_file_tell_the_hook_point(tmp_path: Path) -> None:
    path = tmp_path / "gpt2-small" / "resid_post_mlp_v5_32k" / "autoencoders" / "8.pt"
    dictionary = OPENAI.read(saved(state(), path))
    assert dictionary.hook_point == "blocks.8.hook_resid_post" and dictionary.model == "gpt2-small"
    assert dictionary.details["writer"] == {"activation": "TopK", "file": "8.pt", "k": 5, "postact_fn": "ReLU"}
    other = OPENAI.read(saved(state(), tmp_path / "8.pt"))
    assert other.hook_point == "" and other.identity.hash != dictionary.identity.hash


def test_it_is_recognised_by_its_keys(tmp_path: Path) -> None:
    assert OPENAI.recognise(saved(state(), tmp_path / "a" / "0.pt"))
    assert not OPENAI.recognise(saved(state(latent_bias=None), tmp_path / "b" / "0.pt"))
    assert OPENAI.recognise(Place(tmp_path / "a"))
    saved(state(), tmp_path / "a" / "1.pt")
    with pytest.raises(DictionaryError, match=r"2 dictionaries: 0\.pt, 1\.pt"):
        OPENAI.read(Place(tmp_path / "a"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_state_dict": {"postact_fn": "ReLU"}}, "k = None"),
        ({"activation_state_dict": {"k": 5, "postact_fn": "Identity"}}, "postact_fn = 'Identity'"),
        ({"activation_state_dict": {"k": 21, "postact_fn": "ReLU"}}, "k = 21"),
        ({"activation": "Identity"}, "activation is 'Identity'"),
        ({"latent_bias": torch.zeros(19)}, "latent_bias"),
        ({"decoder.weight": torch.randn(20, 8)}, "decoder.weight"),
        ({"pre_bias": torch.full((8,), float("nan"))}, "NaN"),
        ({"pre_bias": torch.zeros(8, dtype=torch.long)}, "pre_bias"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DictionaryError, match=message) as caught:
        OPENAI.read(saved(state(**changes), tmp_path / "0.pt"))
    assert caught.value.where and caught.value.fix
