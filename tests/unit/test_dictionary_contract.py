"""Every registered kind of dictionary, in every form it has, keeps the contract of ``dictionaries.base``.

A new kind has to join: give it its forms in ``VARIANTS``, and in ``changed`` another value of each setting it brings.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evalkit.dictionaries import base
from evalkit.dictionaries.autoencoder import Autoencoder, Wiring
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.batchtopk import BatchTopK
from evalkit.dictionaries.gated import Gated
from evalkit.dictionaries.jumprelu import JumpReLU
from evalkit.dictionaries.matryoshka import Matryoshka
from evalkit.dictionaries.registry import BASELINES, DICTIONARIES
from evalkit.dictionaries.relu import ReLU
from evalkit.dictionaries.storage import load_dictionary, save_dictionary
from evalkit.dictionaries.tied import Tied
from evalkit.dictionaries.topk import TopK
from evalkit.errors import DictionaryError
from evalkit.interventions.hooks import scale
from evalkit.util.progress import Progress

D, F = 7, 12
WHERE: dict[str, Any] = {"hook_point": "blocks.1.hook_resid_post", "model": "toy"}
Make = Callable[..., Dictionary]


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(n: int, d: int = D, seed: int = 0) -> torch.Tensor:
    return draw(n, d, seed=seed) @ draw(d, d, seed=seed + 1) + 2.0


def weights(d: int, features: int, rare: float) -> dict[str, torch.Tensor]:
    """An autoencoder's weights; ``rare`` is subtracted from what features read."""
    W_enc, W_dec = draw(d, features, seed=1), draw(features, d, seed=2)
    return {"W_enc": W_enc, "b_enc": draw(features, seed=3) - rare, "W_dec": W_dec, "b_dec": draw(d, seed=4)}


def autoencoder(
    kind: type[Autoencoder], wiring: Wiring | None = None, d: int = D, features: int = F, rare: float = 0.0
) -> Dictionary:
    tensors = weights(d, features, rare)
    own: dict[str, Any] = {}
    if kind is TopK:
        own = {"k": 3}
    elif kind is Gated:
        bias = tensors.pop("b_enc")
        tensors |= {"b_gate": bias, "r_mag": draw(features, seed=5, scale=0.3), "b_mag": bias + 0.1}
    elif kind is JumpReLU:
        tensors["threshold"] = draw(features, seed=6).abs()
    elif issubclass(kind, BatchTopK):
        tensors["threshold"] = torch.tensor(0.4)
        own = {"groups": [features // 2, features - features // 2]} if kind is Matryoshka else {}
    return kind(tensors, wiring=wiring, details={"note": "é"}, **own, **WHERE)


def tied(centre: bool, d: int = D, features: int = F, rare: float = 0.0) -> Dictionary:
    M = torch.nn.functional.normalize(draw(features, d, seed=1), dim=1)
    return Tied(M, draw(features, seed=2) - rare, draw(d, seed=3) if centre else None, **WHERE)


def fitted(name: str, d: int = D, **config: Any) -> Dictionary:
    x = activations(40 * d, d)
    return BASELINES.get(name).fit(x, seed=0, progress=Progress(quiet=True), **WHERE, **config)


def wirings(kind: type[Autoencoder]) -> list[Wiring]:
    normalise = [("none", 1.0), ("constant", 0.3), ("token_norm", 1.0), ("layer_norm", 1.0)]
    norms = ["none"] if kind is Gated else ["none", "select", "codes"]
    every = [Wiring(s, name, scale, norm) for s, (name, scale), norm in itertools.product([True, False], normalise, norms)]
    return every + [
        Wiring(s, name, scale, centre=True) for s, (name, scale) in zip([True, False, True], normalise[:3], strict=True)
    ]


AUTOENCODERS: dict[str, type[Autoencoder]] = {kind.kind: kind for kind in (ReLU, TopK, BatchTopK, JumpReLU, Gated, Matryoshka)}
VARIANTS: dict[str, list[Make]] = {
    **{name: [functools.partial(autoencoder, kind, w) for w in wirings(kind)] for name, kind in AUTOENCODERS.items()},
    "tied": [functools.partial(tied, False), functools.partial(tied, True)],
    "pca": [
        functools.partial(fitted, "pca", **config)
        for config in (
            {},
            {"components": 3},
            {"centred": False},
            {"split": True},
            {"top_k": 2},
            {"components": 5, "centred": False, "split": True, "top_k": 3},
        )
    ],
    "ica": [
        functools.partial(fitted, "ica", components=4, **config)
        for config in (
            {},
            {"orient": "published"},
            {"split": True},
            {"top_k": 2},
            {"orient": "published", "top_k": 2},
            {"split": True, "top_k": 2},
        )
    ],
    "neurons": [
        functools.partial(fitted, "neurons", **config)
        for config in (
            {},
            {"rectified": False},
            {"split": True},
            {"top_k": 3},
            {"rectified": False, "top_k": 3},
            {"split": True, "top_k": 5},
        )
    ],
    "random": [
        functools.partial(fitted, "random", **config)
        for config in (
            {},
            {"features": F, "normalised": True},
            {"rectified": False},
            {"split": True},
            {"top_k": 2},
            {"rectified": False, "top_k": 2},
            {"features": F, "split": True, "top_k": 2},
        )
    ],
    "rotation": [
        functools.partial(fitted, "rotation", **config)
        for config in ({}, {"rectified": True}, {"split": True}, {"top_k": 3}, {"split": True, "top_k": 5})
    ],
    "nmf": [functools.partial(fitted, "nmf", components=5, **config) for config in ({}, {"top_k": 2}, {"steps": 30})],
    "identity": [functools.partial(fitted, "identity")],
    "mean": [functools.partial(fitted, "mean")],
}
KINDS = sorted(VARIANTS)
ALL = [(kind, number) for kind in KINDS for number in range(len(VARIANTS[kind]))]


@functools.cache
def made(kind: str, number: int) -> Dictionary:
    return VARIANTS[kind][number]()


def dense(codes: base.SparseCodes, features: int) -> torch.Tensor:
    return codes.values.new_zeros(*codes.values.shape[:-1], features).scatter_add_(-1, codes.indices, codes.values)


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    size = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * max(1.0, size))


def check(d: Dictionary, x: torch.Tensor) -> None:
    """The contract on one input."""
    batch = x.shape[:-1]
    codes, sparse, x_hat = d.encode(x), d.encode_sparse(x), d.reconstruct(x)
    assert codes.shape == (*batch, d.n_features) and x_hat.shape == x.shape
    assert d.directions.shape == (d.n_features, d.d_in) and d.d_in == D
    assert codes.dtype == x_hat.dtype == sparse.values.dtype == d.directions.dtype == torch.float32
    assert torch.isfinite(codes).all() and torch.isfinite(x_hat).all()
    assert d.signed or bool((codes >= 0).all())
    assert d.encoders is None or d.encoders.shape == d.directions.shape

    assert sparse.values.shape == sparse.indices.shape == (*batch, sparse.values.shape[-1])
    close(dense(sparse, d.n_features), codes, 1e-5)
    assert bool((sparse.indices[sparse.values == 0] == 0).all())
    assert d.signed or bool((sparse.values >= 0).all())

    decoded = d.decode(codes)
    close(d.decode_sparse(sparse), decoded)
    close(x_hat, d.restore(decoded, x))
    for feature in (0, d.n_features - 1):
        close(d.encode_feature(x, feature), codes[..., feature], 1e-5)
    if codes.numel():
        step = codes[(0,) * len(batch)] + torch.eye(d.n_features)  # (F, F): one more unit of each feature
        close(d.decode(step) - d.decode(codes[(0,) * len(batch)]), d.directions)


def test_every_registered_kind_joins() -> None:
    assert set(DICTIONARIES.names()) == set(VARIANTS), "give the new kind its forms in VARIANTS"
    assert all(made(kind, 0).kind == kind and type(made(kind, 0)) is DICTIONARIES.get(kind) for kind in KINDS)


@pytest.mark.filterwarnings("ignore:std.+degrees of freedom:UserWarning")  # torch says so of an empty batch
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_batch_of_any_type(kind: str, data: st.DataObject) -> None:
    d = made(kind, data.draw(st.integers(0, len(VARIANTS[kind]) - 1), "form"))
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3), "batch")
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), "dtype")
    seed = data.draw(st.integers(0, 1000), "seed")
    x = draw(*shape, D, seed=seed, scale=data.draw(st.sampled_from([0.1, 1.0, 20.0]), "scale")).to(dtype)
    check(d, x)
    assert torch.equal(d.encode(x), d.encode(x.float()))


@pytest.mark.parametrize(("kind", "number"), ALL)
def test_every_form(kind: str, number: int) -> None:
    d, x = made(kind, number), activations(12, seed=7)
    before = x.clone()
    check(d, x.reshape(3, 4, D))
    values = d.encode_sparse(x).values
    assert bool((values.abs().diff(dim=-1) <= 1e-6).all()) or "decoder_norm" in d.settings()  # largest first
    d.encode(x).add_(1)
    d.reconstruct(x).add_(1)
    assert torch.equal(x, before)  # what is returned is the caller's, and the input is left alone


@pytest.mark.parametrize(("kind", "number"), ALL)
def test_how_tokens_are_batched_changes_nothing(kind: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    d, x = made(kind, number), activations(9, seed=11)
    codes, x_hat = d.encode(x), d.reconstruct(x)
    close(torch.cat([d.encode(x[:4]), d.encode(x[4:])]), codes, 1e-5)
    close(torch.stack([d.encode(token) for token in x]), codes, 1e-5)
    close(d.reconstruct(x.reshape(3, 3, D)).reshape(9, D), x_hat)
    monkeypatch.setattr("evalkit.util.batching.MOST", 2 * d.n_features)
    close(dense(d.encode_sparse(x), d.n_features), codes, 1e-5)


@pytest.mark.parametrize(("kind", "number"), ALL)
def test_another_width_is_refused(kind: str, number: int) -> None:
    d = made(kind, number)
    for width in (D - 1, D + 1):
        for function in (d.encode, d.encode_sparse, d.reconstruct):
            with pytest.raises(DictionaryError, match=f"width {D}, not {width}"):
                function(torch.ones(2, width))


def changed(name: str, value: Any) -> dict[str, Any]:
    """Another value of a setting, with what else has to change then."""
    match name:
        case "k" | "top_k" | "steps":
            return {name: value - 1}
        case "rectified" | "split" | "subtract_b_dec" | "centre":
            return {name: not value}
        case "normalise":
            return {"normalise": "layer_norm" if value != "layer_norm" else "token_norm", "scale": 1.0}
        case "scale":
            return {"scale": 2 * value}
        case "decoder_norm":
            return {"decoder_norm": "select" if value == "codes" else "codes"}
    raise AssertionError(f"give another value of the setting '{name}'")


UNHASHED = {"groups"}
"""Settings that do not take part in the function: the identity is that of another kind."""


@pytest.mark.parametrize(("kind", "number"), ALL)
def test_identity_is_that_of_the_function(kind: str, number: int) -> None:
    d = made(kind, number)
    tensors, config = d.tensors(), d.settings()
    again = type(d).build({name: t.clone() for name, t in tensors.items()}, dict(config), details={"other": 1})
    assert again.identity.hash == d.identity.hash and (d.identity.hook_point, d.identity.model) == tuple(WHERE.values())
    for name in tensors:
        other = {key: t.clone() for key, t in tensors.items()}
        other[name].view(-1)[0] += 1e-4
        assert type(d).build(other, config).identity.hash != d.identity.hash, name
    for name, value in config.items():
        if name in UNHASHED or (name == "rectified" and config.get("split")):  # a split is always rectified
            continue
        assert type(d).build(tensors, {**config, **changed(name, value)}).identity.hash != d.identity.hash, name


@pytest.mark.parametrize("kind", KINDS)
def test_forms_differ_in_identity(kind: str) -> None:
    hashes = {made(kind, number).identity.hash for number in range(len(VARIANTS[kind]))}
    assert len(hashes) == len(VARIANTS[kind])


@pytest.mark.parametrize(("kind", "number"), ALL)
def test_a_saved_dictionary_comes_back_exactly(kind: str, number: int, tmp_path) -> None:
    d, x = made(kind, number), activations(6, seed=13)
    loaded = load_dictionary(save_dictionary(d, tmp_path / "d"))
    assert type(loaded) is type(d) and loaded.identity == d.identity
    assert loaded.settings() == d.settings() and loaded.details == d.details
    assert (loaded.signed, loaded.sparse, loaded.n_features) == (d.signed, d.sparse, d.n_features)
    assert all(torch.equal(loaded.tensors()[name], tensor) for name, tensor in d.tensors().items())
    assert torch.equal(loaded.encode(x), d.encode(x)) and torch.equal(loaded.reconstruct(x), d.reconstruct(x))


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that an operation returned, views of the input aside."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.input, self.entries = x.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() != self.input:
                self.entries = max(self.entries, leaf.numel())
        return out


WIDE = {
    **{name: functools.partial(autoencoder, kind, None, 24, 60, 15.0) for name, kind in AUTOENCODERS.items()},
    "topk, selected by norm": functools.partial(autoencoder, TopK, Wiring(decoder_norm="select"), 24, 60),
    "tied": functools.partial(tied, False, 24, 60, 4.0),
    **{name: functools.partial(fitted, name, 24, top_k=2) for name in ("pca", "neurons", "random", "rotation")},
    "nmf": functools.partial(fitted, "nmf", 24, top_k=2, steps=10),
    "ica": functools.partial(fitted, "ica", 24, top_k=2, orient="published"),
    "pca, split": functools.partial(fitted, "pca", 24, top_k=2, split=True),
}


def test_every_sparse_kind_is_held_to_its_memory() -> None:
    assert {kind for kind, number in ALL if made(kind, number).sparse} == {make().kind for make in WIDE.values()}


@pytest.mark.parametrize("name", sorted(WIDE))
def test_sparse_codes_are_made_without_a_dense_array(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    d, x = WIDE[name](), draw(600, 24, seed=3)
    everything = len(x) * d.n_features
    with Largest(x) as whole:
        codes = d.encode(x)
    assert whole.entries >= everything and d.sparse and bool(codes.any())
    monkeypatch.setattr("evalkit.util.batching.MOST", 20 * d.n_features)
    with Largest(x) as blocks:
        sparse = d.encode_sparse(x)
    kept = sparse.values.shape[-1]
    assert kept < d.n_features / 4
    assert blocks.entries <= max(20 * d.n_features, len(x) * kept)
    close(dense(sparse, d.n_features), codes, 1e-5)


def edited(d: Dictionary, x: torch.Tensor, level: float | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every (token, feature) that fires, the token without the feature, or with its code at ``level``, and the feature's code
    before."""
    codes = d.encode(x)
    token, feature = codes.nonzero(as_tuple=True)
    own = codes[token, feature]
    unit = scale(d, x)[token]
    amount = (0.0 if level is None else level) - own
    return feature, x[token] + amount[:, None] * unit * d.edit_directions[feature], own


@pytest.mark.parametrize(("kind", "number"), ALL)
def test_an_ablated_feature_is_gone_and_a_clamped_one_has_its_value(kind: str, number: int) -> None:
    d, x = made(kind, number), activations(40, seed=17)
    feature, without, own = edited(d, x)
    if kind == "mean":
        assert not len(feature)
        return
    assert len(feature) > 20
    if kind in AUTOENCODERS or kind == "nmf":  # what they write is what was trained, and nothing of it stays
        kept = d.encode(x)
        token = kept.nonzero(as_tuple=True)[0]
        rest = kept[token].scatter(-1, feature[:, None], 0.0)
        close(without - x[token], scale(d, x)[token] * (d.decode(rest) - d.decode(kept[token])))
        return
    size = float(own.abs().max())
    read = d.encode(without).gather(-1, feature[:, None])[:, 0]
    assert float(read.abs().max()) < 1e-4 * size
    if d.sparse and kind == "random":  # their directions are not orthogonal: raising one may let others outdo it
        return
    high = 3 * size
    _, clamped, _ = edited(d, x, high)
    close(d.encode(clamped).gather(-1, feature[:, None])[:, 0], torch.full_like(own, high))


def test_the_fitted_gain_is_in_no_edit() -> None:
    """A rectified neuron is set to 0; of a random direction its projection goes, not a gain's share of it."""
    neurons, x = fitted("neurons"), activations(30, seed=19)
    assert abs(neurons.details["gain"] - 1) > 0.02
    feature, without, _ = edited(neurons, x)
    assert float(without.gather(-1, feature[:, None]).abs().max()) < 1e-5
    for config in ({}, {"rectified": False}, {"split": True}):
        random = fitted("random", **config)
        rows = random.encoders
        feature, without, _ = edited(random, x)
        assert float((without * rows[feature]).sum(-1).abs().max()) < 1e-3
