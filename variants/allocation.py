"""Where rank goes: a score of each triplet, a schedule of the total, and an exact choice of what to keep, per member.

Legend: K member, R rank slots of a site, S slots of all sites together.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


def cubic_budget(index: int, start: int, end: int, initial: int, target: int) -> int:
    """Total rank after step `index`: `initial` until `start`, `target` from `end`, a cubic between.

        b(t) = b(T) + (b(0) - b(T)) (1 - (t - t_i) / (T - t_f - t_i))^3

    AdaLoRA eq. (12) with t_i = start and T - t_f = end; the printed numerator has a further "- t_f", without which
    alone the schedule is continuous (as in the release).  Truncated to an integer, as there.
    """
    if index <= start:
        return initial
    if index >= end:
        return target
    left = 1 - (index - start) / (end - start)
    return int((initial - target) * left**3 + target)


def keep_top(scores: Float[Tensor, "K S"], slots: Bool[Tensor, "K S"], budget: Int[Tensor, " K"]) -> Bool[Tensor, "K S"]:
    """The `budget` slots of each member with the highest scores; of equal ones the first in site order.

    A slot that does not exist for a member is never kept.  Exactly `budget` slots are kept, or all where fewer exist.
    """
    order = scores.masked_fill(~slots, -torch.inf).argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return (place < budget.to(place.device)[:, None]) & slots


class Sensitivity(nn.Module):
    """AdaLoRA's importance: smoothed sensitivity times its smoothed uncertainty, of every element.

        I = |w dL/dw|      Ibar = b1 Ibar + (1 - b1) I      U = b2 U + (1 - b2) |I - Ibar|      s = Ibar U

    Eq. (8) to (10); w is the parameter after the step, the gradient that of the step (the release's order).  Both
    averages start at zero without bias correction.
    """

    def __init__(self, tensors: Sequence[nn.Parameter], beta1: float, beta2: float):
        super().__init__()
        self.beta1, self.beta2 = beta1, beta2
        for index, tensor in enumerate(tensors):
            self.register_buffer(f"smoothed_{index}", torch.zeros_like(tensor))
            self.register_buffer(f"uncertainty_{index}", torch.zeros_like(tensor))

    @torch.no_grad()
    def update(self, tensors: Sequence[nn.Parameter], counted: Bool[Tensor, " K"]) -> None:
        """One step.  A tensor without a gradient keeps its averages, and so does a member that is not counted."""
        active = [index for index, tensor in enumerate(tensors) if tensor.grad is not None]
        gradients = [tensors[index].grad for index in active]
        finite = torch.stack([g.flatten(1).sum(1) for g in gradients]).sum(0).isfinite() & counted  # (K,)
        now = torch._foreach_mul([tensors[index].detach() for index in active], gradients)
        torch._foreach_abs_(now)
        for value in now:
            value.nan_to_num_(0.0, 0.0, 0.0)
        smoothed = [self.smoothed(index) for index in active]
        uncertainty = [self.uncertainty(index) for index in active]
        for value, mean, spread in zip(now, smoothed, uncertainty, strict=True):
            weight = finite.view(-1, *[1] * (value.dim() - 1)).to(value.dtype)  # 0 for a member that does not count
            mean.lerp_(value, (1 - self.beta1) * weight)
            spread.lerp_((value - mean).abs_(), (1 - self.beta2) * weight)

    def smoothed(self, index: int) -> Tensor:
        return self.get_buffer(f"smoothed_{index}")

    def uncertainty(self, index: int) -> Tensor:
        return self.get_buffer(f"uncertainty_{index}")

    def score(self, index: int) -> Tensor:
        """s of every element of tensor `index`."""
        return self.smoothed(index) * self.uncertainty(index)
