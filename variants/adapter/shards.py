"""Weights of which each process of a run holds a part, between the forward passes of their layer (torch's fully_shard)."""

import torch
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether the processes of a run share the weights of some of the model's layers."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole(weight: Tensor) -> Tensor:
    """The weight itself, of a shared one gathered from all processes, which must all ask for it at the same point."""
    gather = getattr(weight, "full_tensor", None)  # of torch's DTensor alone
    return weight if gather is None else gather()
