"""Known answers, closed forms and two other libraries for evalkit.util.statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from evalkit.util.statistics import (
    auroc,
    binomial_interval,
    correlation,
    difference_interval,
    holm,
    over_seeds,
    pearson,
    weighted_mean_interval,
)


def test_mean_is_weighted_by_hand():
    got = weighted_mean_interval([1.0, 2.0, 4.0], [1.0, 1.0, 2.0])
    assert got.mean == pytest.approx((1 + 2 + 8) / 4)
    assert got.n == 3
    assert got.low < got.mean < got.high


def test_interval_is_students_where_nothing_is_skewed():
    values = np.array([1.0, 2.0, 3.0, 5.0, 6.0, 7.0])  # symmetric about 4
    want = stats.t.interval(0.95, 5, loc=4.0, scale=stats.sem(values))
    assert tuple(weighted_mean_interval(values)[1:3]) == pytest.approx(want)
    assert tuple(weighted_mean_interval(values, np.full(6, 3.0))[1:3]) == pytest.approx(want)
    ten = weighted_mean_interval(np.repeat(values, 10), clusters=np.repeat(np.arange(6), 10))
    assert (ten.low, ten.high) == pytest.approx(want)


def test_interval_of_skewed_values_agrees_with_the_bootstrap_t():
    values = np.random.default_rng(1).gamma(1.0, size=40)
    got, n = weighted_mean_interval(values), len(values)
    drawn = np.random.default_rng(2).choice(values, (20_000, n))
    t = (drawn.mean(1) - values.mean()) / (drawn.std(1, ddof=1) / math.sqrt(n))
    low, high = values.mean() - np.quantile(t, [0.975, 0.025]) * stats.sem(values)
    width = high - low
    assert (got.low, got.high) == pytest.approx((low, high), abs=0.1 * width)
    assert got.high - got.mean > 1.2 * (got.mean - got.low)


TRIALS = 3000
SAMPLES = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "bimodal": (lambda rng, n: np.where(rng.random(n) < 0.5, 0.1, 0.8) + rng.normal(0, 0.1, n), 0.45),
    "exponential": (lambda rng, n: rng.exponential(size=n), 1.0),
}


@pytest.mark.parametrize("n", [6, 9, 12, 20])
@pytest.mark.parametrize("shape", list(SAMPLES))
def test_intervals_of_few_items_cover_the_mean(shape, n):
    """The percentile bootstrap covers 0.86, 0.89 and 0.81 at n = 6."""
    rng, (draw, mean) = np.random.default_rng(100 + n), SAMPLES[shape]
    found = [weighted_mean_interval(draw(rng, n)) for _ in range(TRIALS)]
    covered = np.mean([interval.low <= mean <= interval.high for interval in found])
    assert covered >= (0.90 if shape == "exponential" and n < 12 else 0.93)


@pytest.mark.parametrize("n", [6, 12])
def test_intervals_of_few_clusters_of_unequal_size_cover_the_mean(n):
    """Documents of 1 to 8 windows, windows of one document alike."""
    rng, hits = np.random.default_rng(n), 0
    for _ in range(1500):
        codes = np.repeat(np.arange(n), rng.integers(2, 9, n))
        values = rng.normal(size=n)[codes] + rng.normal(size=len(codes))
        found = weighted_mean_interval(values, clusters=codes)
        hits += found.low <= 0 <= found.high
    assert hits / 1500 >= 0.92


CASES = [(shape, True, n) for shape in SAMPLES for n in (6, 9, 12)] + [("normal", False, 6)]


@pytest.mark.parametrize(("shape", "paired", "n"), CASES)
def test_no_difference_is_rarely_called_one(shape, paired, n):
    """Draws of a percentile bootstrap call it one in 0.10 to 0.16 of the cases at n = 6."""
    rng, draw = np.random.default_rng(50 + n), SAMPLES[shape][0]
    trials = 1500 if paired else 400
    p = [difference_interval(draw(rng, n), draw(rng, n), paired=paired).p for _ in range(trials)]
    assert 0.01 < np.mean(np.array(p) < 0.05) <= 0.06


def test_p_of_few_pairs_counts_every_swap():
    a, b = [0.9, 0.8, 0.7, 0.6, 0.2, 0.55], [0.1, 0.2, 0.3, 0.4, 0.3, 0.45]
    d = np.subtract(a, b)
    signs = 1 - 2 * ((np.arange(64)[:, None] >> np.arange(6)) & 1)
    want = np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-12)
    assert difference_interval(a, b, paired=True).p == pytest.approx(want)
    theirs = stats.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert want == pytest.approx(theirs.pvalue)


def test_a_swap_of_a_ratio_swaps_its_denominator_too():
    """Errors over variances of four groups: the exact distribution by hand."""
    top_a, top_b = np.array([1.0, 2.0, 6.0, 3.0]), np.array([2.0, 3.0, 4.0, 6.0])
    under_a, under_b = np.array([2.0, 4.0, 8.0, 6.0]), np.array([1.0, 6.0, 4.0, 12.0])
    found = difference_interval(top_a / under_a, top_b / under_b, under_a, under_b, paired=True)
    differences = []
    for swap in np.array(np.meshgrid(*[[False, True]] * 4)).reshape(4, -1).T:
        one = np.where(swap, top_b, top_a).sum() / np.where(swap, under_b, under_a).sum()
        two = np.where(swap, top_a, top_b).sum() / np.where(swap, under_a, under_b).sum()
        differences.append(abs(one - two))
    assert found.difference == pytest.approx(12 / 20 - 15 / 23)
    assert found.p == pytest.approx(np.mean(np.array(differences) >= abs(found.difference) - 1e-12))


def test_interval_agrees_with_normal_theory():
    values = np.random.default_rng(3).normal(size=4000)
    got = weighted_mean_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert got.high - got.mean == pytest.approx(half, rel=0.08)
    assert got.mean - got.low == pytest.approx(half, rel=0.08)


def test_interval_of_a_ratio_agrees_with_its_linearisation():
    rng = np.random.default_rng(4)
    weights = rng.uniform(0.5, 3.0, 1500)
    values = 2.0 + rng.normal(size=1500) / weights
    got = weighted_mean_interval(values, weights)
    error = math.sqrt(((weights * (values - got.mean)) ** 2).sum()) / weights.sum()
    assert got.high - got.low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_duplicated_items_add_nothing_when_clustered():
    values = np.random.default_rng(5).normal(size=60)
    single = weighted_mean_interval(values)
    copies = weighted_mean_interval(np.repeat(values, 25), clusters=np.repeat(np.arange(60), 25))
    naive = weighted_mean_interval(np.repeat(values, 25))
    assert (copies.low, copies.high) == pytest.approx((single.low, single.high))
    assert naive.high - naive.low < 0.4 * (single.high - single.low)


def test_coverage_of_the_interval():
    rng = np.random.default_rng(6)
    hits = 0
    for _ in range(300):
        got = weighted_mean_interval(rng.normal(5.0, 1.0, 60))
        hits += got.low <= 5.0 <= got.high
    assert 0.89 <= hits / 300 <= 0.985


@pytest.mark.parametrize(("values", "clusters"), [([], None), ([3.0], None), ([3.0, 4.0], ["d", "d"])])
def test_too_little_to_resample(values, clusters):
    got = weighted_mean_interval(values, clusters=clusters)
    assert math.isnan(got.low)
    assert math.isnan(got.high)
    assert got.n == len(values)
    assert math.isnan(got.mean) if not values else got.mean == np.mean(values)


def test_no_weight_is_no_mean():
    assert math.isnan(weighted_mean_interval([1.0, 2.0], [0.0, 0.0]).mean)


@pytest.mark.parametrize("paired", [True, False])
def test_same_seed_same_p_across_block_sizes(monkeypatch, paired):
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=50), rng.normal(size=50)
    whole = difference_interval(a, b, paired=paired, seed=9)
    monkeypatch.setattr("evalkit.util.statistics.BLOCK", 50 * 37)
    assert difference_interval(a, b, paired=paired, seed=9).p == pytest.approx(whole.p, abs=0.03)
    assert difference_interval(a, b, paired=paired, seed=10).p != whole.p


@pytest.mark.parametrize(
    "call",
    [
        lambda: weighted_mean_interval([1.0, float("nan")]),
        lambda: weighted_mean_interval([1.0], [1.0, 2.0]),
        lambda: weighted_mean_interval([1.0, 2.0], [1.0, -1.0]),
        lambda: weighted_mean_interval([1.0, 2.0], clusters=[1]),
        lambda: weighted_mean_interval([[1.0, 2.0]]),
        lambda: difference_interval([1.0], [1.0, 2.0], paired=True),
        lambda: difference_interval([1.0], [1.0], clusters_b=[1], paired=True),
        lambda: pearson([1.0, 2.0], [1.0]),
        lambda: auroc([0, 2], [1.0, 2.0]),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match="."):
        call()


def test_pairing_finds_what_independence_hides():
    rng = np.random.default_rng(8)
    shared = rng.normal(0, 10, 100)
    a, b = shared + 0.5 + rng.normal(0, 0.5, 100), shared + rng.normal(0, 0.5, 100)
    paired, independent = difference_interval(a, b, paired=True), difference_interval(a, b, paired=False)
    assert paired.difference == pytest.approx(np.mean(a - b)) == pytest.approx(independent.difference)
    assert paired.low > 0.2
    assert paired.p < 0.01
    assert paired.n == 100
    assert independent.low < 0 < independent.high
    assert independent.p > 0.5
    assert independent.n == 200


def test_paired_interval_is_that_of_the_differences():
    rng = np.random.default_rng(9)
    a, b = rng.normal(size=70), rng.normal(size=70)
    whole, alone = difference_interval(a, b, paired=True), weighted_mean_interval(a - b)
    assert (whole.low, whole.high) == pytest.approx((alone.low, alone.high))


def test_independent_interval_agrees_with_welch():
    rng = np.random.default_rng(10)
    a, b = rng.normal(0.0, 1.0, 900), rng.normal(0.1, 3.0, 400)
    got = difference_interval(a, b, paired=False)
    half = 1.96 * math.sqrt(a.var(ddof=1) / 900 + b.var(ddof=1) / 400)
    assert got.high - got.low == pytest.approx(2 * half, rel=0.08)
    assert got.p == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue, abs=0.05)


def test_p_is_uniform_enough_where_nothing_differs():
    rng = np.random.default_rng(11)
    p = [difference_interval(rng.normal(size=50), rng.normal(size=50), paired=True, draws=400).p for _ in range(300)]
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.10
    assert 0.4 <= np.mean(p) <= 0.6


def test_identical_sides_differ_by_nothing():
    got = difference_interval([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], paired=True)
    assert (got.difference, got.low, got.high, got.p) == (0.0, 0.0, 0.0, 1.0)


def test_few_clusters_cannot_carry_a_small_p():
    paired = [difference_interval(np.full(c, 2.0), np.full(c, 1.0), paired=True).p for c in (2, 3, 8, 50)]
    assert paired == pytest.approx([1 / 2, 1 / 4, 2 / 256, 1 / 2001])
    assert difference_interval([5.0, 6.0, 7.0], [1.0, 2.0], paired=False).p == pytest.approx(2 / 10)
    clustered = difference_interval([2.0] * 40, [1.0] * 40, clusters_a=[0, 1] * 20, paired=True)
    assert clustered.p == pytest.approx(1 / 2)


def test_one_pair_has_no_interval():
    got = difference_interval([2.0], [1.0], paired=True)
    assert got.difference == 1.0
    assert math.isnan(got.low)
    assert math.isnan(got.p)


def test_holm_by_hand():
    got = holm([0.01, float("nan"), 0.04, 0.03])
    assert got[[0, 2, 3]] == pytest.approx([0.03, 0.06, 0.06])
    assert math.isnan(got[1])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert len(holm([])) == 0


def test_pearson_agrees_with_numpy_at_any_scale():
    rng = np.random.default_rng(12)
    x = rng.normal(size=200)
    y = 0.3 * x + rng.normal(size=200)
    want = np.corrcoef(x, y)[0, 1]
    assert pearson(x, y) == pytest.approx(want, abs=1e-12)
    assert pearson(x * 1e-200, y * 1e150) == pytest.approx(want, abs=1e-12)
    assert pearson(x.astype(np.float32), x.astype(np.float32) * 2) == pytest.approx(1.0)


@pytest.mark.parametrize(("x", "y"), [([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0], [0.1, 0.1]), ([1.0], [1.0]), ([], [])])
def test_pearson_is_undefined_with_a_constant(x, y):
    assert pearson(x, y) is None and math.isnan(correlation(x, y))


def test_a_correlation_of_what_is_not_finite_is_no_number():
    assert math.isnan(correlation([1.0, math.nan, 2.0], [1.0, 2.0, 3.0])) and math.isnan(correlation([1.0, 2.0], [math.inf, 0.0]))
    assert correlation([0.1] * 3, [1.0, 2.0, 4.0]) != correlation([0.1] * 3, [1.0, 2.0, 4.0])  # 0.1 less its mean is not 0
    assert correlation([1.0, 2.0, 4.0], [2.0, 3.0, 9.0]) == pearson([1.0, 2.0, 4.0], [2.0, 3.0, 9.0])


def test_auroc_agrees_with_scikit_learn_under_ties():
    rng = np.random.default_rng(13)
    labels = rng.integers(0, 2, 300)
    scores = np.round(labels + rng.normal(0, 1.5, 300))
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert auroc([0, 0, 1], [5.0, 5.0, 5.0]) == 0.5
    assert auroc([True, True], [1.0, 2.0]) is None


def test_the_detectable_difference_has_a_closed_form():
    values = np.random.default_rng(14).normal(size=200)
    error = values.std(ddof=1) / math.sqrt(200)
    z = stats.t.ppf(0.975, 199) + stats.t.ppf(0.8, 199)
    assert difference_interval(values, np.zeros(200), paired=True).detectable == pytest.approx(z * error, rel=1e-5)


def test_the_detectable_difference_is_detected_four_times_in_five():
    rng = np.random.default_rng(15)
    large = difference_interval(rng.normal(size=5000), np.zeros(5000), paired=True)
    effect = large.detectable * math.sqrt(5000 / 80)
    found = 0
    for _ in range(300):
        found += difference_interval(rng.normal(effect, 1.0, 80), np.zeros(80), paired=True, draws=300).p < 0.05
    assert 0.72 <= found / 300 <= 0.88


@pytest.mark.parametrize(("hits", "trials"), [(0, 36), (0, 48), (3, 20), (20, 20), (1, 1)])
def test_counted_cases_have_the_exact_interval(hits, trials):
    got, want = binomial_interval(hits, trials), stats.binomtest(hits, trials).proportion_ci(method="exact")
    assert (got.mean, got.low, got.high) == pytest.approx((hits / trials, want.low, want.high), abs=1e-9) and got.n == trials


def test_nothing_counted_among_few_is_not_never():
    assert binomial_interval(0, 36).high == pytest.approx(1 - 0.025 ** (1 / 36))
    assert math.isnan(binomial_interval(0, 0).high)
    with pytest.raises(ValueError, match="4 hits of 3 trials"):
        binomial_interval(4, 3)


def test_mean_over_seeds_by_hand():
    """Seeds 1, 2 and 4 with items of no spread: the standard error is sd / sqrt(3), with two degrees of freedom."""
    got = over_seeds([([mean] * 6, np.ones(6), range(6)) for mean in (1.0, 2.0, 4.0)], shared=True)
    sd = np.std([1.0, 2.0, 4.0], ddof=1)
    half = stats.t.ppf(0.975, 2) * sd / math.sqrt(3)
    assert (got.interval.mean, got.interval.low, got.interval.high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half))
    assert (got.sd, got.seeds, got.interval.n) == (pytest.approx(sd), 3, 18)


def test_what_seeds_share_does_not_show_in_their_spread():
    """Three seeds that agree on every window: the windows are the noise."""
    values = np.random.default_rng(3).normal(size=12)
    same, alone = over_seeds([(values, np.ones(12), range(12))] * 3, shared=True), weighted_mean_interval(values)
    assert (same.interval.low, same.interval.high, same.sd) == pytest.approx((alone.low, alone.high, 0.0))
    one = over_seeds([(values, np.ones(12), range(12))], shared=True)
    assert one.seeds == 1 and math.isnan(one.interval.low) and math.isnan(one.sd)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("between", [0.0, 1.0])
def test_intervals_over_three_seeds_cover_the_mean_of_all_seeds(shared, between):
    """Seeds that differ not at all, and by as much as items do."""
    rng, hits = np.random.default_rng(17), 0
    for _ in range(1500):
        items = rng.normal(size=12) if shared else np.zeros(12)
        parts = [(items + rng.normal(0, between) + rng.normal(size=12), np.ones(12), range(12)) for _ in range(3)]
        found = over_seeds(parts, shared=shared).interval
        hits += found.low <= 0 <= found.high
    assert hits / 1500 >= 0.93
