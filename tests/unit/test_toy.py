"""Toy data: what they are made of is what was asked for."""

from __future__ import annotations

import math

import pytest
import torch

from evalkit.activations import synthetic as toy
from evalkit.errors import SuiteError

FEATURES, ROWS = 20, 40_000


def strengths(**settings: object) -> torch.Tensor:
    """(N, G) strengths, solved for: there are fewer features than dimensions."""
    data = toy.superposition(ROWS, **{"width": 32, "features": FEATURES, "active": 3.0, **settings})  # type: ignore[arg-type]
    codes = data.x.double() @ torch.linalg.pinv(data.truth.double())
    assert torch.allclose(codes @ data.truth.double(), data.x.double(), atol=1e-5)
    return codes


@pytest.mark.parametrize("correlated", [False, True])
def test_features_are_as_frequent_and_as_strong_as_asked(correlated: bool) -> None:
    codes = strengths(decay=0.9, correlated=correlated, active=5.0)
    on = codes > 1e-4
    frequency = on.double().mean(0)
    expected = 0.9 ** torch.arange(FEATURES).double()
    expected *= 5.0 / expected.sum()
    assert torch.allclose(frequency, expected, atol=0.02)
    assert float(on.sum(1).double().mean()) == pytest.approx(5.0, abs=0.1)
    weak = codes[on & (codes < 1 - 1e-4)]
    assert float(weak.mean()) == pytest.approx(0.5, abs=0.01) and float(weak.std()) == pytest.approx(math.sqrt(1 / 12), abs=0.01)


def test_a_row_without_any_feature_gets_one() -> None:
    codes = strengths(active=0.5, decay=1.0)
    on = codes > 1e-4
    alone = codes[(codes > 1 - 1e-4).any(1)]
    assert (on.sum(1) >= 1).double().mean() > 0.999  # a strength below 1e-4 counts as none here
    assert len(alone) / ROWS == pytest.approx((1 - 0.5 / FEATURES) ** FEATURES, abs=0.01)
    given = (alone > 1 - 1e-4).double().mean(0)
    assert given.max() / given.min() < 1.3  # any feature may be the one


def test_only_correlated_data_have_features_that_come_together() -> None:
    def together(correlated: bool) -> float:
        on = (strengths(correlated=correlated, decay=1.0, active=5.0) > 1e-4).double()
        return float((torch.corrcoef(on.T) - torch.eye(FEATURES)).abs().max())

    assert together(False) < 0.03 < 0.045 < together(True)  # the published covariance is a gentle one


def test_the_covariance_is_one() -> None:
    matrix = toy.covariance(30, torch.Generator().manual_seed(0))
    assert torch.allclose(matrix.diagonal(), torch.ones(30))
    assert torch.equal(matrix, matrix.T) and torch.linalg.eigvalsh(matrix.double())[0] > 0


def test_truth_rows_are_unit_and_the_seed_decides() -> None:
    first, again = (toy.superposition(100, seed=3) for _ in range(2))
    assert first.x.shape == (100, 256) and first.truth.shape == (512, 256)  # the published sizes
    assert torch.allclose(first.truth.norm(dim=1), torch.ones(512))
    assert torch.equal(first.x, again.x) and torch.equal(first.truth, again.truth)
    assert not torch.equal(first.x, toy.superposition(100, seed=4).x)


def test_noise_is_added_to_every_coordinate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "BLOCK", 1_000)  # several blocks
    settings = {"width": 16, "features": 8, "active": 1.0, "seed": 1}
    clean, noisy = toy.superposition(5_000, **settings), toy.superposition(5_000, noise=0.3, **settings)
    assert float((noisy.x - clean.x).std()) == pytest.approx(0.3, rel=0.03)
    assert (clean.x.norm(dim=1) > 0).all()


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"active": 0.0}, {"active": 9.0}, {"decay": 1.1}, {"noise": -1.0}, {"noise": math.nan}]
)
def test_impossible_numbers_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SuiteError, match="toy data"):
        toy.superposition(**{"n": 10, "width": 4, "features": 8, "active": 1.0, **wrong})  # type: ignore[arg-type]


def test_a_trainer_with_the_same_seed_does_not_start_from_the_truth() -> None:
    truth = toy.superposition(10, width=32, features=64, active=2.0, seed=0).truth
    start = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    assert (truth * start).sum(1).abs().mean() < 0.5 * start.norm(dim=1).mean()
