"""How alike the allocations of two seeds of one setting are."""

import itertools

from rankwise.reports.results import Arm
from rankwise.reports.statistics import jaccard, spearman


def seed_pairs(arm: Arm) -> list[tuple[float | None, float | None, float | None]]:
    """For each pair of seeds Spearman's correlation of their ranks, and Jaccard's overlap of ranks and of the sites kept.

    Empty where there is one seed, or where every seed has one rank everywhere, so that there is nothing to be alike.
    """
    ranks = [result.ranks for result in arm.completed if result.ranks]
    if all(len(set(one.values())) == 1 for one in ranks):
        return []
    found = []
    for one, other in itertools.combinations(ranks, 2):
        sites = [site for site in one if site in other]
        kept = [{site: int(rank > 0) for site, rank in ranks.items()} for ranks in (one, other)]
        correlation = spearman([one[site] for site in sites], [other[site] for site in sites])
        found.append((correlation, jaccard(one, other), jaccard(*kept)))
    return found
