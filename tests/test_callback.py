"""The adapter in Hugging Face's Trainer: its steps are those of the slow loop, whatever it does around them."""

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.step import Group, Step
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from tests import contract, language_models
from tests.loop import Loop
from tests.tiers import quick
from tests.tiny import SIZES, batch, tiny

STEPS, RATE, DECAY, CLIP = 20, 1e-2, 0.03, 1.0
PRUNED = {"initial_rank": 5, "target_rank": 2, "alpha": 7.0, "dropout": 0.1}
PRUNED |= {"warmup_steps": 3, "final_steps": 5, "interval": 2, "orthogonality": 0.3}
METHODS = {
    "adalora": {**PRUNED, "lr_ratio": 3.0},
    "adalora+dora": PRUNED,
    "dora": {"rank": 3, "alpha": 7.0, "dropout": 0.1},
    "sora": {
        "initial_rank": 5,
        "alpha": 7.0,
        "target_rank": 2,
        "final_steps": 5,
        "gate_lr_ratio": 2.0,
        "sparsity": 2.0,
        "l1": 0.1,
    },
    "dylora": {"rank": 5, "alpha": 7.0, "dropout": 0.1, "update": "frozen"},
}


def rows(steps: int = STEPS, size: int = 4) -> list[dict[str, Tensor]]:
    """The examples of so many steps, in order."""
    batches = [batch(0, step, rows=size) for step in range(1, steps + 1)]
    return [{key: value[i] for key, value in one.items()} for one in batches for i in range(size)]


class Watch(TrainerCallback):
    """Notes what Trainer reports, and the ranks, after each step."""

    def __init__(self, adapter: variants.Adapter):
        self.adapter, self.losses, self.ranks, self.norms = adapter, [], [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.ranks.append([int(r) for r in self.adapter.ranks().values()])

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.norms.append(float(logs["grad_norm"]))


def trainer(
    adapter: variants.Adapter, folder: Path, callbacks: list[Any] | None = None, data: Any = None, **arguments: Any
) -> Trainer:
    given = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": RATE, "max_grad_norm": CLIP}
    given |= {"lr_scheduler_type": "constant", "logging_steps": 1, "train_sampling_strategy": "sequential"}
    given |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_nan_inf_filter": False}
    args = TrainingArguments(str(folder), **given | arguments)
    optimizer = torch.optim.AdamW(variants.torch_groups(adapter, RATE, DECAY))
    callbacks = [variants.AdapterCallback(adapter)] if callbacks is None else callbacks
    adapter.model.accepts_loss_kwargs = False  # transformers' classifiers take num_items_in_batch and do not use it
    data = {"train_dataset": data or rows(), "eval_dataset": rows(2)}
    return Trainer(adapter.model, args, **data, optimizers=(optimizer, None), callbacks=callbacks)


def attached(method: str, model: nn.Module | None = None, seed: int = 3, **settings: Any) -> variants.Adapter:
    model = tiny("bert") if model is None else model
    return variants.create(method, seeds=[seed], **METHODS.get(method, {}), **settings).attach(model)


class TorchsClip(Loop):
    """The slow loop with torch's clipping, which adds 1e-6 to the norm."""

    def _clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), self.clip)


def by_loop(adapter: variants.Adapter, micro_batches: int = 1) -> tuple[list[float], list[list[int]]]:
    loop = TorchsClip(adapter, RATE, STEPS, CLIP, DECAY)
    losses, ranks = [], []
    for step in range(1, STEPS + 1):
        losses.append(float(loop.step(batch(0, step)) if micro_batches == 1 else accumulated(loop, step, micro_batches)))
        ranks.append([int(r) for r in adapter.ranks().values()])
    return losses, ranks


def accumulated(loop: Loop, index: int, parts: int) -> Tensor:
    """One step of the loop over several micro-batches, each the mean of its rows, the penalty once."""
    adapter, loop.index = loop.adapter, index
    step = Step(index, STEPS, learning_rates=torch.tensor([RATE], dtype=torch.float64))
    whole, total = batch(0, index), 0.0
    for part in range(parts):
        adapter.begin(step, part)
        size = len(whole["labels"]) // parts
        piece = {key: value[part * size : (part + 1) * size] for key, value in whole.items()}
        loss = loop.losses(adapter, piece) / parts
        (loss + adapter.penalty(step) * (part == 0)).sum().backward()
        total += loss.detach()
    step = dataclasses.replace(step, losses=total)
    loop._clip()
    adapter.before_step(step)
    loop._update()
    adapter.after_step(step)
    for parameter in adapter.parameters():
        parameter.grad = None
    return total


def assert_same_tensors(one: variants.Adapter, other: variants.Adapter, **tolerance: float) -> None:
    theirs = other.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, theirs[name], msg=name, **tolerance)


@pytest.mark.parametrize(
    ("method", "accumulation"),
    [
        ("adalora", 1),
        ("adalora+dora", 2),
        *(pytest.param(one, 2, marks=pytest.mark.slow) for one in METHODS if one != "adalora+dora"),
        *(pytest.param(one, 1, marks=pytest.mark.slow) for one in list(METHODS)[1:]),
    ],
)
def test_twenty_steps_of_the_trainer_are_those_of_the_slow_loop(tmp_path, method, accumulation):
    plain, adapter = attached(method), attached(method)
    losses, ranks = by_loop(plain, accumulation)
    watch = Watch(adapter)
    callbacks = [variants.AdapterCallback(adapter), watch]
    arguments = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    trainer(adapter, tmp_path, callbacks, **arguments).train()
    assert watch.losses == pytest.approx(losses, rel=1e-6)  # the task's, without the penalty; Trainer sums them in fp32
    assert watch.ranks == ranks
    assert max(watch.norms) > CLIP > min(watch.norms)  # clipping bites, and not always
    assert_same_tensors(adapter, plain, rtol=1e-8, atol=1e-10)
    if "ada" in method:
        assert sum(ranks[-1]) == 2 * len(ranks[-1]) and ranks[0] != ranks[-1]


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_total_falls_at_the_plateaus_of_the_loss_that_the_trainer_has(tmp_path, accumulation):
    settings = {"schedule": "on-plateau", "plateau_patience": 2, "plateau_stages": 3, "plateau_smoothing": 0.5}
    plain, adapter = attached("adalora", **settings), attached("adalora", **settings)
    _, ranks = by_loop(plain, accumulation)
    watch = Watch(adapter)
    arguments = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    trainer(adapter, tmp_path, [variants.AdapterCallback(adapter), watch], **arguments).train()
    assert watch.ranks == ranks and len({sum(row) for row in ranks}) > 2
    assert_same_tensors(adapter, plain, rtol=1e-8, atol=1e-10)


def test_the_last_step_of_an_epoch_has_fewer_micro_batches_and_one_penalty(tmp_path):
    """Five micro-batches by two: two, two, one."""
    adapter, plain = attached("adalora"), attached("adalora")
    data, parts = rows(steps=5, size=2), [2, 2, 1]
    loop = Loop(plain, RATE, 9, None, DECAY)
    for index in range(1, 10):
        size = parts[(index - 1) % 3]
        first = sum(parts[: (index - 1) % 3])
        some = {key: torch.stack([row[key] for row in data[2 * first : 2 * (first + size)]]) for key in data[0]}
        loop.index, step = index, Step(index, 9)
        for part in range(size):
            plain.begin(step, part)
            (loop.losses(plain, {k: v[2 * part : 2 * part + 2] for k, v in some.items()}) / size).sum().backward()
        plain.penalty(step).sum().backward()
        loop._update()
        plain.after_step(step)
        for parameter in plain.parameters():
            parameter.grad = None
    arguments = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.0}
    trainer(adapter, tmp_path, data=data, max_steps=-1, num_train_epochs=3, **arguments).train()
    assert_same_tensors(adapter, plain, rtol=1e-8, atol=1e-10)


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).double().train()


def test_a_model_that_divides_by_all_items_gets_one_penalty_a_step(tmp_path):
    """A language model's loss is a mean over the tokens of all micro-batches, so that Trainer divides by nothing."""
    adapter = attached("adalora", language_model())
    plain = attached("adalora", language_model())
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows(6)]
    given = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 12, "max_grad_norm": 0.0}
    made = trainer(adapter, tmp_path, data=data, **given)
    made.model_accepts_loss_kwargs = True  # as Trainer finds by itself for this model
    made.train()
    loop = Loop(plain, RATE, 12, None, DECAY)
    for index in range(1, 13):
        at = 4 * (index - 1) % len(data)
        ids = torch.stack([row["input_ids"] for row in data[at : at + 4]])
        loop.index, step = index, Step(index, 12)
        for part in range(2):
            plain.begin(step, part)
            some = ids[2 * part : 2 * part + 2]
            logits = plain.model(input_ids=some).logits[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits.float(), some[:, 1:].flatten(), reduction="sum")
            (loss / (4 * (ids.shape[1] - 1))).backward()
        plain.penalty(step).sum().backward()
        loop._update()
        plain.after_step(step)
        for parameter in plain.parameters():
            parameter.grad = None
    assert_same_tensors(adapter, plain, rtol=1e-4, atol=1e-7)  # transformers takes its loss in fp32


@pytest.mark.parametrize("name", quick(language_models.NAMES, ["gpt2", "t5"]))
def test_a_language_model_trains_as_in_the_slow_loop_and_resumes_bit_for_bit(tmp_path, name):
    """On the tokens of a target alone; of an encoder-decoder on those that it is to write."""
    steps = 8
    phases = {"initial_rank": 3, "target_rank": 2, "alpha": 7.0, "warmup_steps": 1, "final_steps": 2, "interval": 1}

    def made() -> variants.Adapter:
        model = language_models.made(name).double().train()
        return variants.create("adalora", seeds=[3], **phases).attach(model, "all-linear", head=[])

    ids = torch.randint(5, 60, (4 * steps, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :5] = -100
    data = [{"input_ids": row, "labels": target} for row, target in zip(ids, labels, strict=True)]
    plain, uncut, again = made(), made(), made()
    loop = Loop(
        plain, RATE, steps, None, DECAY, lambda one, some: one.model(input_ids=ids[some], labels=labels[some]).loss[None]
    )
    losses = [float(loop.step(slice(4 * step, 4 * step + 4))) for step in range(steps)]
    watch = Watch(uncut)
    arguments = {"max_steps": steps, "max_grad_norm": 0.0, "save_strategy": "steps", "save_steps": 3, "data": data}
    trainer(uncut, tmp_path, [variants.AdapterCallback(uncut), watch], **arguments).train()
    assert watch.losses == pytest.approx(losses, rel=1e-5)
    assert_same_tensors(uncut, plain, rtol=1e-3, atol=1e-6)  # transformers takes its loss in fp32
    assert sum(watch.ranks[-1]) == 2 * len(watch.ranks[-1]) < sum(watch.ranks[0])
    trainer(again, tmp_path / "again", **arguments).train(str(tmp_path / "checkpoint-3"))
    theirs = uncut.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("method", quick(["adalora", "adalora+dora"], ["adalora+dora"]))
def test_a_resumed_run_ends_bit_for_bit_as_the_uncut_one(tmp_path, method):
    arguments = {"save_strategy": "steps", "save_steps": 7, "lr_scheduler_type": "linear"}
    uncut = attached(method)
    trainer(uncut, tmp_path, **arguments).train()
    folder = tmp_path / "checkpoint-7"
    again = attached(method, seed=3)
    watch = Watch(again)
    trainer(again, tmp_path / "again", [variants.AdapterCallback(again), watch], **arguments).train(str(folder))
    assert len(watch.ranks) == STEPS - 7
    theirs = uncut.state_dict()
    for name, value in again.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    loaded = variants.load_pretrained(tiny("bert"), folder / "adapter")  # each checkpoint has PEFT's files too
    assert loaded.method == method
    model = again.detach()
    assert model.state_dict().keys() == tiny("bert").state_dict().keys()  # hooks and states are gone with the sites
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_evaluation_along_the_way_changes_nothing(tmp_path):
    one, other = attached("adalora+dora"), attached("adalora+dora")
    trainer(one, tmp_path, max_steps=9).train()
    trainer(other, tmp_path, max_steps=9, eval_strategy="steps", eval_steps=3).train()
    assert_same_tensors(one, other, rtol=0, atol=0)


def test_recomputed_layers_draw_the_dropout_of_the_first_pass(tmp_path):
    adapter, plain = attached("adalora+dora"), attached("adalora+dora")
    trainer(adapter, tmp_path, max_steps=9, gradient_checkpointing=True).train()
    trainer(plain, tmp_path, max_steps=9).train()
    assert_same_tensors(adapter, plain, rtol=1e-9, atol=1e-12)


def test_bf16_runs_and_reaches_its_budget(tmp_path):
    adapter = attached("adalora", tiny("bert", torch.float32))
    watch = Watch(adapter)
    trainer(adapter, tmp_path, [variants.AdapterCallback(adapter), watch], bf16=True, max_grad_norm=CLIP).train()
    assert all(torch.isfinite(torch.tensor(watch.losses))) and sum(watch.ranks[-1]) == 2 * len(watch.ranks[-1])
    assert all(p.dtype == torch.float32 for p in adapter.parameters())


@pytest.mark.gpu
def test_a_step_that_fp16_skips_changes_neither_tensors_nor_scores(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    adapter = attached("adalora", tiny("bert", torch.float32).cuda())
    callback = variants.AdapterCallback(adapter)
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            self.before = {name: value.clone() for name, value in adapter.state_dict().items()}

        def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
            same = all(torch.equal(value, self.before[name]) for name, value in adapter.state_dict().items())
            seen.append((optimizer.step_was_skipped, same))

    made = trainer(adapter, tmp_path, [callback, Look()], use_cpu=False, fp16=True)
    made.train()  # the scale starts at 2**16, where the first gradients are infinite or not
    scaler = made.accelerator.scaler
    made = trainer(adapter, tmp_path, [callback, Look()], use_cpu=False, fp16=True)
    made.accelerator.scaler._init_scale = 2.0**60
    made.train()
    assert any(skipped for skipped, _ in seen), scaler.get_scale()
    assert all(same for skipped, same in seen[:1] if skipped)


def test_a_step_that_the_scaler_skipped_counts_for_no_score(tmp_path):
    adapter = attached("adalora")
    callback = variants.AdapterCallback(adapter)
    made = trainer(adapter, tmp_path, [callback], max_steps=9)
    before = {}

    class Skips(TrainerCallback):
        """Says of step 2 what accelerate's optimizer says after an overflow, before our callback hears of the step."""

        def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
            optimizer._is_overflow = state.global_step == 1
            before[state.global_step + 1] = {k: v.clone() for k, v in adapter.score.state_dict().items()}

    made.callback_handler.callbacks.insert(0, Skips())
    made.train()
    assert all(torch.equal(before[2][name], before[3][name]) for name in before[2])
    assert any(not torch.equal(before[3][name], before[4][name]) for name in before[2])


def test_a_gradient_that_is_not_finite_counts_for_no_score():
    adapter = attached("adalora")
    callback = variants.AdapterCallback(adapter)
    callback.step = Step(1, STEPS)
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(adapter.parameters()).grad[0, 0, 0] = torch.inf
    callback.on_pre_optimizer_step(None, None, None)
    callback.on_optimizer_step(None, None, None, optimizer=torch.optim.SGD(adapter.parameters(), lr=0.0))
    assert not any(value.any() for value in adapter.score.state_dict().values())


def test_what_cannot_be_driven_is_refused(tmp_path):
    with pytest.raises(ValueError, match="members = 2: Trainer has one loss and one clipping norm"):
        variants.AdapterCallback(variants.create("lora", members=2, rank=2).attach(tiny("bert")))
    with pytest.raises(ValueError, match=r"not attached to a model: call attach\(model\) first"):
        variants.AdapterCallback(variants.create("lora", rank=2))
    adapter = attached("adalora")
    with pytest.raises(ValueError, match="returned no loss to add the penalty of adalora to"):
        trainer(adapter, tmp_path, label_smoothing_factor=0.1).train()
    callbacks = [variants.AdapterCallback(attached("adalora"))]
    with pytest.raises(ValueError, match="not the one that the adapter is attached to"):
        trainer(attached("adalora"), tmp_path, callbacks).train()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda groups: groups.pop(0), "the optimizer misses 25 parameters of adalora\\+dora"),
        (lambda groups: groups[1].update(lr=RATE), "has not the rates that adalora\\+dora means"),
        (lambda groups: groups[-1].update(weight_decay=DECAY), "decays tensors that adalora\\+dora does not"),
    ],
)
def test_an_optimizer_that_trains_otherwise_is_refused(tmp_path, spoil, message):
    adapter = attached("adalora+dora", lr_ratio=3.0)
    made = trainer(adapter, tmp_path)
    groups = variants.torch_groups(adapter, RATE, DECAY)
    spoil(groups)
    made.optimizer = torch.optim.AdamW(groups)
    with pytest.raises(ValueError, match=message):
        made.train()


def test_rates_within_a_tensor_are_no_group_of_torchs():
    adapter = attached("lora", rank=2)
    adapter.parameter_groups = lambda: [Group(list(adapter.parameters()), lr_scale=torch.ones(1, 2))]
    with pytest.raises(ValueError, match=r"no parameter group of torch\.optim can say"):
        variants.torch_groups(adapter, RATE)


ALLOCATING = [
    name
    for name, one in variants.METHODS.items()
    if issubclass(one.settings, variants.settings.AllocatedSettings)
    and all(isinstance(group.lr_scale, int | float) for group in contract.attached(name, 1).parameter_groups())
]  # IncreLoRA's ranks have clocks of their own, which Trainer's optimizer cannot follow


@pytest.mark.parametrize("method", quick(ALLOCATING, ["allocated", "adalora+dora"]))
def test_forgetting_to_drive_it_is_said_in_the_next_step_once(tmp_path, method):
    """A fused optimizer, which is Trainer's own, tells no version counter that it wrote."""
    adapter = contract.attached(method, 1)
    made = trainer(adapter, tmp_path, [], max_steps=4, optim="adamw_torch_fused")
    made.optimizer = None
    with pytest.warns(UserWarning, match="was trained but after_step was never called") as said:
        made.train()
        adapter.ranks()
    assert sum("never called" in str(warning.message) for warning in said) == 1
    driven = contract.attached(method, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*never called")
        contract.losses(driven, 2)
        driven.ranks()


@pytest.mark.slow
def test_transformers_trainer_is_imported_by_nothing_else():
    code = (
        "import sys; from rankwise import variants; variants.create('lora', rank=2); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
