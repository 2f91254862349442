"""AdaLoRA: a low-rank update in the form of a singular value decomposition, its rank pruned by importance.

    y = W x + s P diag(E) Q x + b        s = alpha / initial_rank

Here A (K, R, I) is Q, B (K, O, R) is P, E (K, R) are the singular values; E starts at zero.  Zhang et al. 2023:
eq. (3) the update, (4) the orthogonality penalty, (8) to (10) the importance of an element, (7) of a triplet, (12) the budget.

Two masks: `slots` says which triplets exist for a member; `kept` is the allocator's choice, applied to E as a
projection when ranks are allocated and after every step of the final phase, never in the forward pass: a triplet that
was cut still gets gradients, and may come back until the final phase begins.

Departures from the release: exactly the budget is kept, ties in site order (the release cuts every tie); the final
allocation is made at step T - t_f whatever the interval; a step without a finite gradient changes no score; the penalty
never enters an evaluation; s is alpha/r without the release's + 1e-5.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from variants import initialization
from variants.allocation import Sensitivity, cubic_budget, keep_top
from variants.base import Step
from variants.lora import module_in, module_out
from variants.lowrank import LowRank, LowRankAdapter
from variants.settings import per_member


class Triplets(LowRank):
    """A low-rank site with a trained coefficient E for each slot."""

    slot_axes = LowRank.slot_axes | {"E": 1, "kept": 1}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.E = nn.Parameter(torch.zeros_like(self.slots))  # (K, R)
        self.register_buffer("kept", self.slots.bool())

    def coefficients(self) -> Tensor:
        return self.E * (self.slots * self.scale[:, None])

    @torch.no_grad()
    def project(self) -> None:
        """Zeroes the singular values that the allocator cut."""
        self.E.mul_(self.kept)

    def rank(self) -> Tensor:
        """(K,) triplets that the allocator keeps."""
        return self.kept.sum(1)

    def live(self) -> Tensor:
        """(K,) triplets whose singular value is not zero now."""
        return (self.E != 0).sum(1)

    def count(self, ranks: Tensor) -> Tensor:
        return super().count(ranks) + ranks

    @torch.no_grad()
    def clear_missing_slots(self) -> None:
        super().clear_missing_slots()
        self.E.mul_(self.slots)


class AdaLoRA(LowRankAdapter):
    """K members of AdaLoRA."""

    method = "adalora"
    total_steps: int | None = None  # of the run, as last seen

    def make_site(self, name: str, module: nn.Module) -> nn.Module:
        ranks = self.site_ranks(name, self.settings.initial_rank)
        A, B = [], []
        for rank, seed in zip(ranks, self.seeds, strict=True):
            A.append(initialization.triplet(rank, module_in(module), initialization.generator(seed, name, "A")))
            B.append(initialization.triplet(rank, module_out(module), initialization.generator(seed, name, "B")).mT)
        return Triplets(name, module, (A, B), self.site_scales(name, ranks), self.settings.dropout, self.draw)

    def _insert(self, model: nn.Module, names: Sequence[str], head: Sequence[str]) -> None:
        super()._insert(model, names, head)
        self.loaded(total_steps=None)
        initial, target = self.totals()
        for start, end in zip(initial, target, strict=True):
            if end > start:
                self.detach()
                setting = "target_rank" if self.settings.target_total is None else "target_total"
                told = f"target_rank times {len(names)} sites is" if setting == "target_rank" else "target_total ="
                raise ValueError(
                    f"{told} {end}, above the {start} triplets that rank_pattern leaves: lower {setting} or raise the ranks"
                )
        self.importance = Sensitivity(self._tensors(), self.settings.beta1, self.settings.beta2).to(self.device)
        self._steps_driven = 0

    def loaded(self, total_steps: int | None) -> None:
        """Takes note that the tensors were set from outside, by a start or a file, which is no training."""
        self.total_steps = total_steps
        self._undriven_version = [t.E._version for t in self.triplets()]
        self._totals: tuple[list[int], list[int]] | None = None  # slots are what a file may change too

    def load_state_dict(self, *args, **kwargs):
        result = super().load_state_dict(*args, **kwargs)
        self.loaded(self.total_steps)
        return result

    def triplets(self) -> Sequence[Triplets]:
        """The sites' triplets, in site order."""
        return [site for _, site in self.named_sites()]

    def totals(self) -> tuple[list[int], list[int]]:
        """For each member, triplets at the start and at the end, over all sites."""
        if self._totals is None:
            initial = torch.stack([t.slots.sum(1) for t in self.triplets()]).sum(0).long().tolist()
            target = per_member(self.settings.target_rank, self.members, "target_rank")
            total = self.settings.target_total
            self._totals = initial, [rank * len(self.triplets()) if total is None else total for rank in target]
        return self._totals

    def penalty(self, step: Step) -> Tensor:
        """(K,): gamma R(P, Q), eq. (4); in the release's form the mean over all matrices of |M M^T - I|, not squared."""
        triplets = self.triplets()
        is_paper = self.settings.penalty_form == "paper"
        slots = [t.slots for t in triplets for _ in "AB"]
        total = Orthogonality.apply(is_paper, slots, *(m for t in triplets for m in (t.A, t.B.mT)))
        if not is_paper:
            total = total / len(slots)
        weight = per_member(self.settings.orthogonality, self.members, "orthogonality")
        return total * torch.tensor(weight, dtype=total.dtype, device=total.device)

    def begin(self, step: Step, micro_batch: int = 0, training: bool = True) -> None:
        super().begin(step, micro_batch, training)
        if training:
            self.total_steps = step.total
            check_phases(self.settings.warmup_steps, self.settings.final_steps, step.total)

    def budget(self, step: Step) -> Tensor:
        end = step.total - self.settings.final_steps
        pairs = zip(*self.totals(), strict=True)
        return torch.tensor([cubic_budget(step.index, self.settings.warmup_steps, end, b0, bT) for b0, bT in pairs])

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Scores the triplets; allocates every `interval` steps and at the start of the final phase; projects E.

        Raises:
            ValueError: no tensor has a gradient: called after zero_grad.
        """
        self.total_steps = step.total
        self._steps_driven += 1
        final = step.total - self.settings.final_steps
        if step.index < final:
            tensors = self._tensors()
            if all(tensor.grad is None for tensor in tensors):
                raise ValueError("after_step found no gradient: call it after optimizer.step() and before zero_grad()")
            counted = torch.ones(self.members, dtype=torch.bool) if step.taken is None else step.taken
            self.importance.update(tensors, counted.to(self.device))
            if step.index > self.settings.warmup_steps and step.index % self.settings.interval == 0:
                self._allocate(step)
        elif step.index == final:
            self._allocate(step)
        else:
            for triplets in self.triplets():
                triplets.project()

    def _allocate(self, step: Step) -> None:
        triplets = self.triplets()
        slots = torch.cat([t.slots for t in triplets], 1).bool()  # (K, S)
        kept = keep_top(torch.cat(self.triplet_scores(), 1), slots, self.budget(step))
        for t, keep in zip(triplets, kept.split([t.slots.shape[1] for t in triplets], 1), strict=True):
            t.kept.copy_(keep)
            t.project()

    def triplet_scores(self) -> list[Tensor]:
        """(K, R) of each site: s(E) + mean of s over the row of A + mean of s over the column of B, eq. (7)."""
        scores = self.importance.scores()
        return [E + A.mean(2) + B.mean(1) for A, B, E in zip(scores[::3], scores[1::3], scores[2::3], strict=True)]

    def ranks(self) -> dict[str, Tensor]:
        self.warn_if_undriven()
        return super().ranks()

    def warn_if_undriven(self) -> None:
        """Says so where the singular values moved but `after_step` was never called, so that nothing was allocated."""
        moved = [t.E._version for t in self.triplets()] != self._undriven_version
        if moved and not self._steps_driven:
            warnings.warn(
                "AdaLoRA was trained but after_step was never called, so no rank was pruned: call adapter.after_step(step) "
                "after optimizer.step() and before zero_grad()",
                stacklevel=3,
            )

    def _tensors(self) -> list[nn.Parameter]:
        return [p for t in self.triplets() for p in (t.A, t.B, t.E)]


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
            M = torch.stack([matrices[i] for i in indices]).flatten(0, 1)  # (G*K, R, F)
            gap = M @ M.mT
            gap.diagonal(dim1=1, dim2=2).sub_(torch.stack([slots[i] for i in indices]).flatten(0, 1))
            norms = torch.linalg.vector_norm(gap, dim=(1, 2))  # (G*K,)
            factor = 4.0 if is_paper else (2 / norms).masked_fill(norms == 0, 0.0)[:, None, None]
            gradients = (gap @ M).mul_(factor).unflatten(0, (len(indices), -1))
            for i, gradient in zip(indices, gradients.unbind(0), strict=True):
                ctx.gradients[i] = gradient
            total = total + (norms.square() if is_paper else norms).view(len(indices), -1).sum(0)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * g[:, None, None] for gradient in ctx.gradients)


def check_phases(warmup_steps: int, final_steps: int, total: int) -> None:
    """
    Raises:
        ValueError: no step is left between warm-up and final phase.
    """
    if warmup_steps + final_steps >= total:
        raise ValueError(
            f"warmup_steps = {warmup_steps} and final_steps = {final_steps} leave no step to prune in a run of {total}: "
            f"their sum must be below {total}"
        )
