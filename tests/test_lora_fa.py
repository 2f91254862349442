"""LoRA-FA beside its equation written out: only B moves, A stays bit for bit, and B's numbers are what is counted."""

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from torch import nn

K, N, IN, OUT = 3, 4, 5, 7
RANKS, ALPHA = [2, 3, 1], 5.0


@pytest.fixture
def site():
    """(adapter, model): one linear with a bias, three members of unequal rank, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).double()
    adapter = variants.create("lora-fa", members=K, rank=RANKS, alpha=ALPHA)
    adapter.attach(model, targets=["0"], head=[], calibration=(torch.randn(K * N, IN).double(),))
    return adapter, model


def test_output_and_gradient_are_those_of_the_equation_written_out(site):
    adapter, model = site
    fill(adapter)
    x = torch.randn(K * N, IN, dtype=torch.float64)
    y = model(x)
    y.square().sum().backward()
    W, b = model[0].base.weight, model[0].base.bias
    one = adapter.site("0")
    for k, r in enumerate(RANKS):
        A, B = one.A[k, :r], one.B[k, :, :r].detach()
        rows = x[k * N : (k + 1) * N]
        expected = rows @ W.T + b + ALPHA / r * (rows @ A.T) @ B.T
        assert torch.allclose(y[k * N : (k + 1) * N], expected, rtol=1e-12)
        gradient = ALPHA / r * (2 * expected).T @ (rows @ A.T)  # dL/dB of L = |y|^2
        assert torch.allclose(one.B.grad[k, :, :r], gradient, rtol=1e-10)


def test_a_never_moves_and_no_optimizer_sees_it(site):
    adapter, model = site
    before = adapter.site("0").A.clone()
    optimizer = torch.optim.AdamW(variants.torch_groups(adapter, lr=0.1))
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [(K, OUT, max(RANKS))]
    for index in range(1, 4):
        step = variants.Step(index, total=3)
        adapter.begin(step)
        (model(torch.randn(K * N, IN, dtype=torch.float64)).square().sum() + adapter.penalty(step).sum()).backward()
        adapter.before_step(step)
        optimizer.step()
        adapter.after_step(step)
    assert torch.equal(adapter.site("0").A, before) and bool(adapter.site("0").B.any())
    assert "sites.0.A" in adapter.state_dict()  # a run that goes on, and a file, need it


def test_the_numbers_of_b_are_what_is_trained(site):
    adapter, _ = site
    assert adapter.parameter_counts()["trainable"].tolist() == [OUT * r for r in RANKS]


def test_members_start_at_the_a_of_their_own_seed():
    model = nn.Sequential(nn.Linear(IN, OUT))
    starts = []
    for seed in (4, 9):
        adapter = variants.create("lora-fa", rank=2, seeds=[seed]).attach(model, targets=["0"], head=[])
        starts.append(adapter.site("0").A[0].clone())
        adapter.detach()
    assert not torch.equal(*starts)
