"""LoRA+ is LoRA with another rate for B, and nothing else."""

import torch
from rankwise import variants
from torch import nn

RATE = 1e-3


def test_b_moves_sixteen_times_as_far_as_a_under_sgd():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7)).double()
    adapter = variants.create("lora+", rank=3, alpha=5).attach(model, ["0"], head=[])
    site = adapter.site("0")
    nn.init.normal_(site.B)
    before = site.A.detach().clone(), site.B.detach().clone()
    optimizer = torch.optim.SGD(variants.torch_groups(adapter, lr=RATE, weight_decay=0.0))
    model(torch.randn(4, 5, dtype=torch.float64)).square().sum().backward()
    gradients = site.A.grad.clone(), site.B.grad.clone()
    optimizer.step()
    assert torch.allclose(site.A - before[0], -RATE * gradients[0], rtol=1e-9)
    assert torch.allclose(site.B - before[1], -16 * RATE * gradients[1], rtol=1e-9)


def test_it_starts_and_is_counted_as_lora():
    states = []
    for method in ("lora", "lora+"):
        adapter = variants.create(method, rank=3, seeds=[4]).attach(nn.Sequential(nn.Linear(5, 7)), ["0"], head=[])
        states.append((adapter.site("0").A, adapter.parameter_counts()["trainable"]))
    assert torch.equal(states[0][0], states[1][0]) and torch.equal(states[0][1], states[1][1])
    assert variants.check("lora+", {"rank": 3}).lr_ratio == 16 and variants.check("lora", {"rank": 3}).lr_ratio == 1
