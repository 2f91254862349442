"""The spectral rule: a site's rank is how many singular values of the first gradient stand out, then LoRA.

    r_i = max {r : sigma_r(G_i)^2 >= C/n}        G_i = dL/dW_i at the pre-trained weights

n rows are what G is the mean over, so that C/n is the size of its sampling noise.  OpenReview gg2Wb2HPOI ("Spectral Dynamics of
Low-Rank Adaptation"), of which the rule in the abstract was read; it has no value of C.

With `threshold` = C the total is a result, within the sites' bounds.  Without it C is what the budget makes it: the ranks with
the highest sigma^2 over all sites are kept (per parameter, with cost = "parameters"), so that the budget is met.
"""

from collections.abc import Sequence

import torch
from rankwise.variants.adapter.step import Calibration
from rankwise.variants.allocation.measuring import gradients
from rankwise.variants.allocation.placed import PlacedLoRA, Ranks


class SpectralRank(PlacedLoRA):
    """K members of LoRA with ranks by the spectrum of the first gradient."""

    method = "spectral-rank"
    needs = "gradients"

    def measure(self, names: Sequence[str], calibration: Calibration) -> Ranks:
        rows: list[int] = []
        counting = self.model.register_forward_pre_hook(lambda *_: rows.append(self.draw.rows.total // self.members))
        try:
            measured = gradients(self, names, calibration)
        finally:
            counting.remove()
        worth = {
            name: list(torch.linalg.svdvals(G.double().nan_to_num(0.0, 0.0, 0.0)).square()) for name, G in measured.items()
        }
        if self.settings.threshold is None:
            return self.by_worth(worth)
        floor = self.settings.threshold / sum(rows)
        return {name: self._above(floor, worth[name], self.site_bounds(name)) for name in names}

    @staticmethod
    def _above(floor: float, worth: Sequence[torch.Tensor], bounds: Sequence[tuple[int, int]]) -> list[int]:
        """For each member how many of its squares reach the floor, within the bounds."""
        pairs = zip(worth, bounds, strict=True)
        return [min(max(int((squares >= floor).sum()), least), most) for squares, (least, most) in pairs]
