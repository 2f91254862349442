"""PEFT 0.21.2 is the oracle: the same weights give the same output, gradients and training; files load both ways."""

import re
import warnings
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from rankwise import variants
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from torch import Tensor, nn

from tests.tiers import diagonal, quick
from tests.tiny import batch, tiny

pytestmark = pytest.mark.filterwarnings("ignore")
RANK, ALPHA = 5, 7  # alpha != r, and a rank that divides nothing
STEPS, WARMUP, FINAL = 20, 3, 6


class Plain(nn.Module):
    """No transformer: out != in, one linear with a bias and one without, an output that has a loss."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(6, 11), nn.Linear(11, 9, bias=False)])
        self.lora = nn.Linear(9, 7)
        self.classifier = nn.Linear(7, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        for layer in self.body:
            x = torch.tanh(layer(x))
        logits = self.classifier(torch.tanh(self.lora(x)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    if name != "plain":
        return tiny(name, dtype).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Plain().to(dtype).eval()


def data(name: str, step: int = 0) -> dict[str, Tensor]:
    if name != "plain":
        return batch(0, step, rows=6)
    random = torch.Generator().manual_seed(step)
    return {"x": torch.randn(6, 6, generator=random), "labels": torch.randint(3, (6,), generator=random)}


TARGETS = {
    "bert": ["query", "value", "intermediate.dense", "attention.output.dense"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "plain": ["body.0", "body.1", "lora"],
}
HEAD = {"bert": "classifier", "gpt2": "score", "plain": "classifier"}
LOW_RANK = {"rank": RANK, "alpha": ALPHA}
SVD = {"initial_rank": RANK, "target_rank": 2, "alpha": ALPHA, "warmup_steps": WARMUP, "final_steps": FINAL, "interval": 2}
PEFT_SVD = {"init_r": RANK, "target_r": 2, "tinit": WARMUP, "tfinal": FINAL, "deltaT": 2, "total_step": STEPS}
KINDS = {  # ours, PEFT's
    "lora": (("lora", LOW_RANK), (LoraConfig, {"r": RANK})),
    "rslora": (("lora", {**LOW_RANK, "scaling": "alpha/sqrt(r)"}), (LoraConfig, {"r": RANK, "use_rslora": True})),
    "dora": (("dora", LOW_RANK), (LoraConfig, {"r": RANK, "use_dora": True})),
    "adalora": (("adalora", {**SVD, "orthogonality": 0.3}), (AdaLoraConfig, {**PEFT_SVD, "orth_reg_weight": 0.3})),
}


def ours(kind: str, model: str, dtype: torch.dtype = torch.float32, **more) -> Adapter:
    name, settings = KINDS[kind][0]
    base = build(model, dtype)
    return variants.create(name, **settings | more).attach(base, targets=TARGETS[model], head=[HEAD[model]])


def peft(kind: str, model: str, dtype: torch.dtype = torch.float32, **more) -> PeftModel:
    config, settings = KINDS[kind][1]
    task = {} if model == "plain" else {"task_type": "SEQ_CLS"}
    settings = {"lora_alpha": ALPHA, "target_modules": TARGETS[model], "modules_to_save": [HEAD[model]], **settings, **task}
    return get_peft_model(build(model, dtype), config(**settings | more)).eval()


def pairs(adapter: Adapter, model: PeftModel) -> list[tuple[str, nn.Parameter, nn.Parameter, Callable]]:
    """(name, our parameter, PEFT's, what turns ours (1, ...) into PEFT's shape)."""
    theirs = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    found = []
    for name, site in adapter.named_sites():
        inner = getattr(site, "inner", site)
        end = "" if f"{name}.lora_E.default" in theirs else ".weight"
        found += [(f"{name}.{part}", getattr(inner, part), theirs[f"{name}.lora_{part}.default{end}"], first) for part in "AB"]
        if hasattr(inner, "E"):
            found.append((f"{name}.E", inner.E, theirs[f"{name}.lora_E.default"], lambda t: t[0][:, None]))
        if hasattr(site, "magnitude"):
            found.append((f"{name}.m", site.magnitude, theirs[f"{name}.lora_magnitude_vector.default.weight"], first))
    for name, site in adapter.heads.items():
        for key, parameter in site.named_parameters():
            found.append((f"{name}.{key}", parameter, theirs[f"{name}.modules_to_save.default.{key}"], first))
    return found


def first(tensor: Tensor) -> Tensor:
    return tensor[0]


@torch.no_grad()
def same_weights(adapter: Adapter, model: PeftModel) -> None:
    for _, mine, theirs, view in pairs(adapter, model):
        theirs.copy_(view(mine))


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**{k: v for k, v in inputs.items() if k != "labels"}).logits


def close(mine: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return (mine - theirs).abs().max().item() <= tolerance * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("model", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_weights_give_the_same_output_and_gradients(kind, model):
    adapter, oracle = ours(kind, model), peft(kind, model)
    fill(adapter)
    same_weights(adapter, oracle)
    inputs = data(model)
    mine, theirs = logits(adapter.model, inputs), logits(oracle, inputs)
    assert (mine - logits(build(model), inputs)).abs().max() > 0.05, "the adapter acts"
    assert close(mine, theirs, 1e-5)
    for out in (mine, theirs):
        nn.functional.cross_entropy(out, inputs["labels"]).backward()
    for name, parameter, other, view in pairs(adapter, oracle):
        assert parameter.grad.abs().max() > 0, name
        assert close(view(parameter.grad), other.grad, 1e-5), name


@pytest.mark.parametrize(("kind", "model"), quick(product(KINDS, TARGETS), diagonal(KINDS, TARGETS)))
def test_twenty_steps_of_training_stay_together(kind, model):
    """AdamW, PEFT's penalty included; AdaLoRA keeps the same triplets at every allocation."""
    adapter, oracle = ours(kind, model), peft(kind, model)
    same_weights(adapter, oracle)
    start = [view(p).detach().clone() for _, p, _, view in pairs(adapter, oracle)]
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, eps=1e-6) for m in (adapter, oracle)
    ]
    allocations = 0
    for index in range(1, STEPS + 1):
        inputs, step = data(model, index), Step(index, STEPS)
        adapter.begin(step)
        loss = nn.functional.cross_entropy(logits(adapter.model, inputs), inputs["labels"])
        (loss + adapter.penalty(step).sum()).backward()
        oracle.base_model(**inputs).loss.backward()  # without a task type PeftModel itself leaves the penalty out
        for optimizer in optimizers:
            optimizer.step()
        adapter.after_step(step)
        if kind == "adalora":
            oracle.base_model.update_and_allocate(index)
            pattern = oracle.peft_config["default"].rank_pattern
            for name, site in adapter.named_sites():
                kept = pattern[f"{name}.lora_E.default"] if pattern else [True] * RANK
                assert site.kept[0].tolist() == kept, (index, name)
            allocations += sum(sum(bits) for bits in (pattern or {}).values()) > 0
        for optimizer in optimizers:
            optimizer.zero_grad()
        for name, parameter, other, view in pairs(adapter, oracle):
            assert close(view(parameter), other, 1e-4), (index, name)
    for (name, parameter, _, view), before in zip(pairs(adapter, oracle), start, strict=True):
        assert name.endswith(".E") or (view(parameter) - before).abs().max() > 0.01, (name, "was trained")
    assert kind != "adalora" or allocations > 10
    assert close(logits(adapter.model, data(model)), logits(oracle, data(model)), 1e-4)


@pytest.mark.parametrize("model", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_our_folder_loads_in_peft(kind, model, tmp_path):
    adapter = ours(kind, model)
    prepare(adapter)
    variants.save_pretrained(adapter, tmp_path / "adapter")
    assert_same_in_peft(adapter, model, tmp_path / "adapter")


def prepare(adapter: Adapter, seed: int = 1) -> None:
    """Nothing trivial; where triplets can be cut: the first site at rank 0, others cut by chance, one cut one alive."""
    fill(adapter, spread=0.3, seed=seed)
    random = torch.Generator().manual_seed(seed)
    inners = [getattr(site, "inner", site) for _, site in adapter.named_sites()]
    for index, inner in enumerate(s for s in inners if hasattr(s, "kept")):
        keep = torch.rand(inner.kept.shape, generator=random) < (0.6 if index else -1)
        inner.kept.copy_(keep & inner.slots.bool())
        inner.project()
        if index == 1:  # between two projections a triplet that was cut may act again
            with torch.no_grad():
                inner.E[0, (~inner.kept[0]).nonzero()[0]] = 0.7


def assert_same_in_peft(adapter: Adapter, model: str, folder, tolerance: float = 1e-5) -> PeftModel:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        oracle = PeftModel.from_pretrained(build(model, next(adapter.parameters()).dtype), folder).eval()
    # PEFT reads ADALORA's rank_pattern as LORA's and complains of its own files too.
    said = [str(w.message) for w in caught if not re.search("deprecated|rank_pattern keys did not.*lora_E'", str(w.message))]
    assert not said, "PEFT loads it without a word"
    inputs = data(model)
    if next(adapter.parameters()).dtype == torch.float64:
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    mine = logits(adapter.model, inputs)
    assert (mine - logits(build(model, mine.dtype), inputs)).abs().max() > 0.05, "the adapter acts"
    assert close(mine, logits(oracle, inputs), tolerance)
    return oracle


@pytest.mark.parametrize("model", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_peft_loads_here(kind, model, tmp_path):
    oracle = peft(kind, model)
    shake(oracle)
    oracle.save_pretrained(tmp_path)
    assert_same_here(oracle, model, tmp_path)


@torch.no_grad()
def shake(oracle: PeftModel) -> None:
    random = torch.Generator().manual_seed(3)
    for name, parameter in oracle.named_parameters():
        if ("lora_" in name or "modules_to_save" in name) and "ranknum" not in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))


def assert_same_here(oracle: PeftModel, model: str, folder, tolerance: float = 1e-5) -> Adapter:
    adapter = variants.load_pretrained(build(model), folder)
    theirs = logits(oracle, data(model))
    assert (theirs - logits(build(model), data(model))).abs().max() > 0.05, "the adapter acts"
    assert close(logits(adapter.model, data(model)), theirs, tolerance)
    return adapter


@pytest.mark.parametrize("rooted", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_rank_and_alpha_patterns_of_peft_load_here(rooted, dora, tmp_path):
    patterns = {
        "rank_pattern": {"query": 2, r"^bert\.encoder\.layer\.1\..*value": 7},
        "alpha_pattern": {"dense": 3, "1.*y": 20},
    }
    oracle = peft("lora", "bert", use_rslora=rooted, use_dora=dora, **patterns)
    shake(oracle)
    oracle.save_pretrained(tmp_path)
    adapter = assert_same_here(oracle, "bert", tmp_path)
    layer = "bert.encoder.layer.1.attention.self"
    assert adapter.ranks()[f"{layer}.query"].item() == 2 and adapter.ranks()[f"{layer}.value"].item() == 7
    assert adapter.scales()[f"{layer}.query"].item() == pytest.approx(20 / (2**0.5 if rooted else 2))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_our_rank_and_alpha_patterns_load_in_peft(kind, tmp_path):
    adapter = ours(kind, "bert", rank_pattern={"query": 2, "layer.0.*value": 7}, alpha_pattern={"dense": 3.5})
    fill(adapter, spread=0.3)
    variants.save_pretrained(adapter, tmp_path)
    assert_same_in_peft(adapter, "bert", tmp_path)


def test_adalora_with_unequal_ranks_and_alphas_loads_in_peft(tmp_path):
    """PEFT has one scale for all sites: what differs stands in E."""
    more = {"scaling": "alpha/sqrt(r)", "rank_pattern": {"query": 3, "value": 8}, "alpha_pattern": {"dense": 3.5}}
    adapter = ours("adalora", "bert", torch.float64, **more)
    prepare(adapter)
    variants.save_pretrained(adapter, tmp_path)
    assert_same_in_peft(adapter, "bert", tmp_path, 1e-7)  # PEFT's ranknum + 1e-5 is fp32


@pytest.mark.parametrize("model", TARGETS)
def test_adalora_pruned_by_peft_loads_here_with_the_same_ranks(model, tmp_path):
    """Trained until PEFT pruned it; the first module is at rank 0."""
    oracle = peft("adalora", model)
    shake(oracle)
    optimizer = torch.optim.AdamW([p for p in oracle.parameters() if p.requires_grad], lr=1e-2)
    for index in range(1, STEPS + 1):
        oracle(**data(model, index)).loss.backward()
        optimizer.step()
        oracle.base_model.update_and_allocate(index)
        optimizer.zero_grad()
    pattern = oracle.peft_config["default"].rank_pattern
    pattern[next(iter(pattern))] = [False] * RANK
    oracle.base_model.rankallocator.mask_using_rank_pattern(oracle.base_model.model, pattern)
    ranks = {name.split(".lora_E")[0]: sum(bits) for name, bits in pattern.items()}
    assert 0 < sum(ranks.values()) <= 2 * len(ranks) and min(ranks.values()) == 0
    theirs = logits(oracle, data(model)).detach()
    oracle.save_pretrained(tmp_path)
    adapter = variants.load_pretrained(build(model), tmp_path)
    assert close(logits(adapter.model, data(model)), theirs, 1e-5)
    assert {name: rank.item() for name, rank in adapter.ranks().items()} == ranks
    assert {name: rank.item() for name, rank in adapter.live_ranks().items()} == ranks
    assert adapter.total_steps == STEPS and adapter.settings.final_steps == FINAL and adapter.settings.interval == 2
    for name, site in adapter.named_sites():  # what was cut starts anew
        assert (site.A[0].abs().sum(1) > 0).all() and (site.B[0].abs().sum(0) > 0).all(), name


@pytest.mark.parametrize("model", TARGETS)
def test_adalora_with_dora_loads_in_peft_as_dora(model, tmp_path):
    """The magnitude of a site at rank 0 still acts."""
    base = build(model)
    adapter = variants.create("adalora+dora", **KINDS["adalora"][0][1], rank_pattern={TARGETS[model][1]: 3})
    adapter.attach(base, targets=TARGETS[model], head=[HEAD[model]])
    prepare(adapter)
    assert 0 in [rank.item() for rank in adapter.live_ranks().values()]
    variants.save_pretrained(adapter, tmp_path)
    oracle = assert_same_in_peft(adapter, model, tmp_path)
    assert oracle.peft_config["default"].use_dora


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_head_only_loads_in_peft(model, tmp_path):
    adapter = variants.create("head").attach(build(model))
    fill(adapter, spread=0.3)
    variants.save_pretrained(adapter, tmp_path)
    assert_same_in_peft(adapter, model, tmp_path)
