"""Bases in 4 and 8 bits: what bitsandbytes holds, and adapters over it, bit for bit those over the dequantised weights."""

import copy
import importlib
import itertools
import warnings

import numpy as np
import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.kinds import quantised
from rankwise.variants.adapter.linears import dtype_of, find_kind, kind_of, size_of, weight_of
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from rankwise.variants.adapter.surgery import Adapted
from rankwise.variants.lowrank.adapter import LowRankAdapter
from scipy.stats import norm
from torch import Tensor, nn

from tests.contract import SEEDS, attach, create, fingerprint, kind
from tests.loop import Loop
from tests.quantised_models import FORMS, by_bitsandbytes, in_full, loaded, needed, quantised_linears
from tests.test_callback import METHODS, Watch, trainer
from tests.tiers import quick
from tests.tiny import packed_batch

pytestmark = [needed, pytest.mark.filterwarnings("ignore")]
LOW_RANK = [name for name in variants.METHODS if issubclass(kind(name), LowRankAdapter)]
LOW_RANK.remove("loftq")  # whose start over a quantised base is another: tests/test_loftq.py
TARGETS = ["query", "intermediate.dense", "layer.1.output.dense"]


X = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))


def linear(form: str, out_features: int = 96, in_features: int = 128, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear of bitsandbytes over known weights."""
    bnb = importlib.import_module("bitsandbytes")
    W = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    W = (W * torch.linspace(0.5, 3, out_features)[:, None]).to(dtype)
    if form == "int8":
        module = bnb.nn.Linear8bitLt(in_features, out_features, has_fp16_weights=False)
        module.weight = bnb.nn.Int8Params(W, requires_grad=False, has_fp16_weights=False)
    else:
        module = bnb.nn.Linear4bit(in_features, out_features, quant_type="nf4", compress_statistics=form == "nf4+dq")
        module.weight = bnb.nn.Params4bit(
            W, requires_grad=False, quant_type="nf4", compress_statistics=form == "nf4+dq", module=module
        )
    module.source = W
    return module.to("cpu")


# -- what is held --------------------------------------------------------------------------------------------------------


def levels() -> np.ndarray:
    """QLoRA's appendix E, as released: quantiles of N(0, 1), eight above zero, seven below, and zero, over the largest."""
    offset = 0.9677083
    above, below = norm.ppf(np.linspace(offset, 0.5, 9)[:-1]), -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([above, [0.0], below]))
    return values / values.max()


def slow(module: nn.Linear) -> np.ndarray:
    """W of an nf4 weight, read out of its bytes one code after the other."""
    state, packed = module.weight.quant_state, module.weight.data.flatten().numpy()
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
    scales = state.absmax.numpy()
    if state.nested:  # codes of 8 bits, a scale for each block of 256, an offset for all
        of_blocks = state.state2.absmax.numpy()[np.arange(len(scales)) // 256]
        scales = (state.state2.code.numpy()[scales] * of_blocks).astype(np.float32) + np.float32(state.offset.item())
    table = state.code.numpy()  # the levels
    W = np.array([table[code] * scales[i // 64] for i, code in enumerate(codes)], dtype=np.float32)
    return W.reshape(module.out_features, module.in_features)


def test_the_sixteen_levels_are_quantiles_of_a_normal_distribution():
    module = linear("nf4", 1, 64)
    module.weight.data = torch.tensor([16 * (2 * i % 16) + (2 * i + 1) % 16 for i in range(32)], dtype=torch.uint8)[:, None]
    found = weight_of(module)[0] / module.weight.quant_state.absmax
    np.testing.assert_allclose(found[:16].numpy(), levels(), atol=1e-7)
    assert len(set(found.tolist())) == 16 and found.min() == -1 and 0.0 in found


@pytest.mark.parametrize("form", ["nf4", "nf4+dq"])
def test_four_bits_are_what_slow_code_reads_out_of_them(form):
    module = linear(form)
    np.testing.assert_allclose(module.weight.quant_state.code.numpy(), levels(), atol=1e-7)
    assert np.array_equal(weight_of(module).numpy(), slow(module))
    plain, W = weight_of(module).reshape(-1, 64), module.source.reshape(-1, 64)
    if form == "nf4":  # a block of 64 has the scale of its largest element
        torch.testing.assert_close(plain.abs().amax(1), W.abs().amax(1), rtol=1e-6, atol=0)
    assert module.weight.quant_state.blocksize == 64
    assert 0.05 < ((weight_of(module) - module.source).norm() / module.source.norm()).item() < 0.11


def test_double_quantization_has_blocks_of_256_scales():
    state = linear("nf4+dq", 256, 128).weight.quant_state
    assert state.nested and state.state2.blocksize == 256 and state.absmax.dtype == torch.uint8
    assert state.absmax.shape == (512,) and state.state2.absmax.shape == (2,)


@pytest.mark.parametrize(("form", "expected"), [("nf4", 4.5), ("nf4+dq", 4.127), ("int8", 8.031)])
def test_bits_of_a_weight_as_it_lies_in_memory(form, expected):
    module = linear(form, 1024, 1024)
    if form == "int8":
        parts = [module.weight.data, module.weight.SCB]
    else:
        state = module.weight.quant_state
        parts = [module.weight.data, state.absmax, *([state.state2.absmax] if state.nested else [])]
    bits = 8 * sum(part.numel() * part.element_size() for part in parts) / 2**20
    assert round(bits, 3) == expected


def test_eight_bits_are_codes_by_rows():
    module = linear("int8")
    codes, scales = module.weight.data.numpy().astype(np.float64), module.weight.SCB.numpy().astype(np.float64)
    np.testing.assert_allclose(weight_of(module).numpy(), codes * scales[:, None] / 127, rtol=1e-6)
    np.testing.assert_allclose(scales, module.source.half().abs().amax(1).numpy(), rtol=1e-6)
    before = weight_of(module)
    with torch.no_grad():
        module.eval()(torch.randn(2, 128))  # moves the scales from the weight to the state
    assert module.weight.SCB is None and torch.equal(weight_of(module), before)


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_linear_is_a_linear_of_its_own_size_and_type(form):
    module = linear(form, dtype=torch.bfloat16)
    assert type(find_kind(module)) is quantised.Quantised and kind_of(module).is_linear
    assert size_of(module) == weight_of(module).shape == (96, 128)
    assert dtype_of(module) == weight_of(module).dtype == (torch.float32 if form == "int8" else torch.bfloat16)
    assert quantised.scheme_of(nn.Sequential(module)) == quantised.Scheme(form[:4].rstrip("+"), form == "nf4+dq")


# -- adapters ------------------------------------------------------------------------------------------------------------


def passes(method: str, model: nn.Module, rows: dict[str, Tensor], **others: object) -> tuple[Tensor, list[Tensor], Tensor]:
    """Logits and gradients of a training pass, and the logits of an evaluation."""
    adapter = attach(create(method, **others), model, TARGETS)
    fill(adapter)
    inputs = {key: value for key, value in rows.items() if key != "labels"}
    model.train()
    adapter.begin(Step(1, 10), training=True)
    y = model(**inputs).logits
    (y.square().sum() + adapter.penalty(Step(1, 10)).sum()).backward()
    gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
    model.eval()
    adapter.begin(Step(1, 10), training=False)
    with torch.no_grad():
        evaluated = model(**inputs).logits
    adapter.detach()
    return y.detach(), gradients, evaluated


BOTH = list(itertools.product(LOW_RANK, FORMS))


@pytest.mark.parametrize(("method", "form"), quick(BOTH, {("lora", "nf4"), ("dora", "int8"), ("adalora+dora", "nf4+dq")}))
def test_outputs_and_gradients_are_those_over_the_dequantised_base(method, form):
    """Three members packed; the head and dropout among it."""
    model = loaded("bert", form)
    full = in_full(model)
    rows = packed_batch(SEEDS)
    got, want = (passes(method, one, rows) for one in (model, full))
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
    assert len(got[1]) == len(want[1]) > 3
    assert all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))


@pytest.mark.parametrize("method", quick(["adalora", "sora", "increlora"], ["adalora"]))
def test_training_allocates_shrinks_and_resumes_as_over_the_dequantised_base(method):
    model = loaded("bert", "nf4+dq")
    found = []
    for one in (in_full(model), model):
        adapter = attach(create(method), one, TARGETS)
        start = adapter.ranks()
        one.train()
        loop = Loop(adapter, [1e-2, 3e-3, 2e-2], 8)
        losses = [loop.step(packed_batch(SEEDS, i)) for i in range(5)]
        kept = copy.deepcopy(loop.state())
        losses += [loop.step(packed_batch(SEEDS, i)) for i in range(5, 8)]
        found.append((torch.stack(losses), adapter.ranks(), {n: t.clone() for n, t in adapter.state_dict().items()}))
    loop.load(kept)  # resumed over the quantised base
    again = torch.stack([loop.step(packed_batch(SEEDS, i)) for i in range(5, 8)])
    (losses, ranks, state), (quantised_losses, quantised_ranks, quantised_state) = found
    assert torch.equal(losses, quantised_losses) and torch.equal(again, quantised_losses[5:])
    assert all(torch.equal(ranks[name], quantised_ranks[name]) for name in ranks) and ranks.keys() == quantised_ranks.keys()
    assert all(torch.equal(state[name], quantised_state[name]) for name in state)
    assert any((ranks[name] != start[name]).any() for name in ranks)


SIXTEEN = list(itertools.product(FORMS, (torch.bfloat16, torch.float16)))


@pytest.mark.parametrize(("form", "dtype"), quick(SIXTEEN, {("nf4+dq", torch.bfloat16), ("int8", torch.bfloat16)}))
def test_a_sixteen_bit_model_computes_in_its_own_type(form, dtype):
    model = loaded("bert", form, dtype)
    rows = packed_batch(SEEDS)
    got, want = (passes("dora", one, rows) for one in (model, in_full(model)))
    assert got[0].dtype == want[0].dtype and torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
    assert all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))


def test_under_autocast_products_are_taken_in_its_type():
    model = loaded("bert", "nf4")
    full = in_full(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (passes("lora", one, packed_batch(SEEDS)) for one in (model, full))
    assert torch.equal(got[0], want[0]) and all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))
    inexact = passes("lora", full, packed_batch(SEEDS))
    assert not torch.equal(got[0], inexact[0])


def test_the_type_that_the_user_chose_to_compute_in_is_taken():
    module = linear("nf4", 8, 64)
    module.compute_dtype = torch.bfloat16
    module.forward = lambda x: quantised.product(module, x)
    want = nn.functional.linear(X.bfloat16(), by_bitsandbytes(module).bfloat16(), module.bias.bfloat16()).float()
    assert torch.equal(module(X), want) and module(X.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["nf4+dq", "int8"])
def test_other_models_and_untouched_modules_too(name, form):
    """GPT-2's Conv1D are linears of bitsandbytes; modules without an adapter compute as they train, in evaluation too."""
    model = loaded(name, form)
    full, ids = in_full(model), packed_batch(SEEDS)["input_ids"]
    logits = []
    for one in (model, full):
        targets = ["q_proj"] if name == "llama" else ["attn.c_proj"]
        adapter = variants.create("adalora", members=3, seeds=SEEDS, initial_rank=3, target_rank=2).attach(one, targets)
        fill(adapter)
        with torch.no_grad():
            logits.append(one.eval()(input_ids=ids).logits)
    assert torch.equal(*logits)
    assert not model.transformer.h[0].attn.c_proj.base.weight.is_floating_point() if name == "gpt2" else True


def test_detaching_gives_the_quantised_model_back():
    model = loaded("llama", "nf4+dq")
    before, forwards = fingerprint(model.state_dict()), [vars(m).get("forward") for m in model.modules()]
    adapter = variants.create("dora", rank=3).attach(model)
    fill(adapter)
    model(input_ids=packed_batch([0])["input_ids"])
    adapter.detach()
    assert fingerprint(model.state_dict()) == before
    assert [vars(m).get("forward") for m in model.modules()] == forwards
    assert all(type(m).__name__ == "Linear4bit" for m in quantised_linears(model).values())


def test_a_weight_is_dequantised_again_for_the_backward_pass_and_not_kept(monkeypatch):
    model, made, own = loaded("llama", "nf4"), [], quantised.dequantised
    adapter = variants.create("lora", rank=2).attach(model)
    fill(adapter)
    monkeypatch.setattr(quantised, "dequantised", lambda module, *a: made.append(id(module)) or own(module, *a))
    loss = model.train()(input_ids=packed_batch([0])["input_ids"]).logits.sum()
    forward = made.copy()
    assert sorted(forward) == sorted(id(m) for m in quantised_linears(model).values())
    loss.backward()
    again = made[len(forward) :]
    # The first layer's query, key and value have an input without a gradient.
    assert len(again) == len(forward) - 3 and len(set(again)) == len(again)


@pytest.mark.parametrize("form", ["nf4+dq", "int8"])
def test_norms_are_taken_of_blocks_of_rows(form, monkeypatch):
    module, sizes, own = linear(form, 1000, 128), [], quantised.dequantised
    whole = weight_of(module)
    monkeypatch.setattr(quantised, "BLOCK", 128 * 96)
    monkeypatch.setattr(quantised, "dequantised", lambda *a: sizes.append(own(*a).numel()) or own(*a))
    kind = kind_of(module)
    assert torch.equal(torch.cat(list(kind.row_blocks(module))), whole)
    torch.testing.assert_close(kind.squared_row_norms(module), whole.square().sum(1), rtol=1e-6, atol=0)
    assert max(sizes) == 128 * 96 and len(sizes) == 2 * 11
    adapter = variants.create("dora", rank=3).attach(nn.Sequential(module), ["0"], head=[])
    fill(adapter)
    sizes.clear()
    norm = adapter.site("0").norm(adapter.base("0"))
    assert max(sizes) == 128 * 96
    V = whole + adapter.site("0").inner.delta(module)[0]
    torch.testing.assert_close(norm[0], V.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", ["nf4", "nf4+dq"])
def test_a_base_that_was_evaluated_on_a_cpu_with_avx512_can_be_adapted(form):
    """There bitsandbytes' evaluation changes the order of the codes and rounds the scales to bf16, for good."""
    functional = importlib.import_module("bitsandbytes.functional")
    model = loaded("llama", form)
    wide = {name: weight_of(module) for name, module in quantised_linears(model).items()}
    packed = {}
    for name, module in quantised_linears(model).items():
        codes, module.weight.quant_state = functional._convert_weight_packed_for_cpu(
            module.weight.data, module.weight.quant_state
        )
        module.weight.data = packed[name] = codes
    adapter = variants.create("dora", rank=2).attach(model)
    fill(adapter)
    ids = packed_batch([0])["input_ids"]
    model.train()(input_ids=ids).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    for name, module in quantised_linears(adapter.detach()).items():
        torch.testing.assert_close(weight_of(module), wide[name], rtol=2**-8, atol=1e-9)
        assert not torch.equal(weight_of(module), wide[name])
        again = functional._convert_weight_packed_for_cpu(module.weight.data, copy.copy(module.weight.quant_state))[0]
        assert torch.equal(again, packed[name])  # what is rounded once stays as it is


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = loaded("llama", "nf4+dq")
        adapter = variants.create("dora", rank=3, dropout=0.3).attach(model)
        fill(adapter)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        for micro_batch in range(2):  # accumulated
            adapter.begin(Step(1, 10), micro_batch)
            model(input_ids=packed_batch([0], micro_batch)["input_ids"]).logits.square().sum().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_quantised_head_is_trained_from_its_dequantised_weights():
    """transformers itself quantises BERT's classifier and pooler."""
    model = loaded("bert", "nf4", skip=False)
    assert type(model.classifier).__name__ == "Linear4bit"
    W = weight_of(model.classifier)
    adapter = variants.create("lora", rank=2).attach(model)
    assert adapter.head_names == ["classifier"] and torch.equal(adapter.heads["classifier"].weight[0], W)
    fill(adapter)
    inputs = {key: value for key, value in packed_batch([0]).items() if key != "labels"}
    want = model.eval()(**inputs).logits
    adapter.merge()
    torch.testing.assert_close(model(**inputs).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", quick(["nf4+dq", "int8"], ["nf4+dq"]))
def test_transformers_trainer_trains_over_a_quantised_base(form, tmp_path):
    """With accumulation and its own door to checkpointing: to the bit what it does over the dequantised base."""
    losses, states = [], []
    for make in (lambda model: model, in_full):
        settings = METHODS["adalora+dora"] | {"warmup_steps": 1, "final_steps": 1, "interval": 1}
        adapter = variants.create("adalora+dora", **settings).attach(make(loaded("bert", form)))
        watch = Watch(adapter)
        made = trainer(
            adapter,
            tmp_path,
            [variants.AdapterCallback(adapter), watch],
            max_steps=4,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
        )
        made.train()
        losses.append(watch.losses)
        states.append({name: value.clone() for name, value in adapter.state_dict().items()})
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# -- merging -------------------------------------------------------------------------------------------------------------


MERGED = list(itertools.product(("lora", "dora", "adalora", "adalora+dora"), FORMS))


@pytest.mark.parametrize(("method", "form"), quick(MERGED, {("adalora", "nf4+dq"), ("dora", "int8")}))
def test_a_merge_dequantises_and_says_so(method, form):
    model = loaded("bert", form)
    before = fingerprint(model.state_dict())
    adapter = attach(create(method), model, TARGETS)
    fill(adapter)
    model.eval()
    rows = {key: value for key, value in packed_batch(SEEDS).items() if key != "labels"}
    sites = [name for name, _ in adapter.named_sites()]
    with torch.no_grad():
        together = model(**rows).logits
        for member in range(3):
            with pytest.warns(UserWarning, match=r"5 weights are dequantised \(0.1 MB\) until unmerge\(\)"):
                adapter.merge(member)
            assert all(adapter.base(name).weight.is_floating_point() for name in sites)
            own = slice(4 * member, 4 * member + 4)
            torch.testing.assert_close(model(**rows).logits[own], together[own], rtol=1e-4, atol=1e-5)
            with adapter.without(sites[0]):
                merged_without = model(**rows).logits[own]
            adapter.unmerge()
            with adapter.without(sites[0]):
                torch.testing.assert_close(merged_without, model(**rows).logits[own], rtol=1e-4, atol=1e-5)
        assert torch.equal(model(**rows).logits, together)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter.merge(1)
    adapter.detach()  # while merged
    assert fingerprint(model.state_dict()) == before and not any(isinstance(m, Adapted) for m in model.modules())


def test_a_bias_that_is_merged_leaves_its_weight_quantised():
    model = loaded("bert", "nf4")
    adapter = variants.create("bitfit").attach(model)
    fill(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.merge()
    assert type(adapter.base(TARGET).weight).__name__ == "Params4bit"
    with pytest.raises(ValueError, match="no quantised weight that is merged"):
        adapter.requantise()


BESIDE = [  # methods without a low-rank site
    ("ia3", "bert", {}), ("ia3", "llama", {}), ("houlsby", "llama", {"bottleneck": 3}), ("pfeiffer", "bert", {"bottleneck": 3}),
    ("prompt-tuning", "bert", {"tokens": 3}), ("prefix-tuning", "llama", {"tokens": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "name", "settings"), BESIDE)
def test_what_is_no_low_rank_site_acts_as_over_the_dequantised_weights(method, name, settings):
    model = loaded(name, "nf4")
    full, found = in_full(model), []
    inputs = {key: value for key, value in packed_batch([0, 1]).items() if key != "labels"}
    for one in (model, full):
        adapter = variants.create(method, members=2, **settings).attach(one)
        fill(adapter)
        logits = one(**inputs).logits
        logits.square().sum().backward()
        found.append([logits, *(parameter.grad for parameter in adapter.parameters())])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


TARGET = "bert.encoder.layer.0.intermediate.dense"


@pytest.mark.parametrize("form", FORMS)
def test_quantising_a_merged_weight_again_says_what_it_costs(form):
    model = loaded("bert", form)
    adapter = variants.create("lora", rank=4, alpha=9).attach(model, TARGETS, head=[])
    fill(adapter, spread=0.05)
    before = {name: weight_of(adapter.base(name)) for name, _ in adapter.named_sites()}
    adapter.merge()
    merged = {name: weight_of(adapter.base(name)).clone() for name in before}
    cost = adapter.requantise()
    now = {name: weight_of(adapter.base(name)) for name in before}
    assert not any(adapter.base(name).weight.is_floating_point() for name in before)

    def size(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return sum((a[n].double() - b[n].double()).square().sum().item() for n in before) ** 0.5

    zero = {name: torch.zeros_like(W) for name, W in merged.items()}
    assert cost.weights == 5 and cost.error == pytest.approx(size(now, merged) / size(merged, zero))
    assert cost.of_change == pytest.approx(size(now, merged) / size(merged, before))
    shares = {n: ((now[n] - merged[n]).norm() / (merged[n] - before[n]).norm()).item() for n in before}
    assert cost.worst == (max(shares, key=shares.get), pytest.approx(max(shares.values())))
    assert (0.002 < cost.error < 0.02) if form == "int8" else (0.08 < cost.error < 0.11)
    assert f"5 merged weights, quantised again to {cost.scheme}, are off by " in str(cost)
    adapter.unmerge()
    assert all(torch.equal(weight_of(adapter.base(name)), W) for name, W in before.items())


# -- what is refused -----------------------------------------------------------------------------------------------------


def strange() -> dict[str, tuple[nn.Module, str]]:
    bnb = importlib.import_module("bitsandbytes")
    stored = bnb.nn.Linear4bit(64, 64, quant_type="nf4", quant_storage=torch.bfloat16).to("cpu")
    return {
        "not yet": (
            bnb.nn.Linear4bit(64, 64),
            "Linear4bit whose weight is not quantised yet: move the model to its device",
        ),
        "stored": (
            stored,
            "4 bits are stored as torch.bfloat16: load the model with bnb_4bit_quant_storage = torch.uint8",
        ),
        "fp16": (bnb.nn.Linear8bitLt(64, 64), "whose weight is still torch.float32: .* llm_int8_has_fp16_weight = False"),
        "meta": (bnb.nn.Linear4bit(64, 64, device="meta"), "whose weight is not in memory"),
        "embedding": (bnb.nn.Embedding8bit(64, 64).to("cpu"), "is a Embedding8bit which has a forward pass of its own"),
    }


@pytest.mark.parametrize("which", ["not yet", "stored", "fp16", "meta", "embedding"])
@pytest.mark.parametrize("method", ["lora"])
def test_what_cannot_be_adapted_is_refused_in_one_line(method, which):
    module, words = strange()[which]
    with pytest.raises(ValueError, match=words) as error:
        variants.create(method, rank=2).attach(nn.Sequential(module), ["0"], head=[])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("form", "words"), [("nf4+dq", "nf4 with double quantization"), ("int8", "int8")])
def test_full_fine_tuning_of_a_quantised_base_is_refused_in_one_line(form, words):
    model = loaded("bert", form)
    with pytest.raises(
        ValueError, match=rf"BertForSequenceClassification is quantised \({words}\), and full trains float"
    ) as error:
        variants.create("full").attach(model)
    assert "\n" not in str(error.value) and not any(isinstance(m, Adapted) for m in model.modules())


def test_widths_that_bitsandbytes_reads_wrongly_are_warned_of(monkeypatch):
    model = nn.Sequential(linear("nf4", 64, 96))
    monkeypatch.setattr(quantised, "is_misread", lambda width, block, name: width % block != 0)
    with pytest.warns(UserWarning, match="nf4 weights of 96 inputs wrongly on this processor, which takes multiples of 64"):
        adapter = variants.create("dora", rank=2).attach(model, ["0"], head=[])
    fill(adapter)
    V = by_bitsandbytes(adapter.base("0")) + adapter.site("0").inner.delta(adapter.base("0"))[0]
    torch.testing.assert_close(adapter.site("0").norm(adapter.base("0"))[0], V.norm(dim=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variants.create("lora", rank=2).attach(nn.Sequential(linear("nf4")), ["0"], head=[])


def test_whether_a_width_is_misread_is_found_by_trying():
    functional = importlib.import_module("bitsandbytes.functional")
    for width in (48, 70, 96, 128):
        W = torch.randn(64, width, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 2, 64)[:, None]
        codes, state = functional.quantize_4bit(W, quant_type="nf4")
        error = (functional.dequantize_4bit(codes, state) - W).norm() / W.norm()
        assert quantised.is_misread(width, 64, "nf4") == bool(error > 0.12), width
