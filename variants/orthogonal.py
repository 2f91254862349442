"""LoRA whose factors both start at random, in orthogonal subspaces, so that their product is zero.

    A = Q_1^T N_A / 10        B = N_B Q_2 / 10        B A = N_B Q_2 Q_1^T N_A / 100 = 0

Q (r, r) is a random orthogonal matrix, Q_1 (r/2, r) its rows of odd number and Q_2 (r/2, r) those of even number; N_A (r/2, I)
and N_B (O, r/2) are standard normal.  The model is unchanged at the start, to rounding, and yet A and B both have a gradient.
PEFT's init_lora_weights = "orthogonal" (after datta0.github.io/posts/rethink-lora-init).

Departure: an odd rank, which PEFT refuses, gives Q_1 the row more; at rank 1 that is LoRA's start.
"""

import torch
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.linears import size_of
from rankwise.variants.lora import LoRA
from rankwise.variants.lowrank.site import LowRank
from torch import Generator, Tensor, nn


class Orthogonal(LoRA):
    """K members of LoRA with an orthogonal start."""

    method = "orthogonal"

    def make_low_rank(self, name: str, module: nn.Module) -> LowRank:
        ranks, size = self.site_ranks(name, self.settings.rank), size_of(module)
        draws = [initialization.generator(seed, name, "A") for seed in self.seeds]
        A, B = zip(*(orthogonal(*size, r, random) for r, random in zip(ranks, draws, strict=True)), strict=True)
        return LowRank(name, module, (list(A), list(B)), self.site_scales(name, ranks), self.settings.dropout, self.draw)


def orthogonal(out_features: int, in_features: int, rank: int, random: Generator) -> tuple[Tensor, Tensor]:
    """A (r, I) and B (O, r) with B A = 0; made in float64, so that the product is zero to the rounding of any type."""

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).normal_(generator=random)

    Q = torch.linalg.qr(normal(rank, rank)).Q
    Q_1, Q_2 = Q[0::2], Q[1::2]
    return Q_1.mT @ normal(len(Q_1), in_features) / 10, normal(out_features, len(Q_2)) @ Q_2 / 10
