"""An adapter's change of one weight as a diagonal and two thin matrices; weighted sums of such changes are of that form too.

    W + dW = D (W + L),    D = diag(gain), L = B A             of one adapter; the gain is 1 without magnitudes
    W + sum w_i dW_i = D W + sum w_i D_i L_i,                  D = 1 + sum w_i (D_i - 1)

So a sum of DoRA's changes is DoRA's own form, D (W + D^-1 sum w_i D_i L_i), exactly.  A row whose D is 0 has no inverse: there
the sum can only be written as no change of the direction, and the row counts in the error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rankwise.variants.adapter.linears import weight_of
from rankwise.variants.adapter.site import Site
from torch import Tensor, nn


@dataclass(frozen=True)
class Update:
    """A (r, I) and B (O, r), all scales in B, and the gain (O,) or None; in float64."""

    A: Tensor
    B: Tensor
    gain: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.A)

    @property
    def is_nothing(self) -> bool:
        """Whether there is no slot and no gain."""
        return not self.rank and self.gain is None

    def dense(self, base: nn.Module) -> Tensor:
        """(O, I): dW."""
        change = self.B @ self.A
        if self.gain is None:
            return change
        weight = weight_of(base).to(change)
        return self.gain[:, None] * (weight + change) - weight


@torch.no_grad()
def update_of(site: Site, base: nn.Module) -> Update:
    """What a loaded adapter of one member does at a module; slots that do not act are left out."""
    A, B, c = (t[0].detach().double() for t in site.low_rank.matrices())
    acts = c != 0
    gain = site.gain(base)[0].detach().double() if site.has_magnitude else None
    return Update(A[acts], (B * c)[:, acts], gain)


def weighted_sum(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """The sum, with the factors side by side; its B holds D L, not L, where it has a gain."""
    A = torch.cat([u.A for u in updates])
    B = torch.cat([w * (u.B if u.gain is None else u.gain[:, None] * u.B) for u, w in zip(updates, weights, strict=True)], 1)
    gains = [(w, u.gain) for u, w in zip(updates, weights, strict=True) if u.gain is not None]
    return Update(A, B, 1 + sum(w * (gain - 1) for w, gain in gains) if gains else None)


def with_direction(total: Update) -> Update:
    """A weighted sum as an update: L = D^-1 (D L)."""
    if total.gain is None:
        return total
    usable = total.gain.abs() > torch.finfo(torch.float32).eps
    inverse = torch.where(usable, 1 / torch.where(usable, total.gain, 1.0), 0.0)
    return Update(total.A, inverse[:, None] * total.B, total.gain)


def cut(update: Update, rank: int | None = None) -> Update:
    """B A at the `rank` largest of its singular values; without a rank at the least that holds it to fp32's rounding."""
    if not update.rank:
        return update
    Qb, Rb = torch.linalg.qr(update.B)
    Qa, Ra = torch.linalg.qr(update.A.mT)
    U, s, Vh = torch.linalg.svd(Rb @ Ra.mT)
    if rank is None:
        rank = int((s > s.max() * torch.finfo(torch.float32).eps).sum())
    root = s[:rank].sqrt()
    return Update(root[:, None] * (Vh[:rank] @ Qa.mT), Qb @ (U[:, :rank] * root), update.gain)


def of_dense(change: Tensor, rank: int) -> Update:
    """The best update (O, I) of that rank."""
    U, s, Vh = torch.linalg.svd(change.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return Update(root[:, None] * Vh[:rank], U[:, :rank] * root)
