"""How alike two allocations are, of two seeds of one setting or of two settings at one seed: over all sites, and within each
kind of module.

An allocator that gives every query much rank and every key little agrees with itself over seeds by that alone: Spearman's
correlation over all sites is then high, though no single layer is placed alike twice.  Within a kind of module (all queries,
all keys, ...) only the layers are compared.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from rankwise.reports.ranks.sites import module_labels
from rankwise.reports.results import Arm
from rankwise.reports.statistics import jaccard, spearman


@dataclass(frozen=True)
class SeedPair:
    """The ranks of two seeds of one setting, compared; a measure without a value is None."""

    spearman: float | None  # rank correlation over all sites
    spearman_within: float | None  # mean over the kinds of modules of the correlation over the sites of that kind
    jaccard_ranks: float | None  # sum of the smaller over sum of the greater rank of each site
    jaccard_sites: float | None  # the same of the sites that have any rank


def seed_pairs(arm: Arm) -> list[SeedPair]:
    """Every pair of seeds, compared.

    Empty where there is one seed, or where every seed has the same rank at all sites, so that there is nothing to compare.
    """
    allocations = [result.ranks for result in arm.completed if result.ranks]
    if all(len(set(ranks.values())) == 1 for ranks in allocations):
        return []
    return [_compare(one, other) for one, other in itertools.combinations(allocations, 2)]


def setting_pairs(ours: Arm, other: Arm) -> list[SeedPair]:
    """The allocations of two settings at every seed that both have finished, compared.

    Where they are as alike as two seeds of each setting are, what tells the settings apart does not move rank: an allocation
    that forgets the rank at which it started, say.
    """
    allocations = [{result.seed: result.ranks for result in arm.completed if result.ranks} for arm in (ours, other)]
    return [_compare(allocations[0][seed], allocations[1][seed]) for seed in sorted(allocations[0].keys() & allocations[1])]


def _compare(one: Mapping[str, int], other: Mapping[str, int]) -> SeedPair:
    kept = [{site: int(rank > 0) for site, rank in ranks.items()} for ranks in (one, other)]
    sites = [site for site in one if site in other]
    return SeedPair(_correlation(one, other, sites), correlation_within(one, other), jaccard(one, other), jaccard(*kept))


def correlation_within(one: Mapping[str, int], other: Mapping[str, int]) -> float | None:
    """Mean over the kinds of modules of Spearman's correlation over the sites of that kind.

    A kind of fewer than three sites, or of one rank everywhere in either allocation, has no correlation and is left out; None
    where no kind has one.
    """
    labels = module_labels(site for site in one if site in other)
    by_kind = {kind: [site for site in labels if labels[site] == kind] for kind in dict.fromkeys(labels.values())}
    correlations = [_correlation(one, other, sites) for sites in by_kind.values()]
    known = [value for value in correlations if value is not None]
    return float(np.mean(known)) if known else None


def _correlation(one: Mapping[str, int], other: Mapping[str, int], sites: list[str]) -> float | None:
    return spearman([one[site] for site in sites], [other[site] for site in sites])
