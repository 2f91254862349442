"""Whether an adapter that is saved has reached the rank budget that its schedule ends with."""

from dataclasses import dataclass

from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.lowrank.adapter import LowRankAdapter
from rankwise.variants.weights.truncation import fixed_parameters


@dataclass(frozen=True)
class Excess:
    """What an adapter has, and the smaller budget that its schedule ends with, in `unit`: "rank" or "parameters"."""

    unit: str
    has: int
    budget: int


def excess(adapter: Adapter, member: int) -> Excess | None:
    """How far one member is above its final budget: training ended early.  None where it is not, or has none.

    An allocator that was never driven does not know its schedule, and is above nothing.
    """
    goal = adapter.final_budget() if isinstance(adapter, LowRankAdapter) else None
    if goal is None:
        return None
    settings, budget = adapter.settings, int(goal[member])
    if settings.cost == "rank":
        has = sum(int(site.rank()[member]) for _, site in adapter.named_sites())
    else:
        has, budget = int(adapter.parameter_counts()["active"][member]), budget + fixed_parameters(adapter)
    return Excess(settings.cost, has, budget) if has > budget else None
