"""Rank placed at random, then LoRA: the control of every method that places rank.

Each unit of rank goes to a site that is drawn with equal chances among those that still have room, by the member's seed.
It is drawn as a race: ranks arrive at every site with independent exponential gaps, so that whatever came before, the next one
is at every site equally likely; the first arrivals are kept until the budget is spent.
"""

from collections.abc import Sequence

import torch
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.step import Calibration
from rankwise.variants.allocation.placed import PlacedLoRA, Ranks


class RandomRank(PlacedLoRA):
    """K members of LoRA with ranks at random."""

    method = "random-rank"
    reads_values = False

    def measure(self, names: Sequence[str], calibration: Calibration | None) -> Ranks:
        worth = {}
        for name, rooms in self.rooms(names).items():
            draws = [initialization.generator(seed, name, "arrivals") for seed in self.seeds]
            gaps = [torch.empty(n, dtype=torch.float64).exponential_(generator=g) for n, g in zip(rooms, draws, strict=True)]
            worth[name] = [-gap.cumsum(0) for gap in gaps]
        return self.by_worth(worth, per_cost=False)
