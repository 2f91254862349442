"""One split of texts, tokenised: tokens are made once and kept flat, row i is ids[offsets[i]:offsets[i + 1]].

A split that is tokenised in pieces (`joined`) is kept in a file without a name once its arrays are large (`Growing`), so that
it takes the machine's memory only while there is some to spare.
"""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.data.questions import Questions

IGNORED = -100  # the label of a token that is not scored (torch's cross-entropy default)
IN_MEMORY = 1 << 26  # bytes to which an array grows before it goes to disk
BLOCK = 1 << 22  # entries of an array that are hashed at once


class Growing:
    """An array that grows at its end: in memory while it is small, then in a file that is gone when nobody reads it."""

    def __init__(self):
        self._parts: list[np.ndarray] = []
        self._size, self._file = 0, None

    def add(self, part: np.ndarray) -> None:
        """part: (n, ...), of one type and of the same further axes as those before it."""
        self._dtype, self._shape = part.dtype, part.shape[1:]
        self._size += len(part)
        self._parts.append(np.ascontiguousarray(part))
        if self._file is None and sum(one.nbytes for one in self._parts) > IN_MEMORY:
            from rankwise.experiments import sources

            folder = sources.cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (the array outlives this object)
        if self._file is not None:
            for one in self._parts:
                one.tofile(self._file)
            self._parts = []

    def array(self) -> np.ndarray:
        if self._file is None:
            return np.concatenate(self._parts)
        self._file.flush()
        return np.memmap(self._file, self._dtype, mode="r", shape=(self._size, *self._shape))


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
    def largest_token(self) -> int:
        return int(self.ids.max())

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
            if array is None:
                yield b"-"
                continue
            yield from (array[at : at + BLOCK].tobytes() for at in range(0, len(array), BLOCK))
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


def joined(parts: Iterator[Encoded]) -> Encoded:
    """Pieces of one split, one after the other: those of all kinds that make each row of one example alone.

    Of further fields of a kind the arrays and tuples are put one after the other as well; of numbers the largest counts.
    """
    first = next(parts)
    second = next(parts, None)
    if second is None:
        return first
    flat = {name: Growing() for name in ("ids", "labels", "token_type_ids") if getattr(first, name) is not None}
    own = {one.name: [] for one in fields(first)[len(fields(Encoded)) :]}
    lengths = []
    for part in itertools.chain((first, second), parts):
        for name, growing in flat.items():
            growing.add(getattr(part, name))
        lengths.append(part.lengths)
        for name, values in own.items():
            values.append(getattr(part, name))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    further = {name: _merged(values) for name, values in own.items()}
    return replace(first, offsets=offsets, **{name: growing.array() for name, growing in flat.items()}, **further)


def _merged(values: Sequence[Any]) -> Any:
    if isinstance(values[0], np.ndarray):
        return np.concatenate(values)
    return tuple(itertools.chain.from_iterable(values)) if isinstance(values[0], tuple) else max(values)
