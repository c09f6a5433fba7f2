"""Every baseline, in each of its published forms, equals a computation by another library or its formula."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as SklearnPCA
from sklearn.decomposition import FastICA
from sklearn.preprocessing import StandardScaler

from evalkit.dictionaries import ica as ica_module
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.controls import Mean
from evalkit.dictionaries.fitting import CHUNK, mean_active, moments, read_out, sample
from evalkit.dictionaries.forms import Form
from evalkit.dictionaries.linear import LinearDictionary
from evalkit.dictionaries.neurons import Neurons
from evalkit.dictionaries.pca import PCA
from evalkit.dictionaries.provenance import remarks
from evalkit.dictionaries.registry import BASELINES
from evalkit.dictionaries.rotation import orthonormal
from evalkit.errors import DictionaryError
from evalkit.util.hashing import tensors_hash
from evalkit.util.progress import Progress, Stage

D = 7
WHERE = {"hook_point": "blocks.1.hook_resid_post", "model": "toy"}


def data(n: int = 400, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator) @ torch.randn(D, D, generator=generator) + 2.0


def fit(name: str, x: torch.Tensor | np.ndarray | None = None, seed: int = 0, **settings: object) -> Dictionary:
    baseline = BASELINES.get(name)
    return baseline.fit(data() if x is None else x, seed=seed, progress=Progress(quiet=True), **WHERE, **settings)


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


@pytest.mark.parametrize("name", ["pca", "ica", "neurons", "random", "rotation", "nmf", "mean", "identity"])
def test_same_seed_same_dictionary_from_memory_or_file(name: str, tmp_path) -> None:
    x = data(300)
    np.save(tmp_path / "x.npy", x.numpy())
    settings = {"components": 3, "vectors": 200} if name == "ica" else {}
    first = fit(name, x, **settings)
    assert fit(name, np.load(tmp_path / "x.npy", mmap_mode="r"), **settings).identity == first.identity
    if name in ("ica", "random", "rotation"):
        assert fit(name, x, seed=1, **settings).identity != first.identity


def test_a_rotation_is_complete_orthonormal_and_keeps_every_distance() -> None:
    x = data()
    d = fit("rotation", x, seed=3)
    rows = d.directions
    assert d.signed and not d.sparse and d.n_features == D
    assert torch.allclose(rows @ rows.T, torch.eye(D), atol=1e-5)
    assert float((d.reconstruct(x) - x).square().sum() / (x - x.mean(0)).square().sum()) < 1e-10  # FVU 0
    codes = d.encode(x)
    assert torch.allclose(codes.norm(dim=1), x.norm(dim=1), rtol=1e-4)
    assert torch.allclose(torch.cdist(codes, codes), torch.cdist(x, x), atol=1e-2)
    # the fit does not look at the data: any other gives the same basis, another seed does not
    assert torch.equal(fit("rotation", data(seed=5) * 3, seed=3).directions, rows)
    assert not torch.allclose(fit("rotation", x, seed=4).directions.abs(), rows.abs(), atol=0.1)
    # uniform over rotations: the first coordinate of the first row is as often negative as not
    assert 30 < sum(orthonormal(3, seed)[0, 0] > 0 for seed in range(100)) < 70


def test_cutting_a_rotation_loses_what_is_cut() -> None:
    x = data()
    d = fit("rotation", x, top_k=3)
    assert ((d.encode(x) != 0).sum(1) == 3).all() and d.details["gain"] > 0
    full, cut = fit("rotation", x), (d.reconstruct(x) - x).square().sum()
    assert float(cut) > 100 * float((full.reconstruct(x) - x).square().sum())


def test_a_name_in_the_place_of_top_k_is_for_a_suite() -> None:
    for name in ("pca", "ica", "neurons", "random", "rotation", "nmf"):
        with pytest.raises(DictionaryError, match="top_k names a dictionary, 'SAE'"):
            fit(name, top_k="SAE")


def test_mean_active_counts_what_is_not_zero() -> None:
    assert mean_active(fit("neurons", top_k=2, rectified=False), data(), 0) == 2
    assert mean_active(fit("mean"), data(), 0) == 0
    x = torch.cat([torch.ones(30, D), -torch.ones(10, D)])
    assert mean_active(fit("neurons", x), x, 0) == pytest.approx(0.75 * D)


def test_what_a_baseline_was_fitted_on_and_whether_it_converged_is_said(recwarn: pytest.WarningsRecorder) -> None:
    assert remarks(fit("pca", components=3).details) == ["3 components, fitted on 400 vectors"]
    stopped = remarks(fit("ica", components=4, vectors=200, iterations=1, tolerance=1e-9).details)
    assert stopped == ["4 components, fitted on 200 vectors, not converged after 1 iterations (tolerance 1e-09)"]
    assert "not converged" not in remarks(fit("ica", heavy_tailed()[0], components=4).details)[0]
    assert remarks({"notes": ["a note"]}) == ["a note"], "no baseline, nothing fitted"


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
    for name, settings in [
        ("pca", {"components": 99}),
        ("ica", {"components": 99}),
        ("random", {"features": 0}),
        ("pca", {"components": 3, "top_k": 4}),
        ("ica", {"components": 3, "top_k": 7, "split": True}),
        ("neurons", {"top_k": D + 1}),
        ("random", {"features": 3, "top_k": 0}),
    ]:
        with pytest.raises(DictionaryError):
            fit(name, **settings)
    bad = data()
    bad[17, 2] = float("nan")
    for name in ("pca", "ica", "neurons", "random", "rotation", "mean", "nmf"):
        with pytest.raises(DictionaryError, match="vector 17"):
            fit(name, bad)
    with pytest.raises(DictionaryError, match="vector 17"):
        fit("neurons", bad, split=True)
    assert fit("ica", data()).n_features == D
    with pytest.raises(DictionaryError, match="two activation vectors"):
        fit("pca", torch.zeros(1, D))


def test_impossible_tensors_and_forms_are_refused() -> None:
    eye, zero = torch.eye(3), torch.zeros(3)
    with pytest.raises(DictionaryError):
        Mean(torch.tensor([1.0, float("inf")]))
    with pytest.raises(DictionaryError, match="has shape"):
        PCA(eye, zero, torch.ones(2, 3), zero, rectified=False)
    with pytest.raises(DictionaryError, match="top_k = 4 exceeds the 3 features"):
        PCA(eye, zero, eye, zero, rectified=False, top_k=4)
    with pytest.raises(DictionaryError, match="top_k = 7 exceeds the 6 features"):
        Neurons(torch.tensor(1.0), zero, rectified=True, split=True, top_k=7)
    with pytest.raises(DictionaryError, match="split codes are rectified"):
        Form(rectified=False, split=True)
    for impossible in (0, -1, True):
        with pytest.raises(DictionaryError, match="not a number of active features"):
            Form(rectified=True, top_k=impossible)


DEFAULTS: dict[str, dict[str, bool]] = {
    "pca": {"rectified": False}, "ica": {"rectified": True}, "neurons": {"rectified": True}, "random": {"rectified": True},
    "rotation": {"rectified": False},
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_unused_settings_leave_identities_as_they_were(name: str) -> None:
    d = fit(name)
    assert d.settings() == DEFAULTS[name] and "top_k" not in d.details and "split" not in d.details
    assert d.identity.hash == tensors_hash(d.tensors(), {"kind": name, "settings": DEFAULTS[name]})


SIGNED: dict[str, dict[str, Any]] = {
    "pca": {"components": 4},
    "ica": {"components": 4, "orient": "published"},
    "neurons": {"rectified": False},
    "random": {"features": 9, "rectified": False},
    "rotation": {},
}
"""The signed form of each linear baseline."""


@pytest.mark.parametrize("name", SIGNED)
def test_split_codes_are_the_two_sides_of_the_signed_ones(name: str) -> None:
    x = data(60)
    signed, split = fit(name, **SIGNED[name]), fit(name, **SIGNED[name], split=True)
    codes, C = signed.encode(x), signed.n_features
    assert signed.signed and not split.signed and split.n_features == 2 * C and not split.sparse
    assert torch.equal(split.encode(x), torch.cat([codes.clamp(min=0), (-codes).clamp(min=0)], dim=1))
    assert torch.equal(split.directions, torch.cat([signed.directions, -signed.directions]))
    assert torch.equal(split.reconstruct(x), signed.reconstruct(x))
    assert split.identity.hash != signed.identity.hash and split.details["split"] is True


def test_the_first_side_of_split_ica_is_the_stronger_tail() -> None:
    x = -heavy_tailed()[0]
    published, oriented = fit("ica", x, components=4, orient="published", split=True), fit("ica", x, components=4, split=True)
    codes = oriented.encode(x).double()
    assert (codes[:, :4].pow(3).mean(0) > codes[:, 4:].pow(3).mean(0)).all()
    assert torch.allclose(oriented.reconstruct(x), published.reconstruct(x), atol=1e-5)
    assert oriented.details["gain"] == 1.0 and oriented.details["flipped"] >= 1
    assert published.details["flipped"] == 0


def largest(codes: np.ndarray, k: int) -> np.ndarray:
    """Codes (N, F) with all but the k largest magnitudes of each row set to zero."""
    kept = np.zeros_like(codes)
    for row, code in enumerate(codes):
        for f in sorted(range(len(code)), key=lambda f: -abs(code[f]))[:k]:
            kept[row, f] = code[f]
    return kept


FORMS: list[tuple[str, dict[str, Any]]] = [
    *[(name, settings) for name, settings in SIGNED.items()],
    *[(name, {**settings, "split": True}) for name, settings in SIGNED.items()],
    ("pca", {"centred": False}),
    ("ica", {"components": 4}),
    ("neurons", {}),
    ("random", {"normalised": True}),
]


@pytest.mark.parametrize(("name", "settings"), FORMS)
def test_top_k_keeps_the_largest_codes(name: str, settings: dict[str, Any]) -> None:
    x = data(50, seed=2)
    whole, cut = fit(name, **settings), fit(name, **settings, top_k=3)
    expected = largest(whole.encode(x).numpy(), 3)
    assert np.allclose(cut.encode(x).numpy(), expected, atol=1e-5)
    values, indices = cut.encode_sparse(x)
    assert values.shape[1] <= 3 and (values.abs().diff(dim=1) <= 0).all()
    assert np.allclose(torch.zeros(50, cut.n_features).scatter_add_(1, indices, values).numpy(), expected, atol=1e-5)
    assert cut.sparse and not whole.sparse and cut.signed == whole.signed
    assert cut.details["top_k"] == 3 and cut.settings() == {**whole.settings(), "top_k": 3}


@pytest.mark.parametrize("name", SIGNED)
def test_a_top_k_beyond_the_components_of_a_split_keeps_everything(name: str) -> None:
    x = data(30, seed=4)
    settings = {**SIGNED[name], "split": True}
    whole = fit(name, **settings)
    cut = fit(name, **settings, top_k=whole.n_features)
    assert torch.allclose(cut.encode(x), whole.encode(x), atol=1e-6)
    assert torch.allclose(cut.reconstruct(x), whole.reconstruct(x), atol=1e-4)


@pytest.mark.parametrize(("name", "settings"), [(n, s) for n, s in FORMS if n in ("pca", "ica")])
def test_top_k_leaves_the_inverse_of_pca_and_ica_alone(name: str, settings: dict[str, Any]) -> None:
    if settings == {"components": 4}:  # oriented ICA: codes that lose one tail are read out, as the next test checks
        return
    whole, cut = fit(name, **settings), fit(name, **settings, top_k=2)
    assert isinstance(whole, LinearDictionary) and isinstance(cut, LinearDictionary)
    assert torch.equal(cut.writes, whole.writes) and torch.equal(cut.constant, whole.constant)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ica", {"components": 4}),
        ("neurons", {}),
        ("neurons", {"rectified": False}),
        ("neurons", {"split": True}),
        ("random", {}),
        ("random", {"rectified": False}),
        ("random", {"split": True, "features": 9}),
    ],
)
def test_the_read_out_is_fitted_to_the_codes_that_are_kept(name: str, settings: dict[str, Any]) -> None:
    x = data()
    d = fit(name, x, **settings, top_k=2)
    constant = d.decode(torch.zeros(d.n_features)).double().numpy()
    written = (d.encode(x).double() @ d.directions.double()).numpy()  # the best scale of this is 1
    design = np.concatenate([written.reshape(-1, 1), np.tile(np.eye(D), (len(x), 1))], axis=1)
    solution = np.linalg.lstsq(design, x.double().numpy().reshape(-1), rcond=None)[0]
    assert np.allclose(solution, [1.0, *constant.tolist()], rtol=1e-3, atol=1e-3)


def test_signed_random_directions_are_projections() -> None:
    x = data()
    d = fit("random", x, seed=5, rectified=False, features=3)
    drawn = torch.randn(3, D, generator=torch.Generator().manual_seed(5))
    assert d.signed and torch.allclose(d.encode(x), x @ drawn.T, atol=1e-5)
    assert d.settings() == {"rectified": False}


def test_ica_is_scikit_learns_own(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = heavy_tailed(1200)
    scaled = StandardScaler().fit_transform(x.double().numpy())
    theirs = FastICA(4, whiten="unit-variance", max_iter=200, tol=1e-4, random_state=3).fit(scaled)
    ours = []
    original = FastICA.fit_transform

    def remember(self: FastICA, z: np.ndarray) -> np.ndarray:
        ours.append(self)
        return original(self, z)

    monkeypatch.setattr(ica_module.FastICA, "fit_transform", remember)
    fit("ica", x, components=4, seed=3)
    assert np.array_equal(ours[0].components_, theirs.components_) and ours[0].n_iter_ == theirs.n_iter_


class Watched(Progress):
    """Keeps its stages and how often each moved."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.stages: list[tuple[Stage, list[float]]] = []

    @contextmanager
    def stage(self, name: str, total: float | None = None, unit: str = "steps") -> Iterator[Stage]:
        moves: list[float] = []

        class Counted(Stage):
            def _show(self) -> None:
                moves.append(self.done)

        stage = Counted(name, total, unit)
        self.stages.append((stage, moves))
        yield stage


@pytest.mark.parametrize("name", ["pca", "neurons", "random"])
def test_a_long_fit_shows_how_far_it_is(name: str) -> None:
    n, watched = 2 * CHUNK + 1, Watched()
    BASELINES.get(name).fit(data(n), seed=0, progress=watched, **WHERE)
    ((stage, moves),) = watched.stages
    assert moves == [CHUNK, 2 * CHUNK, n] and stage.total == n and stage.unit == "vectors"


def test_the_long_fits_of_ica_and_nmf_show_their_iterations() -> None:
    x, watched = heavy_tailed(701)[0], Watched()
    d = BASELINES.get("ica").fit(x, seed=0, progress=watched, **WHERE, components=4)
    (unmixing, moves), (read, _) = watched.stages
    assert moves == list(range(1, d.details["iterations"] + 1)) and unmixing.total == 200
    assert read.done == read.total == 701
    watched = Watched()
    d = BASELINES.get("nmf").fit(x, seed=0, progress=watched, **WHERE, components=4, iterations=25, tolerance=0.0)
    ((stage, moves),) = watched.stages
    assert moves == [10, 20, 25] and stage.total == 25 == d.details["iterations"]
