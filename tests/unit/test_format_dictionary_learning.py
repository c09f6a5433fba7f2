"""dictionary_learning files: each of the seven classes computes what the library computes, and exports come back to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evalkit.dictionaries.autoencoder import Autoencoder, Wiring
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.batchtopk import BatchTopK
from evalkit.dictionaries.formats.base import FORMATS, Place
from evalkit.dictionaries.formats.dictionary_learning.config import hook_point
from evalkit.dictionaries.gated import Gated
from evalkit.dictionaries.jumprelu import JumpReLU
from evalkit.dictionaries.matryoshka import Matryoshka
from evalkit.dictionaries.relu import ReLU
from evalkit.dictionaries.tied import Tied
from evalkit.dictionaries.topk import TopK
from evalkit.errors import DictionaryError

D, F, K = 6, 10, 4
HOOK = "blocks.3.hook_resid_post"
State = dict[str, torch.Tensor]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(d: int = D, f: int = F) -> State:
    """As nn.Linear stores them: (out, in). Decoder directions far from unit length."""
    return {"encoder.weight": draw(f, d, seed=1), "decoder.weight": draw(d, f, seed=2) * torch.linspace(0.3, 2.5, f)}


def plain() -> State:
    stretch = torch.linspace(0.3, 2.5, F)[:, None]
    return {
        "W_enc": draw(D, F, seed=1),
        "b_enc": draw(F, seed=3),
        "W_dec": draw(F, D, seed=2) * stretch,
        "b_dec": draw(D, seed=4) + 1,
    }


def buffers(threshold: float = 0.7, **more: torch.Tensor) -> State:
    return {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold), **more}


def topk(threshold: float = 0.7) -> State:
    return {**buffers(threshold), **linear(), "encoder.bias": draw(F, seed=3) - 2, "b_dec": draw(D, seed=4) + 1}


STATES: dict[str, State] = {
    "AutoEncoder": {"bias": draw(D, seed=4) + 1, **linear(), "encoder.bias": draw(F, seed=3)},
    "AutoEncoderNew": {**linear(), "encoder.bias": draw(F, seed=3), "decoder.bias": draw(D, seed=4) + 1},
    "GatedAutoEncoder": {
        "decoder_bias": draw(D, seed=4) + 1,
        **{name: draw(F, seed=seed) for seed, name in enumerate(("r_mag", "gate_bias", "mag_bias"), start=5)},
        **linear(),
    },
    "AutoEncoderTopK": topk(),
    "BatchTopKSAE": topk(),
    "MatryoshkaBatchTopKSAE": {**buffers(group_sizes=torch.tensor([2, 3, 5])), **plain()},
    "JumpReluAutoEncoder": {**plain(), "threshold": torch.linspace(0.1, 2.0, F)},
}
KINDS = {
    "AutoEncoder": ReLU,
    "AutoEncoderNew": ReLU,
    "GatedAutoEncoder": Gated,
    "AutoEncoderTopK": TopK,
    "BatchTopKSAE": BatchTopK,
    "MatryoshkaBatchTopKSAE": Matryoshka,
    "JumpReluAutoEncoder": JumpReLU,
}


def reference(name: str, state: State, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and x_hat in float64 by the class's formulas, without evalkit."""
    s, x = {key: value.double() for key, value in state.items()}, x.double()

    def relu(pre: torch.Tensor) -> torch.Tensor:
        return pre.clamp(min=0)

    if name == "AutoEncoder":
        codes = relu((x - s["bias"]) @ s["encoder.weight"].T + s["encoder.bias"])
        return codes, codes @ s["decoder.weight"].T + s["bias"]
    if name == "AutoEncoderNew":
        codes = relu(x @ s["encoder.weight"].T + s["encoder.bias"])
        return codes, codes @ s["decoder.weight"].T + s["decoder.bias"]
    if name == "GatedAutoEncoder":
        inner = (x - s["decoder_bias"]) @ s["encoder.weight"].T
        codes = relu(s["r_mag"].exp() * inner + s["mag_bias"]) * (inner + s["gate_bias"] > 0)
        return codes, codes @ s["decoder.weight"].T + s["decoder_bias"]
    if name in ("AutoEncoderTopK", "BatchTopKSAE"):
        after = relu((x - s["b_dec"]) @ s["encoder.weight"].T + s["encoder.bias"])
        if name == "BatchTopKSAE":
            codes = after * (after > s["threshold"])
        else:
            codes = after * (after >= after.sort(dim=-1, descending=True).values[:, K - 1 : K])
        return codes, codes @ s["decoder.weight"].T + s["b_dec"]
    centred = x if name == "JumpReluAutoEncoder" else x - s["b_dec"]
    after = relu(centred @ s["W_enc"] + s["b_enc"])
    codes = after * (after > s["threshold"])
    return codes, codes @ s["W_dec"] + s["b_dec"]


TRAINER = {"layer": 3, "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_3"}


def put(folder: Path, state: dict[str, Any], file: str = "ae.pt", config: Path | None = None, **trainer: Any) -> Place:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    if trainer:
        (config or folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out", "ctx_len": 128}}))
    return Place(folder)


def read(place: Place) -> Autoencoder:
    format = FORMATS.get("dictionary_learning")
    assert format.recognise(place)
    found = format.read(place)
    assert isinstance(found, Autoencoder)
    return found


def inputs(d: int = D) -> torch.Tensor:
    return draw(50, d, seed=9) * 2 + 0.5


def same(name: str, state: State, found: Dictionary, d: int = D) -> None:
    codes, x_hat = reference(name, state, inputs(d))
    torch.testing.assert_close(found.encode(inputs(d)).double(), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.reconstruct(inputs(d)).double(), x_hat, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", STATES)
def test_each_class(name: str, tmp_path: Path) -> None:
    sizes = {"activation_dim": D, "dict_size": F}
    found = read(put(tmp_path, STATES[name], dict_class=name, **sizes, **TRAINER))
    assert type(found) is KINDS[name] and found.hook_point == HOOK and found.model == "EleutherAI/pythia-70m-deduped"
    writer = found.details["writer"]
    assert found.details["format"] == "dictionary_learning"
    assert writer["dict_class"] == name and writer["buffer"]["ctx_len"] == 128
    same(name, STATES[name], found)


def test_topk_case_has_tokens_with_fewer_than_k_positive(tmp_path: Path) -> None:
    active = (reference("AutoEncoderTopK", STATES["AutoEncoderTopK"], inputs())[0] > 0).sum(-1)
    assert active.max() == K and active.min() < K


@pytest.mark.parametrize("name", sorted(set(STATES) - {"AutoEncoderTopK", "BatchTopKSAE"}))
def test_without_a_config_the_names_decide(name: str, tmp_path: Path) -> None:
    found = read(put(tmp_path, STATES[name]))
    assert type(found) is KINDS[name] and found.hook_point == found.model == ""
    same(name, STATES[name], found)


def test_names_of_two_classes_are_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match="AutoEncoderTopK or BatchTopKSAE") as caught:
        read(put(tmp_path, topk()))
    assert "dict_class" in caught.value.fix and "--format" in caught.value.fix


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderTopK"])
def test_a_square_sae_is_read_in_the_declared_layout(name: str, tmp_path: Path) -> None:
    state = {**STATES[name], **linear(8, 8), "encoder.bias": draw(8, seed=3)}
    state["bias" if name == "AutoEncoder" else "b_dec"] = draw(8, seed=4)
    same(name, state, read(put(tmp_path, state, dict_class=name)), 8)


def test_old_files_and_other_places(tmp_path: Path) -> None:
    bare = {key: value for key, value in topk().items() if key not in ("k", "threshold")}
    same("AutoEncoderTopK", topk(), read(put(tmp_path / "a", bare, dict_class="AutoEncoderTopK", k=K)))
    triton = {**topk(), "decoder": topk()["decoder.weight"].T.contiguous()}
    del triton["decoder.weight"]
    same("AutoEncoderTopK", topk(), read(put(tmp_path / "b", triton, dict_class="AutoEncoderTopK", k=K)))
    run = tmp_path / "run"
    put(run, topk(), "checkpoints/ae_500.pt", dict_class="BatchTopKSAE", k=K)
    same("BatchTopKSAE", topk(), read(Place(run)))
    same("BatchTopKSAE", topk(), read(Place(run / "checkpoints")))
    same("BatchTopKSAE", topk(), read(Place(run / "checkpoints" / "ae_500.pt")))
    (run / "checkpoints" / "ae_500.pt").rename(run / "renamed.pt")
    same("BatchTopKSAE", topk(), read(Place(run / "renamed.pt")))
    put(tmp_path / "runs" / "trainer_0", STATES["AutoEncoder"], dict_class="AutoEncoder")
    same("AutoEncoder", STATES["AutoEncoder"], read(Place(tmp_path / "runs")))
    put(tmp_path / "runs" / "trainer_1", STATES["AutoEncoder"], dict_class="AutoEncoder")
    with pytest.raises(DictionaryError, match="several SAEs: trainer_0/ae.pt, trainer_1/ae.pt"):
        read(Place(tmp_path / "runs"))


def test_files_of_others_are_not_recognised(tmp_path: Path) -> None:
    format = FORMATS.get("dictionary_learning")
    openai = {"pre_bias": torch.ones(D), "latent_bias": torch.ones(F), **linear()}
    put(tmp_path / "a", openai)
    torch.save(STATES["AutoEncoderNew"], tmp_path / "other.pt")
    assert not format.recognise(Place(tmp_path / "a")) and not format.recognise(Place(tmp_path / "other.pt"))
    (tmp_path / "config.json").write_text("{")
    assert not format.recognise(Place(tmp_path / "other.pt"))


@pytest.mark.parametrize(
    ("trainer", "io", "expected"),
    [
        ({"submodule_name": "resid_post_layer_8", "layer": 8}, "out", "blocks.8.hook_resid_post"),
        ({"submodule_name": "resid_post_layer_8", "layer": 7}, "out", ""),
        ({"submodule_name": "resid_post_layer_8"}, "in", ""),
        ({"submodule_name": "mlp_out_layer3", "layer": 3}, "out", "blocks.3.hook_mlp_out"),
        ({"submodule_name": "gpt_neox.layers.4"}, "in", "blocks.4.hook_resid_pre"),
        ({"submodule_name": "gpt_neox.layers.4"}, "", ""),
        ({"submodule_name": "something_layer_4"}, "out", ""),
        ({"submodule_name": None, "layer": 4}, "out", ""),
        ({"submodule_name": "blocks.1.mlp.hook_post"}, "", "blocks.1.mlp.hook_post"),
    ],
)
def test_hook_point_where_it_can_be_known(trainer: dict[str, Any], io: str, expected: str) -> None:
    assert hook_point(trainer, {"io": io} if io else {}) == expected


def without(name: str, *keys: str, **more: Any) -> dict[str, Any]:
    return {**{key: value for key, value in STATES[name].items() if key not in keys}, **more}


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a transposed encoder": (
        without("AutoEncoder", **{"encoder.weight": draw(D, F, seed=1)}),
        {"dict_class": "AutoEncoder"},
        "encoder.weight.*shape",
    ),
    "a transposed decoder": (
        without("JumpReluAutoEncoder", W_dec=draw(D, F, seed=1)),
        {"dict_class": "JumpReluAutoEncoder"},
        "W_dec.*shape",
    ),
    "another width": (STATES["AutoEncoder"], {"dict_class": "AutoEncoder", "activation_dim": D + 1}, "activation_dim = 7"),
    "another size": (STATES["AutoEncoder"], {"dict_class": "AutoEncoder", "dict_size": F + 1}, "dict_size = 11"),
    "a threshold never tracked": (topk(-1.0), {"dict_class": "BatchTopKSAE"}, "never tracked"),
    "no threshold": (without("BatchTopKSAE", "threshold"), {"dict_class": "BatchTopKSAE"}, "never tracked"),
    "no k": (without("AutoEncoderTopK", "k"), {"dict_class": "AutoEncoderTopK"}, "neither the file nor a config says k"),
    "two k": (topk(), {"dict_class": "AutoEncoderTopK", "k": K + 1}, "the config says k = 5, the file says 4"),
    "an impossible k": (
        without("AutoEncoderTopK", k=torch.tensor(F + 1)),
        {"dict_class": "AutoEncoderTopK"},
        "k = 11",
    ),
    "k is no number": (without("AutoEncoderTopK", k=torch.tensor(1.5)), {"dict_class": "AutoEncoderTopK"}, "no whole numbers"),
    "groups that do not add up": (
        without("MatryoshkaBatchTopKSAE", group_sizes=torch.tensor([2, 3])),
        {"dict_class": "MatryoshkaBatchTopKSAE"},
        "do not add up",
    ),
    "NaN": (without("AutoEncoder", bias=torch.full((D,), float("nan"))), {"dict_class": "AutoEncoder"}, "NaN"),
    "another class": (STATES["AutoEncoderNew"], {"dict_class": "AutoEncoder"}, "no decoder.bias"),
    "an unknown class": (STATES["AutoEncoder"], {"dict_class": "CrossCoder"}, "no dictionary_learning class 'CrossCoder'"),
    "a class of another type": (STATES["AutoEncoder"], {"dict_class": ["AutoEncoder"]}, "no dictionary_learning class"),
    "tensors of no class": (without("AutoEncoder", odd=torch.ones(1)), {}, "none of dictionary_learning's classes"),
}


@pytest.mark.parametrize("what", BAD)
def test_refusals_say_where_and_what_to_do(what: str, tmp_path: Path) -> None:
    state, trainer, message = BAD[what]
    with pytest.raises(DictionaryError, match=message) as caught:
        read(put(tmp_path, state, **trainer))
    assert str(tmp_path) in caught.value.where and caught.value.fix


def test_transcoders_are_refused(tmp_path: Path) -> None:
    place = put(tmp_path, STATES["AutoEncoder"])
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}, "buffer": {"io": "in_and_out"}}')
    with pytest.raises(DictionaryError, match="this is a transcoder"):
        read(place)


def ours(threshold: torch.Tensor | None = None) -> State:
    return {**plain(), **({} if threshold is None else {"threshold": threshold})}


SCALAR = torch.tensor(0.7)
GATED = {
    **{name: tensor for name, tensor in plain().items() if name != "b_enc"},
    **{name: draw(F, seed=seed) for seed, name in enumerate(("b_gate", "b_mag", "r_mag"), start=5)},
}
WHERE: dict[str, Any] = {"hook_point": HOOK, "model": "toy"}
WRITTEN: dict[str, tuple[Autoencoder, str]] = {
    "relu": (ReLU(ours(), **WHERE), "AutoEncoder"),
    "relu-new": (ReLU(ours(), Wiring(subtract_b_dec=False), hook_point="blocks.1.mlp.hook_post"), "AutoEncoderNew"),
    "gated": (Gated(GATED, **WHERE), "GatedAutoEncoder"),
    "topk": (TopK(ours(), K, **WHERE), "AutoEncoderTopK"),
    "batchtopk": (BatchTopK(ours(SCALAR), details={"trained": {"k": K}}, **WHERE), "BatchTopKSAE"),
    "matryoshka": (Matryoshka(ours(SCALAR), [2, 3, 5], details={"k": K}), "MatryoshkaBatchTopKSAE"),
    "jumprelu": (JumpReLU(ours(torch.linspace(0.1, 2.0, F)), Wiring(subtract_b_dec=False), **WHERE), "JumpReluAutoEncoder"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    dictionary, dict_class = WRITTEN[name]
    FORMATS.get("dictionary_learning").write(dictionary, tmp_path)
    assert set(torch.load(tmp_path / "ae.pt", weights_only=True)) == set(STATES[dict_class])
    assert json.loads((tmp_path / "config.json").read_text())["trainer"]["dict_class"] == dict_class
    back = read(Place(tmp_path))
    assert type(back) is type(dictionary) and back.identity == dictionary.identity and back.settings() == dictionary.settings()
    assert all(torch.equal(tensor, back.tensors()[key]) for key, tensor in dictionary.tensors().items())
    assert torch.equal(back.reconstruct(inputs()), dictionary.reconstruct(inputs()))


@pytest.mark.parametrize("name", STATES)
def test_a_file_of_the_library_is_written_as_it_was_read(name: str, tmp_path: Path) -> None:
    found = read(put(tmp_path / "a", STATES[name], dict_class=name, lr=0.001, k=K, **TRAINER))
    (tmp_path / "b").mkdir()
    FORMATS.get("dictionary_learning").write(found, tmp_path / "b")
    state = torch.load(tmp_path / "b" / "ae.pt", weights_only=True)
    assert set(state) == set(STATES[name]) and all(torch.equal(state[key], tensor) for key, tensor in STATES[name].items())
    assert {key: tensor.dtype for key, tensor in state.items()} == {key: tensor.dtype for key, tensor in STATES[name].items()}
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["trainer"]["lr"] == 0.001 and config["trainer"]["submodule_name"] == "resid_post_layer_3"
    assert config["buffer"] == {"io": "out", "ctx_len": 128}


REFUSED: dict[str, tuple[Dictionary, str]] = {
    "layer norm": (ReLU(ours(), Wiring(normalise="layer_norm")), "no 'relu' SAE with this setting"),
    "decoder norms": (TopK(ours(), K, Wiring(decoder_norm="codes")), "no 'topk' SAE with this setting"),
    "topk without b_dec": (TopK(ours(), K, Wiring(subtract_b_dec=False)), "no 'topk' SAE with this setting"),
    "jumprelu with b_dec": (JumpReLU(ours(torch.ones(F))), "no 'jumprelu' SAE with this setting"),
    "k unknown": (BatchTopK(ours(SCALAR)), "does not know the k"),
    "tied": (Tied(torch.eye(4), torch.zeros(4)), "no 'tied'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_library_cannot_compute_is_not_written(name: str, tmp_path: Path) -> None:
    dictionary, message = REFUSED[name]
    with pytest.raises(DictionaryError, match=message) as caught:
        FORMATS.get("dictionary_learning").write(dictionary, tmp_path)
    assert caught.value.fix and not list(tmp_path.iterdir())
