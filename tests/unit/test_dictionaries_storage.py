"""Saved dictionaries come back bit for bit, and damaged or foreign folders are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.controls import Mean
from evalkit.dictionaries.registry import BASELINES
from evalkit.dictionaries.storage import load_dictionary, save_dictionary
from evalkit.dictionaries.tied import Tied
from evalkit.dictionaries.topk import TopK
from evalkit.errors import DictionaryError
from evalkit.util.progress import Progress

WHERE = {"hook_point": "blocks.1.hook_resid_post", "model": "toy"}


def make(kind: str) -> Dictionary:
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    if kind == "topk":
        tensors = {"W_enc": x[:6, :].repeat(1, 2), "b_enc": torch.zeros(12), "W_dec": x[:12], "b_dec": x[0]}
        return TopK(tensors, 3, details={"note": "é"}, **WHERE)
    if kind == "tied":
        return Tied(torch.nn.functional.normalize(x[:8], dim=1), torch.zeros(8), x[0], **WHERE)
    settings = {"components": 3} if kind == "ica" else {}
    return BASELINES.get(kind).fit(x, seed=0, progress=Progress(quiet=True), **WHERE, **settings)


@pytest.mark.parametrize("kind", ["topk", "tied", "pca", "ica", "neurons", "random", "identity", "mean"])
def test_a_round_trip_is_exact(kind: str, tmp_path: Path) -> None:
    saved = make(kind)
    loaded = load_dictionary(save_dictionary(saved, tmp_path / "d"))
    assert type(loaded) is type(saved) and loaded.identity == saved.identity
    assert loaded.details == saved.details and loaded.settings() == saved.settings() and loaded.signed == saved.signed
    x = torch.randn(40, 6)
    assert torch.equal(loaded.encode(x), saved.encode(x)) and torch.equal(loaded.reconstruct(x), saved.reconstruct(x))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]


def test_saving_again_replaces_a_dictionary_but_nothing_else(tmp_path: Path) -> None:
    save_dictionary(make("topk"), tmp_path / "d")
    save_dictionary(make("pca"), tmp_path / "d")
    assert load_dictionary(tmp_path / "d").kind == "pca"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(DictionaryError, match="not a dictionary folder"):
        save_dictionary(make("pca"), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    d = make("mean")
    assert isinstance(d, Mean)
    d.constant[0] = float("nan")
    with pytest.raises(DictionaryError, match="NaN"):
        save_dictionary(d, tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def edit_card(folder: Path, **changes: object) -> None:
    card = json.loads((folder / "dictionary.json").read_text())
    (folder / "dictionary.json").write_text(json.dumps({**card, **changes}))


def edit_weights(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "weights.safetensors")
    tensors = {key: value.clone() for key, value in tensors.items() if key != name}
    save_file({**tensors, **({} if tensor is None else {name: tensor})}, folder / "weights.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "weights.safetensors").unlink(), "weights file is missing"),
        (lambda f: (f / "weights.safetensors").write_bytes(b"no"), "cannot be read"),
        (lambda f: (f / "dictionary.json").unlink(), "not an evalkit dictionary"),
        (lambda f: (f / "dictionary.json").write_text("{"), "not JSON"),
        (lambda f: (f / "dictionary.json").write_text("[]"), "lacks 'format'"),
        (lambda f: edit_card(f, kind="topkk"), "no kind of dictionary called 'topkk'"),
        (lambda f: edit_card(f, format=99), "format 99"),
        (lambda f: edit_card(f, hash=3), "lacks 'hash'"),
        (lambda f: edit_card(f, settings={"k": 2}), "hash differs"),
        (lambda f: edit_card(f, settings={}), "lack 'k'"),
        (lambda f: edit_card(f, settings={"k": 40}), "k = 40"),
        (lambda f: edit_weights(f, "b_dec", torch.ones(6)), "hash differs"),
        (lambda f: edit_weights(f, "b_dec", torch.ones(5)), "shape"),
        (lambda f: edit_weights(f, "b_dec", torch.full((6,), float("inf"))), "NaN or an infinity"),
        (lambda f: edit_weights(f, "b_dec", None), "lack the tensor 'b_dec'"),
        (lambda f: edit_weights(f, "b_decc", torch.ones(6)), "no tensor 'b_decc'"),
    ],
)
def test_damage_is_named_with_its_place(damage, message: str, tmp_path: Path) -> None:
    folder = save_dictionary(make("topk"), tmp_path / "d")
    damage(folder)
    with pytest.raises(DictionaryError, match=message) as caught:
        load_dictionary(folder)
    assert str(folder) in caught.value.where and (caught.value.fix or "shape" in message)


def test_a_missing_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match="no such folder"):
        load_dictionary(tmp_path / "nowhere")
