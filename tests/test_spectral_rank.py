"""The spectral rule against singular values of plain gradients: by a threshold, by a budget, packed as alone."""

import pytest
import torch
from rankwise import variants

from tests.test_fim_lora import RANKS, placed, table
from tests.test_gora import BATCHES, NAMES, SEEDS, plain_gradients

ROWS = 6 * BATCHES  # of each member


def sigmas(adapter: variants.Adapter, member: int) -> list[list[float]]:
    """Singular values of each site's gradient, as roots of the eigenvalues of G^T G."""
    G = plain_gradients(adapter, member)
    return [sorted((max(float(v), 0.0) ** 0.5 for v in torch.linalg.eigvalsh(G[n].T @ G[n])), reverse=True) for n in NAMES]


@pytest.mark.parametrize("C", [1e-3, 0.02, 0.3])
def test_a_threshold_counts_what_reaches_it(C):
    adapter = placed("spectral-rank", SEEDS, threshold=C)
    for k in range(3):
        expected = [sum(s * s >= C / ROWS for s in of_site) for of_site in sigmas(adapter, k)]
        assert table(adapter)[k] == expected
        assert all(site.scale[k].item() == pytest.approx([7 / 5, 1.0, 11 / 4][k]) for _, site in adapter.named_sites())
    assert 0 < sum(map(sum, table(adapter))) < 3 * (12 + 16 + 16)


def test_a_threshold_stays_within_bounds():
    adapter = placed("spectral-rank", SEEDS, threshold=0.3, least_rank=2, rank_bounds={"body.4": [0, 1]})
    for k in range(3):
        counts = [sum(s * s >= 0.3 / ROWS for s in of_site) for of_site in sigmas(adapter, k)]
        bounds = [(2, 12), (2, 16), (0, 1)]
        assert table(adapter)[k] == [min(max(n, least), most) for n, (least, most) in zip(counts, bounds, strict=True)]


def test_a_budget_keeps_the_highest_of_all_sites():
    adapter = placed("spectral-rank", SEEDS)
    for k, rank in enumerate(RANKS):
        pool = sorted(((-s, i) for i, of_site in enumerate(sigmas(adapter, k)) for s in of_site))[: 3 * rank]
        assert table(adapter)[k] == [sum(i == site for _, i in pool) for site in range(3)]
    by_parameters = placed("spectral-rank", [5], cost="parameters")
    sizes = [32, 36, 44]
    order = sorted((-s * s / sizes[i], i) for i, of_site in enumerate(sigmas(by_parameters, 0)) for s in of_site)
    left, expected = 5 * sum(sizes), [0, 0, 0]
    for _, i in order:
        if sizes[i] <= left:
            left, expected[i] = left - sizes[i], expected[i] + 1
    assert table(by_parameters) == [expected]


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.02}])
def test_packed_is_alone(settings):
    packed = placed("spectral-rank", SEEDS, **settings)
    for k, seed in enumerate(SEEDS):
        assert table(placed("spectral-rank", [seed], **settings)) == [table(packed)[k]]


@pytest.mark.parametrize(
    "settings", [{"total_rank": 9}, {"cost": "parameters"}, {"group_bounds": {"body": [1, 9]}}], ids=lambda s: next(iter(s))
)
def test_a_budget_beside_a_threshold_is_refused(settings):
    with pytest.raises(ValueError, match="has no effect with a threshold"):
        variants.check("spectral-rank", {"rank": 3, "threshold": 1.0, **settings})
    with pytest.raises(ValueError, match="sets the total itself"):
        variants.method("spectral-rank").settings.for_budget({"threshold": 1.0}, {"a": 2}, 100, 2.0)
