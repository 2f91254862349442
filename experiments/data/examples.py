"""Examples as they are read: texts or words, their partners, their labels."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Examples:
    """One split as read: n texts (or n lists of words), their partners if the task is about pairs, and n labels.

    Of a task about texts to generate the labels are the texts, and answers has all that are right, where there are several.
    Of a choice: questions, the options of each as answers, and as labels the index of the right one.
    Of a task about spans: questions, contexts, and as labels the first character of each right answer (n arrays); answers
    has their texts, a tuple for each question, ids the names of the questions.
    """

    first: list
    second: list | None
    labels: np.ndarray | list[np.ndarray] | list[str]
    answers: list[tuple[str, ...]] | None = None
    ids: list[str] | None = None

    def __len__(self) -> int:
        return len(self.first)

    def select(self, rows: Iterable[int]) -> "Examples":
        rows = [int(row) for row in rows]
        labels = self.labels[rows] if isinstance(self.labels, np.ndarray) else [self.labels[row] for row in rows]
        lists = (self.first, self.second, self.answers, self.ids)
        first, second, answers, ids = ([values[i] for i in rows] if values else values for values in lists)
        return Examples(first, second, labels, answers, ids)

    def content_hash(self) -> str:
        """sha256 over texts and labels (scores to four decimals), right answers and ids among them where there are any."""
        labels = self.labels if isinstance(self.labels, list) else [self.labels]
        numbers = [one if isinstance(one, str) else np.round(one.astype(np.float64), 4).tolist() for one in labels]
        parts = [self.first, self.second, numbers] + ([] if self.answers is None else [self.answers, self.ids])
        text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).hexdigest()
