"""Qwen Scope: the function against a float64 one on the transposed layout, k from the path; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evalkit.dictionaries.formats.base import FORMATS, Place
from evalkit.errors import DictionaryError

QWEN = FORMATS.get("qwen_scope")
D, F = 4, 1024


def weights(features: int = F, width: int = D) -> dict[str, torch.Tensor]:
    return {
        "W_enc": torch.randn(features, width),
        "b_enc": torch.randn(features) - 1,
        "W_dec": torch.randn(width, features) * 2,
        "b_dec": torch.randn(width),
    }


def saved(tensors: dict[str, torch.Tensor], folder: Path, name: str = "layer5.sae.pt") -> Place:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / name)
    return Place(folder / name)


def check(place: Place, tensors: dict[str, torch.Tensor], k: int, width: int) -> None:
    x = torch.randn(20, width)
    pre = x.double() @ tensors["W_enc"].double().T + tensors["b_enc"].double()
    keep = pre.topk(k).indices
    codes = torch.zeros_like(pre).scatter(-1, keep, pre.gather(-1, keep)).clamp(min=0)
    dictionary = QWEN.read(place)
    torch.testing.assert_close(dictionary.encode(x).double(), codes, rtol=1e-5, atol=1e-5)
    x_hat = codes @ tensors["W_dec"].double().T + tensors["b_dec"].double()
    torch.testing.assert_close(dictionary.reconstruct(x).double(), x_hat, rtol=1e-5, atol=1e-4)


def test_k_and_model_come_from_the_repository(tmp_path: Path) -> None:
    tensors = weights()
    place = saved(tensors, tmp_path / "models--Qwen--SAE-Res-Qwen3-1.7B-Base-W1K-L0_900" / "snapshots" / "a")
    assert QWEN.recognise(place)
    dictionary = QWEN.read(place)
    assert (dictionary.hook_point, dictionary.model) == ("blocks.5.hook_resid_post", "Qwen/Qwen3-1.7B-Base")
    assert dictionary.settings() == {"k": 900, "subtract_b_dec": False}
    check(place, tensors, 900, D)


def test_a_square_layout_is_not_guessed_from_shapes(tmp_path: Path) -> None:
    tensors = weights(6, 6)
    place = saved(tensors, tmp_path)
    (tmp_path / "evalkit.json").write_text(json.dumps({"k": 2}))
    check(place, tensors, 2, 6)


def test_what_cannot_be_taken_over_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match="k, the number of active features, is in no file") as caught:
        QWEN.read(saved(weights(), tmp_path / "a"))
    assert "evalkit.json" in caught.value.fix
    with pytest.raises(DictionaryError, match="W2K"):
        QWEN.read(saved(weights(), tmp_path / "SAE-Res-Qwen3-8B-Base-W2K-L0_50"))
    saelens_layout = {**weights(), "W_enc": torch.randn(D, F), "W_dec": torch.randn(F, D)}
    with pytest.raises(DictionaryError, match="b_enc"):
        QWEN.read(saved(saelens_layout, tmp_path / "SAE-Res-Qwen3-8B-Base-W1K-L0_50"))
    broken = {**weights(), "b_dec": torch.full((D,), float("nan"))}
    place = saved(broken, tmp_path / "b" / "SAE-Res-Qwen3-8B-Base-W1K-L0_50")
    with pytest.raises(DictionaryError, match="NaN") as caught:
        QWEN.read(place)
    assert caught.value.where == f"{place.path}: b_dec"


def test_a_folder_of_layers_is_not_one_dictionary(tmp_path: Path) -> None:
    folder = tmp_path / "SAE-Res-Qwen3-8B-Base-W1K-L0_50"
    saved(weights(), folder)
    assert QWEN.read(Place(folder)).hook_point == "blocks.5.hook_resid_post"
    saved(weights(), folder, "layer6.sae.pt")
    with pytest.raises(DictionaryError, match=r"2 dictionaries: layer5\.sae\.pt, layer6\.sae\.pt"):
        QWEN.read(Place(folder))
    assert QWEN.read(Place(folder / "layer6.sae.pt")).hook_point == "blocks.6.hook_resid_post"
