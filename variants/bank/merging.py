"""TIES and DARE on dense changes of a weight.

TIES (Yadav et al. 2023, arXiv 2306.01708, algorithm 1), for changes t_1 .. t_n, each a vector over all adapted weights:

    trim    t_i keeps its `density` largest entries by size, the others are 0
    elect   s = sign(t_1 + ... + t_n), entry by entry
    merge   the mean of w_i t_i over those i whose entry is not 0 and has the sign s; 0 where there is none

The paper scales the result by one lambda, which equal weights are; unequal ones act on the values as in PEFT, not on the vote.

DARE (Yu et al. 2023, arXiv 2311.03099, eq. 1 and 2): each entry of t_i is dropped with probability 1 - density, the others are
divided by density; then the changes are summed with their weights.
"""

from collections.abc import Sequence

import torch
from rankwise.variants.adapter import initialization
from torch import Tensor


def trim_threshold(sizes: Tensor, density: float) -> float:
    """The size (n,) of the least entry that TIES keeps; entries that equal it are kept too."""
    kept = max(1, int(density * len(sizes)))
    return float(sizes.kthvalue(len(sizes) - kept + 1).values)


def ties(changes: Sequence[Tensor], weights: Sequence[float], thresholds: Sequence[float]) -> Tensor:
    """(O, I): the merged change of one weight, for changes (O, I) that are trimmed at these sizes."""
    trimmed = torch.stack([torch.where(t.abs() >= least, t, 0.0) for t, least in zip(changes, thresholds, strict=True)])
    elected = trimmed.sum(0).sign()
    agrees = trimmed.sign() == elected  # where nothing is elected, what agrees is 0 itself
    scaled = trimmed * trimmed.new_tensor(weights)[:, None, None]
    return (scaled * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def dare(change: Tensor, density: float, seed: int, *names: str) -> Tensor:
    """A change (O, I) with entries dropped, by a draw keyed by (seed, names)."""
    drawn = torch.empty(change.shape, dtype=torch.float64).uniform_(generator=initialization.generator(seed, "dare", *names))
    return change * (drawn < density).to(change) / density
