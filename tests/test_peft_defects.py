"""Defects of PEFT 0.21.2's AdaLoRA and DoRA that must not be here: one test each, the name is the claim.

Numbers H1.1 ... H2.1 are those of the list of defects that this project was begun with.
"""

import copy
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from rankwise import variants
from rankwise.variants.adalora import AdaLoRA
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from rankwise.variants.allocation.schedules import scheduled_budget
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.tiny import batch, tiny

TARGETS = ["query", "value", "output.dense"]  # 8 modules of the tiny BERT
MODULES = 8
TOTAL = 24
SVD = {"initial_rank": 5, "target_rank": 2, "alpha": 7, "warmup_steps": 3, "final_steps": 6, "interval": 5}


def adalora(seed: int = 0, head: list[str] | None = None, **settings) -> AdaLoRA:
    model = tiny("bert", torch.float32).eval()
    return variants.create("adalora", seeds=[seed], **SVD | settings).attach(model, targets=TARGETS, head=head)


class Run:
    """AdamW over an adapter, in the order of the design."""

    def __init__(self, adapter: AdaLoRA, total: int = TOTAL):
        self.adapter, self.total, self.index = adapter, total, 0
        self.optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)

    def step(self, spoil=None, skip: bool = False, taken: Tensor | None = None) -> None:
        """spoil: changes the gradients; skip: leaves the optimizer's step out, as a gradient scaler does."""
        self.index += 1
        step = Step(self.index, self.total, taken)
        self.adapter.begin(step)
        (self.loss() + self.adapter.penalty(step).sum()).backward()
        if spoil is not None:
            for parameter in self.adapter.parameters():
                spoil(parameter.grad)
        if not skip:
            self.optimizer.step()
        self.adapter.after_step(step)
        self.optimizer.zero_grad()

    def loss(self) -> Tensor:
        data = batch(0, self.index, rows=6)
        return nn.functional.cross_entropy(self.adapter.model(**inputs(data)).logits, data["labels"])

    def until(self, index: int) -> "Run":
        while self.index < index:
            self.step()
        return self

    def resumed(self) -> "Run":
        """In a fresh model, from what a checkpoint holds."""
        state = copy.deepcopy((self.adapter.state_dict(), self.optimizer.state_dict()))
        run = Run(adalora(**self.adapter.settings.model_dump(exclude_unset=True)), self.total)
        run.adapter.load_state_dict(state[0])
        run.optimizer.load_state_dict(state[1])
        run.index = self.index
        return run


def inputs(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in data.items() if key != "labels"}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**inputs(batch(0))).logits


def total(ranks: dict[str, Tensor]) -> int:
    return sum(rank.item() for rank in ranks.values())


def budget(index: int, interval: int = 5, steps: int = TOTAL) -> int:
    """What the last allocation up to step `index` allowed."""
    end = steps - SVD["final_steps"]
    last = end if index >= end else index - index % interval
    return scheduled_budget("cubic", last, SVD["warmup_steps"], end, 5 * MODULES, 2 * MODULES)


@pytest.mark.parametrize("stop", [7, 12, 14])
def test_resume_in_mid_budgeting_keeps_the_adapter(stop):
    """H1.1: PEFT's ends with every module at rank 0."""
    whole = Run(adalora()).until(TOTAL)
    halves = Run(adalora()).until(stop).resumed()
    assert total(halves.adapter.ranks()) == budget(stop) > 0
    halves.until(TOTAL)
    assert halves.adapter.ranks() == whole.adapter.ranks()
    assert torch.equal(logits(halves.adapter.model), logits(whole.adapter.model))


@pytest.mark.parametrize("stop", [7, 10, 15])
def test_training_goes_on_from_a_folder_saved_in_mid_budgeting(stop, tmp_path):
    """H1.1: the triplets that were cut have their slots again, so that the budget is counted as before."""
    run = Run(adalora()).until(stop)
    variants.save_pretrained(run.adapter, tmp_path)
    again = Run(variants.load_pretrained(tiny("bert", torch.float32).eval(), tmp_path))
    assert again.adapter.ranks() == run.adapter.ranks() and again.adapter.totals() == run.adapter.totals()
    again.index = stop
    for index in range(stop + 1, TOTAL + 1):
        again.step()
        assert total(again.adapter.ranks()) == budget(index), index


@pytest.mark.parametrize("stop", [18, 20])
def test_resume_in_the_final_phase_goes_on(stop, tmp_path):
    """H1.2: PEFT's crashes, for its mask is longer than what it cut the tensors to."""
    run = Run(adalora()).until(stop)
    variants.save_pretrained(run.adapter, tmp_path)
    from_folder = Run(variants.load_pretrained(tiny("bert", torch.float32).eval(), tmp_path))
    from_folder.index = stop
    ranks = run.adapter.ranks()
    for again in (run.resumed(), from_folder):
        again.until(TOTAL)
        assert again.adapter.ranks() == ranks == again.adapter.live_ranks() and total(ranks) == 2 * MODULES


@pytest.mark.parametrize("stop", [8, 14, 20])
def test_the_saved_model_is_the_trained_model_between_two_masks(stop, tmp_path):
    """H1.3: singular values that came back since the last mask are in the file, here and read by PEFT."""
    run = Run(adalora()).until(stop)
    revived = total(run.adapter.live_ranks()) - total(run.adapter.ranks())
    assert revived > 0 if stop < 18 else revived == 0
    variants.save_pretrained(run.adapter, tmp_path)
    here = variants.load_pretrained(tiny("bert", torch.float32).eval(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = PeftModel.from_pretrained(tiny("bert", torch.float32).eval(), tmp_path).eval()
    for model in (here.model, there):
        assert torch.allclose(logits(model), logits(run.adapter.model), rtol=0, atol=1e-5)
    assert here.live_ranks() == run.adapter.live_ranks()


@pytest.mark.parametrize("interval", [1, 5, 7, 100])
def test_the_live_model_ends_pruned_without_a_final_phase(interval):
    """H1.4: with final_steps = 0 and an interval that does not divide the run."""
    adapter = adalora(final_steps=0, interval=interval)
    Run(adapter).until(TOTAL)
    assert total(adapter.live_ranks()) == total(adapter.ranks()) == 2 * MODULES


@pytest.mark.parametrize("training", [False, True])
def test_the_penalty_is_never_in_an_evaluation(training):
    """H1.5: an adapter that does nothing has the loss of its base, in evaluation and in the model's own loss."""
    data = batch(0)
    with torch.no_grad():
        base = tiny("bert", torch.float32).eval()(**data).loss
        adapter = adalora(head=[], orthogonality=3.0)
        adapter.train(training)
        adapter.begin(Step(1, TOTAL), training=training)
        assert torch.allclose(adapter.model(**data).loss, base, atol=1e-6)
        assert adapter.penalty(Step(1, TOTAL)).item() > 1


def test_a_loaded_adapter_computes_a_loss(tmp_path):
    """H1.6: PEFT's raises AttributeError for want of a trainable adapter; training goes on too."""
    adapter = adalora()
    fill(adapter)
    variants.save_pretrained(adapter, tmp_path)
    again = variants.load_pretrained(tiny("bert", torch.float32).eval(), tmp_path)
    loss = again.model(**batch(0)).loss
    (loss + again.penalty(Step(1, TOTAL)).sum()).backward()
    assert torch.allclose(loss, adapter.model(**batch(0)).loss, atol=1e-5)
    assert all(p.grad is not None for p in again.parameters())


def test_a_target_rank_of_the_initial_one_trains_and_above_it_is_refused():
    """H1.7: PEFT's kthvalue is out of range in both cases."""
    adapter = adalora(target_rank=5)
    Run(adapter).until(TOTAL)
    assert total(adapter.ranks()) == 5 * MODULES
    with pytest.raises(ValueError, match=r"target_rank = 6 is above initial_rank = 5.*at least 6"):
        adalora(target_rank=6)
    with pytest.raises(ValueError, match=r"target_rank times 8 sites is 32, above the 26 triplets.*lower target_rank"):
        adalora(target_rank=4, rank_pattern={"query": 1, "attention.output.dense": 2})


class Named(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.add_module(name, nn.Linear(4, 6))
        self.body = nn.ModuleDict({name: nn.Linear(6, 6)} if name != "keys" else {"k": nn.Linear(6, 6)})
        self.lora_A = nn.Linear(6, 3)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(getattr(self, self.name)(x))
        return self.lora_A(torch.tanh(next(iter(self.body.values()))(x)))


@pytest.mark.parametrize("name", ["a", "lora", "self", "q_proj", "lora_E", "base", "site", "inner", "default", "keys", "E"])
def test_no_name_of_a_module_breaks_training_or_saving(name, tmp_path):
    """H1.8: PEFT finds its state by substrings of names."""

    def build() -> Named:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Named(name)

    adapter = variants.create("adalora", initial_rank=3, target_rank=1, alpha=5, final_steps=2)
    adapter.attach(build(), targets=[f"^{name}$", "body.*", "lora_A"])
    assert len(adapter.ranks()) == 3
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for index in range(1, 8):
        (adapter.model(x).square().mean() + adapter.penalty(Step(index, 7)).sum()).backward()
        optimizer.step()
        adapter.after_step(Step(index, 7))
        optimizer.zero_grad()
    assert total(adapter.ranks()) == 3 and (adapter.model(x) - build()(x)).abs().max() > 1e-3
    variants.save_pretrained(adapter, tmp_path)
    again = variants.load_pretrained(build(), tmp_path)
    assert again.ranks() == adapter.ranks() and torch.allclose(again.model(x), adapter.model(x), atol=1e-6)
    adapter.merge()
    assert torch.allclose(again.model(x), adapter.model(x), atol=1e-6)


def test_forgetting_to_allocate_is_said_and_too_late_is_refused():
    """H1.9: PEFT never prunes, or raises a TypeError."""
    forgotten = adalora()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forgotten.ranks()  # nothing to say yet
    optimizer = torch.optim.AdamW(forgotten.parameters(), lr=1e-2)
    forgotten.model(**batch(0)).loss.backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="after_step was never called, so no rank was pruned"):
        forgotten.ranks()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"found no gradient: call it after optimizer.step\(\) and before zero_grad\(\)"):
        forgotten.after_step(Step(1, TOTAL))


def test_forgetting_to_allocate_is_said_of_a_loaded_adapter_too(tmp_path):
    run = Run(adalora()).until(10)
    variants.save_pretrained(run.adapter, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="the task head")  # what attach says of every head that it finds
        again = variants.load_pretrained(tiny("bert", torch.float32).eval(), tmp_path)
        again.ranks()
        run.resumed().adapter.ranks()
    again.model(**batch(0)).loss.backward()
    torch.optim.SGD(again.parameters(), lr=1e-2).step()
    with pytest.warns(UserWarning, match="after_step was never called"):
        again.ranks()


class Towers(nn.Module):
    """The second tower is used every other time."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 6)])

    def forward(self, x: Tensor, second: bool) -> SimpleNamespace:
        return self.towers[0](x) + (self.towers[1](x) if second else 0)


def test_a_site_without_a_gradient_keeps_its_score():
    """H1.10: PEFT raises a TypeError.  The third tower is never used."""
    adapter = variants.create("adalora", initial_rank=4, target_rank=2, alpha=5, final_steps=2).attach(Towers())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for index in range(1, 13):
        before = [score.clone() for score in adapter.triplet_scores()]
        adapter.model(x, second=index % 2 == 1).square().mean().backward()
        optimizer.step()
        adapter.after_step(Step(index, 12))
        optimizer.zero_grad()
        after = adapter.triplet_scores()
        scored = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
        assert scored == [index < 10, index % 2 == 1 and index < 10, False], index
        assert total(adapter.ranks()) == scheduled_budget("cubic", index, 0, 10, 12, 6)
    assert [rank.item() for rank in adapter.ranks().values()] == [4, 2, 0]


@pytest.mark.parametrize("how", ["scaler", "said", "unsaid"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_a_gradient_that_is_not_finite_leaves_the_importance(value, how):
    """H1.11: PEFT's averages stay NaN for good, and pruning stops without a word."""
    adapter = adalora(interval=1)
    run = Run(adapter).until(6)
    before = [score.clone() for score in adapter.triplet_scores()]

    def spoil(gradient: Tensor) -> None:
        gradient.view(-1)[0] = value

    run.step(spoil, skip=True, taken=torch.tensor([False]) if how == "said" else None)
    assert all(torch.equal(a, b) for a, b in zip(before, adapter.triplet_scores(), strict=True))
    for index in range(8, TOTAL + 1):
        run.step()
        assert total(adapter.ranks()) == budget(index, interval=1), index
    assert logits(adapter.model).isfinite().all()


def test_ties_keep_exactly_the_budget():
    """H1.11: PEFT cuts every triplet at the threshold, so all of them where all gradients are zero."""
    adapter = adalora(interval=1)
    run = Run(adapter)
    for index in range(1, TOTAL + 1):
        run.step(spoil=Tensor.zero_, skip=True)
        assert total(adapter.ranks()) == budget(index, interval=1), index
    assert all((score == 0).all() for score in adapter.triplet_scores())
    first = next(iter(adapter.ranks().values()))
    assert first.item() == 5, "ties go by the order of the sites"


def test_patterns_and_scalings_take_effect_in_adalora():
    """H1.12: PEFT's AdaLoRA takes alpha_pattern, use_rslora and rank_pattern and ignores them, and refuses DoRA."""
    adapter = adalora(rank_pattern={"query": 3}, alpha_pattern={"value": 2}, scaling="alpha/sqrt(r)")
    for name, scale in adapter.scales().items():
        rank, alpha = 3 if "query" in name else 5, 2 if "value" in name else 7
        assert adapter.ranks()[name].item() == rank and scale.item() == pytest.approx(alpha / rank**0.5)
    fill(adapter)
    name, site = next(iter(adapter.named_sites()))
    dense = site.B[0] @ torch.diag(site.E[0]) @ site.A[0] * (7 / 3**0.5)
    assert torch.allclose(adapter.delta(name)[0], dense, atol=1e-6)
    both = variants.create("adalora+dora", **SVD).attach(tiny("bert", torch.float32), targets=TARGETS)
    assert all(hasattr(site, "magnitude") for _, site in both.named_sites())


@pytest.mark.parametrize("stop", [14, TOTAL])
def test_adalora_exports_exactly_to_plain_lora(stop, tmp_path):
    """H1.13: so that what serves LoRA can serve it; PEFT's convert_to_lora raises a TypeError."""
    adapter = Run(adalora(rank_pattern={"query": 3}, alpha_pattern={"value": 2})).until(stop).adapter
    with torch.no_grad():
        adapter.site(next(iter(adapter.ranks()))).E.zero_()  # a site at rank 0
    variants.export_lora(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    live = {name: rank.item() for name, rank in adapter.live_ranks().items() if rank.item()}
    assert config["peft_type"] == "LORA" and not config["use_rslora"] and not config["use_dora"]
    assert set(config["target_modules"]) == set(live) and len(live) < MODULES
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {n: len(tensors[f"base_model.model.{n}.lora_A.weight"]) for n in live} == live
    oracle = PeftModel.from_pretrained(tiny("bert", torch.float32), tmp_path).eval()
    assert torch.allclose(logits(oracle), logits(adapter.model), rtol=0, atol=2e-6)
    for name in live:
        module = oracle.base_model.model.get_submodule(name)
        assert torch.allclose(module.get_delta_weight("default"), adapter.delta(name)[0], rtol=0, atol=1e-6)
    here = variants.load_pretrained(tiny("bert", torch.float32).eval(), tmp_path)
    assert here.method == "lora" and torch.allclose(logits(here.model), logits(adapter.model), rtol=0, atol=2e-6)


def test_the_count_of_parameters_and_the_file_shrink_with_the_ranks(tmp_path):
    """H1.16: PEFT reports the same number before and after pruning."""
    run = Run(adalora())
    before = run.adapter.parameter_counts()
    assert before["active"] == before["trainable"]
    run.until(TOTAL)
    after, width = run.adapter.parameter_counts(), {}
    for name, site in run.adapter.named_sites():
        width[name] = site.A.shape[2] + site.B.shape[1] + 1
    active = sum(rank.item() * width[name] for name, rank in run.adapter.ranks().items())
    assert after["active"].item() == active < before["active"].item() and after["trainable"] == before["trainable"]
    variants.save_pretrained(run.adapter, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for name, t in tensors.items() if "lora_" in name) == active


@pytest.mark.parametrize("method", ["dora", "adalora+dora"])
def test_a_zero_row_of_the_weight_is_finite(method):
    """H2.1: PEFT divides 0 by 0; Llama-3.1-8B has 511 such rows."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight[2].zero_()
    base = copy.deepcopy(model)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    settings = {"rank": 2, "alpha": 5} if method == "dora" else {"initial_rank": 2, "target_rank": 1, "alpha": 5}
    adapter = variants.create(method, **settings).attach(model)
    assert torch.allclose(model(x), base(x), atol=1e-6)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for index in range(1, 6):
        model(x).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in adapter.parameters())
        optimizer.step()
        adapter.after_step(Step(index, 5))
        optimizer.zero_grad()
        assert model(x).isfinite().all() and adapter.delta("0").isfinite().all()
    expected = model(x)
    adapter.merge()
    assert torch.allclose(model(x), expected, atol=1e-6)
