"""What a trainer and a method say to each other: steps, groups of parameters, calibrations; and what either may refuse."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class NotPackable(ValueError):
    """This model or method cannot train several members at once; run its members with K = 1."""


class CannotMerge(ValueError):
    """A weight that the adapter changes is also used elsewhere, unchanged."""


@dataclass(frozen=True)
class Step:
    """Where training is.

    index: the step being taken, 1-based; total: steps of the run.
    taken: (K,) bool, the members whose gradient was finite, so that their step counts; None means all.
    factor: what the schedule multiplies the learning rates by in this step.
    learning_rates: (K,) the rate in force at this step, the schedule's factor in it; None where nobody said.
    losses: (K,) the members' task losses of this step, known once its gradients are; None where nobody said.
    """

    index: int
    total: int
    taken: Tensor | None = None
    factor: float = 1.0
    learning_rates: Tensor | None = None
    losses: Tensor | None = None


@dataclass
class Group:
    """Parameters that share a factor on the learning rate and on the weight decay.

    lr_scale: a number, a tensor (K,) or (K, ...) for all of them, or such a tensor for each; read at every step.
    """

    params: list[nn.Parameter]
    lr_scale: float | Tensor | list[Tensor] = 1.0
    weight_decay: float = 1.0


@dataclass(frozen=True)
class Calibration:
    """What a method that measures the model before it trains is given.

    batches: of the model's input, each with every member's own rows, one member's after the other, as many of each.
    loss: of such a batch the (K,) losses of the members.  A method that measures gradients needs it; any other runs it in
        place of `model(**batch)` where it is given (for autocast, say).
    """

    batches: Sequence[Any]
    loss: Callable[[Any], Tensor] | None = None


@dataclass(frozen=True)
class Uncalibrated:
    """In place of a calibration: the start is to come from elsewhere, as from a file, or does not matter.

    ranks: site -> the rank of each member, or of all; those of a uniform start where none are given.
    """

    ranks: Mapping[str, list[int] | int] | None = None
