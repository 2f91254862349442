"""What is equal among the methods of a study: ranks for a budget of parameters, steps for one of time, micro-batches for
one of memory.

Parameters: one rank more or less at every site is 5 % of a small adapter, so ranks are mixed.  Every site gets the same
whole rank, what is left of the budget goes in single ranks to sites spread evenly over the model, none where it would go
beyond: the shortfall is less than the cheapest rank left out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from rankwise import variants
from rankwise.experiments.config import TAKEN, UNSOLVED, Entry, Training
from rankwise.variants.settings import method

GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly however many are taken (Weyl)


@dataclass(frozen=True)
class SiteCost:
    """Parameters of one site: those of each rank, and those that it has at rank 0 (DoRA's magnitudes)."""

    each: int
    fixed: int


def site_costs(adapter: variants.Adapter) -> dict[str, SiteCost]:
    """What the sites of an attached adapter with K = 1 cost, by the sites' own count."""
    found = {}
    for name, site in adapter.named_sites():
        if hasattr(site, "rank"):
            none, one = (int(site.count(torch.tensor([rank]))) for rank in (0, 1))
            found[name] = SiteCost(one - none, none)
    return found


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

    A method that prunes starts at 1.5 times its ranks (AdaLoRA sec. 4.1: b(0) = 1.5 b(T)) and ends with as many; which
    sites keep them, and so how many parameters, is its own choice, unless its cost is one of parameters.  One that places
    ranks uniformly has nothing to prune, and starts with the ranks that it ends with, and so does one that keeps its
    total; one that grows starts at rank 1, and has the scale at the mean rank that it ends with; one that places ranks
    before training is told the budget, and the mean rank whose scale every site gets.
    """
    costs = site_costs(adapter)
    if not costs:
        return entry
    ranks = ranks_for(costs, parameters)
    settings = {k: v for k, v in entry.settings.items() if k not in UNSOLVED}
    kind = method(entry.method).settings
    fields = kind.model_fields
    direction = settings.get("direction", fields["direction"].default if "direction" in fields else None)
    total, left = sum(ranks.values()), parameters - sum(cost.fixed for cost in costs.values())
    mean = total / len(ranks)
    by_parameters = settings.get("cost", "rank") == "parameters"
    if "total_rank" in fields:  # ranks are placed once, before training
        starts = dict.fromkeys(ranks, round(mean))
        first = settings["rank"] = round(mean)
        settings |= {"total_parameters": left} if by_parameters else {"total_rank": total}
    elif "target_rank" in fields and direction == "both" and kind.GROWS:  # the total stays
        starts = ranks
        first = settings["initial_rank"] = min(ranks.values())
    elif "target_rank" in fields and direction == "grow":
        starts, first = dict.fromkeys(ranks, 1), 1
        settings |= {"initial_rank": 1, "target_rank": round(mean)}
        settings |= {"target_parameters": left} if by_parameters else {"target_total": total}
    elif "target_rank" in fields:
        starts = ranks if settings.get("score") == "uniform" else dict.fromkeys(ranks, ceil(1.5 * mean))
        first = min(starts.values())
        settings |= {"initial_rank": first, "target_rank": min(round(mean), first)}
        if by_parameters:
            settings["target_parameters"] = left
        elif total != settings["target_rank"] * len(ranks):
            settings["target_total"] = total
    else:
        starts = ranks
        first = settings["rank"] = min(ranks.values())
    others = {f"^{re.escape(name)}$": rank for name, rank in starts.items() if rank != first}
    if others:
        settings["rank_pattern"] = others
    power = 1.0 if settings.get("scaling", fields["scaling"].default) == "alpha/r" else 0.5
    # A site that takes slots as it grows has alpha over its rank of the moment; the mean one gets the scale in the end.
    base = round(mean) if direction == "grow" and kind.GROWS else min(starts.values())
    settings["alpha"] = scale * base**power
    if max(starts.values()) > min(starts.values()):
        settings["alpha_pattern"] = {f"^{re.escape(n)}$": scale * r**power for n, r in starts.items() if r != base}
    return entry.model_copy(update={"settings": settings})


def taking(entry: Entry, ranks: Mapping[str, int], scales: Mapping[str, float]) -> Entry:
    """The entry with these ranks, 0 among them, and alphas that give every site its scale alpha/r.

    Raises:
        ValueError: no site has a rank.
    """
    if not any(ranks.values()):
        raise ValueError(f'{entry.label}: "{entry.ranks_of}" ended with no rank at any site, so there is nothing to train')
    settings = {k: v for k, v in entry.settings.items() if k not in TAKEN}
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
    return {f"^{re.escape(name)}$": value for name, value in values.items() if value != default}


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
