"""GoRA against its equations written out: ranks, start, both roundings and signs, for members that differ in everything."""

import math

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter import initialization
from torch import Tensor, nn

from tests.contract import TARGETS, attach
from tests.loop import outputs
from tests.tiny import batch, packed_batch, tiny

SEEDS, BATCHES = [5, 3, 8], 3
NAMES = ["body.0", "body.2", "body.4"]


class Body(nn.Module):
    """Three linears of three shapes and a head; no dropout, so that a plain backward pass is the same."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16, bias=False), nn.Tanh(), nn.Linear(16, 28))
        self.classifier = nn.Linear(28, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.tanh(self.body(x)))


def body() -> Body:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Body().double()
    with torch.no_grad():
        model.body[0].weight.mul_(4)  # so that ranks differ by more than rounding, and meet their bounds
    return model


def data(seed: int, step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(100 * seed + step)
    x = torch.randn(6, 12, generator=random, dtype=torch.float64)
    return x, torch.randint(3, (6,), generator=random)


def gora(seeds: list[int], **settings) -> variants.Adapter:
    values = {"rank": [5, 3, 4][: len(seeds)], "alpha": [7.0, 3.0, 11.0][: len(seeds)]} | settings
    adapter = variants.create("gora", members=len(seeds), seeds=seeds, **values)

    def losses(batch: tuple[Tensor, Tensor]) -> Tensor:
        each = nn.functional.cross_entropy(adapter.model(batch[0]), batch[1], reduction="none")
        return each.view(len(seeds), -1).mean(1)

    batches = [tuple(torch.cat(parts) for parts in zip(*(data(s, i) for s in seeds), strict=True)) for i in range(BATCHES)]
    # The probe of K > 1 takes the first batch for the model's input: here the model takes x alone.
    model = body()
    take, model.forward = model.forward, lambda x, *_: take(x)
    return adapter.attach(model, NAMES, head=["classifier"], calibration=variants.Calibration(batches, losses))


def plain_gradients(adapter: variants.Adapter, member: int) -> dict[str, Tensor]:
    """The mean over the batches of the gradient of the unfrozen model with the member's head."""
    model = body()
    with torch.no_grad():
        for key, value in adapter.heads["classifier"].named_parameters():
            getattr(model.classifier, key).copy_(value[member])
    for i in range(BATCHES):
        x, labels = data(adapter.seeds[member], i)
        nn.functional.cross_entropy(model(x), labels).backward()
    return {name: model.get_submodule(name).weight.grad / BATCHES for name in NAMES}


def plain_ranks(weights: dict[str, Tensor], G: dict[str, Tensor], rank: int, rounding: str, importance: str) -> list[int]:
    worth = []
    for name in NAMES:
        product = [abs(float(w * g)) for w, g in zip(weights[name].flatten(), G[name].flatten(), strict=True)]
        worth.append(sum(product) / len(product) if importance == "mean" else math.sqrt(sum(p * p for p in product)))
    sizes = [sum(weights[name].shape) for name in NAMES]
    features = [math.sqrt(size) if rounding == "paper" else size for size in sizes]
    budget = sum(f * rank for f in features)
    ranks = []
    for name, I, f in zip(NAMES, worth, features, strict=True):
        share = budget * I / sum(worth)
        wanted = round(share / f) if rounding == "paper" else round(share) // f
        ranks.append(min(max(wanted, rank // 2), 4 * rank, *weights[name].shape))
    return ranks


@pytest.mark.parametrize("rounding", ["paper", "release"])
@pytest.mark.parametrize("importance", ["mean", "frobenius"])
def test_ranks_are_the_equations(rounding, importance):
    adapter = gora(SEEDS, rounding=rounding, importance=importance)
    weights = {name: adapter.base(name).weight for name in NAMES}
    found = [[adapter.ranks()[name][k].item() for name in NAMES] for k in range(3)]
    expected = [plain_ranks(weights, plain_gradients(adapter, k), r, rounding, importance) for k, r in enumerate([5, 3, 4])]
    assert found == expected
    assert all(len(set(row)) > 1 for row in found)


def test_release_and_paper_differ_and_exact_meets_the_budget():
    found = {r: [sum(v[k].item() for v in gora(SEEDS, rounding=r).ranks().values()) for k in range(3)] for r in
             ("paper", "release", "exact")}  # fmt: skip
    assert found["release"] != found["paper"]
    assert found["exact"] == [15, 9, 12]


@pytest.mark.parametrize("sign", ["descent", "ascent"])
@pytest.mark.parametrize("scales", [{}, {"scaling": "alpha/r", "scale_by": "mean rank"}], ids=["paper", "one"])
def test_the_start_is_the_gradient_through_the_pseudo_inverse(sign, scales):
    gamma = 0.3
    adapter = gora(SEEDS, sign=sign, gamma=gamma, **scales)
    for k, (seed, rank, alpha) in enumerate(zip(SEEDS, [5, 3, 4], [7.0, 3.0, 11.0], strict=True)):
        G = plain_gradients(adapter, k)
        for name in NAMES:
            site, r = adapter.site(name), adapter.ranks()[name][k].item()
            n = adapter.base(name).in_features
            A = initialization.kaiming(r, n, initialization.generator(seed, name, "A")).double()
            s = alpha / rank if scales else alpha / math.sqrt(r)
            xi = gamma * math.sqrt(n / r) / s
            if not scales:
                assert xi == pytest.approx(gamma * math.sqrt(n) / alpha)  # as printed
            B = -xi * G[name] @ torch.linalg.pinv(A)
            torch.testing.assert_close(site.A[k, :r], A, rtol=0, atol=0)
            torch.testing.assert_close(site.B[k, :, :r], B if sign == "descent" else -B, rtol=1e-8, atol=1e-12)
            assert (site.B[k, :, r:] == 0).all() and site.scale[k].item() == pytest.approx(s)


def test_the_first_step_of_descent_lowers_the_loss_and_of_ascent_raises_it():
    def loss(adapter: variants.Adapter) -> float:
        with torch.no_grad():
            rows = [data(5, i) for i in range(BATCHES)]
            return sum(float(nn.functional.cross_entropy(adapter.model(x), y)) for x, y in rows) / BATCHES

    none, down, up = (loss(gora([5], rank=4, alpha=7.0, **s)) for s in ({"gamma": 0.0}, {}, {"sign": "ascent"}))
    assert down < none < up


def test_the_start_is_gamma_times_the_gradient_in_norm():
    """As measured of the release's form: Gaussian G, 512 x 768, r 16, gamma .05 gives .0504."""
    model = nn.Sequential(nn.Linear(768, 512, bias=False))
    G = torch.randn(512, 768, generator=torch.Generator().manual_seed(0))
    adapter = variants.create("gora", rank=16, rank_bounds={"0": [16, 16]}, gamma=0.05)
    # A loss that is linear in the output at the identity has G^T itself as its gradient.
    loss = lambda x: (adapter.model(x) * G.T).sum()[None]  # noqa: E731
    adapter.attach(model, ["0"], head=[], calibration=variants.Calibration([torch.eye(768)], loss))
    assert (adapter.delta("0")[0].norm() / G.norm()).item() == pytest.approx(0.0504, rel=0.03)


def test_packed_is_alone():
    packed = gora(SEEDS)
    for k, seed in enumerate(SEEDS):
        single = gora([seed], rank=[5, 3, 4][k], alpha=[7.0, 3.0, 11.0][k])
        for name in NAMES:
            r = single.ranks()[name].item()
            assert packed.ranks()[name][k].item() == r
            for part in ("A", "B"):
                mine, theirs = getattr(single.site(name), part)[0], getattr(packed.site(name), part)[k]
                torch.testing.assert_close(theirs[tuple(slice(n) for n in mine.shape)], mine, rtol=1e-9, atol=1e-13)


def test_a_member_whose_gradient_is_not_finite_starts_uniform_and_spares_the_others():
    adapter = variants.create("gora", members=2, seeds=[5, 3], rank=3, rounding="exact")
    x = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def losses(_: Tensor) -> Tensor:
        return adapter.model(x).square().view(2, -1).mean(1) * torch.tensor([1.0, torch.nan])

    adapter.attach(body(), NAMES, head=["classifier"], calibration=variants.Calibration([x], losses))
    assert [adapter.ranks()[name][1].item() for name in NAMES] != [adapter.ranks()[name][0].item() for name in NAMES]
    for name in NAMES:
        site = adapter.site(name)
        assert site.A.isfinite().all() and site.B.isfinite().all()
        assert site.B[0].any() and not site.B[1].any()


@pytest.mark.parametrize("settings", [{"cost": "parameters"}, {"total_rank": 9}, {"group_bounds": {"body": [1, 9]}}])
def test_a_budget_without_exact_rounding_is_refused(settings):
    with pytest.raises(ValueError, match='has no effect with rounding = "paper"'):
        variants.check("gora", {"rank": 3, **settings})


def test_dropout_is_drawn_in_the_measured_batches_and_differs_from_batch_to_batch():
    starts = []
    for dropout in (0.0, 0.5):
        model = tiny("bert")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        adapter = attach(variants.create("gora", rank=3, seeds=[5]), model, TARGETS)
        again = attach(variants.create("gora", rank=3, seeds=[5]), adapter.detach(), TARGETS)
        site = next(site for _, site in again.named_sites())
        assert torch.equal(site.B, next(site for _, site in adapter.named_sites()).B)
        starts.append(site.B.detach().norm())
    assert starts[0] != starts[1]
    assert outputs(again.model.eval(), packed_batch([5])).shape == (len(batch(5)["labels"]), 3)
