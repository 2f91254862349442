"""What the methods that place rank at the start share: budgets, bounds, scales, sites without rank, and files of them."""

import itertools

import pytest
import torch
from peft import PeftModel
from rankwise import variants
from rankwise.variants.adapter.linears import module_in, module_out
from rankwise.variants.allocation.measuring import gradients
from rankwise.variants.stable_rank import stable_rank
from torch import Tensor, nn

from tests.contract import TARGETS, attach
from tests.loop import Loop, outputs
from tests.tiny import batch, packed_batch, tiny

METHODS = ("eva", "gora", "fim-lora", "spectral-rank", "stable-rank", "heavy-tail", "random-rank")
EXACT = {"gora": {"rounding": "exact"}}
SEEDS = [5, 3, 8]
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's, of a model without a name


def placed(method: str, **settings) -> variants.Adapter:
    values = {"rank": 3, "alpha": 7.0} | EXACT.get(method, {}) | settings
    members = max(len(v) if isinstance(v, list) else 1 for v in values.values())
    return attach(variants.create(method, members=members, seeds=SEEDS[:members], **values), tiny("bert"), TARGETS)


def table(adapter: variants.Adapter) -> Tensor:
    """(K, sites)."""
    return torch.stack(list(adapter.ranks().values()), 1)


def prices(adapter: variants.Adapter) -> Tensor:
    return torch.tensor([module_in(adapter.base(n)) + module_out(adapter.base(n)) for n, _ in adapter.named_sites()])


def largest_remainder(weights: list[float], budget: int, most: list[int]) -> list[int]:
    """Units one after the other to the site furthest below its exact share; of equal ones to the first."""
    shares = [budget * w / sum(weights) for w in weights]
    ranks = [0] * len(weights)
    for _ in range(budget):
        open_sites = [i for i in range(len(weights)) if ranks[i] < most[i]]
        ranks[max(open_sites, key=lambda i: (shares[i] - ranks[i], -i))] += 1
    return ranks


# -- budgets and bounds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_member_meets_its_own_budget_of_ranks_exactly(method):
    assert table(placed(method, rank=[6, 3, 5])).sum(1).tolist() == [30, 15, 25]
    assert table(placed(method, total_rank=17, rank=4)).sum(1).tolist() == [17]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("told", [{}, {"total_parameters": 1111}, {"total_parameters": 900, "least_rank": 1}])
def test_a_budget_of_parameters_is_never_exceeded_and_missed_by_less_than_the_cheapest_rank(method, told):
    adapter = placed(method, cost="parameters", most_rank=30, **told)
    spent = int((table(adapter) * prices(adapter)).sum())
    assert spent == int(adapter.parameter_counts()["trainable"][0])
    assert 0 <= told.get("total_parameters", 3 * 368) - spent < 64
    assert (table(adapter) >= told.get("least_rank", 0)).all()


@pytest.mark.parametrize("method", METHODS)
def test_bounds_of_sites_and_of_groups_hold(method):
    adapter = placed(
        method,
        rank=[4, 3, 5],
        least_rank=2,
        most_rank=9,
        rank_bounds={"layer.1.output.dense": [0, 1]},
        group_bounds={"query": [6, 7]},
        **({"rho": 4.0} if method == "eva" else {}),
    )
    ranks = {name: rank for name, rank in adapter.ranks().items()}
    narrow = ranks.pop("bert.encoder.layer.1.output.dense")
    assert (narrow <= 1).all()
    assert all((rank >= 2).all() and (rank <= 9).all() for rank in ranks.values())
    queries = sum(rank for name, rank in ranks.items() if name.endswith("query"))
    assert (queries >= 6).all() and (queries <= 7).all()
    assert (narrow + sum(ranks.values())).tolist() == [20, 15, 25]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"least_rank": 4}, "least rank 4 of .* does not fit into the budget of 15 ranks"),
        ({"most_rank": 2}, "leave room for 10 ranks of a budget of 15"),
        ({"total_parameters": 900}, 'total_parameters = 900 has no effect with cost = "rank"'),
        ({"cost": "parameters", "total_rank": 9}, 'total_rank = 9 has no effect with cost = "parameters"'),
        ({"least_rank": 5, "most_rank": 4}, "least rank 5 is above the most rank 4"),
        (
            {"rank_bounds": {"qery": [0, 1]}},
            r'rank_bounds = \{"qery": ...\} matches none of the 5 targets; did you mean "query"',
        ),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    for method in ("stable-rank", "gora"):
        with pytest.raises(ValueError, match=message):
            placed(method, **settings)


# -- the placements ------------------------------------------------------------------------------------------------------------


def test_stable_ranks_are_those_of_the_singular_values_and_ranks_are_in_proportion():
    adapter = placed("stable-rank", rank=[4, 3, 5])
    weights = []
    for name, _ in adapter.named_sites():
        values = torch.linalg.svdvals(adapter.base(name).weight)
        weights.append(float((values**2).sum() / values[0] ** 2))
        assert stable_rank(adapter.base(name).weight) == pytest.approx(weights[-1])
    expected = [largest_remainder(weights, 5 * rank, [32] * 5) for rank in (4, 3, 5)]
    assert table(adapter).tolist() == expected
    assert len(set(expected[2])) > 1
    bounded = placed("stable-rank", rank=5, most_rank=6)
    assert table(bounded)[0].tolist() == largest_remainder(weights, 25, [6] * 5)


def test_shares_cost_their_parameters():
    adapter = placed("stable-rank", rank=4, cost="parameters", total_parameters=3000, most_rank=32)
    weights = torch.tensor([stable_rank(adapter.base(name).weight) for name, _ in adapter.named_sites()], dtype=torch.float64)
    shares = 3000 * weights / (weights * prices(adapter)).sum()
    assert (table(adapter)[0] - shares).abs().max() < 1.5  # the largest remainders, as far as parameters go


def test_a_weight_of_zeros_has_no_stable_rank():
    assert stable_rank(torch.zeros(3, 4)) == 0.0
    assert stable_rank(torch.eye(5)) == pytest.approx(5.0)


def test_random_ranks_are_uniform_over_sites_and_each_seeds_own():
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(5)))
    adapter = variants.create("random-rank", members=400, seeds=list(range(400)), rank=2).attach(model, head=[])
    ranks = table(adapter).double()
    # 10 units, each at one of 5 sites with equal chances: mean 2, variance 10 * 0.2 * 0.8 = 1.6, covariance -0.4.
    assert (ranks.mean(0) - 2).abs().max() < 4 * (1.6 / 400) ** 0.5
    covariance = torch.cov(ranks.T)
    assert covariance.diagonal().mean().item() == pytest.approx(1.6, rel=0.15)
    assert ((covariance.sum() - covariance.diagonal().sum()) / 20).item() == pytest.approx(-0.4, rel=0.15)


def test_random_ranks_do_not_depend_on_the_budget_of_parameters():
    """The price of a rank says how many there are, not where they go."""
    by_rank = table(placed("random-rank", rank=4))[0]
    few = table(placed("random-rank", rank=4, cost="parameters", total_parameters=20 * 80, most_rank=32))[0]
    assert (few >= by_rank).all()  # the same race, run as far or further: no rank costs more than 80


# -- scales and sites without rank ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["random-rank", "gora"])
@pytest.mark.parametrize("scaling, scale_by", [*itertools.product(("alpha/r", "alpha/sqrt(r)"), ("mean rank", "own rank"))])
def test_one_scale_for_all_sites_or_each_by_its_own_rank(method, scaling, scale_by):
    adapter = placed(method, alpha=7.0, rank=4, scaling=scaling, scale_by=scale_by)
    power = 1.0 if scaling == "alpha/r" else 0.5
    for name, scale in adapter.scales().items():
        rank = max(adapter.ranks()[name].item(), 1) if scale_by == "own rank" else 4
        assert scale.item() == pytest.approx(7.0 / rank**power)


def test_the_scale_is_one_for_all_sites_unless_the_paper_says_otherwise():
    assert {m: variants.check(m, {"rank": 3}).scale_by for m in METHODS} == dict.fromkeys(METHODS, "mean rank") | {
        "gora": "own rank"
    }
    assert variants.check("gora", {"rank": 3}).scaling == "alpha/sqrt(r)"


def test_a_pattern_says_what_the_uniform_start_is_and_so_the_budget_and_the_scale():
    adapter = placed("stable-rank", rank=3, rank_pattern={"query": 6}, alpha_pattern={"intermediate.dense": 2.0})
    assert table(adapter).sum() == 3 * 3 + 2 * 6
    scales = {name: scale.item() for name, scale in adapter.scales().items()}
    assert scales["bert.encoder.layer.0.attention.self.query"] == pytest.approx(7 / 6)
    assert scales["bert.encoder.layer.1.intermediate.dense"] == pytest.approx(2 / 3)
    assert scales["bert.encoder.layer.1.output.dense"] == pytest.approx(7 / 3)


EMPTY = {"rank_bounds": {"layer.0.attention.self.query": [0, 0], "layer.1.output.dense": [0, 1]}}


@pytest.mark.parametrize("method, magnitude", [("eva", False), ("gora", False), ("random-rank", True)])
def test_a_site_may_end_without_rank_and_trains_saves_and_loads_so(method, magnitude, tmp_path):
    settings = {"rank": [3, 2, 4], "magnitude": magnitude, "dropout": 0.2} | EMPTY | ({"rho": 3.0} if method == "eva" else {})
    adapter = placed(method, **settings)
    name = "bert.encoder.layer.0.attention.self.query"
    assert adapter.ranks()[name].tolist() == [0, 0, 0] == adapter.nominal_ranks()[name].tolist()
    assert getattr(adapter.site(name), "inner", adapter.site(name)).A.shape == (3, 0, 32)
    loop = Loop(adapter, [1e-2, 3e-3, 2e-2])
    for i in range(3):
        assert loop.step(packed_batch(SEEDS, i)).isfinite().all()
    assert magnitude or (adapter.delta(name) == 0).all()
    adapter.model.eval()
    inputs = packed_batch(SEEDS, 9)
    live = outputs(adapter.model, inputs).unflatten(0, (3, -1))
    adapter.merge(1)
    merged = outputs(adapter.model, inputs).unflatten(0, (3, -1))[1]
    adapter.unmerge()
    torch.testing.assert_close(merged, live[1], rtol=1e-9, atol=1e-10)
    for member, seed in enumerate(SEEDS):
        variants.save_pretrained(adapter, tmp_path / str(member), member=member)
        variants.export_lora(adapter, tmp_path / f"plain-{member}", member=member)
        own = batch(seed, 9)
        loaded = variants.load_pretrained(tiny("bert").eval(), tmp_path / str(member))
        torch.testing.assert_close(outputs(loaded.model, own), live[member], rtol=1e-6, atol=1e-6)
        assert loaded.method == method
        assert {n: r.item() for n, r in loaded.ranks().items()} == {n: r[member].item() for n, r in adapter.ranks().items()}
        assert {n: r.item() for n, r in loaded.nominal_ranks().items()} == {
            n: r[member].item() for n, r in adapter.ranks().items()
        }
        torch.testing.assert_close(
            torch.stack(list(loaded.scales().values())),
            torch.stack([s[member : member + 1] for s in adapter.scales().values()]),
        )
        for folder in (str(member), f"plain-{member}"):
            theirs = PeftModel.from_pretrained(tiny("bert").eval(), tmp_path / folder)
            torch.testing.assert_close(outputs(theirs.eval(), own), live[member], rtol=1e-6, atol=1e-6)


def test_packed_is_alone_with_sites_that_some_members_have_no_rank_at():
    values = {"rank": [3, 2, 4], "alpha": [7.0, 5.0, 3.0]}
    adapter = placed("random-rank", **values)
    assert (table(adapter) == 0).any() and not (table(adapter) == 0).all(0).any()
    loop = Loop(adapter, [1e-2, 3e-3, 2e-2], clip=0.5)
    packed = torch.stack([loop.step(packed_batch(SEEDS, i)) for i in range(4)])
    for k, seed in enumerate(SEEDS):
        single = variants.create("random-rank", seeds=[seed], **{n: v[k] for n, v in values.items()})
        single.attach(tiny("bert"), TARGETS, fresh_head=True)
        mine = Loop(single, [1e-2, 3e-3, 2e-2][k], clip=0.5)
        alone = torch.stack([mine.step(packed_batch([seed], i)) for i in range(4)])
        torch.testing.assert_close(packed[:, k], alone[:, 0], rtol=1e-9, atol=0)


# -- calibration ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["eva", "gora"])
def test_a_method_that_measures_asks_for_what_it_needs_and_leaves_the_model_as_it_was(method):
    model = tiny("bert")
    with pytest.raises(ValueError, match=f"{method} measures .*: give .*Calibration"):
        variants.create(method, rank=2).attach(model, TARGETS)
    assert not any("site" in name for name, _ in model.named_modules())
    adapter = variants.create(method, rank=2).attach(model, TARGETS, calibration=variants.Uncalibrated())
    assert set(table(adapter)[0].tolist()) == {2}
    for _, site in adapter.named_sites():
        assert (site.B == 0).all()


def test_gora_needs_a_loss_for_each_member():
    adapter = variants.create("gora", rank=2, members=2)
    with pytest.raises(ValueError, match="give Calibration\\(batches, loss="):
        adapter.attach(tiny("bert"), TARGETS, calibration=packed_batch([0, 1]))
    wrong = variants.Calibration([packed_batch([0, 1])], lambda b: outputs(adapter.model, b).sum())
    with pytest.raises(ValueError, match=r"shape \(\): give one number for each of 2 members"):
        adapter.attach(tiny("bert"), TARGETS, calibration=wrong)


def test_measuring_leaves_modes_hooks_gradients_and_draws_as_they_were():
    adapter = variants.create("gora", rank=2)
    model = tiny("bert").eval()
    model.bert.encoder.layer[0].train()
    modes = {name: module.training for name, module in model.named_modules()}
    attach(adapter, model, TARGETS)
    for name, training in modes.items():
        assert model.get_submodule(name).training == training, name
    assert not any(m._forward_hooks or m._forward_pre_hooks for n, m in model.named_modules() if n)
    assert all(p.grad is None for p in [*model.parameters(), *adapter.parameters()])
    assert adapter.draw.step is None and not adapter.draw.calls


@pytest.mark.parametrize("name, targets", [("bert", TARGETS), ("gpt2", ["c_attn", "mlp.c_proj"]), ("albert", ["query", "ffn"])])
def test_one_backward_pass_gives_every_members_gradient(name, targets):
    """Autograd through the model itself, one member after the other, its weights not frozen; dropout off."""
    model = tiny(name)
    for module in model.modules():
        if type(module).__name__ == "Dropout":
            module.p = 0.0
    adapter = variants.create("gora", members=3, seeds=SEEDS, rank=2)
    attach(adapter, model, targets)  # for its heads
    heads = {n: [p[k].detach().clone() for k in range(3)] for n, p in adapter.heads.named_parameters()}
    names = [n for n, _ in adapter.named_sites()]
    adapter.detach()
    kept: dict[str, Tensor] = {}
    place = adapter.place

    def spy(found, calibration):
        kept.update(gradients(adapter, found, calibration))
        return place(found, calibration)

    adapter.place = spy
    attach(adapter, model, targets)
    adapter.detach()
    for k, seed in enumerate(SEEDS):
        plain = tiny(name)
        for module in plain.modules():
            if type(module).__name__ == "Dropout":
                module.p = 0.0
        head = "score" if name == "gpt2" else "classifier"
        with torch.no_grad():
            for key, values in heads.items():
                getattr(plain.get_submodule(head), key.rpartition(".")[2]).copy_(values[k])
        plain.train()
        for i in range(3):
            own = batch(seed, 1000 + i)
            (torch.nn.functional.cross_entropy(outputs(plain, own), own["labels"]) / 3).backward()
        for site in names:
            weight = plain.get_submodule(site).weight
            expected = weight.grad.T if name == "gpt2" else weight.grad
            torch.testing.assert_close(kept[site][k], expected, rtol=1e-9, atol=1e-12)
