"""The schedule, the exact choice and the sensitivity, each against loops."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from variants.allocation import Sensitivity, cubic_budget, keep_top


def plain_budget(t: int, warmup: int, final: int, total: int, initial: int, target: int) -> int:
    """AdaLoRA's b(t), with the release's numerator."""
    if t <= warmup:
        return initial
    if t >= total - final:
        return target
    return int(target + (initial - target) * (1 - (t - warmup) / (total - final - warmup)) ** 3)


def plain_choice(scores: list[float], slots: list[bool], budget: int) -> list[bool]:
    """The `budget` best, one by one; of equal ones the first."""
    kept = [False] * len(scores)
    for _ in range(budget):
        best = None
        for i, score in enumerate(scores):
            if slots[i] and not kept[i] and (best is None or score > scores[best]):
                best = i
        if best is not None:
            kept[best] = True
    return kept


def test_the_cubic_schedule_is_the_papers():
    for t in range(1, 101):
        assert cubic_budget(t, 10, 70, 131, 17) == plain_budget(t, 10, 30, 100, 131, 17)


def test_the_schedule_holds_until_the_end_of_the_warm_up_and_starts_at_once_after():
    assert [cubic_budget(t, 4, 8, 100, 10) for t in (0, 3, 4, 5, 6, 7, 8, 9)] == [100, 100, 100, 47, 21, 11, 10, 10]


@given(st.integers(0, 30), st.integers(1, 40), st.integers(0, 60), st.integers(0, 60))
def test_the_schedule_never_rises_and_stays_between_its_ends(start, length, one, other):
    initial, target = max(one, other), min(one, other)
    budgets = [cubic_budget(t, start, start + length, initial, target) for t in range(start + length + 3)]
    assert budgets[0] == initial and budgets[-1] == target
    assert all(a >= b for a, b in itertools.pairwise(budgets))


@given(st.data())
def test_exactly_the_budget_is_kept_ties_in_site_order(data):
    members, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    row = st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.0, 2.0, 0.1, 1e-30]), min_size=width, max_size=width)
    scores = data.draw(st.lists(row, min_size=members, max_size=members))
    bits = st.lists(st.booleans(), min_size=width, max_size=width)
    slots = data.draw(st.lists(bits, min_size=members, max_size=members))
    budgets = data.draw(st.lists(st.integers(0, width + 2), min_size=members, max_size=members))
    kept = keep_top(torch.tensor(scores, dtype=torch.float64), torch.tensor(slots), torch.tensor(budgets))
    assert kept.tolist() == [plain_choice(s, b, n) for s, b, n in zip(scores, slots, budgets, strict=True)]
    assert kept.sum(1).tolist() == [min(n, sum(b)) for b, n in zip(slots, budgets, strict=True)]


def test_all_scores_equal_keeps_the_first_and_not_none():
    kept = keep_top(torch.zeros(1, 5), torch.tensor([[True, False, True, True, True]]), torch.tensor([2]))
    assert kept.tolist() == [[True, False, True, False, False]]


@pytest.mark.parametrize("beta1, beta2", [(0.85, 0.85), (0.9, 0.5), (0.0, 0.0)])
def test_sensitivity_is_the_papers_element_by_element(beta1, beta2):
    torch.manual_seed(0)
    tensor = nn.Parameter(torch.randn(3, 2, 5, dtype=torch.float64))
    sensitivity = Sensitivity([tensor], beta1, beta2).double()
    smoothed, uncertain = np.zeros((3, 2, 5)), np.zeros((3, 2, 5))
    for _ in range(6):
        tensor.grad = torch.randn_like(tensor)
        sensitivity.update([tensor], torch.ones(3, dtype=torch.bool))
        for index in np.ndindex(3, 2, 5):
            now = abs(tensor.detach().numpy()[index] * tensor.grad.numpy()[index])
            smoothed[index] = beta1 * smoothed[index] + (1 - beta1) * now
            uncertain[index] = beta2 * uncertain[index] + (1 - beta2) * abs(now - smoothed[index])
    np.testing.assert_allclose(sensitivity.smoothed(0), smoothed, rtol=1e-12)
    np.testing.assert_allclose(sensitivity.uncertainty(0), uncertain, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(sensitivity.score(0), smoothed * uncertain, rtol=1e-12, atol=1e-300)


def two_steps(spoil: float | None, counted: list[bool]) -> list[torch.Tensor]:
    """Averages after a good step and a second one, whose gradient of member 1 has one element `spoil`."""
    torch.manual_seed(0)
    tensors = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 2))]
    sensitivity = Sensitivity(tensors, 0.85, 0.85)
    for step in range(2):
        for tensor in tensors:
            tensor.grad = torch.randn_like(tensor)
        if step and spoil is not None:
            tensors[1].grad[1, 0] = spoil
        sensitivity.update(tensors, torch.tensor(counted) if step else torch.ones(3, dtype=torch.bool))
    return [sensitivity.smoothed(i) for i in (0, 1)] + [sensitivity.uncertainty(i) for i in (0, 1)]


@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_updates_nothing_of_that_member(spoil):
    expected = two_steps(None, [True, False, True])
    for found, wanted in zip(two_steps(spoil, [True] * 3), expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_member_that_does_not_count_keeps_its_averages():
    counted, not_counted = two_steps(None, [True] * 3), two_steps(None, [True, False, True])
    for one, other in zip(counted, not_counted, strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
        assert not torch.equal(one[1], other[1])


def test_a_tensor_without_a_gradient_keeps_its_score():
    torch.manual_seed(0)
    tensors = [nn.Parameter(torch.randn(1, 4)) for _ in range(2)]
    sensitivity = Sensitivity(tensors, 0.85, 0.85)
    for tensor in tensors:
        tensor.grad = torch.randn_like(tensor)
    sensitivity.update(tensors, torch.ones(1, dtype=torch.bool))
    before = [sensitivity.score(i).clone() for i in (0, 1)]
    tensors[0].grad = None
    sensitivity.update(tensors, torch.ones(1, dtype=torch.bool))
    assert torch.equal(sensitivity.score(0), before[0]) and not torch.equal(sensitivity.score(1), before[1])
