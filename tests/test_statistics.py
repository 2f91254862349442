"""Every statistic against numbers worked by hand and against scipy."""

import itertools

import numpy as np
import pytest
from rankwise.reports import statistics
from scipy import stats

OURS = {3: 4.0, 1: 2.0, 2: 9.0, 7: 5.0}
REFERENCE = {1: 1.0, 2: 5.0, 3: 4.0, 9: 0.0}


def test_summary_by_hand():
    s = statistics.summary([1.0, 2.0, 3.0, 10.0])
    assert (s.n, s.mean, s.median) == (4, 4.0, 2.5)
    assert s.sd == pytest.approx((50 / 3) ** 0.5)  # 9 + 4 + 1 + 36 over n - 1
    assert s.half_width == pytest.approx(3.182446305284263 * (50 / 3) ** 0.5 / 2)  # t(0.975, 3) from a table


def test_interval_is_scipys_paired_one():
    a, b = np.array([85.1, 85.9, 84.2, 86.0]), np.array([84.9, 85.0, 84.4, 85.1])
    s = statistics.summary(a - b)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (s.low, s.high) == pytest.approx((low, high))


def test_one_seed_has_no_interval_and_none_has_no_mean():
    s = statistics.summary([85.0])
    assert (s.mean, s.sd, s.low, s.high, s.half_width) == (85.0, None, None, None, None)
    assert statistics.summary([]) is None


def test_differences_are_paired_by_seed_not_by_position():
    assert statistics.paired_differences(OURS, REFERENCE).tolist() == [1.0, 4.0, 0.0]  # seeds 1, 2, 3


def test_sign_flip_by_hand():
    # 1, 2, 3: sums +-6 are the only ones as far from zero as 6: 2 of 8. 3, -1: sums 4, 2, -2, -4, seen 2: all four.
    assert statistics.sign_flip_test([1.0, 2.0, 3.0]) == 2 / 8
    assert statistics.sign_flip_test([3.0, -1.0]) == 1.0
    assert statistics.sign_flip_test([-5.0]) == 1.0
    assert statistics.sign_flip_test([0.0, 0.0, 0.0]) == 1.0


def test_sign_flip_equals_scipys_and_the_loop():
    differences = np.random.default_rng(0).normal(0.4, 1, 9)
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=9)]
    loop = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-9)
    test = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert statistics.sign_flip_test(differences) == pytest.approx(loop)
    assert statistics.sign_flip_test(differences) == pytest.approx(test.pvalue)


def test_sign_flip_counts_ties_that_rounding_hides():
    # 0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in the last bit; both signs of every order are ties of the seen sum.
    differences = [0.1, 0.2, 0.3, -0.3]
    assert statistics.sign_flip_test(differences) == np.mean(
        [abs(a + 2 * b + 3 * c + 3 * d) >= 3 for a, b, c, d in itertools.product((1, -1), repeat=4)]
    )


@pytest.mark.parametrize("differences", [[], [float("nan")], [1.0, float("inf")]])
def test_sign_flip_refuses_what_is_no_difference(differences):
    with pytest.raises(ValueError, match=r"one or more, each a finite number"):
        statistics.sign_flip_test(differences)


def test_holm_by_hand():
    # sorted 0.01 x4 = 0.04, 0.02 x3 = 0.06, 0.03 x2 = 0.06, 0.9 x1 = 0.9; the third may not fall below the second.
    assert statistics.holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert statistics.holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert statistics.holm([0.05]) == pytest.approx([0.05])
    with pytest.raises(ValueError, match="between 0 and 1"):
        statistics.holm([0.5, 1.5])


def test_seeds_needed_are_the_designs_and_enough():
    assert [statistics.seeds_needed(m) for m in (1, 5, 8, 20)] == [6, 8, 9, 10]
    for m in (1, 5, 8, 20):
        n = statistics.seeds_needed(m)
        smallest = [statistics.sign_flip_test(np.ones(k)) for k in (n - 1, n)]
        assert smallest[1] * m <= 0.05 < smallest[0] * m


def test_effect_size_is_that_of_the_power_tables():
    assert statistics.effect_size(34) == pytest.approx(0.495, abs=2e-3)  # G*Power: n = 34 for dz = 0.5 has power 0.808
    assert statistics.effect_size(10) == pytest.approx(0.996, abs=2e-3)  # G*Power: n = 10 for dz = 1.0 has power 0.803


def test_smallest_difference_is_found_four_times_in_five():
    seen = np.array([0.5, -0.5, 1.5, -1.5])
    shift = statistics.smallest_difference(seen)
    draws = np.random.default_rng(1).normal(shift, seen.std(ddof=1), (20_000, 4))
    assert np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.01)
    assert statistics.smallest_difference([0.3]) is None


def test_sign_flip_beyond_what_can_be_counted_is_drawn_and_agrees_with_the_exact_one(monkeypatch):
    differences = np.random.default_rng(1).normal(0.35, 1, 14)
    exact = statistics.sign_flip_test(differences)
    monkeypatch.setattr(statistics, "MOST_FLIPS", 10)
    drawn = statistics.sign_flip_test(differences)
    assert drawn == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 99_999) ** 0.5)
    assert drawn == statistics.sign_flip_test(differences)  # with a fixed seed
    monkeypatch.undo()
    assert statistics.sign_flip_test(np.ones(30)) == pytest.approx(2e-5)  # 2 / 100,000: the smallest that draws can show


def test_bca_is_scipys_and_needs_values_that_differ():
    values = np.random.default_rng(2).gamma(2.0, 3.0, 12)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(0))
    found = statistics.bca_interval(values)
    assert found == pytest.approx((theirs.confidence_interval.low, theirs.confidence_interval.high))
    t = statistics.summary(values)
    assert found[0] > t.low and found[1] - values.mean() > values.mean() - found[0]  # skewed to the right, as the values are
    assert statistics.bca_interval([5.0]) is None and statistics.bca_interval([5.0, 5.0, 5.0]) is None


def test_interquartile_mean_by_hand():
    # Eight values, two cut at each end. Seven: a quarter of seven is 1.75, of which whole values are cut: one at each end.
    assert statistics.interquartile_mean([[1, 2, 3, 4], [5, 6, 7, 100]]) == pytest.approx((3 + 4 + 5 + 6) / 4)
    assert statistics.interquartile_mean([0, 1, 2, 3, 4, 5, 60]) == pytest.approx((1 + 2 + 3 + 4 + 5) / 5)
    assert statistics.interquartile_mean([]) is None


def test_probability_of_improvement_by_hand_and_by_mann_and_whitney():
    assert statistics.probability_of_improvement([3, 1], [2, 1]) == (2 + 0.5) / 4  # 3 beats both; 1 ties 1, loses to 2
    ours, theirs = np.random.default_rng(4).normal(size=(2, 9))
    u = stats.mannwhitneyu(ours, theirs[:7]).statistic
    assert statistics.probability_of_improvement(ours, theirs[:7]) == pytest.approx(u / 63)
    assert statistics.probability_of_improvement([], [1.0]) is None


def test_stratified_interval_draws_seeds_within_each_task():
    # Two tasks far apart, each without scatter: drawn together they would vary by 50 points, within tasks by nothing.
    assert statistics.stratified_interval([np.full(5, 10.0), np.full(5, 60.0)]) == (35.0, 35.0)
    assert statistics.stratified_interval([np.full(5, 10.0), np.full(5, 60.0)], "iqm") == (35.0, 35.0)
    tasks = [np.random.default_rng(i).normal(50 + 20 * i, 1 + i, 40) for i in range(3)]
    low, high = statistics.stratified_interval(tasks)
    error = np.sqrt(sum(task.var(ddof=1) / 40 for task in tasks)) / 3  # of the mean of three means
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    assert statistics.stratified_interval([np.array([1.0]), np.array([1.0, 2.0])]) is None


@pytest.mark.slow
def test_what_seeds_could_have_seen_is_what_the_test_finds_four_times_in_five():
    for n, m in ((8, 5), (10, 5), (6, 1)):
        effect = statistics.detectable(n, m)
        assert statistics.sign_flip_power(n, effect, m) == pytest.approx(0.8, abs=0.002)
        draws = np.random.default_rng(100 + n).normal(effect, 1, (800, n))
        found = np.mean([statistics.sign_flip_test(d) <= 0.05 / m for d in draws])
        assert found == pytest.approx(0.8, abs=0.05)
    assert statistics.detectable(5, 5) == statistics.effect_size(5, 0.8, 0.99)  # too few for the test: what a t test could
    assert statistics.detectable(8, 5) > statistics.detectable(8, 1) > statistics.detectable(9, 1)


def test_random_effects_are_those_of_a_plain_computation():
    """By hand for y = 1, 3, 8 and v = 1, 1, 4: w = 1, 1, 1/4; fixed mean 6 / 2.25; Q and tau^2 as the papers have them."""
    y, v = np.array([1.0, 3.0, 8.0]), np.array([1.0, 1.0, 4.0])
    w = 1 / v
    fixed = (w * y).sum() / w.sum()
    tau2 = ((w * (y - fixed) ** 2).sum() - 2) / (w.sum() - (w**2).sum() / w.sum())
    w = 1 / (v + tau2)
    mean = (w * y).sum() / w.sum()
    scale = (w * (y - mean) ** 2).sum() / 2
    found = statistics.random_effects(y, v)
    from scipy.stats import t

    error = np.sqrt(max(scale, 1) / w.sum())
    assert (found.mean, found.tau) == pytest.approx((mean, np.sqrt(tau2)))
    assert found.high - found.mean == pytest.approx(t.ppf(0.975, 2) * error)
    assert found.predicted_high - found.mean == pytest.approx(t.ppf(0.975, 1) * np.sqrt(tau2 + error**2))
    assert statistics.random_effects([1, 2], [1, 1]).predicted_low is None
    assert statistics.random_effects([1], [1]) is None and statistics.random_effects([1, 2], [0, 1]) is None


def test_random_effects_cover_the_mean_of_tasks():
    """Hartung and Knapp's interval at four tasks that differ, where a normal one covers about 87 %."""
    random, held = np.random.default_rng(0), 0
    for _ in range(1_000):
        spread = random.uniform(0.2, 1.0, 4)
        found = statistics.random_effects(random.normal(2, 1, 4) + spread * random.normal(size=4), spread**2)
        held += found.low <= 2 <= found.high
    assert 0.93 <= held / 1_000 <= 0.98


def test_two_one_sided_tests_are_the_90_percent_interval_inside_the_margin():
    random = np.random.default_rng(1)
    for _ in range(50):
        differences = random.normal(0.2, 0.5, 9)
        inside = statistics.summary(differences, level=0.9)
        assert (statistics.equivalence_test(differences, 0.5) <= 0.05) == (inside.low > -0.5 and inside.high < 0.5)
    assert statistics.equivalence_test([0.1, 0.1], 0.5) == 0 and statistics.equivalence_test([0.1], 0.5) == 1
