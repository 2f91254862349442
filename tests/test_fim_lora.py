"""FIM-LoRA against autograd through a LoRA that is written out: its information, its ranks, their bounds, packed as alone."""

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter import initialization
from rankwise.variants.allocation.placed import PlacedLoRA
from rankwise.variants.fim_lora import FIMLoRA
from torch import Tensor, nn

from tests.test_gora import BATCHES, NAMES, SEEDS, body, data

RANKS, ALPHAS = [5, 3, 4], [7.0, 3.0, 11.0]


def placed(method: str, seeds: list[int], **settings) -> variants.Adapter:
    """A method that measures gradients, at the sites of `body`."""
    first = SEEDS.index(seeds[0])
    span = slice(first, first + len(seeds))
    adapter = variants.create(
        method, members=len(seeds), seeds=seeds, **{"rank": RANKS[span], "alpha": ALPHAS[span]} | settings
    )

    def losses(batch: tuple[Tensor, Tensor]) -> Tensor:
        each = nn.functional.cross_entropy(adapter.model(batch[0]), batch[1], reduction="none")
        return each.view(len(seeds), -1).mean(1)

    batches = [tuple(torch.cat(parts) for parts in zip(*(data(s, i) for s in seeds), strict=True)) for i in range(BATCHES)]
    model = body()
    take, model.forward = model.forward, lambda x, *_: take(x)  # the probe of K > 1 gives the model a whole batch
    return adapter.attach(model, NAMES, head=["classifier"], calibration=variants.Calibration(batches, losses))


def plain_information(adapter: variants.Adapter, member: int, rank: int, alpha: float) -> list[float]:
    """Mean squared gradient of B of a LoRA whose B is zero, by autograd, one batch after the other."""
    model, seed = body(), adapter.seeds[member]
    with torch.no_grad():
        for key, value in adapter.heads["classifier"].named_parameters():
            getattr(model.classifier, key).copy_(value[member])
    Bs = {}
    for name in NAMES:
        module = model.get_submodule(name)
        A = initialization.kaiming(rank, module.in_features, initialization.generator(seed, name, "A")).double()
        Bs[name] = torch.zeros(module.out_features, rank, dtype=torch.float64, requires_grad=True)
        module.register_forward_hook(lambda m, args, y, A=A, B=Bs[name]: y + alpha / rank * args[0] @ A.T @ B.T)
    sums = dict.fromkeys(NAMES, 0.0)
    for i in range(BATCHES):
        x, labels = data(seed, i)
        found = torch.autograd.grad(nn.functional.cross_entropy(model(x), labels), list(Bs.values()))
        for name, gradient in zip(NAMES, found, strict=True):
            sums[name] += sum(float(g) ** 2 for g in gradient.flatten()) / gradient.numel() / BATCHES
    return list(sums.values())


def plain_ranks(weights: list[float], budget: int, least: int, most: int) -> list[int]:
    """One unit after the other to the site furthest below its share; each site has its least from the start."""
    shares = [budget * w / sum(weights) for w in weights]
    ranks = [least] * len(weights)
    while sum(ranks) < budget:
        open_sites = [i for i in range(len(weights)) if ranks[i] < most]
        ranks[max(open_sites, key=lambda i: (shares[i] - ranks[i], -i))] += 1
    return ranks


def table(adapter: variants.Adapter) -> list[list[int]]:
    """(K, sites)."""
    return torch.stack(list(adapter.ranks().values()), 1).tolist()


def test_information_and_ranks_are_those_of_autograd(monkeypatch):
    found = {}
    monkeypatch.setattr(FIMLoRA, "by_share", lambda self, of: found.update(of) or PlacedLoRA.by_share(self, of))
    adapter = placed("fim-lora", SEEDS)
    for k, (rank, alpha) in enumerate(zip(RANKS, ALPHAS, strict=True)):
        expected = plain_information(adapter, k, rank, alpha)
        assert [found[name][k] for name in NAMES] == pytest.approx(expected, rel=1e-9)
        assert table(adapter)[k] == plain_ranks(expected, 3 * rank, 1, 2 * rank)
    assert all(len(set(row)) > 1 for row in table(adapter))


def test_no_site_has_more_than_twice_the_rank_unless_that_is_asked_for():
    assert max(max(row) for row in table(placed("fim-lora", [3], rank=4))) == 8
    assert max(max(row) for row in table(placed("fim-lora", [3], rank=4, most_rank=10))) == 9


def test_packed_is_alone():
    packed = placed("fim-lora", SEEDS)
    for k, seed in enumerate(SEEDS):
        assert table(placed("fim-lora", [seed])) == [table(packed)[k]]
