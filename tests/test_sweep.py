"""Choosing a rate: which is best, where a grid grows, who goes up a rung; by hand."""

import pytest
from rankwise.experiments.study import budget, sweep
from rankwise.experiments.study.budget import SiteCost


def test_the_best_mean_wins_and_a_rate_with_a_failure_comes_last():
    scores = {1e-3: [50.0, 60.0], 2e-3: [56.0, 56.0], 4e-3: [90.0, None], 8e-3: [None, None]}
    assert sweep.ranked(scores) == [2e-3, 1e-3, 4e-3, 8e-3]
    assert sweep.ranked({4e-3: [1.0], 2e-3: [1.0], 8e-3: [1.0]}) == [2e-3, 4e-3, 8e-3]  # ties: the lower


def test_the_order_of_the_runs_decides_no_tie():
    """The two rates have the same three scores, whose plain sums differ in the last bit by their order."""
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    assert sweep.best_rate({1e-3: [0.3, 0.2, 0.1], 2e-3: [0.1, 0.2, 0.3]}) == 1e-3


@pytest.mark.parametrize(
    ("scores", "trials", "wanted"),
    [
        ({1e-3: [1], 3e-3: [2], 9e-3: [1]}, 9, None),  # inside
        ({1e-3: [1], 3e-3: [2], 9e-3: [3]}, 9, 2.7e-2),  # its own step, 3, upwards
        ({1e-3: [3], 3e-3: [2], 9e-3: [1]}, 9, 3.3e-4),  # and downwards, two digits
        ({1e-3: [3], 2e-3: [2], 9e-3: [1]}, 9, 5e-4),  # the step at that edge, not the other's
        ({1e-3: [1], 3e-3: [2], 9e-3: [3]}, 3, None),  # used up
        ({1e-3: [1], 3e-3: [2], 9e-3: [None]}, 9, None),  # what failed counts as tried
        ({1e-3: [None], 3e-3: [None]}, 9, None),  # nothing to go by
        ({1e-3: [1]}, 9, None),  # one rate is no grid
    ],
)
def test_a_grid_grows_where_its_best_rate_stands_at_the_edge(scores, trials, wanted):
    assert sweep.next_rate(scores, trials) == (None if wanted is None else pytest.approx(wanted))


def test_growing_ends_within_the_trials_whatever_the_scores():
    scores = {1e-3: [0.0], 2e-3: [1.0]}
    while (rate := sweep.next_rate(scores, 7)) is not None:
        scores[rate] = [float(len(scores))]
    assert len(scores) == 7 and max(scores) == pytest.approx(6.4e-2)


def test_rungs_grow_by_the_factor_up_to_the_whole_and_keep_one_in_so_many():
    assert sweep.rung_steps(100, 3, 3) == [12, 34, 100]
    assert sweep.rung_steps(2, 4, 3) == [1, 1, 2]
    scores = {rate: [score] for rate, score in zip((1, 2, 3, 4, 5, 6, 7), (3, 9, 1, 8, None, 2, 0), strict=True)}
    assert sweep.survivors(scores, 3) == [2, 4]
    assert sweep.survivors({1.0: [5], 2.0: [6]}, 4) == [2.0]  # at least one


COSTS = {"a": SiteCost(10, 4), "b": SiteCost(30, 4), "c": SiteCost(10, 4), "d": SiteCost(30, 4), "e": SiteCost(20, 4)}


@pytest.mark.parametrize("parameters", [120, 121, 199, 219, 220, 365, 400, 1019, 5000])
def test_ranks_fill_a_budget_and_never_exceed_it(parameters):
    ranks = budget.ranks_for(COSTS, parameters)
    used = sum(COSTS[name].each * rank + COSTS[name].fixed for name, rank in ranks.items())
    assert used <= parameters
    assert max(ranks.values()) - min(ranks.values()) <= 1  # as equal as it can be
    left_out = [COSTS[name].each for name, rank in ranks.items() if rank == min(ranks.values())]
    whole = sum(cost.each for cost in COSTS.values())
    assert parameters - used < (min(left_out) if max(ranks.values()) > min(ranks.values()) else whole)
    if max(ranks.values()) == min(ranks.values()):
        assert parameters - used < min(cost.each for cost in COSTS.values())


def test_one_rank_each_is_the_least():
    assert set(budget.ranks_for(COSTS, 120).values()) == {1}
    with pytest.raises(ValueError, match="a budget of 119 parameters does not give each of 5 sites one rank: that takes 120"):
        budget.ranks_for(COSTS, 119)


def test_extra_ranks_are_spread_over_the_layers():
    costs = {f"layer.{i}": SiteCost(7, 0) for i in range(40)}
    more = [i for i, rank in enumerate(budget.ranks_for(costs, 40 * 7 * 3 + 7 * 10).values()) if rank == 4]
    assert len(more) == 10 and all(any(10 * k <= i < 10 * (k + 1) for i in more) for k in range(4))
