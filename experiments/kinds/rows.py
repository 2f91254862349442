"""Texts, or pairs of texts, with one label each: a number (regression) or a class (classification)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rankwise.experiments.data import tokens
from rankwise.experiments.data.encoded import Encoded
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.kinds.interface import Seen, at_least_fp32
from rankwise.experiments.kinds.one_class import OneClass
from rankwise.experiments.kinds.predictions import as_array, by_row
from rankwise.experiments.kinds.text import Text, texts_of
from torch import Tensor
from torch.nn import functional as F


class Rows(Text):
    """A kind with one prediction for each text or pair; what is predicted and how it is labelled, a subclass says."""

    auto_class = "AutoModelForSequenceClassification"
    problem_type: str  # of the model's configuration
    label_type: type

    def model_settings(self, num_labels: int) -> dict[str, Any]:
        return {"num_labels": num_labels, "problem_type": self.problem_type}

    def example(self, config: Any, num_labels: int, rows: int, size: int) -> dict[str, Tensor]:
        batch = super().example(config, num_labels, rows, size)
        return {**batch, "labels": batch["labels"].float()} if self.label_type is np.float32 else batch

    def encode(self, examples: Examples, processor: Any, max_length: int) -> Encoded:
        _, ids, offsets, types = tokens.tokenized(examples, processor, max_length, words=False)
        return Encoded(ids, offsets, types, np.asarray(examples.labels, dtype=self.label_type), max_length)

    def seen(self, data: Encoded, row: int, processor: Any, labels: Sequence[str]) -> list[Seen]:
        texts = texts_of(processor, data.ids[data.offsets[row] : data.offsets[row + 1]])
        return [Seen(texts, (False,) * len(texts), label=self.named(data.labels[row], labels))]

    def named(self, label: Any, labels: Sequence[str]) -> str:
        """A label for people to read."""
        return f"{label:.6g}"


class Regression(Rows):
    """One number a row, by squared error. Labels (K*N,), logits (K*N, 1)."""

    problem_type, label_type = "regression", np.float32
    predicted = (np.float64, ())

    def losses(self, logits: Tensor, labels: Tensor, members: int) -> Tensor:
        logits = at_least_fp32(logits)
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="none").view(members, -1).mean(1)

    def predictions(self, outputs: Tensor) -> Tensor:
        return outputs.float().squeeze(-1)

    def scored(self, predictions: Any, labels: Any, offsets: None) -> tuple[tuple, int]:
        return by_row(as_array(predictions).reshape(-1).astype(np.float64), labels)


class Classification(OneClass, Rows):
    """One class a row, by cross-entropy. Labels (K*N,), logits (K*N, C)."""

    problem_type, label_type = "single_label_classification", np.int64
    predicted = (np.int64, ())

    def named(self, label: Any, labels: Sequence[str]) -> str:
        return labels[label] if labels else str(label)
