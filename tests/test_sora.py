"""SoRA against a plain version: dense, float64, one member, loops over gates; and what its thresholds do to numbers."""

import json
import warnings

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from rankwise.variants.sora import release_threshold, soft_threshold
from torch import Tensor

from tests import small_world
from tests.contract import TARGETS
from tests.loop import BETA1, BETA2, EPSILON, Loop
from tests.test_adalora import NAMES, Net, data, squared_error
from tests.tiny import batch, tiny

TOTAL, FINAL, DECAY, CLIP = 18, 6, 0.03, 0.5
SEEDS, RATES = [5, 3, 8], [1e-1, 2e-2, 5e-2]
RANKS, ALPHAS, TARGET = [5, 3, 4], [7.0, 2.0, 11.0], [2, 1, 2]


def create(**others) -> "variants.SoRA":
    settings = {"initial_rank": RANKS, "alpha": ALPHAS, "final_steps": FINAL, "gate_lr_ratio": 1.5}
    return variants.create("sora", members=3, seeds=SEEDS, **settings | others).attach(Net())


def gates(adapter) -> list[Tensor]:
    return [site.E.detach().clone() for site in adapter.triplets()]


def packed(step: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.cat(parts) for parts in zip(*(data(k, step) for k in range(3)), strict=True))


def step_at(index: int, **others) -> Step:
    return Step(index, TOTAL, learning_rates=torch.tensor(RATES, dtype=torch.float64), **others)


# -- thresholds ------------------------------------------------------------------------------------------------------

# tau = 0.25, exact in binary: inside, on tau, between tau and 2 tau, on 2 tau, beyond
VALUES = [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, -0.125, -0.25, -0.375, -0.5, -0.625]


def test_the_soft_threshold_moves_every_value_to_zero_and_stops_there():
    found = soft_threshold(torch.tensor(VALUES), torch.tensor(0.25))
    assert found.tolist() == [0, 0, 0, 0.125, 0.25, 0.375, 0, 0, -0.125, -0.25, -0.375]


def test_the_release_s_threshold_is_dead_up_to_twice_tau_but_for_tau_itself():
    found = release_threshold(torch.tensor(VALUES), torch.tensor(0.25))
    assert found.tolist() == [0, 0, 0.25, 0, 0.25, 0.375, 0, -0.25, 0, -0.25, -0.375]


def test_the_release_s_threshold_is_its_three_assignments():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = values.clone()
    theirs[theirs > 0.4] -= 0.4
    theirs[theirs < -0.4] += 0.4
    theirs[theirs.abs() < 0.4] = 0
    assert torch.equal(release_threshold(values, torch.tensor(0.4, dtype=torch.float64)), theirs)
    assert torch.equal(release_threshold(values, torch.zeros((), dtype=torch.float64)), values)


# -- a training --------------------------------------------------------------------------------------------------------


class Plain:
    """One member on `Net`: (A, B, g) of each matrix as leaves; AdamW, thresholds and the cut by loops."""

    def __init__(self, adapter, k: int, settings: dict):
        self.model, self.k, self.settings = Net(), k, settings
        r = RANKS[k]
        self.factors = [
            [t.detach().clone().requires_grad_() for t in (site.A[k, :r], site.B[k, :, :r], site.E[k, :r])]
            for site in adapter.triplets()
        ]
        self.leaves = [leaf for factors in self.factors for leaf in factors]
        self.averages = [[torch.zeros_like(leaf), torch.zeros_like(leaf)] for leaf in self.leaves]
        self.kept: list[list[bool]] | None = None  # of the final steps

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        for n, (name, (A, B, g)) in enumerate(zip(NAMES, self.factors, strict=True)):
            base = getattr(self.model, name)
            x = x @ (base.weight.detach() + ALPHAS[self.k] / RANKS[self.k] * B @ torch.diag(g) @ A).mT + base.bias.detach()
            x = torch.tanh(x) if n < 2 else x
        return ((x - y) ** 2).mean()

    def penalty(self, t: int) -> Tensor | float:
        every = [abs(g) for _, _, gate in self.factors for g in gate]
        return self.settings.get("l1", 0.0) * sum(every) / len(every) if t <= TOTAL - FINAL else 0.0

    def step(self, x: Tensor, y: Tensor, t: int) -> float:
        loss = self.loss(x, y)
        gradients = torch.autograd.grad(loss + self.penalty(t), self.leaves)
        norm = sum(float((g**2).sum()) for g in gradients) ** 0.5
        for i, (leaf, g, average) in enumerate(zip(self.leaves, gradients, self.averages, strict=True)):
            is_gate = i % 3 == 2
            g = g * min(1.0, CLIP / norm)
            average[0] = BETA1 * average[0] + (1 - BETA1) * g
            average[1] = BETA2 * average[1] + (1 - BETA2) * g**2
            direction = average[0] / (1 - BETA1**t) / ((average[1] / (1 - BETA2**t)).sqrt() + EPSILON)
            rate = RATES[self.k] * (1.5 if is_gate else 1.0)
            with torch.no_grad():
                leaf -= rate * ((0.0 if is_gate else DECAY) * leaf + direction)
        self.shrink(t)
        return loss.item()

    @torch.no_grad()
    def shrink(self, t: int) -> None:
        every = [(gate, i) for _, _, gate in self.factors for i in range(len(gate))]
        if t <= TOTAL - FINAL:
            stages = self.settings.get("lambda_schedule")
            weight = self.settings.get("sparsity", self.settings.get("tau"))
            weight = stages[(t - 1) // ((TOTAL - FINAL) // len(stages))] if stages else weight
            for gate, i in every:
                v = float(gate[i])
                if self.settings["threshold"] == "soft":
                    xi = RATES[self.k] * 1.5 * weight
                    v = v - xi if v > xi else v + xi if v < -xi else 0.0
                else:
                    v = v - weight if v > weight else v
                    v = v + weight if v < -weight else v
                    v = 0.0 if abs(v) < weight else v
                gate[i] = v
        if t == TOTAL - FINAL:
            alive = [j for j, (gate, i) in enumerate(every) if gate[i] != 0]
            if "target_rank" in self.settings:
                alive.sort(key=lambda j: (-abs(float(every[j][0][every[j][1]])), j))
                alive = alive[: 3 * self.settings["target_rank"][self.k]]
            self.kept = [j in alive for j in range(len(every))]
        if t >= TOTAL - FINAL:
            for (gate, i), keep in zip(every, self.kept, strict=True):
                gate[i] *= keep


TRAININGS = {
    "soft": {"threshold": "soft", "sparsity": 0.8},
    "soft to a target": {"threshold": "soft", "sparsity": 0.3, "l1": 0.7, "target_rank": TARGET},
    "soft in stages": {"threshold": "soft", "lambda_schedule": [0.0, 0.5, 2.0]},
    "release": {"threshold": "release", "tau": 0.03, "l1": 0.5},
    "release to a target": {"threshold": "release", "tau": 0.01, "target_rank": TARGET},
}


@pytest.mark.parametrize("settings", TRAININGS.values(), ids=TRAININGS)
def test_every_gate_of_a_training_is_the_plain_one(settings):
    adapter = create(**settings)
    plain = [Plain(adapter, k, settings) for k in range(3)]
    loop = Loop(adapter, RATES, TOTAL, CLIP, DECAY, squared_error)
    zeros, revived = [], 0
    for t in range(1, TOTAL + 1):
        was = [gate != 0 for gate in gates(adapter)]
        losses = loop.step(packed(t))
        for k, one in enumerate(plain):
            assert losses[k].item() == pytest.approx(one.step(*data(k, t), t), rel=1e-9), t
            for site, (A, B, g) in zip(adapter.triplets(), one.factors, strict=True):
                r = RANKS[k]
                torch.testing.assert_close(site.A[k, :r], A, rtol=1e-8, atol=1e-10)
                torch.testing.assert_close(site.B[k, :, :r], B, rtol=1e-8, atol=1e-10)
                torch.testing.assert_close(site.E[k, :r], g, rtol=1e-8, atol=1e-10)
                assert (site.E[k, :r] != 0).tolist() == (g != 0).tolist() == site.kept[k, :r].tolist()
                assert adapter.ranks()[site.name][k] == int((g != 0).sum())
                assert not site.E[k, r:].any()
        came_back = sum(int((~w & (gate != 0)).sum()) for w, gate in zip(was, gates(adapter), strict=True))
        revived += came_back
        zeros.append(3 * sum(RANKS) - int(sum(adapter.ranks().values()).sum()))
        assert t <= TOTAL - FINAL or came_back == 0
    assert 0 < zeros[TOTAL - FINAL - 2] < 3 * sum(RANKS), "the threshold did nothing, or everything"
    assert len(set(zeros[TOTAL - FINAL - 1 :])) == 1
    if "target_rank" in settings:
        assert zeros[TOTAL - FINAL - 1] > zeros[TOTAL - FINAL - 2]
        assert sum(adapter.ranks().values()).tolist() == [3 * target for target in TARGET]


def test_a_member_whose_step_did_not_count_keeps_its_gates():
    adapter = create(sparsity=3.0)
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = gates(adapter)
    adapter.after_step(step_at(1, taken=torch.tensor([True, False, True])))
    for old, new in zip(before, gates(adapter), strict=True):
        assert torch.equal(old[1], new[1])
        assert (old[0].abs() > new[0].abs()).all() and (old[2] != new[2]).any()


def test_the_soft_threshold_is_by_the_rate_in_force_and_says_so_where_nobody_told_it():
    adapter = create(sparsity=0.2)
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    start = gates(adapter)
    with pytest.raises(
        ValueError, match=r'threshold = "soft" is by the rate of each step: give Step\(.*or set threshold = "rel'
    ):
        adapter.after_step(Step(1, TOTAL))
    assert all(torch.equal(a, b) for a, b in zip(start, gates(adapter), strict=True))
    adapter.after_step(step_at(1))
    for old, new in zip(start, gates(adapter), strict=True):
        for k, rate in enumerate(RATES):
            torch.testing.assert_close(new[k].abs(), (old[k].abs() - rate * 1.5 * 0.2).clamp_min(0))
    create(threshold="release", tau=0.1).penalty(Step(1, TOTAL))
    other = create(threshold="release", tau=0.1)
    for parameter in other.parameters():
        parameter.grad = torch.zeros_like(parameter)
    other.after_step(Step(1, TOTAL))  # the release's is by no rate


# -- the target ----------------------------------------------------------------------------------------------------------


def cut(adapter, values: dict[int, float] | None = None) -> None:
    """The step at which the target is reached, without any threshold; `values`: slot -> its gate, at every site."""
    for site in adapter.triplets():
        for slot, value in (values or {}).items():
            with torch.no_grad():
                site.E[:, slot] = value * site.slots[:, slot]
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adapter.after_step(step_at(TOTAL - FINAL))


def test_ties_are_cut_in_site_order_and_exactly():
    adapter = create(target_rank=TARGET, sparsity=0.0)
    cut(adapter, dict.fromkeys(range(5), -0.5))
    for k, r in enumerate(RANKS):
        kept = [bool(bit) for site in adapter.triplets() for bit in site.kept[k, :r]]
        assert kept == [True] * (3 * TARGET[k]) + [False] * (3 * (r - TARGET[k]))


def test_nothing_is_revived_where_fewer_gates_are_left_than_the_target():
    adapter = create(target_rank=[4, 2, 3], sparsity=0.0)
    cut(adapter, {0: 0.0, 1: 0.0, 2: 0.0})
    assert sum(adapter.ranks().values()).tolist() == [6, 0, 3]
    assert all(not site.E[:, :3].any() for site in adapter.triplets())


def test_a_target_of_parameters_is_never_exceeded():
    price = {"first": 7 + 5 + 1, "second": 5 + 6 + 1, "third": 6 + 4 + 1}
    for limit in (60, 61, 75):
        adapter = create(target_parameters=limit, cost="parameters", sparsity=0.0)
        cut(adapter)
        for k in range(3):
            cost = sum(price[name] * int(rank[k]) for name, rank in adapter.ranks().items())
            assert limit - min(price.values()) < cost <= limit
    with pytest.raises(ValueError, match="target_total = 100, above the 36 triplets"):
        variants.create("sora", initial_rank=12, target_total=100, final_steps=2).attach(Net())


# -- the start, the groups, files, trainers --------------------------------------------------------------------------------


def test_gates_start_at_random_and_the_model_does_not_change():
    adapter = variants.create("sora", members=2, seeds=[1, 2], initial_rank=[500, 400]).attach(Net())
    for site in adapter.triplets():
        for k, r in enumerate((500, 400)):
            assert abs(site.E[k, :r].mean()) < 0.2 and abs(site.E[k, :r].std() - 1) < 0.15
        assert not site.E[1, 400:].any() and not site.B.any()
        assert not torch.equal(site.E[0, :400], site.E[1, :400])
    x = data(0, 0)[0]
    torch.testing.assert_close(adapter.model(torch.cat([x, x])), torch.cat([Net()(x)] * 2), rtol=1e-12, atol=1e-12)


def test_gates_have_a_rate_of_their_own_and_no_decay():
    adapter = create(lr_ratio=3.0, magnitude=True)
    *others, own = adapter.parameter_groups()
    assert (own.lr_scale, own.weight_decay) == (1.5, 0.0)
    assert {id(p) for p in own.params} == {id(site.E) for site in adapter.triplets()}
    assert not {id(p) for group in others for p in group.params} & {id(p) for p in own.params}
    assert sum(len(group.params) for group in [*others, own]) == len(list(adapter.parameters()))


def test_a_file_drops_zero_gates_and_folds_the_others(tmp_path):
    peft = pytest.importorskip("peft")
    settings = {"initial_rank": 6, "alpha": 7.0, "sparsity": 10.0, "seeds": [3], "final_steps": 3}
    adapter = variants.create("sora", **settings).attach(tiny("bert", torch.float32), TARGETS)
    loop = Loop(adapter, 1e-2, 10)
    for t in range(6):
        loop.step(batch(0, t))
    ranks = {name: int(rank) for name, rank in adapter.ranks().items()}
    assert 1 <= min(ranks.values()) < max(ranks.values())
    adapter.model.eval()
    inputs = {k: v for k, v in batch(0).items() if k != "labels"}
    live = adapter.model(**inputs).logits
    variants.save_pretrained(adapter, tmp_path / "saved")
    variants.export_lora(adapter, tmp_path / "plain")
    for folder in ("saved", "plain"):
        told = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert told["peft_type"] == "LORA" and {told["r"], *told["rank_pattern"].values()} == set(ranks.values())
        theirs = peft.PeftModel.from_pretrained(tiny("bert", torch.float32).eval(), tmp_path / folder)
        torch.testing.assert_close(theirs(**inputs).logits, live, rtol=1e-5, atol=1e-5)
    model = tiny("bert", torch.float32).eval()
    again = variants.load_pretrained(model, tmp_path / "saved")
    torch.testing.assert_close(model(**inputs).logits, live, rtol=1e-5, atol=1e-5)
    assert {name: int(rank) for name, rank in again.ranks().items()} == ranks
    for mine, theirs in zip(adapter.triplets(), again.triplets(), strict=True):
        assert torch.equal(mine.E != 0, theirs.E != 0)  # a gate that was zero is zero


def test_the_trainer_says_the_rate_in_force(tmp_path):
    folder = small_world.model(tmp_path / "model")
    pack = small_world.pack(folder, "sora", seeds=(0, 1), learning_rates=(1e-2, 3e-3), log_every=1)
    trainer = small_world.trainer(pack, tmp_path / "run")
    after, seen = trainer.adapter.after_step, []
    trainer.adapter.after_step = lambda step: (seen.append(step.learning_rates.tolist()), after(step))
    trainer.run()
    for member, log in enumerate(trainer.logs):
        lines = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
        told = [line["learning_rate"] for line in lines if line["kind"] == "train"]
        assert len(told) == 12 and len(set(told)) > 5
        assert [rates[member] for rates in seen] == pytest.approx(told)
    assert sum(trainer.adapter.ranks().values()).tolist() == [8, 8]


def test_the_callback_of_transformers_says_the_rate_in_force(tmp_path):
    from tests.test_callback import RATE, trainer

    adapter = variants.create("sora", initial_rank=4, gate_lr_ratio=2.0, lr_ratio=3.0).attach(tiny("bert"))
    made = trainer(adapter, tmp_path, max_steps=5, lr_scheduler_type="linear")
    after, seen = adapter.after_step, []
    adapter.after_step = lambda step: (seen.append(step.learning_rates.tolist()), after(step))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.train()
    assert seen == [pytest.approx([RATE * (1 - step / 5)]) for step in range(5)]


def test_settings_without_effect_are_refused():
    for wrong, message in {
        "tau": ({"tau": 0.1}, 'tau = 0.1 has no effect with threshold = "soft"'),
        "sparsity": ({"threshold": "release", "sparsity": 0.1}, 'sparsity = 0.1 has no effect with threshold = "release"'),
        "stages": ({"lambda_schedule": [0.1], "sparsity": 0.1}, "sparsity = 0.1 has no effect with a lambda_schedule"),
        "cost": ({"cost": "parameters"}, 'cost = "parameters" has no effect without a target'),
        "total": ({"cost": "parameters", "target_total": 9}, 'target_total = 9 has no effect with cost = "parameters"'),
        "target": ({"target_rank": 9}, "target_rank = 9 is above initial_rank = 4: SoRA prunes"),
    }.values():
        with pytest.raises(ValueError, match=message):
            variants.create("sora", initial_rank=4, **wrong)


def test_it_goes_with_magnitudes():
    adapter = create(magnitude=True, sparsity=2.0, target_rank=TARGET)
    fill(adapter)
    loop = Loop(adapter, RATES, TOTAL, CLIP, DECAY, squared_error)
    for t in range(1, TOTAL + 1):
        loop.step(packed(t))
    for name in NAMES:
        site = adapter.site(name)
        for k in range(3):
            W = adapter.base(name).weight
            V = W + site.scale[k] * site.inner.B[k] @ torch.diag(site.inner.E[k]) @ site.inner.A[k]
            torch.testing.assert_close(adapter.delta(name)[k], site.magnitude[k, :, None] * V / V.norm(dim=1, keepdim=True) - W)
