"""What a site has: the trained tensors of K members at one module of the model, and how they act there.

A method's site derives from `Site` and overrides what it has.  Rank's words are explained in variants/lowrank/__init__.py.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn


class Site(nn.Module):
    """The trained tensors of K members at one module, and how they change its output."""

    has_rank: ClassVar[bool] = False  # it has ranks, and a scale
    has_delta: ClassVar[bool] = False  # its change is one of the module's weight, which `delta` gives
    has_magnitude: ClassVar[bool] = False  # its rows have trained magnitudes
    is_norm: bool = False  # of the head: a layer norm, whose tensors do not decay
    scale: Tensor  # (K,) alpha/r in force, where it has a rank

    @property
    def low_rank(self) -> "Site | None":
        """The low-rank site: this one, or the one inside magnitudes; None where there is none."""
        return None

    def merged(self, base: nn.Module, member: int) -> dict[str, Tensor]:
        """The base's parameters, by name, with the change of one member in them."""
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")

    def delta(self, base: nn.Module) -> Tensor:
        """(K, O, I): the dense change of the weight, where it has one."""
        raise NotImplementedError(f"{type(self).__name__} changes no weight")

    def rank(self) -> Tensor:
        """(K,) active rank: what the method counts as its rank now."""
        raise NotImplementedError(f"{type(self).__name__} has no rank")

    def live(self) -> Tensor:
        """(K,) slots that act on the output at this moment."""
        return self.rank()

    def nominal(self) -> Tensor:
        """(K,) slots given at the start, or those of now where there are more."""
        return self.rank()

    def physical(self) -> Tensor:
        """(K,) slots that parameters are held for."""
        return self.rank()

    def count(self, ranks: Tensor) -> Tensor:
        """(K,) parameters of so many slots, and of what does not depend on the rank."""
        return torch.zeros_like(ranks)

    def tensors_of(self, member: int) -> dict[str, Tensor]:
        """The trained tensors of one member, by name, without slots that are not its own."""
        return {key: parameter[member] for key, parameter in self.named_parameters()}

    def clear_missing_slots(self) -> None:
        """Zeros where no slot exists."""

    def parameters_changed(self) -> None:
        """The parameters are new: what was computed from the old ones is dropped."""
