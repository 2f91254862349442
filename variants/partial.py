"""Some of the model's own parameters trained: those that patterns name, or layer after layer from the top down.

partial     what `patterns` mean, and the task head.  "top-2", the default, is the row FT^Top2 of LoRA's Table 3 (after Li and
            Liang 2021): the last two layers, with what comes after them; ["bias"] trains BitFit's parameters, in the model's
            own tensors.
gradual     Howard and Ruder 2018 (ULMFiT), sec. 3.3, gradual unfreezing: at first the head alone, then the next lower layer
            with all that is unfrozen, and so on; the embeddings come last.  At step t (from 1) of T the first

                1 + (t - 1) // interval            or, without an interval,    1 + (t - 1) G // T

            of the G groups are trained.  What is frozen has no gradient, no average of the optimizer's and no decay; its step
            count begins when it is unfrozen.

A layer is a member of a stack (nn.ModuleList) that lies in no other; what stands outside belongs to the layer before it, what
comes after the last one to the head's group, and what comes before the first one to the embeddings' group, an output layer that
is tied to them too.  Of an encoder-decoder the decoder is above.

Departure: the discriminative rates and the slanted triangular schedule of ULMFiT are not part of it.

Neither can be packed: members would need the model's own tensors each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from rankwise.variants.adapter.step import Step
from rankwise.variants.adapter.targets import matches
from rankwise.variants.settings import nearest
from rankwise.variants.settings.partial import TOP
from rankwise.variants.subset import FullFineTuning
from torch import Tensor, nn


class Partial(FullFineTuning):
    """The parameters that patterns mean, and the task head."""

    method = "partial"

    def choose(self, model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
        """No module gets a site; notes what is trained.

        Raises:
            ValueError: a pattern that means no parameter outside the head; and as full fine-tuning.
        """
        nothing = super().choose(model, targets, head)
        body = [name for name, _ in model.named_parameters(remove_duplicate=False) if not _is_inside(name, head)]
        self._chosen: set[str] = set()
        for pattern in self.settings.patterns:
            meant = self._meant(model, pattern, body)
            if not meant:
                ends = dict.fromkeys(name.rpartition(".")[2] for name in body)
                modules = dict.fromkeys(name.rpartition(".")[0].rpartition(".")[2] for name in body)
                raise ValueError(
                    f'patterns: "{pattern}" means no parameter of {type(model).__name__} outside its head'
                    f"{nearest(pattern, [*ends, *modules, *body])}"
                )
            self._chosen |= meant
        return nothing

    def _meant(self, model: nn.Module, pattern: str, body: Sequence[str]) -> set[str]:
        if (top := TOP.fullmatch(pattern)) is not None:
            own = dict(model.named_parameters())  # a tied one under its first name
            groups = groups_of(model, [name for name in body if name in own])
            return {name for group in groups[-1 - int(top[1]) :] for name in group}
        return {name for name in body if any(matches(pattern, part) for part in _parts(name))}

    def trains(self, name: str) -> bool:
        return name in self._chosen

    def changed_weights(self) -> list[str]:
        """The linears of the layers that are trained; what else is trained stands beside them."""
        return [name for name in super().changed_weights() if f"{name}.weight" in self._originals]


class Gradual(FullFineTuning):
    """Every parameter, layer after layer from the top down."""

    method = "gradual"
    trains_from_the_start: ClassVar[bool] = False

    def choose(self, model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
        """
        Raises:
            ValueError: a model without a stack of layers; and as full fine-tuning.
        """
        nothing = super().choose(model, targets, head)
        self._groups = groups_of(model, [name for name, _ in model.named_parameters()])
        return nothing

    def _replace_parameters(self, model: nn.Module, head: Sequence[str]) -> None:
        super()._replace_parameters(model, head)
        stages: list[list[str]] = [[]]
        for names in reversed(self._groups):
            stages[0] += [name for name in names if _is_inside(name, head)]  # from the start, wherever the head stands
            stages.append([name for name in names if not _is_inside(name, head)])
        stages[0] += stages.pop(1)  # what comes after the last layer
        # (the model's parameter, the tensor of this adapter that it shares its memory with), from the top down
        pairs = [[(model.get_parameter(name), self._owned[name]) for name in names] for names in stages if names]
        self._stages = pairs
        self._begun: list[tuple[nn.Parameter, Begun]] = []
        self._freeze(1)

    def open(self, index: int, total: int) -> int:
        """How many groups are trained at a step."""
        interval, groups = self.settings.interval, len(self._stages)
        passed = (index - 1) * groups // max(total, 1) if interval is None else (index - 1) // interval
        return min(1 + passed, groups)

    def begin(self, step: Step, micro_batch: int = 0, training: bool = True) -> None:
        super().begin(step, micro_batch, training)
        self._freeze(self.open(step.index, step.total))

    def _freeze(self, trained: int) -> None:
        """All groups but the first so many."""
        for place, stage in enumerate(self._stages):
            for live, _ in stage:
                live.requires_grad_(place < trained)

    def after_step(self, step: Step) -> None:
        now, then = self.open(step.index, step.total), self.open(step.index + 1, step.total)
        self._begun += [(owned, Begun(owned.device)) for stage in self._stages[now:then] for _, owned in stage]

    def take_changes(self) -> list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
        taken, self._begun = self._begun, []
        return taken


@dataclass(frozen=True)
class Begun:
    """A parameter whose training begins with the next step: its values stay, and its steps are counted from there.

    device: of the parameter.
    """

    device: torch.device

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor

    def before(self, shape: Sequence[int]) -> list[int]:
        """The shape that a tensor of `shape` had: the same."""
        return list(shape)

    def new(self, dim: int) -> Tensor:
        """All of it, as a mask that broadcasts over so many axes."""
        return torch.ones([1] * dim, dtype=torch.bool, device=self.device)


def groups_of(model: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Parameters by depth, from the bottom up: what comes before the first layer, each layer, what comes after the last one.

    names: of the parameters, in the model's order.

    Raises:
        ValueError: no stack of layers.
    """
    stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    layers = [f"{stack}.{child}" for stack in stacks for child, _ in model.get_submodule(stack).named_children()]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no stack of layers (nn.ModuleList) to go by: name parameters by pattern (partial)"
        )
    groups: list[list[str]] = [[] for _ in range(len(layers) + 2)]
    place = 0
    for name in names:
        own = next((i for i, layer in enumerate(layers, start=1) if _is_inside(name, [layer])), None)
        place = place if own is None else own
        groups[len(layers) + 1 if own is None and place == len(layers) else place].append(name)
    return groups


def _is_inside(name: str, modules: Sequence[str]) -> bool:
    return name.startswith(tuple(f"{module}." for module in modules)) if modules else False


def _parts(name: str) -> Iterator[str]:
    """A parameter's name, and those of the modules that hold it."""
    yield name
    while name := name.rpartition(".")[0]:
        yield name
