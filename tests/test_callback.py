"""The adapter in Hugging Face's Trainer: its steps are those of the slow loop, whatever it does around them."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

import variants
from tests.loop import Loop
from tests.tiny import SIZES, batch, tiny
from variants.base import Step

STEPS, RATE, DECAY, CLIP = 20, 1e-2, 0.03, 0.5
PRUNED = {"initial_rank": 5, "target_rank": 2, "alpha": 7.0, "dropout": 0.1}
PRUNED |= {"warmup_steps": 3, "final_steps": 5, "interval": 2, "orthogonality": 0.3}
METHODS = {
    "adalora": {**PRUNED, "lr_ratio": 3.0},
    "adalora+dora": PRUNED,
    "dora": {"rank": 3, "alpha": 7.0, "dropout": 0.1},
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
    return Trainer(adapter.model, args, train_dataset=data or rows(), optimizers=(optimizer, None), callbacks=callbacks)


def attached(method: str, model: nn.Module | None = None, seed: int = 3, **settings: Any) -> variants.Adapter:
    model = tiny("bert") if model is None else model
    return variants.create(method, seeds=[seed], **METHODS.get(method, {}), **settings).attach(model)


def by_loop(adapter: variants.Adapter, micro_batches: int = 1) -> tuple[list[float], list[list[int]]]:
    loop = Loop(adapter, RATE, STEPS, CLIP, DECAY)
    losses, ranks = [], []
    for step in range(1, STEPS + 1):
        losses.append(float(loop.step(batch(0, step)) if micro_batches == 1 else accumulated(loop, step, micro_batches)))
        ranks.append([int(r) for r in adapter.ranks().values()])
    return losses, ranks


def accumulated(loop: Loop, index: int, parts: int) -> Tensor:
    """One step of the loop over several micro-batches, each the mean of its rows, the penalty once."""
    adapter, loop.index = loop.adapter, index
    step, whole, total = Step(index, STEPS), batch(0, index), 0.0
    for part in range(parts):
        adapter.begin(step, part)
        size = len(whole["labels"]) // parts
        piece = {key: value[part * size : (part + 1) * size] for key, value in whole.items()}
        loss = loop.losses(adapter, piece) / parts
        loss.sum().backward()
        total += loss.detach()
    adapter.penalty(step).sum().backward()
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_twenty_steps_of_the_trainer_are_those_of_the_slow_loop(tmp_path, method, accumulation):
    plain, adapter = attached(method), attached(method)
    losses, ranks = by_loop(plain, accumulation)
    watch = Watch(adapter)
    callbacks = [variants.AdapterCallback(adapter), watch]
    arguments = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    trainer(adapter, tmp_path, callbacks, **arguments).train()
    assert watch.losses == pytest.approx(losses, rel=1e-9)  # the task's, without the penalty
    assert watch.ranks == ranks
    assert max(watch.norms) > CLIP > min(watch.norms)  # clipping bites, and not always
    assert_same_tensors(adapter, plain, rtol=1e-8, atol=1e-10)
    if "ada" in method:
        assert sum(ranks[-1]) == 2 * len(ranks[-1]) and ranks[0] != ranks[-1]
