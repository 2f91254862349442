"""The two designs against the slow oracles, and that they err no more often than they say."""

from itertools import product

import numpy as np
import pytest
from rankwise.reports import designs
from rankwise.reports.designs import Curve, one_rate, shared_rate, whole_curve

from tests.slow_designs import slow_shared_rate, slow_whole_curve

RATES = (1e-3, 2e-3, 4e-3)


def drawn(random, seeds, steepness=0.5, shift=0.0, rates=3):
    """A pair of methods: the sd of a run is 1, half of its variance is the seed's, a rate one step off costs `steepness`."""
    step, seed_effect = np.arange(rates) - rates // 2, np.sqrt(0.5) * random.standard_normal(seeds)

    def one(shift):
        y = -steepness * step[:, None] ** 2 + seed_effect + np.sqrt(0.5) * random.standard_normal((rates, seeds)) + shift
        return y + 0.5 * random.standard_normal(y.shape), y

    return *one(shift), *one(0.0)


def curves(va, ya, vr, yr):
    rates = tuple(1e-3 * 2**k for k in range(len(va)))
    return Curve(rates, va, ya), Curve(rates, vr, yr)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("test", "slow"), [(whole_curve, slow_whole_curve), (shared_rate, slow_shared_rate)])
def test_p_is_that_of_the_slow_oracle(test, slow, seed):
    pair = drawn(np.random.default_rng(seed), 6, shift=0.5 * seed)
    assert test(*curves(*pair)).p == pytest.approx(slow(*pair), abs=1e-12)


def test_ties_count_as_reached():
    v = np.array([[1.0, 2.0, 1.0, 2.0]])
    pair = v, v, v, v - 1.0  # one rate, every difference 1: only the two extreme swaps reach it
    assert whole_curve(*curves(*pair)).p == slow_whole_curve(*pair) == 2 / 16
    assert whole_curve(*curves(v, v, v, v)).p == 1.0


@pytest.mark.parametrize("test", [whole_curve, shared_rate])
@pytest.mark.parametrize("seed", range(4))
def test_the_interval_holds_exactly_the_shifts_that_are_not_rejected(test, seed):
    va, ya, vr, yr = drawn(np.random.default_rng(seed), 8, shift=1.0)
    found = test(*curves(va, ya, vr, yr), level=0.9)
    step = 1e-6 * (found.high - found.low)
    for shift, inside in ((found.low, 1), (found.high, -1)):
        assert test(*curves(va, ya - (shift + inside * step), vr, yr)).p > 0.1
        assert test(*curves(va, ya - (shift - inside * step), vr, yr)).p <= 0.1
    assert found.low < found.difference < found.high


def test_three_seeds_support_no_interval_at_95_percent():
    found = whole_curve(*curves(*drawn(np.random.default_rng(0), 3)))
    assert (found.low, found.high) == (-np.inf, np.inf)  # 2^-2 is the smallest p


def test_the_rates_are_chosen_again_for_every_swap():
    """One method's curve peaks elsewhere: with the rates held as chosen, p would be another."""
    va, ya, vr, yr = drawn(np.random.default_rng(3), 7, steepness=0.05)
    held = ya[va.mean(1).argmax()] - yr[vr.mean(1).argmax()]
    sums = [abs((np.array(signs) * held).sum()) for signs in product([1, -1], repeat=7)]
    as_given = np.mean([total >= abs(held.sum()) - 1e-9 for total in sums])
    assert whole_curve(*curves(va, ya, vr, yr)).p != pytest.approx(as_given)


@pytest.mark.parametrize(("test", "most"), [(whole_curve, 0.075), (shared_rate, 0.075)])
@pytest.mark.parametrize("steepness", [0.1, 1.0])
def test_equal_methods_are_told_apart_in_at_most_five_percent(test, most, steepness):
    random = np.random.default_rng(1)
    errors = np.mean([test(*curves(*drawn(random, 8, steepness))).p <= 0.05 for _ in range(400)])
    assert errors <= most  # 5 % and 2.3 standard errors of 400 draws


def test_a_difference_of_three_sd_is_found():
    assert whole_curve(*curves(*drawn(np.random.default_rng(0), 8, shift=3.0))).p <= 0.05


def test_an_edge_is_named_for_the_method_that_has_it():
    va, ya, vr, yr = drawn(np.random.default_rng(0), 8, steepness=50.0)
    rising = va + 200.0 * np.arange(3)[:, None]
    assert whole_curve(*curves(rising, ya, vr, yr)).at_edge == (True, False)
    assert whole_curve(*curves(va, ya, vr, yr)).rates == (2e-3, 2e-3)


def test_drawn_swaps_agree_with_all_of_them(monkeypatch):
    """Beyond MOST_EXACT seeds swaps are drawn, the one seen among them: within four standard errors of the exact p."""
    pair = curves(*drawn(np.random.default_rng(5), 10))
    exact = whole_curve(*pair).p
    monkeypatch.setattr(designs, "MOST_EXACT", 5)
    designs._swaps.cache_clear()
    some = whole_curve(*pair)
    designs._swaps.cache_clear()
    assert 0.02 < exact < 0.98
    assert some.p != exact and abs(some.p - exact) < 4 * np.sqrt(exact * (1 - exact) / designs.DRAWN)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda c: Curve(c.rates[::-1], c.selection, c.reported), "ascending"),
        (lambda c: Curve(c.rates, c.selection[:2], c.reported), "both are"),
        (lambda c: Curve(c.rates, c.selection * np.nan, c.reported), "constant predictor"),
    ],
)
def test_a_curve_that_is_none_is_refused(change, fault):
    ours, _ = curves(*drawn(np.random.default_rng(0), 4))
    with pytest.raises(ValueError, match=fault):
        change(ours)


def test_curves_of_other_sizes_are_refused():
    random = np.random.default_rng(0)
    ours, _ = curves(*drawn(random, 4))
    _, reference = curves(*drawn(random, 5))
    with pytest.raises(ValueError, match="the same seeds of both"):
        whole_curve(ours, reference)
    with pytest.raises(ValueError, match="one grid"):
        shared_rate(ours, Curve((1e-3, 2e-3, 8e-3), ours.selection, ours.reported))


def test_equivalence_is_the_interval_inside_the_margin_at_every_level():
    random = np.random.default_rng(2)
    ours, other = random.normal(0.1, 0.3, 9), random.normal(0, 0.3, 9)
    p = one_rate(ours, other).equivalence_p(0.6)
    for alpha in (p - 0.004, p + 0.004):  # of 2^9 permutations
        assert one_rate(ours, other, level=1 - 2 * alpha).equivalent_within(0.6) == (p <= alpha)
    assert 0 < p < 0.5 and one_rate(ours + 1, other).equivalence_p(0.6) == 1
