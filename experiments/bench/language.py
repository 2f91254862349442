"""Arms over a language model: steps on the tokens of targets, and texts that all members of a pack generate in one batch."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rankwise.experiments import models
from rankwise.experiments.bench import timing
from rankwise.experiments.bench.arms import Floor, Ours, Peft, Setup, deterministic, trainer
from rankwise.experiments.bench.cases import RECIPE, Shape
from rankwise.experiments.bench.workloads import POOL, Arms, peft_config, random_ids
from rankwise.experiments.data.encoded import IGNORED
from rankwise.experiments.kinds.decoding import generated
from rankwise.experiments.kinds.language import Prompted
from rankwise.experiments.tasks import Task, text_metrics
from rankwise.experiments.training.evaluation import autocast
from rankwise.variants.adapter.step import Step
from rankwise.variants.adapter.targets import resolve
from torch import Tensor, nn

TASK = Task(
    name="bench/language",
    kind="generation",
    num_labels=0,
    metric="exact_match",
    licence="made up",
    read=dict.__getitem__,  # never read: its rows are given
    measure=text_metrics.of_texts(["exact_match"]),
    identity=str,
)


class LanguageArms(Arms):
    """The arms over a decoder: half of each row is its prompt, the other half is scored.

    "eval" is generation: as many tokens after each prompt as a row scores, whatever they are.
    """

    def __init__(self, setup: Setup, model: str, shape: Shape):
        super().__init__(setup, shape)
        self.model, self.prompt, self.new = model, shape.length // 2, shape.length - shape.length // 2
        self.name = f"{Path(model).name} {shape.rows} x {shape.length}"
        count = POOL * shape.rows
        ids = random_ids(model, count, shape.length)
        labels = ids.astype(np.int64).reshape(count, shape.length)
        labels[:, : self.prompt] = IGNORED
        self.rows = Prompted(
            ids=ids,
            offsets=np.arange(0, len(ids) + 1, shape.length, dtype=np.int64),
            token_type_ids=None,
            labels=labels.ravel(),
            max_length=max(shape.length, 8),
            is_by_token=True,
            prompts=np.full(count, self.prompt),
            references=(("",),) * count,
            max_new_tokens=self.new,
        )

    def tensors(self, members: int = 1, batch: int = 0) -> dict[str, Tensor]:
        """So many members' batches, one after the other, from `batch` of the pool on."""
        n, length = self.shape.rows * members, self.shape.length
        rows = self.rows.select((np.arange(n) + batch * self.shape.rows) % len(self.rows))
        ids = torch.from_numpy(rows.ids.astype(np.int64)).view(n, length)
        found = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.from_numpy(rows.labels).view(n, length),
        }
        return {name: tensor.to(self.setup.device) for name, tensor in found.items()}

    @cached_property
    def floor(self) -> Floor:
        model, targets = plain(self.model, self.setup.precision, self.setup.device)
        return self._floor(model, targets, self.tensors(self.members))

    def floor_flops(self, phase: str) -> int:
        """Operations of the floor's matrix products, for all members, in one step or batch: they grow with the rows alone."""
        model, targets = plain(self.model, "fp32", self.setup.device)
        one = self._floor(model, targets, {k: v[:1] for k, v in self.tensors().items()})
        return timing.flops(one.train if phase == "train" else one.evaluate) * self.shape.rows * self.members

    def _floor(self, model: nn.Module, targets: list[str], inputs: dict[str, Tensor]) -> Floor:
        made = Floor(model, targets, inputs)
        made.evaluate = lambda: _generate(model.eval(), inputs["input_ids"][:, : self.prompt], self.new)
        return made

    def _ours(self, method: str) -> "OursGenerating":
        return OursGenerating(method, self)

    def _peft(self, method: str, precision: str) -> "PeftGenerating":
        model, targets = plain(self.model, "bf16" if precision == "bf16 weights" else "fp32", self.setup.device)
        config = peft_config(method, targets, {}, task_type="CAUSAL_LM")
        inputs = [self.tensors(batch=i) for i in range(POOL)]
        return PeftGenerating(model, config, method, precision, inputs, self.setup.device, self.prompt, self.new)


class OursGenerating(Ours):
    """A study's own step; and what it does to generate on a GPU: all members' prompts in one batch, nothing merged."""

    def __init__(self, method: str, arms: LanguageArms):
        self.device, self.batches, self.arms = arms.setup.device, 1, arms
        self.trainer = trainer(method, arms.setup, arms.model, arms.shape, arms.rows, TASK)
        self.trainer.model.generation_config.eos_token_id = None  # no token ends a text
        self.prompts = arms.tensors(arms.members)["input_ids"][:, : arms.prompt]

    def evaluate(self) -> Tensor:
        self.trainer.step += 1
        adapter = self.trainer.adapter
        adapter.begin(Step(self.trainer.step, self.trainer.step + 1), training=False)
        with deterministic(self.device), autocast(self.device, self.trainer.pack.precision):
            return _generate(adapter.model.eval(), self.prompts, self.arms.new)


class PeftGenerating(Peft):
    """One run with PEFT, and one member's prompts at a time."""

    def __init__(self, *args: Any):
        *args, self.prompt, self.new = args
        super().__init__(*args)

    def evaluate(self) -> Tensor:
        with self._autocast():
            return _generate(self.model.eval(), self.evaluated[0]["input_ids"][:, : self.prompt], self.new)


@torch.no_grad()
def _generate(model: nn.Module, prompts: Tensor, new: int) -> Tensor:
    """Greedily, with a cache, exactly so many tokens: (rows, new)."""
    return generated(model, prompts, torch.ones_like(prompts), new, [])


def plain(model_id: str, precision: str, device: torch.device) -> tuple[nn.Module, list[str]]:
    """The model as its folder gives it, and the names of the linears to adapt."""
    model, _, info = models.load(model_id, TASK, precision, str(device))
    model.generation_config.eos_token_id = None  # no token ends a text
    return model, resolve(model, RECIPE["targets"], info.heads)
