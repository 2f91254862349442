"""FIM-LoRA: LoRA whose ranks come from the Fisher information of B at its start, before training.

    F_i = mean over N batches and over all elements of (dL/dB_i)^2        r_i ~ F_i / sum F  sum_j r

the diagonal of the empirical Fisher information matrix of LoRA at a uniform rank.  B is zero there, so dL/dB = s G A^T with
G = dL/dW of the frozen weight and A at its random start: nothing needs to be trained.  Ranks lie between r_min and r_max and
are rounded by the largest remainder.  FIM-LoRA, arXiv 2605.16800; huggingface/peft pull request 3204; read in its
experiments, Kernel-ML/fim-lora-experiments src/fim_allocator.py.

Departures: what r_min and r_max keep from a site goes to the others, so that the budget is met (the release rounds, then
clamps, and misses it).  An early revision of the experiments squares the gradient of A, which is zero at the start.  After
resizing the release has alpha over a site's own rank: scale_by = "own rank".  As there, a batch's gradient is squared, the
mean over its rows, not each row's.
"""

from collections.abc import Sequence

import torch
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.step import Calibration
from rankwise.variants.allocation.measuring import gradients
from rankwise.variants.allocation.placed import PlacedLoRA, Ranks
from torch import Tensor


class FIMLoRA(PlacedLoRA):
    """K members of FIM-LoRA."""

    method = "fim-lora"
    needs = "gradients"

    def measure(self, names: Sequence[str], calibration: Calibration) -> Ranks:
        information = gradients(self, names, calibration, self.information)
        return self.by_share({name: F.tolist() for name, F in information.items()})

    def information(self, name: str, G: Tensor) -> Tensor:
        """(K,): the mean of (s G A^T)^2 of a site, from its gradient G (K, O, I) of one batch."""
        ranks = [max(r, 1) for r in self.uniform_ranks(name)]
        found = []
        for g, r, s, seed in zip(G, ranks, self.site_scales(name, ranks), self.seeds, strict=True):
            A = initialization.kaiming(r, G.shape[2], initialization.generator(seed, name, "A")).to(g)
            found.append((s * (g @ A.mT)).double().square().mean())
        return torch.stack(found)

    def default_bounds(self, name: str) -> list[tuple[int, int | None]]:
        least, most = self.settings.least_rank, self.settings.most_rank
        return [(least, max(2 * r, least) if most is None else most) for r in self.uniform_ranks(name)]
