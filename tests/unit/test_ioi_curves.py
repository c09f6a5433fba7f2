"""Crossings and areas of curves whose numbers are known, and intervals against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from evalkit.evaluations.ioi.curves import DRAWS, Crossing, area, crossing, over_chance, prompt_draws
from evalkit.util.bootstrap import Drawn

SIZES = np.array([0, 1, 2, 4, 8, 16, 32])


def straight(base: float, upto: float = 5.0) -> np.ndarray:
    """KL that falls from ``base`` on a straight line in log2 of the size, to 0 at 2^``upto``."""
    return np.concatenate([[base], base * (1 - np.log2(SIZES[1:]) / upto)])


def patches(found: Crossing) -> float:
    """Of the whole."""
    return float(np.exp(found.log_patches[0]))


def test_a_straight_line_crosses_where_it_must():
    kl = np.stack([straight(4.0), straight(4.0), straight(4.0)], axis=1)
    edit = np.stack([np.concatenate([[0.0], 1 + np.log2(SIZES[1:])])] * 3, axis=1)
    half, tenth = (crossing(SIZES, kl, kl[0], share, {"edit": edit}) for share in (0.5, 0.1))
    assert patches(half) == pytest.approx(2**2.5) and half.beside["edit"] == pytest.approx(3.5)
    assert patches(tenth) == pytest.approx(2**4.5) and tenth.beside["edit"] == pytest.approx(5.5)
    assert half.reached.all() and half.missed == 0 and len(half.log_patches) == 1 + DRAWS


def test_one_patch_that_does_it_all_is_one_patch():
    kl = np.array([[3.0, 5.0], [0.0, 0.1], [0.0, 0.0]])
    edit = np.array([[0.0, 0.0], [2.0, 4.0], [2.0, 4.0]])
    found = crossing(np.array([0, 1, 2]), kl, kl[0], 0.25, {"edit": edit})
    assert np.exp(found.log_patches) == pytest.approx(1.0) and found.beside["edit"][0] == pytest.approx(3.0)


def test_what_is_never_reached_is_censored_at_all_patches_and_nothing_to_reach_is_undefined():
    kl = np.array([[2.0, 2.0], [1.2, 1.4], [1.1, 1.1]])
    found = crossing(np.array([0, 1, 2]), kl, kl[0], 0.5, {"edit": kl})
    assert found.defined.all() and not found.reached.any() and found.missed == 1
    assert np.exp(found.log_patches) == pytest.approx(2.0) and found.beside["edit"] == pytest.approx(1.1)
    # base and target are one to the model
    assert not crossing(np.array([0, 1]), np.zeros((2, 3)), np.zeros(3), 0.5).defined.any()
    assert not crossing(np.array([0]), np.ones((1, 3)), np.ones(3), 0.5).defined.any()  # no candidate


def test_the_first_crossing_counts_where_the_curve_rises_again():
    kl = np.array([[4.0], [3.0], [1.0], [3.5], [0.0]])
    assert patches(crossing(np.array([0, 1, 2, 4, 8]), kl, kl[0], 0.5)) == pytest.approx(2**0.5)


def test_draws_are_those_of_the_curve_and_the_same_for_every_dictionary():
    rng = np.random.default_rng(1)
    N = 12
    kl = np.stack([straight(b, 5.0) for b in rng.gamma(2.0, 1.0, N)], axis=1) + rng.gamma(1.0, 0.2, (len(SIZES), N))
    found = crossing(SIZES, kl, kl[0], 0.4)
    index = prompt_draws(N)
    assert index[0].tolist() == list(range(N)) and np.array_equal(index, prompt_draws(N))
    for draw in (0, 1, 17, 399):
        part = kl[:, index[draw]].mean(1, keepdims=True)
        alone = crossing(SIZES, part, part[0], 0.4, draws=0)
        assert found.log_patches[draw] == pytest.approx(alone.log_patches[0])


def test_a_median_asks_half_of_the_prompts():
    # the first prompt has nearly all of the KL and keeps it; two of three have nothing left after two patches
    kl = np.array([[90.0, 1.0, 1.0], [90.0, 0.9, 0.9], [90.0, 0.0, 0.0], [90.0, 0.0, 0.0]])
    sizes = np.array([0, 1, 2, 4])
    assert not crossing(sizes, kl, kl[0], 0.5).reached[0]
    assert patches(crossing(sizes, kl / kl[0], np.ones(3), 0.5, centre=np.median)) == pytest.approx(2 ** (0.4 / 0.9))


def test_patches_over_chance():
    own = Crossing(np.log([2.0, 2.0, 64.0, np.nan]), np.array([True, True, False, True]), {})
    chance = Crossing(np.log([16.0, 64.0, 8.0, 4.0]), np.array([True, False, True, True]), {})
    ratio = over_chance(own, chance)
    # 16 over 2; more than 64 over 2; own never there: at least one patch over all
    assert np.exp(ratio.log_patches[:3]) == pytest.approx([8.0, 32.0, 1 / 64])
    assert ratio.reached.tolist() == [True, False, True, True] and np.isnan(ratio.log_patches[3])
    never = Crossing(own.log_patches[2:3], own.reached[2:3], {})
    assert np.isnan(over_chance(never, Crossing(chance.log_patches[2:3], chance.reached[2:3], {})).log_patches[0])


def heavy(rng: np.random.Generator, prompts: int, level: float) -> np.ndarray:
    """Curves of prompts whose KL is heavy-tailed and whose way down differs."""
    base = rng.lognormal(0.0, 1.2, prompts)
    reach = np.clip(rng.normal(4.5, 0.8, prompts), 2.0, 8.0)
    floor = level * rng.random(prompts)
    return np.stack([np.maximum(straight(b, r), f * b) for b, r, f in zip(base, reach, floor, strict=True)], axis=1)


@pytest.mark.parametrize(("share", "least"), [(0.5, 0.87), (0.25, 0.9)])
def test_intervals_of_crossings_cover_what_they_say_and_stay_in_range(share, least):
    rng = np.random.default_rng(7)
    population = heavy(rng, 20_000, 0.1)
    truth = float(crossing(SIZES, population, population[0], share, draws=0).log_patches[0])
    tries, hits = 300, 0
    for _ in range(tries):
        kl = population[:, rng.integers(0, 20_000, 12)]
        found = crossing(SIZES, kl, kl[0], share)
        ends = Drawn(found.log_patches[0], False, found.log_patches[1:], ~found.reached[1:], 12).ends()
        assert 0 <= ends.low <= ends.high <= np.log(32) + 1e-9
        hits += ends.low <= truth and (truth <= ends.high or ends.high_above)
    assert hits / tries >= least


def test_area_is_the_mean_over_the_logarithm_and_goes_on_flat():
    kl = np.stack([straight(4.0), np.full(7, 2.0), np.zeros(7)], axis=1)
    assert area(SIZES, kl, 32) == pytest.approx([2.0, 2.0, 0.0])
    assert area(SIZES, kl, 1024) == pytest.approx([1.0, 2.0, 0.0])  # beyond 32 the first stays at 0 for half of the axis
    assert area(SIZES, kl, 4) == pytest.approx([3.2, 2.0, 0.0])
    assert area(SIZES, kl, 6) == pytest.approx([4 - 0.4 * np.log2(6), 2.0, 0.0])  # ends between two sets
    assert area(np.array([0]), kl[:1], 32) == pytest.approx([4.0, 2.0, 0.0])  # nothing to patch


def test_a_crossing_that_hangs_on_one_prompt_says_how_often_it_is_missed():
    # the first two prompts never fall, the third falls to 0: the mean just reaches 3/5
    kl = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [0.9, 0.9, 0.0]])
    sizes, reference = np.array([0, 1, 2]), kl[0]
    found = crossing(sizes, kl, reference, 0.6)
    assert patches(found) == pytest.approx(2.0) and found.reached[0]
    # a draw misses it unless the third prompt is drawn at least once: (2/3)^3
    assert found.missed == pytest.approx((2 / 3) ** 3, abs=0.1)
    assert crossing(sizes, kl, reference, 0.95).missed == 0  # without the third prompt 0.9 is reached, and so is 0.95


def test_shares_are_of_the_reference_and_not_of_the_first_set():
    kl = np.stack([straight(4.0)] * 3, axis=1)
    # the curve starts at 4, where the model's own KL is 8: half of that is there before anything is patched
    assert not crossing(SIZES, kl, np.full(3, 8.0), 0.5).defined.any()
    assert patches(crossing(SIZES, kl, np.full(3, 8.0), 0.25)) == pytest.approx(2**2.5)
    assert patches(crossing(SIZES, kl, np.full(3, 2.0), 0.5)) == pytest.approx(2**3.75)
