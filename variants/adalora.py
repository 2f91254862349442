"""AdaLoRA: a low-rank update in the form of a singular value decomposition, its rank pruned by importance.

    y = W x + s P diag(E) Q x + b        s = alpha / initial_rank

Here A (K, R, I) is Q, B (K, O, R) is P, E (K, R) are the singular values; E starts at zero.  Zhang et al. 2023:
eq. (3) the update, (4) the orthogonality penalty, (8) to (10) the importance of an element, (7) of a triplet, (12) the budget.

As an allocator: score "sensitivity" x schedule "cubic" x direction "prune" x cost "rank" (variants/allocation: the call
order stands in allocated.py, the two masks in sites.py).  The paper's ablations are settings: score = "smoothed-sensitivity"
or "raw-sensitivity" (table 4: s = I), "magnitude" (S = |lambda|), orthogonality = 0 (table 5), initial_rank = target_rank
(SVD-LoRA, no allocation), and, with method "allocated", form = "doublet" (structured pruning of LoRA).

Departures from the release: exactly the budget is kept, ties in site order (the release cuts every tie); the final
allocation is made at step T - t_f whatever the interval; a step without a finite gradient changes no score; the penalty
never enters an evaluation; s is alpha/r without the release's + 1e-5.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from rankwise.variants.adapter.step import Step
from rankwise.variants.allocation.allocated import AllocatedAdapter
from rankwise.variants.allocation.sites import Triplets
from rankwise.variants.settings import per_member
from torch import Tensor
from torch.autograd.function import once_differentiable


class AdaLoRA(AllocatedAdapter):
    """K members of AdaLoRA."""

    method = "adalora"
    peft_type = "ADALORA"

    def penalty(self, step: Step) -> Tensor:
        """(K,): gamma R(P, Q), eq. (4); in the release's form the mean over all matrices of |M M^T - I|, not squared."""
        sites = self.triplets()
        is_paper = self.settings.penalty_form == "paper"
        slots = [site.slots for site in sites for _ in "AB"]
        total = Orthogonality.apply(is_paper, slots, *(m for site in sites for m in self.penalized(site)))
        if not is_paper:
            total = total / len(slots)
        weight = per_member(self.settings.orthogonality, self.members, "orthogonality")
        return total * torch.tensor(weight, dtype=total.dtype, device=total.device)

    def penalized(self, site: Triplets) -> tuple[Tensor, Tensor]:
        """The matrices (K, R, F) of a site whose rows should be orthonormal."""
        return site.A, site.B.mT


class Allocated(AdaLoRA):
    """K members of any allocator: score x schedule x direction x cost on triplets P diag(E) Q or on LoRA's doublets B A.

    With form = "doublet" and the score "sensitivity" it is AdaLoRA's structured pruning of LoRA (table 4, "Prune LoRA").
    """

    method = "allocated"
    peft_type = "LORA"

    @property
    def form(self) -> str:
        return self.settings.form


class Orthogonality(torch.autograd.Function):
    """(K,): the sum over matrices M (K, R, F) of |M M^T - I|, squared if `is_paper`; I has ones where a slot exists.

    Matrices of one shape are taken in one product.  The gradient, 2 (M M^T - I) M over the norm (or times two, if squared), is
    made along with the value: both need the same gap.
    """

    @staticmethod
    def forward(ctx, is_paper: bool, slots: Sequence[Tensor], *matrices: Tensor) -> Tensor:
        shapes: dict[torch.Size, list[int]] = {}
        for index, matrix in enumerate(matrices):
            shapes.setdefault(matrix.shape, []).append(index)
        total, ctx.gradients = 0.0, [None] * len(matrices)
        for indices in shapes.values():
            M = rearrange([matrices[i] for i in indices], "g k r f -> (g k) r f")
            gap = M @ M.mT
            gap.diagonal(dim1=1, dim2=2).sub_(rearrange([slots[i] for i in indices], "g k r -> (g k) r"))
            norms = torch.linalg.vector_norm(gap, dim=(1, 2))  # (G*K,)
            factor = 4.0 if is_paper else (2 / norms).masked_fill(norms == 0, 0.0)[:, None, None]
            gradients = rearrange((gap @ M).mul_(factor), "(g k) r f -> g k r f", g=len(indices))
            for i, gradient in zip(indices, gradients.unbind(0), strict=True):
                ctx.gradients[i] = gradient
            total = total + (norms.square() if is_paper else norms).view(len(indices), -1).sum(0)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * g[:, None, None] for gradient in ctx.gradients)
