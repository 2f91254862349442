"""WeightLoRA against a plain version from its equations: dense, float64, one member, loops over sites."""

import json
import warnings

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from torch import Tensor

from tests.loop import BETA1, BETA2, EPSILON, Loop
from tests.test_geolora import SIZES, Net, data, packed, squared_error
from tests.tiny import tiny

TOTAL, FINAL, DECAY, CLIP, RATE_W = 14, 4, 0.03, 0.5, 15.0
SEEDS, RATES = [5, 3, 8], [3e-2, 1e-2, 5e-2]
RANKS, ALPHAS = [3, 2, 4], [7.0, 2.0, 11.0]


def create(members: int = 3, **others) -> "variants.WeightLoRA":
    values = {"rank": RANKS, "alpha": ALPHAS, "site_lr": RATE_W, "lr_ratio": 1.7} | others
    values = {key: value[:members] if isinstance(value, list) else value for key, value in values.items()}
    return variants.create("weightlora", members=members, seeds=SEEDS[:members], **values).attach(Net(), head=[])


class Site:
    """A (r, I), B (O, r) and w of one matrix; of A and B the optimizer's mean, square and count."""

    def __init__(self, A: Tensor, B: Tensor, scale: float):
        self.A, self.B, self.w, self.scale = A, B, torch.ones((), dtype=torch.float64), scale
        self.start_anew()

    def start_anew(self) -> None:
        self.averages = {part: (0.0, 0.0, 0) for part in "AB"}

    def change(self) -> Tensor:
        return self.w * self.scale * self.B @ self.A

    def optimize(self, part: str, gradient: Tensor, rate: float) -> None:
        mean, square, count = self.averages[part]
        mean, square, count = BETA1 * mean + (1 - BETA1) * gradient, BETA2 * square + (1 - BETA2) * gradient**2, count + 1
        self.averages[part] = mean, square, count
        direction = mean / (1 - BETA1**count) / ((square / (1 - BETA2**count)).sqrt() + EPSILON)
        value = getattr(self, part)
        setattr(self, part, value - rate * (DECAY * value + direction))


def orthonormal(columns: list[Tensor], more: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Gram and Schmidt, twice each."""
    made: list[Tensor] = []
    for column in [*columns, *more]:
        for _ in range(2):
            for one in made:
                column = column - (one @ column) * one
        made.append(column / column.norm())
    return made[: len(columns)], made[len(columns) :]


class Plain:
    """One member on `Net`."""

    def __init__(self, adapter, k: int, settings: dict):
        self.model, self.k, self.settings = Net(), k, settings
        r = RANKS[k]
        parts = [(site.A[k, :r], site.B[k, :, :r]) for site in adapter.low_rank_sites()]
        self.sites = [Site(*(t.detach().clone() for t in part), ALPHAS[k] / r) for part in parts]
        self.kept = [True] * 3
        self.revived = 0

    def step(self, x: Tensor, y: Tensor, t: int) -> float:
        growth, interval = self.settings.get("growth"), self.settings.get("interval", 1)
        leaves = [[v.detach().requires_grad_() for v in (site.A, site.B, site.w)] for site in self.sites]
        for i, (name, (A, B, w), site) in enumerate(zip(SIZES, leaves, self.sites, strict=True)):
            base = getattr(self.model, name)
            x = x @ (base.weight.detach() + w * site.scale * B @ A).mT + base.bias.detach()
            x = torch.tanh(x) if i < 2 else x
        loss = ((x - y) ** 2).mean()
        gradients = torch.autograd.grad(loss, [leaf for of_site in leaves for leaf in of_site])
        norm = sum(float((g**2).sum()) for g in gradients) ** 0.5
        gradients = [g * min(1.0, CLIP / norm) for g in gradients]
        for i, site in enumerate(self.sites):
            if site.A.numel():
                site.optimize("A", gradients[3 * i], RATES[self.k])
                site.optimize("B", gradients[3 * i + 1], RATES[self.k] * 1.7)
            moves = t <= interval if growth else t <= TOTAL - FINAL or self.kept[i]
            site.w = site.w - RATE_W * gradients[3 * i + 2] if moves else site.w
        still = sum(float(g**2) for g in gradients[2::3]) ** 0.5 <= 1e-10
        if growth and t == interval:
            self.project(1)
            for i, site in enumerate(self.sites):
                self.grow(site, self.kept[i], list(SIZES)[i], t)
        elif not growth and (t == TOTAL - FINAL or (t < TOTAL - FINAL and t % interval == 0 and not still)):
            self.project(self.settings["kept_sites"][self.k])
        return loss.item()

    def project(self, number: int) -> None:
        order = sorted(range(3), key=lambda i: -abs(float(self.sites[i].w)))
        if self.settings.get("kept_by") == "release":
            order = sorted(range(3), key=lambda i: -float(self.sites[i].w))
        before, self.kept = self.kept, [i in order[:number] for i in range(3)]
        self.revived += sum(now and not was for was, now in zip(before, self.kept, strict=True))
        for site, stays in zip(self.sites, self.kept, strict=True):
            site.w = site.w if stays else site.w * 0

    def grow(self, site: Site, stays: bool, name: str, t: int) -> None:
        r, (n_in, n_out) = len(site.A), SIZES[name]
        if not stays:
            site.A, site.B = site.A[:0], site.B[:, :0]
            return
        random = initialization.generator(SEEDS[self.k], name, "A", f"step {t}")
        n = min(2 * r, n_in, n_out)
        old, zeros = site.change(), torch.zeros(n_out, n - r, dtype=torch.float64)
        if self.settings["growth"] == "smart":
            drawn = torch.empty(n_in, n - r, dtype=torch.float64).normal_(generator=random)
            Q, beyond = orthonormal(list(site.A), list(drawn.mT))
            Q = torch.stack(Q)  # (r, I)
            site.B = torch.cat([site.B @ (site.A @ Q.mT), zeros], 1)
            site.A = torch.cat([Q, torch.stack(beyond)])
        elif self.settings["growth"] == "dummy":
            site.A = torch.cat([site.A, initialization.kaiming(n - r, n_in, random).double()])
            site.B = torch.cat([site.B, zeros], 1)
        else:
            site.A = initialization.kaiming(n, n_in, random).double()
            site.B = torch.zeros(n_out, n, dtype=torch.float64)
        if self.settings["growth"] != "restart":
            torch.testing.assert_close(site.change(), old, rtol=1e-12, atol=1e-14)
        site.start_anew()


TRAININGS = {
    "every step": {"kept_sites": [2, 1, 2], "final_steps": FINAL},
    "signed": {"kept_sites": [2, 1, 2], "final_steps": FINAL, "kept_by": "release", "interval": 2},
    "smart": {"growth": "smart", "doublings": 1, "interval": 5},
    "dummy": {"growth": "dummy", "doublings": 1, "interval": 5},
    "restart": {"growth": "restart", "doublings": 1, "interval": 5},
}


@pytest.mark.parametrize("settings", TRAININGS.values(), ids=TRAININGS)
def test_every_weight_and_update_of_a_training_is_the_plain_one(settings):
    adapter = create(**settings)
    plains = [Plain(adapter, k, settings) for k in range(3)]
    loop = Loop(adapter, RATES, TOTAL, CLIP, DECAY, squared_error)
    chosen = set()
    for t in range(1, TOTAL + 1):
        losses = loop.step(packed(t))
        for k, one in enumerate(plains):
            assert losses[k].item() == pytest.approx(one.step(*data(k, t), t), rel=1e-9), t
            for (name, rank), site, wanted, kept in zip(
                adapter.ranks().items(), adapter.low_rank_sites(), one.sites, one.kept, strict=True
            ):
                assert site.w[k].item() == pytest.approx(float(wanted.w), rel=1e-9, abs=1e-14), (t, name)
                torch.testing.assert_close(adapter.delta(name)[k], wanted.change(), rtol=1e-8, atol=1e-10)
                assert rank[k] == (len(wanted.A) if kept else 0) and site.physical()[k] == len(wanted.A)
        chosen |= {tuple(one.kept) for one in plains}
        assert len({float(site.w[0]) for site in adapter.low_rank_sites()}) == (1 if t == 1 else 3) or t > 1
    assert len(chosen) > 2, "every member keeps the same sites"
    if "growth" in settings:
        assert sorted(r[2].item() for r in adapter.physical_ranks().values()) == [0, 0, 8]
    else:
        assert [sum(one.kept) for one in plains] == settings["kept_sites"]
        assert sum(one.revived for one in plains), "no weight came back"


@pytest.mark.parametrize(("kept_by", "stay"), [("size", [0, -3, 2]), ("release", [1, 0, 2])])
def test_the_release_drops_a_weight_that_is_far_below_zero(kept_by, stay):
    adapter = create(1, kept_sites=2, kept_by=kept_by)
    step = Step(TOTAL, TOTAL)
    adapter.begin(step)
    with torch.no_grad():
        for site, w in zip(adapter.low_rank_sites(), (1.0, -3.0, 2.0), strict=True):
            site.w.fill_(w)
    adapter.before_step(step)
    adapter.after_step(step)
    assert [site.w.item() for site in adapter.low_rank_sites()] == stay
    assert list(adapter.ranks().values()) == [RANKS[0] * (w != 0) for w in stay]


def test_ties_go_in_the_order_of_sites_at_the_end_alone():
    adapter = create(1, kept_sites=2, final_steps=1)
    for index, kept in ((1, [3, 3, 3]), (TOTAL - 1, [3, 3, 0])):  # no weight has a gradient
        step = Step(index, TOTAL)
        adapter.begin(step)
        adapter.before_step(step)
        adapter.after_step(step)
        assert [int(r) for r in adapter.ranks().values()] == kept


def test_the_rate_of_the_weights_follows_the_schedule_and_not_the_other_rates():
    adapter = create(kept_sites=3)
    fill(adapter, 0.3)
    before = [site.w.detach().clone() for site in adapter.low_rank_sites()]
    step = Step(3, TOTAL, factor=0.25, learning_rates=torch.tensor(RATES))
    adapter.begin(step)
    squared_error(adapter, packed(1)).sum().backward()
    gradients = [site.w.grad.clone() for site in adapter.low_rank_sites()]
    adapter.before_step(step)
    assert all(site.w.grad is None for site in adapter.low_rank_sites()), "the optimizer would move them too"
    adapter.after_step(Step(3, TOTAL, factor=0.25, taken=torch.tensor([True, False, True])))
    for site, old, g in zip(adapter.low_rank_sites(), before, gradients, strict=True):
        torch.testing.assert_close(site.w[[0, 2]], (old - 0.25 * RATE_W * g)[[0, 2]])
        assert torch.equal(site.w[1], old[1])


def test_a_file_has_the_weight_in_it_and_leaves_out_sites_that_are_zero(tmp_path):
    model = tiny("bert", torch.float32).eval()
    adapter = variants.create("weightlora", rank=3, alpha=7, kept_sites=1).attach(model, ["query", "key"], head=[])
    assert adapter.parameter_counts()["trainable"].item() == 4 * (3 * 64 + 1)
    fill(adapter, 0.3)
    step = Step(4, 4)
    adapter.begin(step)
    adapter.before_step(step)
    adapter.after_step(step)
    (name,) = (name for name, rank in adapter.ranks().items() if rank)
    variants.save_pretrained(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == [name] and config["peft_type"] == "LORA"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = variants.load_pretrained(tiny("bert", torch.float32).eval(), tmp_path)
    for here, there in zip(adapter.low_rank_sites(), again.low_rank_sites(), strict=True):
        torch.testing.assert_close(here.w, there.w)
        assert torch.equal(here.kept, there.kept) and here.name == there.name
        torch.testing.assert_close(adapter.delta(here.name), again.delta(here.name), rtol=1e-5, atol=1e-6)
    variants.truncate(again, total_rank=2)
    assert again.site(name).w.item() == 1 and again.ranks()[name].item() == 2


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="kept_sites = 4 of 3 sites: give at most 3"):
        create(1, kept_sites=4)
    with pytest.raises(ValueError, match="doublings = 2 leave none of 3 sites: lower it"):
        create(1, growth="smart")
    with pytest.raises(ValueError, match="kept_sites = 2 has no effect with growth"):
        create(1, growth="smart", kept_sites=2)
    with pytest.raises(ValueError, match='doublings = 3 has no effect with growth = "none": take it out'):
        create(1, doublings=3)
    with pytest.raises(ValueError, match="doublings = 1 every 10 steps do not fit into a run of 9: lower interval"):
        create(1, growth="smart", doublings=1).begin(Step(1, 9))
    with pytest.raises(ValueError, match="after_step without before_step"):
        create(1).after_step(Step(1, 9))


def test_the_ranks_of_those_that_stay_are_those_of_a_budget():
    kind, ranks = variants.METHODS["weightlora"].settings, {"a": 2, "b": 2, "c": 3, "d": 2}
    assert kind.for_budget({"kept_sites": 3}, ranks, 100, 2.0)["rank"] == 3
    assert kind.for_budget({}, ranks, 100, 2.0) == {"rank": 4, "alpha": 8.0}
    assert kind.for_budget({"growth": "smart"}, ranks, 100, 2.0)["rank"] == 2
