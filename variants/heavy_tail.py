"""Rank by the tail of each pre-trained weight's singular values, then LoRA: a prior that needs no data.

    r_i ~ q_i^beta  (more to light tails)        or        r_i ~ q_i^-beta  (more to heavy tails)

    hill     q = 1 + k / sum_{j<=k} ln(lambda_j / lambda_k+1)        lambda = sigma(W)^2, falling; k half of them
    spikes   q = 1 / (1 + #{j : lambda_j > v (sqrt(O) + sqrt(I))^2})        v = |W|_F^2 / (O I)

Heavy-tailed self-regularization (Martin & Mahoney 2021): the better a weight is trained, the heavier the tail of its spectrum,
that is the smaller its power-law exponent q (Hill 1975; k as in Zhou et al. 2023, "Temperature balancing") and the more of its
singular values stand above the edge of a random matrix with entries of the same variance (Marchenko & Pastur 1967).  AlphaLoRA
(arXiv 2410.10054) gives more experts where q is high, as those layers have more to learn, with beta = 2.5; others read the same
numbers the other way round, more rank where there is more structure to adapt.  Both readings are settings (`more_to`).

Departures: AlphaLoRA places whole experts by layer, its release fits the tail's start as well (the least Kolmogorov-Smirnov
distance), and rounds by its own loop; here each weight has its ranks, by the largest remainder.
"""

from collections.abc import Sequence
from math import inf, isfinite

import torch
from rankwise.variants.adapter.linears import weight_of
from rankwise.variants.adapter.step import Calibration
from rankwise.variants.allocation.placed import PlacedLoRA, Ranks
from torch import Tensor

ROUNDING = 1e-5  # by which squared singular values of an orthogonal fp32 weight differ


class HeavyTail(PlacedLoRA):
    """K members of LoRA with ranks by the tails of the weights' spectra."""

    method = "heavy-tail"

    def measure(self, names: Sequence[str], calibration: Calibration | None) -> Ranks:
        statistic = {"hill": hill_exponent, "spikes": lightness_by_spikes}[self.settings.statistic]
        found = {name: statistic(weight_of(self.model.get_submodule(name)).detach()) for name in names}
        lightest = max((q for q in found.values() if isfinite(q)), default=1.0)
        power = self.settings.beta if self.settings.more_to == "light" else -self.settings.beta
        # A weight without a tail, all of whose singular values are equal, counts as the lightest of the others.
        return self.by_share({name: [min(q, lightest) ** power] * self.members for name, q in found.items()})


def squares(weight: Tensor) -> Tensor:
    """The squared singular values of a weight (O, I), falling, without those that are zero to rounding."""
    found = torch.linalg.svdvals(weight.double()).square()
    return found[found > found.max() * torch.finfo(torch.float32).eps ** 2] if len(found) else found


def hill_exponent(weight: Tensor) -> float:
    """The power-law exponent of the upper half of the squared singular values; inf where they are equal, or all zero."""
    of_weight = squares(weight)
    k = len(of_weight) // 2
    logs = (of_weight[:k] / of_weight[k]).log().sum().item() if k else 0.0
    return 1 + k / logs if logs > k * ROUNDING else inf


def lightness_by_spikes(weight: Tensor) -> float:
    """1 / (1 + how many squared singular values stand above the Marchenko-Pastur edge); inf of a weight that is zero."""
    of_weight, (O, I) = squares(weight), weight.shape
    edge = of_weight.sum() / (O * I) * (O**0.5 + I**0.5) ** 2
    return 1 / (1 + int((of_weight > edge).sum())) if len(of_weight) else inf
