"""What the methods share whose total stays: ranks are cut at some sites, and as many are added at others.

A method says, for each member, what is cut and how many ranks each site gains (`plans`), and where a new rank starts
(`start_slot`).  Slots of a member lie without gaps: those that stay keep their order and their averages, new ones come behind
them with averages of zero, the optimizer's and the score's.  With cost = "parameters" what is added costs no more than the
start did.
"""

from collections.abc import Sequence

import torch
from rankwise.variants.adapter.step import Step
from rankwise.variants.allocation.allocated import AllocatedAdapter
from rankwise.variants.allocation.schedules import SCHEDULES
from rankwise.variants.allocation.sites import Triplets
from rankwise.variants.lowrank.slots import NEW, NONE
from torch import Tensor

Plan = tuple[set[tuple[int, int]], list[int]]  # what one member cuts, as (site, slot); ranks that each site gains


class ExchangingAdapter(AllocatedAdapter):
    """K members whose ranks change places, while their total stays."""

    budget_moves = 0

    def plans(self, step: Step) -> list[Plan] | None:
        """What each member exchanges after this step; None where nobody does."""
        raise NotImplementedError

    def start_slot(self, site: Triplets, k: int, j: int, step: Step) -> None:
        """Where a new rank of member k starts, in slot j of a site; slots before it are filled."""
        raise NotImplementedError

    # -- the budget ------------------------------------------------------------------------------------------------

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
        since = step.index - self.rule.warmup_steps
        return since > 0 and since % self.settings.interval == 0

    # -- the exchange ----------------------------------------------------------------------------------------------

    def number(self, step: Step) -> int:
        """b(t): how many ranks change places after this step, by settings with a `schedule` of `exchange`."""
        settings = self.settings
        end = step.total - settings.final_steps
        return exchanged(settings.schedule, settings.exchange, step.index, settings.warmup_steps, end)

    def _allocate(self, step: Step) -> None:
        self.exchange(step)

    @torch.no_grad()
    def exchange(self, step: Step) -> bool:
        """Carries out the plans of this step; whether there were any.  In the final phase ranks are fixed."""
        plans = None if step.index >= step.total - self.settings.final_steps else self.plans(step)
        if plans is None:
            return False
        sites, before = self.triplets(), self.kept_ranks()
        places = []
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
                self.start_slot(site, k, j, step)
        return True

    def kept_ranks(self) -> list[list[int]]:
        """For each member the rank of each site."""
        return torch.stack([site.rank() for site in self.triplets()], 1).tolist()

    def one_for_one(
        self, lowest: Sequence[tuple[int, int]], growing: Sequence[int], ranks: Sequence[int], number: int, limit: int
    ) -> Plan:
        """The first `number` of `lowest`, (site, slot), are cut; the first sites of `growing` get one rank each.

        Fewer change places where a most rank leaves no room for as many.
        """
        for b in range(min(number, len(lowest)), -1, -1):
            cut = set(lowest[:b])
            left = [rank - sum(at == s for at, _ in cut) for s, rank in enumerate(ranks)]
            added = self.added(growing, left, b, limit)
            if self.settings.cost == "parameters" or sum(added) == b:
                break
        return cut, added

    def added(self, order: Sequence[int], ranks: Sequence[int], b: int, limit: int) -> list[int]:
        """One rank for each site of the order in turn: b of them, or what the parameters of the start pay for."""
        by_rank, added = self.settings.cost == "rank", [0] * len(ranks)
        mosts = [self.site_bounds(site.name)[1] for site in self.triplets()]
        prices = [1 if by_rank else self._price(site) for site in self.triplets()]
        left = b if by_rank else limit - sum(p * r for p, r in zip(prices, ranks, strict=True))
        for s in order:
            if prices[s] <= left and (mosts[s] is None or ranks[s] + added[s] < mosts[s]):
                added[s] += 1
                left -= prices[s]
        return added


def exchanged(schedule: str, exchange: int, index: int, start: int, end: int) -> int:
    """b(t): how many ranks change places after step `index`, from `exchange` down to none; "steady" always as many."""
    if schedule == "steady":
        return exchange
    progress = min(max((index - start) / (end - start), 0.0), 1.0)
    return round(exchange * SCHEDULES[schedule](progress))
