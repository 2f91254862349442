"""Bottleneck adapters beside their equations written out; where they stand; the papers' counts; files."""

import math

import pytest
import torch
from rankwise import variants
from rankwise.reports.papers.shapes import Trained
from rankwise.variants.adapter.probe import fill
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForSequenceClassification

from tests.loop import outputs
from tests.tiny import batch, packed_batch, tiny

K, ROWS, SIZES = 3, 4, [2, 3, 1]
F = {  # the nonlinearities, from their definitions
    "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
    "relu": lambda v: max(v, 0.0),
    "swish": lambda v: v / (1 + math.exp(-v)),
}


class Normed(nn.Module):
    """A linear to another width, and a norm of the sum with what stands beside it, as in BERT's feed-forward layer."""

    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(6, 5), nn.LayerNorm(5)

    def forward(self, x: Tensor, beside: Tensor) -> Tensor:
        return self.norm(self.dense(x) + beside)


def made(method: str, after: str, nonlinearity: str) -> tuple[variants.Adapter, Normed, tuple[Tensor, Tensor]]:
    """An adapter of three members in that model, the model without it, and an input."""
    random = torch.Generator().manual_seed(1)
    x, beside = torch.randn(K * ROWS, 6, generator=random).double(), torch.randn(K * ROWS, 5, generator=random).double()
    models = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            models.append(Normed().double())
            nn.init.normal_(models[-1].norm.weight)
            nn.init.normal_(models[-1].norm.bias)
    adapter = variants.create(method, members=K, bottleneck=SIZES, nonlinearity=nonlinearity, after=[after])
    adapter.attach(models[0], head=[], calibration=(x, beside))
    fill(adapter, 0.4)
    return adapter, models[1], (x, beside)


def added(site: nn.Module, k: int, z: list[float], nonlinearity: str) -> list[float]:
    """U f(D z + c) + u of one member, in plain numbers."""
    D, c, U, u = (t[k].tolist() for t in (site.down, site.down_bias, site.up, site.up_bias))
    inner = [F[nonlinearity](sum(d * v for d, v in zip(D[j], z, strict=True)) + c[j]) for j in range(SIZES[k])]
    return [sum(U[o][j] * inner[j] for j in range(SIZES[k])) + u[o] for o in range(len(z))]


def normed(norm: nn.LayerNorm, s: list[float]) -> list[float]:
    mean = sum(s) / len(s)
    spread = math.sqrt(sum((v - mean) ** 2 for v in s) / len(s) + norm.eps)
    return [(v - mean) / spread * w + b for v, w, b in zip(s, norm.weight.tolist(), norm.bias.tolist(), strict=True)]


@pytest.mark.parametrize("nonlinearity", list(F))
def test_houlsbys_output_is_the_equation_written_out(nonlinearity):
    adapter, plain, (x, beside) = made("houlsby", "dense", nonlinearity)
    site, found = adapter.site("dense"), adapter.model(x, beside)
    for row in range(K * ROWS):
        h = plain.dense(x[row]).tolist()
        h = [a + b for a, b in zip(h, added(site, row // ROWS, h, nonlinearity), strict=True)]
        expected = normed(plain.norm, [a + b for a, b in zip(h, beside[row].tolist(), strict=True)])
        assert found[row].tolist() == pytest.approx(expected, rel=1e-11, abs=1e-11)


def test_pfeiffers_reads_the_normed_sum_and_adds_to_the_sum_before_the_norm():
    adapter, plain, (x, beside) = made("pfeiffer", "norm", "relu")
    site, found = adapter.site("norm"), adapter.model(x, beside)
    for row in range(K * ROWS):
        s = [a + b for a, b in zip(plain.dense(x[row]).tolist(), beside[row].tolist(), strict=True)]
        change = added(site, row // ROWS, normed(plain.norm, s), "relu")
        expected = normed(plain.norm, [a + b for a, b in zip(s, change, strict=True)])
        assert found[row].tolist() == pytest.approx(expected, rel=1e-11, abs=1e-11)


def test_the_start():
    adapter = variants.create("houlsby", members=2, seeds=[4, 5], bottleneck=[300, 5]).attach(tiny("gpt2"))
    for _, site in adapter.named_sites():
        assert not site.up.any() and not site.up_bias.any() and not site.down_bias.any()
        start = site.down[0].detach()
        assert start.abs().max() <= 0.02 and start.std().item() == pytest.approx(
            0.0088, rel=0.02
        )  # of N(0, 0.01^2) cut at 2 sigma
        assert not site.down[1, 5:].any() and site.down[1, :5].all()
        assert not torch.equal(site.down[0, :5], site.down[1, :5])


@pytest.mark.parametrize(
    ("model", "houlsby", "pfeiffer"),
    [
        ("bert", ["attention.output.dropout", "output.dropout"], ["output.LayerNorm"]),
        ("deberta", ["attention.output.dropout", "output.dropout"], ["output.LayerNorm"]),
        ("gpt2", ["attn.resid_dropout", "mlp.dropout"], ["mlp.dropout"]),
        ("llama", ["self_attn.o_proj", "mlp.down_proj"], ["mlp.down_proj"]),
    ],
)
def test_two_stand_in_a_layer_or_one(model, houlsby, pfeiffer):
    for method, ends in (("houlsby", houlsby), ("pfeiffer", pfeiffer)):
        adapter = variants.create(method, bottleneck=4).attach(tiny(model))
        names = [name for name, _ in adapter.named_sites()]
        assert [name.partition(".0.")[2] or name.partition(".1.")[2] for name in names] == ends * 2
        assert adapter.parameter_counts()["trainable"].tolist() == [len(names) * (2 * 32 * 4 + 4 + 32)]


def test_an_adapter_stands_behind_the_dropout():
    """What it adds is not dropped: with U = 0 and u = 1 every element is the dropped one and 1."""
    model = tiny("gpt2").train()
    adapter = variants.create("houlsby", bottleneck=1).attach(model)
    block, seen = model.transformer.h[0].mlp, {}
    block.dropout.base.register_forward_hook(lambda _, args, y: seen.update(dropped=y.clone()))
    block.register_forward_hook(lambda _, args, y: seen.update(out=y.clone()))
    nn.init.ones_(adapter.site("transformer.h.0.mlp.dropout").up_bias)
    adapter.begin(variants.Step(1, 10))
    outputs(model, batch(0))
    assert (seen["dropped"] == 0).any() and torch.equal(seen["out"], seen["dropped"] + 1)


def test_counts_are_those_of_the_papers_tables():
    """LoRA's Table 2 (RoBERTa-large) and Table 3 (GPT-2 M, AdapterH of 11.09M), by one of their 24 layers."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        roberta = RobertaForSequenceClassification(RobertaConfig(**sizes))
        gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=1, n_head=16))
    for model, shape, method, bottleneck in (
        (roberta, "roberta-large", "houlsby", 8),
        (roberta, "roberta-large", "pfeiffer", 16),
        (gpt2, "gpt2-medium", "houlsby", 112),
    ):
        adapter = variants.create(method, bottleneck=bottleneck).attach(model)
        printed = Trained(shape=shape, method=f"adapter-{method}", bottleneck=bottleneck)
        assert 24 * adapter.parameter_counts()["trainable"].item() == printed.count()
        adapter.detach()


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
def test_a_member_of_a_pack_is_saved_in_its_own_size(method, tmp_path):
    pack = variants.create(method, members=K, seeds=[7, 8, 9], bottleneck=SIZES).attach(tiny("bert"))
    fill(pack)
    inputs = packed_batch([0, 1, 2])
    together = outputs(pack.model.eval(), inputs).view(K, -1, 3)
    for member, size in enumerate(SIZES):
        variants.save_pretrained(pack, tmp_path / str(member), member=member)
        tensors = load_file(tmp_path / str(member) / "adapter_model.safetensors")
        assert {value.shape for name, value in tensors.items() if name.endswith(".down")} == {(size, 32)}
        model = tiny("bert").eval()
        again = variants.load_pretrained(model, tmp_path / str(member))
        assert (again.method, again.seeds, again.settings.bottleneck) == (method, [7 + member], size)
        own = {key: value.view(K, -1, *value.shape[1:])[member] for key, value in inputs.items()}
        torch.testing.assert_close(outputs(model, own), together[member], rtol=1e-10, atol=1e-12)


def test_a_model_saves_its_adapter_and_trains_on_in_16_bits(tmp_path):
    adapter = variants.create("pfeiffer", bottleneck=3).attach(tiny("bert", torch.bfloat16))
    fill(adapter, 0.05)
    outputs(adapter.model, batch(0)).sum().backward()
    assert {p.dtype for p in adapter.parameters()} == {torch.float32} and all(p.grad is not None for p in adapter.parameters())
    adapter.model.save_pretrained(tmp_path)
    assert variants.load_pretrained(tiny("bert", torch.bfloat16), tmp_path).method == "pfeiffer"


def test_what_cannot_be_is_refused(tmp_path):
    adapter = variants.create("houlsby", bottleneck=2).attach(tiny("bert"))
    with pytest.raises(variants.CannotMerge, match="its change is not one of the model's weights; keep it attached"):
        adapter.merge()
    with pytest.raises(ValueError, match="houlsby adds to the model what is no weight of its own"):
        variants.export_lora(adapter, tmp_path)
    with pytest.raises(ValueError, match=r"model of type None is not known; .*after = \[\.\.\.\]"):
        variants.create("pfeiffer", bottleneck=2).attach(Normed(), head=[])
    with pytest.raises(ValueError, match=r'after: "densse" means no module of Normed; did you mean "dense"'):
        variants.create("houlsby", bottleneck=2, after=["densse"]).attach(Normed(), head=[])
    with pytest.raises(ValueError, match=r'after: "classifier" belongs to the task head'):
        variants.create("houlsby", bottleneck=2, after=["classifier"]).attach(tiny("bert"))
    with pytest.raises(ValueError, match=r"houlsby\.bottleneck = 0: should be greater than 0"):
        variants.create("houlsby", bottleneck=0)
