"""FlexLoRA against a plain version from its equations: dense, float64, one member, one rank at a time; its faults by name."""

import math

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter import initialization

from tests.loop import Loop
from tests.rank_by_rank import check_training
from tests.test_adalora import NAMES, Net
from tests.test_elalora import ALPHA, FINAL, GAMMA, INTERVAL, RATES, SEEDS, TOTAL, WARMUP, Plain, Rank
from tests.tiny import packed_batch, tiny

INITIAL = [4, 2, 5]
CONFIGURATIONS = {
    "default": {"exchange": 2, "added_std": 0.1},
    "release": {"exchange": 2, "weakest": "signed", "undefined_entropy": "highest", "schedule": "steady"},
    "most": {"exchange": 2, "most_rank": 5, "added_std": 0.3, "schedule": "steady"},
}


def plain_entropy(site: list[Rank], undefined: float) -> float:
    energies = [float(rank.leaves[2]) ** 2 for rank in site]
    if len(site) == 1 or not sum(energies):
        return undefined
    shares = [energy / sum(energies) for energy in energies]
    return -sum(p * math.log(p + 1e-8) for p in shares) / math.log(len(site))


class PlainFlex(Plain):
    def exchange(self, t: int) -> None:
        b, settings = self.settings["exchange"], self.settings
        if settings.get("schedule") != "steady":
            b = round(b * (1 - ((t - WARMUP) / (TOTAL - FINAL - WARMUP)) ** 3))
        H = [plain_entropy(site, 2 if settings.get("undefined_entropy") == "highest" else -1) for site in self.sites]
        sizes = [len(site) for site in self.sites]
        losing = sorted((s for s in range(3) if sizes[s] > 1), key=lambda s: H[s])
        for number in range(b, -1, -1):
            after, grown = list(sizes), []
            for s in losing[:number]:
                after[s] -= 1
            for s in sorted(range(3), key=lambda s: -H[s])[:b]:
                if len(grown) < len(losing[:number]) and after[s] < settings.get("most_rank", 99):
                    grown.append(s)
                    after[s] += 1
            if len(grown) == len(losing[:number]):
                break
        for s in losing[:number]:
            es = [float(rank.leaves[2]) for rank in self.sites[s]]
            weakest = min(range(len(es)), key=lambda j: es[j] if settings.get("weakest") == "signed" else abs(es[j]))
            del self.sites[s][weakest]
        for s in grown:
            leaves = []
            for part, name in ((0, "A"), (1, "B")):
                random = initialization.generator(self.seed, NAMES[s], name, f"step {t}, slot {len(self.sites[s])}")
                size = self.sites[s][0].leaves[part].shape
                leaves.append(settings.get("added_std", 1.0) * torch.empty(size).normal_(generator=random).double())
            self.sites[s].append(Rank(*leaves, torch.zeros((), dtype=torch.float64)))


def made(name: str, members: range = range(3)) -> variants.Adapter:
    several = {"initial_rank": INITIAL, "alpha": ALPHA, "orthogonality": GAMMA}
    return variants.create(
        "flexlora",
        members=len(members),
        seeds=[SEEDS[k] for k in members],
        **{key: [value[k] for k in members] for key, value in several.items()},
        **CONFIGURATIONS[name],
        warmup_steps=WARMUP,
        final_steps=FINAL,
        interval=INTERVAL,
    ).attach(Net(), list(NAMES), head=[])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_step_of_training_is_the_plain_version_s(name):
    adapter, plain = made(name), []
    for k in range(3):
        sites = []
        for site in adapter.triplets():
            parts = [(site.A[k, j].detach().clone(), site.B[k, :, j].detach().clone()) for j in range(INITIAL[k])]
            sites.append([Rank(a, b, torch.zeros((), dtype=torch.float64)) for a, b in parts])
        plain.append(PlainFlex(Net(), sites, SEEDS[k], ALPHA[k] / INITIAL[k], GAMMA[k], RATES[k], CONFIGURATIONS[name]))
    seen = check_training(adapter, plain, RATES, TOTAL)
    assert max(max(ranks) for _, ranks in seen) <= CONFIGURATIONS[name].get("most_rank", 99)
    assert len(seen) > 4, "no rank moved"
    assert any(1 in ranks for _, ranks in seen), "no matrix came down to one rank"


def test_the_faults_of_the_release_are_there_by_name_only():
    def after(E: list[list[float]], **settings) -> tuple[list[int], list[list[float]]]:
        values = {"initial_rank": 2, "exchange": 1, "schedule": "steady", "interval": 1, **settings}
        adapter = variants.create("flexlora", **values).attach(Net(), list(NAMES), head=[])
        with torch.no_grad():
            for site, es in zip(adapter.triplets(), E, strict=True):
                site.E[0, : len(es)] = torch.tensor(es)
        adapter.exchange(variants.Step(1, 9))
        return [int(r) for r in adapter.ranks().values()], [site.E[0].tolist() for site in adapter.triplets()]

    lopsided, spread, between = [-9.0, 0.1], [3.0, -3.0], [2.0, 1.0]
    ranks, E = after([lopsided, spread, between])
    assert ranks == [1, 3, 2] and E[0] == [-9.0] and E[1] == [3.0, -3.0, 0.0]
    ranks, E = after([lopsided, spread, between], weakest="signed")
    assert ranks == [1, 3, 2] and E[0] == [pytest.approx(0.1)]
    one = {"rank_pattern": {"third": 1}}
    assert after([lopsided, spread, [5.0]], **one)[0] == [1, 3, 1]
    assert after([lopsided, spread, [5.0]], undefined_entropy="highest", **one)[0] == [1, 2, 2]
    assert after([[0.0, 0.0], spread, between])[0] == [1, 3, 2]  # nothing to spread is the lowest
    assert after([[0.0, 0.0], spread, between], undefined_entropy="highest")[0] == [3, 2, 1]


def test_what_is_added_costs_what_the_start_did():
    settings = {"initial_rank": 3, "cost": "parameters", "exchange": 4, "warmup_steps": 1, "final_steps": 2, "added_std": 0.02}
    adapter = variants.create("flexlora", **settings).attach(tiny("bert"), "all-linear")
    loop, start = Loop(adapter, 1e-2, 10), adapter.parameter_counts()["trainable"].item()
    cheapest = min(int(site.count(torch.ones(1))) for site in adapter.triplets())
    for index in range(10):
        loop.step(packed_batch([0], index))
        assert start - cheapest < adapter.parameter_counts()["trainable"].item() <= start
    assert len({int(r) for r in adapter.ranks().values()}) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_rank": 2}, "this method keeps its total"),
        ({"beta1": 0.5}, 'beta1 = 0.5 has no effect with score = "spectral-entropy"'),
        ({"score": "magnitude"}, "spectral-entropy"),
    ],
)
def test_what_has_no_effect_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        variants.check("flexlora", {"initial_rank": 3, **settings})
