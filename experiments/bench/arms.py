"""What is timed side by side: ours, PEFT, and the floor that the frozen model sets.

Every arm has `train` (one optimizer step, or forward and backward for a floor) and `evaluate` (`batches` forward passes),
and names its tensors.  `workloads.py` makes them.
"""

import contextlib
import dataclasses
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rankwise.experiments import memory, tasks
from rankwise.experiments.bench import timing
from rankwise.experiments.bench.cases import FIRST_STEP, RECIPE, TOTAL_STEPS, Shape, settings
from rankwise.experiments.config import Training
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.tasks import Task
from rankwise.experiments.training.evaluation import autocast
from rankwise.experiments.training.optim import MemberAdamW
from rankwise.experiments.training.pack import Pack
from rankwise.experiments.training.trainer import Trainer
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.step import Step
from rankwise.variants.settings import check
from torch import Tensor, nn

TASK = tasks.get("glue/stsb")  # whose kind and labels random rows are of, if nothing else is said


@dataclass(frozen=True)
class Setup:
    """Where the arms run. precision: of ours and of the floors, the fastest here; scratch: a folder for what an arm keeps."""

    device: torch.device
    precision: str
    scratch: Path


class Ours:
    """A study's own step and evaluation: `Trainer.train_step` and `Trainer.evaluate`, the data path included."""

    def __init__(self, method: str, setup: Setup, model: str, shape: Shape, rows: Dataset, task: Task = TASK):
        self.device, self.batches = setup.device, shape.evaluation_batches
        self.trainer = trainer(method, setup, model, shape, rows, task)

    def train(self) -> None:
        self.trainer.step += 1
        with deterministic(self.device):
            self.trainer.train_step()

    def evaluate(self) -> None:
        self.trainer.step += 1  # as after a step: nothing that is computed once a step is left over from the last evaluation
        with deterministic(self.device):
            self.trainer.evaluate("validation")

    def allocator_share(self, steps: int) -> tuple[float, float]:
        """(seconds of `after_step`, its share of the step), medians over so many steps."""
        return _share(self.trainer.adapter, "after_step", self.train, steps, self.device)

    def tensors(self) -> Iterator[Tensor]:
        return memory.tensors_in(self.trainer.model, self.trainer.adapter, vars(self.trainer.optimizer))


def trainer(method: str, setup: Setup, model: str, shape: Shape, rows: Dataset, task: Task = TASK) -> Trainer:
    """A trainer of random rows, at a step in the middle of its run.

    task: whose kind and labels they are of.
    """
    evaluated = rows.select_examples(np.arange(shape.evaluation_batches * shape.rows) % len(rows))
    training = Training(
        epochs=TOTAL_STEPS,
        max_steps=TOTAL_STEPS,
        batch_size=shape.rows,
        schedule="constant",
        warmup_ratio=0.0,
        weight_decay=RECIPE["weight_decay"],
        clip=RECIPE["clip"],
        max_length=max(shape.length, 8),
        evaluations_per_epoch=0,
        evaluation_batch_size=shape.rows,
    )
    pack = Pack(
        method=method,
        settings=check(method, settings(method) if method != "head" else {}),
        targets=RECIPE["targets"],
        task=dataclasses.replace(task, name="bench/random", sizes=None),
        model=model,
        training=training,
        seeds=tuple(range(shape.members)),
        learning_rates=tuple(RECIPE["learning_rate"] * (1 + k / shape.members) for k in range(shape.members)),
        splits=("validation",),
        device=setup.device,
        precision=setup.precision,
    )
    logs = [setup.scratch] * shape.members
    made = Trainer(pack, {"train": rows, "validation": evaluated}, setup.scratch / "checkpoint.safetensors", logs)
    made.step = FIRST_STEP
    return made


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """As a study runs on a GPU: so that a run that is cut off ends bit for bit as it would have."""
    if device.type != "cuda":
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class OursAlone:
    """Our adapter and optimizer in a plain loop: a trainer needs a model with a head."""

    def __init__(self, adapter: Adapter, x: Tensor, precision: str, batches: int = 1):
        self.adapter, self.x, self.step, self.batches = adapter, x, FIRST_STEP, batches
        self.autocast = precision == "bf16"
        rates = torch.full((1,), RECIPE["learning_rate"], dtype=torch.float64, device=x.device)
        self.optimizer = MemberAdamW(adapter.parameter_groups(), rates, RECIPE["weight_decay"])

    def train(self) -> None:
        self.adapter.model.train()
        self.step += 1
        state = Step(self.step, TOTAL_STEPS)
        self.adapter.begin(state, training=True)
        with self._autocast():
            loss = self.adapter.model(self.x).loss
        (loss + self.adapter.penalty(state)).sum().backward()
        norms = self.optimizer.gradient_norms()
        self.optimizer.clip(norms, RECIPE["clip"])
        self.adapter.before_step(state)
        self.optimizer.step(1.0, norms.isfinite())
        self.adapter.after_step(state)
        self.optimizer.zero_grad()
        self.x.grad = None

    @torch.no_grad()
    def evaluate(self) -> None:
        self.adapter.model.eval()
        self.step += 1
        for _ in range(self.batches):
            self.adapter.begin(Step(self.step, TOTAL_STEPS), training=False)
            with self._autocast():
                self.adapter.model(self.x)

    def tensors(self) -> Iterator[Tensor]:
        return memory.tensors_in(self.adapter.model, self.adapter, vars(self.optimizer))

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.x.device.type, dtype=torch.bfloat16) if self.autocast else contextlib.nullcontext()


class Peft:
    """One run with PEFT: one member's batch, its loss through PEFT's own forward, torch's fused AdamW."""

    def __init__(self, model: nn.Module, config: Any, method: str, precision: str, inputs: list[dict], device: torch.device):
        self.method, self.device, self.step = method, device, FIRST_STEP
        self.model = with_peft(model, config)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        rate, decay = RECIPE["learning_rate"], RECIPE["weight_decay"]
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=decay, fused=True)
        self.autocast = precision == "bf16 autocast"
        self.inputs = itertools.cycle(inputs)
        self.evaluated = [{k: v for k, v in one.items() if k != "labels"} for one in inputs]
        self.batches = 1

    def train(self) -> None:
        self.model.train()
        self.step += 1
        batch = next(self.inputs)
        with self._autocast():
            loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, RECIPE["clip"])
        self.optimizer.step()
        if self.method == "adalora":
            self.model.base_model.update_and_allocate(self.step)
        self.optimizer.zero_grad()
        _forget_gradients(batch)

    @torch.no_grad()
    def evaluate(self) -> None:
        self.model.eval()
        for i in range(self.batches):
            with self._autocast():
                self.model(**self.evaluated[i % len(self.evaluated)])

    @torch.no_grad()
    def evaluate_merged(self) -> None:
        """With the adapter merged into the weights first and taken out again afterwards, as a careful user may do by hand."""
        self.model.merge_adapter()
        self.evaluate()
        self.model.unmerge_adapter()

    def evaluate_cached(self) -> None:
        """With PEFT's optional cache of DoRA's dense product and norm, which it never uses unless told to."""
        from peft.helpers import DoraCaching

        with DoraCaching():
            self.evaluate()

    def allocator_share(self, steps: int) -> tuple[float, float]:
        return _share(self.model.base_model, "update_and_allocate", self.train, steps, self.device)

    def tensors(self) -> Iterator[Tensor]:
        return memory.tensors_in(self.model, vars(self.optimizer))

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.autocast else contextlib.nullcontext()


def with_peft(model: nn.Module, config: Any) -> nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21.2 asks transformers 5 for a name it will lose
        return peft.get_peft_model(model, config)


class Floor:
    """The frozen model alone: no adapter, no optimizer; forward pass, and in training backward pass through activations.

    A gradient is first needed where an adapter would need it: at the outputs of the first layer's targets.
    """

    def __init__(self, model: nn.Module, targets: Sequence[str], inputs: dict[str, Tensor], batches: int = 1):
        self.model, self.inputs, self.batches = model.requires_grad_(False), inputs, batches
        for name in targets:
            model.get_submodule(name).register_forward_hook(_needs_gradient)

    def train(self) -> None:
        self.model.train()
        self._forward(self.inputs, training=True).backward()
        _forget_gradients(self.inputs)

    @torch.no_grad()
    def evaluate(self) -> None:
        self.model.eval()
        for _ in range(self.batches):
            self._forward(self.inputs, training=False)

    def tensors(self) -> Iterator[Tensor]:
        return memory.tensors_in(self.model)

    def _forward(self, inputs: dict[str, Tensor], training: bool) -> Tensor:
        return self.model(**inputs).loss


class ImprovedFloor(Floor):
    """The same on the base as our trainer runs it: with what `Trainer` does to every model, and heads that do not train."""

    def __init__(self, trainer: Trainer, targets: Sequence[str], inputs: dict[str, Tensor], batches: int = 1):
        super().__init__(trainer.model, targets, inputs, batches)
        self.trainer = trainer

    def _forward(self, inputs: dict[str, Tensor], training: bool) -> Tensor:
        self.trainer.step += 1
        self.trainer.adapter.begin(Step(self.trainer.step, TOTAL_STEPS), training=training)
        with autocast(self.trainer.pack.device, self.trainer.pack.precision):
            return self.model(**inputs).loss


def _needs_gradient(module: nn.Module, args: tuple, output: Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


def _forget_gradients(batch: dict[str, Tensor]) -> None:
    for tensor in batch.values():
        tensor.grad = None


def _share(owner: Any, name: str, step: Callable[[], None], steps: int, device: torch.device) -> tuple[float, float]:
    """(seconds, share of the step) of a method of `owner` that `step` calls once, medians over so many steps."""
    inside: list[float] = []
    original = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        timing.synchronize(device)
        began = time.perf_counter()
        result = original(*args, **kwargs)
        timing.synchronize(device)
        inside.append(time.perf_counter() - began)
        return result

    owner.__dict__[name] = timed
    try:
        with timing.undisturbed():
            whole = [timing.seconds(step, device) for _ in range(steps)]
    finally:
        del owner.__dict__[name]
    return float(np.median(inside)), float(np.median(np.array(inside) / np.array(whole)))
