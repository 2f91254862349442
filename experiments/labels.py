"""What the predictions of a study are scored against, in one small file beside study.json: labels.safetensors.

Runs keep their predictions, rows' labels are the same for all of them: with both, a report can score other rows than the
ones that happened to be in the test part (reports/rows.py), and knows what a constant predictor scores.

    {data hash}/{split}/labels    (n,) one a row, or (n, L); of words (tokens,) with -100 where none is scored; of a language
                                  model (n, 2)
    {data hash}/{split}/offsets   (n + 1,) of words alone: row i has tokens offsets[i] to offsets[i + 1]

and, as metadata, the kind of task of each.  A run's labels are those of its data hash, which covers the rows, their order and
their tokens.  Numbers alone are kept: answers that are texts (spans, generation) are the data themselves and stay where they
are.  Read without torch and without the data.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.experiments.files import replacing
from rankwise.variants.files import json_text

if TYPE_CHECKING:
    import numpy as np

NAME = "labels.safetensors"
IGNORED = -100  # the label of a token that is not scored (data/encoded.py)
META = "labels"  # one key, so that equal labels give equal bytes: safetensors keeps several in no order
REMEDY = "move it away, and `rankwise compare` writes it anew"

Key = tuple[str, str]  # data hash, split


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of one split of one task's data. kind: of the task."""

    kind: str
    labels: "np.ndarray"
    offsets: "np.ndarray | None" = None

    @property
    def num_rows(self) -> int:
        return len(self.labels) if self.offsets is None else len(self.offsets) - 1

    def has(self, metric: str) -> bool:
        """Whether predictions can be scored by this metric here."""
        return self._metric(metric) is not None

    def score(self, predictions: "np.ndarray", metric: str) -> float:
        """Points, as in result.json.

        Raises:
            ValueError: another number of predictions, or a metric that is not known here.
            Undefined: it has no value, as where one value is predicted for every row.
        """
        return float(self._known(metric).values(*self._scored(predictions))[metric])

    def resampled(self, predictions: "np.ndarray", metric: str, weights: "np.ndarray") -> "np.ndarray":
        """(B,) points on B resamples of the rows. weights: (B, rows) how often each row comes in each."""
        known, scored = self._known(metric), self._scored(predictions)
        if known.resampled is not None:
            return known.resampled(*scored, weights)
        predicted, labels = scored  # of a share of the rows
        if labels.ndim == 2:
            right = (predicted == labels).all(1)  # every label of the row
        else:
            right = (predicted if predicted.ndim == 1 else predicted[:, 0]) == labels  # (n, 3) of options: per byte
        return 100 * (weights @ right) / weights.sum(1)

    def constant_score(self, metric: str) -> float | None:
        """What one answer for every row scores: the commonest label; None where that is not known (of language models).

        A correlation, which has no value there, counts as 0.
        """
        import numpy as np
        from rankwise.experiments.kinds import Undefined

        if not self.has(metric) or self.kind == "language-modelling":
            return None
        if self.kind == "regression":
            return 0.0
        if self.labels.ndim == 2:  # of any number of labels: each as most rows have it
            predicted = np.broadcast_to(self.labels.mean(0) > 0.5, self.labels.shape).astype(np.int64)
        else:
            values, counts = np.unique(self.labels[self.labels != IGNORED], return_counts=True)
            predicted = np.full(self.labels.shape, values[counts.argmax()])
        if self.kind == "choice":  # the option chosen by each normalisation
            predicted = np.repeat(predicted[:, None], 3, axis=1)
        try:
            return self.score(predicted, metric)
        except Undefined:
            return 0.0

    def _metric(self, name: str) -> Any:
        from rankwise.experiments.tasks.own_kinds import KINDS

        kind = KINDS.get(self.kind)
        found = None if kind is None else kind.metrics.get(name)
        return found if found is not None and found.leads else None

    def _known(self, metric: str) -> Any:
        known = self._metric(metric)
        if known is None:
            raise ValueError(f"{metric} of kind {self.kind} cannot be computed from predictions here")
        return known

    def _scored(self, predictions: "np.ndarray") -> tuple["np.ndarray", ...]:
        """What the metric takes: predictions and labels; of words the row of each too."""
        import numpy as np

        if len(predictions) != len(self.labels):
            raise ValueError(f"{len(predictions)} predictions for {len(self.labels)} labels")
        if self.offsets is None:
            labels = self.labels.astype(np.int64) if self.kind == "multi-label" else self.labels
            return predictions, labels
        rows = np.repeat(np.arange(self.num_rows), np.diff(self.offsets))
        scored = self.labels != IGNORED
        return predictions[scored], self.labels[scored], rows[scored]


def of_data(kind: str, data: Any) -> Labels | None:
    """The labels of a split as it is encoded (`Dataset`); None where they are no numbers."""
    import numpy as np

    labels, offsets = data.truth
    return Labels(kind, labels, offsets) if isinstance(labels, np.ndarray) else None


def add(folder: Path, found: Mapping[Key, Labels]) -> None:
    """Writes these labels beside those that the folder has already; nothing where it has them all.

    Raises:
        ValueError: the file that is there is no file of labels.
    """
    known = read(folder)
    if not found.keys() <= known.keys():
        write(folder, {**known, **found})


def write(folder: Path, every: Mapping[Key, Labels]) -> None:
    """Writes labels.safetensors, whole or not at all."""
    from safetensors.numpy import save_file

    tensors, kinds = {}, {}
    for key, one in sorted(every.items()):
        name = "/".join(key)
        kinds[name] = one.kind
        tensors[f"{name}/labels"] = _small(one.labels)
        if one.offsets is not None:
            tensors[f"{name}/offsets"] = _small(one.offsets)
    with replacing(folder / NAME) as path:
        save_file(tensors, path, {META: json.dumps(kinds, sort_keys=True)})


def read(folder: Path) -> dict[Key, Labels]:
    """The labels of a study's folder by data hash and split; none where it has no such file.

    Raises:
        ValueError: the file is cut off or foreign.
    """
    path = folder / NAME
    if not path.is_file():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            kinds = json_text.parse((file.metadata() or {})[META])
            names = set(file.keys())
            found = {}
            for name, kind in kinds.items():
                data_hash, split = name.split("/")
                offsets = _wide(file.get_tensor(f"{name}/offsets")) if f"{name}/offsets" in names else None
                found[data_hash, split] = Labels(kind, _wide(file.get_tensor(f"{name}/labels")), offsets)
    except (SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is cut off, changed or no file of labels ({error}); {REMEDY}") from None
    return found


def _small(values: "np.ndarray") -> "np.ndarray":
    """Whole numbers in the smallest type that holds them; others as they are."""
    import numpy as np

    if values.dtype.kind not in "iu" or not values.size:
        return np.ascontiguousarray(values)
    least, most = int(values.min()), int(values.max())
    kind = next(t for t in (np.int8, np.int16, np.int32, np.int64) if np.iinfo(t).min <= least and most <= np.iinfo(t).max)
    return np.ascontiguousarray(values, dtype=kind)


def _wide(values: "np.ndarray") -> "np.ndarray":
    return values.astype("int64") if values.dtype.kind == "i" else values
