"""Truncated: LoRA trained at initial_rank and cut after its last step, so that it is scored at the budget.

    dW = s B A = U diag(sigma) V^T        keep the largest sigma of all sites together, up to a budget

How the cut is made, its source and its departures stand in weights/truncation.py.  Evaluations before the last step see
every rank.
"""

import torch
from jaxtyping import Int
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.linears import module_in, module_out
from rankwise.variants.adapter.step import Step
from rankwise.variants.allocation.sites import Doublets
from rankwise.variants.lowrank.adapter import LowRankAdapter
from rankwise.variants.lowrank.site import LowRank
from rankwise.variants.settings import per_member
from rankwise.variants.weights.truncation import Spectrum, chosen_ranks, compared, low_rank_sites, site_bounds, slot_costs
from torch import Tensor, nn


class Truncated(LowRankAdapter):
    """K members of LoRA, each cut to its budget after the last step."""

    method = "truncated"
    budget_moves = -1

    def final_budget(self) -> Tensor:
        return self.target()

    def make_low_rank(self, name: str, module: nn.Module) -> LowRank:
        ranks = self.site_ranks(name, self.settings.initial_rank)
        start = initialization.STARTS[self.settings.initialization]
        draws = [initialization.generator(seed, name, "A") for seed in self.seeds]
        A = [start(r, module_in(module), random) for r, random in zip(ranks, draws, strict=True)]
        B = [torch.zeros(module_out(module), r) for r in ranks]
        return Doublets(name, module, (A, B), self.site_scales(name, ranks), self.settings.dropout, self.draw)

    def inserted(self) -> None:
        """
        Raises:
            ValueError: a target above what there is, or below what the least ranks take.
        """
        settings, (least, most) = self.settings, (self.settings.least_rank, self.settings.most_rank)
        costs = [1] * len(self.sites) if settings.cost == "rank" else slot_costs(self)
        unit = "ranks" if settings.cost == "rank" else "parameters"
        sites = list(self.nominal_ranks().values())
        for member, target in enumerate(self.target().tolist()):
            ranks = [int(site[member]) for site in sites]
            floor = sum(c * min(r, least) for c, r in zip(costs, ranks, strict=True))
            ceiling = sum(c * min(r, most or r) for c, r in zip(costs, ranks, strict=True))
            if target > ceiling:
                raise ValueError(
                    f"the target of {target} {unit} is above the {ceiling} to cut from: lower it or raise the ranks"
                )
            if target < floor:
                raise ValueError(
                    f"least_rank = {least} takes {floor} {unit} of a target of {target}: lower it or raise the target"
                )

    def target(self) -> Int[Tensor, " K"]:
        """What is left after the last step, over all sites: in ranks or, with cost = "parameters", in those of the ranks."""
        settings = self.settings
        whole = len(self.sites) if settings.cost == "rank" else sum(slot_costs(self))
        fixed = settings.target_total if settings.cost == "rank" else settings.target_parameters
        means = per_member(settings.target_rank, self.members, "target_rank")
        return torch.tensor([whole * mean if fixed is None else fixed for mean in means])

    def budget(self, step: Step) -> Tensor | None:
        if step.index < step.total:
            return sum(self.nominal_ranks().values()).cpu()
        return self.target() if self.settings.cost == "rank" else None

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Cuts after the last step."""
        if step.index == step.total:
            sites, settings = low_rank_sites(self), self.settings
            spectra = [Spectrum(site) for _, site in sites]
            comparable = compared(self, spectra, settings.normalisation)
            costs = None if settings.cost == "rank" else slot_costs(self)
            bounds = site_bounds(sites, settings.least_rank, settings.most_rank)
            ranks = chosen_ranks(comparable, spectra, self.target(), costs, bounds)
            for spectrum, rank in zip(spectra, ranks, strict=True):
                spectrum.cut(rank)
        super().after_step(step)
