"""The kinds of frozen weight that a site can stand at."""

import torch
from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or GPT-2's Conv1D, whose weight is stored (in, out)."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    # By name, not by class: variants does not import transformers.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def weight_of(base: nn.Module) -> Tensor:
    """The weight of a linear as (O, I), whichever way the module stores it."""
    return base.weight.mT if is_conv1d(base) else base.weight


def trained_dtype(base: Tensor) -> torch.dtype:
    """Trained tensors are fp32 over a 16-bit base, else of the base's own type."""
    return torch.float32 if base.dtype in (torch.float16, torch.bfloat16) else base.dtype


def as_stored(base: nn.Module, weight: Tensor) -> Tensor:
    """A weight (O, I) the way the module stores it."""
    return weight.mT if is_conv1d(base) else weight


def module_in(module: nn.Module) -> int:
    return module.weight.shape[0] if hasattr(module, "nf") else module.in_features


def module_out(module: nn.Module) -> int:
    return module.nf if hasattr(module, "nf") else module.out_features
