"""WeightLoRA: a weight for each site, of which all but a few are set to zero while it trains.

    y = W x + w s B A x + b             s = alpha / rank at the start
    w <- w - eta dL/dw                  eta = site_lr times the schedule's factor: plain gradient descent
    w <- P_k(w)                         the k weights that are largest in size stay, the others become 0, every `interval` steps

w (K, 1) of each site starts at 1, A and B as LoRA's.  What is zero still has a gradient, <G, s B A> with G = dL/dW, and may
come back at a later projection; nothing is projected while no weight of a member has a gradient (at the start, B = 0).  After
step T - final_steps the choice is final.  Veprikov et al. 2025 (arXiv 2506.02724); read in the release, brain-mmo-lab/WLoRA,
src/optimizers.py (WeightAdamW, FatAdamW) and peft/src/peft/tuners/weight_lora/layer.py.

WeightLoRA+ (`growth`): the projection comes `doublings` times and halves the sites, those dropped leave the tensors, and each
that stays doubles its rank: A' = [A1; A2], B' = [B1, 0].  Its averages start anew, and the weights rest after the last one.

    smart      A1 = Q^T and B1 = B R^T, where A^T = Q R, so that B A stays; the rows of A2 are orthonormal, and orthogonal to Q
    dummy      A1 = A, B1 = B, A2 drawn as at the start
    restart    A1 and A2 drawn as at the start, B1 = 0

Departures: kept_by = "release" is the release's projection, of the signed w; there A2 is of uniform draws, under "smart" made
orthogonal to Q and left sqrt(in/3) times as long as Q's rows.  A rank is doubled as far as there are orthogonal rows.
"""

from collections.abc import Sequence

import torch
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.step import Step
from rankwise.variants.allocation.choice import keep_top
from rankwise.variants.allocation.sites import Doublets
from rankwise.variants.lora import LoRA
from rankwise.variants.lowrank.slots import NEW, NONE
from rankwise.variants.settings import per_member
from torch import Tensor, nn

STILL = 1e-10  # a norm of all weights' gradients at which none is told from another: the release


class Weighted(Doublets):
    """LoRA's factors with a trained weight on the whole update."""

    has_coefficients = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.w = nn.Parameter(self.scale.new_ones(len(self.scale), 1))

    def coefficients(self) -> Tensor:
        return self.w * (self.slots * self.scale[:, None])

    def live(self) -> Tensor:
        """(K,) slots of a site whose weight is not zero."""
        return self.physical() * (self.w[:, 0] != 0)

    def as_triplets(self, member: int) -> tuple[Tensor, Tensor, Tensor]:
        slots = self.slots[member].bool()
        return self.A[member][slots], self.B[member][:, slots], self.w[member].expand(int(slots.sum()))

    @torch.no_grad()
    def put(self, member: int, places: Tensor, U: Tensor, value: Tensor, Vt: Tensor) -> None:
        self.w[member] = 1
        self.A[member], self.B[member] = 0, 0
        self.A[member, places] = (Vt * value.sqrt()[:, None]).to(self.A)
        self.B[member, :, places] = (U * value.sqrt()).to(self.B)

    @torch.no_grad()
    def put_coefficients(self, member: int, places: Tensor, values: Tensor) -> None:
        """One weight, which all slots have."""
        self.w[member] = values[0].to(self.w) if len(values) else 0

    def count(self, ranks: Tensor) -> Tensor:
        """(K,) parameters of so many slots, and the weight."""
        return super().count(ranks) + 1


class WeightLoRA(LoRA):
    """K members of WeightLoRA."""

    method = "weightlora"
    _gradients: list[Tensor] | None = None  # dL/dw (K,) of each site, of the step that is being taken

    def make_low_rank(self, name: str, module: nn.Module) -> Weighted:
        return Weighted(name, module, *self.start(name, module))

    def inserted(self) -> None:
        """
        Raises:
            ValueError: more sites to keep than there are, or none left by halving.
        """
        number = len(self.sites)
        for kept in per_member(self.settings.kept_sites, self.members, "kept_sites"):
            if kept is not None and kept > number:
                raise ValueError(f"kept_sites = {kept} of {number} sites: give at most {number}")
        if self.settings.growth != "none" and number >> self.settings.doublings < 1:
            raise ValueError(f"doublings = {self.settings.doublings} leave none of {number} sites: lower it")

    def loaded(self, total_steps: int | None) -> None:
        self.total_steps = total_steps

    # -- the calendar --------------------------------------------------------------------------------------------------

    def kept_sites(self, index: int) -> list[int]:
        """How many sites of each member the projection after this step keeps."""
        number, settings = len(self.sites), self.settings
        if settings.growth == "none":
            kept = per_member(settings.kept_sites, self.members, "kept_sites")
            return [max(number // 2, 1) if k is None else k for k in kept]
        return [number >> min(index // settings.steps_between, settings.doublings)] * self.members

    def is_projected(self, step: Step) -> bool:
        settings = self.settings
        if settings.growth != "none":
            return step.index % settings.steps_between == 0 and step.index <= settings.steps_between * settings.doublings
        final = step.total - settings.final_steps
        return step.index == final or (step.index < final and step.index % settings.steps_between == 0)

    def are_weights_moving(self, step: Step) -> bool:
        """Whether weights are trained in this step; after the final projection only those that are not zero."""
        settings = self.settings
        return settings.growth == "none" or step.index <= settings.steps_between * settings.doublings

    # -- the step --------------------------------------------------------------------------------------------------------

    def begin(self, step: Step, micro_batch: int = 0, training: bool = True) -> None:
        """
        Raises:
            ValueError: a run that ends before the last projection.
        """
        super().begin(step, micro_batch, training)
        settings = self.settings
        if training and settings.growth != "none" and settings.steps_between * settings.doublings > step.total:
            raise ValueError(
                f"doublings = {settings.doublings} every {settings.steps_between} steps do not fit into a run of {step.total}: "
                f"lower interval"
            )
        if training and settings.final_steps >= step.total:
            raise ValueError(f"final_steps = {settings.final_steps} leaves no step of a run of {step.total}: lower it")

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        """Keeps the weights' gradients for `after_step`: the optimizer does not move them."""
        self._gradients = []
        for site in self.low_rank_sites():
            gradient = site.w.new_zeros(self.members) if site.w.grad is None else site.w.grad[:, 0].clone()
            self._gradients.append(gradient)
            site.w.grad = None

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Moves the weights, and projects them where it is time to.

        Raises:
            ValueError: before_step was not called.
        """
        if self._gradients is None:
            raise ValueError("after_step without before_step: call adapter.before_step(step) before optimizer.step()")
        sites, gradients = self.low_rank_sites(), torch.stack(self._gradients, 1)  # (K, S)
        taken = torch.ones(self.members, dtype=torch.bool) if step.taken is None else step.taken
        if self.are_weights_moving(step):
            moves = torch.where(taken.to(gradients.device)[:, None], gradients, 0.0) * (self.settings.site_lr * step.factor)
            for site, move in zip(sites, moves.unbind(1), strict=True):
                is_final = self.settings.growth == "none" and step.index > step.total - self.settings.final_steps
                site.w[:, 0] -= move * site.kept.any(1) if is_final else move
        if self.is_projected(step):
            self._project(step, gradients)
        self._gradients = None
        super().after_step(step)

    def _project(self, step: Step, gradients: Tensor) -> None:
        sites, settings = self.low_rank_sites(), self.settings
        weights = torch.cat([site.w for site in sites], 1)  # (K, S)
        exists = torch.stack([site.slots.any(1) for site in sites], 1)
        score = weights.abs() if settings.kept_by == "size" else weights
        chosen = keep_top(score, exists, torch.tensor(self.kept_sites(step.index)))
        if settings.growth != "none" and settings.kept_by == "release":
            chosen &= weights > 0
        # Before any weight has moved all are alike.  The last projection cannot wait.
        is_last = settings.growth != "none" or step.index == step.total - settings.final_steps
        if not is_last:
            chosen |= (gradients.norm(dim=1) <= STILL)[:, None] & exists
        for site, stays in zip(sites, chosen.unbind(1), strict=True):
            site.w *= stays[:, None]
            site.kept.copy_(site.slots.bool() & stays[:, None])
        if settings.growth != "none":
            self._grow(step, chosen.tolist())

    def _grow(self, step: Step, chosen: Sequence[Sequence[bool]]) -> None:
        """Sites that were dropped leave the tensors, and the others double their rank."""
        sites, places, sizes = self.low_rank_sites(), [], []
        for s, site in enumerate(sites):
            old = site.physical().tolist()
            most = min(site.A.shape[2], site.B.shape[1])
            new = [max(r, min(2 * r, most)) if chosen[k][s] else 0 for k, r in enumerate(old)]
            rows = [[*range(min(r, n)), *[NEW] * (n - r), *[NONE] * (max(new) - n)] for r, n in zip(old, new, strict=True)]
            places.append(torch.tensor(rows, dtype=torch.long, device=site.slots.device).view(len(rows), max(new)))
            sizes.append(list(zip(old, new, strict=True)))
        self.resize(places)
        for site, of_members in zip(sites, sizes, strict=True):
            for k, (r, n) in enumerate(of_members):
                if n > r:
                    site.slots[k, r:n], site.kept[k, r:n] = 1, True
                    self._start_anew(site, k, r, n, step)
            site.forget(site.slots.bool())

    def _start_anew(self, site: Weighted, k: int, r: int, n: int, step: Step) -> None:
        """The factors of a site whose rank was r and becomes n."""
        growth = self.settings.growth
        random = initialization.generator(self.seeds[k], site.name, "A", f"step {step.index}")
        if growth == "smart" and bool(site.A[k, :r].isfinite().all()):
            Q, R = torch.linalg.qr(site.A[k, :r].mT.double())  # (I, r), (r, r)
            B = (site.B[k, :, :r].double() @ R.mT).to(site.B)
            if bool(B.isfinite().all()):  # that of a member that diverges overflows here, and grows as a dummy
                drawn = torch.empty(site.A.shape[2], n - r, dtype=torch.float64).normal_(generator=random)
                beyond = torch.linalg.qr(torch.cat([Q, drawn.to(Q)], 1)).Q[:, r:]
                site.B[k, :, :r], site.A[k, :n] = B, torch.cat([Q, beyond], 1).mT.to(site.A)
                return
        start = initialization.STARTS[self.settings.initialization]
        first = 0 if growth == "restart" else r
        site.A[k, first:n] = start(n - first, site.A.shape[2], random).to(site.A)
        site.B[k, :, first:n] = 0
