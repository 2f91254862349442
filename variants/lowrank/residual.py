"""A low-rank site over what its start leaves of the weight (variants/residual.py).

y = W x + s B A x - s B0 A0 x + b
"""

from typing import Any, ClassVar

import torch
from rankwise.variants.lowrank.site import LowRank
from torch import Tensor, nn


class Residual(LowRank):
    """A low-rank site whose change is counted from where its factors started: A0 and B0, which no optimizer sees."""

    own_factors = False
    slot_axes: ClassVar[dict[str, int]] = LowRank.slot_axes | {"A0": 1, "B0": 2}

    def __init__(self, name: str, base: nn.Module, *start: Any):
        super().__init__(name, base, *start)
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        A, B, c = self.operands()
        return torch.cat([A, self.A0], 1), torch.cat([B, self.B0], 2), torch.cat([c, -c], 1)

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.A, self.B, self.coefficients()

    def product(self, y: Tensor, x: Tensor, rate: float) -> Tensor:
        y = self.product_of(y, x, 0.0, (self.A0, self.B0, -self.coefficients()))
        return super().product(y, x, rate)
