"""Rank slots that come, go and change places, and how an optimizer follows them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from rankwise.variants.adapter.interface import Adapter
from torch import Tensor

NEW, NONE = -1, -2


@dataclass(frozen=True)
class Rearranged:
    """What became of a tensor's slots: along `axis`, slot j of member k is now its old slot places[k, j].

    places: NEW for a fresh slot: zeros, and the optimizer's averages restart.  NONE for padding, because another member has
        more slots: zeros too.
    axis: or two of them, for a tensor with an element for each pair of slots.
    """

    places: Int[Tensor, "K R"]
    axis: int | tuple[int, int]
    size: int  # of the axis before

    @property
    def axes(self) -> tuple[int, ...]:
        return (self.axis,) if isinstance(self.axis, int) else self.axis

    def __call__(self, tensor: Tensor) -> Tensor:
        """The same for any tensor whose slots lie along that axis, such as an optimizer's average of the parameter."""
        for axis in self.axes:
            tensor = self._moved(tensor, axis)
        return tensor

    def _moved(self, tensor: Tensor, axis: int) -> Tensor:
        if tensor.shape[axis] != self.size:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has not the {self.size} slots along axis {axis}")
        places = _along(self.places, axis, tensor.dim())
        whole = [-1 if at in (0, axis) else n for at, n in enumerate(tensor.shape)]
        if not self.size:  # nothing to gather from
            shape = [places.shape[at] if n == -1 else n for at, n in enumerate(whole)]
            return tensor.new_zeros(shape)
        taken = tensor.gather(axis, places.clamp_min(0).expand(whole).to(tensor.device))
        return taken.masked_fill_((places < 0).to(tensor.device), 0)

    def new(self, dim: int) -> Bool[Tensor, "..."]:
        """Which slots are new, as a mask on a tensor of so many axes; of a pair of slots, whether one of them is."""
        masks = [_along(self.places == NEW, axis, dim) for axis in self.axes]
        return masks[0] if len(masks) == 1 else masks[0] | masks[1]

    def before(self, shape: Sequence[int]) -> list[int]:
        """The shape that a tensor of `shape` had."""
        return [self.size if axis in self.axes else n for axis, n in enumerate(shape)]


def _along(values: Tensor, axis: int, dim: int) -> Tensor:
    """(K, R) as a tensor of so many axes, R along `axis`."""
    return values.view(len(values), *(-1 if at == axis else 1 for at in range(1, dim)))


def follow(optimizer: torch.optim.Optimizer, adapter: Adapter) -> None:
    """Has an optimizer of torch's follow what the adapter did to its parameters; call it after `adapter.after_step`.

    Averages of slots that are new are zero; torch counts steps for whole tensors, so bias correction goes on as it was, but
    for a tensor that is new as a whole.

    Raises:
        ValueError: an optimizer that keeps something of another shape than the parameter.
    """
    for parameter, change in adapter.take_changes():
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if list(value.shape) != change.before(parameter.shape):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {name} of shape {tuple(value.shape)} for a parameter of another shape, "
                    f"which cannot follow a change of rank: use one that keeps an average for each element, such as AdamW"
                )
            state[name] = change(value)
        if state and bool(change.new(parameter.dim()).all()):
            state["step"] = state["step"] * 0
