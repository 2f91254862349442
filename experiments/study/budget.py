"""What is equal among the methods of a study: ranks for a budget of parameters, steps for one of time, micro-batches for
one of memory.

Parameters: one rank more or less at every site is 5 % of a small adapter, so ranks are mixed.  Every site gets the same
whole rank, what is left of the budget goes in single ranks to sites spread evenly over the model, none where it would go
beyond: the shortfall is less than the cheapest rank left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from rankwise import variants
from rankwise.experiments.config import Entry, Training
from rankwise.variants.settings import FROM_BUDGET, method
from rankwise.variants.settings.lowrank import pattern_for

GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly however many are taken (Weyl)


@dataclass(frozen=True)
class SiteCost:
    """Parameters of one site: those of each rank, and those that it has at rank 0 (DoRA's magnitudes)."""

    each: int
    fixed: int


def site_costs(adapter: variants.Adapter) -> dict[str, SiteCost]:
    """What the sites of an attached adapter with K = 1 cost, by the sites' own count."""
    costs = {}
    for name, site in adapter.named_sites():
        if site.has_rank:
            none, one = (int(site.count(torch.tensor([rank]))) for rank in (0, 1))
            costs[name] = SiteCost(one - none, none)
    return costs


def ranks_for(costs: Mapping[str, SiteCost], parameters: int) -> dict[str, int]:
    """A rank for each site, as equal as the budget allows and never beyond it.

    Raises:
        ValueError: the budget does not give every site one rank; says what would.
    """
    left = parameters - sum(cost.fixed for cost in costs.values())
    whole = sum(cost.each for cost in costs.values())
    if left < whole:
        raise ValueError(
            f"a budget of {parameters:,} parameters does not give each of {len(costs)} sites one rank: that takes "
            f"{whole + parameters - left:,}; raise budget.parameters or take fewer targets"
        )
    ranks = dict.fromkeys(costs, left // whole)
    left %= whole
    spread = sorted(enumerate(costs), key=lambda pair: (pair[0] * GOLDEN) % 1)
    for _, name in spread:
        if costs[name].each <= left:
            ranks[name] += 1
            left -= costs[name].each
    return ranks


def solved(entry: Entry, adapter: variants.Adapter, parameters: int, scale: float) -> Entry:
    """The entry with the ranks that its budget gives, and alphas that make every site's scale alpha/r equal `scale`.

    What a budget means for a method, its settings say (`Settings.for_budget`).

    Raises:
        ValueError: a budget below one rank at every site, or a method without such a rule.
    """
    costs = site_costs(adapter)
    if not costs:
        return entry
    kind = method(entry.method).settings
    given = {k: v for k, v in entry.settings.items() if k not in kind.with_role("rank")}
    left = parameters - sum(cost.fixed for cost in costs.values())
    settings = kind.for_budget(given, ranks_for(costs, parameters), left, scale)
    return entry.model_copy(update={"settings": settings})


def taking(entry: Entry, ranks: Mapping[str, int], scales: Mapping[str, float]) -> Entry:
    """The entry with these ranks, 0 among them, and alphas that give every site its scale alpha/r.

    Raises:
        ValueError: no site has a rank.
    """
    if not any(ranks.values()):
        raise ValueError(f'{entry.label}: "{entry.ranks_of}" ended with no rank at any site, so there is nothing to train')
    budgeted = method(entry.method).settings.with_role(*FROM_BUDGET)
    settings = {k: v for k, v in entry.settings.items() if k not in budgeted}
    power = 1.0 if settings.get("scaling", "alpha/r") == "alpha/r" else 0.5
    alphas = {name: scales[name] * max(rank, 1) ** power for name, rank in ranks.items()}
    settings["rank"] = max(ranks.values())
    settings["alpha"] = max(alphas.values())
    for key, values, default in (("rank_pattern", ranks, "rank"), ("alpha_pattern", alphas, "alpha")):
        if others := _beside(values, settings[default]):
            settings[key] = others
    return entry.model_copy(update={"settings": settings})


def _beside(values: Mapping[str, float], default: float) -> dict[str, float]:
    """The values that are not the default, each by a pattern that matches its site alone."""
    return {pattern_for(name): value for name, value in values.items() if value != default}


def permuted(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], seed: int) -> dict[str, int]:
    """The ranks permuted among the sites of the same shape, so that the parameters stay as many; drawn by the seed."""
    random = np.random.default_rng([seed, *b"permuted"])
    found = dict(ranks)
    for shape in dict.fromkeys(shapes[name] for name in ranks):
        names = [name for name in ranks if shapes[name] == shape]
        for name, at in zip(names, random.permutation(len(names)), strict=True):
            found[name] = ranks[names[at]]
    return found


def steps_for_time(training: Training, rows: int, own_seconds: float, reference_seconds: float) -> Training:
    """The training with so many steps that it takes as long as the reference's, by the seconds that a step of each takes."""
    steps = max(1, round(training.total_steps(rows) * reference_seconds / own_seconds))
    epochs = -(-steps // training.steps_per_epoch(rows))
    return training.model_copy(update={"epochs": epochs, "max_steps": steps})
