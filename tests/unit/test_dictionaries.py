"""Every kind keeps the contract, and every baseline equals a computation by another library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as SklearnPCA

from evalkit.dictionaries import ica as ica_module
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.controls import Mean
from evalkit.dictionaries.fitting import moments, read_out, sample
from evalkit.dictionaries.registry import BASELINES, DICTIONARIES
from evalkit.dictionaries.tied import Tied
from evalkit.dictionaries.topk import TopK
from evalkit.errors import DictionaryError
from evalkit.progress import Progress

D = 7
WHERE = {"hook_point": "blocks.1.hook_resid_post", "model": "toy"}


def data(n: int = 400, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator) @ torch.randn(D, D, generator=generator) + 2.0


def fit(name: str, x: torch.Tensor | np.ndarray | None = None, seed: int = 0, **settings: object) -> Dictionary:
    baseline = BASELINES.get(name)
    return baseline.fit(data() if x is None else x, seed=seed, progress=Progress(quiet=True), **WHERE, **settings)


def topk(features: int = 11, k: int = 3) -> TopK:
    generator = torch.Generator().manual_seed(1)
    W_enc, W_dec = torch.randn(D, features, generator=generator), torch.randn(features, D, generator=generator)
    b_enc, b_dec = torch.randn(features, generator=generator), torch.randn(D, generator=generator)
    return TopK({"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}, k, **WHERE)


def ones() -> dict[str, torch.Tensor]:
    return {"W_enc": torch.ones(D, 4), "b_enc": torch.ones(4), "W_dec": torch.ones(4, D), "b_dec": torch.ones(D)}


def tied(centre: bool = False) -> Tied:
    generator = torch.Generator().manual_seed(2)
    M = torch.nn.functional.normalize(torch.randn(9, D, generator=generator), dim=1)
    b = torch.randn(9, generator=generator)
    return Tied(M, b, torch.randn(D, generator=generator) if centre else None, **WHERE)


ZOO = {
    "topk": topk,
    "topk-cut": lambda: topk(11, 9),
    "tied": tied,
    "tied-centred": lambda: tied(True),
    "pca": lambda: fit("pca"),
    "pca-3": lambda: fit("pca", components=3),
    "pca-published": lambda: fit("pca", components=3, centred=False),
    "ica": lambda: fit("ica", components=4),
    "ica-published": lambda: fit("ica", components=4, orient="published"),
    "neurons": lambda: fit("neurons"),
    "neurons-signed": lambda: fit("neurons", rectified=False),
    "random": lambda: fit("random"),
    "random-normalised": lambda: fit("random", features=12, normalised=True),
    "identity": lambda: fit("identity"),
    "mean": lambda: fit("mean"),
}


@pytest.fixture(params=sorted(ZOO))
def any_dictionary(request: pytest.FixtureRequest) -> Dictionary:
    return ZOO[request.param]()


def test_every_registered_kind_is_tested_here() -> None:
    assert {make().kind for make in ZOO.values()} == set(DICTIONARIES.names())


def test_the_contract(any_dictionary: Dictionary) -> None:
    d, x = any_dictionary, data(20, seed=5).reshape(4, 5, D)
    F = d.n_features
    codes = d.encode(x)
    assert codes.shape == (4, 5, F) and d.directions.shape == (F, D) and d.d_in == D
    assert d.identity.kind == d.kind and d.identity.hook_point == WHERE["hook_point"]
    assert torch.allclose(d.reconstruct(x), d.decode(codes), atol=1e-4)
    if not d.signed:
        assert (codes >= 0).all()

    step = torch.eye(F)[:, None, None] + codes  # (F, 4, 5, F): one more unit of each feature
    assert torch.allclose(d.decode(step) - d.decode(codes), d.directions[:, None, None].expand(F, 4, 5, D), atol=1e-3)

    values, indices = d.encode_sparse(x)
    assert torch.equal(values == 0, values * (indices + 1) == 0) and (indices[values == 0] == 0).all()
    assert torch.allclose(torch.zeros_like(codes).scatter_add_(-1, indices, values), codes)
    assert (values.abs().diff(dim=-1) <= 0).all()


def test_encoding_leaves_its_input_alone(any_dictionary: Dictionary) -> None:
    x = data(10)
    before = x.clone()
    any_dictionary.reconstruct(x).add_(1)
    any_dictionary.encode(x).add_(1)
    assert torch.equal(x, before)


def test_topk_equals_a_dense_float64_computation() -> None:
    d, x = topk(), data(50)
    W_enc, b_enc, W_dec, b_dec = (t.double() for t in d.tensors().values())
    pre = (x.double() - b_dec) @ W_enc + b_enc
    rank = pre.argsort(dim=1, descending=True).argsort(dim=1)
    codes = torch.where(rank < 3, pre.clamp(min=0), 0.0)
    assert torch.allclose(d.encode(x).double(), codes, atol=1e-4)
    assert torch.allclose(d.reconstruct(x).double(), codes @ W_dec + b_dec, atol=1e-4)
    assert d.encode_sparse(x).values.shape == (50, 3)


def test_tied_is_the_papers_formula() -> None:
    d, x = tied(), data(30)
    c = torch.relu(torch.einsum("fd,nd->nf", d.M, x) + d.b)
    assert torch.allclose(d.encode(x), c, atol=1e-5)
    assert torch.allclose(d.reconstruct(x), torch.einsum("fd,nf->nd", d.M, c), atol=1e-4)
    centred = tied(True)
    assert torch.allclose(centred.encode(x), tied().encode(x - centred.centre), atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopK({**ones(), "W_dec": torch.ones(4, D + 1)}, 2),
        lambda: TopK(ones(), 5),
        lambda: TopK({**ones(), "W_enc": torch.full((D, 4), float("nan"))}, 2),
        lambda: TopK({**ones(), "W_enc": torch.ones(D, 4, dtype=torch.int64)}, 2),
        lambda: Tied(torch.ones(4, D), torch.ones(4)),
        lambda: Mean(torch.tensor([1.0, float("inf")])),
    ],
)
def test_impossible_weights_are_refused(make) -> None:
    with pytest.raises(DictionaryError):
        make()


def test_pca_equals_scikit_learn() -> None:
    x = data(500)
    ours, theirs = fit("pca", x, components=4), SklearnPCA(4, svd_solver="full").fit(x.double().numpy())
    cosines = (ours.directions.double().numpy() * theirs.components_).sum(1)
    assert np.allclose(np.abs(cosines), 1, atol=1e-5)
    assert np.allclose(ours.details["variance"], theirs.explained_variance_, rtol=1e-6)
    assert np.allclose(ours.details["variance_share"], theirs.explained_variance_ratio_.sum(), rtol=1e-6)
    expected = theirs.inverse_transform(theirs.transform(x.double().numpy()))
    assert np.allclose(ours.reconstruct(x).numpy(), expected, atol=1e-4)


def test_pca_published_form_encodes_uncentred_and_rebuilds_the_same() -> None:
    x = data()
    centred, published = fit("pca", x, components=3), fit("pca", x, components=3, centred=False)
    assert torch.allclose(published.encode(x), x @ published.directions.T, atol=1e-4)
    assert float(centred.encode(x).mean(0).abs().max()) < 1e-4 < float(published.encode(x).mean(0).abs().max())
    assert torch.allclose(centred.reconstruct(x), published.reconstruct(x), atol=1e-4)
    assert torch.allclose(fit("pca", x).reconstruct(x), x, atol=1e-4)


def test_moments_keep_their_digits_under_a_large_offset() -> None:
    x = data(20_000) + 1000.0
    mean, covariance = moments(x)
    assert np.allclose(covariance.numpy(), np.cov(x.double().numpy().T), rtol=1e-9)
    assert np.allclose(mean.numpy(), x.double().mean(0).numpy(), rtol=1e-12)


def heavy_tailed(n: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixtures of four sparse non-negative sources, and the mixing rows."""
    generator = torch.Generator().manual_seed(4)
    sources = torch.rand(n, 4, generator=generator) * (torch.rand(n, 4, generator=generator) < 0.15)
    rows = torch.nn.functional.normalize(torch.randn(4, D, generator=generator), dim=1)
    return sources @ rows + 0.01 * torch.randn(n, D, generator=generator), rows


def test_ica_finds_planted_sources_and_points_their_tail_up() -> None:
    x, rows = heavy_tailed()
    d = fit("ica", x, components=4)
    cosines = torch.nn.functional.normalize(d.directions, dim=1) @ rows.T
    assert (cosines.amax(0) > 0.97).all()  # signed: a direction pointing the wrong way would fail
    assert d.details["converged"] and not d.signed
    assert (fit("ica", -x, components=4).encode(-x).double().pow(3).mean(0) > 0.1).all()


def test_ica_published_form_inverts_on_its_subspace() -> None:
    x = data(600)
    d = fit("ica", x, components=D, orient="published")
    assert d.signed and torch.allclose(d.reconstruct(x), x, atol=1e-3)
    assert torch.allclose(d.encode(x).std(0), torch.ones(D), atol=0.01)


def test_both_forms_of_ica_share_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = heavy_tailed(900)
    runs = []
    original = ica_module.FastICA.fit_transform
    monkeypatch.setattr(ica_module.FastICA, "fit_transform", lambda self, z: runs.append(1) or original(self, z))
    oriented, published = fit("ica", x, components=3), fit("ica", x, components=3, orient="published")
    assert len(runs) == 1
    ratio = (oriented.encoder / published.encoder).mean(1)
    assert torch.allclose(ratio.abs(), torch.ones(3), atol=1e-5)
    fit("ica", x, components=3, seed=1)
    assert len(runs) == 2


def test_ica_says_when_it_did_not_converge(capsys: pytest.CaptureFixture[str]) -> None:
    x = data(300, seed=8)
    baseline = BASELINES.get("ica")
    d = baseline.fit(x, seed=0, progress=Progress(terminal=False), **WHERE, components=5, iterations=1, tolerance=1e-12)
    assert d.details["converged"] is False and d.details["iterations"] == 1
    assert "did not converge" in capsys.readouterr().err


def test_ica_keeps_to_the_rank_of_the_data() -> None:
    x = data(300)
    x[:, -1] = x[:, 0]
    d = fit("ica", x, components=D)
    assert d.n_features == D - 1 and torch.isfinite(d.directions).all()


def test_the_read_out_is_the_least_squares_one() -> None:
    x = data(500)
    rows = torch.randn(9, D, generator=torch.Generator().manual_seed(0))

    def encode(block: torch.Tensor) -> torch.Tensor:
        return (block @ rows.T).relu()

    gain, constant = read_out(x, encode, rows)
    written = (encode(x) @ rows).double().numpy()
    design = np.concatenate([written.reshape(-1, 1), np.tile(np.eye(D), (len(x), 1))], axis=1)
    solution = np.linalg.lstsq(design, x.double().numpy().reshape(-1), rcond=None)[0]
    assert np.allclose([gain, *constant.tolist()], solution, rtol=1e-4, atol=1e-5)


def test_neurons_and_random_directions_encode_as_published() -> None:
    x = data()
    assert torch.equal(fit("neurons", x).encode(x), x.relu())
    assert torch.equal(fit("neurons", x, rectified=False).reconstruct(x), x)
    d = fit("random", x, seed=3)
    drawn = torch.randn(D, D, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(d.encode(x), (x @ drawn.T).relu(), atol=1e-5)
    unit = fit("random", x, seed=3, normalised=True)
    assert torch.allclose(unit.encoder.norm(dim=1), torch.ones(D), atol=1e-6)
    assert torch.allclose(unit.reconstruct(x).mean(0), x.mean(0), atol=1e-3)


def test_controls_do_what_they_say() -> None:
    x = data()
    assert torch.equal(fit("identity", x).reconstruct(x), x)
    d = fit("mean", x)
    assert torch.allclose(d.reconstruct(x), x.mean(0).expand_as(x), atol=1e-5) and not d.encode(x).any()


@pytest.mark.parametrize("name", ["pca", "ica", "neurons", "random", "mean", "identity"])
def test_same_seed_same_dictionary_from_memory_or_file(name: str, tmp_path) -> None:
    x = data(300)
    np.save(tmp_path / "x.npy", x.numpy())
    settings = {"components": 3, "vectors": 200} if name == "ica" else {}
    first = fit(name, x, **settings)
    assert fit(name, np.load(tmp_path / "x.npy", mmap_mode="r"), **settings).identity == first.identity
    if name in ("ica", "random"):
        assert fit(name, x, seed=1, **settings).identity != first.identity


def test_a_sample_is_drawn_without_repeats() -> None:
    x = torch.arange(100.0)[:, None]
    drawn = sample(x, 30, 0)[:, 0]
    assert len(drawn.unique()) == 30 and not torch.equal(drawn, sample(x, 30, 1)[:, 0])
    assert torch.equal(sample(x, 100, 0), x)


def test_bad_requests_are_answered_with_the_near_miss() -> None:
    with pytest.raises(DictionaryError, match="no setting 'component'") as caught:
        fit("pca", component=3)
    assert "did you mean 'components'?" in caught.value.fix
    with pytest.raises(DictionaryError, match="no baseline called 'pcaa'"):
        BASELINES.get("pcaa")
    for name, settings in [("pca", {"components": 99}), ("ica", {"components": 99}), ("random", {"features": 0})]:
        with pytest.raises(DictionaryError):
            fit(name, **settings)
    bad = data()
    bad[17, 2] = float("nan")
    for name in ("pca", "ica", "neurons", "random", "mean"):
        with pytest.raises(DictionaryError, match="vector 17"):
            fit(name, bad)
    assert fit("ica", data()).n_features == D
    with pytest.raises(DictionaryError, match="two activation vectors"):
        fit("pca", torch.zeros(1, D))
