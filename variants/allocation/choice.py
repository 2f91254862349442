"""The exact choice of the slots to keep, within a budget and bounds.

Legend: K member, R rank slots of a site, S slots of all sites together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DIRECTIONS = ("prune", "grow", "both")


def protected(direction: str, scores: Float[Tensor, "K S"], kept: Bool[Tensor, "K S"], exchange: int) -> Bool[Tensor, "K S"]:
    """The slots that an allocation may not cut.

    prune: none, and a slot that was cut may come back.  grow: all that are kept.  both: all but the `exchange` weakest of
    each member, so that at most so many change places.
    """
    if direction == "prune":
        return torch.zeros_like(kept)
    if direction == "grow":
        return kept
    weakest = keep_top(-scores, kept, torch.full((len(kept),), exchange, device=kept.device))
    return kept & ~weakest


@dataclass(frozen=True)
class Bound:
    """Least and most rank of some slots together: those of a site, or of a group of sites."""

    name: str
    inside: tuple[int, ...]  # positions among the S slots
    least: int = 0
    most: int | None = None


def keep_top(scores: Float[Tensor, "K S"], slots: Bool[Tensor, "K S"], budget: Int[Tensor, " K"]) -> Bool[Tensor, "K S"]:
    """The `budget` slots of each member with the highest scores; of equal ones the first in site order.

    A slot that does not exist for a member is never kept.  Exactly `budget` slots are kept, or all where fewer exist.
    """
    order = scores.masked_fill(~slots, -torch.inf).argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return (place < budget.to(place.device)[:, None]) & slots


def choose(
    scores: Float[Tensor, "K S"],
    slots: Bool[Tensor, "K S"],
    budget: Int[Tensor, " K"],
    costs: Sequence[int] | None = None,
    bounds: Sequence[Bound] = (),
    must: Bool[Tensor, "K S"] | None = None,
) -> Bool[Tensor, "K S"]:
    """The slots to keep: those worth most for what they cost, within a budget and bounds.

    Args:
        budget: in ranks, or in the unit of `costs`.
        costs: of each slot; slots are then taken by score per cost.  A budget of costs is never exceeded, and falls short
            by less than the cheapest slot that was left out for its sake.
        bounds: least ranks are filled first, most ranks never exceeded.
        must: slots that stay whatever their score, as far as the budget goes.
    """
    if must is not None:
        scores = scores.masked_fill(must & slots, torch.inf)
    if costs is None and not any(bound.least or bound.most is not None for bound in bounds):
        return keep_top(scores, slots, budget)
    price = torch.ones(slots.shape[1]) if costs is None else torch.tensor(costs, dtype=torch.get_default_dtype())
    worth = (scores / price.to(scores)).masked_fill(~slots, -torch.inf)
    orders = worth.argsort(dim=1, descending=True, stable=True).tolist()
    exists, limits = slots.tolist(), budget.tolist()
    prices = [1] * slots.shape[1] if costs is None else list(costs)
    kept = [_fill([i for i in o if e[i]], limit, prices, bounds) for o, e, limit in zip(orders, exists, limits, strict=True)]
    result = torch.zeros_like(slots)
    for member, chosen in enumerate(kept):
        result[member, sorted(chosen)] = True
    return result


def _fill(order: Sequence[int], budget: int, prices: Sequence[int], bounds: Sequence[Bound]) -> set[int]:
    """One member's choice: slots in the order of their worth, first those that the least ranks ask for."""
    around: dict[int, list[int]] = {}  # slot -> the bounds it counts for
    for number, bound in enumerate(bounds):
        for slot in bound.inside:
            around.setdefault(slot, []).append(number)
    counts, chosen, left = [0] * len(bounds), set(), budget

    def take(slot: int) -> None:
        nonlocal left
        chosen.add(slot)
        left -= prices[slot]
        for number in around.get(slot, ()):
            counts[number] += 1

    def fits(slot: int) -> bool:
        full = (n for n in around.get(slot, ()) if bounds[n].most is not None and counts[n] >= bounds[n].most)
        return slot not in chosen and prices[slot] <= left and next(full, None) is None

    # Bounds of single sites come before those of groups, whose least ranks they may fill.
    for number in sorted(range(len(bounds)), key=lambda n: len(bounds[n].inside)):
        inside = set(bounds[number].inside)
        for slot in order:
            if counts[number] >= bounds[number].least:
                break
            if slot in inside and fits(slot):
                take(slot)
    for slot in order:
        if fits(slot):
            take(slot)
    return chosen
