"""What PiSSA and OLoRA share: LoRA that starts at a part of the weight, which is taken out of it.

    y = (W - s B0 A0) x + s B A x + b            dW = s B A - s B0 A0

B0 A0 is where B A starts, so the model is unchanged at the start, to rounding.  A method says which part of W it is.

Departure: the releases and PEFT write W - s B0 A0 over the frozen weight.  Here W stays as it is, bit for bit, and B0 A0 is a
second, frozen product: members of other ranks and scales share one W, a quantised W is not quantised again, and a 16-bit W not
rounded.  The change of W has rank 2 r, and is a plain LoRA of that rank on the unchanged W: A' = [A; A0], B' = [B, -B0]
(`export_lora`; in PEFT `path_initial_model_for_weight_conversion`).  Dropout acts on B A alone, as in PEFT.
"""

from collections.abc import Sequence

import torch
from rankwise.variants.adapter.kinds.interface import trained_dtype
from rankwise.variants.adapter.linears import size_of, weight_of
from rankwise.variants.adapter.step import Uncalibrated
from rankwise.variants.adapter.surgery import device_of
from rankwise.variants.lora import LoRA
from rankwise.variants.lowrank.residual import Residual
from rankwise.variants.lowrank.site import LowRank
from torch import Tensor, nn

Starts = list[tuple[Tensor, Tensor]]  # of each member A (r, I) and B (O, r)


class ResidualLoRA(LoRA):
    """K members of LoRA that start at a part of each weight."""

    only_linear = "takes its start out of the weight"

    def parts(self, W: Tensor, ranks: Sequence[int], scales: Sequence[float]) -> Starts:
        """Where A and B of each member start, by its rank and the scale of its update; W (O, I)."""
        raise NotImplementedError

    def make_low_rank(self, name: str, module: nn.Module) -> LowRank:
        ranks = self.site_ranks(name, self.settings.rank)
        scales = self.site_scales(name, ranks)
        A, B = zip(*self._starts(name, module, ranks, scales), strict=True)
        return Residual(name, module, (list(A), list(B)), scales, self.settings.dropout, self.draw)

    @torch.no_grad()
    def _starts(self, name: str, module: nn.Module, ranks: Sequence[int], scales: Sequence[float]) -> Starts:
        """
        Raises:
            ValueError: a rank above the weight's own.
        """
        out_features, in_features = size_of(module)
        if max(ranks) > min(out_features, in_features):
            raise ValueError(
                f"rank = {max(ranks)} at {name}, whose weight is ({out_features}, {in_features}): {self.method} starts at a "
                f"part of the weight, which has no more ranks than {min(out_features, in_features)}: lower it"
            )
        W = weight_of(module).detach()
        is_counted = isinstance(self._calibration, Uncalibrated) and self._calibration.ranks is None
        if is_counted or device_of(module).type == "meta":  # shapes are what is asked for
            return [(torch.zeros(r, in_features), torch.zeros(out_features, r)) for r in ranks]
        if W.is_meta:
            raise ValueError(
                f"{name}: its weight is not in memory (offloaded), and {self.method} needs its values: load the model without "
                f"offloading, or take a method that does not, such as lora"
            )
        return self.parts(W.to(trained_dtype(W.dtype)), ranks, scales)
