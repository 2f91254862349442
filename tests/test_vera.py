"""VeRA beside its equation written out, beside PEFT, its files, and the papers' counts."""

import json

import peft
import pytest
import torch
from rankwise import variants
from rankwise.reports.papers.shapes import Trained
from rankwise.variants.adapter.probe import fill
from rankwise.variants.files.peft.config import PeftConfig
from safetensors.torch import load_file, save_file
from torch import nn

from tests.test_peft_oracle import TARGETS, build, close, data, logits
from tests.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of projections that are drawn again
K, N = 3, 4
RANKS, SEEDS = [5, 2, 7], [4, 9, 1]
HEAD = {"bert": "classifier", "gpt2": "score"}
CONFIG = {"r": 11, "projection_prng_key": 3, "d_initial": 0.2, "task_type": "SEQ_CLS"}


def plain_draw(rows_a, columns_a, rows_b, seed):
    """A and B by one generator: U(-1, 1) times sqrt(6 / fan in)."""
    random = torch.Generator().manual_seed(seed)
    A = (torch.rand(rows_a, columns_a, generator=random) * 2 - 1) * (6 / columns_a) ** 0.5
    return A, (torch.rand(rows_b, rows_a, generator=random) * 2 - 1) * (6 / rows_a) ** 0.5


def test_output_and_gradients_are_those_of_the_equation_written_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False)).double()
    adapter = variants.create("vera", members=K, rank=RANKS, seeds=SEEDS)
    adapter.attach(model, ["0", "1"], head=[], calibration=(torch.randn(K * N, 5).double(),))
    x = torch.randn(K * N, 5, dtype=torch.float64)
    sites = dict(adapter.named_sites())
    assert all(torch.equal(site.b, torch.zeros_like(site.b)) for site in sites.values())
    assert all(site.d[k, :r].allclose(torch.tensor(0.1).double()) for site in sites.values() for k, r in enumerate(RANKS))
    fill(adapter)
    y = model(x)
    y.square().sum().backward()
    for k, (r, seed) in enumerate(zip(RANKS, SEEDS, strict=True)):
        A, B = (t.double() for t in plain_draw(r, 7, 7, seed))  # of the largest site: 7 in, 7 out
        h, vectors = x[k * N : (k + 1) * N], {}
        for name, site in sites.items():
            d, b = vectors[name] = site.d[k, :r].detach().requires_grad_(), site.b[k].detach().requires_grad_()
            W, bias = model[int(name)].base.weight, model[int(name)].base.bias
            O, I = W.shape
            dW = torch.diag(b) @ B[:O] @ torch.diag(d) @ A[:, :I]
            h = h @ (W + dW).T + (0 if bias is None else bias)
            assert torch.allclose(adapter.delta(name)[k], dW, rtol=1e-5, atol=1e-6)
        h.square().sum().backward()
        assert torch.allclose(y[k * N : (k + 1) * N], h, rtol=1e-5, atol=1e-6)  # A and B are drawn in fp32
        for name, site in sites.items():
            assert torch.allclose(site.d.grad[k, :r], vectors[name][0].grad, rtol=1e-4, atol=1e-5)
            assert torch.allclose(site.b.grad[k], vectors[name][1].grad, rtol=1e-4, atol=1e-5)
            assert not site.d[k, r:].any()


def ours(model: str = "bert", **settings):
    given = {"rank": 11, "projection_seed": 3, "d_initial": 0.2} | settings
    return variants.create("vera", **given).attach(build(model), TARGETS[model], head=[HEAD[model]])


def theirs(model: str = "bert", **settings):
    config = peft.VeraConfig(target_modules=TARGETS[model], modules_to_save=[HEAD[model]], **CONFIG | settings)
    return peft.get_peft_model(build(model), config).eval()


def parts_of(oracle, name):
    module = oracle.base_model.model.get_submodule(name)
    return module.vera_lambda_d["default"], module.vera_lambda_b["default"]


@pytest.mark.parametrize("model", HEAD)
def test_matrices_are_pefts_bit_for_bit_and_five_steps_stay_together(model):
    adapter, oracle = ours(model), theirs(model)
    for mine, other in zip((adapter.projections.A, adapter.projections.B), (oracle.vera_A, oracle.vera_B), strict=True):
        assert torch.equal(mine[0], other["default"])
    named = {n.removeprefix("base_model.model."): p for n, p in oracle.named_parameters()}
    with torch.no_grad():
        for key, value in adapter.heads[HEAD[model]].named_parameters():
            named[f"{HEAD[model]}.modules_to_save.default.{key}"].copy_(value[0])
    # With its usual eps AdamW would make whole steps of the rounding of small gradients, by which processors differ.
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, eps=1e-4) for m in (adapter, oracle)
    ]
    for index in range(5):
        inputs = data(model, index)
        for one, optimizer in zip((adapter.model, oracle), optimizers, strict=True):
            nn.functional.cross_entropy(logits(one, inputs), inputs["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, site in adapter.named_sites():
        d, b = parts_of(oracle, name)
        assert close(site.d[0], d, 1e-4) and close(site.b[0], b, 1e-4) and b.abs().max() > 0.01, name
    assert close(logits(adapter.model, data(model)), logits(oracle, data(model)), 1e-4)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("model", HEAD)
def test_files_go_both_ways(model, saved, tmp_path):
    adapter = ours(model, save_projection=saved)
    fill(adapter, spread=0.5)
    expected = logits(adapter.model, data(model))
    assert (expected - logits(build(model), data(model))).abs().max() > 0.05, "the adapter acts"
    variants.save_pretrained(adapter, tmp_path / "ours")
    assert ("base_model.vera_A" in load_file(tmp_path / "ours/adapter_model.safetensors")) == saved
    oracle = peft.PeftModel.from_pretrained(build(model), tmp_path / "ours").eval()
    assert close(logits(oracle, data(model)), expected, 1e-5)
    again = variants.load_pretrained(build(model), tmp_path / "ours")
    assert again.settings == adapter.settings and torch.equal(logits(again.model, data(model)), expected)
    with torch.no_grad():
        for name, _ in adapter.named_sites():
            for vector in parts_of(oracle, name):
                vector.mul_(1.3).add_(0.1)
    oracle.save_pretrained(tmp_path / "theirs")
    read = variants.load_pretrained(build(model), tmp_path / "theirs")
    assert read.method == "vera" and read.settings.projection_seed == 3 and read.settings.save_projection == saved
    assert close(logits(read.model, data(model)), logits(oracle, data(model)), 1e-5)


def test_matrices_in_a_file_are_taken_over_where_they_are_others(tmp_path):
    oracle = theirs()
    with torch.no_grad():
        oracle.vera_A["default"].mul_(2).add_(0.1)
        for name in ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.intermediate.dense"):
            parts_of(oracle, name)[1].add_(1.0)
    oracle.save_pretrained(tmp_path)
    adapter = variants.load_pretrained(build("bert"), tmp_path)
    assert close(logits(adapter.model, data("bert")), logits(oracle, data("bert")), 1e-5)


def test_a_plain_lora_and_a_merge_are_the_same_function(tmp_path):
    adapter = ours()
    fill(adapter, spread=0.5)
    expected = logits(adapter.model, data("bert"))
    variants.export_lora(adapter, tmp_path)
    plain = peft.PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    assert plain.peft_config["default"].peft_type == "LORA" and plain.peft_config["default"].r == 11
    assert close(logits(plain, data("bert")), expected, 1e-5)
    adapter.merge()
    assert close(logits(adapter.model, data("bert")), expected, 1e-5)


def spoilt(tensors, config, how):
    if how == "B":
        del tensors["base_model.vera_B"]
    elif how == "both":
        del tensors["base_model.vera_A"], tensors["base_model.vera_B"]
    elif how == "site":
        del tensors["base_model.model.bert.encoder.layer.0.attention.self.query.vera_lambda_b"]
    elif how == "all of it":
        for part in "bd":
            del tensors[f"base_model.model.bert.encoder.layer.0.attention.self.query.vera_lambda_{part}"]
    elif how == "rank":
        config["r"] = 12
    elif how == "small":
        tensors["base_model.vera_A"] = tensors["base_model.vera_A"][:, 1:].contiguous()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("B", "lacks base_model.vera_B"),
        ("both", "holds base_model.vera_A, base_model.vera_B, and it does not"),
        ("site", r"query.vera_lambda_b has shape none where"),
        ("all of it", r"lacks 1 of them, bert.encoder.layer.0.attention.self.query"),
        ("rank", r"vera_lambda_d has shape \(11,\) where BertForSequenceClassification needs \(12,\)"),
        ("small", r"vera_A has shape \(11, 31\) where \(11, 32\) is the least"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_and_the_model_is_as_it_was(how, said, tmp_path):
    variants.save_pretrained(ours(), tmp_path)
    path, written = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, config = load_file(path), json.loads(written.read_text())
    spoilt(tensors, config, how)
    save_file(tensors, path, metadata={"format": "pt"})
    written.write_text(json.dumps(config))
    model = build("bert")
    before = logits(model, data("bert"))
    with pytest.raises(ValueError, match=said):
        variants.load_pretrained(model, tmp_path)
    assert torch.equal(logits(model, data("bert")), before)


def test_its_configuration_is_read_as_that_of_a_lora_with_the_same_targets(tmp_path):
    """As `rankwise export` reads it, to find the model and the head."""
    variants.save_pretrained(ours(), tmp_path)
    config = PeftConfig.read(json.loads((tmp_path / "adapter_config.json").read_text()))
    assert config.rank == 11 and config.modules_to_save == ("classifier",) and config.task_type == "SEQ_CLS"


def test_what_cannot_be_is_refused():
    model = nn.Sequential(nn.Linear(5, 7), nn.Conv2d(2, 3, 3))
    with pytest.raises(
        ValueError, match="shares one pair of matrices among its targets, which it can do at linear modules only"
    ):
        variants.create("vera", rank=4).attach(model, ["1"], head=[])
    adapter = variants.create("vera", rank=4).attach(model, ["0"], head=[])
    with pytest.raises(ValueError, match="write it as a plain LoRA"):
        variants.truncate(adapter, total_rank=1)
    with pytest.raises(ValueError, match="alpha"):
        variants.create("vera", rank=4, alpha=8)


@pytest.mark.parametrize(("shape", "rank", "paper"), [("roberta-base", 1024, 0.043), ("roberta-large", 256, 0.061)])
def test_counts_are_the_papers(shape, rank, paper):
    import transformers

    sizes = {"roberta-base": {}, "roberta-large": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}}
    with torch.device("meta"):
        config = transformers.RobertaConfig(**sizes[shape], num_attention_heads=16 if sizes[shape] else 12)
        model = transformers.RobertaForSequenceClassification(config)
    adapter = variants.create("vera", rank=rank).attach(model, ["query", "value"])
    count = adapter.parameter_counts()["trainable"].item()
    assert count == Trained(shape=shape, method="vera", targets=["query", "value"], rank=rank).count()
    assert round(count / 1e6, 3) == paper


def test_a_state_holds_the_matrices_once():
    adapter = variants.create("vera", rank=4).attach(tiny("bert"), TARGETS["bert"])
    held = [name for name, value in adapter.state_dict().items() if value.dim() == 3 and name.endswith((".A", ".B"))]
    assert held == ["projections.A", "projections.B"]
    assert {n.rpartition(".")[2] for n, _ in adapter.named_parameters() if n.startswith("sites")} == {"d", "b"}
