"""What kinds with one class a row share, whatever a row is: cross-entropy, the likeliest class, how both are scored."""

from typing import Any

from rankwise.experiments.kinds.interface import at_least_fp32
from rankwise.experiments.kinds.predictions import as_array, as_classes, by_row
from torch import Tensor
from torch.nn import functional as F


class OneClass:
    """Of a kind (named before its base) whose logits are (K*N, C) and labels (K*N,)."""

    def losses(self, logits: Tensor, labels: Tensor, members: int) -> Tensor:
        return F.cross_entropy(at_least_fp32(logits), labels, reduction="none").view(members, -1).mean(1)

    def predictions(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)

    def scored(self, predictions: Any, labels: Any, offsets: None) -> tuple[tuple, int]:
        return by_row(as_classes(as_array(predictions)), labels)
