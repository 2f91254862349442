"""The kind of a module's frozen weight (variants/adapter/kinds/), and what all code asks of it, whatever it stores."""

from collections.abc import Callable

import torch
from rankwise.variants.adapter.kinds.convolution import Conv1d, Conv2d
from rankwise.variants.adapter.kinds.embedding import Embedding
from rankwise.variants.adapter.kinds.experts import ExpertMatrix
from rankwise.variants.adapter.kinds.interface import Kind
from rankwise.variants.adapter.kinds.linear import Conv1D, Linear
from rankwise.variants.adapter.kinds.quantised import Quantised, hide_from_trainer
from rankwise.variants.adapter.step import CannotMerge
from rankwise.variants.adapter.surgery import Adapted
from torch import Tensor, nn

# The first that holds a module is its kind.
KINDS: tuple[Kind, ...] = (Quantised(), Linear(), Conv1D(), Embedding(), Conv1d(), Conv2d(), ExpertMatrix())


def find_kind(module: nn.Module) -> Kind | None:
    """The kind of the module's weight, adapted or not; None where it is no known one."""
    module = module.base if isinstance(module, Adapted) else module
    return next((kind for kind in KINDS if kind.holds(module)), None)


def kind_of(module: nn.Module) -> Kind:
    """
    Raises:
        ValueError: no known kind.
    """
    kind = find_kind(module)
    if kind is None:
        raise ValueError(f"a {type(module).__name__} has no weight of a known kind ({known_kinds()}): choose other targets")
    return kind


def known_kinds() -> str:
    """The kinds by name, for a message."""
    return ", ".join(type(kind).__name__ for kind in KINDS)


def check_adaptable(name: str, module: nn.Module) -> None:
    """
    Raises:
        ValueError: no site can stand at the module of that name: no known kind of weight, or one that is quantised.
    """
    fault = kind_of(module).fault(module)
    if fault is not None:
        raise ValueError(f'"{name}" is a {type(module).__name__} {fault}')


def prepare(model: nn.Module) -> list[Callable[[], None]]:
    """Has every kind prepare its modules of a model that is attached to; what undoes it."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    known = [(find_kind(module), module) for module in model.modules()]
    undoing = [kind.prepare(module, dtype) for kind, module in known if kind is not None]
    undoing.append(hide_from_trainer(model))
    return [undo for undo in undoing if undo is not None]


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or GPT-2's Conv1D."""
    kind = find_kind(module)
    return kind is not None and kind.is_linear


def weight_of(base: nn.Module) -> Tensor:
    """The weight as a matrix (O, I), whichever way the module stores it."""
    return kind_of(base).weight(base)


def size_of(base: nn.Module) -> tuple[int, int]:
    """(O, I), without the weight's values."""
    return kind_of(base).size(base)


def dtype_of(base: nn.Module) -> torch.dtype:
    """The type of the weight as a matrix."""
    return kind_of(base).dtype(base)


def as_matrix(module: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor of the shape of the module's weight as a matrix (O, I); as it is where the module is of no known kind."""
    kind = find_kind(module)
    return tensor if kind is None else kind.matrix(tensor)


def as_stored(base: nn.Module, weight: Tensor) -> Tensor:
    """A weight (O, I) the way the module stores it, to be written into the module.

    Raises:
        CannotMerge: the module computes its weight out of other parameters.
    """
    kind = kind_of(base)
    if "weight" not in base._parameters and not kind.is_part:
        raise CannotMerge(
            f"the weight of a {type(base).__name__} is computed from other parameters (a parametrisation), so nothing can be "
            f'merged into it: call torch.nn.utils.parametrize.remove_parametrizations(module, "weight") before attach'
        )
    return kind.stored(weight, base)


def module_in(module: nn.Module) -> int:
    """I."""
    return size_of(module)[1]


def module_out(module: nn.Module) -> int:
    """O."""
    return size_of(module)[0]
