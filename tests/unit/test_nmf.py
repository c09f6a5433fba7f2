"""NMF on sign-split activations: planted components are found, and encoding is non-negative least squares."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.decomposition import NMF as SklearnNMF

from evalkit.dictionaries.nmf import NMF, sign_split
from evalkit.dictionaries.registry import BASELINES
from evalkit.errors import DictionaryError
from evalkit.util.progress import Progress

D, C = 12, 8
WHERE = {"hook_point": "blocks.1.hook_resid_post", "model": "toy"}


def data(n: int = 600, seed: int = 0) -> torch.Tensor:
    """Correlated activations of both signs, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=torch.Generator().manual_seed(99))
    return torch.randn(n, D, generator=generator) @ mixing + 1.0


def fit(x: torch.Tensor, seed: int = 0, progress: Progress | None = None, **settings: float) -> NMF:
    found = BASELINES.get("nmf").fit(x, seed=seed, progress=progress or Progress(quiet=True), **WHERE, **settings)
    assert isinstance(found, NMF)
    return found


@functools.cache
def usual() -> NMF:
    return fit(data(), components=C)


def objective(z: np.ndarray, codes: np.ndarray, H: np.ndarray) -> float:
    return float(((z.astype(np.float64) - codes.astype(np.float64) @ H.astype(np.float64)) ** 2).sum())


def test_planted_components_of_both_signs_are_found() -> None:
    generator = torch.Generator().manual_seed(4)
    rows = torch.zeros(4, D)
    for row in range(4):  # each on dimensions of its own, where the split of a sum is the sum of the splits
        rows[row, 3 * row : 3 * row + 3] = torch.randn(3, generator=generator)
    rows = torch.nn.functional.normalize(rows, dim=1)
    codes = torch.rand(800, 4, generator=generator) * (torch.rand(800, 4, generator=generator) < 0.4)
    d, x = fit(codes @ rows, components=4), codes @ rows
    cosines = torch.nn.functional.normalize(d.directions, dim=1) @ rows.T
    found = cosines.argmax(0)
    assert sorted(found.tolist()) == [0, 1, 2, 3] and float(cosines.amax(0).min()) > 0.999  # signed
    assert torch.allclose(d.encode(x)[:, found], codes, atol=0.02) and torch.allclose(d.reconstruct(x), x, atol=0.02)
    assert d.details["squared_norm_left"] < 1e-3


def test_encoding_is_as_good_as_scikit_learns_and_near_the_exact_optimum_on_held_out_data() -> None:
    d, held_out = usual(), data(100, seed=5)
    z, H = sign_split(held_out).numpy(), d.H.numpy()
    sklearn = SklearnNMF(C, init="random", max_iter=500, tol=1e-6, random_state=0).fit(z)
    sklearn.components_ = H
    theirs = objective(z, sklearn.transform(z), H)
    ours = objective(z, d.encode(held_out).numpy(), H)
    exact = sum(nnls(H.T.astype(np.float64), row.astype(np.float64))[1] ** 2 for row in z)
    assert exact <= ours * (1 + 1e-6) and ours <= 1.001 * exact
    assert abs(ours - theirs) <= 0.01 * theirs


def test_too_few_steps_are_worse() -> None:
    d, x = usual(), data(50, seed=6)
    z, H = sign_split(x).numpy(), d.H.numpy()
    losses = [objective(z, NMF(d.H, steps).encode(x).numpy(), H) for steps in (1, 3, 25)]
    assert losses == sorted(losses, reverse=True) and losses[0] > 1.05 * losses[-1]


def test_rounds_are_one_run_of_scikit_learn() -> None:
    x = data(300)
    ours = fit(x, components=5, iterations=30, tolerance=0.0, seed=2)
    z = sign_split(x).numpy()
    theirs = SklearnNMF(5, init="nndsvda", max_iter=30, tol=0.0, random_state=2).fit(z)
    expected = theirs.components_ / np.linalg.norm(theirs.components_, axis=1, keepdims=True)
    assert ours.details["iterations"] == 30 and np.allclose(ours.H.numpy(), expected, atol=1e-5)
    left = theirs.reconstruction_err_**2 / (z.astype(np.float64) ** 2).sum()
    assert np.isclose(ours.details["squared_norm_left"], left, rtol=1e-4)


def test_what_is_written_is_the_difference_of_the_halves() -> None:
    d, x = usual(), data(20, seed=7)
    codes = d.encode(x)
    assert (d.H >= 0).all() and torch.allclose(d.H.norm(dim=1), torch.ones(C), atol=1e-5)
    assert torch.allclose(d.reconstruct(x), codes @ (d.H[:, :D] - d.H[:, D:]), atol=1e-5)
    assert not d.signed and (codes >= 0).all() and not d.decode(torch.zeros(C)).any()


def test_top_k_keeps_the_largest_codes() -> None:
    whole, x = usual(), data(40, seed=8)
    cut = NMF(whole.H, whole.steps, 2)
    codes = whole.encode(x).numpy()
    expected = np.zeros_like(codes)
    for row, code in enumerate(codes):
        kept = np.argsort(-code)[:2]
        expected[row, kept] = code[kept]
    assert np.allclose(cut.encode(x).numpy(), expected, atol=1e-6)
    assert cut.sparse and not whole.sparse and cut.identity.hash != whole.identity.hash
    assert whole.settings() == {"steps": 100} and cut.settings() == {"steps": 100, "top_k": 2}


def test_the_fit_says_how_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    assert usual().details["converged"] is True and 0 < usual().details["squared_norm_left"] < 1
    short = fit(data(), components=C, iterations=12, tolerance=1e-12, progress=Progress(terminal=False))
    assert short.details["converged"] is False and short.details["iterations"] == 12
    said = capsys.readouterr().err
    assert "did not converge in 12 iterations" in said and "12 iterations at most" in said


def test_a_fit_is_repeated_by_its_seed_and_draws_its_vectors() -> None:
    x = data(500)
    first = fit(x, components=4, vectors=100, seed=1)
    assert first.identity == fit(x.numpy(), components=4, vectors=100, seed=1).identity
    assert first.identity != fit(x, components=4, vectors=100, seed=2).identity
    assert first.details["vectors"] == 100


def test_empty_components_are_dropped() -> None:
    x = torch.zeros(50, D)
    x[:, 0] = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.5  # one direction, so one component suffices
    d = fit(x, components=3, iterations=50)
    assert d.n_features + d.details["dropped"] == 3 and d.n_features >= 1
    assert torch.isfinite(d.H).all() and torch.allclose(d.reconstruct(x), x, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"components": 0}, "components"),
        ({"components": 2 * D + 1}, "components"),
        ({"components": 9, "vectors": 8}, "components"),
        ({"steps": 0}, "steps"),
        ({"iterations": 0}, "iterations"),
        ({"top_k": 0}, "top_k"),
        ({"components": 4, "top_k": 5}, "top_k"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, int], where: str) -> None:
    with pytest.raises(DictionaryError) as caught:
        fit(data(60), **settings)
    assert caught.value.where == where and caught.value.fix


def test_impossible_weights_and_data_are_refused() -> None:
    for H in (torch.ones(3, 5), torch.tensor([[1.0, -0.1]]), torch.tensor([[1.0, float("nan")]]), torch.ones(4)):
        with pytest.raises(DictionaryError) as caught:
            NMF(H, 10)
        assert caught.value.where == "H"
    with pytest.raises(DictionaryError, match="not all zero"):
        fit(torch.zeros(20, D))
    bad = data(50)
    bad[7, 3] = float("inf")
    with pytest.raises(DictionaryError, match="vector 7"):
        fit(bad)
