"""A low-rank site that trains two vectors around a pair of frozen matrices, which all sites share (variants/vera.py).

    y = W x + diag(b) B diag(d) A x + bias

A (K, R, I) and B (K, O, R) are the first columns, and the first rows, of matrices as large as the largest site needs.
"""

from typing import ClassVar

import torch
from rankwise.variants.adapter.draws import Draw
from rankwise.variants.adapter.linears import size_of
from rankwise.variants.adapter.site import Site
from rankwise.variants.lowrank.site import LowRank
from torch import Tensor, nn


class Projections(nn.Module):
    """The matrices that all sites share: A (K, R, most I) and B (K, most O, R), zero where a member has fewer rows."""

    A: Tensor
    B: Tensor

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]):
        """
        Args:
            pairs: of each member A (r, most I) and B (most O, r).
        """
        super().__init__()
        most = max(len(A) for A, _ in pairs)
        pad = nn.functional.pad
        self.register_buffer("A", torch.stack([pad(A, (0, 0, 0, most - len(A))) for A, _ in pairs]))
        self.register_buffer("B", torch.stack([pad(B, (0, most - B.shape[1])) for _, B in pairs]))


class Vectors(LowRank):
    """d and b of K members at one frozen weight."""

    own_factors = False
    slot_axes: ClassVar[dict[str, int]] = {"d": 1, "slots": 1}

    def __init__(
        self, name: str, base: nn.Module, ranks: list[int], shared: Projections, first: float, dropout: float, draw: Draw
    ):
        """
        Args:
            first: where d starts.
        """
        Site.__init__(self)
        self.place(name, base, ranks, [1.0] * len(ranks), dropout, draw)
        self.out_features, self.in_features = size_of(base)
        self.shared = (shared,)  # in a tuple, so that it is no submodule of every site
        self.d = nn.Parameter(self.slots * first)  # (K, R)
        self.b = nn.Parameter(self.slots.new_zeros(len(ranks), self.out_features))  # (K, O)

    @property
    def A(self) -> Tensor:
        """(K, R, I)."""
        return self.shared[0].A[:, :, : self.in_features].to(self.d)

    @property
    def B(self) -> Tensor:
        """(K, O, R): diag(b) B."""
        return self.b[:, :, None] * self.shared[0].B[:, : self.out_features].to(self.b)

    def coefficients(self) -> Tensor:
        return self.d * super().coefficients()

    def live(self) -> Tensor:
        return self.physical()

    def count(self, ranks: Tensor) -> Tensor:
        """(K,) parameters of so many ranks: d and b."""
        return ranks + self.b.shape[1]

    @torch.no_grad()
    def clear_missing_slots(self) -> None:
        self.d *= self.slots
