"""Experts in one parameter: the updates of all experts are PEFT's of the parameter, in every layout, and members are packed."""

import copy
from itertools import product

import pytest
import torch
from rankwise import variants
from rankwise.reports.ranks.sites import module_labels, split_site
from rankwise.variants.adapter import experts
from rankwise.variants.adapter.probe import fill
from rankwise.variants.doctor import reading as doctor
from rankwise.variants.files.peft.config import PeftConfig
from rankwise.variants.settings import METHODS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.loop import Loop
from tests.mixtures import NAMES, TARGETS, in_one_type, made, tokens
from tests.tiers import quick

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
EXACT = {"rtol": 1e-9, "atol": 1e-12}
RANK, ALPHA = 3, 5


def adapted(model: nn.Module, targets: list[str] = TARGETS, method: str = "lora", **settings) -> variants.Adapter:
    settings = {"rank": RANK, "alpha": ALPHA} | settings
    adapter = variants.create(method, **settings).attach(model, targets, head=[])
    fill(adapter)
    return adapter


def ranks_of(adapter: variants.Adapter, layer: int) -> dict[str, int]:
    """Those of the experts of a layer."""
    return {n: int(rank) for n, rank in adapter.ranks().items() if f".{layer}." in n and ".experts." in n}


def logits(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    return model(**(batch or tokens())).logits


def stacked(adapter: variants.Adapter, stack: str, factor: str, of_gradient: bool) -> Tensor:
    """PEFT's tensor of a parameter out of the sites': A (E r, I), B (O, r E)."""
    sites = [getattr(site, factor) for name, site in adapter.named_sites() if experts.stack_of(name) == stack]
    parts = [(tensor.grad if of_gradient else tensor.detach())[0] for tensor in sites]
    return torch.cat(parts) if factor == "A" else torch.stack(parts, -1).flatten(1)


# -- PEFT as the oracle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(NAMES, ["mixtral", "gpt_oss"]))
def test_outputs_and_gradients_are_pefts(name, tmp_path):
    model = made(name)
    bare = copy.deepcopy(model)
    adapter = adapted(model)
    variants.save_pretrained(adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(bare, tmp_path, is_trainable=True)
    outputs = [logits(model), logits(theirs)]
    torch.testing.assert_close(*outputs, **EXACT)
    assert (outputs[0] - logits(made(name))).abs().max() > 1e-2
    for y in outputs:
        y.square().mean().backward()
    wrappers = {n: m for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.layer.ParamWrapper)}
    assert len(wrappers) == 4
    is_swapped = name == "llama4"
    for wrapper_name, wrapper in wrappers.items():
        place = wrapper_name.removeprefix("base_model.model.").replace(".base_layer", "")
        stack = f"{place}.{wrapper.parameter_name}"
        for factor, other in (("A", "B"), ("B", "A")):
            found = stacked(adapter, stack, other if is_swapped else factor, of_gradient=True)
            if is_swapped:  # their A is our B^T
                E = wrapper.num_experts
                found = found.unflatten(1, (RANK, E)).permute(2, 1, 0).flatten(0, 1) if other == "B" else (
                    found.unflatten(0, (E, RANK)).permute(2, 1, 0).flatten(1)
                )  # fmt: skip
            layer = getattr(wrapper, f"lora_{factor}")["default"].weight
            assert layer.grad.abs().max() > 0
            torch.testing.assert_close(found, layer.grad, **EXACT)


@pytest.mark.parametrize("name", quick(NAMES, ["gpt_oss", "llama4"]))
def test_a_file_of_pefts_has_the_same_outputs_here(name, tmp_path):
    model = made(name)
    others = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {r"layers\.1\..*down_proj": 3}}
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[:1], target_parameters=TARGETS[1:], **others)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in (p for n, p in theirs.named_parameters() if "lora_" in n):
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    adapter = variants.load_pretrained(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), **EXACT)
    ranks = {site.rpartition(".")[0].rpartition(".")[2]: int(rank) for site, rank in adapter.ranks().items()}
    assert ranks["down_proj"] == 2 and ranks["gate_up_proj"] == RANK
    examined = {
        (site.name, site.rank, site.scale)
        for site in doctor.read(tmp_path).sites
        if ".1.mlp" in site.name or ".1.feed" in site.name
    }
    counts = {name.rpartition("[")[0].rpartition(".")[2]: (rank, scale) for name, rank, scale in examined}
    assert counts == {"experts": (2, 3 / 2), "base_layer": (RANK, ALPHA / RANK)} and len(examined) == len(ranks_of(adapter, 1))
    variants.save_pretrained(adapter, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(made(name), tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(theirs), **EXACT)


def test_some_experts_and_unequal_ranks_are_filled_with_zeros_in_pefts_file(tmp_path):
    model, targets = made("qwen3_moe"), ["experts.down_proj.1", "experts.down_proj.3", "experts.gate_up_proj"]
    patterns = {r"layers\.0\..*experts\.gate_up_proj\.2": 1, r"experts\.down_proj\.3": 5}
    adapter = adapted(model, targets, rank_pattern=patterns, alpha_pattern={r"experts\.gate_up_proj\.4": 7})
    assert len(adapter.ranks()) == 2 * (5 + 2)
    variants.save_pretrained(adapter, tmp_path)
    outputs, ranks = logits(model), {name: int(rank) for name, rank in adapter.ranks().items()}
    theirs = peft.PeftModel.from_pretrained(made("qwen3_moe"), tmp_path)
    torch.testing.assert_close(logits(theirs), outputs, **EXACT)
    adapter.detach()
    again = variants.load_pretrained(model, tmp_path)
    assert {name: int(rank) for name, rank in again.ranks().items()} == ranks and again.targets == targets
    torch.testing.assert_close(logits(model), outputs, **EXACT)


# -- the forward pass --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(NAMES, ["gpt_oss"]))
def test_the_start_is_the_model_and_detaching_restores_it(name):
    model = made(name)
    before, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    adapter = variants.create("lora", rank=2).attach(model, TARGETS, head=[])
    torch.testing.assert_close(logits(model), before, **EXACT)
    adapter.detach()
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[key], state[key]) for key in state)
    assert torch.equal(logits(model), before) and not any(isinstance(m, experts.Stack) for m in model.modules())


@pytest.mark.parametrize(
    ("name", "implementation"),
    quick(product(["mixtral", "gpt_oss"], ["eager", "batched_mm", "grouped_mm"]), [("mixtral", "grouped_mm")]),
)
def test_the_update_acts_whichever_implementation_the_model_has(name, implementation):
    model = made(name, torch.float32)
    model.config._experts_implementation = implementation
    before = logits(model)
    adapter = adapted(model, TARGETS[1:])
    after = logits(model)
    assert (after - before).abs().max() > 1e-2
    adapter.merge()
    torch.testing.assert_close(logits(model), after, rtol=1e-4, atol=1e-4)
    merged = experts.merged(model)
    adapter.detach()
    with torch.no_grad():  # the model's own forward pass, with W + dW in it
        for key, value in merged.items():
            model.get_parameter(key).copy_(value)
    torch.testing.assert_close(logits(model), after, rtol=1e-4, atol=1e-4)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, t.numel())
        return result


def test_no_expert_s_change_is_made_in_full():
    module = made("mixtral").model.layers[0].mlp.experts
    host = nn.ModuleDict({"experts": module})
    host.forward = module.__call__
    variants.create("lora", rank=1).attach(host, "experts", head=[])
    x, index = torch.randn(3, 16, dtype=torch.float64), torch.tensor([[0, 1], [1, 3], [0, 3]])
    with Largest() as largest:
        module(x, index, torch.full((3, 2), 0.5, dtype=torch.float64)).sum().backward()
    assert largest.elements < 16 * 12, "as large as the smallest of an expert's matrices"


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    model = made("mixtral")
    adapter = adapted(model, TARGETS[1:])
    module = model.model.layers[1].mlp.experts
    index, weights = torch.tensor([[0, 1], [1, 3], [0, 3]]), torch.full((3, 2), 0.5, dtype=torch.float64)
    module(torch.randn(3, 16, dtype=torch.float64), index, weights).square().sum().backward()
    for name, site in adapter.named_sites():
        if "layers.1." in name:
            norms = [tensor.grad.abs().max().item() for tensor in (site.A, site.B)]
            assert (norms == [0, 0]) if name.endswith(".2") else min(norms) > 0, name
        else:
            assert site.A.grad is None


def test_without_values_experts_count_as_equally_used():
    """As `rankwise plan` runs a step; five pairs of a token and an expert."""
    module = made("mixtral").model.layers[0].mlp.experts
    host = nn.ModuleDict({"experts": module})
    variants.create("lora", rank=1).attach(host, "experts", head=[])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, index, weights = torch.randn(3, 16, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2)
        assert module(x, index, weights.double()).shape == (3, 16)
        assert experts.numbers(mode.from_tensor(torch.zeros(10, dtype=torch.long)), 4, 2) == [[2, 2], [1, 1], [1, 1], [1, 1]]
    assert experts.numbers(torch.tensor([0, 5, 5, 8]), 4, 2) == [[1, 0], [0, 0], [0, 2], [0, 0]]  # 8: a token of no expert


def test_a_rank_map_has_a_column_for_each_expert():
    names = [f"model.layers.{layer}.mlp.experts.{part}.{e}" for layer in (0, 11) for part in ("up", "down") for e in (0, 1)]
    assert [split_site(name)[1] for name in names] == [0] * 4 + [11] * 4
    assert list(module_labels(names).values())[:4] == ["up.0", "up.1", "down.0", "down.1"]


# -- packing, methods, ranks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(NAMES[:3], ["mixtral"]))  # Llama 4 computes parts in float32
def test_packed_members_are_members_alone(name):
    """Outputs and gradients; the members' tokens go to experts in other numbers."""
    ranks, alphas = [2, 3, 1], [7.0, 2.0, 5.0]
    model = made(name)
    packed = variants.create("lora", members=3, rank=ranks, alpha=alphas).attach(model, TARGETS, head=[])
    fill(packed)
    batches = [tokens(k, rows=2)["input_ids"] for k in range(3)]
    together = logits(model, {"input_ids": torch.cat(batches)})
    together.square().mean((1, 2)).sum().backward()
    for k in range(3):
        alone = packed.alone(k)
        own = made(name)
        alone.attach(own, TARGETS, head=[])
        alone.copy_member(packed, k)
        apart = logits(own, {"input_ids": batches[k]})
        torch.testing.assert_close(together[2 * k : 2 * k + 2], apart, **EXACT)
        apart.square().mean((1, 2)).sum().backward()
        for (site_name, one), (_, other) in zip(packed.named_sites(), alone.named_sites(), strict=True):
            r = ranks[k]
            torch.testing.assert_close(one.A.grad[k, :r], other.A.grad[0], **EXACT, msg=site_name)
            torch.testing.assert_close(one.B.grad[k, :, :r], other.B.grad[0], **EXACT, msg=site_name)


@pytest.mark.parametrize("method", quick([n for n, m in METHODS.items() if m.takes_targets], ["gora", "vera"]))
def test_every_method_acts_at_experts_or_is_refused_in_one_line(method, tmp_path):
    """With K = 2 the attach itself tries packed = alone in float64 (adapter/probe.py)."""
    settings = {k: 2 for k, field in METHODS[method].settings.model_fields.items() if field.is_required()}
    model = made("mixtral")
    batch = {"input_ids": torch.cat([tokens(k, rows=3)["input_ids"] for k in range(2)])}

    def loss(batch: dict[str, Tensor]) -> Tensor:
        return logits(model, batch).square().mean((1, 2)).view(2, -1).mean(1)

    adapter = variants.create(method, members=2, **settings)
    try:
        adapter.attach(model, TARGETS[1:], head=[], calibration=variants.Calibration([batch], loss))
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and "leave the experts out of targets" in str(error), error
        assert method in ("dora", "adalora+dora", "dynamic-dora", "pissa", "olora", "vera", "ia3") or "+dora" in method, error
        return
    Loop(adapter, 1e-2, 4, losses=lambda adapter, batch: loss(batch)).step(batch)
    outputs = logits(model, tokens(1, rows=4))
    variants.save_pretrained(adapter, tmp_path, member=1)
    adapter.detach()
    own = made("mixtral")
    variants.load_pretrained(own, tmp_path)
    torch.testing.assert_close(
        logits(own, {"input_ids": tokens(1, rows=4)["input_ids"][2:]}), outputs[2:], rtol=1e-5, atol=1e-6
    )
    theirs = peft.PeftModel.from_pretrained(made("mixtral"), tmp_path)
    torch.testing.assert_close(
        logits(theirs, {"input_ids": tokens(1, rows=4)["input_ids"][2:]}), outputs[2:], rtol=1e-5, atol=1e-6
    )


def allocating(model: nn.Module) -> Loop:
    settings = {"initial_rank": 3, "target_rank": 1, "warmup_steps": 1, "final_steps": 2, "interval": 1}
    adapter = variants.create("adalora", **settings).attach(model, ["experts.down_proj"], head=[])
    return Loop(adapter, 1e-1, 8, losses=lambda adapter, batch: logits(adapter.model, batch).square().mean()[None])


def test_a_stopped_run_goes_on_as_it_would_have():
    loop = allocating(made("mixtral"))
    for step in range(4):
        loop.step(tokens(step))
    state = loop.state()
    expected = [loop.step(tokens(step)).item() for step in range(4, 8)]
    again = allocating(made("mixtral"))
    again.load(state)
    assert [again.step(tokens(step)).item() for step in range(4, 8)] == expected
    assert {n: int(r) for n, r in again.adapter.ranks().items()} == {n: int(r) for n, r in loop.adapter.ranks().items()}


def test_a_bank_refuses_them_as_their_tokens_are_of_many_rows(tmp_path):
    adapter = adapted(made("mixtral"))
    variants.save_pretrained(adapter, tmp_path)
    with pytest.raises(ValueError, match="it changes experts, whose tokens are of many rows"):
        variants.Bank(made("mixtral")).load("one", tmp_path)


def test_ranks_move_between_experts_within_the_budget_and_files_keep_them(tmp_path):
    model = made("mixtral")
    loop = allocating(model)
    adapter = loop.adapter
    for step in range(8):
        loop.step(tokens(step))
    ranks = {name: int(rank) for name, rank in adapter.ranks().items()}
    assert sum(ranks.values()) == 8 and len(ranks) == 8 and len(set(ranks.values())) > 1
    outputs = logits(model)
    variants.save_pretrained(adapter, tmp_path)
    adapter.detach()
    again = variants.load_pretrained(model, tmp_path)
    assert {name: int(rank) for name, rank in again.ranks().items()} == ranks
    torch.testing.assert_close(logits(model), outputs, **EXACT)
    theirs = peft.PeftModel.from_pretrained(made("mixtral"), tmp_path)
    torch.testing.assert_close(logits(theirs), outputs, rtol=1e-5, atol=1e-6)


def test_a_cut_a_knock_out_and_a_merge_are_of_each_expert(tmp_path):
    model = made("gpt_oss")
    adapter = adapted(model, TARGETS[1:])
    variants.truncate(adapter, total_rank=20)
    ranks = [int(rank) for rank in adapter.ranks().values()]
    assert sum(ranks) == 20 and len(ranks) == 16 and len(set(ranks)) > 1
    outputs, (site, *_) = logits(model), [name for name, rank in adapter.ranks().items() if int(rank)]
    with adapter.without(site):
        without = logits(model)
    assert not torch.allclose(without, outputs)
    delta = adapter.delta(site)[0]
    variants.export_merged(adapter, tmp_path)
    adapter.merge()
    with adapter.without(site):
        torch.testing.assert_close(logits(model), without, **EXACT)
    adapter.detach()
    stack, index = experts.stack_of(site), int(site.rpartition(".")[2])
    whole = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    change = whole.get_parameter(stack)[index] - model.get_parameter(stack)[index]
    torch.testing.assert_close(change, delta.mT, **EXACT)  # GPT-OSS stores (I, O)
    torch.testing.assert_close(logits(in_one_type(whole)), outputs, **EXACT)


# -- what a target means -----------------------------------------------------------------------------------------------


def chosen(targets: str | list[str], **settings) -> list[str]:
    return list(variants.create("lora", rank=1, **settings).attach(made("qwen3_moe"), targets, head=[]).ranks())


def test_a_target_means_experts_where_it_names_their_module():
    assert len(chosen("experts")) == 2 * 2 * 5
    assert chosen([r".*layers\.1\.mlp\.experts\.down_proj\.[02]"]) == [
        f"model.layers.1.mlp.experts.down_proj.{e}" for e in (0, 2)
    ]
    assert not any("experts" in name for name in chosen("all-linear"))
    assert len(chosen(["all-linear", "experts"])) == len(chosen("all-linear")) + 20


@pytest.mark.parametrize(
    ("targets", "settings", "message"),
    [
        (["down_proj"], {}, 'means linears, and .* holds experts: name their module too, "experts.down_proj"'),
        (["experts"], {"dropout": 0.1}, "dropout = 0.1 cannot act there, in PEFT either: make it 0; or leave the experts out"),
        (["experts"], {"magnitude": True}, "PEFT has no form of lora with magnitude there"),
        (["experts.gate_proj"], {}, "matches no module"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(targets, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        chosen(targets, **settings)
    assert len(str(error.value).splitlines()) == 1


def test_weights_in_a_module_of_another_form_are_refused():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.randn(3, 4, 5))

    with pytest.raises(ValueError, match=r"matches experts\.weights, weights in a Strange whose forward pass is not known"):
        variants.create("lora", rank=1).attach(nn.ModuleDict({"experts": Strange()}), ["experts.weights"], head=[])


def test_a_file_of_other_parameters_is_refused(tmp_path):
    model = made("mixtral")
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.gate.weight"])
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"target_parameters = .* means .*mlp.gate.weight, which is no stack"):
        variants.load_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="target_parameters of an ADALORA"):
        PeftConfig.read({"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 2, "target_parameters": ["experts.down_proj"]})
