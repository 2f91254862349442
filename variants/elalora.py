"""ElaLoRA: ranks are cut where they matter least and added where even the weakest still matter; the total stays.

    y = W x + s B diag(E) A x + b        s = alpha / initial_rank

A (K, R, I), B (K, O, R) ~ N(0, 0.02^2), E (K, R) = 0, and AdaLoRA's score S of a triplet.  An exchange of b(t) ranks:

    1. of each site the k_i = min(candidates, rank - 1) lowest S are candidates
    2. the b lowest candidates are cut
    3. each of the b highest adds one rank to its own site
    4. a new row of A is (z - A^T A z) / (|.| + 1e-6) with z ~ N(0, I), a new column of B likewise, E = min(min |E|, 1e-13)

b(t) = round(exchange (1 - p^3)), p the progress from warm-up to final phase, every `interval` steps after the warm-up.  New
ranks have averages of zero, the optimizer's and the score's; those of the others go on.  Penalty: AdaLoRA's.  Chang et al.
2025 (arXiv 2504.00254); read in the release, HuandongChang/ElaLoRA loralib/loralib/elalora.py, NLU/src/transformers/trainer.py.

Departures: exactly b ranks are cut, ties in site order (the release cuts every tie); the release's new optimizer, which
forgets all averages, is optimizer_reset = "release" (its loss of weight decay and of the schedule is not repeated); s lacks
the release's + 1e-5; with cost = "parameters" what is added costs no more than the start did.
"""

from collections.abc import Sequence

import torch
from rankwise.variants.adalora import AdaLoRA
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.step import Step
from rankwise.variants.allocation.schedules import SCHEDULES
from rankwise.variants.allocation.sites import Triplets
from rankwise.variants.lowrank.slots import NEW, NONE, Rearranged
from torch import Tensor, nn


class ElaLoRA(AdaLoRA):
    """K members of ElaLoRA."""

    method = "elalora"
    peft_type = "LORA"
    budget_moves = 0

    def inserted(self) -> None:
        super().inserted()
        self._reset: list[tuple[nn.Parameter, Rearranged]] = []

    def totals(self) -> tuple[list[int], list[int]]:
        """For each member, what the ranks cost at the start, and so at the end."""
        if self._totals is None:
            prices = [1 if self.settings.cost == "rank" else self._price(site) for site in self.triplets()]
            ranks = [self.site_ranks(site.name, self.settings.initial_rank) for site in self.triplets()]
            total = [sum(p * r[k] for p, r in zip(prices, ranks, strict=True)) for k in range(self.members)]
            self._totals = total, list(total)
        return self._totals

    def cost_budget(self, step: Step) -> Tensor:
        return torch.tensor(self.totals()[0])

    def is_due(self, step: Step) -> bool:
        since = step.index - self.settings.warmup_steps
        return since > 0 and since % self.settings.interval == 0

    def exchanged(self, step: Step) -> int:
        """b(t): how many ranks change places after this step."""
        if self.settings.schedule == "steady":
            return self.settings.exchange
        start, end = self.settings.warmup_steps, step.total - self.settings.final_steps
        progress = min(max((step.index - start) / (end - start), 0.0), 1.0)
        return round(self.settings.exchange * SCHEDULES[self.settings.schedule](progress))

    def _allocate(self, step: Step) -> None:
        number = self.exchanged(step)
        if step.index >= step.total - self.settings.final_steps or not number:
            return
        sites, scores = self.triplets(), [score.tolist() for score in self.triplet_scores()]
        ranks = torch.stack([site.rank() for site in sites], 1).tolist()  # (K, S)
        plans = []
        for k in range(self.members):
            own_scores = [scores[s][k][: ranks[k][s]] for s in range(len(sites))]
            plans.append(self._plan(own_scores, number, self.totals()[0][k]))
        places, before = [], ranks
        for s, site in enumerate(sites):
            orders = []
            for k, (cut, added) in enumerate(plans):
                orders.append([*(j for j in range(before[k][s]) if (s, j) not in cut), *[NEW] * added[s]])
            size = max(len(order) for order in orders)
            padded = [order + [NONE] * (size - len(order)) for order in orders]
            places.append(torch.tensor(padded, device=site.slots.device))
        self.resize(places)
        for site, moved in zip(sites, places, strict=True):
            site.slots.copy_(moved != NONE)
            site.kept.copy_(moved != NONE)
            for k, j in (moved == NEW).nonzero().tolist():
                self._start(site, k, j, step)
        if self.settings.optimizer_reset == "release":
            self._forget_everything()

    def _plan(self, scores: Sequence[Sequence[float]], number: int, limit: int) -> tuple[set[tuple[int, int]], list[int]]:
        """What one member cuts, as (site, slot), and how many ranks it adds to each site, from the scores of its triplets."""
        bounds = [self.site_bounds(site.name) for site in self.triplets()]
        candidates = []
        for s, own in enumerate(scores):
            weakest = sorted(range(len(own)), key=lambda j: own[j])
            spare = len(own) - max(bounds[s][0], 1)
            candidates += [(own[j], s, j) for j in weakest[: max(min(self.settings.candidates, spare), 0)]]
        lowest = sorted(candidates, key=lambda c: c[0])
        highest = sorted(candidates, key=lambda c: -c[0])
        for b in range(min(number, len(candidates)), -1, -1):  # fewer where a most rank leaves no room for as many
            cut = {(s, j) for _, s, j in lowest[:b]}
            ranks = [len(own) - sum(at == s for at, _ in cut) for s, own in enumerate(scores)]
            added = self._added([s for _, s, _ in highest], ranks, b, limit, [most for _, most in bounds])
            if self.settings.cost == "parameters" or sum(added) == b:
                break
        return cut, added

    def _added(self, order: Sequence[int], ranks: Sequence[int], b: int, limit: int, mosts: Sequence[int | None]) -> list[int]:
        """One rank for the site of each candidate in turn: b of them, or what the parameters of the start pay for."""
        by_rank, added = self.settings.cost == "rank", [0] * len(ranks)
        prices = [1 if by_rank else self._price(site) for site in self.triplets()]
        left = b if by_rank else limit - sum(p * r for p, r in zip(prices, ranks, strict=True))
        for s in order:
            if prices[s] <= left and (mosts[s] is None or ranks[s] + added[s] < mosts[s]):
                added[s] += 1
                left -= prices[s]
        return added

    def _start(self, site: Triplets, k: int, j: int, step: Step) -> None:
        """Where a new triplet starts: orthogonal to those before it, as far as they are orthonormal; E next to nothing."""
        for matrix, part in ((site.A[k], "A"), (site.B[k].mT, "B")):  # (R, F)
            random = initialization.generator(self.seeds[k], site.name, part, f"step {step.index}, slot {j}")
            z, there = torch.empty(matrix.shape[1]).normal_(generator=random).to(matrix), matrix[:j]
            apart = z - there.mT @ (there @ z)
            apart = apart / (apart.norm() + 1e-6)
            matrix[j] = apart if bool(apart.isfinite().all()) else z  # rows of a member that diverges overflow here
        site.E[k, j] = site.E[k, :j].abs().min().clamp_max(1e-13)

    def _forget_everything(self) -> None:
        """Every average of the optimizer starts anew, the head's and magnitudes' too."""
        for site in self.triplets():
            site.forget(site.slots.bool())
        of_triplets = {id(p) for site in self.triplets() for p in site.factors()}
        for parameter in self.parameters():
            if id(parameter) not in of_triplets:
                size = parameter.shape[1]
                places = torch.full((self.members, size), NEW, device=parameter.device)
                self._reset.append((parameter, Rearranged(places, 1, size)))

    def take_changes(self) -> list[tuple[nn.Parameter, Rearranged]]:
        changes = super().take_changes() + self._reset
        self._reset = []
        return changes
