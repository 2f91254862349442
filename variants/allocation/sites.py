"""Sites whose slots an allocator keeps or cuts.

Two masks: `slots` says which slots exist for a member; `kept` is the allocator's choice, applied as a projection when ranks
are allocated and after every step of the final phase, never in the forward pass: a slot that was cut still gets gradients,
and may come back until the final phase begins.  Where the direction is "grow" or "both" a slot that is not kept is projected
after every step, so that ranks really start small.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from rankwise.variants.adapter.step import Group
from rankwise.variants.lowrank.site import LowRank
from torch import Tensor, nn


class Triplets(LowRank):
    """A low-rank site with a trained coefficient E for each slot."""

    is_allocated = has_coefficients = True
    slot_axes = LowRank.slot_axes | {"E": 1, "kept": 1}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.E = nn.Parameter(torch.zeros_like(self.slots))  # (K, R)
        self.register_buffer("kept", self.slots.bool())

    def coefficients(self) -> Tensor:
        return self.E * (self.slots * self.scale[:, None])

    def factors(self) -> list[nn.Parameter]:
        """The trained tensors of the slots: A, B, and the coefficient."""
        return [self.A, self.B, self.E]

    @torch.no_grad()
    def project(self) -> None:
        """Zeroes the singular values that the allocator cut."""
        self.E.mul_(self.kept)

    def rank(self) -> Tensor:
        """(K,) triplets that the allocator keeps."""
        return self.kept.sum(1)

    def live(self) -> Tensor:
        """(K,) triplets whose singular value is not zero now."""
        return (self.E != 0).sum(1)

    def count(self, ranks: Tensor) -> Tensor:
        return super().count(ranks) + ranks

    @torch.no_grad()
    def clear_missing_slots(self) -> None:
        super().clear_missing_slots()
        self.E.mul_(self.slots)


class Doublets(LowRank):
    """LoRA's own factors under an allocator: a slot that is cut has its column of B at zero, so that it may come back."""

    is_allocated = True
    slot_axes = LowRank.slot_axes | {"kept": 1}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("kept", self.slots.bool())

    def factors(self) -> list[nn.Parameter]:
        return [self.A, self.B]

    @torch.no_grad()
    def project(self) -> None:
        """Zeroes the columns of B of the slots that the allocator cut."""
        self.B.mul_(self.kept[:, None])

    def rank(self) -> Tensor:
        """(K,) slots that the allocator keeps."""
        return self.kept.sum(1)

    def live(self) -> Tensor:
        """(K,) slots that exist and are not projected to zero."""
        return ((self.B != 0).any(1) | self.kept).sum(1)


def with_gates_apart(groups: Sequence[Group], sites: Sequence[Triplets], lr_scale: float) -> list[Group]:
    """The groups, in which coefficients that gate their slots have a learning rate of their own and do not decay."""
    gates = [site.E for site in sites]
    places = {id(gate) for gate in gates}
    others = [replace(group, params=[p for p in group.params if id(p) not in places]) for group in groups]
    return [*(group for group in others if group.params), Group(gates, lr_scale=lr_scale, weight_decay=0.0)]
