"""Dynamic-rank DoRA (Mao et al. 2024) against a plain version: dense components, float64, one member, loops."""

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from rankwise.variants.allocation.scores import NormShare
from torch import Tensor

from tests.loop import Loop
from tests.test_adalora import NAMES, Net, data, squared_error

TOTAL, WARMUP, FINAL, INTERVAL = 24, 3, 9, 2
SEEDS, RATES = [5, 3, 8], [1e-1, 2e-2, 5e-2]
SETTINGS = {
    "initial_rank": [5, 3, 4],
    "target_rank": [2, 2, 1],
    "alpha": [7.0, 2.0, 11.0],
    "warmup_steps": WARMUP,
    "final_steps": FINAL,
    "interval": INTERVAL,
    "beta1": 0.7,
    "modulator": 0.3,
}


def create(**others) -> "variants.DynamicDoRA":
    return variants.create("dynamic-dora", members=3, seeds=SEEDS, **{**SETTINGS, **others}).attach(Net())


def shares(site, k: int, r: int) -> list[float]:
    """Eq. (7) with every component as a dense matrix."""
    dense = [site.E[k, i].detach() * torch.outer(site.B[k, :, i].detach(), site.A[k, i].detach()) for i in range(r)]
    whole = sum(dense).norm()
    return [float(part.norm() / (whole + NormShare.EPSILON / site.scale[k])) for part in dense]


def test_the_share_of_a_component_is_that_of_the_dense_matrices():
    adapter = create()
    fill(adapter, 0.5)
    for site in adapter.triplets():
        found = adapter.score.now(site)
        for k, r in enumerate(SETTINGS["initial_rank"]):
            assert found[k, :r].tolist() == pytest.approx(shares(site, k, r), rel=1e-9)
            assert not found[k, r:].any()


def test_no_tensor_of_a_component_s_size_is_made(monkeypatch):
    adapter = variants.create("dynamic-dora", initial_rank=4, target_rank=2).attach(
        torch.nn.Sequential(torch.nn.Linear(300, 200))
    )
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    with Watch():
        for site in adapter.triplets():
            adapter.score.now(site)
    assert 0 < largest <= 4 * 300 * 2


def budget(t: int, start: int, end: int) -> int:
    """The cube is on the progress: slow first."""
    if t <= WARMUP:
        return start
    if t >= TOTAL - FINAL:
        return end
    done = (t - WARMUP) / (TOTAL - FINAL - WARMUP)
    return int(start - (start - end) * done**3)


def test_every_allocation_of_a_training_is_the_plain_one():
    adapter = create()
    loop = Loop(adapter, RATES, TOTAL, clip=0.5, losses=squared_error)
    sites = adapter.triplets()
    average = [[[0.0] * r for _ in sites] for r in SETTINGS["initial_rank"]]
    kept = [[[True] * r for _ in sites] for r in SETTINGS["initial_rank"]]
    pruned = []
    for t in range(1, TOTAL + 1):
        batches = [data(k, t) for k in range(3)]
        E = [site.E.detach().clone() for site in sites]
        loop.step(tuple(torch.cat(parts) for parts in zip(*batches, strict=True)))
        for k, r in enumerate(SETTINGS["initial_rank"]):
            if t < TOTAL - FINAL:
                allocated = t > WARMUP and t % INTERVAL == 0
                for n, site in enumerate(sites):
                    if not allocated:  # else E was projected since it was scored; the averages are compared instead
                        now = shares(site, k, r)
                        average[k][n] = [0.7 * a + 0.3 * s for a, s in zip(average[k][n], now, strict=True)]
                        assert adapter.triplet_scores()[n][k, :r].tolist() == pytest.approx(average[k][n], rel=1e-9)
                    else:
                        average[k][n] = adapter.triplet_scores()[n][k, :r].tolist()
            if (WARMUP < t < TOTAL - FINAL and t % INTERVAL == 0) or t == TOTAL - FINAL:
                flat = sorted((-s, n, i) for n, scores in enumerate(average[k]) for i, s in enumerate(scores))
                best = {(n, i) for _, n, i in flat[: budget(t, 3 * r, 3 * SETTINGS["target_rank"][k])]}
                kept[k] = [[(n, i) in best for i in range(r)] for n in range(3)]
                pruned.append(len(best))
            for n, site in enumerate(sites):
                assert site.kept[k, :r].tolist() == kept[k][n], (t, k, n)
                if t >= TOTAL - FINAL:
                    assert (site.E[k, :r] != 0).tolist() == kept[k][n]
        assert any(not torch.equal(e, site.E) for e, site in zip(E, sites, strict=True))
    assert pruned[:3] == [14, 8, 11] and pruned[-3:] == [6, 6, 3]


@pytest.mark.parametrize("form", ["paper", "release"])
def test_the_penalty_is_the_mean_spread_of_the_vectors_until_the_ranks_are_fixed(form):
    adapter = create(penalty_form=form)
    for k, r in enumerate(SETTINGS["initial_rank"]):
        vectors = [v.detach() for site in adapter.triplets() for i in range(r) for v in (site.A[k, i], site.B[k, :, i])]
        spreads = [float(vector.var()) for vector in vectors]
        count = len(spreads) if form == "release" else len(spreads) / 2
        assert adapter.penalty(Step(TOTAL - FINAL - 1, TOTAL))[k].item() == pytest.approx(0.3 * sum(spreads) / count)
    assert not adapter.penalty(Step(TOTAL - FINAL, TOTAL)).any()


def test_it_starts_without_a_change_and_with_random_factors_on_both_sides():
    adapter = create()
    for (name, site), (fan_in, fan_out) in zip(adapter.named_sites(), [(7, 5), (5, 6), (6, 4)], strict=True):
        assert name in NAMES and not site.E.any()
        for k, r in enumerate(SETTINGS["initial_rank"]):
            assert site.A[k, :r].abs().max() <= fan_in**-0.5 and site.B[k, :, :r].abs().max() <= r**-0.5
            assert site.B[k, :, :r].abs().max() > 0.5 * r**-0.5 and site.B.shape[1] == fan_out
        assert site.scale.tolist() == pytest.approx([7 / 5, 2 / 3, 11 / 4])
