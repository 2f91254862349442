"""Whether an adapter that is saved has reached the rank budget that its schedule ends with."""

from dataclasses import dataclass

from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.step import Step
from rankwise.variants.allocation.allocated import AllocatedAdapter
from rankwise.variants.truncated import Truncated
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
    settings = adapter.settings
    if isinstance(adapter, Truncated):
        goal = adapter.target()
    elif isinstance(adapter, AllocatedAdapter) and adapter.total_steps is not None:
        if settings.get("overshoot") or not getattr(adapter, "has_target", True):  # may end above it, or has none
            return None
        goal = adapter.cost_budget(Step(adapter.total_steps, adapter.total_steps))
    else:
        return None
    budget = int(goal[member])
    if settings.cost == "rank":
        has = sum(int(site.rank()[member]) for _, site in adapter.named_sites())
    else:
        has, budget = int(adapter.parameter_counts()["active"][member]), budget + fixed_parameters(adapter)
    return Excess(settings.cost, has, budget) if has > budget else None
