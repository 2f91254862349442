"""BayesLoRA against a plain version from its equations: dense, float64, one member, one rank at a time; and its noise."""

import hashlib
import json
import math
import statistics

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.draws import Draw, normal
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from rankwise.variants.bayeslora import divergence
from torch import Tensor, nn

from tests.loop import BETA1, BETA2, EPSILON, Loop
from tests.test_geolora import SIZES, Net, data, packed, squared_error
from tests.tiers import quick
from tests.tiny import tiny

TOTAL, WARMUP, FINAL, INTERVAL, DECAY, CLIP = 14, 4, 3, 3, 0.03, 0.5
SEEDS, RATES, WEIGHT, RATIO = [5, 3, 8], [6e-2, 3e-2, 1e-1], 0.02, 2.0
RANKS, ALPHAS = [3, 2, 4], [7.0, 2.0, 11.0]
OWN = {"kl_weight": WEIGHT, "initial_log_variance": -3.0, "variance_lr_ratio": RATIO, "interval": INTERVAL}
OWN |= {"warmup_steps": WARMUP, "final_steps": FINAL}


def create(members: int = 3, **others) -> "variants.BayesLoRA":
    values = {"initial_rank": RANKS, "alpha": ALPHAS, **OWN} | others
    values = {key: value[:members] if isinstance(value, list) else value for key, value in values.items()}
    return variants.create("bayeslora", members=members, seeds=SEEDS[:members], **values).attach(Net(), head=[])


# -- the noise ---------------------------------------------------------------------------------------------------------


def drawn(seed: int, step: int, micro_batch: int, site: str) -> Draw:
    draw = Draw([seed])
    draw.begin(step, micro_batch)
    return draw


def test_a_number_is_what_its_key_and_place_say_in_whole_numbers():
    found = normal(torch.zeros(1, 4, 5, dtype=torch.float64), drawn(7, 3, 1, "a"), "a").flatten().tolist()
    digest = hashlib.blake2b(b"7/3/1/a/0", digest_size=8).digest()
    first, second = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))
    gauss = statistics.NormalDist()
    for place, number in enumerate(found):
        h = place
        for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            h = ((h ^ (h >> shift)) * multiplier) % 2**32
        h = ((h ^ first) * (second | 1)) % 2**32
        u = ((h - 2**32 if h >= 2**31 else h) >> 8) + 0.5  # the upper 24 bits, signed
        assert number == pytest.approx(gauss.inv_cdf((u * 2.0**-23 + 1) / 2), rel=1e-6, abs=1e-12)


def test_the_numbers_are_normal_and_those_of_other_keys_are_others():
    one, other = (normal(torch.zeros(1, 400, 500), drawn(0, step, 0, "a"), "a").double().flatten() for step in (1, 2))
    n = one.numel()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # of N(0, 1), and the variance of each
        assert abs(float((one**power).mean()) - moment) < 4.5 * math.sqrt(spread / n), power
    assert one.abs().max() < 5.5 and abs(float((one * other).mean())) < 4.5 / math.sqrt(n)
    assert abs(float((one[:-1] * one[1:]).mean())) < 4.5 / math.sqrt(n)


def test_a_first_token_alone_has_the_noise_that_it_has_among_all():
    whole, one = drawn(1, 1, 0, "a"), drawn(1, 1, 0, "a")
    every = normal(torch.zeros(1, 3 * 7, 4), whole, "a", of_tokens=True).view(3, 7, 4)
    with one.first_tokens(7):
        assert torch.equal(normal(torch.zeros(1, 3, 4), one, "a", of_tokens=True), every[None, :, 0])
    with one.first_tokens(7):
        assert torch.equal(normal(torch.zeros(1, 3, 4), drawn(1, 1, 0, "a"), "a"), every.view(-1, 4)[None, :3])


@pytest.mark.parametrize("variance", ["both", "A"])
def test_outputs_drawn_at_once_have_the_variance_of_drawn_weights(variance):
    """Also where both variances are large, so that their product, which the release leaves out, is most of it."""
    site = create(1, initial_log_variance=0.5, variance=variance).low_rank_sites()[0]
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        site.B.normal_(generator=random)
    x, count, spread = torch.randn(13, generator=random).double(), 20_000, math.exp(0.25)
    site.draw.begin(1, 0)
    with torch.no_grad():
        local = site.product(torch.zeros(count, 9).double(), x.expand(count, 13), 0.0)
    A = site.A[0].detach() + spread * torch.randn(count, 3, 13, generator=random).double()
    B = site.B[0].detach() + spread * (variance == "both") * torch.randn(count, 9, 3, generator=random).double()
    weights = ALPHAS[0] / 3 * (B @ (A @ x)[:, :, None])[:, :, 0]
    mean = site.delta(None)[0].detach() @ x
    for values in (local, weights):
        assert ((values.mean(0) - mean).abs() < 5 * values.std(0) / math.sqrt(count)).all()
    ratio = local.var(0) / weights.var(0)
    assert (ratio - 1).abs().max() < 0.1 and abs(float(ratio.mean()) - 1) < 0.03


# -- a training --------------------------------------------------------------------------------------------------------


class Rank:
    """One rank: a (I,), b (O,) and l = log v, and of each the optimizer's mean, square and count."""

    def __init__(self, a: Tensor, b: Tensor, log_variance: Tensor):
        self.leaves = [leaf.detach().clone().requires_grad_() for leaf in (a, b, log_variance)]
        self.averages = [(0.0, 0.0, 0)] * 3

    def ratio(self, both: bool) -> float:
        a, b, log_variance = (leaf.detach() for leaf in self.leaves)
        medians = []
        for mean in (a, b) if both else (a,):
            logs = sorted(float(log_variance) - math.log(float(w) ** 2 + 1e-8) for w in mean)
            medians.append(logs[(len(logs) - 1) // 2])
        return sum(medians) / len(medians)


def kl(w: Tensor, v: Tensor) -> Tensor:
    a = v / (w**2 + 1e-8) + 1e-8
    return -(0.63576 / (1 + torch.exp(-(1.87320 + 1.48695 * torch.log(a)))) - torch.log(1 + 1 / a) / 2 - 0.63576)


class Plain:
    """One member on `Net`."""

    def __init__(self, adapter, k: int, settings: dict):
        self.model, self.k = Net(), k
        self.both, self.threshold = settings.get("variance", "both") == "both", settings["threshold"]
        self.is_local, self.settings, self.scale = settings.get("sampling") != "weights", settings, ALPHAS[k] / RANKS[k]
        self.sites = [
            [Rank(site.A[k, j], site.B[k, :, j], site.log_variance[k, j]) for j in range(RANKS[k])]
            for site in adapter.low_rank_sites()
        ]

    def step(self, x: Tensor, y: Tensor, t: int) -> float:
        loss, divergence = self.loss(x, y, t), 0.0
        for site in self.sites:
            for a, b, log_variance in (rank.leaves for rank in site):
                divergence = divergence + kl(a, log_variance.exp()).sum()
                divergence = divergence + (kl(b, log_variance.exp()).sum() if self.both else 0.0)
        ranks = [rank for site in self.sites for rank in site]
        gradients = torch.autograd.grad(loss + WEIGHT * divergence, [leaf for rank in ranks for leaf in rank.leaves])
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        with torch.no_grad():
            for n, g in enumerate(gradients):
                rank, part, g = ranks[n // 3], n % 3, g * min(1.0, CLIP / norm)
                mean, square, count = rank.averages[part]
                mean, square, count = BETA1 * mean + (1 - BETA1) * g, BETA2 * square + (1 - BETA2) * g**2, count + 1
                rank.averages[part] = mean, square, count
                direction = mean / (1 - BETA1**count) / ((square / (1 - BETA2**count)).sqrt() + EPSILON)
                is_variance, leaf = part == 2, rank.leaves[part]
                rate = RATES[self.k] * (RATIO if is_variance else 1.0)
                leaf -= rate * ((0.0 if is_variance else DECAY) * leaf + direction)
        if t == TOTAL - FINAL or (WARMUP < t < TOTAL - FINAL and t % INTERVAL == 0):
            self.prune(t)
        return loss.item()

    def loss(self, x: Tensor, y: Tensor, t: int) -> Tensor:
        draw = drawn(SEEDS[self.k], t, 0, "")
        for i, (name, site) in enumerate(zip(SIZES, self.sites, strict=True)):
            base, size = getattr(self.model, name), (x**2).sum(1)
            change = torch.zeros(len(x), SIZES[name][1], dtype=torch.float64)
            var = torch.zeros_like(change)
            noise = {}
            if site and not self.is_local:
                noise["A"] = normal(torch.zeros(1, len(site), SIZES[name][0]).double(), draw, f"{name}/A")[0]
                noise["B"] = normal(torch.zeros(1, len(site), SIZES[name][1]).double(), draw, f"{name}/B")[0]
            for j, (a, b, log_variance) in enumerate(rank.leaves for rank in site):
                v = log_variance.exp()
                if not self.is_local:
                    a = a + v.sqrt() * noise["A"][j]
                    b = b + v.sqrt() * noise["B"][j] if self.both else b
                m = x @ a
                change = change + torch.outer(m, b)
                var = var + v * torch.outer(size, b**2)
                if self.both:
                    var = var + (v * (m**2 + size * v))[:, None]
            if site and self.is_local:
                numbers = normal(change.detach()[None], draw, f"{name}/noise", of_tokens=True)[0]
                change = change + var.clamp_min(1e-30).sqrt() * numbers
            x = x @ base.weight.detach().mT + self.scale * change + base.bias.detach()
            x = torch.tanh(x) if i < 2 else x
        return ((x - y) ** 2).mean()

    def prune(self, t: int) -> None:
        for s, site in enumerate(self.sites):
            order = sorted(site, key=lambda rank: rank.ratio(self.both))
            least = order[: self.settings.get("least_rank", 0)]
            self.sites[s] = [rank for rank in site if rank.ratio(self.both) < self.threshold or rank in least]
        if t == TOTAL - FINAL and "target_rank" in self.settings:
            every = [(rank.ratio(self.both), s, rank) for s, site in enumerate(self.sites) for rank in site]
            every.sort(key=lambda one: one[0])
            stay = [rank for _, _, rank in every[: 3 * self.settings["target_rank"][self.k]]]
            self.sites = [[rank for rank in site if any(rank is one for one in stay)] for site in self.sites]


TRAININGS = {
    "local": {"threshold": 2.6},
    "weights": {"threshold": 1.9, "sampling": "weights", "least_rank": 1},
    "asymmetric": {"threshold": 2.5, "variance": "A"},
    "target": {"threshold": 3.5, "target_rank": [2, 1, 2]},
}


@pytest.mark.parametrize("case", quick(TRAININGS, ["target"]))
def test_every_rank_of_a_training_is_the_plain_one(case):
    settings = TRAININGS[case]
    adapter = create(**settings)
    plains = [Plain(adapter, k, settings) for k in range(3)]
    loop = Loop(adapter, RATES, TOTAL, CLIP, DECAY, squared_error)
    left = []
    for t in range(1, TOTAL + 1):
        losses = loop.step(packed(t))
        for k, one in enumerate(plains):
            assert losses[k].item() == pytest.approx(one.step(*data(k, t), t), rel=1e-9), t
            for site, ranks in zip(adapter.low_rank_sites(), one.sites, strict=True):
                assert site.physical()[k] == site.rank()[k] == len(ranks), t
                for j, rank in enumerate(ranks):
                    a, b, log_variance = rank.leaves
                    torch.testing.assert_close(site.A[k, j], a, rtol=1e-8, atol=1e-10)
                    torch.testing.assert_close(site.B[k, :, j], b, rtol=1e-8, atol=1e-10)
                    torch.testing.assert_close(site.log_variance[k, j], log_variance, rtol=1e-8, atol=1e-10)
        left.append(int(sum(adapter.ranks().values()).sum()))
    assert left[WARMUP] == 3 * sum(RANKS) and 0 < left[-1] < left[WARMUP], left
    assert len(set(left[TOTAL - FINAL - 1 :])) == 1
    if "target_rank" in settings:
        assert left[TOTAL - FINAL - 1] < left[TOTAL - FINAL - 2]
        assert (sum(adapter.ranks().values()) <= adapter.final_budget()).all()


# -- its parts ---------------------------------------------------------------------------------------------------------


def test_the_divergence_falls_with_noise_and_is_that_of_the_paper_s_approximation():
    """Molchanov et al. 2017, eq. (14), at three values of log a; far from eps."""
    w = torch.ones(3, dtype=torch.float64)
    found = divergence(w, torch.tensor([-2.0, 0.0, 2.0]).double())
    expected = []
    for log_a in (-2.0, 0.0, 2.0):
        sigmoid = 1 / (1 + math.exp(-(1.87320 + 1.48695 * log_a)))
        expected.append(-(0.63576 * sigmoid - 0.5 * math.log(1 + math.exp(-log_a)) - 0.63576))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    assert found[0] > found[1] > found[2] > 0


def test_evaluation_takes_the_means_and_training_draws_by_step_and_micro_batch():
    adapter = create(1)
    fill(adapter, 0.3)
    x, model = data(0, 1)[0], adapter.model
    outputs = []
    for step, micro_batch in ((1, 0), (1, 1), (2, 0), (1, 0)):
        adapter.begin(Step(step, TOTAL), micro_batch)
        outputs.append(model.train()(x).detach())
    assert torch.equal(outputs[0], outputs[3]) and not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    adapter.begin(Step(1, TOTAL), training=False)
    evaluated = model.eval()(x)
    adapter.merge()
    torch.testing.assert_close(model(x), evaluated)


@pytest.mark.parametrize("settings", [{}, {"sampling": "weights"}])
def test_recomputed_activations_draw_what_the_first_pass_drew(settings):
    gradients = []
    for checkpointing in (False, True):
        model = tiny("bert").train()
        adapter = variants.create("bayeslora", initial_rank=3, initial_log_variance=-2.0, seeds=[4], **settings)
        adapter.attach(model, ["query", "intermediate.dense"], head=[])
        fill(adapter)
        if checkpointing:
            model.gradient_checkpointing_enable()
        adapter.begin(Step(1, TOTAL))
        ids = torch.arange(1, 13).view(2, 6)
        model(input_ids=ids).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert one.any()


def test_rows_of_zeros_have_no_noise_and_a_gradient():
    adapter = create(1)
    x = torch.zeros(20, 13).double()
    adapter.begin(Step(1, TOTAL))
    squared_error(adapter, (x, torch.ones(20, 8).double())).sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


def test_a_target_of_parameters_counts_the_variances():
    sizes = [sum(size) + 1 for size in SIZES.values()]
    adapter = create(1, threshold=1e9, cost="parameters", target_parameters=100)
    assert adapter.parameter_counts()["trainable"].item() == 3 * sum(sizes)
    fill(adapter, 0.3)
    ratios = [site.ratios()[0].tolist() for site in adapter.low_rank_sites()]
    adapter.begin(Step(TOTAL - FINAL, TOTAL))
    adapter.after_step(Step(TOTAL - FINAL, TOTAL))
    ranks, left = [0, 0, 0], 100
    for _, s in sorted((-math.exp(-r) / sizes[s], s) for s, row in enumerate(ratios) for r in row):
        if sizes[s] <= left:
            ranks[s], left = ranks[s] + 1, left - sizes[s]
    assert [int(r) for r in adapter.ranks().values()] == ranks and sum(ranks) > 2
    assert adapter.parameter_counts()["trainable"].item() == 100 - left


def test_a_diverged_member_is_not_pruned_and_leaves_the_others_alone():
    adapter = create(threshold=-100.0)
    with torch.no_grad():
        adapter.low_rank_sites()[0].B[1] = torch.nan
    adapter.begin(Step(TOTAL - FINAL, TOTAL))
    adapter.after_step(Step(TOTAL - FINAL, TOTAL))
    assert [site.physical().tolist() for site in adapter.low_rank_sites()] == [[0, 2, 0], [0, 0, 0], [0, 0, 0]]


def test_a_file_keeps_the_variances_and_is_a_plain_lora_of_the_means(tmp_path):
    model = tiny("bert", torch.float32).eval()
    adapter = variants.create("bayeslora", initial_rank=3, alpha=7).attach(model, ["query"], head=[])
    fill(adapter, 0.3)
    variants.save_pretrained(adapter, tmp_path / "own")
    variants.export_lora(adapter, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 7)
    again = variants.load_pretrained(tiny("bert", torch.float32).eval(), tmp_path / "own")
    assert again.method == "bayeslora" and again.settings == adapter.settings
    for here, there in zip(adapter.low_rank_sites(), again.low_rank_sites(), strict=True):
        for part in ("A", "B", "log_variance"):
            assert torch.equal(getattr(here, part), getattr(there, part)), part
    variants.truncate(again, total_rank=3)
    assert sum(again.ranks().values()).item() == 3


def test_embeddings_and_convolutions_draw_their_weights():
    model = nn.Sequential(nn.Embedding(11, 6), nn.Flatten(1), nn.Linear(30, 2)).double()
    adapter = variants.create("bayeslora", initial_rank=2, initial_log_variance=-1.0).attach(model, "0", head=[])
    ids = torch.arange(10).view(2, 5)
    outputs = []
    for step in (1, 2):
        adapter.begin(Step(step, 3))
        outputs.append(model.train()(ids))
    assert not torch.equal(*outputs)
    outputs[1].sum().backward()
    assert adapter.site("0").log_variance.grad.any()


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the target of 10 ranks is above the 9 at the start"):
        create(1, target_total=10)
    with pytest.raises(ValueError, match="least_rank = 2 takes 6 ranks of a target of 5: lower it or raise the target"):
        create(1, target_total=5, least_rank=2)
    with pytest.raises(ValueError, match='cost = "parameters" has no effect without a target'):
        create(1, cost="parameters")
    with pytest.raises(ValueError, match="target_rank = 5 is above initial_rank = 3: BayesLoRA prunes"):
        create(1, target_rank=5, initial_rank=3)
    with pytest.raises(ValueError, match="warmup_steps = 4 and final_steps = 3 leave no step to prune in a run of 7"):
        create(1).begin(Step(1, 7))
