"""LoRA against a dense plain version: W + s B A, member by member, in float64."""

import math

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.linears import weight_of
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from torch import Tensor, nn

from tests.contract import SEEDS
from tests.loop import Loop, outputs, task_losses
from tests.tiny import TINY, packed_batch, tiny

RANKS, ALPHAS = [5, 3, 4], [7.0, 2.0, 11.0]


def plain(weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, rank: int, alpha: float, x: Tensor) -> Tensor:
    """y = W x + (alpha/r) B A x + b, one output at a time."""
    changed = weight.clone()
    for o in range(weight.shape[0]):
        for r in range(rank):
            changed[o] += alpha / rank * B[o, r] * A[r]
    y = x @ changed.mT
    return y if bias is None else y + bias


@pytest.mark.parametrize("model, name", [("bert", "intermediate.dense"), ("gpt2", "h.1.mlp.c_fc"), ("llama", "down_proj")])
def test_a_site_is_the_plain_version_for_each_member(model, name):
    adapter = variants.create("lora", members=3, seeds=SEEDS, rank=RANKS, alpha=ALPHAS).attach(tiny(model).eval(), [name])
    fill(adapter)
    for full_name, site in adapter.named_sites():
        base = adapter.base(full_name)
        weight = weight_of(base)
        assert weight.shape[0] != weight.shape[1] and base.bias is not None
        x = torch.randn(3, 4, 6, weight.shape[1], dtype=torch.float64)
        found = site(base, x.flatten(0, 1)).unflatten(0, (3, 4))
        for k in range(3):
            expected = plain(weight, base.bias, site.A[k], site.B[k], RANKS[k], ALPHAS[k], x[k])
            torch.testing.assert_close(found[k], expected, rtol=1e-10, atol=1e-12)
            delta = plain(weight, None, site.A[k], site.B[k], RANKS[k], ALPHAS[k], torch.eye(weight.shape[1]).double()).mT
            torch.testing.assert_close(adapter.delta(full_name)[k], delta - weight, rtol=1e-8, atol=1e-12)


def test_training_is_the_plain_versions():
    """20 steps of the dense version of one member, with torch's own AdamW and clipping, give the same losses."""
    adapter = variants.create("lora", rank=3, alpha=7, seeds=[4]).attach(tiny("bert").eval(), ["query", "output.dense"])
    model = tiny("bert").eval()
    factors = {}
    for name, site in adapter.named_sites():
        A, B = (nn.Parameter(t.detach()[0].clone()) for t in (site.A, site.B))
        factors[name] = (A, B, model.get_submodule(name).weight.detach().clone())
    head = {n: nn.Parameter(p.detach()[0].clone()) for n, p in adapter.heads["classifier"].named_parameters()}
    trained = [t for A, B, _ in factors.values() for t in (A, B)]
    groups = [{"params": [*trained, head["weight"]]}, {"params": [head["bias"]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.01)
    loop = Loop(adapter, 1e-2, clip=0.7)
    clipped = 0
    for i in range(20):
        weights = {f"{n}.weight": W + 7 / 3 * B @ A for n, (A, B, W) in factors.items()}
        weights |= {f"classifier.{n}": p for n, p in head.items()}
        inputs = packed_batch([4], i)
        labels = inputs["labels"]
        logits = torch.func.functional_call(model, weights, kwargs={k: v for k, v in inputs.items() if k != "labels"}).logits
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        clipped += nn.utils.clip_grad_norm_([*trained, *head.values()], 0.7) > 0.7
        optimizer.step()
        torch.testing.assert_close(
            loop.step(inputs), loss.detach()[None], rtol=1e-7, atol=0
        )  # torch clips to 0.7 / (norm + 1e-6)
    assert clipped > 0


def test_alpha_over_the_square_root_of_r_is_rslora():
    adapter = variants.create("lora", rank=[4, 9], alpha=6, members=2, scaling="alpha/sqrt(r)").attach(tiny("bert"), ["query"])
    for scale in adapter.scales().values():
        torch.testing.assert_close(scale, torch.tensor([3.0, 2.0], dtype=torch.float64))


def test_patterns_give_single_sites_other_ranks_and_alphas():
    adapter = variants.create(
        "lora", rank=[4, 6], alpha=8, members=2, rank_pattern={"query": 3, r"layer\.1\..*dense": 2}, alpha_pattern={"key": 5.0}
    ).attach(tiny("bert"))
    ranks = {name: rank.tolist() for name, rank in adapter.ranks().items()}
    assert ranks["bert.encoder.layer.0.attention.self.query"] == [3, 3]
    assert ranks["bert.encoder.layer.0.output.dense"] == [4, 6]
    assert ranks["bert.encoder.layer.1.output.dense"] == [2, 2]
    scales = {name: scale.tolist() for name, scale in adapter.scales().items()}
    assert scales["bert.encoder.layer.0.attention.self.key"] == [5 / 4, 5 / 6]
    assert scales["bert.encoder.layer.0.attention.self.query"] == [8 / 3, 8 / 3]


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_target_is_refused_with_the_nearest_name(setting):
    adapter = variants.create("lora", rank=4, **{setting: {"qery": 2}})
    with pytest.raises(ValueError, match=rf'{setting} = {{"qery": ...}} matches none of the .*did you mean "query"'):
        adapter.attach(tiny("bert"))


def test_a_starts_in_kaimings_range_and_b_at_zero():
    adapter = variants.create("lora", rank=20, members=3).attach(tiny("bert"))
    for name, site in adapter.named_sites():
        bound = 1 / math.sqrt(adapter.base(name).in_features)
        assert site.A.abs().max() <= bound and site.A.abs().max() > 0.9 * bound
        assert not site.B.any()
        assert not torch.equal(site.A[0], site.A[1])


def test_the_gaussian_start_has_the_spread_one_over_r():
    adapter = variants.create("lora", rank=5, members=3, initialization="gaussian").attach(tiny("bert"))
    values = torch.cat([site.A.flatten() for _, site in adapter.named_sites()])
    assert abs(values.std().item() * 5 - 1) < 0.05 and abs(values.mean().item()) < 0.01


def test_a_members_start_does_not_depend_on_its_rank_or_its_neighbours():
    packed = variants.create("lora", rank=[2, 6], seeds=[3, 9], members=2).attach(tiny("bert"))
    single = variants.create("lora", rank=6, seeds=[9]).attach(tiny("bert"))
    for name, site in single.named_sites():
        assert torch.equal(packed.site(name).A[1], site.A[0])
        assert not packed.site(name).A[0, 2:].any()


def test_slots_that_do_not_exist_stay_zero_and_have_no_effect():
    adapter = variants.create("lora", rank=[2, 6], members=2, alpha=5).attach(tiny("bert"))
    loop = Loop(adapter)
    for i in range(3):
        loop.step(packed_batch([0, 1], i))
    for _, site in adapter.named_sites():
        assert not site.A[0, 2:].any() and not site.B[0, :, 2:].any()
        assert site.B[0, :, :2].any()
    before = outputs(adapter.model.eval(), packed_batch([0, 1]))
    with torch.no_grad():
        for _, site in adapter.named_sites():
            site.A[0, 2:], site.B[0, :, 2:] = 3.0, -2.0
    assert torch.equal(outputs(adapter.model, packed_batch([0, 1])), before)


def test_lr_ratio_makes_b_faster_and_nothing_else():
    slow, fast = (variants.create("lora", rank=3, lr_ratio=ratio).attach(tiny("bert")) for ratio in (1.0, 4.0))
    starts = [{n: p.detach().clone() for n, p in a.named_parameters()} for a in (slow, fast)]
    for adapter in (slow, fast):
        Loop(adapter, weight_decay=0.0).step(packed_batch([0]))
    for name, value in fast.named_parameters():
        moved = value - starts[1][name]
        ratio = 4 if name.endswith(".B") else 1
        torch.testing.assert_close(
            moved, ratio * (dict(slow.named_parameters())[name] - starts[0][name]), rtol=1e-9, atol=1e-15
        )


def test_biases_do_not_decay():
    adapter = variants.create("dora", rank=3).attach(tiny("bert"))
    names = {id(p): n for n, p in adapter.named_parameters()}
    plain_names = {names[id(p)].rpartition(".")[2] for g in adapter.parameter_groups() if g.weight_decay == 0 for p in g.params}
    assert plain_names == {"bias", "magnitude"}


def test_adapter_dropout_acts_on_the_low_rank_branch_alone():
    adapter = variants.create("lora", rank=4, dropout=0.5).attach(tiny("bert"), ["query"])
    name, site = next(adapter.named_sites())
    base, x = adapter.base(name), torch.randn(5, 6, 32, dtype=torch.float64)
    adapter.begin(Step(1, 10))
    torch.testing.assert_close(site(base, x), base(x))  # B is zero
    fill(adapter)
    site.train()
    dropped = site(base, x)
    site.eval()
    assert not torch.allclose(dropped, site(base, x))


@pytest.mark.parametrize("members", [1, 3])
def test_16_bit_bases_train_in_fp32(members):
    adapter = variants.create("lora", rank=3, members=members).attach(tiny("bert", torch.bfloat16))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    loss = task_losses(adapter, packed_batch(list(range(members))))
    loss.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter.parameters())


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", TINY)
def test_a_merged_member_is_that_member_on_every_tiny_model(name, method):
    adapter = variants.create(method, rank=[2, 3], members=2, alpha=[5.0, 7.0]).attach(tiny(name).eval(), TINY[name].targets)
    fill(adapter)
    inputs = packed_batch([0, 1])
    live = outputs(adapter.model, inputs)
    adapter.merge(1)
    torch.testing.assert_close(outputs(adapter.model, inputs)[4:], live[4:], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(outputs(adapter.model, inputs)[:4], live[:4])
    adapter.unmerge()
    assert torch.equal(outputs(adapter.model, inputs), live)


def test_merging_into_a_tied_weight_is_refused_and_changes_nothing():
    model = tiny("bert")
    layers = model.bert.encoder.layer
    layers[1].attention.self.query.weight = layers[0].attention.self.query.weight
    adapter = variants.create("lora", rank=2).attach(model, ["query", "value"])
    fill(adapter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"tied to .*query.*untie it first"):
        adapter.merge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not adapter.is_merged


def test_a_member_that_does_not_exist_is_not_merged():
    adapter = variants.create("lora", rank=2, members=2).attach(tiny("bert"), ["query"])
    for member in (2, -1):
        with pytest.raises(ValueError, match=rf"member = {member}: there are 2"):
            adapter.merge(member)
    adapter.merge(1)
    with pytest.raises(ValueError, match="merged already"):
        adapter.merge(0)


def test_an_interrupted_merge_leaves_the_model_as_it_was():
    class Interrupting(list):
        def append(self, item):
            if len(self) == 3:
                raise KeyboardInterrupt
            super().append(item)

    model = tiny("bert")
    adapter = variants.create("lora", rank=2).attach(model)
    fill(adapter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter._surgery.kept = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        adapter.merge()
    assert not adapter.is_merged and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    adapter._surgery.kept = []
    adapter.merge()
    adapter.detach()
    assert all(torch.equal(value, before[name]) for name, value in tiny("bert").state_dict().items() if name in before)
    assert all(torch.equal(v, tiny("bert").state_dict()[n]) for n, v in model.state_dict().items())
