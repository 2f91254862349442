"""Parameters in groups, as an optimizer of torch takes them."""

from typing import Any

from rankwise.variants.adapter.interface import Adapter


def torch_groups(adapter: Adapter, lr: float, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """The adapter's parameters as an optimizer of torch takes them, each group with its own rate and decay.

    Raises:
        ValueError: a method whose rates differ within a tensor, which no group of torch's can say.
    """
    groups = []
    for group in adapter.parameter_groups():
        if not isinstance(group.lr_scale, int | float):
            raise ValueError(
                f"{adapter.method} gives the members or ranks of a tensor rates of their own, which no parameter group of "
                f"torch.optim can say: train it with rankwise.experiments.training.optim.MemberAdamW"
            )
        rates = {"lr": lr * group.lr_scale, "weight_decay": weight_decay * group.weight_decay}
        groups.append({"params": list(group.params), **rates})
    return groups
