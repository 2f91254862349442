"""DyLoRA against a plain version: one vector for each slot, float64, one member, loops."""

import json
from collections import Counter

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from rankwise.variants.dylora import P
from torch import Tensor

from tests import small_world
from tests.contract import TARGETS
from tests.loop import BETA1, BETA2, EPSILON, Loop
from tests.test_adalora import NAMES, Net, data, squared_error
from tests.tiny import batch, tiny

TOTAL, DECAY, CLIP = 14, 0.03, 0.5
SEEDS, RATES = [5, 3, 8], [1e-1, 2e-2, 5e-2]
RANKS, ALPHAS = [5, 3, 4], [7.0, 2.0, 11.0]
UPDATES = ["nested", "frozen", "frozen-release"]


def create(**others) -> "variants.DyLoRA":
    settings = {"rank": RANKS, "alpha": ALPHAS, "least_rank": 2, "rank_pattern": {"second": 2}}
    return variants.create("dylora", members=3, seeds=SEEDS, **settings | others).attach(Net())


class Plain:
    """One member: for each matrix a list of slots, a vector a (I,) and a vector b (O,) each."""

    def __init__(self, adapter, k: int, update: str):
        self.model, self.alpha, self.rate, self.update = Net(), ALPHAS[k], RATES[k], update
        self.slots = []  # of each matrix: [a, b] of each slot
        for name in NAMES:
            site = adapter.site(name)
            size = 2 if name == "second" else RANKS[k]
            columns = [[site.A[k, i], site.B[k, :, i]] for i in range(size)]
            self.slots.append([[v.detach().clone().requires_grad_() for v in pair] for pair in columns])
        self.leaves = [v for slots in self.slots for pair in slots for v in pair]
        self.averages = [[torch.zeros_like(v), torch.zeros_like(v)] for v in self.leaves]

    def weight(self, n: int, b: int, training: bool) -> Tensor:
        base, b = getattr(self.model, NAMES[n]), min(b, len(self.slots[n]))
        total = base.weight.detach().clone()
        for i in range(b):
            A, B = self.slots[n][i]
            if training and self.update != "nested" and i != b - 1:
                A, B = A.detach(), B.detach()
            total = total + self.alpha / b * torch.outer(B, A)
        return total

    def forward(self, x: Tensor, b: int, training: bool = True) -> Tensor:
        for n, name in enumerate(NAMES):
            x = x @ self.weight(n, b, training).mT + getattr(self.model, name).bias.detach()
            x = torch.tanh(x) if n < 2 else x
        return x

    def step(self, x: Tensor, y: Tensor, t: int, b: int) -> float:
        loss = ((self.forward(x, b) - y) ** 2).mean()
        gradients = torch.autograd.grad(loss, self.leaves, allow_unused=True)
        gradients = [torch.zeros_like(v) if g is None else g for v, g in zip(self.leaves, gradients, strict=True)]
        norm = sum(float((g**2).sum()) for g in gradients) ** 0.5
        gradients = iter([g * min(1.0, CLIP / norm) for g in gradients])
        averages = iter(self.averages)
        with torch.no_grad():
            for slots in self.slots:
                last = min(b, len(slots)) - 1
                for i, pair in enumerate(slots):
                    moves = {"nested": i <= last, "frozen": i == last, "frozen-release": True}[self.update]
                    for v in pair:
                        g, average = next(gradients), next(averages)
                        average[0] = BETA1 * average[0] + (1 - BETA1) * g
                        average[1] = BETA2 * average[1] + (1 - BETA2) * g**2
                        direction = average[0] / (1 - BETA1**t) / ((average[1] / (1 - BETA2**t)).sqrt() + EPSILON)
                        if moves:
                            v -= self.rate * (DECAY * v + direction)
        return loss.item()


def packed(step: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.cat(parts) for parts in zip(*(data(k, step) for k in range(3)), strict=True))


@pytest.mark.parametrize("update", UPDATES)
def test_a_training_is_that_of_the_plain_version(update):
    adapter = create(update=update)
    fill(adapter)
    plain = [Plain(adapter, k, update) for k in range(3)]
    loop = Loop(adapter, RATES, TOTAL, CLIP, DECAY, squared_error)
    drawn = set()
    for t in range(1, TOTAL + 1):
        ranks = adapter.drawn_ranks(t)
        losses = loop.step(packed(t))
        for k, one in enumerate(plain):
            assert losses[k].item() == pytest.approx(one.step(*data(k, t), t, ranks[k]), rel=1e-9)
            drawn.add((k, ranks[k]))
            for n, name in enumerate(NAMES):
                site = adapter.site(name)
                for i, (A, B) in enumerate(one.slots[n]):
                    torch.testing.assert_close(site.A[k, i], A, rtol=1e-8, atol=1e-10)
                    torch.testing.assert_close(site.B[k, :, i], B, rtol=1e-8, atol=1e-10)
    assert len(drawn) > 6
    adapter.model.eval()
    x = torch.cat([data(k, 0)[0] for k in range(3)])
    for b in range(1, 6):  # usable at every rank
        with adapter.at_rank(b), torch.no_grad():
            found = adapter.model(x).view(3, -1, 4)
            for k, one in enumerate(plain):
                torch.testing.assert_close(found[k], one.forward(data(k, 0)[0], b, False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("update", UPDATES)
def test_which_slots_a_step_moves(update):
    adapter = create(update=update, least_rank=1, rank_pattern={})
    fill(adapter)
    loop = Loop(adapter, RATES, TOTAL, CLIP, DECAY, squared_error)
    for t in range(1, 9):
        before = {name: (site.A.detach().clone(), site.B.detach().clone()) for name, site in adapter.named_sites()}
        ranks = adapter.drawn_ranks(t)
        loop.step(packed(t))
        for name, site in adapter.named_sites():
            for k, b in enumerate(ranks):
                moves = {"nested": range(b), "frozen": [b - 1], "frozen-release": range(RANKS[k])}[update]
                for i in range(RANKS[k]):
                    assert torch.equal(site.A[k, i], before[name][0][k, i]) == (i not in moves)
                    assert torch.equal(site.B[k, :, i], before[name][1][k, :, i]) == (i not in moves)


def test_the_rank_of_a_step_is_a_member_s_own_and_all_micro_batches_share_it():
    adapter = create(rank_pattern={})
    table = [adapter.drawn_ranks(t) for t in range(1, 60)]
    assert len({tuple(column) for column in zip(*table, strict=True)}) == 3
    for k, (seed, rank) in enumerate(zip(SEEDS, RANKS, strict=True)):
        alone = variants.create("dylora", seeds=[seed], rank=rank, least_rank=2).attach(Net())
        assert [alone.drawn_ranks(t)[0] for t in range(1, 60)] == [row[k] for row in table]
        assert {row[k] for row in table} == set(range(2, rank + 1))
    for micro_batch in range(3):
        adapter.begin(Step(7, TOTAL), micro_batch)
        assert all(site.drawn.tolist() == table[6] for _, site in adapter.named_sites())
    adapter.begin(Step(7, TOTAL), training=False)
    assert all(site.drawn is None for _, site in adapter.named_sites())


@pytest.mark.parametrize("sampling", ["uniform", "geometric"])
def test_ranks_are_drawn_from_their_distribution(sampling):
    adapter = variants.create("dylora", rank=6, least_rank=3, sampling=sampling, seeds=[4]).attach(Net())
    counts = Counter(adapter.drawn_ranks(t)[0] for t in range(1000))
    weights = {b: (1 - P) ** b if sampling == "geometric" else 1.0 for b in range(3, 7)}
    for b, weight in weights.items():
        share = weight / sum(weights.values())
        assert abs(counts[b] / 1000 - share) < 4 * (share * (1 - share) / 1000) ** 0.5
    assert sum(counts.values()) == 1000 and set(counts) == set(weights)


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("magnitude", [False, True])
def test_at_rank_is_what_all_see_and_it_goes_back(scaling, magnitude):
    adapter = create(scaling=scaling, magnitude=magnitude)
    fill(adapter)
    adapter.model.eval()
    adapter.begin(Step(1, TOTAL), training=False)
    sites = adapter.low_rank_sites()
    start = {name: value.clone() for name, value in adapter.state_dict().items()}
    x = torch.cat([data(k, 0)[0] for k in range(3)])
    full = adapter.model(x)
    for b in (2, 4, [3, 1, 4]):
        with adapter.at_rank(b):
            live = adapter.model(x).view(3, -1, 4)
            for name, site in zip(NAMES, sites, strict=True):
                for k in range(3):
                    mine = min(b if isinstance(b, int) else b[k], 2 if name == "second" else RANKS[k])
                    scale = ALPHAS[k] / (mine if scaling == "alpha/r" else mine**0.5)
                    dense = scale * site.B[k, :, :mine] @ site.A[k, :mine]
                    if magnitude:
                        W = adapter.base(name).weight + dense
                        dense = (
                            adapter.site(name).magnitude[k, :, None] * W / W.norm(dim=1, keepdim=True)
                            - adapter.base(name).weight
                        )
                    torch.testing.assert_close(adapter.delta(name)[k], dense)
                    assert adapter.ranks()[name][k] == mine and adapter.scales()[name][k].item() == pytest.approx(scale)
                    assert adapter.nominal_ranks()[name][k] == (2 if name == "second" else RANKS[k])
            for k in range(3):
                adapter.merge(k)
                torch.testing.assert_close(adapter.model(data(k, 0)[0]), live[k])
                with pytest.raises(ValueError, match="merged"):
                    adapter.at_rank(1)
                adapter.unmerge()
        assert torch.equal(adapter.model(x), full)
    adapter.at_rank(1)  # until told otherwise
    adapter.at_rank(3)
    adapter.at_rank(None)
    assert all(torch.equal(value, start[name]) for name, value in adapter.state_dict().items())
    for wrong in (0, 6, [3, 4, 2]):
        with pytest.raises(ValueError, match="can be used at ranks 1 to"):
            adapter.at_rank(wrong)


def test_training_goes_on_over_all_ranks_whatever_the_rank_in_force():
    one, other = create(), create()
    other.at_rank(1)
    loops = [Loop(adapter, RATES, TOTAL, CLIP, DECAY, squared_error) for adapter in (one, other)]
    for t in range(1, 6):
        assert torch.equal(*(loop.step(packed(t)) for loop in loops))
    assert {int(r.max()) for r in other.ranks().values()} == {1}


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_folder_at_a_rank_is_a_plain_lora_of_that_rank(tmp_path, rank):
    peft = pytest.importorskip("peft")
    adapter = variants.create("dylora", rank=4, alpha=7.0, seeds=[3]).attach(tiny("bert", torch.float32), TARGETS)
    fill(adapter)
    adapter.model.eval()
    inputs = {k: v for k, v in batch(0).items() if k != "labels"}
    adapter.at_rank(rank)
    live = adapter.model(**inputs).logits
    variants.save_pretrained(adapter, tmp_path / "saved")
    variants.export_lora(adapter, tmp_path / "plain")
    for folder in ("saved", "plain"):
        told = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert (told["peft_type"], told["r"], told["lora_alpha"]) == ("LORA", rank, 7.0)
        assert not told["rank_pattern"] and not told["alpha_pattern"]
        theirs = peft.PeftModel.from_pretrained(tiny("bert", torch.float32).eval(), tmp_path / folder)
        torch.testing.assert_close(theirs(**inputs).logits, live, rtol=1e-5, atol=1e-5)
    model = tiny("bert", torch.float32).eval()
    again = variants.load_pretrained(model, tmp_path / "saved")
    assert again.method == "dylora" and again.nested_ranks() == [range(1, rank + 1)]
    torch.testing.assert_close(model(**inputs).logits, live, rtol=1e-6, atol=1e-6)
    assert again.scales() == adapter.scales()
    for smaller in range(1, rank + 1):  # what is left is nested still
        again.at_rank(smaller), adapter.at_rank(smaller)
        torch.testing.assert_close(model(**inputs).logits, adapter.model(**inputs).logits, rtol=1e-6, atol=1e-6)


def test_a_result_has_the_score_at_every_rank(tmp_path):
    folder = small_world.model(tmp_path / "model")
    pack = small_world.pack(folder, "dylora", seeds=(0, 1), changes={"least_rank": 2})
    trainer, outcomes = small_world.trained(pack, tmp_path / "run")
    assert not any(site.drawn is not None for _, site in trainer.adapter.named_sites())
    for member, outcome in enumerate(outcomes):
        scores = outcome.facts["rank_scores"]
        assert list(scores) == ["2", "3", "4"]
        assert scores["4"] == outcome.metrics["test"][pack.task.metric] != scores["2"]
        trainer.adapter.at_rank(2)
        assert trainer.evaluate("test")[member][pack.task.metric] == scores["2"]
        trainer.adapter.at_rank(None)


def test_what_is_wrong_is_said():
    for pattern in (2, [4, 2]):
        with pytest.raises(ValueError, match="least_rank = 3 is above rank = 2: lower it or raise the rank"):
            variants.create("dylora", members=2, rank=4, rank_pattern={"first": pattern}, least_rank=3)
    adapter = create()
    adapter.begin(Step(1, TOTAL))
    with pytest.raises(ValueError, match=r"call adapter.begin"):
        adapter.after_step(Step(1, TOTAL))
