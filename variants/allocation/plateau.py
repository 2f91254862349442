"""When training has converged: the schedule "on-plateau" lowers the total once the loss of a member has stopped falling.

    s_t = beta s_t-1 + (1 - beta) L_t        better: s_t < best - threshold |best|

L_t is the member's task loss of step t, and s_1 = L_1.  After the warm-up each step either is better than the best one so
far or waits; `patience` steps of waiting in a row are a plateau (the rule of torch's ReduceLROnPlateau, on s).  There the
total goes one of `stages` equal parts of the way from the initial to the target ranks, at the next allocation, and the search
begins anew, as the loss rises with the ranks that are cut.  Where fewer plateaus were found by the final phase, the total goes
to the target with its first step, so that the budget is met whatever the loss did.

Legend: K member.  All of it is state: a run that goes on decides as it would have, and each member has its own plateaus.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Plateau(nn.Module):
    """How far each member is."""

    def __init__(self, members: int, patience: int, threshold: float, smoothing: float, stages: int):
        super().__init__()
        self.patience, self.threshold, self.smoothing, self.stages = patience, threshold, smoothing, stages
        self.register_buffer("smoothed", torch.full((members,), torch.nan, dtype=torch.float64))
        self.register_buffer("best", torch.full((members,), torch.inf, dtype=torch.float64))
        self.register_buffer("waited", torch.zeros(members, dtype=torch.int64))  # steps since the best one
        self.register_buffer("found", torch.zeros(members, dtype=torch.int64))  # plateaus so far

    @torch.no_grad()
    def update(self, losses: Float[Tensor, " K"], counted: Bool[Tensor, " K"], is_watching: bool) -> None:
        """One step.  A member that is not `counted` stays where it is.

        Args:
            is_watching: the warm-up is over; before, losses are smoothed and nothing else.
        """
        losses = losses.detach().to(self.smoothed)
        counted = counted.to(losses.device) & losses.isfinite()
        new = torch.where(self.smoothed.isnan(), losses, self.smoothing * self.smoothed + (1 - self.smoothing) * losses)
        self.smoothed.copy_(torch.where(counted, new, self.smoothed))
        if not is_watching:
            return
        is_better = self.best.isinf() | (self.smoothed < self.best - self.threshold * self.best.abs())
        self.best.copy_(torch.where(counted & is_better, self.smoothed, self.best))
        self.waited.copy_(torch.where(is_better, 0, self.waited + 1).where(counted, self.waited))
        ends = self.waited >= self.patience
        self.found.add_(ends)
        self.waited.masked_fill_(ends, 0)
        self.best.masked_fill_(ends, torch.inf)

    def budgets(self, initial: list[int], target: list[int]) -> list[int]:
        """The total of each member now, from what it has at the start and at the end."""
        found = self.found.clamp_max(self.stages).tolist()
        return [b0 + (bT - b0) * n // self.stages for b0, bT, n in zip(initial, target, found, strict=True)]
