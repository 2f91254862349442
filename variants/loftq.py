"""LoftQ: LoRA over a quantised weight that starts at what quantisation has cost.

    E = W - q(W) = U diag(sigma) V^T        B = U_r diag(sigma_r / s)^(1/2)        A = diag(sigma_r / s)^(1/2) V_r^T

q(W) is the frozen weight as bitsandbytes holds it, W the same before, out of the model's own files.  s B A is the best
approximation of E of rank r, so the model starts nearer to the one in full precision.  Li et al. 2023 (arXiv 2310.08659),
alg. 1 with T = 1; PEFT's `replace_lora_weights_loftq`, whose file is a plain LoRA over the quantised base, as ours is.

Departures: T = 1, since a further step quantises W - s B A anew, which no two members of other ranks could share.  PEFT forgets
the scale: there s B A is s times too large unless alpha = r.  8 bits are taken too, where PEFT takes 4.  A weight that is not
quantised has no error, and LoRA's own start; where none is, that is warned of.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from rankwise.variants.adapter.kinds.interface import trained_dtype
from rankwise.variants.adapter.kinds.quantised import bits
from rankwise.variants.adapter.linears import size_of, weight_of
from rankwise.variants.adapter.site import Site
from rankwise.variants.adapter.step import Uncalibrated
from rankwise.variants.adapter.surgery import has_values
from rankwise.variants.lora import LoRA
from rankwise.variants.lowrank.magnitude import Decomposed
from rankwise.variants.lowrank.site import LowRank
from rankwise.variants.weights.stored import StoredWeights
from torch import Tensor, nn


class LoftQ(LoRA):
    """K members of LoftQ."""

    method = "loftq"

    def place(self, names: Sequence[str], calibration: Any) -> None:
        """
        Raises:
            ValueError: quantised weights whose own files are not to be found.
        """
        self.stored: StoredWeights | None = None
        if isinstance(calibration, Uncalibrated) or not has_values(self.model):  # no start is asked for
            return
        if any(bits(self.model.get_submodule(name)) is not None for name in names):
            try:
                self.stored = StoredWeights(self.model)
            except ValueError as error:
                raise ValueError(f"{self.method} starts at the error of quantisation, and {error}") from None
        else:
            warnings.warn(
                f"{self.method} starts at the error of quantisation, and no target is quantised: it is LoRA here; load the "
                f"model in 4 or 8 bits",
                stacklevel=4,
            )

    @torch.no_grad()
    def make_low_rank(self, name: str, module: nn.Module) -> LowRank:
        starts, scales, *rest = self.start(name, module)
        if self.stored is not None and bits(module) is not None:
            ranks = [len(A) for A in starts[0]]
            if max(ranks) > min(size_of(module)):
                raise ValueError(
                    f"rank = {max(ranks)} at {name}, whose weight is {size_of(module)}: {self.method} starts at its error, "
                    f"which has no more ranks than {min(size_of(module))}: lower it"
                )
            frozen = weight_of(module)
            error = self.stored.weight(name, module).to(frozen.device, trained_dtype(frozen.dtype)) - frozen
            starts = error_parts(error, ranks, scales)
        return LowRank(name, module, starts, scales, *rest)

    def make_site(self, name: str, module: nn.Module) -> Site:
        site = super().make_site(name, module)
        if isinstance(site, Decomposed):  # at |q(W) + dW|, as PEFT has it, so that the start is s B A's
            site.magnitude.data.copy_(site.norm(module))
        return site


def error_parts(error: Tensor, ranks: Sequence[int], scales: Sequence[float]) -> tuple[list[Tensor], list[Tensor]]:
    """A (r, I) and B (O, r) of each member, s B A being the nearest of its rank to the error (O, I)."""
    U, sigma, Vt = torch.linalg.svd(error, full_matrices=False)
    roots = [(sigma[:r] / s).sqrt() for r, s in zip(ranks, scales, strict=True)]
    return [root[:, None] * Vt[: len(root)] for root in roots], [U[:, : len(root)] * root for root in roots]
