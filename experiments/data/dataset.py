"""One split of a task, encoded: what the loop, the fingerprint and the score need of it, whatever its rows are made of."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
from rankwise.experiments.data.draws import Purpose, shuffled


class Dataset(ABC):
    """n rows of m examples; a row is an example everywhere but where one example needs several rows (windows of a text).

    labels: the array that batches take their labels from; its first axis is that of the rows, or of all their tokens.
    """

    labels: np.ndarray

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @property
    def num_examples(self) -> int:
        """How many examples the rows are of: what scores are means over, and what a part of a split is drawn from."""
        return len(self)

    @property
    def truth(self) -> tuple[Any, np.ndarray | None]:
        """What predictions are scored against: (labels, offsets) of `Task.metrics`."""
        return self.labels, None

    @abstractmethod
    def content(self) -> Iterator[bytes]:
        """All that a run's results can depend on, for a hash."""

    @property
    def largest_token(self) -> int | None:
        """The largest number that stands for a token in any row; None where rows have no tokens."""
        return None

    def make(self) -> None:  # noqa: B027  (most rows are ready)
        """Makes what the rows need before a batch is taken of them and what takes long, such as decoding images."""

    @abstractmethod
    def select_examples(self, examples: Sequence[int] | np.ndarray) -> Self:
        """The rows of these examples alone."""

    def random_part(self, examples: int | None, purpose: Purpose) -> Self:
        """A fixed random part of so many examples, the same for every method and seed; all where there are no more."""
        if examples is None or examples >= self.num_examples:
            return self
        return self.select_examples(np.sort(shuffled(self.num_examples, 0, purpose)[:examples]))
