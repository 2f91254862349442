"""What comes as predictions, in any type and precision, as numpy arrays."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rankwise.experiments.kinds.interface import Undefined


def as_array(values: Any) -> np.ndarray:
    """A numpy array of anything array-like, torch tensors of any precision included."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values  # numpy knows no bf16
    return np.asarray(values)


def as_classes(values: np.ndarray) -> np.ndarray:
    """Scores (n, C), or classes (n,) themselves, to classes (n,)."""
    if values.ndim == 1 and np.issubdtype(values.dtype, np.integer):
        return values.astype(np.int64)
    if values.ndim != 2:
        raise ValueError(f"predictions of shape {values.shape} and type {values.dtype} are neither scores nor classes")
    if not np.isfinite(values).all():
        raise Undefined("collapsed", "the model's outputs are not finite numbers")
    return values.argmax(-1)


def by_row(predictions: np.ndarray, labels: Any) -> tuple[tuple[np.ndarray, np.ndarray], int]:
    """What `Kind.scored` gives where each row is an example with one prediction and one label, (n,) both."""
    labels = as_array(labels).reshape(-1)
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    return (predictions, labels), len(labels)


def texts_as_bytes(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Texts as two arrays: text i is bytes offsets[i] to offsets[i + 1] of predictions, in UTF-8."""
    each = [text.encode("utf-8", "replace") for text in texts]
    offsets = np.cumsum([0, *map(len, each)], dtype=np.int64)
    return {"predictions": np.frombuffer(b"".join(each), dtype=np.uint8), "offsets": offsets}


def texts_from_bytes(stored: Mapping[str, np.ndarray]) -> list[str]:
    """The texts again."""
    flat, offsets = stored["predictions"].tobytes(), stored["offsets"].tolist()
    return [flat[start:end].decode("utf-8") for start, end in itertools.pairwise(offsets)]
