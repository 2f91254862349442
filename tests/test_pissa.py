"""PiSSA and OLoRA beside their equations written out, beside PEFT, and as the plain LoRA on the unchanged weight."""

import copy

import peft
import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from safetensors.torch import load_file
from torch import Tensor, nn

from tests import quantised_models
from tests.contract import fingerprint
from tests.test_peft_oracle import TARGETS, build, close, data, logits, shake
from tests.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of starts that change the base
K, N, IN, OUT = 3, 4, 9, 7
RANKS, ALPHAS = [2, 5, 3], [3.0, 7.0, 11.0]
METHODS = ["pissa", "olora"]
CONFIG = {"r": 5, "lora_alpha": 7, "target_modules": TARGETS["bert"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}


def slow_start(method: str, W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (r, I) and B (O, r), rank by rank."""
    if method == "olora":  # Gram and Schmidt, with the signs of Householder's R
        columns: list[Tensor] = []
        for j in range(rank):
            rest = W[:, j].clone()
            for q in columns:
                rest = rest - (q @ rest) * q
            columns.append(rest / rest.norm())
        B = torch.stack(columns, 1)
        return B.T @ W, B
    squares, vectors = torch.linalg.eigh(W.T @ W)
    A, B = torch.zeros(rank, W.shape[1]).double(), torch.zeros(W.shape[0], rank).double()
    for j in range(rank):
        sigma, v = squares[-1 - j].sqrt(), vectors[:, -1 - j]
        A[j], B[:, j] = (sigma / scale).sqrt() * v, (sigma / scale).sqrt() * (W @ v) / sigma
    return A, B


@pytest.fixture(params=METHODS)
def packed(request):
    """(adapter, model): one linear with a bias, three members of other ranks and alphas, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).double()
    adapter = variants.create(request.param, members=K, rank=RANKS, alpha=ALPHAS)
    return adapter.attach(model, ["0"], head=[], calibration=(torch.randn(K * N, IN).double(),)), model


def test_the_start_is_the_part_of_the_weight_that_the_equation_says(packed):
    adapter, model = packed
    W, site = model[0].base.weight, adapter.site("0")
    for k, (r, alpha) in enumerate(zip(RANKS, ALPHAS, strict=True)):
        A, B = slow_start(adapter.method, W, r, alpha / r)
        assert torch.allclose(site.B[k, :, :r] @ site.A[k, :r], B @ A, rtol=1e-10, atol=1e-12)
        sizes = [site.A[k, :r].norm(dim=1), A.norm(dim=1)], [site.B[k, :, :r].norm(dim=0), B.norm(dim=0)]
        assert all(torch.allclose(*pair, rtol=1e-10) for pair in sizes)  # signs are free


def test_outputs_gradients_and_weights_are_those_over_what_is_left_of_the_weight(packed):
    adapter, model = packed
    W, b, site = model[0].base.weight.clone(), model[0].base.bias.clone(), adapter.site("0")
    starts = [(site.A[k].detach().clone(), site.B[k].detach().clone()) for k in range(K)]
    fill(adapter)
    x = torch.randn(K * N, IN, dtype=torch.float64)
    y = model(x)
    y.square().sum().backward()
    for k, (r, alpha) in enumerate(zip(RANKS, ALPHAS, strict=True)):
        s, (A0, B0), rows = alpha / r, starts[k], x[k * N : (k + 1) * N]
        A, B = site.A[k].detach().requires_grad_(), site.B[k].detach().requires_grad_()
        left = W - s * B0 @ A0
        expected = rows @ left.T + b + s * rows @ A.T @ B.T
        expected.square().sum().backward()
        assert torch.allclose(y[k * N : (k + 1) * N], expected, rtol=1e-12)
        assert torch.allclose(site.A.grad[k], A.grad, rtol=1e-9) and torch.allclose(site.B.grad[k], B.grad, rtol=1e-9)
        assert torch.allclose(adapter.delta("0")[k], left + s * B @ A - W, rtol=1e-9, atol=1e-12)
        adapter.merge(k)
        assert torch.allclose(model[0].base.weight, left + s * B @ A, rtol=1e-12)
        adapter.unmerge()
    assert torch.equal(model[0].base.weight, W)


@pytest.mark.parametrize("method", METHODS)
def test_dropout_acts_on_the_trained_product_alone(method):
    model = nn.Sequential(nn.Linear(IN, OUT)).double()
    adapter = variants.create(method, rank=3, alpha=5.0, dropout=0.999999).attach(model, ["0"], head=[])
    fill(adapter)
    site, W, b = adapter.site("0"), model[0].base.weight, model[0].base.bias
    x = torch.randn(N, IN, dtype=torch.float64)
    adapter.begin(variants.Step(1, 2))
    y = model.train()(x)  # every element of B A's input is dropped
    assert torch.allclose(y, x @ (W - 5 / 3 * site.B0[0] @ site.A0[0]).T + b, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_magnitude_is_around_the_whole_change(method):
    model = nn.Sequential(nn.Linear(IN, OUT)).double()
    x = torch.randn(N, IN, dtype=torch.float64)
    before = model(x)
    adapter = variants.create(method, rank=3, alpha=5.0, magnitude=True).attach(model, ["0"], head=[])
    assert torch.allclose(model(x), before, rtol=1e-12)
    fill(adapter)
    site, W, b = adapter.site("0"), model[0].base.weight, model[0].base.bias
    one = site.inner
    whole = W + 5 / 3 * (one.B[0] @ one.A[0] - one.B0[0] @ one.A0[0])
    assert torch.allclose(model(x), (site.magnitude[0] / whole.norm(dim=1)) * (x @ whole.T) + b, rtol=1e-10)


# -- PEFT ----------------------------------------------------------------------------------------------------------------------


def ours(method: str, model: str = "bert", **settings):
    return variants.create(method, **{"rank": 5, "alpha": 7} | settings).attach(
        build(model), TARGETS[model], head=["classifier"]
    )


@pytest.mark.parametrize("method", METHODS)
def test_starts_and_five_steps_are_pefts(method):
    adapter, oracle = ours(method), peft.get_peft_model(build("bert"), peft.LoraConfig(**CONFIG, init_lora_weights=method))
    theirs = {n.removeprefix("base_model.model."): p for n, p in oracle.named_parameters()}
    sites = list(adapter.named_sites())
    for name, site in sites:
        assert torch.equal(site.A[0], theirs[f"{name}.lora_A.default.weight"]), name
        assert torch.equal(site.B[0], theirs[f"{name}.lora_B.default.weight"]), name
    with torch.no_grad():
        for key, value in adapter.heads["classifier"].named_parameters():
            theirs[f"classifier.modules_to_save.default.{key}"].copy_(value[0])
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (adapter, oracle)]
    for index in range(5):
        inputs = data("bert", index)
        for model, optimizer in zip((adapter.model, oracle.eval()), optimizers, strict=True):
            nn.functional.cross_entropy(logits(model, inputs), inputs["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, site in sites:
        assert close(site.A[0], theirs[f"{name}.lora_A.default.weight"], 1e-4), name
    assert close(logits(adapter.model, data("bert")), logits(oracle, data("bert")), 1e-4)


@pytest.mark.parametrize("more", [{}, {"scaling": "alpha/sqrt(r)"}, {"magnitude": True}, {"rank_pattern": {"query": 2}}])
@pytest.mark.parametrize("method", METHODS)
def test_files_go_both_ways(method, more, tmp_path):
    adapter = ours(method, **more)
    fill(adapter, spread=0.3)
    variants.save_pretrained(adapter, tmp_path / "ours")
    expected = logits(adapter.model, data("bert"))
    assert (expected - logits(build("bert"), data("bert"))).abs().max() > 0.05, "the adapter acts"
    oracle = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "ours").eval()
    assert oracle.peft_config["default"].init_lora_weights == method
    assert close(logits(oracle, data("bert")), expected, 1e-5)
    again = variants.load_pretrained(build("bert"), tmp_path / "ours")
    assert again.settings == adapter.settings and torch.equal(logits(again.model, data("bert")), expected)
    shake(oracle)
    oracle.save_pretrained(tmp_path / "theirs")
    theirs = variants.load_pretrained(build("bert"), tmp_path / "theirs")
    assert theirs.method == method
    assert close(logits(theirs.model, data("bert")), logits(oracle, data("bert")), 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_plain_lora_is_pefts_conversion_and_exact(method, tmp_path):
    oracle = peft.get_peft_model(build("bert"), peft.LoraConfig(**CONFIG, init_lora_weights=method)).eval()
    oracle.peft_config["default"].init_lora_weights = True
    oracle.save_pretrained(tmp_path / "start")
    shake(oracle)
    oracle.peft_config["default"].init_lora_weights = method
    expected = logits(oracle, data("bert"))
    oracle.save_pretrained(tmp_path / "trained")
    oracle.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter = variants.load_pretrained(build("bert"), tmp_path / "trained")
    variants.export_lora(adapter, tmp_path / "plain")
    ours, theirs = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("plain", "converted"))
    assert {name for name in ours if "lora_" in name} == theirs.keys()  # PEFT forgets the head there
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=1e-5, atol=1e-6), name
    for read in (variants.load_pretrained, peft.PeftModel.from_pretrained):
        plain = read(build("bert"), tmp_path / "plain")
        model = plain.model if read is variants.load_pretrained else plain.eval()
        assert close(logits(model, data("bert")), expected, 1e-5)
    assert variants.load_pretrained(build("bert"), tmp_path / "plain").method == "lora"


def test_olora_of_a_weight_that_is_stored_the_other_way_is_not_pefts(tmp_path):
    adapter = variants.create("olora", rank=2).attach(build("gpt2"), ["mlp.c_proj"], head=["score"])
    with pytest.warns(UserWarning, match="PEFT decomposes the weight as it is stored"):
        variants.save_pretrained(adapter, tmp_path / "ours")
    variants.load_pretrained(build("gpt2"), tmp_path / "ours")
    config = peft.LoraConfig(r=2, init_lora_weights=True, target_modules=["mlp.c_proj"], fan_in_fan_out=True)
    oracle = peft.get_peft_model(build("gpt2"), config)
    oracle.peft_config["default"].init_lora_weights = "olora"
    oracle.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="was another function in PEFT: PEFT decomposes"):
        variants.load_pretrained(build("gpt2"), tmp_path / "theirs")


# -- the frozen weight ------------------------------------------------------------------------------------------------------


@quantised_models.needed
@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_weight_is_left_as_it_is(method):
    model = quantised_models.loaded("bert", "nf4")
    exact = copy.deepcopy(model)
    variants.create("lora", rank=2).attach(exact, TARGETS["bert"])  # computes as training does: adapter/kinds/quantised.py
    before = fingerprint(dict(model.named_parameters()))
    adapter = variants.create(method, rank=4, alpha=8).attach(model, TARGETS["bert"])
    assert close(logits(model, data("bert")), logits(exact, data("bert")), 1e-5)
    fill(adapter)
    assert not close(logits(model, data("bert")), logits(exact, data("bert")), 1e-2)
    adapter.detach()
    assert fingerprint(dict(model.named_parameters())) == before


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_is_refused(method):
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Conv2d(2, 3, 3))
    with pytest.raises(ValueError, match=rf"rank = 8 at 0, whose weight is \({OUT}, {IN}\): {method} starts at a part"):
        variants.create(method, rank=8).attach(model, ["0"], head=[])
    with pytest.raises(ValueError, match="takes its start out of the weight, which it can do at linear modules only"):
        variants.create(method, rank=2).attach(model, ["1"], head=[])
    adapter = variants.create(method, rank=2).attach(model, ["0"], head=[])
    with pytest.raises(ValueError, match="write it as a plain LoRA"):
        variants.truncate(adapter, total_rank=1)


def test_a_model_of_shapes_alone_is_counted():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(IN, OUT))
    adapter = variants.create("pissa", rank=3).attach(model, ["0"], head=[])
    assert adapter.parameter_counts()["trainable"].tolist() == [3 * (IN + OUT)]


def test_a_bank_answers_with_the_whole_change(tmp_path):
    adapter = variants.create("pissa", rank=3, alpha=5).attach(tiny("bert", torch.float32).eval(), TARGETS["bert"])
    fill(adapter, spread=0.3)
    variants.save_pretrained(adapter, tmp_path / "a")
    bank = variants.Bank(tiny("bert", torch.float32).eval())
    bank.load("a", tmp_path / "a")
    inputs = {k: v for k, v in data("bert").items() if k != "labels"}
    rows = bank(inputs, ["a", None] * (len(inputs["input_ids"]) // 2)).logits
    assert close(rows[::2], adapter.model(**inputs).logits[::2], 1e-5)
    assert close(rows[1::2], build("bert")(**inputs).logits[1::2], 1e-5)
