"""Truncation after training: every site's update is decomposed, and one threshold over all sites says what stays.

    dW = s B diag(e) A = U diag(sigma) V^T        keep the largest sigma of all sites together, up to a budget

U (K, O, R), sigma (K, R), V^T (K, R, I), thin: B = Q_B R_B and A^T = Q_A R_A (QR), then the SVD of the core R_B diag(s e) R_A^T
(R, R), in float64.  Of all updates with that many ranks in all, this one is nearest to the trained one (Eckart & Young 1936, in
the Frobenius norm, over the block diagonal of the sites).  A budget of parameters is filled by sigma^2 for each parameter.

Inspired by PARA (arXiv 2604.27796), which truncates a trained LoRA by one global threshold; how it normalises singular values
between layers is not published with it, so nothing here bears its name, and the normalisation is a setting (NORMALISATIONS).
Where a site has magnitudes (DoRA) its direction is truncated, and the magnitudes stay.

The method that trains and then cuts is variants/truncated.py.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.linears import weight_of
from rankwise.variants.allocation.choice import Bound, choose
from rankwise.variants.lowrank.site import LowRank
from rankwise.variants.settings import NORMALISATIONS, nearest, per_member
from torch import Tensor

# sigma (K, R) of a site and |W| of its weight -> what is compared between sites
NORMALISED: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda sigma, weight: sigma,  # the nearest update of that total rank
    "site-share": lambda sigma, weight: _over(sigma, sigma.norm(dim=1, keepdim=True)),  # sigma^2 as a share of |dW|^2
    "site-largest": lambda sigma, weight: _over(sigma, sigma[:, :1]),  # each site's largest is 1
    "weight": lambda sigma, weight: sigma / weight if weight else torch.zeros_like(sigma),  # relative to |W|
}
assert set(NORMALISED) == set(NORMALISATIONS)


def truncate(
    adapter: Adapter,
    *,
    total_rank: int | list[int] | None = None,
    total_parameters: int | list[int] | None = None,
    energy: float | list[float] | None = None,
    least_rank: int = 0,
    most_rank: int | None = None,
    normalisation: str = "none",
) -> None:
    """Cuts an attached low-rank adapter in place to one budget, each member by its own threshold.

    What was cut is zero, and its slots do not exist any more (or are not kept, where the method has that mask).  The
    factors change their basis, so an optimizer's averages mean nothing afterwards: truncate after training.

    Args:
        total_rank: ranks of all sites together; one number, or one for each member.
        total_parameters: active parameters, as `parameter_counts` counts them: magnitudes in, the head out.
        energy: share of the sum of all squared (normalised) singular values to keep, above 0, at most 1.
        least_rank, most_rank: of every site; the least comes before the threshold.
        normalisation: a key of NORMALISATIONS.

    Raises:
        ValueError: no budget or several; one that cannot be met; no low-rank sites; merged; a member that diverged.
    """
    sites = low_rank_sites(adapter)
    if adapter.is_merged:
        raise ValueError(f"{adapter.method} is merged: call unmerge() before truncate()")
    given = {"total_rank": total_rank, "total_parameters": total_parameters, "energy": energy}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(
            f"{' and '.join(named) or 'no budget'} given: truncate takes one of total_rank, total_parameters, energy"
        )
    budget = per_member(given[named[0]], adapter.members, named[0])
    if normalisation not in NORMALISATIONS:
        known = ", ".join(NORMALISATIONS)
        raise ValueError(f'normalisation = "{normalisation}"{nearest(normalisation, NORMALISATIONS)}; there are: {known}')
    if least_rank < 0 or (most_rank is not None and most_rank < max(least_rank, 1)):
        raise ValueError(
            f"least_rank = {least_rank}, most_rank = {most_rank}: give 0 <= least_rank <= most_rank, most_rank >= 1"
        )
    spectra = [Spectrum(site) for _, site in sites]
    for member, healthy in enumerate(finite(spectra).tolist()):
        if not healthy:
            raise ValueError(f"member {member} has factors that are not finite: it diverged and cannot be truncated")
    most = [s.ranks if most_rank is None else s.ranks.clamp_max(most_rank) for s in spectra]
    least = [s.ranks.clamp_max(least_rank) for s in spectra]
    for member in range(adapter.members):
        _check_budget(adapter, named[0], budget[member], member, *([int(r[member]) for r in rs] for rs in (least, most)))
    comparable = compared(adapter, spectra, normalisation)
    bounds = site_bounds(sites, least_rank, most_rank)
    if energy is not None:
        ranks = _by_energy(comparable, spectra, torch.tensor(budget, dtype=torch.float64), bounds)
    else:
        costs = None if total_rank is not None else slot_costs(adapter)
        limit = torch.tensor(budget) - (0 if total_rank is not None else fixed_parameters(adapter))
        ranks = chosen_ranks(comparable, spectra, limit, costs, bounds)
    for spectrum, rank in zip(spectra, ranks, strict=True):
        spectrum.cut(rank)
    adapter.loaded(adapter.total_steps)


class Spectrum:
    """The thin SVD of one site's update, and the way back into its factors."""

    @torch.no_grad()
    def __init__(self, site: LowRank):
        self.site = site
        A, B, coefficients = (t.detach().cpu().double() for t in site.matrices())
        B = B * coefficients[:, None]
        self.finite: Bool[Tensor, " K"] = A.flatten(1).isfinite().all(1) & B.flatten(1).isfinite().all(1)
        A, B = A.nan_to_num(0.0, 0.0, 0.0), B.nan_to_num(0.0, 0.0, 0.0)
        Q_B, R_B = torch.linalg.qr(B)  # (K, O, M), (K, M, R) with M = min(O, R)
        Q_A, R_A = torch.linalg.qr(A.mT)
        U, sigma, Vt = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
        self.U, self.Vt = Q_B @ U, Vt @ Q_A.mT  # (K, O, M), (K, M, I)
        self.sigma: Float[Tensor, "K M"] = sigma
        # As many as the member has ranks: kept ones, or those that act where more do (between two projections of AdaLoRA).
        ranks = torch.maximum(site.rank(), site.live()).cpu().long()
        self.ranks: Int[Tensor, " K"] = ranks.clamp_max(sigma.shape[1])

    @property
    def exists(self) -> Bool[Tensor, "K M"]:
        return torch.arange(self.sigma.shape[1]) < self.ranks[:, None]

    @torch.no_grad()
    def cut(self, ranks: Int[Tensor, " K"]) -> None:
        """Writes the `ranks` largest back, in the first slots of each member; a member that is not finite stays as it is."""
        site = self.site
        mask = site.kept if site.is_allocated else site.slots
        scale = site.scale.detach().cpu().double()
        for k, rank in enumerate(ranks.tolist()):
            if not self.finite[k]:
                continue
            places = site.slots[k].nonzero()[:rank, 0]
            site.put(k, places, self.U[k, :, :rank], self.sigma[k, :rank] / scale[k], self.Vt[k, :rank])
            mask[k] = 0
            mask[k, places] = 1


def low_rank_sites(adapter: Adapter) -> list[tuple[str, LowRank]]:
    """(name, the low-rank site, also that inside a magnitude).

    Raises:
        ValueError: the method has none, or they are no product of factors of its own.
    """
    sites = [(name, site.low_rank) for name, site in adapter.named_sites()]
    if not sites or any(site is None for _, site in sites):
        raise ValueError(f"{adapter.method} has no low-rank update to truncate: give an adapter of a low-rank method")
    if not all(site.own_factors for _, site in sites):
        raise ValueError(
            f"{adapter.method} has no factors of its own whose product is its update: write it as a plain LoRA "
            f"(variants.export_lora), and truncate that"
        )
    return sites


def finite(spectra: Sequence[Spectrum]) -> Bool[Tensor, " K"]:
    return torch.stack([spectrum.finite for spectrum in spectra]).all(0)


def compared(adapter: Adapter, spectra: Sequence[Spectrum], normalisation: str) -> list[Float[Tensor, "K M"]]:
    """What stands against the threshold: normalised squares of the singular values, of each site."""
    normalised = []
    for (name, _), spectrum in zip(adapter.named_sites(), spectra, strict=True):
        weight = weight_of(adapter.base(name)).detach().float().norm().item() if normalisation == "weight" else 0.0
        normalised.append(NORMALISED[normalisation](spectrum.sigma, weight).square())
    return normalised


def chosen_ranks(
    comparable: Sequence[Tensor],
    spectra: Sequence[Spectrum],
    budget: Int[Tensor, " K"],
    costs: Sequence[int] | None,
    bounds: Sequence[Bound],
) -> list[Int[Tensor, " K"]]:
    """The rank of each site: how many of its values stay within the budget, the largest of all sites first.

    costs: parameters of a rank of each site, where the budget is in parameters.
    """
    sizes = [values.shape[1] for values in comparable]
    exists = torch.cat([spectrum.exists for spectrum in spectra], 1)
    each = None if costs is None else [cost for cost, size in zip(costs, sizes, strict=True) for _ in range(size)]
    kept = choose(torch.cat(list(comparable), 1), exists, budget, each, bounds)
    return [part.sum(1) for part in kept.split(sizes, 1)]


def _by_energy(
    comparable: Sequence[Tensor], spectra: Sequence[Spectrum], share: Float[Tensor, " K"], bounds: Sequence[Bound]
) -> list[Int[Tensor, " K"]]:
    """The fewest ranks whose energy is at least that share; all that the bounds allow where they forbid to reach it."""

    def energy(ranks: Sequence[Tensor]) -> Tensor:
        inside = (torch.arange(v.shape[1]) < r[:, None] for v, r in zip(comparable, ranks, strict=True))
        return sum((values * mask).sum(1) for values, mask in zip(comparable, inside, strict=True))

    everything = sum(spectrum.ranks for spectrum in spectra)
    wanted = share * energy([spectrum.ranks for spectrum in spectra]) * (1 - 1e-12)  # 1e-12: sums of a share of 1 round
    low, high = torch.zeros_like(everything), everything.clone()  # bisection: more ranks never have less energy
    while bool((low < high).any()):
        middle = (low + high) // 2
        enough = energy(chosen_ranks(comparable, spectra, middle, None, bounds)) >= wanted
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
        low = torch.minimum(low, high)
    return chosen_ranks(comparable, spectra, high, None, bounds)


def site_bounds(sites: Sequence[tuple[str, LowRank]], least: int, most: int | None) -> list[Bound]:
    """The same bounds for every site; none where they say nothing."""
    if not least and most is None:
        return []
    bounds, at = [], 0
    for name, site in sites:
        size = min(site.A.shape[1:] + site.B.shape[1:2])
        bounds.append(Bound(name, tuple(range(at, at + size)), least, most))
        at += size
    return bounds


def slot_costs(adapter: Adapter) -> list[int]:
    """Parameters of one rank of each site."""
    one, none = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return [int(site.count(one) - site.count(none)) for _, site in adapter.named_sites()]


def fixed_parameters(adapter: Adapter) -> int:
    """Parameters that stay whatever the ranks: magnitudes."""
    return sum(int(site.count(torch.zeros(1, dtype=torch.int64))) for _, site in adapter.named_sites())


def _over(sigma: Tensor, norm: Tensor) -> Tensor:
    """sigma / norm, and zero where a site's update is zero."""
    return torch.where(norm > 0, sigma / norm.clamp_min(torch.finfo(sigma.dtype).tiny), 0.0)


def _check_budget(adapter: Adapter, name: str, value: float, member: int, least: Sequence[int], most: Sequence[int]) -> None:
    """
    Args:
        least, most: of each site, as far as the member has ranks there.

    Raises:
        ValueError: a budget that the least ranks exceed, or one above what there is, so that nothing would be cut for it.
    """
    who = f" for member {member}" if adapter.members > 1 else ""
    if name == "energy":
        if not 0 < value <= 1:
            raise ValueError(f"energy = {value}{who}: give a share above 0 and at most 1")
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} = {value!r}{who}: give a whole number")
    costs, fixed, unit = [1] * len(least), 0, "ranks"
    if name == "total_parameters":
        costs, fixed, unit = slot_costs(adapter), fixed_parameters(adapter), "parameters"
    floor, ceiling = (fixed + sum(c * r for c, r in zip(costs, ranks, strict=True)) for ranks in (least, most))
    if value < floor:
        what = "magnitudes and least ranks" if fixed else "least ranks"
        raise ValueError(f"{name} = {value}{who}: {what} take {floor} {unit}: give at least that")
    if value > ceiling:
        raise ValueError(f"{name} = {value}{who}: there are {ceiling} {unit}, and truncation adds none: give at most that")
