"""DoRA against a dense plain version."""

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.linears import weight_of
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from rankwise.variants.lowrank import magnitude
from rankwise.variants.lowrank.magnitude import Recomposed
from rankwise.variants.lowrank.products import squared_row_norms
from torch import Tensor, nn

from tests.loop import Loop
from tests.tiny import packed_batch, tiny


def plain(site: nn.Module, base: nn.Module, x: Tensor) -> Tensor:
    """m / |W + dW| * (W x + dW x) + b, dense, member by member; |W + dW| is held constant in the backward pass."""
    weight, inner, outputs = weight_of(base), site.inner, []
    for k, rows in enumerate(x.chunk(inner.A.shape[0])):
        e = inner.E[k] if hasattr(inner, "E") else torch.ones_like(inner.slots[k])
        V = weight + inner.scale[k] * inner.B[k] @ torch.diag(inner.slots[k] * e) @ inner.A[k]
        norm = torch.stack([row.norm() for row in V]).detach()
        y = rows @ (torch.diag(site.magnitude[k] / norm) @ V).mT
        outputs.append(y if base.bias is None else y + base.bias)
    return torch.cat(outputs)


def pair(name: str = "bert", target: str = "intermediate.dense", **others) -> tuple["variants.DoRA", nn.Module, nn.Module]:
    """A filled DoRA of three members on one module that is not square, that module's site and its base."""
    settings = {"members": 3, "rank": [5, 3, 4], "alpha": [7.0, 2.0, 11.0]} | others
    adapter = variants.create("dora", **settings).attach(tiny(name).eval(), [target])
    fill(adapter)
    full_name, site = next(adapter.named_sites())
    return adapter, site, adapter.base(full_name)


@pytest.mark.parametrize("name, target", [("bert", "intermediate.dense"), ("gpt2", "c_fc"), ("llama", "down_proj")])
def test_a_site_is_the_plain_version_forward_and_backward(name, target):
    _, site, base = pair(name, target)
    weight = weight_of(base)
    assert weight.shape[0] != weight.shape[1] and base.bias is not None
    x = torch.randn(6, 4, weight.shape[1], dtype=torch.float64, requires_grad=True)
    toward = torch.randn(6, 4, weight.shape[0], dtype=torch.float64)
    tensors = [x, site.magnitude, site.inner.A, site.inner.B]
    found, expected = site(base, x), plain(site, base, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad((y * toward).sum(), tensors) for y in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_the_norm_is_held_constant_in_the_backward_pass():
    """dL/dV = m/|V| dL/dW' without the projection that a norm with a gradient would add (Liu et al. sec. 4.3)."""
    _, site, base = pair(members=1, rank=4, alpha=8.0)
    x = torch.eye(base.in_features, dtype=torch.float64)
    toward = torch.randn(base.in_features, base.out_features, dtype=torch.float64)
    (found,) = torch.autograd.grad((site(base, x) * toward).sum(), site.inner.B)
    V = base.weight + 2 * site.inner.B[0] @ site.inner.A[0]
    gain = (site.magnitude[0] / V.norm(dim=1)).detach()
    torch.testing.assert_close(found[0], 2 * gain[:, None] * (toward.mT @ site.inner.A[0].mT), rtol=1e-9, atol=1e-12)
    exact = (site.magnitude[0] / V.norm(dim=1))[:, None] * V
    (full,) = torch.autograd.grad((x @ exact.mT * toward).sum(), site.inner.B)
    assert not torch.allclose(found, full, rtol=1e-2)


def test_the_thin_product_norm_is_the_dense_norm_in_float64_and_float32():
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        W, A, B = torch.randn(9, 7).to(dtype), torch.randn(3, 4, 7).to(dtype), torch.randn(3, 9, 4).to(dtype)
        thin = squared_row_norms(W, W.square().sum(1), A, B)
        for k in range(3):
            for o in range(9):
                dense = sum((W[o, i] + sum(B[k, o, r] * A[k, r, i] for r in range(4))) ** 2 for i in range(7))
                torch.testing.assert_close(thin[k, o], dense, rtol=tolerance, atol=0)


def test_a_norm_that_cancels_to_zero_is_not_nan():
    W = torch.randn(5, 6)
    thin = squared_row_norms(W, W.square().sum(1), W[None], -torch.eye(5)[None])
    assert (thin >= 0).all() and thin.max() < 1e-4


def test_the_bias_is_not_scaled():
    adapter, site, base = pair(members=1, rank=3, alpha=6.0)
    adapter.begin(Step(1, 10))
    x = torch.randn(5, base.in_features, dtype=torch.float64)
    before = site(base, x) - base.bias
    with torch.no_grad():
        site.magnitude.mul_(3)
    torch.testing.assert_close(site(base, x), 3 * before + base.bias, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method, ranks", [("dora", {"rank": 4}), ("adalora+dora", {"initial_rank": 4, "target_rank": 3})])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_zero_row_is_finite_at_once_and_trained_later(method, ranks, dtype):
    model = tiny("bert", dtype)
    dense = model.bert.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        dense.weight[[0, 5]] = 0
    inputs = {key: value for key, value in packed_batch([0]).items() if key != "labels"}
    before = model.eval().bert(**inputs).last_hidden_state
    adapter = variants.create(method, **ranks).attach(model)
    torch.testing.assert_close(model.bert(**inputs).last_hidden_state, before)
    model.train()
    loop = Loop(adapter, 1e-2, total=6)
    for i in range(6):
        assert loop.step(packed_batch([0], i)).isfinite().all()
    site = adapter.site("bert.encoder.layer.0.intermediate.dense")
    assert all(p.isfinite().all() for p in adapter.parameters())
    assert site.magnitude[0, [0, 5]].all() and site.inner.B[0, [0, 5]].any()


def test_the_norm_follows_the_parameters_within_a_step():
    """Where a trainer says which step it is the norm is kept; it must not outlive the tensors that it came from."""
    adapter, site, base = pair()
    x = torch.randn(6, base.in_features, dtype=torch.float64)
    adapter.begin(Step(1, 10))
    first = site(base, x)
    with torch.no_grad():
        site.inner.B.mul_(5)
    second = site(base, x)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, plain(site, base, x), rtol=1e-10, atol=1e-12)
    adapter.load_state_dict({name: value * 0.5 for name, value in adapter.state_dict().items()})
    torch.testing.assert_close(site(base, x), plain(site, base, x), rtol=1e-10, atol=1e-12)


def test_the_norm_is_made_once_a_step(monkeypatch):
    calls = []
    monkeypatch.setattr(magnitude, "squared_row_norms", lambda *a: calls.append(1) or squared_row_norms(*a))
    adapter, site, base = pair(members=1, rank=3, alpha=6.0)
    x = torch.randn(5, base.in_features, dtype=torch.float64)
    calls.clear()
    for micro_batch in range(3):
        adapter.begin(Step(1, 10), micro_batch)
        site(base, x)
    assert len(calls) == 1


def test_no_dense_temporary_is_made():
    """The largest tensor that the norm makes has fewer elements than the weight."""
    base = nn.Linear(400, 300)
    model = nn.Sequential(base)
    adapter = variants.create("dora", rank=2).attach(model, ["0"])
    site = adapter.site("0")
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != base.weight.untyped_storage().data_ptr():
                sizes.append(out.numel())
            return out

    with Sizes():
        site(base, torch.randn(3, 400)).sum().backward()
    assert 0 < max(sizes) <= 3 * 400 < base.weight.numel()


def test_delta_and_merge_carry_the_magnitude():
    adapter, site, base = pair()
    name = next(adapter.named_sites())[0]
    for k in range(3):
        V = base.weight + site.inner.delta(base)[k]
        W = (site.magnitude[k] / V.norm(dim=1))[:, None] * V
        torch.testing.assert_close(adapter.delta(name)[k], W - base.weight, rtol=1e-9, atol=1e-12)


def test_delta_is_refused_while_merged_and_the_same_after():
    adapter, _, _ = pair()
    name = next(adapter.named_sites())[0]
    before = adapter.delta(name)
    adapter.merge(1)
    with pytest.raises(ValueError, match=r"merged: call unmerge\(\) before delta"):
        adapter.delta(name)
    adapter.unmerge()
    assert torch.equal(adapter.delta(name), before)


def test_adalora_with_dora_prunes_triplets_and_keeps_magnitudes():
    adapter = variants.create("adalora+dora", initial_rank=4, target_rank=1, final_steps=2).attach(tiny("bert"))
    counts = adapter.parameter_counts()
    loop = Loop(adapter, 1e-2, total=8)
    for i in range(8):
        loop.step(packed_batch([0], i))
    after = adapter.parameter_counts()
    outs = sum(adapter.base(name).out_features for name, _ in adapter.named_sites())
    kept = sum(
        (rank.item() * (adapter.base(name).in_features + adapter.base(name).out_features + 1))
        for name, rank in adapter.ranks().items()
    )
    assert sum(adapter.ranks().values()).item() == 12
    assert after["trainable"].tolist() == counts["trainable"].tolist()
    assert after["active"].item() == outs + kept < counts["active"].item()
    assert all(site.magnitude.all() for _, site in adapter.named_sites())


def test_a_fused_optimizer_leaves_no_norm_of_the_step_before():
    model = tiny("bert").float()
    adapter = variants.create("dora", rank=2, alpha=3).attach(model.eval())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=True)
    ids = torch.randint(64, (3, 7), generator=torch.Generator().manual_seed(0))
    for index in (1, 2, 3):
        step = variants.Step(index, 3)
        adapter.begin(step)
        model(input_ids=ids).logits.square().sum().backward()
        optimizer.step()
        adapter.after_step(step)
        optimizer.zero_grad()
    driven = model(input_ids=ids).logits
    adapter.draw.step = None  # nobody drives it: every norm is computed afresh
    assert torch.equal(driven, model(input_ids=ids).logits)


def test_the_gain_keeps_its_precision_under_bf16():
    base = nn.Linear(64, 48)
    model = nn.Sequential(base)
    adapter = variants.create("dora", rank=2, alpha=4).attach(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = adapter.site("0").gain(base)
        adapter.site("0").magnitude.mul_(1.0019)  # less than a step of bf16 near 1
        t = torch.ones(1, 5, 48, dtype=torch.bfloat16)
        out = Recomposed.apply(t, adapter.site("0").gain(base), None)
        assert out.dtype == torch.float32
    torch.testing.assert_close(out[0, 0], before[0] * 1.0019)
