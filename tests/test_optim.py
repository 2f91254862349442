"""AdamW with a member axis is torch's AdamW for each member; clipping and the schedule likewise."""

import itertools
import math

import pytest
import torch
from rankwise.experiments.training.optim import MemberAdamW
from rankwise.experiments.training.schedule import schedule_factor
from rankwise.variants.adapter.step import Group

STEPS = 60
SHAPES = ((3, 5), (4,), (2, 3, 2))  # of one member's tensors: decayed, undecayed with its own rate, decayed
DECAYS, SCALES = (1.0, 0.0, 0.5), (1.0, 16.0, 0.25)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(member: int, tensor: int, step: int) -> torch.Tensor:
    """Uneven sizes, and now and then nothing."""
    value = draw(10_000 * member + 100 * step + tensor, *SHAPES[tensor]) * 10 ** (tensor - step % 3)
    return value * 0 if step % 7 == tensor else value


def members_of(ks: list[int]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.stack([draw(k * 10 + i, *shape) for k in ks])) for i, shape in enumerate(SHAPES)]


def groups_of(params: list[torch.nn.Parameter]) -> list[Group]:
    return [Group([p], lr_scale=s, weight_decay=d) for p, s, d in zip(params, SCALES, DECAYS, strict=True)]


def ours(ks: list[int], rates: list[float], decay: float, steps: int = STEPS) -> tuple[MemberAdamW, list[torch.nn.Parameter]]:
    params = members_of(ks)
    optimizer = MemberAdamW(groups_of(params), torch.tensor(rates, dtype=torch.float64), decay)
    for step in range(1, steps + 1):
        for i, p in enumerate(params):
            p.grad = torch.stack([gradient(k, i, step) for k in ks])
        optimizer.step(schedule_factor("cosine", step, steps, 5))
        optimizer.zero_grad()
    return optimizer, params


def torchs(k: int, rate: float, decay: float, steps: int = STEPS) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(p.detach()[0].clone()) for p in members_of([k])]
    groups = [
        {"params": [p], "lr": rate * s, "weight_decay": decay * d} for p, s, d in zip(params, SCALES, DECAYS, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, foreach=False, fused=False)
    for step in range(1, steps + 1):
        for group, s in zip(optimizer.param_groups, SCALES, strict=True):
            group["lr"] = rate * s * schedule_factor("cosine", step, steps, 5)
        for i, p in enumerate(params):
            p.grad = gradient(k, i, step)
        optimizer.step()
    return params


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_one_member_is_torch_adamw(decay):
    _, params = ours([2], [3e-2], decay)
    for mine, theirs in zip(params, torchs(2, 3e-2, decay), strict=True):
        torch.testing.assert_close(mine[0], theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_each_of_three_members_is_torch_adamw_with_its_own_rate(decay):
    rates = [1e-3, 3e-1, 2e-2]
    _, params = ours([0, 1, 2], rates, decay)
    for k, rate in enumerate(rates):
        for mine, theirs in zip(params, torchs(k, rate, decay), strict=True):
            torch.testing.assert_close(mine[k], theirs, rtol=1e-11, atol=1e-13)


def test_members_that_are_not_taken_keep_everything_bit_for_bit_and_their_own_step_count():
    rates = [1e-2, 1e-2, 1e-2]
    optimizer, params = ours([0, 1, 2], rates, 0.1, steps=4)
    for i, p in enumerate(params):
        p.grad = torch.stack([gradient(k, i, 5) for k in range(3)])
        p.grad[1] = torch.nan
    before = [t.clone() for t in [*params, *optimizer.first, *optimizer.second]]
    optimizer.step(0.5, torch.tensor([True, False, True]))
    for old, new in zip(before, [*params, *optimizer.first, *optimizer.second], strict=True):
        assert torch.equal(old[1], new[1])
        assert not torch.equal(old[0], new[0])
        assert torch.isfinite(new).all()
    assert optimizer.taken.tolist() == [5, 4, 5]
    # What follows is what a member does that never met the bad step.
    for i, p in enumerate(params):
        p.grad = torch.stack([gradient(k, i, 6) for k in range(3)])
    optimizer.step(0.5)
    lone, own = ours([1], [1e-2], 0.1, steps=4)
    for i, p in enumerate(own):
        p.grad = gradient(1, i, 6)[None]
    lone.step(0.5)
    for packed, alone in zip(params, own, strict=True):
        torch.testing.assert_close(packed[1], alone[0], rtol=1e-12, atol=1e-14)


def test_a_step_that_nobody_takes_changes_nothing():
    for ks in ([0], [0, 1]):
        optimizer, params = ours(ks, [1e-2] * len(ks), 0.1, steps=3)
        everything = [*params, *optimizer.state().values()]
        before = [tensor.detach().clone() for tensor in everything]
        for p in params:
            p.grad = torch.full_like(p, torch.nan)
        optimizer.step(1.0, torch.zeros(len(ks), dtype=torch.bool))
        assert all(torch.equal(old, new) for old, new in zip(before, everything, strict=True))


@pytest.mark.parametrize("ks", [[0], [0, 1, 2]])
def test_a_parameter_without_a_gradient_stays(ks):
    optimizer, params = ours(ks, [1e-2] * len(ks), 0.1, steps=2)
    before = params[1].detach().clone()
    params[0].grad = torch.ones_like(params[0])
    optimizer.step(1.0)
    assert torch.equal(params[1], before)


@pytest.mark.parametrize("ks", [[0], [0, 1, 2]])
def test_a_rate_scale_may_differ_between_members_and_slots_and_is_read_every_step(ks):
    K = len(ks)
    scale = torch.tensor([[1.0, 0.0, 4.0], [0.5, 2.0, 0.0], [3.0, 1.0, 1.0]], dtype=torch.float64)[:K]
    rates = torch.tensor([1e-2, 1e-3, 1e-4], dtype=torch.float64)[:K]
    p = torch.nn.Parameter(torch.zeros(K, 3, 2, dtype=torch.float64))
    optimizer = MemberAdamW([Group([p], lr_scale=scale)], rates, 0.0)
    for _ in range(2):
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer.step(1.0)  # the first steps of Adam move by the rate itself
        expected = -(rates[:, None, None] * scale[:, :, None]).expand_as(p)
        torch.testing.assert_close(p.detach() - before, expected, rtol=1e-6, atol=1e-12)
        scale *= 10


def test_a_step_is_seen_by_what_watches_versions():
    for ks in ([0], [0, 1]):  # DoRA keeps its norm while no parameter has a new version
        params = members_of(ks)
        optimizer = MemberAdamW(groups_of(params), torch.full((len(ks),), 1e-2, dtype=torch.float64))
        versions = [p._version for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(1.0)
        assert all(p._version > v for p, v in zip(params, versions, strict=True))


@pytest.mark.parametrize("ks", [[0], [0, 1, 2]])
def test_clipping_is_each_member_s_own(ks):
    params = members_of(ks)
    optimizer = MemberAdamW(groups_of(params), torch.ones(len(ks), dtype=torch.float64))
    sizes = [1.0, 1e-3, 50.0]  # the second stays below the limit
    for i, p in enumerate(params):
        p.grad = torch.stack([draw(70 + 10 * k + i, *SHAPES[i]) * sizes[k] for k in ks])
    apart = []
    for k in range(len(ks)):
        own = [torch.nn.Parameter(p.detach()[k].clone()) for p in params]
        for one, p in zip(own, params, strict=True):
            one.grad = p.grad[k].clone()
        norm = torch.nn.utils.clip_grad_norm_(own, 0.7)
        apart.append((norm, [p.grad for p in own]))
    norms = optimizer.gradient_norms()
    optimizer.clip(norms, 0.7)
    for k, (norm, gradients) in enumerate(apart):
        torch.testing.assert_close(norms[k], norm)
        for p, g in zip(params, gradients, strict=True):
            torch.testing.assert_close(p.grad[k], g, rtol=1e-12, atol=0)


def test_a_member_whose_norm_is_not_finite_does_not_touch_the_gradients_of_others():
    params = members_of([0, 1])
    optimizer = MemberAdamW(groups_of(params), torch.ones(2, dtype=torch.float64))
    for i, p in enumerate(params):
        p.grad = torch.stack([draw(i, *SHAPES[i]) * 1e-3, torch.full(SHAPES[i], torch.inf, dtype=torch.float64)])
    before = [p.grad[0].clone() for p in params]
    norms = optimizer.gradient_norms()
    optimizer.clip(norms, 1.0)
    assert norms.isfinite().tolist() == [True, False]
    assert all(torch.equal(p.grad[0], old) for p, old in zip(params, before, strict=True))


def test_the_state_is_all_that_the_next_steps_depend_on():
    for ks, rates in (([0], [1e-2]), ([0, 1], [1e-2, 1e-3])):
        whole, params = ours(ks, rates, 0.1, steps=6)
        first, halfway = ours(ks, rates, 0.1, steps=6)
        saved = {name: tensor.clone() for name, tensor in first.state().items()}
        copies = [torch.nn.Parameter(p.detach().clone()) for p in halfway]
        second = MemberAdamW(groups_of(copies), torch.tensor(rates, dtype=torch.float64), 0.1)
        second.load_state(saved)
        for optimizer, own in ((whole, params), (second, copies)):
            for i, p in enumerate(own):
                p.grad = torch.stack([gradient(k, i, 7) for k in ks])
            optimizer.step(0.3)
        assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


# -- the schedule --------------------------------------------------------------------------------------------------------


def factors(schedule: str, total: int = 20, warmup: int = 0) -> list[float]:
    return [schedule_factor(schedule, index, total, warmup) for index in range(1, total + 1)]


def test_linear_falls_in_equal_steps_from_one_to_one_step_above_zero():
    assert factors("linear") == pytest.approx([n / 20 for n in range(20, 0, -1)])


def test_cosine_falls_from_one_to_almost_zero_and_is_half_in_the_middle():
    values = factors("cosine")
    assert values[0] == 1.0
    assert values[10] == pytest.approx(0.5)
    assert 0 < values[-1] < 0.01
    assert all(a > b for a, b in itertools.pairwise(values))
    assert values[5] == pytest.approx((1 + math.cos(math.pi * 5 / 20)) / 2)


def test_constant_stays():
    assert factors("constant") == [1.0] * 20


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warm_up_rises_in_equal_steps_to_one_and_the_fall_starts_there(schedule):
    values = factors(schedule, warmup=4)
    assert values[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert values[4:] == pytest.approx(factors(schedule, total=16))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_run_that_is_all_warm_up_has_rates(schedule):
    assert factors(schedule, total=3, warmup=3) == pytest.approx([1 / 3, 2 / 3, 1])


def test_all_members_at_once_is_each_member_s_fused_step(monkeypatch):
    """What a GPU takes for a pack, where a call for each member would cost more than it saves."""
    found = []
    for fusable in (True, False):
        with monkeypatch.context() as patch:
            if not fusable:
                patch.setattr(MemberAdamW, "_is_fusable", lambda self: False)
            optimizer, params = ours([0, 1, 2], [1e-2, 3e-3, 1e-3], 0.1)
            found.append([*(p.detach().clone() for p in params), *optimizer.first, *optimizer.second])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
