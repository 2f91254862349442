"""One split of texts, tokenised: tokens are made once and kept flat, row i is ids[offsets[i]:offsets[i + 1]]."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.data.questions import Questions

IGNORED = -100  # the label of a token that is not scored (torch's cross-entropy default)


@dataclass(frozen=True, eq=False)
class Encoded(Dataset):
    """One split, tokenised: n rows in flat storage.

    ids: (total,) int32. offsets: (n + 1,) int64. token_type_ids: (total,) int8 or None.
    labels: (n,) float32 for a regression, (n,) int64 for classes, (n, L) float32 of 0 and 1 for any number of L labels,
    (total,) int64 aligned with ids for token classes, (n, 2) int64 for spans: the tokens of a row at which its answer starts
    and ends.
    questions: for spans, what the rows are windows of; an example is a question there, and a row anywhere else.
    """

    ids: np.ndarray
    offsets: np.ndarray
    token_type_ids: np.ndarray | None
    labels: np.ndarray
    max_length: int
    is_by_token: bool = False  # labels aligned with ids
    questions: Questions | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(n,) number of tokens of each row."""
        return np.diff(self.offsets)

    @property
    def num_examples(self) -> int:
        """How many examples the rows are of: what scores are means over, and what a part of a split is drawn from."""
        return len(self) if self.questions is None else len(self.questions)

    @property
    def truth(self) -> tuple[Any, np.ndarray | None]:
        """What predictions are scored against: (labels, offsets) of `Task.metrics`."""
        by_token = self.is_by_token or self.questions is not None
        return self.labels if self.questions is None else self.questions, self.offsets if by_token else None

    def select_examples(self, examples: Sequence[int] | np.ndarray) -> "Encoded":
        """All rows of these examples alone, in this order (of a split of questions: in the split's)."""
        return self.select(examples if self.questions is None else np.flatnonzero(np.isin(self.questions.rows, examples)))

    def content(self) -> Iterator[bytes]:
        """All that a run's results can depend on, for a hash."""
        for array in (self.ids, self.offsets, self.labels, self.token_type_ids):
            yield b"-" if array is None else np.ascontiguousarray(array).tobytes()
        if self.questions is not None:
            yield from (array.tobytes() for array in self.questions.arrays().values())

    def select(self, rows: Sequence[int] | np.ndarray) -> "Encoded":
        """These rows alone, in this order."""
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        flat = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        types = None if self.token_type_ids is None else self.token_type_ids[flat]
        labels = self.labels[flat] if self.is_by_token else self.labels[rows]
        questions = None if self.questions is None else self.questions.select(rows, flat)
        return Encoded(self.ids[flat], offsets, types, labels, self.max_length, self.is_by_token, questions)
