"""Scores and tests of causal trees on shares that are made up: what is chosen, what is flattered, what is found by chance."""

from __future__ import annotations

import numpy as np
import pytest

from evalkit.evaluations.causal_tree.parents import OTHERS, Parents, Strongest, strongest
from evalkit.evaluations.causal_tree.scores import METRICS, Node, scores_of
from evalkit.evaluations.causal_tree.significance import corrected, one_sided, sign_flips


def test_the_largest_of_many_is_not_flattered():
    """Noise about 0: the mean over trees is 0, where the plain maximum would stand far above."""
    for contexts in (2, 3, 10):
        noise = np.random.default_rng(0).normal(0, 0.2, (400, 16, contexts))
        drawn = [scored(shares)["cause_share"].value for shares in noise]
        assert abs(np.mean(drawn)) < 3 * np.std(drawn) / 20
        assert np.mean([shares.mean(1).max() for shares in noise]) > 0.1


def test_the_strongest_are_measured_where_they_were_not_chosen():
    shares = np.tile([[0.1, 0.2], [0.5, 0.3], [0.4, 0.9], [0.9, 0.9]], (1, 3))  # the last was drawn to check the gradient
    checked = np.array([False, False, False, True])
    significant = np.array([True, False, True, True])
    carried = np.tile([[0.0, 0.1], [0.9, 0.2], [0.0, 0.05], [1.0, 1.0]], (1, 3))
    found = scored(shares, checked=checked, carried=carried, significant=significant)
    assert strongest(shares, ~checked) == 1 and strongest(shares, np.zeros(4, dtype=bool)) is None
    assert found["cause_share"].value == pytest.approx(0.3), "whatever the test says"
    assert found["parent_share"].value == pytest.approx(0.9) and found["parent_carried"].value == pytest.approx(0.05)
    assert found["cause_share"].n == found["cause_share_random"].n == found["parent_share"].n == 3
    none = scored(shares, checked=checked, significant=np.zeros(4, dtype=bool))
    assert none["cause_share"].value == pytest.approx(0.3) and none["parents"].value == none["together"].value == 0
    assert {none[f"parent_{name}"].status for name in ("share", "share_random", "carried")} == {"undefined"}
    assert scored(shares[:, :1])["cause_share"].status == "undefined", "one context cannot choose and measure"


def scored(shares, rest=0.0, checked=None, carried=None, significant=None, drawn=None, candidates=50, p_flips=None):
    """Scores by metric of a child whose candidates take ``shares`` (K, C)."""
    K, C = shares.shape
    checked = np.zeros(K, bool) if checked is None else checked
    drawn = checked if drawn is None else drawn
    significant = np.ones(K, bool) if significant is None else significant
    blank, carried = np.zeros(K), np.zeros((K, C)) if carried is None else carried

    def measured(among):
        place = strongest(shares, among)
        if place is None or C < 2:
            return None
        return Strongest(place, float(shares[place, OTHERS].mean()), float(carried[place, OTHERS].mean()), 0.0)

    found = Parents(
        np.arange(K), shares, blank, blank, blank, significant, checked, drawn, np.full(K, C), candidates, 60,
        measured(~checked), measured(significant & ~checked), carried, rest, np.ones(C), 0.5 if significant.any() else None,
        blank if p_flips is None else p_flips, 0.05, 1,
    )  # fmt: skip
    return {score.metric: score for score in scores_of(0, Node(1.0, "[]", found))}


def test_what_three_causes_carry_counts_what_was_not_ablated():
    shares = np.tile(np.array([[0.4], [0.3], [0.2], [0.1], [-0.5]]), (1, 6))
    assert [scored(shares, rest)["top_share"].value for rest in (0.0, 0.8)] == pytest.approx([0.9, 0.5])
    assert scored(-shares[:1])["top_share"].status == "undefined", "nothing takes anything"
    assert scored(shares[:1])["top_share"].value == 1


def test_scores_there_are_of_every_feature_that_fires():
    found = scored(np.zeros((0, 6)), candidates=0)
    assert {name for name, score in found.items() if score.status == "ok"} == {
        "cause_share", "cause_share_random", "parents", "parents_flips", "candidates", "together", "weak"
    }  # fmt: skip
    assert all(found[name].value == 0 for name in ("cause_share", "parents", "together"))


def test_misses_are_told_by_how_they_were_come_to():
    shares = np.full((6, 6), 0.2)
    checked, drawn = np.arange(6) > 1, np.arange(6) > 3
    found = scored(shares, checked=checked, drawn=drawn, significant=np.array([1, 1, 1, 0, 0, 0], dtype=bool))
    assert (found["missed_next"].value, found["missed_next"].weight) == (0.5, 2)
    assert (found["missed"].value, found["missed"].weight) == (0, 2)


def test_the_test_is_a_t_test_corrected_for_all_candidates():
    from scipy.stats import ttest_1samp

    shares = np.random.default_rng(0).normal(0.1, 0.1, (6, 9))
    assert one_sided(shares) == pytest.approx(ttest_1samp(shares, 0, axis=1, alternative="greater").pvalue)
    assert one_sided(np.zeros((2, 5))).tolist() == [1, 1] and one_sided(np.full((1, 5), 0.3)).tolist() == [0]
    assert corrected(np.array([0.01, 0.002, 0.5]), 10) == pytest.approx([0.09, 0.02, 1.0])


def false_parents(share, contexts, seed, children=120, candidates=1200):
    """Part of children with a false parent, of ``candidates`` each, active in a part of the contexts."""
    drawn, hits = np.random.default_rng(seed), 0
    for _ in range(children):
        active = drawn.random((candidates, contexts)) < drawn.uniform(0.05, 1, (candidates, 1))
        shares = (active * share(drawn, (candidates, contexts)))[active.sum(1) >= 3]
        p = corrected(one_sided(shares), len(shares))
        hits += bool(((p < 0.05) & (shares.mean(1) >= 0.05)).any())
    return hits / children


def raised(drawn, size, spread):
    """1 minus a log-normal with mean 1: codes are lowered by at most all and raised without limit."""
    return 1 - np.exp(drawn.normal(-(spread**2) / 2, spread, size))


def mixed(drawn, size):
    """Most candidates do little, a few much, none on the whole."""
    return raised(drawn, size, 0.3 * drawn.random((size[0], 1)) ** 2)


@pytest.mark.parametrize("contexts", [8, 12, 16])
@pytest.mark.parametrize("share", [
    mixed,
    lambda drawn, size: drawn.laplace(0, 0.2, size),
    lambda drawn, size: 0.2 * (drawn.exponential(1, size) - 1),
], ids=["raised", "laplace", "lowered"])  # fmt: skip
def test_features_that_cause_nothing_on_the_whole_are_seldom_parents(share, contexts):
    """1,200 candidates with mean 0, silent in most contexts, skewed either way; 120 children: 0.05 and three deviations."""
    assert false_parents(share, contexts, seed=3) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 120)


def test_what_rarely_raises_a_lot_is_taken_for_a_cause_too_often():
    """The limit of a t-test over few contexts, which the note of the metric names: here it does not keep to alpha."""
    assert false_parents(lambda drawn, size: raised(drawn, size, 0.8), 16, seed=3, children=40) > 0.1
    assert "rare context" in METRICS["parents"].note


def test_sign_flips_are_exact():
    """Of the 8 patterns of three signs one has as large a sum, and two where two contexts cancel."""
    p = sign_flips(np.array([[0.1, 0.2, 0.3], [0.1, 0.2, -0.1], [0.0, 0.4, 0.4], [0.0, 0.0, 0.0], [-0.1, -0.2, -0.3]]))
    assert p == pytest.approx([1 / 8, 3 / 8, 2 / 8, 1.0, 1.0])
    assert sign_flips(np.full((1, 16), 0.1)) == pytest.approx(2.0**-16)
    # 600 candidates are within reach of 16 contexts
    assert corrected(sign_flips(np.full((1, 16), 0.1)), 600)[0] < 0.05 < corrected(sign_flips(np.full((1, 12), 0.1)), 600)[0]


def test_sign_flips_of_more_contexts_are_drawn_and_agree_with_t_on_normal_shares():
    shares = np.random.default_rng(0).normal(0.05, 0.2, (30, 20))
    above = shares.mean(1) > 0  # below 0 the t-test says 1
    assert above.any() and sign_flips(shares)[above] == pytest.approx(one_sided(shares)[above], abs=0.02)


def test_parents_that_flips_find_too_are_counted():
    shares = np.full((3, 16), 0.3)
    found = scored(shares, significant=np.array([True, True, False]), p_flips=np.array([0.01, 0.2, 0.01]))
    assert found["parents"].value == 2 and found["parents_flips"].value == 1
