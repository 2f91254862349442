"""IncreLoRA against a plain version from its equations: dense, float64, one member, one rank at a time."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from rankwise import variants
from rankwise.experiments.config import Entry
from rankwise.experiments.study.budget import ranks_for, site_costs, solved
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.step import Step
from torch import Tensor

from tests.loop import BETA1, BETA2, EPSILON, Loop
from tests.test_adalora import NAMES, Net, data, squared_error
from tests.tiers import quick
from tests.tiny import batch, packed_batch, tiny

TOTAL, WARMUP, FINAL, INTERVAL, RISE = 24, 4, 5, 3, 4
INITIAL, TARGET, ALPHA, GAMMA = [1, 2, 1], [3, 4, 2], [7.0, 2.0, 11.0], [0.1, 0.5, 0.3]
RATES, SEEDS = [1e-1, 2e-2, 5e-2], [5, 3, 8]
CONFIGURATIONS = {
    "rounds": {"top_sites": 2, "added_rank": 2},
    "rounds-frozen-reserve": {"top_sites": 2, "added_rank": 2, "advance_learning": False},
    "schedule-paper-score": {"schedule": "linear", "score_form": "paper"},
    "parameters": {"cost": "parameters", "added_rank": 2},
    "overshoot": {"top_sites": 2, "added_rank": 2, "overshoot": True},
    "no-clock": {"top_sites": 3, "rise_steps": 0},
}


@dataclass
class Rank:
    """One triplet; each leaf has its averages and counts its own steps."""

    a: Tensor
    b: Tensor
    e: Tensor
    active: bool
    born: int
    since: int
    averages: dict = field(default_factory=dict)

    def __post_init__(self):
        for leaf in (self.a, self.b, self.e):
            leaf.requires_grad_()


@dataclass
class Plain:
    """One member on `Net`."""

    model: Net
    sites: list[list[Rank]]
    seed: int
    alpha: float
    gamma: float
    rate: float
    target: int  # in ranks or parameters
    settings: dict

    def __post_init__(self):
        self.smoothed, self.uncertain = [0.0] * 3, [0.0] * 3
        self.learns = self.settings.get("advance_learning", True)
        self.added_rank = self.settings.get("added_rank", 1)
        bases = [getattr(self.model, name).weight for name in NAMES]
        self.prices = [sum(w.shape) + 1 if self.settings.get("cost") == "parameters" else 1 for w in bases]
        self.start = self.total()

    def ranks(self) -> list[int]:
        return [sum(rank.active for rank in site) for site in self.sites]

    def total(self) -> int:
        return sum(p * r for p, r in zip(self.prices, self.ranks(), strict=True))

    def step(self, t: int, x: Tensor, y: Tensor) -> float:
        changes = []
        for i, (name, site, r) in enumerate(zip(NAMES, self.sites, self.ranks(), strict=True)):
            base, change = getattr(self.model, name), 0
            for rank in site:
                change = change + self.alpha / r * rank.e * torch.outer(rank.b, rank.a)
            changes.append(change)
            x = x @ (base.weight + change).mT + base.bias
            x = torch.tanh(x) if i < 2 else x
        loss, penalty = ((x - y) ** 2).mean(), 0
        for site in self.sites:
            for rows in ([rank.a for rank in site], [rank.b for rank in site]):
                if not self.learns:
                    rows = [row if rank.active else row.detach() for row, rank in zip(rows, site, strict=True)]
                square = 0
                for i, one in enumerate(rows):
                    for j, other in enumerate(rows):
                        square = square + (one @ other - float(i == j)) ** 2
                penalty = penalty + square.sqrt() / 6
        dense = torch.autograd.grad(loss, changes, retain_graph=True)
        leaves = []
        for site in self.sites:
            for rank in site:
                leaves += [(rank, part) for part in "ab" if rank.active or self.learns]
                leaves += [(rank, "e")] if rank.active else []
        gradients = torch.autograd.grad(loss + self.gamma * penalty, [getattr(rank, part) for rank, part in leaves])
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        with torch.no_grad():
            for (rank, part), g in zip(leaves, gradients, strict=True):
                leaf, g = getattr(rank, part), g * min(1, 0.5 / norm)
                mean, square, count = rank.averages.get(part, (0, 0, 0))
                mean, square, count = BETA1 * mean + (1 - BETA1) * g, BETA2 * square + (1 - BETA2) * g**2, count + 1
                rank.averages[part] = mean, square, count
                direction = mean / (1 - BETA1**count) / ((square / (1 - BETA2**count)).sqrt() + EPSILON)
                leaf -= self.rate * self.clock(rank.since if part == "e" else rank.born, t) * (0.01 * leaf + direction)
        if t == 1:
            for s in range(3):
                self.reserve(s, t)
        if t < TOTAL - FINAL and not self.is_done():
            for s, (change, G) in enumerate(zip(changes, dense, strict=True)):
                size = G.numel() if self.settings.get("score_form") == "paper" else math.sqrt(G.numel())
                S = sum(abs(float(change[o, i].detach() * G[o, i])) for o in range(len(G)) for i in range(G.shape[1])) / size
                self.smoothed[s] = 0.8 * self.smoothed[s] + 0.2 * S
                self.uncertain[s] = 0.7 * self.uncertain[s] + 0.3 * abs(S - self.smoothed[s])
        if t <= TOTAL - FINAL and not self.is_done():
            due = t > WARMUP and t % INTERVAL == 0
            if due or (t == TOTAL - FINAL and "top_sites" not in self.settings):
                self.grow(t)
        return loss.item()

    def clock(self, since: int, t: int) -> float:
        rise, u, left = self.settings.get("rise_steps", RISE), t - since, TOTAL - since
        if since == 0 or rise == 0:
            return 1.0
        return u / rise if u <= rise else (left - u + 1) / (left - rise)

    def is_done(self) -> bool:
        if self.settings.get("overshoot"):
            return self.total() >= self.target
        return self.total() + min(self.prices) > self.target

    def reserve(self, s: int, t: int) -> None:
        for _ in range(self.added_rank):
            draws = [initialization.generator(self.seed, NAMES[s], part, f"slot {len(self.sites[s])}") for part in "AB"]
            weight = getattr(self.model, NAMES[s]).weight
            a, b = (initialization.triplet(1, n, d)[0].double() for n, d in zip(weight.shape[::-1], draws, strict=True))
            e = torch.tensor(1e-5 if self.learns else 0.0, dtype=torch.float64)
            self.sites[s].append(Rank(a, b, e, False, t, t))

    def grow(self, t: int) -> None:
        scores = [i * u for i, u in zip(self.smoothed, self.uncertain, strict=True)]
        order = sorted(range(3), key=lambda s: -scores[s] / self.prices[s])
        wanted = [0, 0, 0]
        if "top_sites" in self.settings:
            for s in order[: min(self.settings["top_sites"], self.target - self.total())]:
                wanted[s] = self.added_rank
                if not self.settings.get("overshoot"):
                    wanted[s] = min(self.added_rank, self.target - self.total() - sum(wanted[r] for r in order if r != s))
        else:
            progress = min((t - WARMUP) / (TOTAL - FINAL - WARMUP), 1)
            left = int((self.start - self.target) * (1 - progress) + self.target) - self.total()
            while any(self.prices[s] <= left for s in range(3)):
                for s in order:
                    more = min(self.added_rank, left // self.prices[s])
                    wanted[s] += more
                    left -= more * self.prices[s]
        after = self.total() + sum(p * w for p, w in zip(self.prices, wanted, strict=True))
        ends = after == self.target if self.settings.get("overshoot") else after + min(self.prices) > self.target
        for s, more in enumerate(wanted):
            for _ in range(more):
                waiting = next((rank for rank in self.sites[s] if not rank.active), None)
                if waiting is None:
                    self.reserve(s, t)
                    waiting = next(rank for rank in self.sites[s] if not rank.active)
                waiting.active, waiting.since = True, t
                if not self.learns:
                    waiting.born = t
            if more and not ends:
                while sum(not rank.active for rank in self.sites[s]) < self.added_rank:
                    add, self.added_rank = self.added_rank, 1
                    self.reserve(s, t)
                    self.added_rank = add
        for rank in (rank for site in self.sites for rank in site if ends and not rank.active):
            with torch.no_grad():
                rank.e.zero_()


def made(name: str, members: range = range(3)):
    several = {"initial_rank": INITIAL, "target_rank": TARGET, "alpha": ALPHA, "orthogonality": GAMMA}
    return variants.create(
        "increlora",
        members=len(members),
        seeds=[SEEDS[k] for k in members],
        **{key: [value[k] for k in members] for key, value in several.items()},
        **{"rise_steps": RISE} | CONFIGURATIONS[name],
        warmup_steps=WARMUP,
        final_steps=FINAL,
        interval=INTERVAL,
        beta1=0.8,
        beta2=0.7,
    ).attach(Net(), list(NAMES), head=[])


@pytest.mark.parametrize("name", quick(CONFIGURATIONS, list(CONFIGURATIONS)[:2]))
def test_every_step_of_training_is_the_plain_version_s(name):
    adapter = made(name)
    plain = []
    for k in range(3):
        sites = []
        for site in adapter.triplets():
            parts = [(site.A[k, j].detach().clone(), site.B[k, :, j].detach().clone()) for j in range(INITIAL[k])]
            sites.append([Rank(a, b, torch.zeros((), dtype=torch.float64), True, 0, 0) for a, b in parts])
        target = adapter.totals()[1][k]
        plain.append(Plain(Net(), sites, SEEDS[k], ALPHA[k], GAMMA[k], RATES[k], target, CONFIGURATIONS[name]))
    loop = Loop(adapter, RATES, TOTAL, clip=0.5, losses=squared_error)
    grown = set()
    for t in range(1, TOTAL + 1):
        batches = [data(k, t) for k in range(3)]
        losses = loop.step(tuple(torch.cat(parts) for parts in zip(*batches, strict=True)))
        expected = [one.step(t, *batches[k]) for k, one in enumerate(plain)]
        np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-8, err_msg=str(t))
        for k, one in enumerate(plain):
            assert [int(rank[k]) for rank in adapter.ranks().values()] == one.ranks(), (t, k)
            assert [int(size[k]) for size in adapter.physical_ranks().values()] == [len(site) for site in one.sites], (t, k)
            grown.add((k, tuple(one.ranks())))
    assert len(grown) > 6
    totals = [sum(int(r[k]) for r in adapter.ranks().values()) for k in range(3)]
    if name == "overshoot":
        assert totals != [9, 12, 6]
    elif name != "parameters":
        assert totals == [9, 12, 6]
    for site, name_ in zip(adapter.triplets(), NAMES, strict=True):
        dense = adapter.delta(name_)
        for k, one in enumerate(plain):
            ranks = one.sites[NAMES.index(name_)]
            mine = sum(r.e.item() * torch.outer(r.b, r.a) for r in ranks) * ALPHA[k] / sum(r.active for r in ranks)
            torch.testing.assert_close(dense[k], mine.detach(), rtol=1e-7, atol=1e-10)
        assert site.slots.shape[1] == site.physical().max()


def test_reserves_learn_before_they_count_and_their_coefficient_does_not():
    adapter = made("rounds")
    loop = Loop(adapter, RATES, TOTAL, losses=squared_error)
    site = adapter.triplets()[0]
    for t in range(1, 4):
        loop.step(tuple(torch.cat(parts) for parts in zip(*(data(k, t) for k in range(3)), strict=True)))
        if t == 1:
            assert site.slots.sum(1).tolist() == [3, 4, 3]
            assert site.rank().tolist() == INITIAL
            before = site.A.detach().clone()
    assert not torch.equal(site.A[0, 1:3], before[0, 1:3])
    assert (site.E[0, 1:3] == 1e-5).all()


def test_an_own_clock_runs_against_the_factor_of_the_schedule():
    adapter = made("rounds")
    site = adapter.triplets()[0]
    site.born.fill_(5.0)
    site.active_since.fill_(7.0)
    adapter.before_step(Step(8, TOTAL, factor=0.5))
    slots = site.kept[2].float()
    torch.testing.assert_close(site.pace_A[2, :, 0], torch.full_like(site.pace_A[2, :, 0], 3 / RISE / 0.5))
    torch.testing.assert_close(site.pace_E[2], 1 / RISE / 0.5 * slots.double())
    adapter.before_step(Step(TOTAL, TOTAL, factor=0.5))
    torch.testing.assert_close(site.pace_B[2, 0, 0].item(), 1 / (TOTAL - 5 - RISE) / 0.5)


@pytest.mark.filterwarnings("ignore:IncreLoRA was trained")
@pytest.mark.parametrize(("name", "checkpointing"), [("bert", False), ("bert", True), ("albert", False)])
def test_the_gradient_of_the_whole_weight_is_heard_of_every_call_and_of_the_last_micro_batch_alone(name, checkpointing):
    model = tiny(name)
    adapter = variants.create("increlora", target_rank=2, dropout=0.3, warmup_steps=1).attach(model, ["query"])
    if checkpointing:
        keyed = {"use_reentrant": False, "context_fn": adapter.draw.recompute_contexts}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keyed)
    with torch.no_grad():
        for site in adapter.triplets():
            site.E.fill_(0.7)
    for micro_batch in (0, 1):
        adapter.begin(Step(3, 20), micro_batch)
        rows = batch(0, micro_batch)
        model(**rows).loss.backward()
    heard = [site.sensitivity.item() for site in adapter.triplets()]
    # The same by a change of the weight itself that autograd knows, added to what the site does.
    for site in adapter.triplets():
        site.listening = False
        site.dense = adapter.delta(next(n for n, s in adapter.named_sites() if s is site)).detach().requires_grad_()

        def product(y, x, rate, site=site):
            from rankwise.variants.adapter.draws import drop

            x = drop(x, rate, site.draw, site.name)
            return y + x @ site.dense[0].mT

        site.product = product
    adapter.draw.begin(3, 1)
    model(**batch(0, 1)).loss.backward()
    for site, S in zip(adapter.triplets(), heard, strict=True):
        torch.testing.assert_close((site.dense * site.dense.grad).abs().sum().item(), S, rtol=1e-9, atol=0)


def test_a_parameter_budget_is_kept_and_falls_short_by_less_than_a_rank():
    adapter = variants.create("increlora", target_rank=3, cost="parameters", target_parameters=1500, warmup_steps=2)
    adapter.attach(tiny("bert"), "all-linear")
    loop = Loop(adapter, 1e-2, 10)
    for index in range(10):
        loop.step(packed_batch([0], index))
    active = sum(adapter.ranks()[n] * (s.A.shape[2] + s.B.shape[1] + 1) for n, s in adapter.named_sites()).item()
    cheapest = min(s.A.shape[2] + s.B.shape[1] + 1 for s in adapter.triplets())
    assert 1500 - cheapest < active <= 1500


def test_shrinking_takes_what_is_left_in_reserve_out():
    adapter = variants.create("increlora", target_rank=2, shrink=True, warmup_steps=1, final_steps=3, top_sites=4)
    adapter.attach(tiny("bert"), "all-linear")
    loop = Loop(adapter, 1e-2, 12)
    for index in range(12):
        loop.step(packed_batch([0], index))
    assert {n: r.item() for n, r in adapter.ranks().items()} == {n: r.item() for n, r in adapter.physical_ranks().items()}
    assert sum(adapter.ranks().values()).item() == 2 * len(adapter.sites)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_sites": 2, "schedule": "cosine"}, 'schedule = "cosine" has no effect with top_sites = 2'),
        ({"overshoot": True}, "overshoot = true needs top_sites"),
        ({"least_rank": 1}, "least_rank = 1 has no effect"),
        ({"exchange": 2}, "exchange = 2 has no effect"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        variants.check("increlora", {"target_rank": 3, **settings})


def test_a_target_that_cannot_be_reached_is_refused():
    with pytest.raises(ValueError, match="below the 10 at the start"):
        variants.create("increlora", initial_rank=5, target_rank=1).attach(tiny("bert"), ["query"])
    with pytest.raises(ValueError, match="leave room for 4 ranks of a budget of 6"):
        variants.create("increlora", target_rank=3, most_rank=2).attach(tiny("bert"), ["query"])
    adapter = variants.create("increlora", target_rank=5, top_sites=1, interval=3).attach(tiny("bert"), ["query"])
    with pytest.raises(ValueError, match="top_sites = 1 takes 8 rounds to the target and there are 6"):
        adapter.begin(Step(1, 20))


@pytest.mark.parametrize("cost", ["rank", "parameters"])
@pytest.mark.parametrize("method", ["increlora", "elalora"])
def test_a_study_s_budget_is_what_it_ends_with(method, cost):
    def attached(**settings):
        return variants.create(method, **settings).attach(tiny("bert"), "all-linear")

    entry = Entry(
        method=method, label=method, learning_rates=[1e-2], settings={"cost": cost, "warmup_steps": 2, "final_steps": 2}
    )
    found = solved(entry, attached(**{"initial_rank": 1, "target_rank": 1}), 3000, 2.0).settings
    adapter = attached(**found)
    loop = Loop(adapter, 1e-2, 10)
    for index in range(10):
        loop.step(packed_batch([0], index))
    each = {name: site.A.shape[2] + site.B.shape[1] + 1 for name, site in adapter.named_sites()}
    ranks = {name: int(rank) for name, rank in adapter.ranks().items()}
    assert len(set(ranks.values())) > 1
    if cost == "parameters":
        assert 3000 - 2 * min(each.values()) < sum(ranks[name] * each[name] for name in ranks) <= 3000
    else:
        uniform = ranks_for(site_costs(adapter), 3000)
        assert sum(ranks.values()) == sum(uniform.values())
    scales = {name: scale.item() for name, scale in adapter.scales().items()}
    if method == "elalora":
        assert set(scales.values()) == {2.0}
    else:
        assert scales == {
            name: pytest.approx(2 * round(sum(uniform_of(adapter)) / len(ranks)) / r) for name, r in ranks.items()
        }


def uniform_of(adapter) -> list[int]:
    return list(ranks_for(site_costs(adapter), 3000).values())
