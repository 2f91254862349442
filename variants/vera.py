"""VeRA: train two vectors at each weight, around a pair of random matrices that all weights share.

    y = W x + diag(b) B diag(d) A x + bias

A (r, I) and B (O, r) are drawn once, frozen, and the same at every site, which takes the first columns of A and the first rows
of B where sites differ in size.  d (r,) starts at 0.1 and b (O,) at zero, so the model is unchanged at the start; r + O numbers
are trained at a site.  Kopiczko et al. 2024 (arXiv 2310.11454), eq. (2), sec. 3.2 and 3.3.

A and B are Kaiming uniform, U(-sqrt(6/fan in), sqrt(6/fan in)), A first, by one generator: PEFT's, so that its
projection_prng_key draws them again.  There is no alpha: the paper has none.

Departure: members draw matrices of their own, by their seeds, where PEFT takes one key; projection_seed = 0 is PEFT's.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.linears import size_of
from rankwise.variants.adapter.step import Group
from rankwise.variants.adapter.surgery import device_of
from rankwise.variants.lowrank.adapter import LowRankAdapter
from rankwise.variants.lowrank.site import LowRank
from rankwise.variants.lowrank.vectors import Projections, Vectors
from rankwise.variants.settings import per_member
from torch import Generator, Tensor, nn


class VeRA(LowRankAdapter):
    """K members of VeRA."""

    method = "vera"
    peft_type = "VERA"
    only_linear = "shares one pair of matrices among its targets"
    has_magnitude = False

    def choose(self, model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
        names = Adapter.choose(self, model, targets, head)
        self.check_kinds(model, names)
        return names

    def place(self, names: Sequence[str], calibration: Any) -> None:
        modules = [self.model.get_submodule(name) for name in names]
        most_out, most_in = (max(sizes) for sizes in zip(*map(size_of, modules), strict=True))
        ranks = self.site_ranks(names[0], self.settings.rank)
        pairs = [projections(most_out, most_in, r, key) for r, key in zip(ranks, self.projection_seeds(), strict=True)]
        self.projections = Projections(pairs).to(device_of(modules[0]))

    def make_low_rank(self, name: str, module: nn.Module) -> LowRank:
        settings, ranks = self.settings, self.site_ranks(name, self.settings.rank)
        return Vectors(name, module, ranks, self.projections, settings.d_initial, settings.dropout, self.draw)

    def projection_seeds(self) -> list[int]:
        """Of each member the seed that draws its A and B."""
        given = self.settings.projection_seed
        return self.seeds if given is None else [given] * self.members

    def site_ranks(self, name: str, default: list[int] | int) -> list[int]:
        return per_member(self.settings.rank, self.members, "rank")

    def site_scales(self, name: str, ranks: list[int]) -> list[float]:
        return [1.0] * len(ranks)

    def parameter_groups(self) -> list[Group]:
        return Adapter.parameter_groups(self)


def projections(out_features: int, in_features: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A (r, I) and B (O, r) by a seed, bit for bit as PEFT draws them on a CPU."""
    random = Generator().manual_seed(seed)

    def kaiming(*shape: int) -> Tensor:
        bound = sqrt(3.0) * (sqrt(2.0) / sqrt(shape[1]))  # in PEFT's order, which rounds
        return torch.empty(shape).uniform_(-bound, bound, generator=random)

    return kaiming(rank, in_features), kaiming(out_features, rank)
