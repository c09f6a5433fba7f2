"""Crossings and areas of curves whose numbers are known, and intervals against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from evalkit.evaluations.ioi_curves import area, crossing
from evalkit.statistics import weighted_mean_interval

SIZES = np.array([0, 1, 2, 4, 8, 16, 32])


def straight(base: float, upto: float = 5.0) -> np.ndarray:
    """KL that falls from ``base`` on a straight line in log2 of the size, to 0 at 2^``upto``."""
    return np.concatenate([[base], base * (1 - np.log2(SIZES[1:]) / upto)])


def test_a_straight_line_crosses_where_it_must():
    kl = np.stack([straight(4.0), straight(4.0), straight(4.0)], axis=1)
    edit = np.stack([np.concatenate([[0.0], 1 + np.log2(SIZES[1:])])] * 3, axis=1)
    half, tenth = crossing(SIZES, kl, edit, kl[0], 0.5), crossing(SIZES, kl, edit, kl[0], 0.1)
    assert np.exp(half.log_patches) == pytest.approx(2**2.5) and half.edit == pytest.approx(3.5)
    assert np.exp(tenth.log_patches) == pytest.approx(2**4.5) and tenth.edit == pytest.approx(5.5)


def test_one_patch_that_does_it_all_is_one_patch():
    kl = np.array([[3.0, 5.0], [0.0, 0.1], [0.0, 0.0]])
    edit = np.array([[0.0, 0.0], [2.0, 4.0], [2.0, 4.0]])
    found = crossing(np.array([0, 1, 2]), kl, edit, kl[0], 0.25)
    assert np.exp(found.log_patches.mean()) == pytest.approx(1.0) and found.edit.mean() == pytest.approx(3.0)


def test_what_is_never_reached_is_undefined():
    kl = np.array([[2.0, 2.0], [1.2, 1.4], [1.1, 1.1]])
    found = crossing(np.array([0, 1, 2]), kl, kl, kl[0], 0.5)
    assert np.isnan(found.log_patches).all() and np.isnan(found.edit).all() and found.missed == 1
    nothing = crossing(
        np.array([0, 1]), np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(3), 0.5
    )  # base and target are one to the model
    assert np.isnan(nothing.log_patches).all()
    alone = crossing(np.array([0]), np.ones((1, 3)), np.zeros((1, 3)), np.ones(3), 0.5)  # no candidate
    assert np.isnan(alone.log_patches).all()


def test_the_first_crossing_counts_where_the_curve_rises_again():
    kl = np.array([[4.0], [3.0], [1.0], [3.5], [0.0]])
    found = crossing(np.array([0, 1, 2, 4, 8]), kl, kl, kl[0], 0.5)
    assert np.exp(found.log_patches) == pytest.approx([2**0.5])


def test_influence_values_have_the_crossing_as_their_mean_and_its_spread():
    rng = np.random.default_rng(0)
    base = rng.gamma(6.0, 0.6, 60)
    reach = rng.normal(4.0, 0.5, 60)
    kl = np.stack([np.maximum(straight(b, r), 0.0) for b, r in zip(base, reach, strict=True)], axis=1)
    found = crossing(SIZES, kl, kl, kl[0], 0.25)
    mean = crossing(SIZES, kl.mean(1, keepdims=True), kl.mean(1, keepdims=True), kl[0].mean(keepdims=True), 0.25)
    assert found.log_patches.mean() == pytest.approx(float(mean.log_patches[0]))
    assert found.edit.mean() == pytest.approx(float(mean.edit[0]))
    drawn = []
    for _ in range(400):
        part = kl[:, rng.integers(0, 60, 60)].mean(1, keepdims=True)
        drawn.append(float(crossing(SIZES, part, part, part[0], 0.25).log_patches[0]))
    interval = weighted_mean_interval(found.log_patches)
    assert interval.high - interval.low == pytest.approx(np.quantile(drawn, 0.975) - np.quantile(drawn, 0.025), rel=0.25)


def test_influence_values_are_those_of_leaving_out_one_prompt_at_a_time():
    rng = np.random.default_rng(1)
    N = 12
    kl = np.stack(
        [np.maximum(straight(b, r), 0.0) for b, r in zip(rng.gamma(6.0, 0.6, N), rng.normal(4.0, 0.5, N), strict=True)], axis=1
    )

    def whole(part: np.ndarray) -> float:
        mean = part.mean(1, keepdims=True)
        return float(crossing(SIZES, mean, mean, mean[0], 0.25).log_patches[0])

    without = np.array([whole(np.delete(kl, left_out, axis=1)) for left_out in range(N)])
    found = crossing(SIZES, kl, kl, kl[0], 0.25).log_patches
    variance = (N - 1) / N * ((without - without.mean()) ** 2).sum()
    assert found.var(ddof=1) / N == pytest.approx(variance)
    assert found - found.mean() == pytest.approx((N - 1) * (without.mean() - without))


def test_area_is_the_mean_over_the_logarithm_and_goes_on_flat():
    kl = np.stack([straight(4.0), np.full(7, 2.0), np.zeros(7)], axis=1)
    assert area(SIZES, kl, 32) == pytest.approx([2.0, 2.0, 0.0])
    assert area(SIZES, kl, 1024) == pytest.approx([1.0, 2.0, 0.0])  # beyond 32 the first stays at 0 for half of the axis
    assert area(SIZES, kl, 4) == pytest.approx([3.2, 2.0, 0.0])
    assert area(SIZES, kl, 6) == pytest.approx([4 - 0.4 * np.log2(6), 2.0, 0.0])  # ends between two sets
    assert area(np.array([0]), kl[:1], 32) == pytest.approx([4.0, 2.0, 0.0])  # nothing to patch


def test_a_crossing_that_hangs_on_one_prompt_has_no_interval_and_says_how_often_it_is_missed():
    # the first two prompts never fall, the third falls to 0: the mean just reaches 3/5
    kl = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [0.9, 0.9, 0.0]])
    sizes, reference = np.array([0, 1, 2]), kl[0]
    found = crossing(sizes, kl, kl, reference, 0.6)
    assert found.log_patches.shape == found.edit.shape == (1,)
    assert np.exp(found.log_patches[0]) == pytest.approx(2.0) and found.edit[0] == pytest.approx(0.6)
    # a draw misses it unless the third prompt is drawn at least once: (2/3)^3
    assert found.missed == pytest.approx((2 / 3) ** 3, abs=0.1)
    easy = crossing(sizes, kl, kl, reference, 0.95)
    assert easy.missed == 0 and len(easy.log_patches) == 3  # without the third prompt 0.9 is reached, and so is 0.95


def test_shares_are_of_the_reference_and_not_of_the_first_set():
    kl = np.stack([straight(4.0)] * 3, axis=1)
    # the curve starts at 4, where the model's own KL is 8: half of that is there before anything is patched
    assert np.isnan(crossing(SIZES, kl, kl, np.full(3, 8.0), 0.5).log_patches).all()
    assert np.exp(crossing(SIZES, kl, kl, np.full(3, 8.0), 0.25).log_patches.mean()) == pytest.approx(2**2.5)
    assert np.exp(crossing(SIZES, kl, kl, np.full(3, 2.0), 0.5).log_patches.mean()) == pytest.approx(2**3.75)
