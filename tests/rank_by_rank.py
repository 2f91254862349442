"""Packed training beside plain versions that hold one rank at a time: losses and ranks at every step, then the factors."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from rankwise.variants.adapter.interface import Adapter
from torch import Tensor

from tests.loop import Loop
from tests.test_adalora import data, squared_error

Ranks = tuple[int, tuple[int, ...]]  # a member, and the rank of each site


class OneMember(Protocol):
    """A plain version.  sites: of each site its ranks, the `leaves` of which are a (I,), b (O,) and their coefficient."""

    sites: list[list[Any]]

    def step(self, t: int, x: Tensor, y: Tensor) -> float: ...


def check_training(adapter: Adapter, plain: Sequence[OneMember], rates: list[float], total: int) -> set[Ranks]:
    """Trains `Net`'s adapter, whose total of ranks stays, and its members' plain versions; returns what ranks there were."""
    loop, seen = Loop(adapter, rates, total, clip=0.5, losses=squared_error), set()
    starts = [sum(len(site) for site in one.sites) for one in plain]
    for t in range(1, total + 1):
        batches = [data(k, t) for k in range(len(plain))]
        losses = loop.step(tuple(torch.cat(parts) for parts in zip(*batches, strict=True)))
        expected = [one.step(t, *batches[k]) for k, one in enumerate(plain)]
        np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-7, err_msg=str(t))
        for k, one in enumerate(plain):
            ranks = [int(rank[k]) for rank in adapter.ranks().values()]
            assert ranks == [len(site) for site in one.sites], (t, k)
            assert sum(ranks) == starts[k]
            seen.add((k, tuple(ranks)))
    for s, site in enumerate(adapter.triplets()):
        for k, one in enumerate(plain):
            for j, rank in enumerate(one.sites[s]):
                for found, leaf in zip((site.A[k, j], site.B[k, :, j], site.E[k, j]), rank.leaves, strict=True):
                    torch.testing.assert_close(found, leaf.detach(), rtol=1e-6, atol=1e-9)
    return seen
