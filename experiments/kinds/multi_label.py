"""Texts, or pairs of texts, each with any number of L labels: a yes or no for every label.

    loss of a row  the mean over its L labels of  -y log p - (1 - y) log(1 - p),   p = sigmoid(logit)

A label is predicted where p > 1/2.  Examples have as `labels` an array (n, L) of 0 and 1.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rankwise.experiments.data.encoded import Encoded
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.kinds.interface import Undefined, at_least_fp32
from rankwise.experiments.kinds.predictions import as_array
from rankwise.experiments.kinds.rows import Rows
from torch import Tensor
from torch.nn import functional as F


class MultiLabel(Rows):
    """L labels a row, each by binary cross-entropy. Labels and logits (K*N, L)."""

    problem_type, label_type = "multi_label_classification", np.float32

    def encode(self, examples: Examples, processor: Any, max_length: int) -> Encoded:
        """
        Raises:
            ValueError: labels that are no (n, L) of 0 and 1.
        """
        labels = np.asarray(examples.labels)
        if labels.ndim != 2 or not np.isin(labels, (0, 1)).all():
            raise ValueError(f"labels of shape {labels.shape}: give an array (n, L) of 0 and 1, a row for each example")
        return super().encode(examples, processor, max_length)

    def example(self, config: Any, num_labels: int, rows: int, size: int) -> dict[str, Tensor]:
        batch = super().example(config, num_labels, rows, size)
        return {**batch, "labels": batch["labels"][:, None].expand(-1, num_labels)}

    def named(self, label: Any, labels: Sequence[str]) -> str:
        found = np.flatnonzero(label)
        return ", ".join(labels[one] if labels else str(one) for one in found) or "(no label)"

    def losses(self, logits: Tensor, labels: Tensor, members: int) -> Tensor:
        logits = at_least_fp32(logits)
        each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        return each.view(members, -1).mean(1)

    def predictions(self, outputs: Tensor) -> Tensor:
        return (outputs > 0).long()

    def empty(self, data: Encoded, members: int) -> np.ndarray:
        return np.zeros((members, *data.labels.shape), np.int64)

    def scored(self, predictions: Any, labels: Any, offsets: None) -> tuple[tuple, int]:
        """Predicted labels and true ones, (n, L) of 0 and 1 both; predictions may be logits, which is what floats are."""
        predicted, true = as_array(predictions), as_array(labels)
        if predicted.shape != true.shape or true.ndim != 2:
            raise ValueError(f"predictions of shape {predicted.shape} for labels of shape {true.shape}")
        if not np.isfinite(predicted).all():
            raise Undefined("collapsed", "the model's outputs are not finite numbers")
        return ((predicted > 0).astype(np.int64), true.astype(np.int64)), len(true)
