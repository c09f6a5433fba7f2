"""Each architecture computes its published function, under every wiring, as a float64 reference written token by token does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evalkit.dictionaries.autoencoder import Autoencoder, Wiring
from evalkit.dictionaries.batchtopk import BatchTopK
from evalkit.dictionaries.gated import Gated
from evalkit.dictionaries.jumprelu import JumpReLU
from evalkit.dictionaries.matryoshka import Matryoshka
from evalkit.dictionaries.relu import ReLU
from evalkit.dictionaries.storage import load_dictionary, save_dictionary
from evalkit.dictionaries.tied import Tied
from evalkit.dictionaries.topk import TopK
from evalkit.errors import DictionaryError

D, F, K = 6, 10, 3
GROUPS = [2, 3, 5]
OWN: dict[type[Autoencoder], dict[str, Any]] = {
    ReLU: {}, TopK: {"k": K}, BatchTopK: {}, JumpReLU: {}, Gated: {}, Matryoshka: {"groups": GROUPS},
}  # fmt: skip
NORMALISE = [("none", 1.0), ("constant", 0.25), ("token_norm", 1.0), ("layer_norm", 1.0)]
NORMS = ["none", "select", "codes"]
WIRINGS = [Wiring(s, name, scale, norm) for s, (name, scale), norm in itertools.product([True, False], NORMALISE, NORMS)]


def tensors(kind: type[Autoencoder]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = {"D": D, "F": F}
    shapes = {name: tuple(sizes[letter] for letter in letters.split()) for name, letters in kind.layout.items()}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if "threshold" in found:
        found["threshold"] = found["threshold"].abs()
    return found


def build(kind: type[Autoencoder], wiring: Wiring | None = None, **changed: torch.Tensor) -> Autoencoder:
    return kind({**tensors(kind), **changed}, wiring=wiring, **OWN[kind])


def reference(kind: type[Autoencoder], wiring: Wiring, token: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (F,) and reconstruction (D,) of one token (D,), in float64, one feature at a time."""
    w = {name: tensor.double().numpy() for name, tensor in tensors(kind).items()}
    length, mean, deviation = np.sqrt((token**2).sum()), token.mean(), np.sqrt(((token - token.mean()) ** 2).sum() / (D - 1))
    read = {
        "none": token,
        "constant": token * wiring.scale,
        "token_norm": token * np.sqrt(D) / length,
        "layer_norm": (token - mean) / (deviation + 1e-5),
    }[wiring.normalise]
    if wiring.subtract_b_dec:
        read = read - w["b_dec"]
    codes, norms, pre = np.zeros(F), np.ones(F), np.zeros(F)
    for f in range(F):
        norms[f] = np.sqrt((w["W_dec"][f] ** 2).sum()) if wiring.decoder_norm != "none" else 1.0
        projected = sum(read[i] * w["W_enc"][i, f] for i in range(D))
        if kind is Gated:
            opened = projected + w["b_gate"][f] > 0
            codes[f] = max(0.0, np.exp(w["r_mag"][f]) * projected + w["b_mag"][f]) if opened else 0.0
            continue
        pre[f] = (projected + w["b_enc"][f]) * norms[f]
        if kind is ReLU:
            codes[f] = max(0.0, pre[f])
        elif kind is not TopK:
            threshold = w["threshold"][f] if kind is JumpReLU else float(w["threshold"])
            codes[f] = pre[f] if pre[f] > threshold else 0.0
    if kind is TopK:
        for f in sorted(range(F), key=lambda f: -pre[f])[:K]:
            codes[f] = max(0.0, pre[f])
    if wiring.decoder_norm == "select":
        codes = codes / norms
    written = codes / norms if wiring.decoder_norm == "codes" else codes
    x_hat = w["b_dec"] + sum(written[f] * w["W_dec"][f] for f in range(F))
    undone = {
        "none": x_hat,
        "constant": x_hat / wiring.scale,
        "token_norm": x_hat * length / np.sqrt(D),
        "layer_norm": x_hat * deviation + mean,
    }[wiring.normalise]
    return codes, undone


def named(wiring: Wiring) -> str:
    return f"{wiring.normalise}-{wiring.decoder_norm}-{'centred' if wiring.subtract_b_dec else 'raw'}"


@pytest.mark.parametrize("wiring", WIRINGS, ids=named)
@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.kind)
def test_the_function_is_the_published_one(kind: type[Autoencoder], wiring: Wiring) -> None:
    if kind is Gated and wiring.decoder_norm != "none":
        with pytest.raises(DictionaryError, match="not scaled by decoder norms"):
            build(kind, wiring)
        return
    d = build(kind, wiring)
    x = 3 * torch.randn(8, D, generator=torch.Generator().manual_seed(8)) + 1
    expected = [reference(kind, wiring, token) for token in x.double().numpy()]
    codes, x_hat = np.stack([codes for codes, _ in expected]), np.stack([x_hat for _, x_hat in expected])
    assert (codes > 0).any() and (codes == 0).any()
    assert np.allclose(d.encode(x).numpy(), codes, rtol=1e-4, atol=1e-4)
    assert np.allclose(d.reconstruct(x).numpy(), x_hat, rtol=1e-4, atol=1e-3)
    assert d.wiring == wiring and type(d).build(d.tensors(), d.settings()).wiring == wiring


@pytest.mark.parametrize("centred", [False, True])
def test_tied_is_the_papers_formula(centred: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    M = torch.nn.functional.normalize(torch.randn(9, D, generator=generator), dim=1)
    b, centre = torch.randn(9, generator=generator), torch.randn(D, generator=generator)
    d, x = Tied(M, b, centre if centred else None), torch.randn(20, D, generator=generator)
    shift = centre.double().numpy() if centred else np.zeros(D)
    c = np.maximum(0, (x.double().numpy() - shift) @ M.double().numpy().T + b.double().numpy())
    assert np.allclose(d.encode(x).numpy(), c, atol=1e-5)
    assert np.allclose(d.reconstruct(x).numpy(), c @ M.double().numpy() + shift, atol=1e-4)


def test_topk_keeps_k_and_no_negative_code() -> None:
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    assert int((build(TopK).encode(x) > 0).sum(1).max()) == K == build(TopK).encode_sparse(x).values.shape[1]
    assert not build(TopK, b_enc=torch.full((F,), -100.0)).encode(x).any()


@pytest.mark.parametrize("k", [0, -1, F + 1, True])
def test_an_impossible_k_is_refused(k: Any) -> None:
    with pytest.raises(DictionaryError, match="not a number of active features") as caught:
        TopK(tensors(TopK), k)
    assert str(F) in caught.value.fix


@pytest.mark.parametrize("wiring", [Wiring(), Wiring(subtract_b_dec=False, decoder_norm="codes")])
def test_one_threshold_for_all_is_the_jumprelu_whose_thresholds_are_equal(wiring: Wiring) -> None:
    batchtopk, matryoshka = build(BatchTopK, wiring), build(Matryoshka, wiring)
    shared = {name: tensor for name, tensor in batchtopk.tensors().items() if name != "threshold"}
    threshold = batchtopk.tensors()["threshold"]
    jumprelu = JumpReLU({**shared, "threshold": threshold.repeat(F)}, wiring)
    assert batchtopk.identity.hash == matryoshka.identity.hash == jumprelu.identity.hash
    assert (batchtopk.identity.kind, matryoshka.identity.kind) == ("batchtopk", "matryoshka")
    x = torch.randn(30, D, generator=torch.Generator().manual_seed(4))
    assert torch.equal(batchtopk.encode(x), jumprelu.encode(x))
    assert torch.equal(matryoshka.reconstruct(x), jumprelu.reconstruct(x))
    uneven = threshold.repeat(F)
    uneven[0] += 0.1
    assert JumpReLU({**shared, "threshold": uneven}, wiring).identity.hash != batchtopk.identity.hash


def test_a_code_at_its_threshold_is_off() -> None:
    unit = {"W_enc": torch.eye(D), "b_enc": torch.zeros(D), "W_dec": torch.eye(D), "b_dec": torch.zeros(D)}
    x = torch.tensor([0.5, 0.75, 0.25, -1.0, 0.0, 0.5])
    expected = torch.tensor([0.0, 0.75, 0.0, 0.0, 0.0, 0.0])
    assert torch.equal(JumpReLU({**unit, "threshold": torch.full((D,), 0.5)}).encode(x), expected)
    assert torch.equal(BatchTopK({**unit, "threshold": torch.tensor(0.5)}).encode(x), expected)


@pytest.mark.parametrize("kind", [BatchTopK, Matryoshka])
def test_a_threshold_that_was_never_tracked_is_refused(kind: type[Autoencoder]) -> None:
    with pytest.raises(DictionaryError, match="never tracked") as caught:
        build(kind, threshold=torch.tensor(-1.0))
    assert caught.value.where == "threshold" and caught.value.fix
    assert build(kind, threshold=torch.tensor(0.0)).encode(torch.ones(D)).shape == (F,)


def test_nested_dictionaries_use_the_first_groups_alone() -> None:
    whole = build(Matryoshka)
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(6))
    assert isinstance(whole, Matryoshka)
    for groups, features in enumerate(np.cumsum(GROUPS).tolist(), start=1):
        nested = whole.nested(groups)
        assert nested.n_features == features and nested.groups == GROUPS[:groups] and nested.details["nested"] == groups
        codes = whole.encode(x)
        assert torch.allclose(nested.encode(x), codes[:, :features], atol=1e-5)
        codes[:, features:] = 0
        assert torch.allclose(nested.reconstruct(x), whole.decode(codes), atol=1e-4)
    assert whole.nested(len(GROUPS)).identity.hash == whole.identity.hash != whole.nested(1).identity.hash
    for impossible in (0, len(GROUPS) + 1):
        with pytest.raises(DictionaryError, match="groups"):
            whole.nested(impossible)
    for groups in ([2, 3, 4], [10, 0], [], [11, -1]):
        with pytest.raises(DictionaryError, match="do not add up"):
            Matryoshka(tensors(Matryoshka), groups)


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.kind)
def test_impossible_weights_are_refused_by_name(kind: type[Autoencoder]) -> None:
    for name, tensor in tensors(kind).items():
        bad = {
            "not a number": torch.full_like(tensor, float("nan")),
            "infinite": torch.full_like(tensor, float("inf")),
            "whole numbers": torch.ones_like(tensor, dtype=torch.int64),
            "of another shape": torch.ones(*tensor.shape, 2),
        }
        for what, replaced in bad.items():
            with pytest.raises(DictionaryError) as caught:
                build(kind, **{name: replaced})
            assert caught.value.where == name, what
        with pytest.raises(DictionaryError, match=f"lack the tensor '{name}'"):
            kind({key: t for key, t in tensors(kind).items() if key != name}, **OWN[kind])
    with pytest.raises(DictionaryError, match="has shape"):
        build(kind, W_dec=tensors(kind)["W_dec"].T.contiguous())
    with pytest.raises(DictionaryError, match="no tensor 'W_skip'"):
        build(kind, W_skip=torch.ones(D, D))


def test_a_tied_row_that_is_not_of_unit_length_is_refused() -> None:
    with pytest.raises(DictionaryError, match="unit length"):
        Tied(torch.ones(4, D), torch.ones(4))


@pytest.mark.parametrize(
    "wrong",
    [
        {"normalise": "constant", "scale": 0.0},
        {"normalise": "constant", "scale": float("inf")},
        {"normalise": "constant", "scale": float("nan")},
        {"scale": 2.0},
    ],
)
def test_an_impossible_scale_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DictionaryError):
        Wiring(**wrong)


def test_many_active_features_are_written_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary read without its normalisation can have most features active: then the dense product is taken, in parts."""
    monkeypatch.setattr("evalkit.dictionaries.base.WIDE", F)
    monkeypatch.setattr("evalkit.util.batching.MOST", 3 * F)
    x = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(5))
    dense: list[int] = []
    for kind, wiring in itertools.product(
        (ReLU, TopK), (Wiring(), Wiring(normalise="constant", scale=0.25, decoder_norm="codes"))
    ):
        dictionary = kind.build(tensors(kind), {**({"k": K} if kind is TopK else {}), **wiring.changed()})
        codes = dictionary.encode_sparse(x)
        dictionary.decode_sparse(codes)  # what is written without any code is computed once
        decode = dictionary.decode
        monkeypatch.setattr(dictionary, "decode", lambda c, decode=decode: dense.append(c.ndim and len(c)) or decode(c))
        written = dictionary.decode_sparse(codes)
        torch.testing.assert_close(written, decode(dictionary.encode(x)), rtol=1e-5, atol=1e-5)
        monkeypatch.setattr("evalkit.dictionaries.base.WIDE", F + 1)
        seen = len(dense)
        torch.testing.assert_close(dictionary.decode_sparse(codes), written, rtol=1e-5, atol=1e-5)
        assert len(dense) == seen  # few: from the active directions only
        monkeypatch.setattr("evalkit.dictionaries.base.WIDE", F)
    assert dense and max(dense) <= 3


@pytest.mark.parametrize("groups", ["ab", 5, None, [10.0], [[1]], [4, -1, 7], [0, 10], [4, 5]])
def test_groups_that_are_no_sizes_are_refused(groups: Any) -> None:
    with pytest.raises(DictionaryError, match="do not add up"):
        Matryoshka.build(tensors(Matryoshka), {"groups": groups})


def test_a_card_that_python_cannot_follow_and_details_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    folder = save_dictionary(ReLU(tensors(ReLU)), tmp_path / "a")
    (folder / "dictionary.json").write_text("[" * 100_000)
    with pytest.raises(DictionaryError, match="not JSON"):
        load_dictionary(folder)
    with pytest.raises(DictionaryError, match="cannot be written as JSON"):
        save_dictionary(ReLU(tensors(ReLU), details={"lr": float("inf")}), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_settings_that_change_nothing_are_not_in_the_identity() -> None:
    zero = {"b_dec": torch.zeros(D)}
    assert build(ReLU, **zero).identity.hash == build(ReLU, Wiring(subtract_b_dec=False), **zero).identity.hash
    assert build(ReLU).identity.hash != build(ReLU, Wiring(subtract_b_dec=False)).identity.hash
    relu = ReLU({name: tensor for name, tensor in tensors(JumpReLU).items() if name != "threshold"})
    assert build(JumpReLU, threshold=torch.zeros(F)).identity.hash == relu.identity.hash
    assert build(JumpReLU).identity.hash != relu.identity.hash
    off = BatchTopK({**relu.tensors(), "threshold": torch.tensor(0.0)})
    assert off.identity.hash == relu.identity.hash


@pytest.mark.parametrize("kind", OWN)
def test_one_feature_is_read_as_among_all(kind: type[Autoencoder]) -> None:
    dictionary = build(kind, Wiring(normalise="layer_norm"))
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(1))
    codes = dictionary.encode(x)
    for feature in (0, F - 1, 4, 0):
        assert torch.allclose(dictionary.encode_feature(x, feature), codes[:, feature], atol=1e-5)
