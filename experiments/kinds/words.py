"""Lists of words with a class for each word, such as the names in a sentence.

A word's label stands at its first token; its other tokens, and special ones, are labelled -100 and not scored.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import reduce
from rankwise.experiments.data import tokens
from rankwise.experiments.data.encoded import IGNORED, Encoded
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.kinds.interface import Seen, at_least_fp32
from rankwise.experiments.kinds.predictions import as_array, as_classes
from rankwise.experiments.kinds.text import ByToken, texts_of
from torch import Tensor
from torch.nn import functional as F


class Words(ByToken):
    """One class a word, by cross-entropy. Labels (K*N, L), logits (K*N, L, C)."""

    auto_class = "AutoModelForTokenClassification"
    predicted = (np.int64, ())
    of_words = True

    def encode(self, examples: Examples, processor: Any, max_length: int) -> Encoded:
        batch, ids, offsets, types = tokens.tokenized(examples, processor, max_length, words=True)
        labels = _token_labels(examples.labels, batch, offsets)
        return Encoded(ids, offsets, types, labels, max_length, is_by_token=True)

    def example(self, config: Any, num_labels: int, rows: int, size: int) -> dict[str, Tensor]:
        batch = super().example(config, num_labels, rows, size)
        return {**batch, "labels": torch.zeros_like(batch["input_ids"])}

    def lost(self, processor: Any) -> str:
        return "the words behind are neither read nor scored"

    def seen(self, data: Encoded, row: int, processor: Any, labels: Sequence[str]) -> list[Seen]:
        """A scored token has its word's label behind it, "token=label"."""
        own = slice(data.offsets[row], data.offsets[row + 1])
        texts, numbers = texts_of(processor, data.ids[own]), data.labels[own].tolist()
        names = {number: labels[number] if labels else str(number) for number in numbers if number != IGNORED}
        shown = (f"{text}={names[n]}" if n != IGNORED else text for text, n in zip(texts, numbers, strict=True))
        return [Seen(tuple(shown), tuple(number != IGNORED for number in numbers))]

    def losses(self, logits: Tensor, labels: Tensor, members: int) -> Tensor:
        flat, true = at_least_fp32(logits).flatten(0, 1), labels.flatten()
        loss = F.cross_entropy(flat, true, ignore_index=IGNORED, reduction="none")
        return loss.view(members, -1).sum(1) / self.counts(labels, members).clamp_min(1)

    def counts(self, labels: Tensor, members: int) -> Tensor:
        return reduce(labels != IGNORED, "(k n) l -> k", "sum", k=members)

    def predictions(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)

    def scored(self, predictions: Any, labels: Any, offsets: np.ndarray | None) -> tuple[tuple, int]:
        """Scored tokens of all rows, flat: (predicted classes, true classes, the row that each belongs to)."""
        if offsets is not None:
            true = as_array(labels).astype(np.int64)
            predicted = as_classes(as_array(predictions))
            row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        else:
            rows_true = [as_array(row).astype(np.int64) for row in labels]
            if any(row.ndim == 0 for row in rows_true):
                raise ValueError("flat token labels need `offsets`, which say where each row ends")
            rows_predicted = [as_classes(as_array(row)) for row in predictions]
            if [len(row) for row in rows_predicted] != [len(row) for row in rows_true]:
                raise ValueError("predictions and labels of the tokens differ in length")
            row = np.repeat(np.arange(len(rows_true)), [len(one) for one in rows_true])
            true = np.concatenate(rows_true) if rows_true else np.zeros(0, np.int64)
            predicted = np.concatenate(rows_predicted) if rows_predicted else np.zeros(0, np.int64)
        if not len(true) == len(predicted) == len(row):
            raise ValueError("predictions and labels of the tokens differ in length")
        scored = true != IGNORED
        num_rows = len(labels) if offsets is None else len(offsets) - 1
        return (predicted[scored], true[scored], row[scored]), num_rows


def _token_labels(labels: Sequence[np.ndarray], batch: Any, offsets: np.ndarray) -> np.ndarray:
    """(total,) the label of each word at its first token, -100 at every other token."""
    out = np.full(int(offsets[-1]), IGNORED, dtype=np.int64)
    for row, of_words in enumerate(labels):
        words = np.array([-1 if word is None else word for word in batch.word_ids(row)], dtype=np.int64)
        first = (words >= 0) & (words != np.concatenate([[-1], words[:-1]]))
        out[offsets[row] : offsets[row + 1]][first] = of_words[words[first]]
    return out
