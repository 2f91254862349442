"""AdaLoRA against a plain version written from the paper: dense, float64, one member, loops over elements."""

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from torch import Tensor, nn

from tests.loop import BETA1, BETA2, EPSILON, Loop
from tests.tiny import packed_batch, tiny

TOTAL, WARMUP, FINAL, INTERVAL = 30, 4, 7, 2
INITIAL, TARGET, ALPHA, GAMMA = [5, 3, 4], [2, 3, 1], [7.0, 2.0, 11.0], [0.1, 0.5, 0.3]  # member 1: budget = initial rank
RATES, SEEDS = [1e-1, 2e-2, 5e-2], [5, 3, 8]
NAMES = ("first", "second", "third")


class Net(nn.Module):
    """Three linears, none of them square, with biases."""

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.first, self.second, self.third = nn.Linear(7, 5), nn.Linear(5, 6), nn.Linear(6, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=random)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def data(member: int, step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(100 * member + step)
    draw = {"generator": random, "dtype": torch.float64}
    return torch.randn(5, 7, **draw), torch.randn(5, 4, **draw)


def squared_error(adapter: "variants.Adapter", batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (adapter.model(x) - y).square().view(adapter.members, -1).mean(1)


@dataclass
class Plain:
    """One member of AdaLoRA on `Net`: P, E, Q of each matrix as leaves, everything else by loops."""

    model: Net
    triplets: list[tuple[Tensor, Tensor, Tensor]]  # (P (O, r), E (r,), Q (r, I)) of each matrix
    alpha: float
    gamma: float
    rate: float
    initial_rank: list[int]
    budget_end: int
    form: str

    def __post_init__(self):
        self.leaves = [leaf for triplet in self.triplets for leaf in triplet]
        self.mean = [np.zeros(leaf.shape) for leaf in self.leaves]
        self.square = [np.zeros(leaf.shape) for leaf in self.leaves]
        self.smoothed = [np.zeros(leaf.shape) for leaf in self.leaves]
        self.uncertain = [np.zeros(leaf.shape) for leaf in self.leaves]
        self.kept = [[True] * len(E) for _, E, _ in self.triplets]
        self.budget_start = sum(len(E) for _, E, _ in self.triplets)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        for i, (name, (P, E, Q)) in enumerate(zip(NAMES, self.triplets, strict=True)):
            base = getattr(self.model, name)
            x = x @ (base.weight + self.alpha / self.initial_rank[i] * P @ torch.diag(E) @ Q).mT + base.bias
            x = torch.tanh(x) if i < 2 else x
        return ((x - y) ** 2).mean()

    def penalty(self) -> Tensor:
        norms = []
        for P, _, Q in self.triplets:
            for gram in (P.mT @ P, Q @ Q.mT):
                gap = gram - torch.eye(len(gram), dtype=torch.float64)
                square = sum(gap[i, j] ** 2 for i in range(len(gap)) for j in range(len(gap)))
                norms.append(square.sqrt() if self.form == "release" else square)
        return self.gamma * (sum(norms) / len(norms) if self.form == "release" else sum(norms))

    def budget(self, t: int) -> int:
        if t <= WARMUP:
            return self.budget_start
        if t >= TOTAL - FINAL:
            return self.budget_end
        left = 1 - (t - WARMUP) / (TOTAL - FINAL - WARMUP)
        return int(self.budget_end + (self.budget_start - self.budget_end) * left**3)

    def scores(self) -> list[list[float]]:
        """S of each triplet: of E, and the means over its column of P and its row of Q."""
        found = []
        for n, (P, E, Q) in enumerate(self.triplets):
            s = [self.smoothed[3 * n + j] * self.uncertain[3 * n + j] for j in range(3)]
            of_p = [sum(s[0][o, i] for o in range(len(P))) / len(P) for i in range(len(E))]
            of_q = [sum(s[2][i, f] for f in range(Q.shape[1])) / Q.shape[1] for i in range(len(E))]
            found.append([s[1][i] + of_p[i] + of_q[i] for i in range(len(E))])
        return found

    def allocate(self, t: int) -> None:
        flat = [(-s, n, i) for n, scores in enumerate(self.scores()) for i, s in enumerate(scores)]
        best = {(n, i) for _, n, i in sorted(flat)[: self.budget(t)]}
        self.kept = [[(n, i) in best for i in range(len(kept))] for n, kept in enumerate(self.kept)]
        self.project()

    def project(self) -> None:
        with torch.no_grad():
            for (_, E, _), kept in zip(self.triplets, self.kept, strict=True):
                for i, keep in enumerate(kept):
                    if not keep:
                        E[i] = 0

    def step(self, t: int, x: Tensor, y: Tensor) -> float:
        loss = self.loss(x, y)
        gradients = [g.numpy() for g in torch.autograd.grad(loss + self.penalty(), self.leaves)]
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        gradients = [g * min(1, 0.5 / norm) for g in gradients]
        with torch.no_grad():
            for n, (leaf, g) in enumerate(zip(self.leaves, gradients, strict=True)):
                self.mean[n] = BETA1 * self.mean[n] + (1 - BETA1) * g
                self.square[n] = BETA2 * self.square[n] + (1 - BETA2) * g**2
                spread = np.sqrt(self.square[n] / (1 - BETA2**t)) + EPSILON
                change = 0.01 * leaf.numpy() + self.mean[n] / (1 - BETA1**t) / spread
                leaf -= torch.from_numpy(self.rate * change)
        if t < TOTAL - FINAL:
            for n, (leaf, g) in enumerate(zip(self.leaves, gradients, strict=True)):
                values = leaf.detach().numpy()
                for index in np.ndindex(leaf.shape):
                    importance = abs(values[index] * g[index])
                    self.smoothed[n][index] = 0.5 * self.smoothed[n][index] + 0.5 * importance
                    away = abs(importance - self.smoothed[n][index])
                    self.uncertain[n][index] = 0.3 * self.uncertain[n][index] + 0.7 * away
            if t > WARMUP and t % INTERVAL == 0:
                self.allocate(t)
        elif t == TOTAL - FINAL:
            self.allocate(t)
        else:
            self.project()
        return loss.item()


@pytest.mark.parametrize("form", ["release", "paper"])
def test_every_step_of_training_is_the_plain_versions(form):
    adapter = variants.create(
        "adalora",
        members=3,
        seeds=SEEDS,
        initial_rank=INITIAL,
        target_rank=TARGET,
        alpha=ALPHA,
        orthogonality=GAMMA,
        penalty_form=form,
        warmup_steps=WARMUP,
        final_steps=FINAL,
        interval=INTERVAL,
        beta1=0.5,
        beta2=0.3,
        rank_pattern={"second": 3},
    ).attach(Net())
    members = []
    for k in range(3):
        ranks = [INITIAL[k], 3, INITIAL[k]]
        triplets = [
            tuple(t.detach().clone().requires_grad_() for t in (s.B[k, :, :r], s.E[k, :r], s.A[k, :r]))
            for (_, s), r in zip(adapter.named_sites(), ranks, strict=True)
        ]
        members.append(Plain(Net(), triplets, ALPHA[k], GAMMA[k], RATES[k], ranks, 3 * TARGET[k], form))
    loop = Loop(adapter, RATES, TOTAL, clip=0.5, losses=squared_error)
    history, came_back = [], False
    for t in range(1, TOTAL + 1):
        batches = [data(k, t) for k in range(3)]
        penalty = torch.stack([member.penalty() for member in members])
        torch.testing.assert_close(adapter.penalty(Step(t, TOTAL)), penalty, rtol=1e-9, atol=0)
        losses = loop.step(tuple(torch.cat(parts) for parts in zip(*batches, strict=True)))
        for k, member in enumerate(members):
            assert losses[k].item() == pytest.approx(member.step(t, *batches[k]), rel=1e-9)
            for n, ((_, site), (P, E, Q)) in enumerate(zip(adapter.named_sites(), member.triplets, strict=True)):
                r = len(E)
                assert site.kept[k, :r].tolist() == member.kept[n], (t, k, n)
                assert not site.kept[k, r:].any() and not site.E[k, r:].any()
                for found, wanted in ((site.B[k, :, :r], P), (site.E[k, :r], E), (site.A[k, :r], Q)):
                    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-7, atol=1e-9)
        now = torch.cat([site.kept for _, site in adapter.named_sites()], 1).clone()
        came_back |= bool(history and (now & ~history[-1]).any())
        history.append(now)
        if t >= TOTAL - FINAL:
            assert torch.equal(now, history[TOTAL - FINAL - 1]), "the ranks changed in the final phase"
            assert torch.equal(torch.cat([s.E != 0 for _, s in adapter.named_sites()], 1), now)
    assert came_back, "no triplet ever came back: choose other numbers"
    assert sum(adapter.ranks().values()).tolist() == [6, 9, 3]
    assert {r for rank in adapter.ranks().values() for r in rank.tolist()} > {0}


def small(**others) -> "variants.AdaLoRA":
    settings = {"initial_rank": 4, "target_rank": 2, "final_steps": 2} | others
    return variants.create("adalora", **settings).attach(tiny("bert"))


def test_the_scale_is_alpha_over_the_initial_rank_and_stays():
    adapter = small(alpha=6, initial_rank=[4, 3], members=2)
    loop = Loop(adapter, total=8)
    for i in range(8):
        loop.step(packed_batch([0, 1], i))
        for scale in adapter.scales().values():
            assert scale.tolist() == [1.5, 2.0]


def test_the_penalty_is_against_the_slots_that_exist():
    """Members of rank 2 and 4 with orthonormal factors have no penalty; against a full identity rank 2 would have one."""
    adapter = small(initial_rank=[2, 4], target_rank=[1, 2], members=2, penalty_form="paper")
    with torch.no_grad():
        for _, site in adapter.named_sites():
            for k, r in enumerate((2, 4)):
                site.A[k, :r] = torch.linalg.qr(torch.randn(site.A.shape[2], r).double())[0].mT
                site.B[k, :, :r] = torch.linalg.qr(torch.randn(site.B.shape[1], r).double())[0]
    assert adapter.penalty(Step(1, 10)).abs().max() < 1e-20
    with torch.no_grad():
        next(adapter.named_sites())[1].A[0, 0] *= 2  # P P^T - I has one entry 3
    torch.testing.assert_close(adapter.penalty(Step(1, 10)).detach(), torch.tensor([0.5 * 9, 0.0]).double(), atol=1e-12, rtol=0)


def test_factors_without_a_gap_have_a_finite_gradient():
    adapter = small()
    with torch.no_grad():
        for _, site in adapter.named_sites():
            site.A.copy_(torch.eye(4, site.A.shape[2]))
            site.B.copy_(torch.eye(site.B.shape[1], 4))
    adapter.penalty(Step(1, 10)).sum().backward()
    assert all(site.A.grad.isfinite().all() and site.B.grad.isfinite().all() for _, site in adapter.named_sites())


def test_the_final_allocation_comes_whatever_the_interval():
    adapter = small(interval=50, final_steps=3)
    loop = Loop(adapter, total=10)
    totals = []
    for i in range(10):
        loop.step(packed_batch([0], i))
        totals.append(sum(adapter.ranks().values()).item())
    assert totals == [48] * 6 + [24] * 4


def test_a_run_without_a_final_phase_ends_pruned():
    adapter = small(final_steps=0, interval=4)
    loop = Loop(adapter, total=10)
    for i in range(10):
        loop.step(packed_batch([0], i))
    assert sum(adapter.ranks().values()).item() == sum(adapter.live_ranks().values()).item() == 24


def test_a_cut_triplet_still_gets_gradients_and_may_come_back():
    adapter = small(interval=5, final_steps=1)
    loop = Loop(adapter, total=20, clip=None)
    for i in range(5):
        loop.step(packed_batch([0], i))
    cut = {name: ~site.kept.clone() for name, site in adapter.named_sites()}
    assert any(c.any() for c in cut.values())
    assert all(not site.E[cut[name]].any() for name, site in adapter.named_sites())
    loop.step(packed_batch([0], 5))
    assert all(site.E[cut[name]].all() for name, site in adapter.named_sites())
    assert sum(adapter.live_ranks().values()) > sum(adapter.ranks().values())


def test_the_penalty_never_enters_an_evaluation():
    adapter = small()
    fill(adapter)
    adapter.model.eval()
    inputs = packed_batch([0])
    output = adapter.model(**inputs)
    logits = nn.functional.cross_entropy(output.logits, inputs["labels"])
    torch.testing.assert_close(output.loss, logits)


def test_after_step_without_a_gradient_says_what_to_do():
    adapter = small()
    with pytest.raises(ValueError, match=r"after optimizer.step\(\) and before zero_grad\(\)"):
        adapter.after_step(Step(1, 10))


def test_training_that_never_calls_after_step_is_warned_of():
    adapter = small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.ranks()
    with torch.no_grad():
        next(adapter.named_sites())[1].E.add_(1)
    with pytest.warns(UserWarning, match="after_step was never called"):
        adapter.ranks()


def test_warm_up_and_final_phase_longer_than_the_run_are_refused():
    adapter = small(warmup_steps=6, final_steps=4)
    with pytest.raises(ValueError, match=r"warmup_steps = 6 and final_steps = 4 .* run of 10: their sum must be below 10"):
        adapter.begin(Step(1, 10))
    adapter.begin(Step(1, 11))
    adapter.begin(Step(1, 10), training=False)


@pytest.mark.parametrize("members", [1, 2])
def test_a_target_above_what_a_rank_pattern_leaves_is_refused(members):
    model = tiny("bert")
    adapter = variants.create("adalora", initial_rank=4, target_rank=4, rank_pattern={"query": 2}, members=members)
    with pytest.raises(ValueError, match="target_rank times 12 sites is 48, above the 44 triplets that rank_pattern leaves"):
        adapter.attach(model)
    assert not any(type(module).__name__ == "Adapted" for module in model.modules())
    adapter = variants.create("adalora", initial_rank=4, target_rank=3, rank_pattern={"query": 2})
    adapter.attach(model)


def test_a_step_that_is_not_counted_leaves_the_members_importance():
    adapter = variants.create("adalora", members=2, initial_rank=4, target_rank=2, warmup_steps=5).attach(tiny("bert"))
    loop = Loop(adapter, total=10)
    loop.step(packed_batch([0, 1]))
    before = [score.clone() for score in adapter.triplet_scores()]
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    adapter.after_step(Step(2, 10, taken=torch.tensor([True, False])))
    for old, new in zip(before, adapter.triplet_scores(), strict=True):
        assert torch.equal(old[1], new[1]) and not torch.equal(old[0], new[0])


@pytest.mark.parametrize("method", ["adalora", "adalora+dora"])
def test_one_step_with_zero_gradients_does_not_prune_everything(method):
    adapter = variants.create(method, initial_rank=4, target_rank=2).attach(tiny("bert"))
    for index in range(1, 11):
        adapter.begin(Step(index, 10))
        for parameter in adapter.parameters():
            parameter.grad = torch.zeros_like(parameter)
        adapter.after_step(Step(index, 10))
    assert sum(adapter.ranks().values()).item() == 24


def test_a_total_takes_the_place_of_target_rank_times_sites():
    model = tiny("bert")
    adapter = variants.create(
        "adalora", initial_rank=4, target_rank=2, target_total=29, members=2, warmup_steps=1, final_steps=2
    )
    adapter.attach(model)
    assert adapter.totals() == ([48, 48], [29, 29])
    assert adapter.budget(variants.Step(1, 9)).tolist() == [48, 48] and adapter.budget(variants.Step(7, 9)).tolist() == [29, 29]
    adapter.detach()
    with pytest.raises(ValueError, match=r"target_total = 49, above the 48 triplets .* lower target_total"):
        variants.create("adalora", initial_rank=4, target_rank=2, target_total=49).attach(model)
