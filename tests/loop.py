"""A training loop that is slow and obvious: the order of design.md section 4, AdamW and clipping by hand, per member.

It shares no code with experiments/, so that it can be the oracle of the trainer.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.step import Step
from torch import Tensor, nn

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Loop:
    """Trains an attached adapter, one `step` at a time.

    learning_rates: one for each member; total: steps of the run; clip: the largest norm of each member's gradient;
    losses: (K,) task losses of a batch, that of the tiny models if not given.
    """

    def __init__(
        self,
        adapter: Adapter,
        learning_rates: list[float] | float = 1e-2,
        total: int = 20,
        clip: float | None = 1.0,
        weight_decay: float = 0.01,
        losses: Callable[[Adapter, Any], Tensor] | None = None,
    ):
        rates = learning_rates if isinstance(learning_rates, list) else [learning_rates] * adapter.members
        self.adapter, self.rates, self.total = adapter, rates, total
        self.clip, self.weight_decay = clip, weight_decay
        self.losses = losses or task_losses
        self.index = 0
        self.moments: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # mean, square, steps; by position in adapter.parameters()

    def step(self, batch: Any) -> Tensor:
        """One step over a batch that holds each member's rows; (K,) task losses."""
        adapter = self.adapter
        self.index += 1
        step = Step(self.index, self.total, learning_rates=torch.tensor(self.rates, dtype=torch.float64))
        adapter.begin(step, 0, training=True)
        losses = self.losses(adapter, batch)
        (losses + adapter.penalty(step)).sum().backward()
        step = replace(step, losses=losses.detach())
        self._clip()
        adapter.before_step(step)
        self._update()
        adapter.after_step(step)
        self._follow()
        for parameter in adapter.parameters():
            parameter.grad = None
        return losses.detach()

    def _clip(self) -> None:
        if self.clip is None:
            return
        for k in range(self.adapter.members):
            gradients = [p.grad[k] for p in self.adapter.parameters() if p.grad is not None]
            norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
            if norm > self.clip:
                for gradient in gradients:
                    gradient.mul_(self.clip / norm)

    @torch.no_grad()
    def _update(self) -> None:
        position = {id(p): i for i, p in enumerate(self.adapter.parameters())}
        for group in self.adapter.parameter_groups():
            for j, parameter in enumerate(group.params):
                if parameter.grad is None:
                    continue
                i = position[id(parameter)]
                zeros = torch.zeros_like(parameter)
                if i not in self.moments:  # each element counts its steps, as a new slot's begin anew
                    self.moments[i] = zeros, zeros.clone(), torch.full_like(zeros, self.index - 1)
                mean, square, steps = self.moments[i]
                steps += 1
                mean.copy_(BETA1 * mean + (1 - BETA1) * parameter.grad)
                square.copy_(BETA2 * square + (1 - BETA2) * parameter.grad**2)
                direction = mean / (1 - BETA1**steps) / ((square / (1 - BETA2**steps)).sqrt() + EPSILON)
                scale = group.lr_scale[j] if isinstance(group.lr_scale, list) else group.lr_scale
                for k, rate in enumerate(self.rates):
                    rate = rate * (scale[k] if isinstance(scale, Tensor) else scale)
                    parameter[k] -= rate * (self.weight_decay * group.weight_decay * parameter[k] + direction[k])

    def _follow(self) -> None:
        """What the adapter did to the shape of a parameter is done to its moments and counts."""
        position = {id(p): i for i, p in enumerate(self.adapter.parameters())}
        changes = self.adapter.take_changes()
        shapes = {id(parameter): parameter.shape for parameter, _ in changes}
        for parameter, change in reversed(changes):
            shapes[id(parameter)] = change.before(shapes[id(parameter)])
        for parameter, change in changes:
            i = position[id(parameter)]
            if i not in self.moments:  # no gradient so far
                zeros = parameter.new_zeros(shapes[id(parameter)])
                self.moments[i] = zeros, zeros.clone(), torch.full_like(zeros, self.index)
            self.moments[i] = tuple(change(moment) for moment in self.moments[i])

    def state(self) -> dict:
        """A copy of all that the next step depends on."""
        moments = {i: tuple(m.clone() for m in moments) for i, moments in self.moments.items()}
        adapter = {name: value.clone() for name, value in self.adapter.state_dict().items()}
        return {"index": self.index, "moments": moments, "adapter": adapter}

    def load(self, state: dict) -> None:
        self.index = state["index"]
        self.moments = {i: tuple(m.clone() for m in moments) for i, moments in state["moments"].items()}
        self.adapter.load_state_dict(state["adapter"])


def task_losses(adapter: Adapter, batch: dict[str, Tensor]) -> Tensor:
    """(K,): for each member the mean cross-entropy over its own rows."""
    logits = outputs(adapter.model, adapter.prepare(batch))
    losses = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    return losses.view(adapter.members, -1).mean(1)


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits (rows, labels)."""
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits
