"""LoRA: freeze the weight, train a low-rank change of it.

    y = W x + s B A x + b            s = alpha/r

A (K, R, I) starts at random and B (K, O, R) at zero, so the model is unchanged at the start.  Hu et al. 2021, eq. (3).
With scaling = "alpha/sqrt(r)" it is rsLoRA (Kalajdzievski 2023), with lr_ratio > 1 LoRA+ (Hayou et al. 2024).
"""

from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.draws import Draw
from rankwise.variants.adapter.linears import kind_of
from rankwise.variants.lowrank.adapter import LowRankAdapter
from rankwise.variants.lowrank.site import LowRank
from torch import Tensor, nn


class LoRA(LowRankAdapter):
    """K members of LoRA."""

    method = "lora"

    def make_low_rank(self, name: str, module: nn.Module) -> LowRank:
        return LowRank(name, module, *self.start(name, module))

    def start(self, name: str, module: nn.Module) -> tuple[tuple[list[Tensor], list[Tensor]], list[float], float, Draw]:
        """Where A and B start for each member, their scales, the dropout and its draw: the arguments of a site.

        Where they start a kind of weight may say otherwise: at an embedding A is zero and B is drawn (adapter/linears.py).
        """
        ranks = self.site_ranks(name, self.settings.rank)
        start = initialization.STARTS[self.settings.initialization]
        draws = [initialization.generator(seed, name, "A") for seed in self.seeds]
        kind = kind_of(module)
        A, B = zip(*(kind.start(start, module, r, random) for r, random in zip(ranks, draws, strict=True)), strict=True)
        return (list(A), list(B)), self.site_scales(name, ranks), self.settings.dropout, self.draw
