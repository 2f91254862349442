"""Tails of weights: the Hill exponent and the spikes written out, known spectra, and both readings of the sign."""

import math

import numpy as np
import pytest
import torch
from rankwise import variants
from rankwise.variants.heavy_tail import hill_exponent, lightness_by_spikes
from torch import nn

from tests.test_fim_lora import plain_ranks
from tests.test_gora import NAMES, body


def weights() -> list[np.ndarray]:
    model = body()
    return [model.get_submodule(name).weight.detach().numpy() for name in NAMES]


def plain_hill(W: np.ndarray) -> float:
    eigenvalues = sorted(np.linalg.svd(W, compute_uv=False) ** 2, reverse=True)
    k = len(eigenvalues) // 2
    return 1 + k / sum(math.log(eigenvalues[j] / eigenvalues[k]) for j in range(k))


def plain_spikes(W: np.ndarray) -> int:
    O, I = W.shape
    edge = (W**2).mean() * (math.sqrt(O) + math.sqrt(I)) ** 2
    return sum(s**2 > edge for s in np.linalg.svd(W, compute_uv=False))


def with_spectrum(sigma: list[float], out: int = 9, in_: int = 7) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, len(sigma), generator=random, dtype=torch.float64))[0] for n in (out, in_))
    return U @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ V.T


def test_the_exponent_of_a_power_law_is_found():
    # The quantiles of a density ~ lambda^-q: the j-th greatest of n is (j / n)^(-1 / (q - 1)).
    for q in (2.0, 3.5):
        lambdas = [((j + 0.5) / 400) ** (-1 / (q - 1)) for j in range(400)]
        W = torch.diag(torch.tensor(lambdas, dtype=torch.float64).sqrt())
        assert hill_exponent(W) == pytest.approx(q, rel=0.02)


def test_statistics_are_their_equations():
    for W in weights():
        assert hill_exponent(torch.from_numpy(W)) == pytest.approx(plain_hill(W))
        assert lightness_by_spikes(torch.from_numpy(W)) == 1 / (1 + plain_spikes(W))
    noise = torch.randn(120, 80, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert lightness_by_spikes(noise) == 1
    u, v = torch.ones(120, 3).double(), torch.ones(80, 3).double()
    u[:60, 1], v[:40, 1], u[::2, 2], v[::2, 2] = -1, -1, -1, -1
    assert lightness_by_spikes(noise + u @ v.T) == 1 / 4


@pytest.mark.parametrize("statistic", ["hill", "spikes"])
@pytest.mark.parametrize("more_to, sign", [("light", 1), ("heavy", -1)])
def test_ranks_are_shares_of_a_power(statistic, more_to, sign):
    model = body()
    with torch.no_grad():
        model.body[2].weight += 3 * torch.ones(16, 1).double() @ torch.ones(1, 20).double() / 20  # a spike
    Ws = [model.get_submodule(name).weight.detach().numpy() for name in NAMES]
    q = [plain_hill(W) if statistic == "hill" else 1 / (1 + plain_spikes(W)) for W in Ws]
    assert len(set(q)) > 1
    adapter = variants.create("heavy-tail", members=2, rank=[4, 3], statistic=statistic, more_to=more_to, beta=1.5)
    adapter.attach(model, NAMES, head=["classifier"], calibration=torch.zeros(2, 12, dtype=torch.float64))
    for k, rank in enumerate([4, 3]):
        found = [adapter.ranks()[name][k].item() for name in NAMES]
        assert found == plain_ranks([value ** (sign * 1.5) for value in q], 3 * rank, 0, 12)
        assert len(set(found)) > 1


def test_a_weight_without_a_tail_counts_as_the_lightest():
    flat, zero = with_spectrum([2.0] * 7), torch.zeros(9, 7)
    assert hill_exponent(flat) == hill_exponent(zero) == math.inf and lightness_by_spikes(zero) == math.inf
    model = nn.Sequential(nn.Linear(7, 9, bias=False), nn.Linear(9, 7, bias=False), nn.Linear(7, 9, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(with_spectrum([1.0, 2, 3, 4, 5, 6, 7]))
        model[1].weight.zero_()
        model[2].weight.copy_(with_spectrum([0.01, 0.1, 1, 10, 100, 1000, 10000]))
    adapter = variants.create("heavy-tail", rank=3).attach(model, ["0", "1", "2"], head=[])
    ranks = [r.item() for r in adapter.ranks().values()]
    assert abs(ranks[0] - ranks[1]) <= 1 and ranks[2] < ranks[0] and sum(ranks) == 9
