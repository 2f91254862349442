"""SoRA: LoRA with a gate for each rank; a proximal step after the optimizer's sends gates to exactly zero.

    y = W x + s B (g * A x) + b         s = alpha / initial_rank, also after gates are zero
    g <- T_xi(g)     T_xi(v) = sign(v) max(|v| - xi, 0)     xi = eta_t lambda

Here g (K, R) is E, the coefficients of the slots, and starts at N(0, 1); A (K, R, I) starts by Kaiming and B (K, O, R) at
zero.  Ding et al. 2023 (arXiv 2311.11696); release: TsinghuaC3I/SoRA, src/lora.py, src/sparse_optimizer.py, src/trainer.py.
eta_t is the rate of the gates in force at the step, so a trainer has to say it (`Step.learning_rates`).  The step that comes
before is AdamW's, without decay of the gates, as in the release.

threshold = "release" is what the release does in place of T: values above tau lose tau, values below -tau gain it, then
whatever is inside (-tau, tau) becomes zero.  What was inside (-2 tau, 2 tau) so becomes zero, only +-tau itself stays, and tau
does not follow the rate.  `l1` adds the mean of all |g| to the loss, which the release does as well and the paper does not.

Departures: with a target the gates are cut to it by size at the start of the final steps, so that SoRA can be compared at an
equal budget (paper and release have none); a gate that is zero then is not revived, so fewer may be left.  In the final
steps neither threshold nor `l1` acts, and no gate comes back.  A lambda_schedule takes equal parts of one run, under its one
schedule of the rate (the release trains every further value for epochs of its own, at a rate that has reached zero).  Read in
a digest of paper and release: the form of the paper's threshold.
"""

import torch
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.step import Group, Step
from rankwise.variants.allocation.allocated import AllocatedAdapter
from rankwise.variants.allocation.choice import choose
from rankwise.variants.allocation.sites import Triplets, with_gates_apart
from rankwise.variants.lowrank.site import LowRank
from torch import Tensor, nn


class SoRA(AllocatedAdapter):
    """K members of SoRA."""

    method = "sora"
    form = "doublet"  # A and B start as LoRA's

    def make_low_rank(self, name: str, module: nn.Module) -> LowRank:
        site = self.make_allocated(name, module, Triplets)
        with torch.no_grad():
            for gates, slots, seed in zip(site.E, site.slots, self.seeds, strict=True):
                size = int(slots.sum())
                gates[:size] = torch.randn(size, generator=initialization.generator(seed, name, "E"))
        return site

    def parameter_groups(self) -> list[Group]:
        return with_gates_apart(super().parameter_groups(), self.triplets(), self.settings.gate_lr_ratio)

    def penalty(self, step: Step) -> Tensor:
        """(K,): l1 times the mean |g| over all slots of a member; none in the final steps."""
        if not self.settings.l1 or self._is_final(step):
            return super().penalty(step)
        sites = self.triplets()
        total = sum((site.E.abs() * site.slots).sum(1) for site in sites)
        return self.settings.l1 * total / sum(site.slots.sum(1) for site in sites)

    def budget(self, step: Step) -> Tensor | None:
        """None: how many gates are zero is not scheduled, and fewer than the target may be left."""
        return None

    # -- the step ----------------------------------------------------------------------------------------------------

    def after_step(self, step: Step) -> None:
        """Shrinks the gates; cuts them to the target, if there is one, when the final steps begin."""
        if not self._is_final(step):
            self._threshold(step)
        super().after_step(step)

    def _is_final(self, step: Step) -> bool:
        """Whether the ranks are fixed already."""
        return step.index > step.total - self.settings.final_steps

    @torch.no_grad()
    def _threshold(self, step: Step) -> None:
        """
        Raises:
            ValueError: the soft threshold follows the rate, and nobody said the rate.
        """
        weight = self.threshold_weight(step)
        if self.settings.threshold == "release":
            xi, shrink = torch.full((self.members,), weight, dtype=torch.float64, device=self.device), release_threshold
        elif step.learning_rates is None:
            raise ValueError(
                'threshold = "soft" is by the rate of each step: give Step(index, total, learning_rates=(K,) tensor), '
                'or set threshold = "release"'
            )
        else:
            xi, shrink = step.learning_rates.to(self.device) * self.settings.gate_lr_ratio * weight, soft_threshold
        if step.taken is not None:  # a member whose step did not count
            xi = xi * step.taken.to(xi)
        for site in self.triplets():
            site.E.copy_(shrink(site.E, xi.to(site.E)[:, None]))
            site.kept.copy_(site.E != 0)

    def threshold_weight(self, step: Step) -> float:
        """lambda, or tau, at a step."""
        settings = self.settings
        if not settings.lambda_schedule:
            return settings.tau if settings.threshold == "release" else settings.sparsity
        stages = settings.lambda_schedule
        last = step.total - settings.final_steps
        return stages[min((step.index - 1) * len(stages) // last, len(stages) - 1)]

    def is_due(self, step: Step) -> bool:
        """Never: until the final steps the threshold alone decides."""
        return False

    def _allocate(self, step: Step) -> None:
        """Keeps the largest gates that fit into the target, or, without one, those that are not zero."""
        sites = self.triplets()
        kept = torch.cat([site.E != 0 for site in sites], 1)  # (K, S)
        if self.has_target:
            kept = choose(torch.cat(self.triplet_scores(), 1), kept, self.cost_budget(step), self.costs())
        for site, keep in zip(sites, kept.split([site.slots.shape[1] for site in sites], 1), strict=True):
            site.kept.copy_(keep)
            site.project()

    @property
    def has_target(self) -> bool:
        settings = self.settings
        return any(v is not None for v in (settings.target_rank, settings.target_total, settings.target_parameters))

    def _check_budget(self, sites: int) -> None:
        if self.has_target:
            super()._check_budget(sites)

    def loaded(self, total_steps: int | None) -> None:
        self.project()  # a gate that was zero started anew
        super().loaded(total_steps)


def soft_threshold(values: Tensor, xi: Tensor) -> Tensor:
    """T_xi: every value moves to zero by xi, and stops there."""
    return values.sign() * (values.abs() - xi).clamp_min(0)


def release_threshold(values: Tensor, tau: Tensor) -> Tensor:
    """What the release's optimizer does: three assignments, one after the other."""
    values = torch.where(values > tau, values - tau, values)
    values = torch.where(values < -tau, values + tau, values)
    return torch.where(values.abs() < tau, 0.0, values)
