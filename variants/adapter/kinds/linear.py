"""Linears: torch's, and GPT-2's, which stores its weight the other way."""

from rankwise.variants.adapter.kinds.interface import Kind
from torch import Tensor, nn


class Linear(Kind):
    """nn.Linear."""

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return module.out_features, module.in_features


class Conv1D(Kind):
    """GPT-2's Conv1D, a linear whose weight is stored (I, O)."""

    fan_in_fan_out = True

    def holds(self, module: nn.Module) -> bool:
        # By name, not by class: variants does not import transformers.
        return type(module).__name__.endswith("Conv1D") and hasattr(module, "nf")

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return module.weight.shape[0], module.nf

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def stored(self, matrix: Tensor, module: nn.Module) -> Tensor:
        return matrix.mT
