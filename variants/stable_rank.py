"""Rank by the stable rank of each pre-trained weight, then LoRA: a prior that needs no data.

    r_i ~ |W_i|_F^2 / sigma_max(W_i)^2

Inspired by SR-LoRA (arXiv 2507.00327), whose ranks are the stable ranks themselves; here they are in proportion to them and
meet a budget exactly, by the largest remainder.
"""

from collections.abc import Sequence

import torch
from rankwise.variants.adapter.linears import weight_of
from rankwise.variants.adapter.step import Calibration
from rankwise.variants.allocation.placed import PlacedLoRA, Ranks
from torch import Tensor


class StableRank(PlacedLoRA):
    """K members of LoRA with ranks in proportion to the weights' stable ranks."""

    method = "stable-rank"

    def measure(self, names: Sequence[str], calibration: Calibration | None) -> Ranks:
        weights = {name: stable_rank(weight_of(self.model.get_submodule(name)).detach()) for name in names}
        return self.by_share({name: [weight] * self.members for name, weight in weights.items()})


def stable_rank(weight: Tensor) -> float:
    """|W|_F^2 / sigma_max^2 of a weight (O, I), between 1 and its rank; 0 of a weight that is zero."""
    W = weight.double()
    gram = W @ W.mT if W.shape[0] <= W.shape[1] else W.mT @ W
    greatest = torch.linalg.eigvalsh(gram)[-1]
    return (gram.trace() / greatest).item() if greatest > 0 else 0.0
