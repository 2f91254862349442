"""Rank slots that come, go and change places, and how an optimizer follows them."""

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
    """

    places: Int[Tensor, "K R"]
    axis: int
    size: int  # of the axis before

    def __call__(self, tensor: Tensor) -> Tensor:
        """The same for any tensor whose slots lie along that axis, such as an optimizer's average of the parameter."""
        if tensor.shape[self.axis] != self.size:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has not the {self.size} slots along axis {self.axis}")
        places = self._along(self.places, tensor.dim())
        whole = [-1 if axis in (0, self.axis) else n for axis, n in enumerate(tensor.shape)]
        if not self.size:  # nothing to gather from
            shape = [places.shape[axis] if n == -1 else n for axis, n in enumerate(whole)]
            return tensor.new_zeros(shape)
        taken = tensor.gather(self.axis, places.clamp_min(0).expand(whole).to(tensor.device))
        return taken.masked_fill_((places < 0).to(tensor.device), 0)

    def new(self, dim: int) -> Bool[Tensor, "..."]:
        """Which slots are new, as a mask on a tensor of so many axes."""
        return self._along(self.places == NEW, dim)

    def _along(self, values: Tensor, dim: int) -> Tensor:
        return values.view(len(values), *(-1 if axis == self.axis else 1 for axis in range(1, dim)))


def follow(optimizer: torch.optim.Optimizer, adapter: Adapter) -> None:
    """Has an optimizer of torch's follow what the adapter did to its parameters; call it after `adapter.after_step`.

    Averages of slots that are new are zero; torch counts steps for whole tensors, so bias correction goes on as it was.

    Raises:
        ValueError: an optimizer that keeps something of another shape than the parameter.
    """
    for parameter, change in adapter.take_changes():
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            shape = list(parameter.shape)
            shape[change.axis] = change.size
            if list(value.shape) != shape:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {name} of shape {tuple(value.shape)} for a parameter of another shape, "
                    f"which cannot follow a change of rank: use one that keeps an average for each element, such as AdamW"
                )
            state[name] = change(value)
