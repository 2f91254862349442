"""Experts of a mixture, whose weights are one parameter of three axes: a site at each expert's matrix."""

from collections.abc import Iterator

from rankwise.variants.adapter.kinds.interface import TRAINABLE, Kind
from torch import Tensor, nn


class Matrix(nn.Module):
    """x W^T for an expert's W, stored (O, I) or, where `is_transposed`, (I, O).  The experts' biases stay in their module."""

    bias = None
    weight: Tensor

    def __init__(self, is_transposed: bool):
        super().__init__()
        self.is_transposed = is_transposed

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.is_transposed else nn.functional.linear(x, self.weight)


class Expert(Matrix):
    """One expert's matrix in the parameter (E, ...) that it shares with the others."""

    def __init__(self, stack: nn.Parameter, index: int, is_transposed: bool):
        super().__init__(is_transposed)
        self.stack, self.index = stack, index

    @property
    def weight(self) -> Tensor:
        return self.stack[self.index]


class Apart(Matrix):
    """One expert's matrix as a parameter of its own, into which a member can be merged."""

    def __init__(self, expert: Expert):
        super().__init__(expert.is_transposed)
        self.weight = nn.Parameter(expert.weight.detach().clone(), requires_grad=False)
        self.train(expert.training)


class Stack(nn.Module):
    """The experts of one parameter while an adapter is attached: modules "0" to "E-1", each of which can be replaced."""

    def __init__(self, stack: nn.Parameter, is_transposed: bool):
        super().__init__()
        self.was_called = False
        for index in range(len(stack)):
            self.add_module(str(index), Expert(stack, index, is_transposed))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())


class ExpertMatrix(Kind):
    """An expert's matrix, which "all-linear" does not mean: variants/adapter/experts.py says what does."""

    is_part = True

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, Matrix)

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return tuple(module.weight.shape)

    def fault(self, module: nn.Module) -> str | None:
        if module.weight.dtype not in TRAINABLE:
            return f"of {module.weight.dtype}: load the model without quantisation, or leave its experts out of the targets"
        return None

    def matrix(self, weight: Tensor) -> Tensor:
        raise NotImplementedError("how an expert's matrix is stored is said by its module")

    def stored(self, matrix: Tensor, module: nn.Module) -> Tensor:
        return matrix.mT if module.is_transposed else matrix

    def weight(self, module: nn.Module) -> Tensor:
        return module.weight.mT if module.is_transposed else module.weight

    def size(self, module: nn.Module) -> tuple[int, int]:
        out_features, in_features = self.weight(module).shape
        return out_features, in_features

    def in_full(self, module: nn.Module) -> nn.Module | None:
        return Apart(module) if isinstance(module, Expert) else None
