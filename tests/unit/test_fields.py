"""Every field of a writer's files is used, refused or named; weights inside wrappers; strange files are bad files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evalkit.cli import main
from evalkit.dictionaries import hub, loading
from evalkit.dictionaries.formats import safe
from evalkit.dictionaries.formats.base import FORMATS, Place
from evalkit.dictionaries.formats.fields import Fields
from evalkit.dictionaries.formats.wrapped import unwrap
from evalkit.dictionaries.loading import import_dictionary
from evalkit.dictionaries.provenance import made_with, named_remarks, remarks
from evalkit.errors import DictionaryError

D, F = 6, 10


def linear(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    """A TopK file of dictionary_learning, with a threshold."""
    g = torch.Generator().manual_seed(0)
    made = {
        "encoder.weight": torch.randn(F, D, generator=g),
        "encoder.bias": torch.randn(F, generator=g),
        "decoder.weight": torch.randn(D, F, generator=g),
        "b_dec": torch.randn(D, generator=g),
        "k": torch.tensor(3),
        "threshold": torch.tensor(0.2),
    }
    return made | more


def plain() -> dict[str, torch.Tensor]:
    tensors = linear()
    return {
        "W_enc": tensors["encoder.weight"].T.contiguous(),
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["decoder.weight"].T.contiguous(),
        "b_dec": tensors["b_dec"],
    }


def saelens(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(plain(), folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, **config}))
    return folder


def trained(
    folder: Path, tensors: Any = None, trainer: dict[str, Any] | None = None, buffer: dict[str, Any] | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(linear() if tensors is None else tensors, folder / "ae.pt")
    if trainer is not None:
        text = {"trainer": {"dict_class": "AutoEncoderTopK", **trainer}, "buffer": buffer or {}}
        (folder / "config.json").write_text(json.dumps(text))
    return folder


def details(path: Path) -> dict[str, Any]:
    return import_dictionary(path).dictionary.details


def test_a_field_is_used_where_it_was_asked_for() -> None:
    fields = Fields({"a": 1, "b": 2, "c": None, "d": "", "inner": {"e": 3, "f": 4}})
    assert fields["a"] == 1 and fields.part("inner").get("e") == 3 and dict(fields) == {**fields}
    assert fields.unused() == {"b": 2, "inner.f": 4}


def test_saelens_fields_are_facts_or_training_or_named(tmp_path: Path) -> None:
    facts = {"prepend_bos": False, "context_size": 256, "exclude_special_tokens": True, "dataset_path": "lab/text"}
    training = {"lr": 1e-3, "l1_coefficient": 2.0, "wandb_project": "x", "train_batch_size_tokens": 4096, "hook_layer": 3}
    found = details(saelens(tmp_path, metadata={**facts, "sae_lens_version": "6.2.0"}, **training, subtract_mean="always"))
    expected = {"prepend_bos": False, "context_size": 256, "exclude_special_tokens": True, "dataset": "lab/text"}
    assert {name: found["made_with"][name] for name in expected} == expected
    assert found["ignored"] == {"subtract_mean": "always"}
    assert remarks(found) == ["fields of its files that were not used: subtract_mean = always"]
    assert "notes" not in found and "ignored" not in details(saelens(tmp_path / "quiet", **training))


def test_dictionary_learning_fields_are_told_apart_in_trainer_and_buffer(tmp_path: Path) -> None:
    trainer = {"lm_name": "gpt2", "layer": 3, "lr": 1e-3, "auxk_alpha": 0.1, "norm_factor": 2.0, "mystery": 1}
    found = details(trained(tmp_path, trainer=trainer, buffer={"ctx_len": 128, "io": "out", "n_ctxs": 9, "scramble": [1, 2]}))
    assert found["made_with"]["context_size"] == 128 and found["made_with"]["norm_factor"] == 2.0
    assert found["ignored"] == {"trainer.mystery": 1, "buffer.scramble": [1, 2]}


def test_positions_and_texts_that_are_not_those_of_the_training_are_said(tmp_path: Path) -> None:
    apart = saelens(tmp_path / "a", seqpos_slice=[0, 10], exclude_special_tokens=[0, 7], use_chat_formatting=True)
    said = " ".join(remarks(import_dictionary(apart).dictionary.details))
    assert all(word in said for word in ("seqpos_slice = [0, 10]", "without the tokens [0, 7]", "use_chat_formatting"))
    same = saelens(tmp_path / "b", seqpos_slice=[None], exclude_special_tokens=True, use_chat_formatting=False)
    assert remarks(import_dictionary(same).dictionary.details) == []


def test_a_flag_is_true_or_false_in_any_spelling_of_json(tmp_path: Path) -> None:
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    plainly, number, other = (
        import_dictionary(saelens(tmp_path / str(value), apply_b_dec_to_input=value)).dictionary.encode(x)
        for value in (False, 0, True)
    )
    assert torch.equal(plainly, number) and not torch.equal(plainly, other)
    with pytest.raises(DictionaryError, match="neither true nor false"):
        import_dictionary(saelens(tmp_path / "odd", apply_b_dec_to_input="no"))


def test_other_writers_fields_and_tensors_are_named(tmp_path: Path) -> None:
    w, runs = linear(), tmp_path / "run"
    (runs / "layers.3").mkdir(parents=True)
    tensors = {"encoder.weight": w["encoder.weight"], "encoder.bias": w["encoder.bias"], "b_dec": w["b_dec"]}
    save_file({**tensors, "W_dec": plain()["W_dec"], "extra": torch.ones(3)}, runs / "layers.3" / "sae.safetensors")
    (runs / "layers.3" / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": F, "k": 3, "multi_topk": True, "novel": 7}))
    (runs / "config.json").write_text(
        json.dumps({"model": "gpt2", "ctx_len": 64, "revision": "step3", "sae": {}, "odd": 1, "lr": 1})
    )
    found = details(runs / "layers.3")
    assert found["ignored"] == {"novel": 7, "tensor extra": "float32 (3,)", "odd": 1}
    assert found["made_with"] == {"model": "gpt2", "context_size": 64, "revision": "step3"}
    assert "revision step3" in found["notes"][0]

    np.savez(
        tmp_path / "params.npz", **{name: t.numpy() for name, t in plain().items()}, threshold=np.ones(F), w_novel=np.ones(2)
    )
    assert details(tmp_path / "params.npz")["ignored"] == {"tensor w_novel": "float64 (2,)"}

    repo = tmp_path / "run_100"
    repo.mkdir()
    torch.save(plain(), repo / "sae.pt")
    config = {"act_size": str(D), "dict_size": F, "sae_type": "vanilla", "seq_len": 128, "lr": "0.1", "novel": "True"}
    (repo / "config.json").write_text(json.dumps(config))
    assert details(repo)["ignored"] == {"novel": True} and details(repo)["made_with"] == {"context_size": 128}


def test_every_fixture_of_a_library_is_read_without_an_unexplained_field() -> None:
    """What the libraries write today is known in full: a name that turns up here is a new field of theirs."""
    home = Path(__file__).parents[1] / "fixtures" / "sae"
    cases = [case for case in json.loads((home / "cases.json").read_text())["cases"] if not case["refused"]]
    for case in cases:
        found = details(home / case["writer"] / case["name"] / case["path"])
        assert "ignored" not in found, (case, found["ignored"])
    assert len(cases) > 30


def test_remarks_stand_once_with_the_dictionarys_name() -> None:
    told = json.dumps({"notes": ["a thing"], "ignored": {"b": 1}})
    expected = ["one: a thing.", "one: fields of its files that were not used: b = 1."]
    assert named_remarks([("one", told), ("one", told), ("two", None), ("three", "{}")]) == expected
    assert made_with({"made_with": {"prepend_bos": True}}) == {"prepend_bos": True} and made_with({}) == {}


# wrapped weights


@pytest.mark.parametrize("key", ["state_dict", "model", "sae", "weights", "autoencoder_state"])
def test_weights_one_level_down_are_taken_with_the_config_beside_them(key: str, tmp_path: Path) -> None:
    straight = import_dictionary(trained(tmp_path / "a", trainer={"k": 3})).dictionary
    inner = {"dict_class": "AutoEncoderTopK", "k": 3, "lr": 0.1, "mystery": 2}
    wrapped = {key: linear(), "cfg": inner, "step": 5, "optimizer": {"state": {0: {"exp_avg": torch.ones(F, D)}}}}
    found = import_dictionary(trained(tmp_path / "b", wrapped)).dictionary
    assert found.identity.hash == straight.identity.hash
    assert key in found.details["taken_from"] and found.details["ignored"] == {"trainer.mystery": 2}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "model.", "autoencoder."])
def test_prefixes_of_wrappers_are_taken_off(prefix: str, tmp_path: Path) -> None:
    straight = import_dictionary(trained(tmp_path / "a", trainer={"k": 3})).dictionary
    found = import_dictionary(trained(tmp_path / "b", {f"{prefix}{n}": t for n, t in linear().items()}, {"k": 3})).dictionary
    assert found.identity.hash == straight.identity.hash and prefix in found.details["taken_from"]
    mixed = {**linear(), f"{prefix}b_dec": torch.ones(D)}
    assert unwrap(mixed, tmp_path).taken == ""


def test_the_class_may_stand_in_the_file_and_an_open_one_is_refused_with_the_place(tmp_path: Path) -> None:
    for named, kind in (("topk", "topk"), ("batch_topk", "batchtopk"), ("BatchTopKSAE", "batchtopk")):
        folder = trained(tmp_path / named, {"state_dict": linear(), "config": {"architecture": named}})
        assert import_dictionary(folder).dictionary.kind == kind
    with pytest.raises(DictionaryError, match="AutoEncoderTopK or BatchTopKSAE") as caught:
        import_dictionary(trained(tmp_path / "open", {"state_dict": linear(), "cfg": {"k": 3}}))
    assert "state_dict" in caught.value.where


def test_several_sets_of_weights_are_not_chosen_among(tmp_path: Path) -> None:
    folder = trained(tmp_path, {"model": linear(), "ema": {"shadow": linear()}})
    for format in (None, "dictionary_learning"):
        with pytest.raises(DictionaryError, match=r"'model', 'ema\.shadow'"):
            import_dictionary(folder, format)


def test_a_mean_beside_the_weights_is_told_of_loudly(tmp_path: Path) -> None:
    wrapped = {"state_dict": linear(), "cfg": {"dict_class": "AutoEncoderTopK"}, "act_mean": torch.ones(D)}
    found = details(trained(tmp_path, wrapped))
    assert [note for note in found["notes"] if "WARNING" in note and "'act_mean'" in note]
    assert found["ignored"]["act_mean"] == "float32 (6,)"
    nothing = details(trained(tmp_path, {**wrapped, "act_mean": torch.zeros(D)}))
    assert not nothing.get("notes")


def test_without_a_config_it_is_said_what_was_assumed(tmp_path: Path) -> None:
    bare = {name: tensor for name, tensor in linear().items() if name in ("encoder.weight", "encoder.bias", "decoder.weight")}
    found = import_dictionary(trained(tmp_path, {**bare, "decoder.bias": torch.zeros(D)})).dictionary
    assert (
        found.kind == "relu" and "no config.json" in found.details["notes"][0] and "AutoEncoderNew" in found.details["notes"][0]
    )
    assert "notes" not in details(trained(tmp_path / "known", trainer={"k": 3}))


# SAELens' directory


def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path, **entry: Any) -> None:
    """A directory of one release 'toy/one', whose files lie in ``repository``."""
    listing = tmp_path / "directory.yaml"
    listing.write_text("\ufeff" + json.dumps({"toy": {"repo_id": "lab/toy", "model": "gpt2-small", **entry}}), encoding="utf-8")
    monkeypatch.setattr("evalkit.assets.install.path", lambda name: {hub.DIRECTORY: listing}[name])
    monkeypatch.setattr(hub, "fetch", lambda place, name: repository / place.inside)


def test_overrides_of_the_directory_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"hook_point": "blocks.1.hook_resid_pre", "model_name": "gpt2-small", "normalize_activations": "none"}
    saelens(tmp_path / "one", **config)
    overrides = {
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
        "normalize_activations": "constant_norm_rescale",
        "dataset_path": "lab/other",
        "strange": 1,
    }
    sae = {"id": "one", "path": "one", "l0": 12.0, "variance_explained": 0.9}
    directory(tmp_path, monkeypatch, tmp_path, saes=[sae], config_overrides=overrides)
    found = import_dictionary("saelens:toy/one").dictionary
    assert found.settings() == {"centre": True, "normalise": "token_norm"}
    assert found.details["made_with"]["dataset"] == "lab/other" and found.details["ignored"] == {"strange": 1}
    assert found.details["saelens"] == {"release": "toy/one", "l0": 12.0, "variance_explained": 0.9}
    by_address = import_dictionary("hub:lab/toy/one").dictionary
    assert by_address.settings() == {} and "import saelens:toy/one" in " ".join(by_address.details["notes"])


def test_an_input_scale_of_the_directory_is_used_where_saelens_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = {"id": "one", "path": "one", "norm_scaling_factor": 2.5}
    saelens(tmp_path / "one", normalize_activations="expected_average_only_in")
    directory(tmp_path, monkeypatch, tmp_path, saes=[sae])
    found = import_dictionary("saelens:toy/one").dictionary
    assert found.settings() == {"normalise": "constant", "scale": 2.5} and found.model == "gpt2-small"
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    w = {name: tensor.double() for name, tensor in plain().items()}
    folded = ((x.double() - w["b_dec"] / 2.5) @ (w["W_enc"] * 2.5) + w["b_enc"]).relu() @ (w["W_dec"] / 2.5) + w["b_dec"] / 2.5
    torch.testing.assert_close(found.reconstruct(x).double(), folded, atol=1e-4, rtol=1e-4)
    saelens(tmp_path / "one", normalize_activations="none")
    assert details_of("saelens:toy/one")["ignored"] == {"directory norm_scaling_factor": 2.5}


def details_of(name: str) -> dict[str, Any]:
    return import_dictionary(name).dictionary.details


def test_overrides_reach_other_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path / "one", trainer={"k": 3})
    overrides = {"hook_name": "blocks.2.hook_resid_post", "model_name": "pythia-70m", "context_size": 77, "strange": 1}
    directory(tmp_path, monkeypatch, tmp_path, saes=[{"id": "one", "path": "one"}], config_overrides=overrides)
    found = import_dictionary("saelens:toy/one").dictionary
    assert (found.hook_point, found.model) == ("blocks.2.hook_resid_post", "pythia-70m")
    assert found.details["made_with"]["context_size"] == 77 and found.details["ignored"] == {"override strange": 1}


@pytest.mark.parametrize(
    "text", ["toy: [1, 2", "- a\n- b", "toy: {}", "toy: {repo_id: 1, saes: 3}", "\x00\x01", "!!python/object:os.x {}"]
)
def test_a_damaged_directory_is_a_clear_error(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory(tmp_path, monkeypatch, tmp_path)
    (tmp_path / "directory.yaml").write_text(text)
    with pytest.raises(DictionaryError) as caught:
        import_dictionary("saelens:toy/one")
    assert caught.value.where == "saelens:toy/one" and caught.value.fix


# JSON and everything strange


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_configs_in_any_unicode_with_a_mark_or_without(encoding: str, tmp_path: Path) -> None:
    folder = saelens(tmp_path, model_name="é")
    text = (folder / "cfg.json").read_text()
    (folder / "cfg.json").write_bytes(text.replace("\\u00e9", "é").encode(encoding))
    assert import_dictionary(folder).dictionary.model == "é"


def test_other_bytes_doubled_names_and_numbers_without_a_value_are_said(tmp_path: Path) -> None:
    folder = saelens(tmp_path)
    for raw, words in (
        (b'{"d_in": 6, "d_sae": 10, "model_name": "caf\xe9"}', "no utf-8 text at byte 43"),
        (b'{"d_in": 6, "d_sae": 10, "d_sae": 20}', "'d_sae' twice"),
        (b'{"d_in": 6, "d_sae": NaN}', "d_sae = 'NaN'"),
        (b'{"d_in": 6, "d_sae": 1e999}', "d_sae = '1e999'"),
        (b"", "not JSON"),
    ):
        (folder / "cfg.json").write_bytes(raw)
        with pytest.raises(DictionaryError, match=words) as caught:
            import_dictionary(folder)
        assert "cfg.json" in caught.value.where
    (folder / "cfg.json").write_bytes(b'{"d_in": 6, "d_sae": 10, "d_sae": 10}')
    assert import_dictionary(folder).dictionary.n_features == F


def test_whatever_a_library_raises_is_a_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Odd(Exception):
        pass

    def fails(*_: object, **__: object) -> None:
        raise Odd("first line \x1b[31m\nsecond")

    folder = saelens(tmp_path)
    reader = type(FORMATS.get("saelens"))
    for target, name in ((reader, "read"), (reader, "recognise"), (safe, "json_object"), (loading, "find")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fails)
            assert main(["import", str(folder)]) == 2
            said = capsys.readouterr().err
            assert "first line" in said and "\x1b" not in said and "internal error" not in said
    for target, name, path in (
        (safe, "load_file", folder / "sae_weights.safetensors"),
        (torch, "load", trained(tmp_path / "t") / "ae.pt"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fails)
            with pytest.raises(DictionaryError, match="first line"):
                safe.load(path)


def _gemma(folder: Path) -> None:
    np.savez(folder / "params.npz", **{name: t.numpy() for name, t in plain().items()}, threshold=np.ones(F, dtype=np.float32))


def _gemma_2(folder: Path) -> None:
    save_file({**{name.lower(): t for name, t in plain().items()}, "threshold": torch.ones(F)}, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "model_name": "m", "width": F}))


def _openmoss(folder: Path) -> None:
    w = plain()
    save_file({"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}, folder / "sae_weights.safetensors")
    config = {"sae_type": "sae", "d_model": D, "d_sae": F, "act_fn": "relu", "norm_activation": "inference"}
    (folder / "config.json").write_text(json.dumps(config))


def _qwen(folder: Path) -> None:
    w = plain()
    torch.save({**w, "W_enc": w["W_enc"].T.contiguous(), "W_dec": w["W_dec"].T.contiguous()}, folder / "layer3.sae.pt")
    (folder / "evalkit.json").write_text('{"k": 3}')


def _openai(folder: Path) -> None:
    w = linear()
    state = {"pre_bias": w["b_dec"], "latent_bias": w["encoder.bias"], "encoder.weight": w["encoder.weight"]}
    torch.save({**state, "decoder.weight": w["decoder.weight"], "activation": "ReLU"}, folder / "8.pt")


def _goodfire(folder: Path) -> None:
    w = linear()
    names = {"encoder_linear.weight": "encoder.weight", "encoder_linear.bias": "encoder.bias"}
    names |= {"decoder_linear.weight": "decoder.weight", "decoder_linear.bias": "b_dec"}
    torch.save({name: w[theirs] for name, theirs in names.items()}, folder / "M-SAE-l3.pth")


WRITERS: dict[str, Callable[[Path], object]] = {
    "saelens": lambda folder: saelens(folder, hook_name="blocks.1.hook_resid_pre", architecture="standard"),
    "dictionary_learning": lambda folder: trained(folder, trainer={"k": 3}),
    "gemma": _gemma, "gemma 2": _gemma_2, "openmoss": _openmoss, "qwen": _qwen, "openai": _openai, "goodfire": _goodfire,
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
def test_cut_and_changed_files_of_every_writer_are_read_or_refused(writer: str, tmp_path: Path) -> None:
    WRITERS[writer](tmp_path)
    assert import_dictionary(tmp_path).dictionary.d_in == D
    rng, refused = np.random.default_rng(0), 0
    for path in [file for file in tmp_path.iterdir() if file.is_file()]:
        whole = path.read_bytes()
        spoiled = [whole[: int(len(whole) * share)] for share in (0, 0.01, 0.3, 0.9, 0.999)]
        for _ in range(25):
            bytes_ = bytearray(whole)
            for place in rng.integers(0, min(len(whole), 600), size=2):
                bytes_[place] ^= 1 << int(rng.integers(8))
            spoiled.append(bytes(bytes_))
        for raw in [*spoiled, b"[" * 50_000, b'{"a": [1, {"b": null}]}', b"\x00" * 64]:
            path.write_bytes(raw)
            try:
                import_dictionary(tmp_path)
            except DictionaryError as error:
                assert error.what and error.fix
                refused += 1
        path.write_bytes(whole)
    assert refused > 10


def test_a_place_hands_out_what_it_tracks(tmp_path: Path) -> None:
    place = Place(saelens(tmp_path))
    assert place.config("cfg.json")["d_in"] == D and place.config("cfg.json").unused() == {"d_sae": F}
    assert place.keys(tmp_path / "sae_weights.safetensors") == set(plain())
