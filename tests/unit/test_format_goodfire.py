"""Goodfire's files under both pairs of names: the function against a float64 one; and what is left to others or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evalkit.dictionaries.formats.base import FORMATS, Place
from evalkit.errors import DictionaryError

GOODFIRE = FORMATS.get("goodfire")


def weights(features: int, ending: str, width: int = 8) -> dict[str, torch.Tensor]:
    return {
        f"encoder{ending}.weight": torch.randn(features, width),
        f"encoder{ending}.bias": torch.randn(features) * 0.5,
        f"decoder{ending}.weight": torch.randn(width, features) * 2,
        f"decoder{ending}.bias": torch.randn(width),
    }


def saved(tensors: dict[str, torch.Tensor], path: Path) -> Place:
    torch.save(tensors, path)
    return Place(path)


@pytest.mark.parametrize(
    ("name", "ending", "features"),
    [
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", "_linear", 20),
        ("DeepSeek-R1-SAE-l19.pt", "", 20),
        ("Mine-SAE-l19.pth", "_linear", 8),
    ],
)
def test_the_function_does_not_subtract_the_decoder_bias(tmp_path: Path, name: str, ending: str, features: int) -> None:
    tensors = weights(features, ending)
    place = saved(tensors, tmp_path / name)
    assert GOODFIRE.recognise(place)
    dictionary = GOODFIRE.read(place)
    x = torch.randn(30, 8) + 1
    encoder, bias, decoder, out = (tensor.double() for tensor in tensors.values())
    codes = (x.double() @ encoder.T + bias).clamp(min=0)
    torch.testing.assert_close(dictionary.encode(x).double(), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.reconstruct(x).double(), codes @ decoder.T + out, rtol=1e-5, atol=1e-4)
    assert (dictionary.hook_point, dictionary.model) == ("blocks.19.hook_resid_post", name.split("-SAE")[0])


def test_the_names_that_others_use_too_are_not_enough(tmp_path: Path) -> None:
    assert not GOODFIRE.recognise(saved(weights(20, ""), tmp_path / "ae.pt"))
    assert GOODFIRE.recognise(saved(weights(20, "_linear"), tmp_path / "anything.pt"))
    assert not GOODFIRE.recognise(saved({**weights(20, ""), "threshold": torch.ones(20)}, tmp_path / "A-SAE-l1.pt"))


def test_what_cannot_be_taken_over_is_refused(tmp_path: Path) -> None:
    tensors = weights(20, "_linear")
    path = tmp_path / "A-SAE-l1.pth"
    with pytest.raises(DictionaryError, match="decoder_linear.weight"):
        GOODFIRE.read(saved({**tensors, "decoder_linear.weight": torch.randn(20, 8)}, path))
    with pytest.raises(DictionaryError, match="infinity") as caught:
        GOODFIRE.read(saved({**tensors, "encoder_linear.bias": torch.full((20,), float("inf"))}, path))
    assert caught.value.where == f"{path}: b_enc"
