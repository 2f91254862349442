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
from rankwise.variants.allocation.exchanging import ExchangingAdapter, Plan
from rankwise.variants.allocation.sites import Triplets
from rankwise.variants.lowrank.slots import NEW, Rearranged
from torch import nn


class ElaLoRA(ExchangingAdapter, AdaLoRA):
    """K members of ElaLoRA."""

    method = "elalora"
    peft_type = "LORA"

    def inserted(self) -> None:
        super().inserted()
        self._reset: list[tuple[nn.Parameter, Rearranged]] = []

    def _allocate(self, step: Step) -> None:
        if self.exchange(step) and self.settings.optimizer_reset == "release":
            self._forget_everything()

    def plans(self, step: Step) -> list[Plan] | None:
        number = self.number(step)
        if not number:
            return None
        scores, ranks = [score.tolist() for score in self.triplet_scores()], self.kept_ranks()
        plans = []
        for k, of_sites in enumerate(ranks):
            own_scores = [scores[s][k][:rank] for s, rank in enumerate(of_sites)]
            plans.append(self._plan(own_scores, number, self.totals()[0][k]))
        return plans

    def _plan(self, scores: Sequence[Sequence[float]], number: int, limit: int) -> Plan:
        """What one member exchanges, from the scores of its triplets."""
        candidates = []
        for s, (own, site) in enumerate(zip(scores, self.triplets(), strict=True)):
            weakest = sorted(range(len(own)), key=lambda j: own[j])
            spare = len(own) - max(self.site_bounds(site.name)[0], 1)
            candidates += [(own[j], s, j) for j in weakest[: max(min(self.settings.candidates, spare), 0)]]
        lowest = [(s, j) for _, s, j in sorted(candidates, key=lambda c: c[0])]
        highest = [s for _, s, _ in sorted(candidates, key=lambda c: -c[0])]
        return self.one_for_one(lowest, highest, [len(own) for own in scores], number, limit)

    def start_slot(self, site: Triplets, k: int, j: int, step: Step) -> None:
        """A new triplet is orthogonal to those before it, as far as they are orthonormal; its E is next to nothing."""
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
