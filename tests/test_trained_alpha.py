"""LoRA with a trained alpha beside its equation, and as the plain LoRA that its file is."""

import json

import peft
import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from torch import nn

from tests.test_peft_oracle import TARGETS, build, close, data, logits

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's
K, N, IN, OUT = 3, 4, 5, 7
RANKS, ALPHAS = [2, 3, 1], [5.0, 7.0, 3.0]


@pytest.fixture
def packed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).double()
    adapter = variants.create("trained-alpha", members=K, rank=RANKS, alpha=ALPHAS, alpha_lr_ratio=0.25)
    return adapter.attach(model, ["0"], head=[], calibration=(torch.randn(K * N, IN).double(),)), model


def test_output_and_gradients_are_those_of_the_equation_written_out(packed):
    adapter, model = packed
    site = adapter.site("0")
    assert site.scale.tolist() == [alpha / r for alpha, r in zip(ALPHAS, RANKS, strict=True)]
    fill(adapter)
    x = torch.randn(K * N, IN, dtype=torch.float64)
    y = model(x)
    y.square().sum().backward()
    W, b = model[0].base.weight, model[0].base.bias
    for k, r in enumerate(RANKS):
        A, B, s = (t.detach().requires_grad_() for t in (site.A[k, :r], site.B[k, :, :r], site.scale[k]))
        rows = x[k * N : (k + 1) * N]
        expected = rows @ W.T + b + s * rows @ A.T @ B.T
        expected.square().sum().backward()
        assert torch.allclose(y[k * N : (k + 1) * N], expected, rtol=1e-12)
        assert torch.allclose(site.scale.grad[k], s.grad, rtol=1e-10) and s.grad != 0
        assert torch.allclose(site.A.grad[k, :r], A.grad, rtol=1e-10)
        assert torch.allclose(site.B.grad[k, :, :r], B.grad, rtol=1e-10)


def test_the_scale_has_its_own_rate_and_no_decay(packed):
    adapter, model = packed
    fill(adapter)
    site = adapter.site("0")
    before = site.scale.detach().clone()
    optimizer = torch.optim.SGD(variants.torch_groups(adapter, lr=1e-3, weight_decay=0.1))
    model(torch.randn(K * N, IN, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert torch.allclose(site.scale, before - 0.25e-3 * site.scale.grad, rtol=1e-12)


def test_a_site_costs_one_parameter_more_than_loras(packed):
    adapter, _ = packed
    assert adapter.parameter_counts()["trainable"].tolist() == [r * (IN + OUT) + 1 for r in RANKS]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("more", [{}, {"magnitude": True}, {"scaling": "alpha/sqrt(r)"}])
def test_a_file_is_a_plain_lora_with_the_alphas_in_force(more, sign, tmp_path):
    adapter = variants.create("trained-alpha", rank=5, alpha=7, **more)
    adapter.attach(build("bert"), TARGETS["bert"], head=["classifier"])
    fill(adapter, spread=0.3)
    with torch.no_grad():
        for index, (_, site) in enumerate(adapter.named_sites()):
            site.low_rank.scale.mul_(sign * (1 + index / 7))
    expected = logits(adapter.model, data("bert"))
    for write in (variants.save_pretrained, variants.export_lora):
        write(adapter, tmp_path / write.__name__)
        oracle = peft.PeftModel.from_pretrained(build("bert"), tmp_path / write.__name__).eval()
        assert close(logits(oracle, data("bert")), expected, 1e-5)
        again = variants.load_pretrained(build("bert"), tmp_path / write.__name__)
        assert close(logits(again.model, data("bert")), expected, 1e-5)
    assert again.method == ("dora" if more.get("magnitude") else "lora")
    config, plain = (
        json.loads((tmp_path / write / "adapter_config.json").read_text()) for write in ("save_pretrained", "export_lora")
    )
    assert len({config["lora_alpha"], *config["alpha_pattern"].values()}) == len(list(adapter.named_sites()))
    assert plain["alpha_pattern"] == {}  # one scale for all, which programs that serve LoRA read
    own = variants.load_pretrained(build("bert"), tmp_path / "save_pretrained")
    assert own.method == "trained-alpha" and own.settings == adapter.settings
    for name, scale in own.scales().items():
        assert scale.item() == pytest.approx(abs(adapter.scales()[name].item()), rel=1e-6)


def test_a_truncated_one_is_the_nearest_of_its_rank(packed):
    adapter, _ = packed
    fill(adapter, spread=0.5)
    whole = adapter.delta("0").detach()
    variants.truncate(adapter, total_rank=1)
    for k in range(K):
        U, sigma, Vt = torch.linalg.svd(whole[k])
        assert torch.allclose(adapter.delta("0")[k], sigma[0] * U[:, :1] @ Vt[:1], rtol=1e-8, atol=1e-10)
