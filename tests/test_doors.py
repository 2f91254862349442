"""A model with an adapter in it saves itself: whatever calls save_pretrained, what lies in the folder loads whole."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from tests.test_callback import METHODS, PRUNED, attached, rows, trainer
from tests.tiers import quick
from tests.tiny import batch, tiny

pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern", "ignore:.*was trained but after_step")
LOW_RANK = ["dora", "adalora", "adalora+dora", "sora", "dylora"]


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**{k: v for k, v in batch(0).items() if k != "labels"}).logits


def filled(method: str, dtype: torch.dtype = torch.float32, **settings: Any) -> variants.Adapter:
    settings = METHODS.get(method, {"rank": 3, "alpha": 7} if method == "lora" else {}) | settings
    adapter = variants.create(method, **settings).attach(tiny("bert", dtype))
    fill(adapter, 0.2)
    return adapter


@pytest.mark.parametrize("method", ["lora", *LOW_RANK, "head"])
def test_the_models_own_save_pretrained_writes_the_adapters_files(method, tmp_path):
    adapter = filled(method)
    model = adapter.model
    model.save_pretrained(tmp_path, max_shard_size="1GB", safe_serialization=True)
    again = tiny("bert", torch.float32)
    assert variants.load_pretrained(again, tmp_path).method == method
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    oracle = peft.PeftModel.from_pretrained(tiny("bert", torch.float32), tmp_path)
    torch.testing.assert_close(logits(oracle), logits(model), rtol=0, atol=1e-5)
    adapter.detach()
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "base")
    assert load_file(tmp_path / "base" / "model.safetensors").keys() == tiny("bert").state_dict().keys()


@pytest.mark.parametrize("method", ["full", "bitfit", "merged"])
def test_what_changes_the_models_own_weights_is_a_whole_model(method, tmp_path):
    adapter = filled("lora" if method == "merged" else method)
    if method == "merged":
        adapter.merge()
    adapter.model.save_pretrained(tmp_path)
    again, notes = type(adapter.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    torch.testing.assert_close(logits(again), logits(adapter.model), rtol=0, atol=1e-5)


def test_what_a_model_cannot_save_is_refused(tmp_path):
    adapter = variants.create("lora", members=2, rank=2).attach(tiny("bert"))
    with pytest.raises(ValueError, match=r"2 members share this model: .*member=\.\.\."):
        adapter.model.save_pretrained(tmp_path)
    adapter = filled("lora")
    with pytest.raises(ValueError, match="push_to_hub = True: save to a folder, and upload that"):
        adapter.model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="a copy of a model with an adapter in it"):
        copy.deepcopy(adapter.model).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["lora", *LOW_RANK, "bitfit", "full"])
def test_a_model_is_pickled_whole_with_its_adapter(method, tmp_path):
    adapter = filled(method)
    torch.save(adapter.model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(again), logits(adapter.model))
    with pytest.raises(ValueError, match="a copy of a model with an adapter in it"):
        again.save_pretrained(tmp_path / "a")
    copied = copy.deepcopy(adapter.model)
    plain = adapter.detach()
    assert torch.equal(logits(copied), logits(again)) and not torch.equal(logits(plain), logits(again))


@pytest.mark.parametrize("method", quick(["adalora", "adalora+dora", "dora"], ["adalora+dora"]))
def test_trainers_save_model_and_its_checkpoints_are_folders_of_the_adapter(method, tmp_path):
    adapter = attached(method, tiny("bert", torch.float32))
    made = trainer(adapter, tmp_path, save_strategy="steps", save_steps=20)
    made.train()
    made.save_model(str(tmp_path / "end"))
    assert "model.safetensors" not in {path.name for path in (tmp_path / "end").iterdir()}
    want = logits(adapter.model)
    for folder in (tmp_path / "end", tmp_path / "checkpoint-20", tmp_path / "checkpoint-20" / "adapter"):
        again = tiny("bert", torch.float32)
        assert variants.load_pretrained(again, folder).method == method
        torch.testing.assert_close(logits(again), want, rtol=0, atol=1e-5)
        oracle = peft.PeftModel.from_pretrained(tiny("bert", torch.float32), folder)
        torch.testing.assert_close(logits(oracle), want, rtol=0, atol=1e-5)


def test_a_checkpoint_holds_what_training_moves_and_not_the_frozen_base(tmp_path):
    adapter = attached("adalora")
    trainer(adapter, tmp_path, max_steps=9, save_strategy="steps", save_steps=9).train()
    state = load_file(tmp_path / "checkpoint-9" / "model.safetensors")
    assert state.keys() == {f"adapter_state.{name}" for name in adapter.state_dict()}


def test_full_fine_tuning_whose_gradients_trainer_would_sum_up_is_refused():
    with pytest.raises(ValueError, match=r"full trains tensors that are not among the model's, .*: give Trainer the model"):
        variants.AdapterCallback(attached("full"))


def test_bitfit_resumes_and_ends_as_a_whole_model(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 7, "max_steps": 12}
    uncut, again = attached("bitfit"), attached("bitfit")
    made = trainer(uncut, tmp_path, **arguments)
    made.train()
    trainer(again, tmp_path / "again", **arguments).train(str(tmp_path / "checkpoint-7"))
    assert all(torch.equal(value, uncut.state_dict()[name]) for name, value in again.state_dict().items())
    made.save_model(str(tmp_path / "end"))
    whole = type(uncut.model).from_pretrained(tmp_path / "end", dtype=torch.float64)
    torch.testing.assert_close(logits(whole), logits(uncut.model), rtol=0, atol=1e-12)


def test_the_state_of_a_model_that_is_trained_has_the_names_of_the_base():
    adapter = attached("adalora+dora")
    variants.AdapterCallback(adapter)
    model, base = adapter.model, tiny("bert").state_dict()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in base.items())
    assert {name for name in state if name not in base} == {f"adapter_state.{name}" for name in adapter.state_dict()}
    fill(adapter)
    model.load_state_dict(state)
    assert all(torch.equal(value, state[f"adapter_state.{name}"]) for name, value in adapter.state_dict().items())
    whole = nn.ModuleDict({"inside": model})
    assert {f"inside.{name}" for name in state} == set(whole.state_dict())
    fill(adapter)
    whole.load_state_dict({f"inside.{name}": value for name, value in state.items()})
    assert all(torch.equal(value, state[f"adapter_state.{name}"]) for name, value in adapter.state_dict().items())


class Plain(nn.Module):
    """A model that is none of transformers'."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.hidden, self.classifier = nn.Embedding(64, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> dict:
        logits = self.classifier(torch.tanh(self.hidden(self.embedding(input_ids).mean(1))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_model_of_no_library_is_saved_by_its_own_names_and_resumes(tmp_path):
    def made(folder: Path) -> tuple[variants.Adapter, Trainer]:
        adapter = variants.create("adalora", **PRUNED).attach(Plain(), targets=["hidden"])
        return adapter, trainer(adapter, folder, save_strategy="steps", save_steps=7)

    uncut, first = made(tmp_path)
    first.train()
    again, second = made(tmp_path / "again")
    second.train(str(tmp_path / "checkpoint-7"))
    assert all(torch.equal(value, uncut.state_dict()[name]) for name, value in again.state_dict().items())
    first.save_model(str(tmp_path / "end"))
    saved = load_file(tmp_path / "end" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in Plain().state_dict().items())
    assert variants.load_pretrained(Plain(), tmp_path / "checkpoint-7" / "adapter").method == "adalora"


def test_an_adapted_output_layer_that_is_tied_trains_through_its_checkpoints(tmp_path):
    def gpt2() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"vocab_size": 67, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0))

    adapter = variants.create("adalora", **PRUNED).attach(gpt2(), targets=["c_attn", "lm_head"])
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows(6)]
    made = trainer(adapter, tmp_path, data=data, max_steps=14, save_strategy="steps", save_steps=7)
    made.train()
    again = variants.create("adalora", **PRUNED).attach(gpt2(), targets=["c_attn", "lm_head"])
    trainer(again, tmp_path, data=data, max_steps=14).train(str(tmp_path / "checkpoint-7"))
    assert all(torch.equal(value, adapter.state_dict()[name]) for name, value in again.state_dict().items())
    fresh = gpt2()
    variants.load_pretrained(fresh, tmp_path / "checkpoint-14")
    torch.testing.assert_close(logits(fresh), logits(adapter.model), rtol=0, atol=1e-5)


def test_a_merged_model_has_nothing_of_the_trainers(tmp_path):
    adapter = attached("adalora", tiny("bert", torch.float32))
    trainer(adapter, tmp_path).train()
    variants.export_merged(adapter, tmp_path / "whole")
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() == tiny("bert").state_dict().keys()
    whole = type(adapter.model).from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(whole), logits(adapter.model), rtol=0, atol=1e-5)


# -- ended before the budget -----------------------------------------------------------------------------------------------


def early(adapter: variants.Adapter, folder: Path, **arguments: Any) -> list[str]:
    """Trains with a score that never gets better: Trainer stops early and loads its first checkpoint. What was warned of."""
    given = {"max_steps": 40, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    given |= {"load_best_model_at_end": True, "metric_for_best_model": "score", "report_to": [], "use_cpu": True}
    args = TrainingArguments(str(folder), per_device_train_batch_size=4, disable_tqdm=True, **given | arguments)
    optimizer = torch.optim.AdamW(variants.torch_groups(adapter, 1e-2))
    callbacks = [variants.AdapterCallback(adapter), EarlyStoppingCallback(2)]
    data = {"train_dataset": rows(), "eval_dataset": rows(1), "compute_metrics": lambda _: {"score": 0.5}}
    adapter.model.accepts_loss_kwargs = False
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Trainer(adapter.model, args, **data, optimizers=(optimizer, None), callbacks=callbacks).train()
    return [str(warning.message) for warning in said if "budget" in str(warning.message)]


ALLOCATED = {"initial_rank": 6, "target_rank": 2, "alpha": 7, "warmup_steps": 2, "final_steps": 6}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("adalora", ALLOCATED),
        ("adalora", ALLOCATED | {"target_rank": 1, "initial_rank": 9}),
        ("allocated", ALLOCATED | {"magnitude": True, "cost": "parameters"}),
        ("truncated", {"initial_rank": 5, "target_rank": 3, "alpha": 7}),
    ],
)
def test_training_that_ends_above_its_budget_says_so_at_its_end_and_when_it_is_saved(method, settings, tmp_path):
    adapter = variants.create(method, **settings).attach(tiny("bert", torch.float32))
    said = early(adapter, tmp_path)
    assert len(said) == 1 and "training ended before its budget was reached" in said[0], "once, not at each checkpoint"
    with pytest.warns(UserWarning, match=r"cut it: variants\.truncate\(adapter, total_(rank|parameters)=\d+\)") as warned:
        variants.save_pretrained(adapter, tmp_path / "a")
    remedy = str(warned[0].message).rpartition("cut it: ")[2]
    eval(remedy, {"variants": variants, "adapter": adapter})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*budget")
        variants.save_pretrained(adapter, tmp_path / "b")


def test_the_file_says_that_training_ended_early(tmp_path):
    import json

    from safetensors import safe_open

    adapter = variants.create("adalora", **ALLOCATED).attach(tiny("bert", torch.float32))
    early(adapter, tmp_path)
    ranks = sum(int(rank) for rank in adapter.ranks().values())
    with safe_open(tmp_path / "checkpoint-2" / "adapter_model.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["rankwise"])
    assert facts["unfinished"] == {"unit": "rank", "has": ranks, "budget": 2 * len(adapter.ranks())}


REACHING = ["adalora", "sora", "adalora+dora", "dora", "increlora", "truncated"]


@pytest.mark.parametrize("method", quick(REACHING, ["adalora+dora", "truncated"]))
def test_training_that_reaches_its_last_step_says_nothing(method, tmp_path):
    settings = METHODS.get(method, {"initial_rank": 1, "target_rank": 2} if method == "increlora" else ALLOCATED)
    settings = {k: v for k, v in settings.items() if method != "truncated" or "steps" not in k}
    adapter = variants.create(method, **settings).attach(tiny("bert", torch.float32))
    if method == "increlora":  # whose rates within a tensor Trainer cannot follow
        variants.save_pretrained(adapter, tmp_path)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*budget was reached")
        made = trainer(adapter, tmp_path, save_strategy="steps", save_steps=5)
        made.train()
        made.save_model(str(tmp_path / "end"))


def test_a_member_is_copied_into_one_not_over_all():
    pack = variants.create("adalora", members=3, **ALLOCATED).attach(tiny("bert"))
    fill(pack)
    before = {name: value.clone() for name, value in pack.state_dict().items()}
    with pytest.raises(ValueError, match=r"members = 3: a member is copied into an adapter of one"):
        pack.copy_member(pack, 1)
    assert all(torch.equal(value, before[name]) for name, value in pack.state_dict().items())
