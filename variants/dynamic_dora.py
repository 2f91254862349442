"""Dynamic-rank DoRA: rank-one components, each with a trained coefficient, pruned by their share of the layer's update.

    y = W x + s sum_i c_i B_i A_i x + b        s = alpha / initial_rank

Here c (K, R) is E, the coefficients of the slots, and starts at zero; A (K, R, I) and B (K, O, R) start by Kaiming.  Mao et al.
2024 (arXiv 2405.17357): eq. (6) the update, (7) and (8) the score, (9) the budget, (10) the penalty.  This is not the
weight-decomposed DoRA of Liu et al. 2024 (method "dora"), with which it shares nothing but the name.

As an allocator: score "norm-share" x schedule "cubic-late" x direction "prune" x cost "rank" (variants/allocation), without
gradients.  warmup_steps and final_steps are the window's two ends: 15 % and 50 % of the run in the paper.

Departures: exactly the budget is kept, ties in site order (the release cuts every tie, and at least one component at the first
allocation); the norms are the closed form |c||A_i||B_i|, where the release builds an (r, O, I) tensor.  Read in a digest of
paper and release, not in the paper itself: the start of B (U(-1/sqrt(r), 1/sqrt(r)), an (O, r) tensor's own Kaiming), the
variance (with n - 1), and the mean in eq. (10) over components ("paper") or over vectors ("release").
"""

import torch
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.linears import module_in, module_out
from rankwise.variants.adapter.step import Step
from rankwise.variants.allocation.allocated import AllocatedAdapter
from torch import Tensor, nn


class DynamicDoRA(AllocatedAdapter):
    """K members of dynamic-rank DoRA (Mao et al. 2024)."""

    method = "dynamic-dora"

    def starts(self, name: str, module: nn.Module, ranks: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        A, B = [], []
        for rank, seed in zip(ranks, self.seeds, strict=True):
            A.append(initialization.kaiming(rank, module_in(module), initialization.generator(seed, name, "A")))
            B.append(initialization.kaiming(module_out(module), rank, initialization.generator(seed, name, "B")))
        return A, B

    def penalty(self, step: Step) -> Tensor:
        """(K,): eta R with R = mean over components of Var(A_i) + Var(B_i), eq. (10); none once the ranks are fixed."""
        total = torch.zeros(self.members, device=self.device)
        if step.index >= step.total - self.settings.final_steps:
            return total
        count = torch.zeros_like(total)
        for site in self.triplets():
            spread = site.A.var(dim=2) + site.B.var(dim=1)  # (K, R)
            total = total + (spread * site.slots).sum(1)
            count = count + site.slots.sum(1)
        vectors = 2 if self.settings.penalty_form == "release" else 1
        return self.settings.modulator * total / (vectors * count)
