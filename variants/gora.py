"""GoRA: LoRA whose ranks and whose B come from the gradient of the frozen weights, before training.

    G = mean over N batches of dL/dW       I_i = mean |W_i * G_i|       a_i = I_i / sum I
    r_i = clip(round(a_i sum_j sqrt(m_j + n_j) r / sqrt(m_i + n_i)), r_min, r_max)        s = alpha / sqrt(r_i)
    B = -xi G A^T (A A^T)^-1        xi = gamma sqrt(n) / alpha        A Kaiming uniform

W is (m, n), and s B A about -gamma G in norm, so the body is not unchanged at the start.  GoRA, arXiv 2502.12171; its release,
hhnqqq/MyTransformers @4037d4d, common/lora_modules/gora.py.  For other scales xi is gamma sqrt(n/r) / s.

By name: the release's floor and features m + n (rounding = "release"), its sign (sign = "ascent": it has no minus), its
default importance ||W * G||_F (importance = "frobenius").  rounding = "exact" is ours: the paper's proportions
a_i / sqrt(m_i + n_i), by the largest remainder to exactly the budget.

Departures: every weight is averaged over all N batches (the release drops one of the last); the pseudo-inverse is a solve;
no step is taken between batches, and neither gamma nor N is searched.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from rankwise.variants.adapter.linears import module_in, module_out, weight_of
from rankwise.variants.adapter.step import Calibration
from rankwise.variants.allocation.measuring import gradients
from rankwise.variants.allocation.placed import PlacedLoRA, Ranks
from torch import Tensor, nn


class GoRA(PlacedLoRA):
    """K members of GoRA."""

    method = "gora"
    needs = "gradients"
    starts_at_identity = False

    def measure(self, names: Sequence[str], calibration: Calibration) -> Ranks:
        self.measured = gradients(self, names, calibration)
        importance = torch.stack([self._importance(name) for name in names], 1).nan_to_num(0.0, 0.0, 0.0)  # (K, sites)
        total = importance.sum(1, keepdim=True)
        share = torch.where(total > 0, importance / total, 1 / len(names))
        modules = [self.model.get_submodule(name) for name in names]
        sizes = [module_in(module) + module_out(module) for module in modules]
        if self.settings.rounding == "exact":
            return self.by_share({n: (a / sqrt(f)).tolist() for n, a, f in zip(names, share.T, sizes, strict=True)})
        features = [sqrt(f) for f in sizes] if self.settings.rounding == "paper" else sizes
        starts = [self.uniform_ranks(name) for name in names]
        budgets = [sum(f * r[k] for f, r in zip(features, starts, strict=True)) for k in range(self.members)]
        ranks: Ranks = {}
        for name, a, f in zip(names, share.T.tolist(), features, strict=True):
            wanted = [self._rounded(b * a_k, f) for b, a_k in zip(budgets, a, strict=True)]
            ranks[name] = [min(max(r, least), most) for r, (least, most) in zip(wanted, self.site_bounds(name), strict=True)]
        return ranks

    def _importance(self, name: str) -> Tensor:
        """(K,) of a site."""
        G = self.measured[name]
        product = weight_of(self.model.get_submodule(name)).detach().cpu().to(G.dtype) * G  # (K, O, I)
        return product.abs().mean((1, 2)) if self.settings.importance == "mean" else product.flatten(1).norm(dim=1)

    def _rounded(self, share: float, features: float) -> int:
        return round(share / features) if self.settings.rounding == "paper" else int(round(share) // features)

    def default_bounds(self, name: str) -> list[tuple[int, int | None]]:
        least, most = self.settings.least_rank, self.settings.most_rank
        return [(r // 2 if least is None else least, 4 * r if most is None else most) for r in self.uniform_ranks(name)]

    def start(self, name: str, module: nn.Module, ranks: list[int], measured: Any) -> tuple[list[Tensor], list[Tensor]]:
        A, B = super().start(name, module, ranks, measured)
        if measured is None:
            return A, B
        sign = -1.0 if self.settings.sign == "descent" else 1.0
        for k, (rank, scale) in enumerate(zip(ranks, self.site_scales(name, ranks), strict=True)):
            if rank:
                a, g = A[k].double(), measured[k].double().nan_to_num(0.0, 0.0, 0.0)
                inverse = torch.linalg.solve(a @ a.mT, a @ g.mT).mT  # G A^T (A A^T)^-1, (O, r)
                B[k] = sign * self.settings.gamma * sqrt(module_in(module) / rank) / scale * inverse
        return A, B
