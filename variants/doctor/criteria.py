"""How many ranks of each site a criterion would keep, and the error of the update that is left.

Legend: sigma (R,) singular values of a site's dW, the greatest first, those that are zero left out.

    exact      all that are not zero: dead and dependent ranks go, dW stays
    energy     the fewest that hold a share of |dW|_F^2
    sv_fro     the fewest that hold a share of |dW|_F; kohya-ss/sd-scripts networks/resize_lora.py
    sv_ratio   those above sigma_1 / ratio; the same file
    mp         those above the Marchenko-Pastur edge, all where none is
    total      the greatest of all sites together, so many in all

Kohya keeps at least one rank and never all; here a site whose update is zero keeps none, and a site may keep all.  The best
update of a rank has the error sqrt(sum of the squares of the sigma that went) in the Frobenius norm (Eckart & Young 1936).

The Marchenko-Pastur edge.  If the entries of B (O, R) and A (R, I) were independent noise, all singular values of dW would lie
below

    |dW|_F / sqrt(R)  (1 + sqrt(R/O)) (1 + sqrt(R/I))

for large O, I: those of each factor lie below its norm / sqrt(R) times one of the brackets (Marchenko & Pastur 1967; Bai & Yin
1988 for the edge).  What is above it ("spikes") is structure; what is below may be too: the edge is that of noise of the same
size, a strict test.  A site without a spike has no direction that stands out, and is left whole.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from rankwise.variants.weights.spectrum import energy_rank

ENERGY, SV_FRO, SV_RATIO = 0.95, 0.9, 10.0


@dataclass(frozen=True)
class Spectrum:
    """A site's sigma, its shape (O, I), and the parameters that a rank of it takes."""

    site: str
    sigma: np.ndarray
    shape: tuple[int, int]

    @property
    def cost(self) -> int:
        return sum(self.shape)


@dataclass(frozen=True)
class Suggestion:
    """What a criterion would keep.

    errors: of each site |dW - dW'|_F / |dW|_F.  error: that of all sites together.
    """

    criterion: str
    setting: str
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    error: float
    parameters: int

    @property
    def total(self) -> int:
        return sum(self.ranks.values())


def mp_edge(sigma: np.ndarray, shape: tuple[int, int]) -> float:
    """Above it no singular value of noise B A of the same size |dW|_F and rank lies."""
    rank = len(sigma)
    if not rank:
        return 0.0
    brackets = [1 + sqrt(rank / side) for side in shape]
    return float(np.linalg.norm(sigma)) / sqrt(rank) * brackets[0] * brackets[1]


def spikes(sigma: np.ndarray, shape: tuple[int, int]) -> int:
    return int((sigma > mp_edge(sigma, shape)).sum())


def share_rank(sigma: np.ndarray, share: float) -> int:
    """The fewest that hold that share of |dW|_F."""
    return energy_rank(sigma, share**2)


def ratio_rank(sigma: np.ndarray, ratio: float) -> int:
    return int((sigma > sigma[0] / ratio).sum()) if len(sigma) else 0


def total_ranks(sigmas: Sequence[np.ndarray], total: int) -> list[int]:
    """Of each site how many of its sigma are among the `total` greatest of all; ties go to the earlier site.

    Of all updates with so many ranks this is the nearest, in the Frobenius norm over all sites.
    """
    pool = np.concatenate([*sigmas, np.zeros(0)])
    owners = np.repeat(np.arange(len(sigmas)), [len(sigma) for sigma in sigmas])
    kept = np.argsort(-pool, kind="stable")[:total]
    return np.bincount(owners[kept], minlength=len(sigmas)).tolist()


def suggestions(
    spectra: Sequence[Spectrum],
    energy: float = ENERGY,
    sv_fro: float = SV_FRO,
    sv_ratio: float = SV_RATIO,
    total: int | None = None,
) -> dict[str, Suggestion]:
    """Criterion -> what it would keep.

    Args:
        energy, sv_fro: shares above 0, at most 1.  sv_ratio: above 1.
        total: ranks of all sites together.  [half of those there are, rounded up]

    Raises:
        ValueError: a parameter out of its range, or more ranks than there are.
    """
    for name, value in (("energy", energy), ("sv_fro", sv_fro)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} = {value}: give a share above 0 and at most 1")
    if not sv_ratio > 1:
        raise ValueError(f"sv_ratio = {sv_ratio}: give a number above 1")
    there = sum(len(one.sigma) for one in spectra)
    if total is not None and not 1 <= total <= there:
        raise ValueError(f"total = {total}: the sites have {there} ranks that are not zero; give 1 to {there}")
    total = -(-there // 2) if total is None else total
    by_site: dict[str, tuple[str, Callable[[Spectrum], int]]] = {
        "exact": ("sigma > 0", lambda one: len(one.sigma)),
        "energy": (f"{energy:g} of |dW|^2", lambda one: energy_rank(one.sigma, energy)),
        "sv_fro": (f"{sv_fro:g} of |dW|", lambda one: share_rank(one.sigma, sv_fro)),
        "sv_ratio": (f"sigma > sigma_1/{sv_ratio:g}", lambda one: ratio_rank(one.sigma, sv_ratio)),
        "mp": ("above the edge", lambda one: spikes(one.sigma, one.shape) or len(one.sigma)),
    }
    made = {name: suggestion(name, setting, spectra, [of(one) for one in spectra]) for name, (setting, of) in by_site.items()}
    ranks = total_ranks([one.sigma for one in spectra], total)
    return made | {"total": suggestion("total", f"{total} in all", spectra, ranks)}


def suggestion(criterion: str, setting: str, spectra: Sequence[Spectrum], ranks: Sequence[int]) -> Suggestion:
    lost = [float(np.linalg.norm(one.sigma[rank:])) for one, rank in zip(spectra, ranks, strict=True)]
    whole = [float(np.linalg.norm(one.sigma)) for one in spectra]
    errors = {one.site: part / all_ if all_ else 0.0 for one, part, all_ in zip(spectra, lost, whole, strict=True)}
    norm = float(np.linalg.norm(whole))
    return Suggestion(
        criterion,
        setting,
        {one.site: rank for one, rank in zip(spectra, ranks, strict=True)},
        errors,
        float(np.linalg.norm(lost)) / norm if norm else 0.0,
        sum(one.cost * rank for one, rank in zip(spectra, ranks, strict=True)),
    )
