"""L1RA against a plain version from its equations: dense, float64, one member, one rank at a time."""

import math

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.step import Step
from torch import Tensor

from tests.loop import BETA1, BETA2, EPSILON, Loop
from tests.rank_by_rank import check_training
from tests.test_adalora import NAMES, Net
from tests.tiny import packed_batch, tiny

TOTAL, WARMUP, FINAL, INTERVAL, RATIO = 30, 3, 5, 4, 2.0
INITIAL, ALPHA, RATES, SEEDS = [4, 3, 5], [7.0, 2.0, 11.0], [3e-2, 2e-2, 5e-2], [5, 3, 8]
CONFIGURATIONS = {
    "default": {"sparsity": 1.5},
    "least": {"sparsity": 3.0, "least_rank": 2, "most_rank": 6},
    "open": {"sparsity": 0.01},  # gates that would go beyond 1
    "everywhere": {"sparsity": 6.0},  # gates of all sites reach zero, so that all lose ranks and take them again
}


class Rank:
    def __init__(self, a: Tensor, b: Tensor):
        self.leaves = [a.requires_grad_(), b.requires_grad_(), torch.ones((), dtype=torch.float64).requires_grad_()]
        self.averages = [(0, 0, 0)] * 3

    @property
    def gate(self) -> float:
        return float(self.leaves[2])


class Plain:
    """One member on `Net`."""

    def __init__(self, sites: list[list[Rank]], member: int, settings: dict):
        self.model, self.sites, self.settings = Net(), sites, settings
        self.seed, self.rank, self.rate = SEEDS[member], INITIAL[member], RATES[member]
        self.scale = ALPHA[member] / self.rank

    def step(self, t: int, x: Tensor, y: Tensor) -> float:
        for i, (name, site) in enumerate(zip(NAMES, self.sites, strict=True)):
            base = getattr(self.model, name)
            change = sum(self.scale * c * torch.outer(b, a) for a, b, c in (rank.leaves for rank in site))
            x = x @ (base.weight + change).mT + base.bias
            x = torch.tanh(x) if i < 2 else x
        loss = ((x - y) ** 2).mean()
        ranks = [rank for site in self.sites for rank in site]
        gradients = torch.autograd.grad(loss, [leaf for rank in ranks for leaf in rank.leaves])
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        with torch.no_grad():
            for n, g in enumerate(g * min(1, 0.5 / norm) for g in gradients):
                rank, part = ranks[n // 3], n % 3
                mean, square, count = rank.averages[part]
                mean, square, count = BETA1 * mean + (1 - BETA1) * g, BETA2 * square + (1 - BETA2) * g**2, count + 1
                rank.averages[part] = mean, square, count
                direction = mean / (1 - BETA1**count) / ((square / (1 - BETA2**count)).sqrt() + EPSILON)
                leaf = rank.leaves[part]
                if part == 2:
                    rate = RATIO * self.rate
                    leaf.fill_(min(max(float(leaf - rate * direction) - rate * self.settings["sparsity"], 0), 1))
                else:
                    leaf -= self.rate * (0.01 * leaf + direction)
            if WARMUP < t < TOTAL - FINAL and (t - WARMUP) % INTERVAL == 0:
                self.exchange(t)
        return loss.item()

    def exchange(self, t: int) -> None:
        least, most = self.settings.get("least_rank", 1), self.settings.get("most_rank", 99)
        least_gates = [min(rank.gate for rank in site) for site in self.sites]
        freed, losers = 0, []
        for s, site in enumerate(self.sites):
            for rank in list(site):
                if rank.gate < 1e-10 and len(site) > least:
                    site.remove(rank)
                    freed += 1
                    losers.append(s)
        order = sorted(range(3), key=lambda s: -least_gates[s])
        while freed:
            open_sites = [s for s in order if s not in losers and len(self.sites[s]) < most]
            for s in open_sites or [s for s in order if len(self.sites[s]) < most]:
                if freed:
                    site, freed = self.sites[s], freed - 1
                    random = initialization.generator(self.seed, NAMES[s], "A", f"step {t}, slot {len(site)}")
                    a = torch.empty(site[0].leaves[0].shape).normal_(generator=random).double() / self.rank
                    site.append(Rank(a, torch.zeros_like(site[0].leaves[1].detach())))


def made(name: str) -> variants.Adapter:
    phases = {"warmup_steps": WARMUP, "final_steps": FINAL, "interval": INTERVAL, "gate_lr_ratio": RATIO}
    values = {"initial_rank": INITIAL, "alpha": ALPHA, **phases, **CONFIGURATIONS[name]}
    return variants.create("l1ra", members=3, seeds=SEEDS, **values).attach(Net(), list(NAMES), head=[])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_step_of_training_is_the_plain_version_s(name):
    adapter, plain = made(name), []
    for k in range(3):
        sites = []
        for site in adapter.triplets():
            assert (site.E[k, : INITIAL[k]] == 1).all() and not site.B.any()
            sites.append([Rank(site.A[k, j].detach().clone(), site.B[k, :, j].detach().clone()) for j in range(INITIAL[k])])
        plain.append(Plain(sites, k, CONFIGURATIONS[name]))
    moved = check_training(adapter, plain, RATES, TOTAL)
    assert len(moved) > 4 or name == "open", "no rank moved"
    assert name != "open" or any((site.E == 1).any() for site in adapter.triplets())


def test_freed_ranks_go_in_turn_to_those_whose_least_gate_is_greatest():
    adapter = variants.create("l1ra", initial_rank=4, interval=1).attach(Net(), list(NAMES), head=[])
    with torch.no_grad():
        for site, gates in zip(adapter.triplets(), [[0, 0, 0.5, 0], [0.9, 0.3, 1, 1], [0.4, 1, 1, 1]], strict=True):
            site.E[0] = torch.tensor(gates)
    adapter.exchange(Step(1, 9))
    assert [int(r) for r in adapter.ranks().values()] == [1, 5, 6]
    assert adapter.triplets()[0].E[0].tolist() == [0.5]
    assert (adapter.triplets()[1].E[0, 4:] == 1).all()


def test_what_is_handed_on_costs_no_more_parameters_than_the_start_did():
    settings = {"initial_rank": 3, "cost": "parameters", "warmup_steps": 1, "final_steps": 2, "sparsity": 0.5}
    adapter = variants.create("l1ra", **settings).attach(tiny("bert"), "all-linear")
    loop, start = Loop(adapter, 1e-2, 12), adapter.parameter_counts()["trainable"].item()
    for index in range(12):
        loop.step(packed_batch([0], index))
        assert start - 2 * 81 < adapter.parameter_counts()["trainable"].item() <= start
    assert len({int(r) for r in adapter.ranks().values()}) > 1


def test_a_step_without_a_rate_is_refused():
    adapter = made("default")
    with pytest.raises(ValueError, match="acts by the rate of each step"):
        adapter.after_step(Step(1, TOTAL))
