"""LoRA-FA: LoRA whose A stays where it started, so that only B is trained.

    y = W x + s B A x + b            s = alpha/r

A (K, R, I) is drawn once and frozen, B (K, O, R) starts at zero: the update lies in the column space that B spans, and the
backward pass keeps A x (R numbers a token) instead of x (I of them) for the weights.  Trained are B's O r numbers a site.
Zhang et al. 2023 (arXiv 2308.03303), eq. (4).  The file is a plain LoRA with both factors.
"""

import torch
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.linears import module_in
from rankwise.variants.lora import LoRA
from rankwise.variants.lowrank.site import LowRank
from torch import Tensor, nn


class FrozenA(LowRank):
    """A low-rank site that trains B alone; A is state that no optimizer sees."""

    def __init__(self, name: str, base: nn.Module, *start: object):
        super().__init__(name, base, *start)
        A = self.A.detach()
        del self.A
        self.register_buffer("A", A)

    def count(self, ranks: Tensor) -> Tensor:
        """(K,) parameters of so many slots: B's."""
        return ranks * self.B.shape[1]


class LoRAFA(LoRA):
    """K members of LoRA-FA."""

    method = "lora-fa"

    def make_low_rank(self, name: str, module: nn.Module) -> LowRank:
        (A, B), *rest = self.start(name, module)
        # LoRA's A of an embedding starts at zero, where a frozen one would stay: here A is drawn and B zero at every site.
        draw = initialization.STARTS[self.settings.initialization]
        randoms = [initialization.generator(seed, name, "A") for seed in self.seeds]
        A = [draw(len(a), module_in(module), random) for a, random in zip(A, randoms, strict=True)]
        return FrozenA(name, module, (A, [torch.zeros_like(b) for b in B]), *rest)
