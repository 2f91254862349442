"""LoRA whose alpha is trained: one scalar a site, at its own small rate.

    y = W x + s B A x + b            s <- s - rho eta dL/ds            rho = alpha_lr_ratio

s (K,) starts at alpha/r (alpha/sqrt(r) with rsLoRA's scaling), so a site costs one parameter more than LoRA's.  It has no
weight decay, which would pull the update to zero.  A file holds the alpha in force of each site, s r, in PEFT's alpha_pattern:
it is a plain LoRA, and merges like one.

Ours: alpha as a hyperparameter (Hu et al. 2021, sec. 4.1, tune it once and fix it) made a parameter.
"""

from rankwise.variants.adapter.step import Group
from rankwise.variants.lora import LoRA
from rankwise.variants.lowrank.site import LowRank
from torch import Tensor, nn


class Scaled(LowRank):
    """A low-rank site that trains its scale too."""

    def place(self, *args: object) -> None:
        super().place(*args)
        scale = self.scale
        del self.scale
        self.scale = nn.Parameter(scale)  # (K,)

    def count(self, ranks: Tensor) -> Tensor:
        """(K,) parameters of so many slots, and the scale."""
        return super().count(ranks) + 1


class TrainedAlpha(LoRA):
    """K members of LoRA with a trained alpha."""

    method = "trained-alpha"

    def make_low_rank(self, name: str, module: nn.Module) -> LowRank:
        return Scaled(name, module, *self.start(name, module))

    def parameter_groups(self) -> list[Group]:
        scales = [site.scale for site in self.low_rank_sites()]
        others = [
            Group([p for p in group.params if not any(p is scale for scale in scales)], group.lr_scale, group.weight_decay)
            for group in super().parameter_groups()
        ]
        return [*(group for group in others if group.params), Group(scales, self.settings.alpha_lr_ratio, weight_decay=0.0)]
