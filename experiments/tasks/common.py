"""What every task shares: examples, their tokens on disk, the plan of lengths, padding, and the metrics.

Tokens are made once and kept flat: row i of a split is ids[offsets[i]:offsets[i + 1]].

The plan of lengths cuts the rows, sorted by length, into shelves of 8 batches. The order of the steps over the shelves
depends on the epoch alone, so that the padded length of each step is the same for every seed and members of other seeds
can be packed without waste; which rows of a shelf come in which of its batches is drawn for each seed. All draws are
counter-based (Philox), so that any step of any epoch can be computed from nothing.
"""

import functools
import hashlib
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rankwise.experiments import catalogue, files
from rankwise.experiments.tasks import spans
from rankwise.experiments.tasks.spans import Questions

FORMAT = 1  # raise it when the tokens kept on disk change their meaning
SHELF = 8  # batches of similar length that each seed shuffles among themselves
MULTIPLE = 4  # lengths are rounded up to it: few distinct shapes, little padding
SPLIT_SEED = 0  # of every part that we carve ourselves; a constant, so that everyone has the same parts
RESAMPLES = 200  # of a bootstrap: its standard error is then known to about 5 %
ACCURACIES = ("accuracy", "exact_match")  # metrics that are a share of the rows, whose standard error is binomial
IGNORED = -100  # the label of a token that is not scored (torch's cross-entropy default)


class Undefined(ArithmeticError):
    """A metric that has no value: error is the name for result.json ("collapsed"), detail says which and why."""

    def __init__(self, error: str, detail: str):
        self.error, self.detail = error, detail
        super().__init__(f"{error}: {detail}")


@dataclass(frozen=True)
class Examples:
    """One split as read: n texts (or n lists of words), their partners if the task is about pairs, and n labels.

    Of a task about spans: questions, contexts, and as labels the first character of each right answer (n arrays); answers
    has their texts, a tuple for each question, ids the names of the questions.
    """

    first: list
    second: list | None
    labels: np.ndarray | list[np.ndarray]
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
        numbers = [np.round(one.astype(np.float64), 4).tolist() for one in labels]
        parts = [self.first, self.second, numbers] + ([] if self.answers is None else [self.answers, self.ids])
        text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).hexdigest()


@dataclass(frozen=True, eq=False)
class Encoded:
    """One split, tokenised: n rows in flat storage.

    ids: (total,) int32. offsets: (n + 1,) int64. token_type_ids: (total,) int8 or None.
    labels: (n,) float32 for a regression, (n,) int64 for classes, (total,) int64 aligned with ids for token classes,
    (n, 2) int64 for spans: the tokens of a row at which its answer starts and ends.
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

    def random_part(self, examples: int | None, key: int) -> "Encoded":
        """A fixed random part of so many examples, the same for every method and seed; all where there are no more."""
        if examples is None or examples >= self.num_examples:
            return self
        return self.select_examples(np.sort(shuffled(self.num_examples, 0, key)[:examples]))

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


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: what it is, how its splits are read, how predictions are scored.

    kind: a name of KINDS. metric: the name of the primary metric. sizes: rows of each split, known before any download, or
    None (as where a tokenizer decides about them).
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
    data: str | None = None  # name in the catalogue, where it has one

    def __post_init__(self) -> None:
        if self.resampled is None and self.metric not in ACCURACIES:
            raise ValueError(f"{self.name}: {self.metric} is no share of the rows; say how it is resampled (`resampled`)")

    def load(self, splits: Iterable[str] | None = None) -> dict[str, Examples]:
        """The examples of these splits (all, where none are named), fetched where the cache has none."""
        chosen = list(self.splits if splits is None else splits)
        for split in chosen:
            self._check_split(split)
        return {split: self._checked(split) for split in chosen}

    def data_hash(self) -> str:
        """The identity of the raw data; for a task of the catalogue known before any download."""
        return self.identity()

    def encode(self, tokenizer: Any, split: str, max_length: int) -> Encoded:
        """The tokens of a split, made once and kept in the user's cache.

        max_length: in tokens, special ones included; longer rows are cut (of a pair the longer text first). Words of a
        token classification that are cut off are not scored.
        """
        self._check_split(split)
        _check_tokenizer(tokenizer, max_length, self)
        parts = [
            FORMAT,
            SPLIT_SEED,
            self.name,
            self.kind,
            split,
            max_length,
            tokenizer_hash(tokenizer),
            self.data_hash(),
        ]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        path = catalogue.cache_folder() / "encoded" / f"{self.name.replace('/', '--')}-{split}-{key}.npz"
        kept = _read_encoded(path, max_length, self.kind)
        if kept is not None:
            return kept
        encoded = encode_examples(self._checked(split), self.kind, tokenizer, max_length)
        _write_encoded(path, encoded)
        return encoded

    def metrics(self, predictions: Any, labels: Any, offsets: np.ndarray | None = None) -> dict[str, float]:
        """Every metric of the task, in points (0..100; correlations times 100).

        predictions: regression (n,) or (n, 1); classes (n, C) scores or (n,) whole numbers; token classes: n rows of
        (length, C) or (length,), as a list or padded to one length, or all rows flat with `offsets` (n + 1,); spans
        (total, 2) start and end score of each token, flat with `offsets`.
        labels: the same shape without C; a token labelled -100 is not scored. For spans the split's Questions.
        (`Encoded.truth` gives labels and offsets as they are needed here, whatever the kind.)
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
        scored, num_examples = KINDS[self.kind].scored(predictions, labels, offsets)
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

    def _checked(self, split: str) -> Examples:
        examples = self.read(split)
        if not len(examples):
            raise ValueError(f"{self.name}: the split {split} is empty; at least one example is needed")
        if self.sizes is not None and len(examples) != self.sizes[split]:
            raise ValueError(f"{self.name}: {len(examples)} examples in {split} where {self.sizes[split]} are the rule")
        return examples


# --------------------------------------------------------------------------------------------------------- reading


def lines_of(path: Path) -> list[str]:
    """The lines of a text file, cut at line feeds only (texts may hold other separators), the last one not empty.

    Raises: ValueError: the file is empty or not UTF-8; names file and line, shows no text.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise malformed(path, data.count(b"\n", 0, error.start) + 1, "not UTF-8") from None
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{path.name}: the file is empty; at least one example is needed")
    return lines


def malformed(path: Path, line: int, rule: str) -> ValueError:
    """The error for a data file that breaks its format. It never shows the text itself."""
    return ValueError(f"{path.name}, line {line}: {rule}; remove the file from {path.parent} to fetch it anew")


def hub_columns(name: str, path: str, config: str | None, split: str, tried: list[str], revision: str | None = None) -> dict:
    """The columns of one split of a data set on the hub, through `datasets` (its cache first).

    Raises: Unavailable: with what was tried before (`tried`) and why the hub did not help.
    """
    if not _datasets_cache_may_hold(path) and (reason := catalogue.hub_out_of_reach()):
        raise catalogue.Unavailable(name, [*tried, f"hub ({path}): {reason}"])
    try:
        import datasets

        with _quiet_datasets(datasets):
            rows = datasets.load_dataset(path, config, split=split, revision=revision)
        return {column: list(rows[column]) for column in rows.column_names}
    except Exception as error:  # the client's errors differ between versions; all of them mean: not from there
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise catalogue.Unavailable(name, [*tried, f"hub ({path}): {reason}"]) from None


def _datasets_cache_may_hold(path: str) -> bool:
    cache = os.environ.get("HF_DATASETS_CACHE") or catalogue.huggingface_home() / "datasets"
    return (Path(cache).expanduser() / path.replace("/", "___")).is_dir()


def check_pinned(name: str, examples: Examples, sha256: str, path: str, tried: list[str]) -> Examples:
    """The hub's copy of data that we pin, taken only where texts and labels are the same."""
    if examples.content_hash() != sha256:
        raise catalogue.Unavailable(name, [*tried, f"hub ({path}): its texts or labels differ from the pinned ones"])
    return examples


class _quiet_datasets:
    """Progress bars of `datasets` only on a terminal."""

    def __init__(self, datasets: Any):
        self.datasets = datasets
        self.silence = not sys.stderr.isatty() and datasets.utils.logging.is_progress_bar_enabled()

    def __enter__(self) -> None:
        if self.silence:
            self.datasets.utils.logging.disable_progress_bar()

    def __exit__(self, *_: Any) -> None:
        if self.silence:
            self.datasets.utils.logging.enable_progress_bar()


# ----------------------------------------------------------------------------------------------------------- draws


def shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) that depends on `key` (up to 4 whole numbers, 0 <= each < 2**64) and nothing else.

    It sorts the raw draws of Philox, which numpy promises not to change (its Generator methods it may).
    """
    for number in key:
        if not 0 <= number < 2**64:
            raise ValueError(f"seed {number} must be a whole number from 0 to 2**64 - 1")
    seed, purpose, major, minor = (*key, 0, 0, 0)[:4]
    counter, keys = (np.array(numbers, dtype=np.uint64) for numbers in ([0, 0, minor, major], [seed, purpose]))
    draws = np.random.Philox(key=keys, counter=counter).random_raw(count)
    return np.argsort(draws, kind="stable")


def carve(labels: np.ndarray, size: int) -> np.ndarray:
    """(n,) bool, True for `size` rows that make a validation part: drawn once and for all, each class by its share."""
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * (size / len(labels))
    take = np.floor(exact).astype(np.int64)
    rest = np.argsort(-(exact - take), kind="stable")[: size - int(take.sum())]
    take[rest] += 1
    chosen = np.zeros(len(labels), dtype=bool)
    for index, (value, number) in enumerate(zip(classes, take, strict=True)):
        rows = np.flatnonzero(labels == value)
        chosen[rows[shuffled(len(rows), SPLIT_SEED, 3, index)[:number]]] = True
    return chosen


# ------------------------------------------------------------------------------------------------------- tokenising


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 over everything of a fast tokenizer that decides about tokens; not over how it was last called."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    parts = [state, tokenizer.truncation_side, list(tokenizer.model_input_names)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check_tokenizer(tokenizer: Any, max_length: int, task: Task) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"the tokenizer {type(tokenizer).__name__} has no fast version, which is needed here")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 8:
        raise ValueError(f"max_length {max_length!r} must be a whole number of at least 8 tokens")
    if max_length > tokenizer.model_max_length:
        raise ValueError(f"max_length {max_length} is above the {tokenizer.model_max_length} tokens this model takes")


def encode_examples(examples: Examples, kind: str, tokenizer: Any, max_length: int) -> Encoded:
    """The tokens of these examples; see Encoded for what comes out."""
    return KINDS[kind].encode(examples, tokenizer, max_length)


def _encode_rows(examples: Examples, tokenizer: Any, max_length: int, label_type: type) -> Encoded:
    """One row for each example, with a label of its own."""
    _, ids, offsets, types = _tokenized(examples, tokenizer, max_length, words=False)
    return Encoded(ids, offsets, types, np.asarray(examples.labels, dtype=label_type), max_length)


def _encode_words(examples: Examples, tokenizer: Any, max_length: int) -> Encoded:
    """One row for each list of words, with a label for each word."""
    batch, ids, offsets, types = _tokenized(examples, tokenizer, max_length, words=True)
    return Encoded(ids, offsets, types, _token_labels(examples.labels, batch, offsets), max_length, is_by_token=True)


def _encode_windows(examples: Examples, tokenizer: Any, max_length: int) -> Encoded:
    """One row for each window of a question's context."""
    rows = list(spans.windows(examples.first, examples.second, examples.labels, examples.answers, tokenizer, max_length))
    offsets = np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int64)
    types = None if rows[0].types is None else np.concatenate([row.types for row in rows])
    questions = Questions(
        np.array([row.question for row in rows], dtype=np.int64),
        np.concatenate([row.characters for row in rows]),
        list(examples.ids),
        list(examples.second),
        list(examples.answers),
    )
    labels = np.array([row.labels for row in rows], dtype=np.int64)
    return Encoded(np.concatenate([row.ids for row in rows]), offsets, types, labels, max_length, questions=questions)


def _tokenized(
    examples: Examples, tokenizer: Any, max_length: int, words: bool
) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray | None]:
    """One batch call: what the tokenizer said, and its ids, offsets and types in flat storage."""
    wants_types = "token_type_ids" in tokenizer.model_input_names
    batch = tokenizer(
        examples.first,
        examples.second,
        truncation=True,
        max_length=max_length,
        padding=False,
        is_split_into_words=words,
        return_attention_mask=False,
        return_token_type_ids=wants_types,
        verbose=False,
    )
    rows = batch["input_ids"]
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    if not lengths.all():
        raise ValueError(f"example {int(np.argmin(lengths)) + 1} has no tokens at all")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = _flat(rows, np.int32, offsets[-1])
    return batch, ids, offsets, _flat(batch["token_type_ids"], np.int8, offsets[-1]) if wants_types else None


def _flat(rows: Iterable[Iterable[int]], dtype: type, total: int) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(rows), dtype=dtype, count=int(total))


def _token_labels(labels: Sequence[np.ndarray], batch: Any, offsets: np.ndarray) -> np.ndarray:
    """(total,) the label of each word at its first token, -100 at every other token."""
    out = np.full(int(offsets[-1]), IGNORED, dtype=np.int64)
    for row, of_words in enumerate(labels):
        words = np.array([-1 if word is None else word for word in batch.word_ids(row)], dtype=np.int64)
        first = (words >= 0) & (words != np.concatenate([[-1], words[:-1]]))
        out[offsets[row] : offsets[row + 1]][first] = of_words[words[first]]
    return out


def _read_encoded(path: Path, max_length: int, kind: str) -> Encoded | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            types = file.get("token_type_ids")
            questions = Questions.from_arrays(file) if "question_texts" in file else None
            by_token = KINDS[kind].of_words
            return Encoded(file["ids"], file["offsets"], types, file["labels"], max_length, by_token, questions)
    except FileNotFoundError:
        return None
    except Exception:  # whatever a damaged archive raises: make it anew
        return None


def _write_encoded(path: Path, encoded: Encoded) -> None:
    arrays = {"ids": encoded.ids, "offsets": encoded.offsets, "labels": encoded.labels}
    if encoded.token_type_ids is not None:
        arrays["token_type_ids"] = encoded.token_type_ids
    if encoded.questions is not None:
        arrays |= encoded.questions.arrays()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    try:
        files.write_file(path, buffer.getvalue())
    except OSError as error:  # the tokens are in memory; only the next start is slower
        with suppress(OSError):
            print(f"tokens are not kept: {error.strerror or error} in {path.parent}", file=sys.stderr)


# --------------------------------------------------------------------------------------------- the plan of lengths


def num_steps(num_rows: int, batch_size: int) -> int:
    """Batches an epoch; the last one may be short."""
    return -(-num_rows // batch_size)


def batches(encoded: Encoded, batch_size: int, seed: int, epoch: int) -> list[tuple[np.ndarray, int]]:
    """The steps of one epoch for one seed: (row indices, planned length) of each.

    Every row comes once. The number of rows and the planned length of a step are the same for every seed.
    """
    _check_batch_size(batch_size)
    order = np.argsort(encoded.lengths, kind="stable")
    lengths = encoded.lengths[order]
    width = SHELF * batch_size
    steps = []
    for shelf, start in enumerate(range(0, len(order), width)):
        rows = order[start : start + width]
        rows = rows[shuffled(len(rows), seed, 1, epoch, shelf)]
        length = planned_length(int(lengths[start : start + width][-1]), encoded.max_length)
        steps += [(rows[at : at + batch_size], length) for at in range(0, len(rows), batch_size)]
    return [steps[step] for step in shuffled(len(steps), 0, 2, epoch)]


def evaluation_batches(encoded: Encoded, batch_size: int) -> list[tuple[np.ndarray, int]]:
    """Every row once, sorted by length, nothing shuffled: (row indices, length) of each batch."""
    _check_batch_size(batch_size)
    lengths = encoded.lengths
    order = np.argsort(lengths, kind="stable")
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [(rows, planned_length(int(lengths[rows[-1]]), encoded.max_length)) for rows in parts]


def planned_length(longest: int, max_length: int) -> int:
    """The longest row rounded up to a multiple of 8, and never above max_length."""
    return min(-(-longest // MULTIPLE) * MULTIPLE, max_length)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")


def collate(encoded: Encoded, rows: np.ndarray, length: int, pad_id: int) -> dict[str, np.ndarray]:
    """These rows, padded on the right: input_ids, attention_mask, token_type_ids (if any) (rows, length), labels.

    Labels are (rows,), or (rows, length) with -100 at the padding for token classes, or (rows, 2) for spans.
    """
    rows = np.asarray(rows, dtype=np.int64)
    lengths = encoded.lengths[rows]
    if len(rows) and int(lengths.max()) > length:
        raise ValueError(f"a row of {int(lengths.max())} tokens does not fit the planned length {length}")
    positions = np.arange(length)
    mask = positions < lengths[:, None]  # (rows, length)
    flat = (encoded.offsets[rows][:, None] + positions)[mask]

    def padded(values: np.ndarray, filler: int) -> np.ndarray:
        out = np.full(mask.shape, filler, dtype=np.int64)
        out[mask] = values[flat]
        return out

    batch = {"input_ids": padded(encoded.ids, pad_id), "attention_mask": mask.astype(np.int64)}
    if encoded.token_type_ids is not None:
        batch["token_type_ids"] = padded(encoded.token_type_ids, 0)
    batch["labels"] = padded(encoded.labels, IGNORED) if encoded.is_by_token else encoded.labels[rows]
    return batch


# ----------------------------------------------------------------------------------------------------------- metrics


def _array(values: Any) -> np.ndarray:
    """A numpy array of anything array-like, torch tensors of any precision included."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values  # numpy knows no bf16
    return np.asarray(values)


def _classes(values: np.ndarray) -> np.ndarray:
    """Scores (n, C), or classes (n,) themselves, to classes (n,)."""
    if values.ndim == 1 and np.issubdtype(values.dtype, np.integer):
        return values.astype(np.int64)
    if values.ndim != 2:
        raise ValueError(f"predictions of shape {values.shape} and type {values.dtype} are neither scores nor classes")
    if not np.isfinite(values).all():
        raise Undefined("collapsed", "the model's outputs are not finite numbers")
    return values.argmax(-1)


def _scored_rows(predictions: np.ndarray, labels: Any) -> tuple[tuple[np.ndarray, np.ndarray], int]:
    labels = _array(labels).reshape(-1)
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    return (predictions, labels), len(labels)


def _scored_numbers(predictions: Any, labels: Any, offsets: None) -> tuple[tuple, int]:
    return _scored_rows(_array(predictions).reshape(-1).astype(np.float64), labels)


def _scored_classes(predictions: Any, labels: Any, offsets: None) -> tuple[tuple, int]:
    return _scored_rows(_classes(_array(predictions)), labels)


def _scored_tokens(predictions: Any, labels: Any, offsets: np.ndarray | None) -> tuple[tuple, int]:
    """Scored tokens of all rows, flat: (predicted classes, true classes, the row that each belongs to)."""
    if offsets is not None:
        true = _array(labels).astype(np.int64)
        predicted = _classes(_array(predictions))
        row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    else:
        rows_true = [_array(row).astype(np.int64) for row in labels]
        if any(row.ndim == 0 for row in rows_true):
            raise ValueError("flat token labels need `offsets`, which say where each row ends")
        rows_predicted = [_classes(_array(row)) for row in predictions]
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


def _scored_spans(predictions: Any, labels: Questions, offsets: np.ndarray) -> tuple[tuple, int]:
    """The text of each question's best span, how far having no answer scores above it, and the questions."""
    scores = _array(predictions)
    if not np.isfinite(scores).all():
        raise Undefined("collapsed", "the model's outputs are not finite numbers")
    return (*spans.best(scores, labels, offsets), labels), len(labels)


def correlations(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Pearson, Spearman and their mean, in points."""
    from scipy.stats import rankdata

    if not np.isfinite(predicted).all():
        raise Undefined("collapsed", "the model's outputs are not finite numbers")
    true = true.astype(np.float64)
    # A model that ignores its input still differs by rounding between batches: 1e-6 is 8 times float32's epsilon.
    if np.ptp(predicted) <= 1e-6 * np.abs(predicted).max():
        raise Undefined("collapsed", f"the model predicts one value for all {len(predicted)} rows")
    if np.ptp(true) == 0:
        raise Undefined("collapsed", f"all {len(true)} labels are equal, so that a correlation has no value")

    def pearson(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - a.mean(), b - b.mean()
        a, b = a / np.abs(a).max(), b / np.abs(b).max()
        return 100 * float(np.clip((a @ b) / math.sqrt((a @ a) * (b @ b)), -1, 1))

    linear = pearson(predicted, true)
    by_rank = pearson(rankdata(predicted), rankdata(true))
    return {"pearson": linear, "spearman": by_rank, "pearson_spearman": (linear + by_rank) / 2}


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    return 100 * float((predicted == true).mean())


def accuracy_and_macro_f1(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Accuracy, and the mean of the F1 of each class that occurs among labels or predictions."""
    from sklearn.metrics import f1_score

    return {
        "accuracy": accuracy(predicted, true),
        "macro_f1": 100 * float(f1_score(true, predicted, average="macro", zero_division=0)),
    }


def accuracy_and_f1(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Accuracy, the F1 of class 1, and their mean, as GLUE scores MRPC and QQP."""
    from sklearn.metrics import f1_score

    share, f1 = accuracy(predicted, true), 100 * float(f1_score(true, predicted, zero_division=0))
    return {"accuracy": share, "f1": f1, "accuracy_f1": (share + f1) / 2}


def matthews(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Matthews' correlation (0 / 0 where one class only is predicted, so undefined there) and accuracy."""
    from sklearn.metrics import matthews_corrcoef

    if len(np.unique(predicted)) < 2 or len(np.unique(true)) < 2:
        raise Undefined("collapsed", f"one class for all {len(true)} rows, so that Matthews' correlation has no value")
    return {"matthews": 100 * float(matthews_corrcoef(true, predicted)), "accuracy": accuracy(predicted, true)}


# ------------------------------------------------------------------------------------------------------- resampling


def resample_weights(num_rows: int) -> np.ndarray:
    """(B, N) how often each of N rows comes in each of B bootstrap resamples; the same at every call."""
    drawn = np.random.default_rng(0).integers(num_rows, size=(RESAMPLES, num_rows))
    flat = (drawn + num_rows * np.arange(RESAMPLES)[:, None]).ravel()
    return np.bincount(flat, minlength=RESAMPLES * num_rows).reshape(RESAMPLES, num_rows)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, and 0 where that is 0 / 0."""
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=whole != 0)


def resampled_correlations(predicted: np.ndarray, true: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,) the mean of Pearson and Spearman on each resample."""
    true = true.astype(np.float64)
    linear = _weighted_pearson(predicted, true, weights)
    by_rank = _weighted_pearson(_weighted_ranks(predicted, weights), _weighted_ranks(true, weights), weights)
    return (linear + by_rank) / 2


def _weighted_pearson(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,) in points; a and b: (N,), or (B, N) where they differ between the resamples."""
    a, b = ((x - (weights * x).sum(1, keepdims=True) / weights.sum(1, keepdims=True)) for x in (a, b))  # (B, N)
    products = [(weights * x * y).sum(1) for x, y in ((a, b), (a, a), (b, b))]
    return 100 * np.clip(ratio(products[0], np.sqrt(products[1] * products[2])), -1, 1)


def _weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B, N) the rank of each row among the rows of each resample, the mean rank where values are equal."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.add.reduceat(weights[:, order], starts, axis=1)  # (B, distinct values)
    ranks = np.cumsum(sizes, axis=1) - (sizes - 1) / 2
    return ranks[:, group]


def resampled_matthews(predicted: np.ndarray, true: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,) Matthews' correlation of two classes on each resample: Pearson's of the two 0/1 columns."""
    return _weighted_pearson(predicted.astype(np.float64), true.astype(np.float64), weights)


# ------------------------------------------------------------------------------------------------------------- kinds


@dataclass(frozen=True)
class Kind:
    """What there is to know of a kind of task, its loss aside (experiments/objective.py).

    model: the class of transformers that has the head. encode: (examples, tokenizer, max_length) -> Encoded.
    scored: (predictions, labels, offsets), as `Task.metrics` takes them -> (what `Task.measure` takes, its examples).
    predictions: numpy type and shape of what is predicted for one row, or one token (by_token).
    """

    model: str
    encode: Callable[[Examples, Any, int], Encoded]
    scored: Callable[[Any, Any, np.ndarray | None], tuple[tuple, int]]
    predictions: tuple[type, tuple[int, ...]]
    by_token: bool = False
    of_words: bool = False  # texts come as lists of words, each with a label
    problem_type: str | None = None  # of the model's configuration


KINDS = {
    "regression": Kind(
        "AutoModelForSequenceClassification",
        functools.partial(_encode_rows, label_type=np.float32),
        _scored_numbers,
        (np.float64, ()),
        problem_type="regression",
    ),
    "classification": Kind(
        "AutoModelForSequenceClassification",
        functools.partial(_encode_rows, label_type=np.int64),
        _scored_classes,
        (np.int64, ()),
        problem_type="single_label_classification",
    ),
    "token-classification": Kind(
        "AutoModelForTokenClassification", _encode_words, _scored_tokens, (np.int64, ()), by_token=True, of_words=True
    ),
    "span": Kind("AutoModelForQuestionAnswering", _encode_windows, _scored_spans, (np.float32, (2,)), by_token=True),
}
