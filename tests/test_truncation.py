"""Truncation after training beside a plain version: the dense SVD of every update, pooled, sorted, cut."""

import itertools

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from rankwise.variants.weights.truncation import NORMALISED
from torch import Tensor, nn

from tests.contract import RATES, SEEDS, TARGETS, losses, rows
from tests.loop import Loop, outputs
from tests.tiny import packed_batch, tiny

# Adapters are filled by hand here, which an allocator warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*was trained but after_step")
SVD = {"initial_rank": [6, 3, 5], "target_rank": [4, 2, 3], "alpha": [7.0, 3.0, 11.0]}
CASES = {
    "lora": {"rank": [6, 3, 5], "alpha": [7.0, 3.0, 11.0], "rank_pattern": {"query": 4}},
    "dora": {"rank": [6, 3, 5], "alpha": [7.0, 3.0, 11.0], "scaling": "alpha/sqrt(r)"},
    "adalora": SVD,
    "allocated": SVD | {"form": "doublet", "score": "magnitude", "magnitude": True},
    "truncated": SVD,
}
BUDGETS = [9, 4, 12]  # of five sites


def filled(method: str = "lora", members: int = 3, model: nn.Module | None = None, targets=TARGETS, **more) -> Adapter:
    """Trained by chance; a slot of AdaLoRA's is cut, as an allocator would."""
    values = {k: v[:members] if isinstance(v, list) else v for k, v in (CASES[method] | more).items()}
    adapter = variants.create(method, members=members, seeds=SEEDS[:members], **values)
    adapter.attach(tiny("bert") if model is None else model, targets)
    fill(adapter, 0.3)
    for _, site in adapter.named_sites():
        if hasattr(site, "E"):
            site.kept[:, 1] = False
            site.project()
    return adapter


def updates(adapter: Adapter) -> list[Tensor]:
    """(K, O, I) dense s B A of each site, that of the direction where there are magnitudes."""
    named = adapter.named_sites()
    return [getattr(site, "inner", site).delta(adapter.base(name)).detach().double() for name, site in named]


def shares(values: Tensor, weight: Tensor, normalisation: str) -> Tensor:
    if normalisation == "site-share":
        return values / values.square().sum().sqrt()
    if normalisation == "site-largest":
        return values / values.max()
    return values / torch.linalg.matrix_norm(weight) if normalisation == "weight" else values


def plain(deltas: list[Tensor], budget: int, weights: list[Tensor], normalisation: str = "none") -> list[Tensor]:
    """One member's updates (O, I) at so many ranks in all, slow and dense."""
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    pool = []
    for number, (_, sigma, _) in enumerate(parts):
        for place, value in enumerate(shares(sigma, weights[number], normalisation).tolist()):
            pool.append((-value, number, place))
    kept = sorted(pool)[:budget]
    cut = []
    for number, (U, sigma, Vt) in enumerate(parts):
        places = [place for _, n, place in kept if n == number]
        cut.append(sum((sigma[i] * torch.outer(U[:, i], Vt[i]) for i in places), torch.zeros_like(deltas[number])))
    return cut


def weights(adapter: Adapter) -> list[Tensor]:
    return [adapter.base(name).weight.detach().double() for name, _ in adapter.named_sites()]


def ranks(adapter: Adapter) -> Tensor:
    """(sites, K)."""
    return torch.stack(list(adapter.ranks().values()))


NAMED = [(method, "none") for method in CASES] + [("lora", name) for name in NORMALISED if name != "none"]


@pytest.mark.parametrize(("method", "normalisation"), NAMED)
def test_every_member_is_cut_by_its_own_threshold_over_all_sites(method, normalisation):
    adapter = filled(method)
    before, magnitudes = updates(adapter), [getattr(s, "magnitude", torch.zeros(1)).clone() for _, s in adapter.named_sites()]
    variants.truncate(adapter, total_rank=BUDGETS, normalisation=normalisation)
    after = updates(adapter)
    for k, budget in enumerate(BUDGETS):
        expected = plain([delta[k] for delta in before], budget, weights(adapter), normalisation)
        for mine, theirs in zip(after, expected, strict=True):
            torch.testing.assert_close(mine[k], theirs, rtol=0, atol=1e-12)
    assert ranks(adapter).sum(0).tolist() == BUDGETS
    assert ranks(adapter).min() == 0 or normalisation != "none", "some site lost everything"
    for (_, site), magnitude in zip(adapter.named_sites(), magnitudes, strict=True):
        assert torch.equal(getattr(site, "magnitude", torch.zeros(1)), magnitude)


@pytest.mark.parametrize("method", CASES)
def test_what_was_cut_is_zero_and_no_slot_of_the_member(method):
    adapter = filled(method)
    variants.truncate(adapter, total_rank=BUDGETS)
    for _, site in adapter.named_sites():
        site = getattr(site, "inner", site)
        mask = getattr(site, "kept", site.slots).bool()
        assert torch.equal(mask.sum(1), site.rank())
        assert not site.A[~mask].any() and not site.B.mT[~mask].any()
        if hasattr(site, "E"):
            assert not site.E[~mask].any() and site.E[mask].all()
            k = int(mask.sum(1).argmax())
            Q = site.A[k, mask[k]]
            torch.testing.assert_close(Q @ Q.mT, torch.eye(len(Q), dtype=Q.dtype), rtol=0, atol=1e-12)
    assert adapter.parameter_counts()["active"].tolist() < adapter.parameter_counts()["nominal"].tolist()


def test_no_other_spread_of_as_many_ranks_is_nearer():
    adapter = filled(members=1)
    before = updates(adapter)
    spectra = [torch.linalg.svdvals(delta[0]) for delta in before]
    variants.truncate(adapter, total_rank=7)
    error = sum((a - b).square().sum() for a, b in zip(before, updates(adapter), strict=True)).item()
    others = [p for p in itertools.product(range(5), repeat=5) if sum(p) == 7]
    best = min(sum(s[r:].square().sum().item() for s, r in zip(spectra, p, strict=True)) for p in others)
    assert error == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_a_budget_of_parameters_is_filled_by_energy_for_each_parameter(method):
    adapter = filled(method)
    fixed = sum(site.magnitude.shape[1] for _, site in adapter.named_sites() if hasattr(site, "magnitude"))
    budgets = [fixed + 700, fixed + 333, fixed + 901]
    before = updates(adapter)
    extra = method == "adalora"
    costs = [delta.shape[1] + delta.shape[2] + extra for delta in before]
    active = [s.tolist() for s in torch.stack([getattr(s, "live", s.rank)() for _, s in adapter.named_sites()]).T]
    variants.truncate(adapter, total_parameters=budgets)
    for k, budget in enumerate(budgets):
        pool = []
        for number, (delta, cost) in enumerate(zip(before, costs, strict=True)):
            sigma = torch.linalg.svdvals(delta[k])[: active[k][number]].tolist()
            pool += [(-(value**2) / cost, number, cost) for value in sigma]
        left, expected, refused = budget - fixed, [0] * 5, []
        for _, number, cost in sorted(pool):
            if cost <= left:
                expected[number] += 1
                left -= cost
            else:
                refused.append(cost)
        assert ranks(adapter)[:, k].tolist() == expected
        assert left < min(refused)
        assert adapter.parameter_counts()["active"][k] == budget - left


def test_a_share_of_the_energy_takes_the_fewest_ranks():
    adapter = filled()
    before = updates(adapter)
    share = [0.5, 0.9, 1.0]
    variants.truncate(adapter, energy=share)
    for k, wanted in enumerate(share):
        values = torch.cat([torch.linalg.svdvals(delta[k]) for delta in before]).square().sort(descending=True)[0]
        enough = (values.cumsum(0) >= wanted * values.sum() * (1 - 1e-12)).nonzero()[0].item() + 1
        assert ranks(adapter)[:, k].sum() == enough
    assert ranks(adapter)[:, 2].tolist() == [4, 3 + 2, 4, 5, 5], "a share of 1 cuts nothing"


def test_bounds_come_before_the_threshold():
    adapter = filled(members=1)
    variants.truncate(adapter, total_rank=9, least_rank=1, most_rank=3)
    assert ranks(adapter).min() >= 1 and ranks(adapter).max() <= 3 and ranks(adapter).sum() == 9
    adapter = filled(members=1)
    variants.truncate(adapter, energy=0.999, most_rank=2)
    assert ranks(adapter)[:, 0].tolist() == [2] * 5, "a share that the bounds forbid: all that they allow"


def test_ties_are_kept_in_site_order():
    adapter = filled(members=1, rank_pattern={".*": 4})
    first = adapter.site("bert.encoder.layer.0.attention.self.query")
    second = adapter.site("bert.encoder.layer.1.attention.self.query")
    with torch.no_grad():
        for _, site in adapter.named_sites():
            site.B.zero_()
        for site in (first, second):
            site.A[0] = torch.eye(4, 32) * 2
            site.B[0] = torch.eye(32, 4)
    variants.truncate(adapter, total_rank=5)
    assert ranks(adapter)[:, 0].tolist() == [4, 0, 1, 0, 0]


def test_packed_is_alone():
    pack = filled("allocated")
    variants.truncate(pack, total_rank=BUDGETS, normalisation="site-share")
    for k in range(3):
        alone = variants.create(
            "allocated", seeds=[SEEDS[k]], **{n: v[k] if isinstance(v, list) else v for n, v in CASES["allocated"].items()}
        )
        alone.attach(tiny("bert"), TARGETS).copy_member(filled("allocated"), k)
        variants.truncate(alone, total_rank=BUDGETS[k], normalisation="site-share")
        for mine, theirs in zip(updates(pack), updates(alone), strict=True):
            torch.testing.assert_close(mine[k], theirs[0], rtol=0, atol=1e-12)
        assert torch.equal(ranks(pack)[:, k], ranks(alone)[:, 0])


class Wide(nn.Module):
    """A layer with fewer features than the adapter has ranks, and a layer whose update is zero."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Linear(3, 9, dtype=torch.float64), nn.Linear(9, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.tanh(self.narrow(x)))


@pytest.mark.parametrize("normalisation", NORMALISED)
def test_more_ranks_than_features_and_an_update_of_zero(normalisation):
    adapter = variants.create("lora", rank=6, alpha=4).attach(Wide(), ["narrow", "wide"])
    fill(adapter, 0.3)
    with torch.no_grad():
        adapter.site("wide").B.zero_()
    before = updates(adapter)
    variants.truncate(adapter, total_rank=3, normalisation=normalisation)
    assert ranks(adapter)[:, 0].tolist() == [3, 0]
    torch.testing.assert_close(updates(adapter)[0], before[0], rtol=0, atol=1e-12)  # rank 6 of 3 features is rank 3
    variants.truncate(adapter, energy=1.0)
    assert ranks(adapter)[:, 0].tolist() == [3, 0]


FAULTS = [
    ({}, "no budget given"),
    ({"total_rank": 3, "energy": 0.5}, "total_rank and energy given"),
    ({"total_rank": [3, 4]}, "has 2 values for 3 members"),
    ({"total_rank": 99}, "total_rank = 99 for member 0: there are 26 ranks, and truncation adds none"),
    ({"total_rank": 2, "least_rank": 1}, "least ranks take 5 ranks: give at least that"),
    ({"total_rank": 2.0}, "total_rank = 2.0 for member 0: give a whole number"),
    ({"total_parameters": 10**6}, "there are .* parameters"),
    ({"energy": 1.5}, "energy = 1.5 for member 0: give a share"),
    ({"energy": 0.0}, "energy = 0.0"),
    ({"total_rank": 3, "least_rank": 3, "most_rank": 2}, "least_rank = 3, most_rank = 2"),
    ({"total_rank": 3, "normalisation": "site-shares"}, "did you mean .site-share."),
]


@pytest.mark.parametrize(("given", "words"), FAULTS)
def test_a_budget_that_cannot_be_met_is_refused(given, words):
    adapter = filled()
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    with pytest.raises(ValueError, match=words) as caught:
        variants.truncate(adapter, **given)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())


def test_what_has_no_low_rank_update_or_is_not_finite_is_refused():
    for method in ("head", "bitfit", "full"):
        with pytest.raises(ValueError, match=f"{method} has no low-rank update to truncate"):
            variants.truncate(variants.create(method).attach(tiny("bert")), total_rank=3)
    adapter = filled()
    adapter.merge()
    with pytest.raises(ValueError, match="is merged: call unmerge"):
        variants.truncate(adapter, total_rank=3)
    adapter.unmerge()
    with torch.no_grad():
        adapter.site("bert.encoder.layer.0.attention.self.query").B[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="member 1 has factors that are not finite"):
        variants.truncate(adapter, total_rank=3)


# -- the method ------------------------------------------------------------------------------------------------------


STEPS = 5
SETTINGS = {"initial_rank": [6, 3, 5], "target_rank": [3, 1, 2], "alpha": [7.0, 3.0, 11.0], "dropout": 0.2}


def trained(method: str, steps: int = STEPS, **settings) -> tuple[Adapter, Loop]:
    adapter = variants.create(method, members=3, seeds=SEEDS, **settings).attach(tiny("bert"), TARGETS)
    loop = Loop(adapter, RATES, STEPS)
    losses(adapter, steps, loop)
    return adapter, loop


@pytest.mark.parametrize("magnitude", [False, True])
def test_it_trains_as_lora_and_is_cut_after_the_last_step(magnitude):
    adapter, loop = trained("truncated", STEPS - 1, **SETTINGS, magnitude=magnitude)
    nominal = adapter.nominal_ranks()
    assert torch.equal(ranks(adapter), torch.stack(list(nominal.values())))
    assert adapter.budget(Step(STEPS - 1, STEPS)).tolist() == [30, 15, 25]
    assert torch.equal(adapter.parameter_counts()["active"], adapter.parameter_counts()["trainable"])
    losses(adapter, 1, loop)
    assert adapter.budget(Step(STEPS, STEPS)).tolist() == ranks(adapter).sum(0).tolist() == [15, 5, 10]
    assert all(torch.equal(rank, nominal[name]) for name, rank in adapter.nominal_ranks().items())
    cut = sum(site.count(site.rank()) for _, site in adapter.named_sites())
    assert torch.equal(adapter.parameter_counts()["active"], cut)
    assert (adapter.parameter_counts()["active"] < adapter.parameter_counts()["trainable"]).all()

    lora, _ = trained("dora" if magnitude else "lora", rank=SETTINGS["initial_rank"], alpha=SETTINGS["alpha"], dropout=0.2)
    variants.truncate(lora, total_rank=[15, 5, 10])
    for name, rank in lora.ranks().items():
        assert torch.equal(rank, adapter.ranks()[name])
    with torch.no_grad():
        batch = packed_batch(SEEDS, 9)
        mine, theirs = (outputs(one.model.eval(), batch) for one in (adapter, lora))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_a_run_that_was_cut_off_before_its_last_step_ends_equal_to_the_bit():
    whole, _ = trained("truncated", **SETTINGS)
    _, begun = trained("truncated", STEPS - 1, **SETTINGS)
    again = variants.create("truncated", members=3, seeds=SEEDS, **SETTINGS).attach(tiny("bert"), TARGETS)
    resumed = Loop(again, RATES, STEPS)
    resumed.load(begun.state())
    losses(again, 1, resumed)
    for name, value in again.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    ended = variants.create("truncated", members=3, seeds=SEEDS, **SETTINGS).attach(tiny("bert"), TARGETS)
    ended.load_state_dict(whole.state_dict())
    assert torch.equal(ranks(ended), ranks(whole))
    assert torch.equal(outputs(ended.model.eval(), rows(ended)), outputs(whole.model.eval(), rows(whole)))


def test_costs_bounds_and_normalisation_of_the_method_are_those_of_truncate():
    settings = SETTINGS | {"cost": "parameters", "target_parameters": 900, "least_rank": 1, "normalisation": "site-largest"}
    adapter, _ = trained("truncated", **settings)
    lora, _ = trained("lora", rank=SETTINGS["initial_rank"], alpha=SETTINGS["alpha"], dropout=0.2)
    variants.truncate(lora, total_parameters=900, least_rank=1, normalisation="site-largest")
    assert torch.equal(ranks(adapter), ranks(lora)) and ranks(adapter).min() == 1
    assert (adapter.parameter_counts()["active"] <= 900).all()
    assert adapter.budget(Step(STEPS, STEPS)) is None


def test_a_member_that_diverged_leaves_the_others_their_budget():
    adapter, _ = trained("truncated", STEPS - 1, **SETTINGS)
    with torch.no_grad():
        adapter.site("bert.encoder.layer.0.attention.self.query").A[1] = torch.nan
    adapter.after_step(Step(STEPS, STEPS))
    assert ranks(adapter).sum(0)[[0, 2]].tolist() == [15, 10]
    for _, site in adapter.named_sites():
        assert site.A[[0, 2]].isfinite().all()
    assert adapter.site("bert.encoder.layer.0.attention.self.query").A[1].isnan().all(), "it stays as it is"


WRONG = [
    ({"target_rank": 7}, "target_rank = 7 is above initial_rank = 6: truncation adds no rank"),
    ({"target_parameters": 9}, 'target_parameters = 9 has no effect with cost = "rank"'),
    ({"target_total": 9, "cost": "parameters"}, 'target_total = 9 has no effect with cost = "parameters"'),
    ({"least_rank": 3, "most_rank": 2}, "least_rank = 3 is above most_rank = 2"),
    ({"normalisation": "share"}, "normalisation"),
    ({"target_total": 31}, "the target of 31 ranks is above the 30 to cut from"),
    ({"target_total": 11, "most_rank": 2}, "the target of 11 ranks is above the 10"),
    ({"target_total": 4, "least_rank": 1}, "least_rank = 1 takes 5 ranks of a target of 4"),
]


@pytest.mark.parametrize(("given", "words"), WRONG)
def test_settings_that_cut_nothing_are_refused(given, words):
    model = tiny("bert")
    with pytest.raises(ValueError, match=words):
        variants.create("truncated", **{"initial_rank": 6, "target_rank": 2} | given).attach(model, TARGETS)
    variants.create("lora", rank=1).attach(model, TARGETS)  # nothing was left in the model
