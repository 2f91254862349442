"""A user's own rows as a model sees them: tokens, what is scored, how long rows are, and what is cut; of images their size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rankwise.experiments import kinds, models, own_study
from rankwise.experiments.kinds.interface import Seen
from rankwise.experiments.tasks import OwnTask

QUANTILES = {"shortest": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}


@dataclass(frozen=True)
class View:
    """What `view` found.

    rows: the first of the training part; each as several where the model takes it so (options, windows, source and target).
    lengths: part -> name of the quantile -> tokens, nothing cut. cut: part -> the sentence of `OwnTask.cut`, where rows are.
    trained_rows: of the training part, as the model takes them (blocks, where texts stand one after the other).
    image_size: height and width in pixels. Rows without tokens have no max_length and nothing that follows from it.
    """

    model: str
    max_length: int | None
    is_given: bool
    rows: tuple[tuple[Seen, ...], ...]
    lengths: Mapping[str, Mapping[str, int]]
    longer: Mapping[str, int]
    cut: Mapping[str, str]
    trained_rows: int
    image_size: tuple[int, int] | None = None


def view(task: OwnTask, model: str, max_length: int | None = None, shown: int = 3) -> View:
    """How a model takes the rows of a task.

    max_length: as a study would have it; if not given that of a comparison in one line. shown: rows of the training part.

    Raises:
        ValueError: the model cannot be loaded for such a task, takes no rows of this length, or has no row in its embedding
            for one of their tokens.
        Unavailable: the model cannot be had.
    """
    loaded, processor, _ = models.load(model, task)
    kind = kinds.get(task.kind)
    found = own_study.lengths_of(loaded, processor, task)
    if found is None:
        if max_length is not None:
            raise ValueError(f"--max-length {max_length}: rows of kind = {task.kind} have no tokens: leave it out")
        size = own_study.image_size_of(processor, task)
        return View(model, None, False, (), {}, {}, {}, task.sizes["train"], size)
    if max_length is not None and found.most is not None and max_length > found.most:
        raise ValueError(f"--max-length {max_length}: {model} takes {found.most} tokens: give no more")
    longest = found.max_length if max_length is None else max_length
    encoded = {split: task.encode(processor, split, longest) for split in task.splits}
    if faults := models.beyond(loaded, processor, encoded):
        raise ValueError("\n".join(faults))
    rows = range(min(shown, encoded["train"].num_examples))
    cut = {split: task.cut(split, data, processor, longest) for split, data in encoded.items()}
    return View(
        model=model,
        max_length=longest,
        is_given=max_length is not None,
        rows=tuple(tuple(kind.seen(encoded["train"], row, processor, task.label_names)) for row in rows),
        lengths={split: _quantiles(lengths) for split, lengths in found.of.items()},
        longer={split: int((lengths > longest).sum()) for split, lengths in found.of.items()},
        cut={split: line for split, line in cut.items() if line},
        trained_rows=len(encoded["train"]),
    )


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Each of `QUANTILES` as a length that some row has."""
    return {name: int(np.quantile(lengths, at, method="higher")) for name, at in QUANTILES.items()}


def as_line(seen: Seen) -> str:
    """Tokens with "|" between them, runs of scored ones between >> and <<, line breaks written as they are in a string."""
    parts: list[str] = []
    was_scored = False
    for token, is_scored in zip(seen.tokens, seen.is_scored, strict=True):
        border = "|" if parts else ""
        if is_scored and not was_scored:
            border += ">>"
        if was_scored and not is_scored:
            border = "<<" + border
        parts.append(border + token.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r"))
        was_scored = is_scored
    return "".join(parts) + ("<<" if was_scored else "")


def as_json(found: View) -> dict[str, Any]:
    """The same for a program to read."""
    if found.image_size is not None:
        return {"model": found.model, "image_size": found.image_size, "trained_rows": found.trained_rows}
    rows = [
        [
            {"name": one.name, "tokens": one.tokens, "scored": one.is_scored, "label": one.label}
            for one in row
        ]
        for row in found.rows
    ]  # fmt: skip
    return {
        "model": found.model,
        "max_length": found.max_length,
        "lengths": found.lengths,
        "longer": found.longer,
        "cut": found.cut,
        "trained_rows": found.trained_rows,
        "first_as_seen": rows,
    }
