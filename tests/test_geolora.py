"""GeoLoRA against a plain version from its equations: dense, float64, one member, the gradient of the whole weight."""

import json
import math

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from rankwise.variants.geolora import beyond, within
from rankwise.variants.lowrank.slots import follow
from safetensors.torch import load_file
from torch import Tensor, nn

from tests import small_world
from tests.loop import BETA1, BETA2, EPSILON, Loop
from tests.tiers import quick
from tests.tiny import tiny

TOTAL, FINAL, DECAY, CLIP, INTERVAL = 15, 3, 0.03, 0.5, 4
SEEDS, RATES = [5, 3, 8], [3e-2, 1e-2, 5e-2]
RANKS, ALPHAS = [3, 2, 4], [7.0, 2.0, 11.0]
SIZES = {"first": (13, 9), "second": (9, 11), "third": (11, 8)}  # in, out


def plain(site, base: nn.Module, x: Tensor) -> Tensor:
    """A site by autograd alone: terms that are zero bring K' to U and L'^T to V^T."""
    rows = x.reshape(len(site.A), -1, x.shape[-1])
    U, Vt, S = site.B, site.A, site.S
    K = U.detach() @ S + (U - U.detach())
    update = rows @ Vt.detach().mT @ K.mT + rows @ (Vt - Vt.detach()).mT @ U.detach().mT
    return base(x) + (update * site.scale[:, None, None]).reshape(*x.shape[:-1], -1)


class Net(nn.Module):
    """Three linears, none of them square, with biases."""

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        for name, size in SIZES.items():
            setattr(self, name, nn.Linear(*size))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.5, generator=random)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def data(member: int, step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(100 * member + step)
    draw = {"generator": random, "dtype": torch.float64}
    return torch.randn(20, 13, **draw), torch.randn(20, 8, **draw)


def packed(step: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.cat(parts) for parts in zip(*(data(k, step) for k in range(3)), strict=True))


def squared_error(adapter: "variants.Adapter", batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (adapter.model(x) - y).square().view(adapter.members, -1).mean(1)


def create(members: int = 3, **others) -> "variants.GeoLoRA":
    values = {"initial_rank": RANKS, "alpha": ALPHAS, "interval": INTERVAL, "final_steps": FINAL, "most_rank": 6} | others
    values = {key: value[:members] if isinstance(value, list) else value for key, value in values.items()}
    return variants.create("geolora", members=members, seeds=SEEDS[:members], **values).attach(Net(), head=[])


class Site:
    """U (O, r), V (I, r) and S (r, r) of one matrix, and of S the optimizer's mean, square and count."""

    def __init__(self, U: Tensor, V: Tensor, S: Tensor, scale: float):
        self.U, self.V, self.S, self.scale = U, V, S, scale
        self.averages = [torch.zeros_like(S) for _ in range(3)]

    def change(self) -> Tensor:
        return self.scale * self.U @ self.S @ self.V.mT

    def optimize(self, gradient: Tensor, rate: float) -> None:
        mean, square, count = self.averages
        mean, square, count = BETA1 * mean + (1 - BETA1) * gradient, BETA2 * square + (1 - BETA2) * gradient**2, count + 1
        self.averages = [mean, square, count]
        direction = mean / (1 - BETA1**count) / ((square / (1 - BETA2**count)).sqrt() + EPSILON)
        self.S = self.S - rate * (DECAY * self.S + direction)

    def augment(self, K: Tensor, L: Tensor, rate: float) -> None:
        r = self.S.shape[0]
        q = min(r, 6 - r, len(self.U) - r, len(self.V) - r)
        U = torch.linalg.svd(K - self.U @ self.U.mT @ K).U[:, :q]
        V = torch.linalg.svd(L - self.V @ self.V.mT @ L).U[:, :q]
        below = torch.cat([U.mT @ (self.U @ self.S - rate * K), torch.zeros(q, q).double()], 1)
        right = (self.V @ self.S.mT - rate * L).mT @ V
        self.averages = [nn.functional.pad(average, (0, q, 0, q)) for average in self.averages]
        self.S = torch.cat([torch.cat([self.S, right], 1), below])
        self.U, self.V = torch.cat([self.U, U], 1), torch.cat([self.V, V], 1)

    def cut(self, rank: int) -> None:
        P, d, Qt = torch.linalg.svd(self.S)
        self.U, self.V, self.S = self.U @ P[:, :rank], self.V @ Qt.mT[:, :rank], torch.diag(d[:rank])
        self.averages = [torch.zeros_like(self.S) for _ in range(3)]


class Plain:
    """One member on `Net`."""

    def __init__(self, adapter, k: int, settings: dict):
        self.model, self.k, self.settings = Net(), k, settings
        r = RANKS[k]
        parts = [(site.B[k, :, :r], site.A[k, :r].mT, site.S[k, :r, :r]) for site in adapter.low_rank_sites()]
        self.sites = [Site(*(t.detach().clone() for t in part), ALPHAS[k] / r) for part in parts]

    def step(self, x: Tensor, y: Tensor, t: int) -> float:
        interval = self.settings.get("interval", INTERVAL)
        phase, augments = (t - 1) % interval, (t - 1) % interval == 0 and t < TOTAL - FINAL
        weights = []
        for i, (name, site) in enumerate(zip(SIZES, self.sites, strict=True)):
            base = getattr(self.model, name)
            weights.append((base.weight.detach() + site.change()).requires_grad_())
            x = x @ weights[-1].mT + base.bias.detach()
            x = torch.tanh(x) if i < 2 else x
        loss = ((x - y) ** 2).mean()
        gradients = []
        for site, G in zip(self.sites, torch.autograd.grad(loss, weights), strict=True):
            K, L = site.scale * G @ site.V, site.scale * G.mT @ site.U
            gradients.append([site.U.mT @ K, *([K, L] if augments else [])])
        norm = math.sqrt(sum(float((g**2).sum()) for of_site in gradients for g in of_site))
        rate, old = RATES[self.k], [site.S.clone() for site in self.sites]
        for site, of_site, before in zip(self.sites, gradients, old, strict=True):
            at_S, *at_bases = (g * min(1.0, CLIP / norm) for g in of_site)
            if augments and self.settings.get("core_step") == "release":
                site.S = before - rate * at_S
                site.averages = [torch.zeros_like(site.S) for _ in range(3)]
            else:
                site.optimize(at_S, rate)
            if augments:
                # K' and L' act on the core from before the step: U~ is orthogonal to U, so the core itself adds nothing.
                site.augment(*at_bases, rate)
        after = self.settings.get("truncate_after", interval - 1)
        if t == TOTAL - FINAL or (t < TOTAL - FINAL and phase == after):
            for site, rank in zip(self.sites, self.ranks(), strict=True):
                site.cut(rank)
                if self.settings.get("scale_by") == "release":
                    site.scale = ALPHAS[self.k] / rank
        return loss.item()

    def ranks(self) -> list[int]:
        """By hand: a tail one value at a time; or the largest of all, one at a time."""
        values = [torch.linalg.svdvals(site.S).tolist() for site in self.sites]
        if "target_rank" not in self.settings and "target_parameters" not in self.settings:
            ranks = []
            for d in values:
                r = 0
                while r < len(d) and not math.sqrt(sum(v**2 for v in d[r:])) < self.settings["tolerance"] * math.hypot(*d):
                    r += 1
                ranks.append(min(max(r, 2), 6, len(d)))
            return ranks
        ranks = [min(2, len(d)) for d in values]
        by_rank = "target_rank" in self.settings
        left = 3 * self.settings["target_rank"][self.k] if by_rank else self.settings["target_parameters"]
        sizes = [sum(size) for size in SIZES.values()]
        left -= sum(r if by_rank else n * r + r * r for n, r in zip(sizes, ranks, strict=True))
        order = []
        for s, d in enumerate(values):
            for j in range(ranks[s], len(d)):
                price = 1 if by_rank else sizes[s] + 2 * j + 1
                order.append((-(d[j] ** 2) / price, s, price))
        for _, s, price in sorted(order):
            if price <= left:
                ranks[s] += 1
                left -= price
        return ranks


TRAININGS = {
    "tolerance": {"tolerance": 0.4},
    "release": {"tolerance": 0.1, "core_step": "release", "scale_by": "release"},
    "target": {"target_rank": [3, 2, 4], "truncate_after": 2},
    "parameters": {"target_parameters": 230, "cost": "parameters"},
    "every step": {"tolerance": 0.05, "interval": 1},
}


@pytest.mark.parametrize("case", quick(TRAININGS, ["release", "parameters"]))
def test_every_update_of_a_training_is_the_plain_one(case):
    settings = TRAININGS[case]
    adapter = create(**settings)
    plains = [Plain(adapter, k, settings) for k in range(3)]
    loop = Loop(adapter, RATES, TOTAL, CLIP, DECAY, squared_error)
    seen = set()
    for t in range(1, TOTAL + 1):
        losses = loop.step(packed(t))
        for k, one in enumerate(plains):
            assert losses[k].item() == pytest.approx(one.step(*data(k, t), t), rel=1e-8), t
            for (name, rank), site, wanted in zip(adapter.ranks().items(), adapter.low_rank_sites(), one.sites, strict=True):
                assert int(rank[k]) == len(wanted.S), (t, name)
                torch.testing.assert_close(adapter.delta(name)[k], wanted.change(), rtol=1e-7, atol=1e-9)
                U, Vt = site.B[k, :, : len(wanted.S)], site.A[k, : len(wanted.S)]
                torch.testing.assert_close(U.mT @ U, torch.eye(len(Vt)).double(), rtol=0, atol=1e-12)
                torch.testing.assert_close(Vt @ Vt.mT, torch.eye(len(Vt)).double(), rtol=0, atol=1e-12)
                assert not site.S[k, len(Vt) :].any() and not site.S[k, :, len(Vt) :].any()
        seen |= {tuple(row) for row in torch.stack(list(adapter.ranks().values())).T.tolist()}
    assert len(seen) > 2, "ranks hardly moved"
    if "target_rank" in settings:
        assert sum(adapter.ranks().values()).tolist() == [3 * target for target in settings["target_rank"]]
    if "target_parameters" in settings:
        counts = adapter.parameter_counts()["trainable"]
        assert (counts <= 230).all() and (counts > 230 - 25).all() and counts.equal(adapter.final_budget().clamp_max(counts))


# -- its parts ---------------------------------------------------------------------------------------------------------


def test_the_tail_is_below_the_tolerance_and_one_value_more_is_not_needed():
    d = torch.tensor([4.0, 3.0, 2.0, 1.0]).double()  # |d| = sqrt(30) = 5.477; tails 5.477, 3.742, 2.236, 1
    assert [within(d, tolerance, 0, 9) for tolerance in (0.1, 0.2, 0.5, 0.7)] == [4, 3, 2, 1]
    assert within(d, 2.236068 / 30**0.5, 0, 9) == 2 and within(d, 2.236067 / 30**0.5, 0, 9) == 3  # strictly below
    assert within(d, 0.7, 2, 9) == 2 and within(d, 0.1, 2, 3) == 3
    assert within(torch.zeros(5), 0.5, 2, 9) == 5, "a core that is zero is not cut"


def test_directions_are_those_of_the_gradient_outside_the_basis_and_none_of_rounding():
    random = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(9, 3, generator=random, dtype=torch.float64)).Q
    one = torch.randn(9, 1, generator=random, dtype=torch.float64)
    gradient = one @ torch.ones(1, 3).double() + basis @ torch.randn(3, 3, generator=random, dtype=torch.float64)
    gradient += 1e-9 * torch.randn(9, 3, generator=random, dtype=torch.float64)
    found = beyond(basis, gradient)
    outside = one - basis @ basis.mT @ one
    assert found.shape == (9, 1)
    torch.testing.assert_close((found.mT @ outside).abs()[0, 0], outside.norm(), rtol=1e-6, atol=0)
    assert beyond(basis, torch.zeros(9, 3).double()).shape == beyond(basis, basis).shape == (9, 0)
    assert beyond(torch.eye(9).double()[:, :8], gradient.repeat(1, 3)[:, :8]).shape == (9, 1), "one direction is left"


def test_singular_values_near_zero_do_no_harm():
    """The release divides by them: a core with values of 1e-300 and 0 grows by the directions that it would have grown by."""
    results = []
    for tiny_value in (0.0, 1e-300, 1e-30):
        adapter = create(1, tolerance=0.0, least_rank=3)
        with torch.no_grad():
            for site in adapter.low_rank_sites():
                site.S[0] = torch.diag(torch.tensor([1.0, tiny_value, 0.0]).double())
        loop = Loop(adapter, RATES[:1], TOTAL, CLIP, DECAY, squared_error)
        history = [loop.step(data(0, t)) for t in range(1, 6)]
        assert all(p.isfinite().all() for p in adapter.parameters())
        results.append(torch.cat(history))
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("start", [2, 3, 6])
def test_the_first_augmentation_follows_the_gradient_though_the_core_is_zero(start):
    """U1 spans G V for the V of the start, so that the step after it descends."""
    adapter = create(1, initial_rank=[start], most_rank=12)
    x, y = data(0, 1)
    weights = [getattr(Net(), name).weight.detach().requires_grad_() for name in SIZES]
    h = x
    for i, (name, weight) in enumerate(zip(SIZES, weights, strict=True)):
        h = h @ weight.mT + getattr(Net(), name).bias.detach()
        h = torch.tanh(h) if i < 2 else h
    gradients = torch.autograd.grad(((h - y) ** 2).mean(), weights)
    V = [site.A[0].clone().mT for site in adapter.low_rank_sites()]
    Loop(adapter, RATES[:1], TOTAL, CLIP, DECAY, squared_error).step((x, y))
    for site, G, v in zip(adapter.low_rank_sites(), gradients, V, strict=True):
        U, K = site.B[0], G @ v
        cap = min(site.A.shape[2], site.B.shape[1])
        assert U.shape[1] == min(2 * start, cap)
        if 2 * start <= cap:
            torch.testing.assert_close(U @ (U.mT @ K), K, rtol=1e-9, atol=1e-12)


def test_a_member_whose_step_did_not_count_does_not_grow():
    adapter = create(core_step="release")
    step = Step(1, TOTAL, learning_rates=torch.tensor(RATES), taken=torch.tensor([True, False, True]))
    adapter.begin(step)
    squared_error(adapter, packed(1)).sum().backward()
    for parameter in adapter.parameters():
        parameter.grad[1] = torch.nan
    before = [tuple(p[1].clone() for p in (site.A, site.B, site.S)) for site in adapter.low_rank_sites()]
    adapter.before_step(step)
    adapter.after_step(step)
    for site, (A, B, S) in zip(adapter.low_rank_sites(), before, strict=True):
        assert site.physical().tolist()[1] == 2 and site.physical().tolist()[0] == 6
        assert (
            torch.equal(site.A[1, :3], A[:3]) and torch.equal(site.B[1, :, :3], B[:, :3]) and torch.equal(site.S[1, :4, :4], S)
        )


def test_a_diverged_member_leaves_the_others_alone():
    adapter, alone = create(tolerance=0.4), create(tolerance=0.4)
    loops = [Loop(one, RATES, TOTAL, CLIP, DECAY, squared_error) for one in (adapter, alone)]
    for t in range(1, 4):
        for loop in loops:
            loop.step(packed(t))
    with torch.no_grad():
        adapter.low_rank_sites()[0].S[1] = torch.nan
    for loop in loops:
        loop.adapter._truncate()
    for name in SIZES:
        for k in (0, 2):
            torch.testing.assert_close(adapter.delta(name)[k], alone.delta(name)[k], rtol=1e-12, atol=1e-14)
    assert adapter.low_rank_sites()[0].physical()[1] == 4, "it stays"


def test_between_augmentations_the_bases_get_no_gradient_and_stay():
    adapter = create()
    loop = Loop(adapter, RATES, TOTAL, CLIP, DECAY, squared_error)
    loop.step(packed(1))
    sites = adapter.low_rank_sites()
    before = [(site.A.clone(), site.B.clone(), site.S.clone()) for site in sites]
    adapter.begin(Step(2, TOTAL))
    squared_error(adapter, packed(2)).sum().backward()
    assert all(site.A.grad is None and site.B.grad is None and site.S.grad.any() for site in sites)
    loop.step(packed(2))
    for site, (A, B, S) in zip(sites, before, strict=True):
        assert torch.equal(site.A, A) and torch.equal(site.B, B) and not torch.equal(site.S, S)


def test_accumulated_micro_batches_are_one_batch():
    """K' and L' are those of the whole step."""
    results = []
    for parts in (1, 2):
        adapter = create(1, tolerance=0.3)
        step = Step(1, TOTAL, learning_rates=torch.tensor(RATES[:1]))
        x, y = data(0, 1)
        for micro_batch, (a, b) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
            adapter.begin(step, micro_batch)
            ((adapter.model(a) - b).square().mean() / parts).backward()
        adapter.before_step(step)
        adapter.after_step(step)
        results.append([adapter.delta(name) for name in SIZES] + [site.B @ site.B.mT for site in adapter.low_rank_sites()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny("bert").train()
        adapter = variants.create("geolora", initial_rank=3, dropout=0.2, seeds=[4])
        adapter.attach(model, ["query", "intermediate.dense"], head=[])
        fill(adapter)
        if checkpointing:
            model.gradient_checkpointing_enable()
        adapter.begin(Step(1, TOTAL))
        model(input_ids=torch.arange(1, 13).view(2, 6)).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert one.any()


def test_torch_s_optimizer_follows_a_core_of_another_size():
    adapter = create(1, tolerance=0.3)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for t in range(1, 6):
        step = Step(t, TOTAL, learning_rates=torch.tensor([1e-2]))
        adapter.begin(step)
        squared_error(adapter, data(0, t)).sum().backward()
        adapter.before_step(step)
        optimizer.step()
        adapter.after_step(step)
        follow(optimizer, adapter)
        optimizer.zero_grad()
        for site in adapter.low_rank_sites():
            assert optimizer.state[site.S]["exp_avg"].shape == site.S.shape
            assert site.A not in optimizer.state and site.B not in optimizer.state
            if t >= 4:  # a core that was rotated at step 4 has averages of its own from then on
                assert optimizer.state[site.S]["step"] == t - 4


def test_the_core_counts_and_a_file_is_a_plain_lora(tmp_path):
    model = tiny("bert", torch.float32).eval()
    adapter = variants.create("geolora", initial_rank=4, alpha=7, tolerance=0.2).attach(model, ["query"], head=[])
    assert adapter.parameter_counts()["trainable"].item() == 2 * (4 * (32 + 32) + 16)
    fill(adapter, 0.3)
    delta = adapter.delta("bert.encoder.layer.1.attention.self.query")[0]
    variants.save_pretrained(adapter, tmp_path / "own")
    variants.export_lora(adapter, tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    name = "base_model.model.bert.encoder.layer.1.attention.self.query"
    A, B = (tensors[f"{name}.lora_{part}.weight"] for part in "AB")
    assert (config["peft_type"], config["r"], len(A)) == ("LORA", 4, 4)
    torch.testing.assert_close(config["lora_alpha"] / 4 * B @ A, delta, rtol=1e-4, atol=1e-5)
    again = variants.load_pretrained(tiny("bert", torch.float32).eval(), tmp_path / "own")
    assert again.method == "geolora" and again.settings == adapter.settings
    torch.testing.assert_close(again.delta(name.removeprefix("base_model.model."))[0], delta, rtol=1e-4, atol=1e-5)
    site = again.low_rank_sites()[0]
    torch.testing.assert_close(site.B[0].mT @ site.B[0], torch.eye(4), rtol=0, atol=1e-5)
    variants.truncate(again, total_rank=5)
    assert sum(again.ranks().values()).item() == 5


def test_the_rank_forgets_where_it_started():
    """One target of rank 3, whatever the rank at the start: the published property, at the size of a test."""
    ranks = []
    for start in (2, 5, 8):
        model = nn.Sequential(nn.Linear(10, 10)).double()
        with torch.no_grad():
            model[0].weight.zero_()
            model[0].bias.zero_()
        random = torch.Generator().manual_seed(3)
        true = torch.randn(10, 3, generator=random).double() @ torch.randn(3, 10, generator=random).double()
        adapter = variants.create(
            "geolora", seeds=[1], initial_rank=start, alpha=start, tolerance=0.1, interval=10, final_steps=1
        )
        adapter.attach(model, "0", head=[])
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.0)
        for t in range(1, 122):
            step = Step(t, 121, learning_rates=torch.tensor([0.1]))
            adapter.begin(step)
            x = torch.randn(30, 10, generator=random).double()
            (model(x) - x @ true.mT).square().mean().backward()
            adapter.before_step(step)
            optimizer.step()
            adapter.after_step(step)
            follow(optimizer, adapter)
            optimizer.zero_grad()
        ranks.append(adapter.ranks()["0"].item())
    assert ranks == [3, 3, 3]


def test_settings_that_do_not_fit_are_refused():
    for values, words in (
        ({"initial_rank": 40}, "initial_rank = 40 is above most_rank = 32: a site starts with no more"),
        ({"initial_rank": 4, "rank_pattern": {"first": 33}}, "first = 33 is above most_rank = 32"),
        ({"initial_rank": 4, "target_rank": 3, "tolerance": 0.2}, "tolerance = 0.2 has no effect with a target"),
        ({"initial_rank": 4, "cost": "parameters"}, 'cost = "parameters" has no effect without a target'),
        ({"initial_rank": 4, "truncate_after": 11}, "truncate_after = 11 is not below interval = 11"),
        ({"initial_rank": 4, "least_rank": 40}, "least_rank = 40 is above most_rank = 32"),
    ):
        with pytest.raises(ValueError, match=words):
            variants.check("geolora", values)
    with pytest.raises(ValueError, match="least_rank = 2 takes 6 ranks of a target of 5: lower it or raise the target"):
        create(1, target_total=5)
    with pytest.raises(ValueError, match="final_steps = 3 leaves no step for the ranks in a run of 3: lower it"):
        create(1).begin(Step(1, 3))


def test_the_order_of_calls_is_said_where_it_is_wrong():
    adapter = create()
    adapter.begin(Step(1, TOTAL))
    squared_error(adapter, packed(1)).sum().backward()
    with pytest.raises(ValueError, match="after_step without the gradients of an augmentation"):
        adapter.after_step(Step(1, TOTAL))
    adapter.before_step(Step(1, TOTAL))
    with pytest.raises(ValueError, match="an augmentation is by the rate of its step: give Step"):
        adapter.after_step(Step(1, TOTAL))


def test_a_budget_of_parameters_counts_the_core():
    kind = variants.METHODS["geolora"].settings
    settings = kind.for_budget({}, {"a": 40, "b": 41}, 5000, 2.0)
    assert settings["target_parameters"] == 5000 and settings["cost"] == "parameters" and settings["most_rank"] == 82
    assert variants.check("geolora", settings).rank_pattern == {"^b$": 41}
    assert kind.for_budget({"cost": "rank"}, {"a": 3, "b": 4}, 100, 2.0)["target_total"] == 7


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_bit_for_bit_with_accumulation(tmp_path):
    model = small_world.model(tmp_path / "model")
    pack = small_world.pack(model, "geolora", seeds=(0, 1), accumulation=2)
    whole, outcomes = small_world.trained(pack, tmp_path / "whole")
    assert all(outcome.error is None for outcome in outcomes)
    first = small_world.trainer(pack, tmp_path / "cut")
    first.log.start()
    for _ in range(6):
        first.step += 1
        first.train_step()
    first.save()
    again, _ = small_world.trained(pack, tmp_path / "cut")
    for name, value in whole.adapter.state_dict().items():
        assert torch.equal(value, again.adapter.state_dict()[name]), name
