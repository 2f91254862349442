"""What a task is: how its splits are read, how predictions are scored.  How its rows are encoded is its kind's business."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rankwise.experiments import kinds
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.kinds import Undefined
from rankwise.experiments.tasks.metrics import resample_weights

ACCURACIES = ("accuracy", "exact_match")  # metrics that are a share of the rows, whose standard error is binomial


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: what it is, how its splits are read, how predictions are scored.

    kind: a name of `kinds.names()`. metric: the name of the primary metric. sizes: rows of each split, known before any
    download, or None (as where a tokenizer decides about them); about: then about how many, for plans.
    read: split -> Examples. measure: (predictions, labels) -> {name: points}. identity: -> hash of the raw data.
    train_split, selection_split, score_split: trained on, chosen on, reported. official_train_split: every row that the
    data set's authors gave for training, nothing kept out; dev_split: their development part. Papers that report the
    best epoch on the development part use these two. extra_dev_splits: further development parts, scored beside it.
    resampled: (what `measure` takes, weights (B, N)) -> (B,) the primary metric of B resamples of the N rows, in points;
    None where that metric is a share of the rows.
    caption: the sentences that every report of this task must carry, captions_by_model: further ones for a model's.
    """

    name: str
    kind: str
    num_labels: int
    metric: str
    licence: str
    read: Callable[[str], Examples]
    measure: Callable[..., dict[str, float]]
    identity: Callable[[], str]
    label_names: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train", "validation", "test")
    train_split: str = "train"
    official_train_split: str = "train"
    selection_split: str = "validation"
    score_split: str = "test"
    dev_split: str = "validation"
    extra_dev_splits: tuple[str, ...] = ()
    resampled: Callable[..., np.ndarray] | None = None
    caption: tuple[str, ...] = ()
    captions_by_model: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: Mapping[str, int] | None = None
    about: Mapping[str, int] = field(default_factory=dict)
    data: str | None = None  # name in the catalogue, where it has one

    def __post_init__(self) -> None:
        kinds.check(self.kind)
        if self.resampled is None and self.metric not in ACCURACIES:
            raise ValueError(f"{self.name}: {self.metric} is no share of the rows; say how it is resampled (`resampled`)")

    def load(self, splits: Iterable[str] | None = None) -> dict[str, Examples]:
        """The examples of these splits (all, where none are named), fetched where the cache has none."""
        chosen = list(self.splits if splits is None else splits)
        for split in chosen:
            self._check_split(split)
        return {split: self.examples(split) for split in chosen}

    def rows_of(self, split: str) -> int:
        """How many rows a split has, or about how many, without reading it.

        Raises:
            ValueError: it is not known before the data is read.
        """
        found = (self.sizes or self.about).get(split)
        if found is None:
            raise ValueError(f"{self.name} does not say how many rows {split} has before it is read")
        return found

    def pieces(self, split: str) -> Iterator[Examples]:
        """The examples of a split one after the other, in pieces that fit in memory."""
        yield self.examples(split)

    def data_hash(self) -> str:
        """The identity of the raw data; for a task of the catalogue known before any download."""
        return self.identity()

    def facts(self) -> Mapping[str, Any]:
        """What tells its runs from others beside its name and its encoded rows: of a user's own data how it is read."""
        return {}

    def record(self) -> Mapping[str, Any]:
        """What a run writes down of its task, so that it can be understood where its data is no longer at hand."""
        return {}

    def encode(self, processor: Any, split: str, max_length: int) -> Dataset:
        """The rows of a split as a model takes them (of text: tokens, made once and kept in the user's cache).

        processor: what `models.load` gives beside the model: of text its tokenizer.
        max_length: in tokens, special ones included; longer rows are cut (of a pair the longer text first). Words of a
        token classification that are cut off are not scored.
        """
        self._check_split(split)
        return kinds.get(self.kind).encode_split(self, split, processor, max_length)

    def metrics(self, predictions: Any, labels: Any, offsets: np.ndarray | None = None) -> dict[str, float]:
        """Every metric of the task, in points (0..100; correlations times 100).

        predictions: regression (n,) or (n, 1); classes (n, C) scores or (n,) whole numbers; several labels (n, L)
        logits or 0 and 1; token classes: n rows of
        (length, C) or (length,), as a list or padded to one length, or all rows flat with `offsets` (n + 1,); spans
        (total, 2) start and end score of each token, flat with `offsets`.
        labels: the same shape without C; a token labelled -100 is not scored. For spans the split's Questions.
        (`Dataset.truth` gives labels and offsets as they are needed here, whatever the kind.)
        Raises: Undefined: a metric has no value, as where a regression predicts one value for every row.
        """
        scored, _ = self._scored(predictions, labels, offsets)
        return self._measured(scored)

    def standard_error(self, predictions: Any, labels: Any, offsets: np.ndarray | None = None) -> float:
        """The standard error of the primary metric, in points: how far it would stray with other rows of the same kind.

        100 sqrt(p (1 - p) / N) where the metric is a share p of N rows, else the standard deviation over 200 bootstrap
        resamples of the rows (whole sentences where the labels are the words', questions where there are windows), drawn
        with a fixed seed.
        Takes and raises what `metrics` does. A resample on which the metric is 0 / 0 counts as 0.
        """
        scored, num_examples = self._scored(predictions, labels, offsets)
        score = self._measured(scored)[self.metric]
        if self.resampled is None:
            return math.sqrt(score * (100 - score) / num_examples)
        return float(np.std(self.resampled(*scored, resample_weights(num_examples)), ddof=1))

    def _scored(self, predictions: Any, labels: Any, offsets: np.ndarray | None) -> tuple[tuple, int]:
        """What `measure` takes, and the number of examples that it is about."""
        scored, num_examples = kinds.get(self.kind).scored(predictions, labels, offsets)
        if not len(scored[0]):
            raise ValueError(f"no predictions to score for {self.name}")
        return scored, num_examples

    def _measured(self, scored: tuple) -> dict[str, float]:
        values = {name: float(value) for name, value in self.measure(*scored).items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise Undefined("collapsed", f"{name} of {self.name} is not a finite number")
        return values

    def _check_split(self, split: str) -> None:
        if split not in self.splits:
            raise ValueError(f'{self.name} has no split "{split}"; it has {", ".join(self.splits)}')

    def examples(self, split: str) -> Examples:
        """The examples of one split, as many as there should be."""
        examples = self.read(split)
        if not len(examples):
            raise ValueError(f"{self.name}: the split {split} is empty; at least one example is needed")
        if self.sizes is not None and len(examples) != self.sizes[split]:
            raise ValueError(f"{self.name}: {len(examples)} examples in {split}, expected {self.sizes[split]}")
        return examples
