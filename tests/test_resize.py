"""A site changes its size while training: nothing else changes, and whatever is kept for its elements follows."""

import copy

import pytest
import torch
from rankwise import variants
from rankwise.experiments.training.optim import MemberAdamW
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Group, Step
from rankwise.variants.lora import LoRA
from rankwise.variants.settings import METHODS, LoRASettings, Method
from torch import Tensor

from tests import small_world
from tests.contract import RATES, SEEDS, TARGETS, create, losses, rows
from tests.loop import Loop, outputs, task_losses
from tests.test_trainer import Stop, assert_same, logs, model, stopping_after  # noqa: F401  (model is a fixture)
from tests.tiers import quick
from tests.tiny import packed_batch, tiny

TOTAL = 12
LOW_RANK = ["lora", "dora", "adalora", "adalora+dora", "allocated"]


class Resizing(LoRA):
    """LoRA that grows by two slots at step 3, drops one at step 6 and has another's averages start anew at step 8."""

    method = "resizing"

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        super().after_step(step)
        for site in self.low_rank_sites():
            ranks = site.physical().tolist()
            if step.index == 3:  # the old slots in reverse order, then two new ones
                places = torch.full((self.members, max(ranks) + 2), -1)
                for k, rank in enumerate(ranks):
                    places[k, :rank] = torch.arange(rank).flip(0)
                site.resize(places)
                for k, rank in enumerate(ranks):
                    site.slots[k, : rank + 2] = 1
                    random = initialization.generator(self.seeds[k], site.name, "new")
                    site.A[k, rank : rank + 2] = initialization.kaiming(2, site.A.shape[2], random).to(site.A)
            elif step.index == 6:
                site.resize(torch.arange(1, max(ranks)).expand(self.members, -1))
            elif step.index == 8:
                site.forget(torch.arange(max(ranks)).expand(self.members, -1) == 1)


@pytest.fixture
def resizing(monkeypatch):
    """The method "resizing" is registered, on plain LoRA's sites or inside magnitudes."""
    method = Method("resizing", "tests.test_resize:Resizing", LoRASettings, "for this test", "-")
    monkeypatch.setitem(METHODS, "resizing", method)


def shuffled(adapter, seed: int = 0) -> list[Tensor]:
    """Places for each site: the old slots in another order, with two new ones among them, each member its own."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for site in adapter.low_rank_sites():
        size = site.slots.shape[1]
        old = torch.cat([torch.arange(size), torch.tensor([-1, -1])])
        found.append(torch.stack([old[torch.randperm(size + 2, generator=random)] for _ in range(adapter.members)]))
    return found


@pytest.mark.parametrize("name", LOW_RANK)
def test_rearranging_slots_changes_no_output_and_keeps_the_parameters(name):
    adapter = create(name).attach(tiny("bert"), TARGETS)
    losses(adapter, 3)
    fill(adapter)
    adapter.model.eval()
    before, parameters = outputs(adapter.model, rows(adapter)), {n: id(p) for n, p in adapter.named_parameters()}
    sizes = {k: v.tolist() for k, v in adapter.physical_ranks().items()}
    adapter.resize(shuffled(adapter))
    torch.testing.assert_close(outputs(adapter.model, rows(adapter)), before, rtol=1e-12, atol=1e-13)
    assert {n: id(p) for n, p in adapter.named_parameters()} == parameters
    assert {k: v.tolist() for k, v in adapter.physical_ranks().items()} == sizes
    for site in adapter.low_rank_sites():
        for tensor, axis in site.slot_axes.items():
            assert getattr(site, tensor).shape[axis] == site.slots.shape[1], tensor
        every = {n for n, t in site.state_dict().items() if site.slots.shape[1] in t.shape[1:]}
        assert every <= set(site.slot_axes), "a tensor has slots and does not say so"


@pytest.mark.parametrize("name", LOW_RANK)
def test_a_site_without_any_slot_left_is_its_base(name):
    adapter = create(name).attach(tiny("bert", torch.float32), TARGETS)
    none = torch.zeros(adapter.members, 0, dtype=torch.long)
    adapter.resize([none, *[None] * (len(adapter.sites) - 1)])
    first = next(iter(dict(adapter.named_sites())))
    x = torch.randn(6, 5, 32)
    if not adapter.has_magnitude:
        assert torch.equal(adapter.model.get_submodule(first)(x), adapter.base(first)(x))
    assert adapter.physical_ranks()[first].tolist() == [0, 0, 0]
    assert adapter.nominal_ranks()[first].sum() > 0
    assert not adapter.delta(first).abs().gt(1e-6).any()
    adapter.take_changes()
    values = losses(adapter, 2)
    assert values.isfinite().all()


def test_a_gradient_is_taken_along_and_an_old_loss_does_not_matter():
    adapter = create("lora").attach(tiny("bert"), TARGETS)
    site = adapter.low_rank_sites()[0]
    loss = task_losses(adapter, rows(adapter)).sum()
    loss.backward()
    gradient = site.B.grad.clone()
    places = torch.tensor([[2, -1, 0]] * 3)
    site.resize(places)
    assert torch.equal(site.B.grad[:, :, 0], gradient[:, :, 2])
    assert not site.B.grad[:, :, 1].any()
    adapter.zero_grad()
    task_losses(adapter, rows(adapter)).sum().backward()  # `loss`, of the old shapes, is still held
    assert site.A.grad.shape == site.A.shape
    assert loss.isfinite()


@pytest.mark.parametrize("magnitude", [False, True])
def test_a_run_that_changes_its_size_is_the_plain_loop_s(resizing, magnitude):
    def made():
        settings = {"rank": [4, 2, 3], "alpha": [7.0, 3.0, 11.0], "dropout": 0.1, "lr_ratio": 1.75, "magnitude": magnitude}
        return variants.create("resizing", members=3, seeds=SEEDS, **settings).attach(tiny("bert"), TARGETS)

    slow, fast = made(), made()
    loop = Loop(slow, RATES, TOTAL, clip=None)
    optimizer = MemberAdamW(fast.parameter_groups(), torch.tensor(RATES, dtype=torch.float64))
    for index in range(1, TOTAL + 1):
        batch = packed_batch(SEEDS, index)
        want = loop.step(batch)
        fast.begin(Step(index, TOTAL))
        got = task_losses(fast, batch)
        got.sum().backward()
        optimizer.step(1.0)
        fast.after_step(Step(index, TOTAL))
        optimizer.follow(fast.take_changes())
        optimizer.zero_grad()
        torch.testing.assert_close(got.detach(), want, rtol=1e-9, atol=0)
    assert any(born is not None for born in optimizer.born)
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(value, slow.state_dict()[name], rtol=1e-8, atol=1e-10, msg=name)
    assert {n: r.tolist() for n, r in fast.ranks().items()} == {n: [5, 3, 4] for n in fast.ranks()}


def test_a_new_slot_moves_as_a_first_step_does():
    """Without a step count of its own its bias correction would be that of a long run, and the step three times too long."""
    parameter = torch.nn.Parameter(torch.zeros(1, 2, 3, dtype=torch.float64))
    site_like = variants.create("lora", rank=1).attach(tiny("bert"), ["query"]).low_rank_sites()[0]
    optimizer = MemberAdamW([Group([parameter])], torch.tensor([0.1], dtype=torch.float64), weight_decay=0.0)
    for _ in range(50):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(1.0)
    site_like.forget(torch.tensor([[False]]))  # a change is made by a site; this one changes nothing
    change = type(site_like.changes[0][1])(torch.tensor([[0, 1, -1]]), 1, 2)
    parameter.data, parameter.grad = change(parameter.data), None
    optimizer.follow([(parameter, change)])
    before = parameter.detach().clone()
    parameter.grad = torch.full_like(parameter, 5.0)
    optimizer.step(1.0)
    torch.testing.assert_close(before[:, 2] - parameter[:, 2], torch.full((1, 3), 0.1, dtype=torch.float64))


def test_rates_may_differ_between_the_slots_of_each_parameter():
    def draw(seed: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    A, B = (torch.nn.Parameter(draw(i, 2, *shape)) for i, shape in enumerate([(3, 5), (4, 3)]))
    start = A.detach().clone(), B.detach().clone()
    scales = [torch.rand(2, 3, 1, dtype=torch.float64), torch.rand(2, 1, 3, dtype=torch.float64)]
    optimizer = MemberAdamW([Group([A, B], lr_scale=scales)], torch.tensor([0.1, 0.02], dtype=torch.float64), 0.1)
    A.grad, B.grad = draw(5, 2, 3, 5), draw(6, 2, 4, 3)
    gradients = A.grad.clone(), B.grad.clone()
    scales[0][0, 1] = 0.0  # read at every step
    optimizer.step(0.5)
    for k, rate in enumerate((0.1, 0.02)):
        for r in range(3):
            for now, old, g, scale in zip((A[k, r], B[k, :, r]), (start[0][k, r], start[1][k, :, r]),
                                          (gradients[0][k, r], gradients[1][k, :, r]),
                                          (scales[0][k, r], scales[1][k, 0, r]), strict=True):  # fmt: skip
                step = 0.5 * rate * scale
                torch.testing.assert_close(now, old * (1 - step * 0.1) - step * g / (g.abs() + 1e-8))
    assert torch.equal(A[0, 1], start[0][0, 1])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_an_optimizer_of_torch_s_follows(resizing, kind):
    adapter = variants.create("resizing", rank=3, seeds=[5]).attach(tiny("bert"), TARGETS)
    optimizer = kind(adapter.parameters(), lr=1e-2, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    key = "momentum_buffer" if kind is torch.optim.SGD else "exp_avg"
    site = adapter.low_rank_sites()[0]
    for index in range(1, 6):
        adapter.begin(Step(index, TOTAL))
        loss = task_losses(adapter, packed_batch([5], index)).sum()
        loss.backward()
        optimizer.step()
        old = {p: optimizer.state[p][key].clone() for p in (site.A, site.B)}
        adapter.after_step(Step(index, TOTAL))
        variants.follow(optimizer, adapter)
        if index == 3:
            A, B = (optimizer.state[p][key] for p in (site.A, site.B))
            assert torch.equal(A[:, :3], old[site.A].flip(1))
            assert torch.equal(B[:, :, :3], old[site.B].flip(2))
            assert not A[:, 3:].any()
            assert not B[:, :, 3:].any()
        optimizer.zero_grad()
    assert site.A.shape[1] == 5


def test_an_optimizer_that_keeps_something_of_another_shape_cannot_follow(resizing):
    adapter = variants.create("resizing", rank=3).attach(tiny("bert"), TARGETS)
    optimizer = torch.optim.Adafactor(adapter.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match=r"Adafactor keeps \w+_var.* AdamW"):
        for index in range(1, 4):
            task_losses(adapter, packed_batch([0], index)).sum().backward()
            optimizer.step()
            adapter.after_step(Step(index, TOTAL))
            variants.follow(optimizer, adapter)
            optimizer.zero_grad()


@pytest.mark.parametrize("score", ["sensitivity", "gradient"])
def test_a_score_follows_and_a_state_of_another_size_is_loaded(score):
    def made():
        return create("adalora", score=score, warmup_steps=5).attach(tiny("bert"), TARGETS)

    adapter = made()
    loop = Loop(adapter, RATES, TOTAL)
    losses(adapter, 3, loop)
    before, places = adapter.triplet_scores(), shuffled(adapter)
    adapter.resize(places)
    for old, new, moved in zip(before, adapter.triplet_scores(), places, strict=True):
        for k in range(3):
            for j, place in enumerate(moved[k].tolist()):
                assert new[k, j] == (0 if place < 0 else old[k, place])
    loop._follow()
    state = copy.deepcopy(loop.state())
    expected = losses(adapter, 3, loop)
    again = made()
    resumed = Loop(again, RATES, TOTAL)
    resumed.load(state)
    assert not again.take_changes()  # the averages were saved in that size
    assert torch.equal(losses(again, 3, resumed), expected)
    for name, value in again.state_dict().items():
        assert torch.equal(value, adapter.state_dict()[name]), name


def test_a_copy_of_one_member_takes_its_size(resizing):
    pack = variants.create("resizing", members=3, seeds=SEEDS, rank=[4, 2, 3]).attach(tiny("bert"), TARGETS)
    losses(pack, 7)
    for k in range(3):
        alone = pack.alone(k).attach(tiny("bert"), TARGETS)
        alone.copy_member(pack, k)
        for name, value in pack.ranks().items():
            assert alone.ranks()[name].tolist() == [value[k].item()]
            torch.testing.assert_close(alone.delta(name)[0], pack.delta(name)[k], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("magnitude", quick([False, True], [True]))
def test_a_run_killed_after_a_resize_goes_on_bit_for_bit(resizing, model, tmp_path, magnitude):  # noqa: F811
    changes = {"rank": [3, 2], "alpha": 5.0, "dropout": 0.1, "magnitude": magnitude}
    pack = small_world.pack(model, "resizing", seeds=(3, 8), learning_rates=(1e-2, 3e-3), changes=changes)
    whole, expected = small_world.trained(pack, tmp_path / "whole")
    outcomes, resumed = None, set()
    for calls in (5, 3, 3, 8, 4, 9, 99):  # reports until it is killed: first that of the steps read back
        trainer = small_world.trainer(pack, tmp_path / "cut", checkpoint_seconds=0.0, progress=stopping_after(calls))
        try:
            outcomes = trainer.run()
        except Stop:
            resumed.add(trainer.step - 1)
    assert {4, 6, 8} <= resumed, resumed
    assert_same(trainer, whole)
    assert logs(trainer) == logs(whole)
    assert [o.metrics for o in outcomes] == [o.metrics for o in expected]
