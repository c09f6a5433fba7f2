"""Recognising, reading and writing dictionaries by name: the parts all formats share."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evalkit.cli import main
from evalkit.dictionaries.formats import safe
from evalkit.dictionaries.formats.base import FORMATS, Place, matrix, number
from evalkit.dictionaries.gated import Gated
from evalkit.dictionaries.loading import export_dictionary, find_dictionary, import_dictionary, load_dictionary, recognise
from evalkit.dictionaries.relu import ReLU
from evalkit.dictionaries.tied import Tied
from evalkit.dictionaries.topk import TopK
from evalkit.errors import DictionaryError

D, F = 6, 10


def weights(seed: int = 0, **extra: torch.Tensor) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = {"W_enc": torch.randn(D, F, generator=g), "b_enc": torch.randn(F, generator=g)}
    return made | {"W_dec": torch.randn(F, D, generator=g), "b_dec": torch.randn(D, generator=g)} | extra


def test_every_format_says_who_writes_it() -> None:
    assert {"evalkit", "saelens", "dictionary_learning", "sparsify"} <= set(FORMATS.names())
    for name in FORMATS.names():
        assert FORMATS.get(name).name == name
        assert FORMATS.get(name).title


def test_nothing_that_can_be_recognised_lists_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DictionaryError) as caught:
        import_dictionary(tmp_path)
    assert "notes.txt" in caught.value.what
    assert "dictionary_learning" in caught.value.fix


def test_a_folder_of_dictionaries_lists_them(tmp_path: Path) -> None:
    for name in ("layer_1", "layer_2"):
        export_dictionary(ReLU(weights()), tmp_path / name)
    with pytest.raises(DictionaryError) as caught:
        import_dictionary(tmp_path)
    assert "holds 2 dictionaries" in caught.value.what
    assert caught.value.fix == "name one: layer_1, layer_2"


def test_a_missing_folder_names_the_near_miss(tmp_path: Path) -> None:
    (tmp_path / "my-sae").mkdir()
    with pytest.raises(DictionaryError) as caught:
        load_dictionary(tmp_path / "my-sea")
    assert "did you mean 'my-sae'?" in caught.value.fix


def test_two_formats_that_claim_one_place_need_a_word_from_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_dictionary(ReLU(weights()), tmp_path / "d")
    monkeypatch.setattr(type(FORMATS.get("openai")), "recognise", lambda self, place: True)
    with pytest.raises(DictionaryError) as caught:
        recognise(Place(tmp_path / "d"))
    assert "evalkit or openai" in caught.value.what
    assert import_dictionary(tmp_path / "d", "evalkit").format == "evalkit"


def test_an_unknown_format_names_the_near_miss(tmp_path: Path) -> None:
    export_dictionary(ReLU(weights()), tmp_path / "d")
    with pytest.raises(DictionaryError) as caught:
        import_dictionary(tmp_path / "d", "sealens")
    assert "did you mean 'saelens'?" in caught.value.fix


@pytest.mark.parametrize("to", [n for n in FORMATS.names() if "relu" in FORMATS.get(n).writes])
def test_what_is_exported_comes_back_exactly(to: str, tmp_path: Path) -> None:
    given = ReLU(weights(), hook_point="blocks.3.hook_resid_post", model="gpt2")
    back = load_dictionary(export_dictionary(given, tmp_path / "out", to))
    assert back.identity == given.identity
    assert all(torch.equal(tensor, given.tensors()[name]) for name, tensor in back.tensors().items())


def test_a_format_without_the_architecture_says_which_have_it(tmp_path: Path) -> None:
    M = torch.nn.functional.normalize(torch.randn(F, D, generator=torch.Generator().manual_seed(0)), dim=1)
    with pytest.raises(DictionaryError) as caught:
        export_dictionary(Tied(M, torch.zeros(F)), tmp_path / "out", "dictionary_learning")
    assert "tied" in caught.value.what
    assert "evalkit" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_format_that_is_only_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match="does not write it"):
        export_dictionary(TopK(weights(), 3), tmp_path / "out", "sparsify")
    assert list(tmp_path.iterdir()) == []


def test_a_lossy_export_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(FORMATS.get("saelens")), "read", lambda self, place: ReLU(weights(1)))
    with pytest.raises(DictionaryError, match="cannot hold this relu dictionary exactly"):
        export_dictionary(ReLU(weights()), tmp_path / "out", "saelens")
    assert list(tmp_path.iterdir()) == []


def test_an_export_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(DictionaryError, match="nothing was written"):
        export_dictionary(ReLU(weights()), tmp_path / "out", "saelens")
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_dictionaries_of_a_results_folder_are_found_by_name(tmp_path: Path) -> None:
    kept = export_dictionary(ReLU(weights()), tmp_path / "dictionaries" / "my-sae-0123abcd")
    assert find_dictionary("my-sae", tmp_path) == kept
    assert find_dictionary("my-sae-0123abcd", tmp_path) == kept
    assert find_dictionary(str(kept), tmp_path) == kept
    with pytest.raises(DictionaryError) as caught:
        find_dictionary("my-sae-0123", tmp_path)
    assert "did you mean 'my-sae-0123abcd'?" in caught.value.fix
    export_dictionary(ReLU(weights(1)), tmp_path / "dictionaries" / "my-sae-89abcdef")
    with pytest.raises(DictionaryError, match="there are 2 dictionaries"):
        find_dictionary("my-sae", tmp_path)


class Trap:
    """Unpickled by ordinary means, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.write_text, (self.mark, "executed"))


@pytest.mark.parametrize("name", ["ae.pt", "sae.pt", "0.pt", "learned_dicts.pt", "weights.pkl"])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_malicious_pickle_is_refused_with_exit_code_2_and_nothing_runs(tmp_path: Path, name: str, how: str, capsys) -> None:
    mark, path = tmp_path / "mark", tmp_path / "sae" / name
    path.parent.mkdir()
    payload = {"encoder.weight": torch.zeros(F, D), "b_dec": Trap(mark)}
    if how == "torch":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    for target in (path, path.parent):
        for more in ([], ["--format", "dictionary_learning"], ["--format", "hoagyc"], ["--format", "ai_safety"]):
            assert main(["import", str(target), *more]) == 2
            assert "Traceback" not in capsys.readouterr().err
    assert not mark.exists()
    # the trap is real: by ordinary means it does run
    with path.open("rb") as handle:
        torch.load(handle, weights_only=False) if how == "torch" else pickle.load(handle)
    assert mark.exists()


def test_files_that_promise_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "w.safetensors"
    save_file(weights(), whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(DictionaryError, match="cannot be read"):
        safe.load(cut)
    np.savez(tmp_path / "w.npz", **{name: tensor.numpy() for name, tensor in weights().items()})
    data = (tmp_path / "w.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DictionaryError, match="cannot be read"):
        safe.load(tmp_path / "cut.npz")
    torch.save(weights(), tmp_path / "w.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:-200])
    with pytest.raises(DictionaryError, match="cannot be read"):
        safe.load(tmp_path / "cut.pt")


def test_an_npz_whose_header_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 4), dtype=np.float32))
    lying = (tmp_path / "a.npy").read_bytes().replace(b"(4, 4)", b"(9, 9)")
    with zipfile.ZipFile(tmp_path / "lying.npz", "w") as archive:
        archive.writestr("W_enc.npy", lying)
    with pytest.raises(DictionaryError):
        safe.load(tmp_path / "lying.npz")


def test_an_npz_of_pickled_objects_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    np.savez(tmp_path / "o.npz", W_enc=np.array([Trap(mark)], dtype=object))
    with pytest.raises(DictionaryError):
        safe.load(tmp_path / "o.npz")
    assert not mark.exists()


def linear(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state_dict of a small AutoEncoder of dictionary_learning."""
    w = weights()
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T, "bias": w["b_dec"]}
    return {name: tensor.contiguous() for name, tensor in tensors.items()} | changes


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).as_strided((1 << 16, 1 << 20), (0, 0)), "274.9 GB in memory"),
        (torch.zeros(F, D).to_sparse(), "without plain numbers"),
        (torch.empty(F, D, device="meta"), "without plain numbers"),
        (torch.zeros(F, D, dtype=torch.complex64), "complex64"),
    ],
    ids=["stride 0", "sparse", "meta", "complex"],
)
def test_tensors_that_are_not_what_they_seem_are_refused(tmp_path: Path, tensor: torch.Tensor, message: str) -> None:
    torch.save(linear(), tmp_path / "ae.pt")
    assert import_dictionary(tmp_path).dictionary.kind == "relu"
    torch.save(linear(**{"encoder.weight": tensor}), tmp_path / "ae.pt")
    with pytest.raises(DictionaryError, match=message):
        import_dictionary(tmp_path)


@pytest.mark.parametrize("name", ["w.npz", "w.pt"])
def test_archives_that_unpack_to_far_more_are_not_unpacked(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe, "SPARE", 1 << 16)
    zeros = {"W": np.zeros((512, 512), dtype=np.float32)}
    whole, packed = io.BytesIO(), tmp_path / name
    np.savez(whole, **zeros) if name == "w.npz" else torch.save({"W": torch.from_numpy(zeros["W"])}, whole)
    packed.write_bytes(whole.getvalue())
    assert safe.load(packed)["W"].shape == (512, 512)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    with pytest.raises(DictionaryError, match="far more than its own"):
        safe.load(packed)


@pytest.mark.parametrize("kind", ["zip", "legacy", "npz"])
def test_any_changed_bytes_give_a_clear_error_or_data(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("w.npz" if kind == "npz" else "w.pt")
    if kind == "npz":
        np.savez_compressed(path, W=weights()["W_enc"].numpy())
    else:
        torch.save(linear(), path, _use_new_zipfile_serialization=kind == "zip")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        changed = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 900), size=3):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            assert isinstance(safe.load(path), dict) and safe.names(path)
        except DictionaryError as error:
            assert error.where == str(path) and error.fix
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("name", ["ae.pt", "anything.pt", "params.npz", "sae.safetensors"])
def test_what_stands_where_weights_should_be_is_named(tmp_path: Path, name: str) -> None:
    for text, words in (
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "pointer of Git LFS"),
        ("\n<!DOCTYPE html>\n<html></html>", "web page"),
        ("no weights at all", "cannot be read"),
    ):
        (tmp_path / name).write_text(text)
        for target in (tmp_path, tmp_path / name):
            with pytest.raises(DictionaryError, match=words) as caught:
                import_dictionary(target)
            assert caught.value.where == str(tmp_path / name)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/sae", "a" * 5000, "nul\0nul"])
def test_names_that_cannot_be_paths_are_only_missing(name: str) -> None:
    with pytest.raises(DictionaryError, match="no such file or folder"):
        import_dictionary(name)


def test_pipes_and_loops_of_links_are_no_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ae.pt")
    (tmp_path / "sae.pt").symlink_to("sae.pt")
    with pytest.raises(DictionaryError, match="no format recognises this"):
        import_dictionary(tmp_path)


def test_configs_that_python_cannot_follow_are_refused_and_numbers_without_a_value_are_words(tmp_path: Path) -> None:
    path = tmp_path / "cfg.json"
    for text in ("[" * 100_000, '{"a": "\\ud800"}', '{"a": 1'):
        path.write_text(text)
        with pytest.raises(DictionaryError, match="not JSON"):
            safe.json_object(path)
    path.write_text('{"a": 1e999, "b": NaN, "c": -Infinity, "d": 9999999999999999999, "e": 2.5, "f": -7}')
    values = {"a": "1e999", "b": "NaN", "c": "-Infinity", "d": "9999999999999999999", "e": 2.5, "f": -7}
    assert safe.json_object(path) == values


def test_names_are_those_of_what_is_loaded(tmp_path: Path) -> None:
    torch.save(linear(), tmp_path / "w.pt")
    torch.save(linear(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(linear(), tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz", **{name: tensor.numpy() for name, tensor in linear().items()})
    for name in ("w.pt", "old.pt", "w.safetensors", "w.npz"):
        assert safe.names(tmp_path / name) == set(safe.load(tmp_path / name)) == set(linear())


def test_tensors_and_numbers_of_a_file_are_checked_by_name(tmp_path: Path) -> None:
    tensors = {"W": torch.ones(2, 3), "n": torch.ones(2, dtype=torch.int64)}
    assert matrix(tensors, "W", (2, -1), tmp_path).shape == (2, 3)
    for name, shape, words in (
        ("V", (2, 3), "lacks"),
        ("n", (2,), "int64"),
        ("W", (3, 2), "has shape"),
        ("W", (6,), "has shape"),
    ):
        with pytest.raises(DictionaryError, match=words):
            matrix(tensors, name, shape, tmp_path)
    assert number({"k": 4.0}, "k", tmp_path) == 4
    for bad in ({}, {"k": "4"}, {"k": 0}, {"k": True}, {"k": 1.5}, {"k": 4e300}):
        with pytest.raises(DictionaryError, match="k = "):
            number(bad, "k", tmp_path)


def test_a_gated_dictionary_survives_the_command_line(tmp_path: Path, capsys) -> None:
    tensors = weights(b_gate=torch.randn(F), r_mag=torch.randn(F), b_mag=torch.randn(F))
    del tensors["b_enc"]
    kept = export_dictionary(Gated(tensors), tmp_path / "results" / "dictionaries" / "gated-00000000")
    assert (
        main(
            [
                "export",
                "gated",
                "--to",
                "saelens",
                "-o",
                str(tmp_path / "out"),
                "--results",
                str(tmp_path / "results" / "e.duckdb"),
            ]
        )
        == 0
    )
    assert main(["import", str(tmp_path / "out"), "-o", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert "saelens" in said and "gated" in said
    assert load_dictionary(tmp_path / "again").identity.hash == load_dictionary(kept).identity.hash
