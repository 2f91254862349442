"""What became of each weight, every quantity against a plain version in loops."""

import math

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.linears import weight_of
from rankwise.variants.settings import METHODS
from rankwise.variants.weights import anatomy
from rankwise.variants.weights.spectrum import effective_rank, energy_rank, stable_rank

from tests import contract
from tests.tiny import tiny

TARGETS = ["query", "intermediate.dense"]
SETTINGS = {
    "lora": {"rank": [3, 2, 5], "alpha": [5, 2, 7]},
    "dora": {"rank": [3, 2, 5], "alpha": [5, 2, 7]},
    "adalora": {"initial_rank": [4, 3, 6], "target_rank": 2, "alpha": [5, 2, 7]},
}
RANKS = {"lora": "rank", "adalora": "initial_rank"}


def filled(name, model="bert", members=3, seed=1):
    """An attached adapter in float64 whose trained tensors are all N(0, 0.1)."""
    adapter = variants.create(name, members=members, **SETTINGS.get(name, {}))
    adapter.attach(tiny(model).double(), **({"targets": TARGETS} if name in SETTINGS else {}))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype))
        for _, site in adapter.named_sites():
            if hasattr(site, "clear_missing_slots"):
                site.clear_missing_slots()
    return adapter


# -- numbers of a spectrum -------------------------------------------------------------------------------------------------


def test_equal_singular_values_have_the_rank_of_their_number():
    for measure in (effective_rank, stable_rank, energy_rank):
        assert measure([2.0, 2.0, 2.0]) == pytest.approx(3.0)
        assert measure([0.7, 0.0, 0.0]) == pytest.approx(1.0)
        assert measure([]) == measure([0.0, 0.0]) == 0


def test_the_measures_by_hand():
    # sigma = 3, 1: p = 3/4, 1/4; squares 9, 1.
    assert effective_rank([1.0, 3.0]) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert stable_rank([1.0, 3.0]) == pytest.approx(10 / 9)
    assert [energy_rank([1.0, 3.0], share) for share in (0.89, 0.9, 0.91, 1.0)] == [1, 1, 2, 2]
    assert energy_rank([0.1] * 20) == 19  # 95 % of 20 equal ones exactly, in whatever way the sum was rounded


# -- sites -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "dora", "adalora"])
def test_every_quantity_is_that_of_the_dense_update_in_loops(name):
    adapter = filled(name)
    found = anatomy.anatomy(adapter)
    counts = adapter.parameter_counts()["active"]
    for k in range(3):
        assert set(found[k]) == {n for n, _ in adapter.named_sites()} and len(found[k]) == 4
        for site, facts in found[k].items():
            weight, change = weight_of(adapter.base(site)), adapter.delta(site)[k]
            sigma = torch.linalg.svd(change.detach())[1]
            total = float(sigma.sum())
            entropy = -sum(float(s) / total * math.log(float(s) / total) for s in sigma if s > 1e-12)
            assert facts["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-3 if name == "dora" else 1e-4)
            assert facts["stable_rank"] == pytest.approx(float((sigma**2).sum() / sigma[0] ** 2), rel=1e-4)
            held, needed = 0.0, 0
            while held < 0.95 * float((sigma**2).sum()):
                held, needed = held + float(sigma[needed] ** 2), needed + 1
            assert facts["energy_rank"] == needed
            assert facts["update_norm"] == pytest.approx(math.sqrt(float((change**2).sum())), rel=1e-4)
            assert facts["relative_norm"] == pytest.approx(float(change.norm() / weight.norm()), rel=1e-4)
            assert len(facts["singular_values"]) == (16 if name == "dora" else SETTINGS[name][RANKS[name]][k])
            assert facts["singular_values"] == pytest.approx(
                sigma[: len(facts["singular_values"])].tolist(), rel=1e-4, abs=1e-9
            )
            assert facts["active"] == int(adapter.ranks()[site][k]) and facts["nominal"] == int(
                adapter.nominal_ranks()[site][k]
            )
        assert sum(facts["parameters"] for facts in found[k].values()) == int(counts[k])
        assert sum(facts["share"] for facts in found[k].values()) == pytest.approx(1.0, abs=1e-4)
    assert len({str(one) for one in found}) == 3


def test_an_intruder_is_found_by_its_greatest_cosine_with_any_pretrained_vector():
    adapter = filled("lora", members=3)
    name, site = next(adapter.named_sites())
    with torch.no_grad():
        site.B[1] *= 40.0  # a member whose update drowns the weight
    found = anatomy.anatomy(adapter)
    weight = weight_of(adapter.base(name))
    before = torch.linalg.svd(weight)[0]
    for k in range(3):
        after = torch.linalg.svd(weight + adapter.delta(name)[k])[0][:, : anatomy.INTRUDERS]
        greatest = [max(abs(float(before[:, i] @ after[:, j])) for i in range(32)) for j in range(anatomy.INTRUDERS)]
        assert found[k][name]["familiarity"] == pytest.approx(greatest, abs=2e-4)
        assert found[k][name]["intruders"] == sum(value < 0.5 for value in greatest)
    assert found[1][name]["intruders"] > found[0][name]["intruders"]
    bare = anatomy.anatomy(adapter, intruders=False)[1][name]
    assert bare["intruders"] is None and bare["singular_values"] == found[1][name]["singular_values"]


def test_an_untrained_update_is_zero_by_every_measure():
    adapter = variants.create("adalora", initial_rank=4, target_rank=2).attach(tiny("bert"), TARGETS)
    for facts in anatomy.anatomy(adapter)[0].values():
        assert [facts[key] for key in ("effective_rank", "stable_rank", "energy_rank", "update_norm", "intruders")] == [0] * 5
        assert (facts["nominal"], facts["active"], facts["importance"]) == (4, 4, 0.0)


def test_importance_is_the_allocator_s_score_over_the_slots_that_it_keeps():
    adapter = filled("adalora", members=3)
    random = torch.Generator().manual_seed(5)
    for flat in (adapter.score.elements.all_smoothed, adapter.score.elements.all_uncertainty):
        flat.copy_(torch.rand(flat.shape, generator=random, dtype=flat.dtype))
    for number, site in enumerate(adapter.triplets()):
        site.kept[:, number % 3] = False
    found = anatomy.anatomy(adapter, intruders=False)
    for site, scores in zip(adapter.triplets(), adapter.triplet_scores(), strict=True):
        for k, slots in enumerate((4, 3, 6)):
            facts = found[k][site.name]
            kept = [float(scores[k, r]) for r in range(slots) if site.kept[k, r]]
            assert facts["importance"] == pytest.approx(sum(kept), rel=1e-4)
            assert facts["greatest_importance"] == pytest.approx(max(kept), rel=1e-4)
            assert facts["scores"] == pytest.approx([float(scores[k, r]) for r in range(slots)], rel=1e-4)
            assert facts["kept"] == "".join("01"[bool(site.kept[k, r])] for r in range(slots))
            assert facts["active"] == len(kept)


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_full_fine_tuning_shows_the_spectrum_of_its_real_change(model):
    adapter = variants.create("full")
    body = tiny(model)
    before = {name: weight.clone() for name, weight in body.state_dict().items()}
    adapter.attach(body)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    (found,) = anatomy.anatomy(adapter)
    lora = variants.create("lora", rank=2).attach(tiny(model))
    assert list(found) == [name for name, _ in lora.named_sites()]
    for name, facts in found.items():
        old = before[f"{name}.weight"]
        change = body.get_submodule(name).weight.detach() - old
        sigma = torch.linalg.svdvals(change.double())
        assert facts["singular_values"] == pytest.approx(sigma[:16].tolist(), rel=1e-3)
        assert facts["relative_norm"] == pytest.approx(float(change.norm() / old.norm()), rel=1e-3)
        assert facts["nominal"] == facts["active"] == min(old.shape) and facts["parameters"] == old.numel()
        assert facts["importance"] is None
        base = old.T if model == "gpt2" else old
        now = base + (change.T if model == "gpt2" else change)
        cosines = torch.linalg.svd(base)[0][:, : min(old.shape)].T @ torch.linalg.svd(now)[0][:, : anatomy.INTRUDERS]
        assert facts["familiarity"] == pytest.approx(cosines.abs().amax(0).tolist(), abs=2e-3)


def test_a_site_of_rank_0_changes_nothing():
    assert len(anatomy.thin_singular_values(torch.zeros(7, 0), torch.zeros(0, 5))) == 0


def test_a_large_weight_is_measured_thin_and_left_out_where_it_cannot_be(monkeypatch):
    monkeypatch.setattr(anatomy, "MOST_DENSE", 16)
    thin = next(iter(anatomy.anatomy(filled("lora"))[0].values()))
    assert thin["intruders"] is None and thin["effective_rank"] > 1
    dense = next(iter(anatomy.anatomy(filled("dora"))[0].values()))
    assert dense["singular_values"] is dense["effective_rank"] is None and dense["relative_norm"] > 0


def test_what_is_not_finite_is_none_and_the_other_members_are_measured():
    adapter = filled("lora")
    name, site = next(adapter.named_sites())
    with torch.no_grad():
        site.B[1, 0, 0] = torch.nan
    found = anatomy.anatomy(adapter)
    assert found[1][name]["effective_rank"] is found[1][name]["relative_norm"] is found[1][name]["intruders"] is None
    assert found[0][name]["effective_rank"] > 0 and found[2][name]["intruders"] is not None


NO_WEIGHTS = {
    "head",
    "bitfit",
    "houlsby",
    "pfeiffer",
    "prompt-tuning",
    "prefix-tuning",
}  # what they train is no weight of a linear


@pytest.mark.parametrize("name", METHODS)
def test_a_method_s_sites_are_those_whose_weight_it_changes(name):
    adapter = contract.attach(contract.create(name, members=1), tiny("bert"))
    (found,) = anatomy.anatomy(adapter, intruders=False)
    assert set(found) == set(adapter.changed_weights())
    assert bool(found) == (name not in NO_WEIGHTS)
