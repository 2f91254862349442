"""The schedule, the exact choice and the sensitivity, each against loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from rankwise.variants.allocation.choice import Bound, choose, keep_top, protected
from rankwise.variants.allocation.schedules import SCHEDULES, scheduled_budget
from rankwise.variants.allocation.scores import Sensitivity
from torch import nn

from tests.loop import Loop
from tests.test_adalora import Net
from tests.tiny import packed_batch, tiny


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
        assert scheduled_budget("cubic", t, 10, 70, 131, 17) == plain_budget(t, 10, 30, 100, 131, 17)


def test_the_schedule_holds_until_the_end_of_the_warm_up_and_starts_at_once_after():
    assert [scheduled_budget("cubic", t, 4, 8, 100, 10) for t in (0, 3, 4, 5, 6, 7, 8, 9)] == [
        100,
        100,
        100,
        47,
        21,
        11,
        10,
        10,
    ]


@given(st.integers(0, 30), st.integers(1, 40), st.integers(0, 60), st.integers(0, 60))
def test_the_schedule_never_rises_and_stays_between_its_ends(start, length, one, other):
    initial, target = max(one, other), min(one, other)
    budgets = [scheduled_budget("cubic", t, start, start + length, initial, target) for t in range(start + length + 3)]
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


# -- the parts ----------------------------------------------------------------------------------------------------------


def test_every_schedule_starts_at_one_end_and_reaches_the_other_without_turning_back():
    for name, left in SCHEDULES.items():
        values = [left(p / 20) for p in range(1, 20)]
        assert all(a >= b for a, b in itertools.pairwise(values)) and all(0 <= v <= 1 for v in values), name
        falling = [scheduled_budget(name, t, 2, 12, 40, 7) for t in range(15)]
        rising = [scheduled_budget(name, t, 2, 12, 7, 40) for t in range(15)]
        assert falling[:3] == [40] * 3 and falling[12:] == [7] * 3 and rising[:3] == [7] * 3 and rising[12:] == [40] * 3
    halfway = {name: scheduled_budget(name, 7, 2, 12, 40, 8) for name in SCHEDULES}
    assert halfway == {"cubic": 12, "cubic-late": 36, "linear": 24, "cosine": 24, "constant": 8}
    assert scheduled_budget("cosine", 4, 2, 12, 1000, 0) == int(1000 * 0.5 * (1 + math.cos(math.pi * 0.2)))


def plain_fill(scores, slots, budget, costs, bounds):
    """The rule in words: least ranks first, single sites before groups; then by score per cost whatever still fits."""
    order = sorted((i for i in range(len(scores)) if slots[i]), key=lambda i: (-scores[i] / costs[i], i))
    kept: list[int] = []

    def fits(i):
        spent = sum(costs[j] for j in kept) + costs[i]
        return (
            i not in kept
            and spent <= budget
            and all(sum(j in b.inside for j in kept) < b.most for b in bounds if i in b.inside and b.most is not None)
        )

    for bound in sorted(bounds, key=lambda b: len(b.inside)):
        for i in order:
            if i in bound.inside and sum(j in bound.inside for j in kept) < bound.least and fits(i):
                kept.append(i)
    for i in order:
        if fits(i):
            kept.append(i)
    return [i in kept for i in range(len(scores))]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_choice_is_the_rule_with_costs_bounds_and_ties(data):
    sites = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))  # slots of each
    width = sum(sites)
    price = [data.draw(st.sampled_from([3, 5, 8])) for _ in sites]
    costs = [p for p, n in zip(price, sites, strict=True) for _ in range(n)]
    places, at = [], 0
    for n in sites:
        places.append(tuple(range(at, at + n)))
        at += n
    bounds = []
    for number, inside in enumerate(places):
        least = data.draw(st.integers(0, 2))
        bounds.append(Bound(str(number), inside, least, data.draw(st.sampled_from([None, least, least + 1, 4]))))
    bounds.append(Bound("first two", tuple(p for inside in places[:2] for p in inside), data.draw(st.integers(0, 3)), None))
    row = st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.0, 6.0, 0.5]), min_size=width, max_size=width)
    scores = [data.draw(row) for _ in range(2)]
    slots = [data.draw(st.lists(st.booleans(), min_size=width, max_size=width)) for _ in range(2)]
    budget = [data.draw(st.integers(0, sum(costs))) for _ in range(2)]
    found = choose(torch.tensor(scores).double(), torch.tensor(slots), torch.tensor(budget), costs, bounds)
    for k in range(2):
        assert found[k].tolist() == plain_fill(scores[k], slots[k], budget[k], costs, bounds)
        spent = sum(c for c, keep in zip(costs, found[k].tolist(), strict=True) if keep)
        assert spent <= budget[k]
    free = choose(torch.tensor(scores).double(), torch.tensor(slots), torch.tensor(budget), costs)
    for k in range(2):
        left_out = [c for c, keep, exists in zip(costs, free[k].tolist(), slots[k], strict=True) if exists and not keep]
        spent = sum(c for c, keep in zip(costs, free[k].tolist(), strict=True) if keep)
        assert spent <= budget[k] and (not left_out or budget[k] - spent < min(left_out))


def test_without_costs_and_bounds_the_choice_is_the_top():
    scores, slots = torch.tensor([[2.0, 1.0, 2.0, 3.0]]), torch.tensor([[True, True, True, False]])
    assert choose(scores, slots, torch.tensor([2])).tolist() == [[True, False, True, False]]
    assert choose(scores, slots, torch.tensor([2]), must=torch.tensor([[False, True, False, True]])).tolist() == [
        [True, True, False, False]
    ]


def test_what_a_direction_protects():
    scores, kept = torch.tensor([[5.0, 1.0, 3.0, 9.0, 1.0]]), torch.tensor([[True, True, True, False, True]])
    assert not protected("prune", scores, kept, 2).any()
    assert torch.equal(protected("grow", scores, kept, 2), kept)
    assert protected("both", scores, kept, 2).tolist() == [[True, False, True, False, False]]
    assert protected("both", scores, kept, 1).tolist() == [[True, False, True, False, True]]  # of equal ones the first goes


# -- scores, against loops ----------------------------------------------------------------------------------------------------


def scored(score: str, form: str = "triplet", **others):
    values = {"initial_rank": [4, 3, 2], "target_rank": [2, 2, 1], "alpha": [7.0, 3.0, 11.0], "score": score, "form": form}
    adapter = variants.create("allocated", members=3, seeds=[5, 3, 8], **{**values, **others}).attach(Net())
    fill(adapter, 0.5)
    return adapter


def with_gradients(adapter, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)


def plain_scores(score: str, site, k: int, i: int) -> float:
    """What one slot is worth now, without smoothing."""
    A, B = site.A[k, i].detach(), site.B[k, :, i].detach()
    e = site.E[k, i].item() if hasattr(site, "E") else None
    if score == "raw-sensitivity":
        means = [
            sum(abs(w * g) for w, g in zip(v.tolist(), d.tolist(), strict=True)) / len(v)
            for v, d in ((A, site.A.grad[k, i]), (B, site.B.grad[k, :, i]))
        ]
        return sum(means) + (0.0 if e is None else abs(e * site.E.grad[k, i].item()))
    if score == "magnitude":
        return abs(e) if e is not None else float(site.scale[k] * torch.outer(B, A).norm())
    if score == "gradient":
        return abs(site.E.grad[k, i].item()) if e is not None else abs(float(B @ site.B.grad[k, :, i]))
    raise AssertionError(score)


@pytest.mark.parametrize("form", ["triplet", "doublet"])
@pytest.mark.parametrize("score", ["raw-sensitivity", "smoothed-sensitivity", "magnitude", "gradient"])
def test_a_score_is_the_plain_one(score, form):
    adapter = scored(score, form, **({"beta1": 0.6} if score in ("smoothed-sensitivity", "gradient") else {}))
    average: dict = {}
    for step in range(3):
        with_gradients(adapter, step)
        adapter.score.update(adapter.triplets(), torch.tensor([True, step != 1, True]))
        for n, site in enumerate(adapter.triplets()):
            for k, r in enumerate([4, 3, 2]):
                for i in range(r):
                    raw = "raw-sensitivity" if score == "smoothed-sensitivity" else score
                    now, key = plain_scores(raw, site, k, i), (n, k, i)
                    if score in ("smoothed-sensitivity", "gradient"):
                        old = average.get(key, 0.0)
                        average[key] = old if (k, step) == (1, 1) else 0.6 * old + 0.4 * now
                    elif score == "magnitude" or (k, step) != (1, 1):
                        average[key] = now
                    assert adapter.triplet_scores()[n][k, i].item() == pytest.approx(average[key], rel=1e-9), key


def test_random_scores_are_the_member_s_own_and_stay():
    adapter = scored("random")
    before = torch.cat(adapter.triplet_scores(), 1).clone()
    with_gradients(adapter, 0)
    adapter.score.update(adapter.triplets(), torch.ones(3, dtype=torch.bool))
    assert torch.equal(torch.cat(adapter.triplet_scores(), 1), before)
    alone = variants.create("allocated", seeds=[3], initial_rank=4, target_rank=2, score="random").attach(Net())
    assert torch.equal(torch.cat(alone.triplet_scores(), 1)[0], before[1])
    assert len(before.unique()) == before.numel()


def test_uniform_scores_give_every_site_the_same_rank_and_spread_the_rest():
    adapter = variants.create("allocated", initial_rank=6, target_rank=3, score="uniform", target_total=41)
    adapter.attach(tiny("bert"))  # 12 sites
    loop = Loop(adapter, total=6)
    for index in range(6):
        loop.step(packed_batch([0], index))
    ranks = [rank.item() for rank in adapter.ranks().values()]
    assert sorted(ranks) == [3] * 7 + [4] * 5
    assert ranks[:6].count(4) in (2, 3), "the rest lies on one side of the model"


# -- the parts together, in training ----------------------------------------------------------------------------------


COMBINATIONS = [
    {"score": "magnitude", "schedule": "linear"},
    {"score": "norm-share", "schedule": "cosine", "cost": "parameters", "form": "doublet"},
    {"score": "sensitivity", "schedule": "constant", "cost": "parameters", "least_rank": 1, "most_rank": 4},
    {"score": "gradient", "schedule": "cubic", "direction": "grow", "initial_rank": 1, "most_rank": 5},
    {"score": "gradient", "direction": "both", "most_rank": 6, "initial_rank": 3, "target_rank": 3, "exchange": 2},
    {"score": "random", "schedule": "cubic-late", "magnitude": True, "rank_bounds": {"query": [2, 3]}},
    {"score": "uniform", "group_bounds": {"intermediate.dense": [1, 2]}, "orthogonality": 0.2},
]


@pytest.mark.parametrize(
    "parts", COMBINATIONS, ids=lambda parts: "-".join(str(v) for v in parts.values() if isinstance(v, str))
)
def test_any_parts_train_together_within_budget_and_bounds(parts):
    values = {"initial_rank": 4, "target_rank": 2, "warmup_steps": 1, "final_steps": 3, "interval": 2} | parts
    if parts.get("direction", "prune") == "prune" and "most_rank" not in parts:
        values["initial_rank"] = [4, 3, 4]
    if "rank_bounds" in parts:
        values["rank_pattern"] = {"query": 3}
    adapter = variants.create("allocated", members=3, seeds=[5, 3, 8], **values).attach(tiny("bert"))
    loop, total = Loop(adapter, [1e-2, 2e-2, 5e-3], 10), 10
    last = None
    for index in range(1, total + 1):
        loop.step(packed_batch(adapter.seeds, index))
        ranks = torch.stack(list(adapter.ranks().values()))  # (sites, K)
        if parts.get("direction") == "grow" and last is not None:
            assert (ranks >= last).all()
        if parts.get("direction") == "both" and last is not None:
            assert ((ranks - last).clamp_min(0).sum(0) <= 2).all() and torch.equal(ranks.sum(0), last.sum(0))
        last = ranks
    costs = torch.tensor([adapter._price(site) if values.get("cost") == "parameters" else 1 for site in adapter.triplets()])
    spent, budget = (last * costs[:, None]).sum(0), adapter.cost_budget(Step(total, total))
    if values.get("cost") == "parameters":
        assert (spent <= budget).all() and (budget - spent < costs.max()).all()
        assert adapter.budget(Step(total, total)) is None
    else:
        assert torch.equal(spent, budget)
    if "least_rank" in parts:
        assert last.min() >= 1 and last.max() <= 4
    if "rank_bounds" in parts:
        queries = torch.stack([rank for name, rank in adapter.ranks().items() if name.endswith("query")])
        assert queries.min() >= 2 and queries.max() <= 3
    if "group_bounds" in parts:
        group = sum(rank for name, rank in adapter.ranks().items() if name.endswith("intermediate.dense"))
        assert (group >= 1).all() and (group <= 2).all()
    assert {name: rank.tolist() for name, rank in adapter.live_ranks().items()} == {
        name: rank.tolist() for name, rank in adapter.ranks().items()
    }


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"target_rank": 5}, "target_rank = 5 is above initial_rank = 4"),
        ({"beta2": 0.5, "score": "magnitude"}, 'beta2 = 0.5 has no effect with score = "magnitude"'),
        ({"exchange": 2}, 'exchange = 2 has no effect with direction = "prune"'),
        ({"target_total": 9, "cost": "parameters"}, 'target_total = 9 has no effect with cost = "parameters"'),
        ({"direction": "grow", "target_rank": 6}, 'direction = "grow" needs most_rank'),
        ({"least_rank": 3, "most_rank": 2}, "least rank 3 is above the most rank 2"),
        ({"most_rank": 3}, "starts at rank 4, above its most rank 3"),
        ({"least_rank": 3}, "least rank 3 of .* does not fit into the budget of 24 triplets"),
        (
            {"group_bounds": {"query": [0, 1], "key|value|dense": [0, 9]}},
            "the bounds leave room for 10 ranks of a budget of 24",
        ),
        ({"rank_bounds": {"qvery": [0, 1]}}, 'rank_bounds = {"qvery": ...} matches none .* did you mean "query"'),
        ({"score": "sensibility"}, "score"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(values, told):
    model = tiny("bert")
    with pytest.raises(ValueError, match=told):
        variants.create("allocated", **{"initial_rank": 4, "target_rank": 2, **values}).attach(model)
    assert not any(type(module).__name__ == "Adapted" for module in model.modules())
