"""ElaLoRA against a plain version from its equations: dense, float64, one member, one rank at a time."""

import math
from dataclasses import dataclass

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

TOTAL, WARMUP, FINAL, INTERVAL = 26, 3, 5, 3
INITIAL, ALPHA, GAMMA = [4, 3, 5], [7.0, 2.0, 11.0], [0.1, 0.5, 0.3]
RATES, SEEDS = [1e-1, 2e-2, 5e-2], [5, 3, 8]
CONFIGURATIONS = {
    "release": {"exchange": 4, "candidates": 2},
    "steady": {"exchange": 3, "candidates": 3, "schedule": "steady"},
    "reset": {"exchange": 4, "candidates": 2, "optimizer_reset": "release"},
    "most": {"exchange": 5, "candidates": 2, "most_rank": 5, "schedule": "steady"},
}


class Rank:
    """One triplet: leaves a, b, e, and of each the optimizer's mean, square and count, and the score's averages."""

    def __init__(self, a: Tensor, b: Tensor, e: Tensor):
        self.leaves = [leaf.requires_grad_() for leaf in (a, b, e)]
        self.averages = [(0, 0, 0)] * 3
        self.scores = [(torch.zeros_like(leaf), torch.zeros_like(leaf)) for leaf in self.leaves]

    def score(self) -> float:
        return sum(float((smoothed * away).mean()) for smoothed, away in self.scores)


@dataclass
class Plain:
    """One member on `Net`."""

    model: Net
    sites: list[list[Rank]]
    seed: int
    scale: float
    gamma: float
    rate: float
    settings: dict

    def step(self, t: int, x: Tensor, y: Tensor) -> float:
        for i, (name, site) in enumerate(zip(NAMES, self.sites, strict=True)):
            base = getattr(self.model, name)
            change = sum(self.scale * e * torch.outer(b, a) for a, b, e in (rank.leaves for rank in site))
            x = x @ (base.weight + change).mT + base.bias
            x = torch.tanh(x) if i < 2 else x
        loss, penalty = ((x - y) ** 2).mean(), 0
        for site in self.sites:
            for part in (0, 1):
                rows = torch.stack([rank.leaves[part] for rank in site])
                penalty = penalty + (rows @ rows.mT - torch.eye(len(rows))).square().sum().sqrt() / 6
        ranks = [rank for site in self.sites for rank in site]
        gradients = torch.autograd.grad(loss + self.gamma * penalty, [leaf for rank in ranks for leaf in rank.leaves])
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        gradients = [g * min(1, 0.5 / norm) for g in gradients]
        with torch.no_grad():
            for n, g in enumerate(gradients):
                rank, part = ranks[n // 3], n % 3
                mean, square, count = rank.averages[part]
                mean, square, count = BETA1 * mean + (1 - BETA1) * g, BETA2 * square + (1 - BETA2) * g**2, count + 1
                rank.averages[part] = mean, square, count
                leaf = rank.leaves[part]
                direction = mean / (1 - BETA1**count) / ((square / (1 - BETA2**count)).sqrt() + EPSILON)
                leaf -= self.rate * (0.01 * leaf + direction)
                if t < TOTAL - FINAL:
                    smoothed, away = rank.scores[part]
                    now = (leaf * g).abs()
                    smoothed = 0.8 * smoothed + 0.2 * now
                    rank.scores[part] = smoothed, 0.7 * away + 0.3 * (now - smoothed).abs()
            if WARMUP < t < TOTAL - FINAL and (t - WARMUP) % INTERVAL == 0:
                self.exchange(t)
        return loss.item()

    def exchange(self, t: int) -> None:
        b = self.settings["exchange"]
        if self.settings.get("schedule") != "steady":
            b = round(b * (1 - ((t - WARMUP) / (TOTAL - FINAL - WARMUP)) ** 3))
        most = self.settings.get("most_rank", 99)
        candidates = []
        for s, site in enumerate(self.sites):
            k = min(self.settings["candidates"], len(site) - 1)
            candidates += [(rank.score(), s, rank) for rank in sorted(site, key=Rank.score)[:k]]
        candidates.sort(key=lambda c: c[0])
        while True:
            cut, sizes, grown = candidates[:b], [len(site) for site in self.sites], []
            for _, s, _ in cut:
                sizes[s] -= 1
            for _, s, _ in reversed(candidates):
                if len(grown) < b and sizes[s] < most:
                    grown.append(s)
                    sizes[s] += 1
            if len(grown) == len(cut):
                break
            b -= 1
        for _, s, rank in cut:
            self.sites[s].remove(rank)
        for s in grown:
            site, leaves = self.sites[s], []
            for part, name in ((0, "A"), (1, "B")):
                random = initialization.generator(self.seed, NAMES[s], name, f"step {t}, slot {len(site)}")
                z = torch.empty(site[0].leaves[part].shape).normal_(generator=random).double()
                along = sum((rank.leaves[part] @ z) * rank.leaves[part] for rank in site)
                leaves.append((z - along) / ((z - along).norm() + 1e-6))
            least = min(abs(float(rank.leaves[2])) for rank in site)
            self.sites[s].append(Rank(*leaves, torch.tensor(min(least, 1e-13), dtype=torch.float64)))
        if self.settings.get("optimizer_reset") == "release":
            for site in self.sites:
                for rank in site:
                    rank.averages = [(0, 0, 0)] * 3


def made(name: str, members: range = range(3)):
    several = {"initial_rank": INITIAL, "alpha": ALPHA, "orthogonality": GAMMA}
    return variants.create(
        "elalora",
        members=len(members),
        seeds=[SEEDS[k] for k in members],
        **{key: [value[k] for k in members] for key, value in several.items()},
        **CONFIGURATIONS[name],
        warmup_steps=WARMUP,
        final_steps=FINAL,
        interval=INTERVAL,
        beta1=0.8,
        beta2=0.7,
    ).attach(Net(), list(NAMES), head=[])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_step_of_training_is_the_plain_version_s(name):
    adapter, plain = made(name), []
    for k in range(3):
        sites = []
        for site in adapter.triplets():
            parts = [(site.A[k, j].detach().clone(), site.B[k, :, j].detach().clone()) for j in range(INITIAL[k])]
            sites.append([Rank(a, b, torch.zeros((), dtype=torch.float64)) for a, b in parts])
        plain.append(Plain(Net(), sites, SEEDS[k], ALPHA[k] / INITIAL[k], GAMMA[k], RATES[k], CONFIGURATIONS[name]))
    seen = check_training(adapter, plain, RATES, TOTAL)
    assert max(max(ranks) for _, ranks in seen) <= CONFIGURATIONS[name].get("most_rank", 99)
    assert len(seen) > 4, "no rank moved"
    for s, scores in enumerate(adapter.triplet_scores()):
        for k, one in enumerate(plain):
            for j, rank in enumerate(one.sites[s]):
                assert scores[k, j].item() == pytest.approx(rank.score(), rel=1e-5)


def test_a_new_rank_is_orthogonal_to_orthonormal_ones_and_acts_on_nothing():
    adapter = made("release")
    site = adapter.triplets()[1]
    with torch.no_grad():
        for matrix in (site.A[2], site.B[2].mT):
            matrix[:4] = torch.linalg.qr(matrix[:4].mT)[0].mT
        adapter.start_slot(site, 2, 4, Step(6, TOTAL))
    for matrix in (site.A[2], site.B[2].mT):
        torch.testing.assert_close(matrix[:4] @ matrix[4], torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
        assert matrix[4].norm().item() == pytest.approx(1, abs=1e-5)
    assert site.E[2, 4] == 0


def test_what_is_added_costs_no_more_parameters_than_the_start_did():
    settings = {"initial_rank": 3, "cost": "parameters", "exchange": 6, "warmup_steps": 1, "final_steps": 2}
    adapter = variants.create("elalora", **settings).attach(tiny("bert"), "all-linear")
    loop, start = Loop(adapter, 1e-2, 10), adapter.parameter_counts()["trainable"].item()
    for index in range(10):
        loop.step(packed_batch([0], index))
        now = adapter.parameter_counts()["trainable"].item()
        assert start - 2 * 81 < now <= start
    assert len({int(r) for r in adapter.ranks().values()}) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_rank": 2}, "target_rank = 2 is not initial_rank = 3: ElaLoRA keeps its total"),
        ({"target_total": 20}, "target_total = 20 has no effect"),
        ({"schedule": "linear"}, "schedule"),
    ],
)
def test_a_total_that_would_move_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        variants.check("elalora", {"initial_rank": 3, **settings})
