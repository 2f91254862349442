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
        """
        Args:
            tensors: (K, ...) each; their elements lie one after the other in the averages, (K, P).
        """
        super().__init__()
        self.beta1, self.beta2 = beta1, beta2
        self.shapes = [tensor.shape for tensor in tensors]
        flat = torch.cat([torch.zeros_like(tensor).flatten(1) for tensor in tensors], 1)
        self.sizes = [shape[1:].numel() for shape in self.shapes]
        self.register_buffer("all_smoothed", flat)
        self.register_buffer("all_uncertainty", flat.clone())

    @torch.no_grad()
    def update(self, tensors: Sequence[nn.Parameter], counted: Bool[Tensor, " K"]) -> None:
        """One step.  A tensor without a gradient keeps its averages, and so does a member that is not counted."""
        active = [tensor for tensor in tensors if tensor.grad is not None]
        now = torch.cat([(tensor * tensor.grad).flatten(1) for tensor in active], 1).abs_()  # (K, P)
        finite = now.amax(1).isfinite() & counted  # (K,)
        now.nan_to_num_(0.0, 0.0, 0.0)
        smoothed, uncertainty = self.all_smoothed, self.all_uncertainty
        missing = len(active) < len(tensors)
        if missing:
            has = torch.tensor([tensor.grad is not None for tensor in tensors], device=now.device)
            chosen = has.repeat_interleave(torch.tensor(self.sizes, device=now.device))  # (P,)
            smoothed, uncertainty = smoothed[:, chosen], uncertainty[:, chosen]
        weight = finite[:, None].to(now.dtype)  # 0 for a member that does not count
        smoothed.lerp_(now, (1 - self.beta1) * weight)
        uncertainty.lerp_(now.sub_(smoothed).abs_(), (1 - self.beta2) * weight)
        if missing:
            self.all_smoothed[:, chosen], self.all_uncertainty[:, chosen] = smoothed, uncertainty

    def scores(self) -> list[Tensor]:
        """s of every element, in the tensors' shapes."""
        return self._parts(self.all_smoothed * self.all_uncertainty)

    def smoothed(self, index: int) -> Tensor:
        return self._parts(self.all_smoothed)[index]

    def uncertainty(self, index: int) -> Tensor:
        return self._parts(self.all_uncertainty)[index]

    def score(self, index: int) -> Tensor:
        """s of every element of tensor `index`."""
        return self.scores()[index]

    def _parts(self, flat: Tensor) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(flat.split(self.sizes, 1), self.shapes, strict=True)]
