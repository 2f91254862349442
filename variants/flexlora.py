"""FlexLoRA: ranks go from matrices whose energy lies in few directions to those where it is spread; the total stays.

    y = W x + s B diag(E) A x + b        s = alpha / initial_rank
    H_i = -sum_j p_ij log(p_ij + 1e-8) / log r_i        p_ij = E_ij^2 / sum_j E_ij^2

A (K, R, I), B (K, O, R) ~ N(0, 0.02^2), E (K, R) = 0.  An exchange of b(t) ranks: of the matrices with more than one rank the
b of lowest H lose their weakest triplet, the b of highest H gain one, with a row of A and a column of B ~ N(0, added_std^2)
and E = 0, so that the output stays.  b(t) = round(exchange (1 - p^3)), p the progress from warm-up to final phase, every
`interval` steps after the warm-up.  A matrix may be among both.  Penalty: AdaLoRA's.  Liu, Si & Jia 2026 (arXiv 2601.22905);
read in the release, Chongjie-Si/Subspace-Tuning loralib/loralib/flexlora.py.

Departures: the weakest triplet is that of the least |E|, where the release takes the least E, so the most negative singular
value (weakest = "signed"); H is 0/0 at rank 1 and where all E are zero, which counts as the lowest, where the release's NaN
counts as the highest and lets such matrices grow each time (undefined_entropy = "highest"); the optimizer's averages of the
other triplets go on; exactly as many ranks are added as cut, ties in site order, or, with cost = "parameters", as many as the
parameters of the start pay for, at most one a matrix; s lacks the release's + 1e-5.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from rankwise.variants.adalora import AdaLoRA
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.step import Step
from rankwise.variants.allocation.exchanging import ExchangingAdapter, Plan
from rankwise.variants.allocation.scores import Score
from rankwise.variants.allocation.sites import Triplets
from torch import Tensor, nn


class SpectralEntropy(Score):
    """H of each matrix, from 0 (one direction holds all energy) to 1 (all hold as much); the same for all of its slots."""

    EPSILON = 1e-8  # the release's, in the logarithm

    def of_sites(self, sites: Sequence[nn.Module]) -> Float[Tensor, "K S"]:
        """NaN where it is not defined."""
        return torch.stack([self._of_site(site) for site in sites], 1)

    def _of_site(self, site: nn.Module) -> Float[Tensor, " K"]:
        energy = (site.E.detach().double() * site.slots).square()  # (K, R)
        p = energy / energy.sum(1, keepdim=True)
        ranks = site.rank().double()
        return -(p * (p + self.EPSILON).log() * site.slots).sum(1) / ranks.log()

    def of_slots(self, sites: Sequence[nn.Module]) -> list[Tensor]:
        known = self.of_sites(sites).nan_to_num(0.0, 0.0, 0.0)
        return [H[:, None].to(site.slots).expand_as(site.slots) for site, H in zip(sites, known.unbind(1), strict=True)]


class FlexLoRA(ExchangingAdapter, AdaLoRA):
    """K members of FlexLoRA."""

    method = "flexlora"
    peft_type = "LORA"
    scores = {"spectral-entropy": SpectralEntropy}

    def plans(self, step: Step) -> list[Plan] | None:
        number = self.number(step)
        if not number:
            return None
        entropies, ranks = self.entropies(), self.kept_ranks()
        return [
            self._plan(k, *member, number, self.totals()[0][k]) for k, member in enumerate(zip(entropies, ranks, strict=True))
        ]

    def entropies(self) -> list[list[float]]:
        """For each member H of each matrix; those that are not defined below or above all others, as the settings say."""
        H = self.score.of_sites(self.triplets())
        beyond = -1.0 if self.settings.undefined_entropy == "lowest" else 2.0
        return torch.where(H.isfinite(), H, beyond).tolist()

    def _plan(self, k: int, entropies: Sequence[float], ranks: Sequence[int], number: int, limit: int) -> Plan:
        """What member k exchanges."""
        rising = sorted(range(len(ranks)), key=lambda s: entropies[s])
        sites = self.triplets()
        can_lose = [s for s in rising if ranks[s] > max(self.site_bounds(sites[s].name)[0], 1)]
        lowest = [(s, self._weakest(sites[s].E[k, : ranks[s]])) for s in can_lose]
        highest = sorted(range(len(ranks)), key=lambda s: -entropies[s])
        # Of parameters there may be more, as a rank of the matrices that gain can cost less.
        growing = highest[:number] if self.settings.cost == "rank" else highest
        return self.one_for_one(lowest, growing, ranks, number, limit)

    def _weakest(self, E: Float[Tensor, " R"]) -> int:
        return int((E.abs() if self.settings.weakest == "magnitude" else E).argmin())

    def start_slot(self, site: Triplets, k: int, j: int, step: Step) -> None:
        """A and B at random, E at zero: the output stays."""
        for matrix, part in ((site.A[k], "A"), (site.B[k].mT, "B")):  # (R, F)
            random = initialization.generator(self.seeds[k], site.name, part, f"step {step.index}, slot {j}")
            matrix[j] = self.settings.added_std * torch.empty(matrix.shape[1]).normal_(generator=random).to(matrix)
