"""A user's own data as a task, which a study trains on like any other."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rankwise.experiments import kinds
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data_entries import OwnData
from rankwise.experiments.tasks import own, own_images, text_metrics
from rankwise.experiments.tasks.own_kinds import KINDS, OwnKind, answers_of, by_entities
from rankwise.experiments.tasks.task import Task
from rankwise.variants.settings import nearest, quoted

PIECE = 2_000  # rows that are made into examples, and tokenised, at once


@dataclass(frozen=True, kw_only=True)
class OwnTask(Task):
    """A task over a user's files.

    notes: how the files were read and what a reader should know of their rows; `caption` has them too.
    chosen: the metrics of its report, the first the primary one.
    scale: mean and deviation by which the targets of a regression were standardised.
    rows: of each split, on disk. made: (rows) -> Examples.
    """

    notes: tuple[str, ...]
    chosen: tuple[str, ...]
    scale: tuple[float, float] = (0.0, 1.0)
    rows: Mapping[str, Sequence[own.Row]]
    made: Callable[[Sequence[own.Row]], Examples]

    def pieces(self, split: str) -> Iterator[Examples]:
        self._check_split(split)
        rows = self.rows[split]
        for at in range(0, len(rows), PIECE):
            yield self.made(rows[at : at + PIECE])

    def facts(self) -> Mapping[str, Any]:
        return {"kind": self.kind, "labels": list(self.label_names), "metrics": list(self.chosen)}

    def record(self) -> Mapping[str, Any]:
        """kind, labels and metrics; scale; content: a hash of every row of every part."""
        return {**self.facts(), "scale": list(self.scale), "content": self.data_hash()}

    def cut(self, split: str, data: Dataset, processor: Any, max_length: int) -> str | None:
        """How many rows of an encoded split are longer than `max_length`, and what becomes of them; None where none is."""
        kind = kinds.get(self.kind)
        lost = kind.lost(processor)
        if lost is None:
            return None
        full = np.flatnonzero(data.lengths >= max_length)  # what was cut fills its room
        rows, longer, longest = self.rows[split], 0, 0
        for at in range(0, len(full), PIECE):
            lengths = kind.whole_lengths(self.made([rows[place] for place in full[at : at + PIECE]]), processor)
            longer, longest = longer + int((lengths > max_length).sum()), max(longest, int(lengths.max()))
        if not longer:
            return None
        return (
            f"{split}: {longer} of {data.num_examples} rows are longer than max_length = {max_length} tokens (the longest "
            f"{longest}): {lost}"
        )


def task(data: OwnData, labels: tuple[str, ...] = (), scale: tuple[float, float] | None = None) -> OwnTask:
    """The task that this data makes; its files are read (once, as long as they stay as they are).

    Args:
        labels: of the model that is to be asked, in the order of its outputs; the data's own if none are given.
        scale: mean and deviation by which targets of a regression were standardised; those of the training rows if not given.

    Raises:
        ValueError: one line for each fault: file, row, what is wrong, the remedy.
    """
    return _made(data.model_dump_json(), _stamps(data), labels, scale)


def _stamps(data: OwnData) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of each file."""
    files = [file for _, where in data.places() for file in own.files_of(where)]
    return tuple((file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files)


@functools.lru_cache(maxsize=8)
def _made(
    dumped: str, stamps: tuple[tuple[str, int, int], ...], known: tuple[str, ...], scale: tuple[float, float] | None
) -> OwnTask:
    data = OwnData.model_validate_json(dumped)
    parts = own.read(data)
    name = parts.reading.kind
    if name not in KINDS:
        raise ValueError(f"{data.train}: read as {name}, for which there is no training yet: give one of {', '.join(KINDS)}")
    kind = KINDS[name]
    check_rows(parts, data)
    labels = kind.classes(parts)
    if known and labels:
        for label in (label for label in labels if label not in known):
            raise ValueError(f'{data.train}: label "{label}" is none of the model\'s: {", ".join(known)}')
        labels = known
    chosen = _metrics(data, kind, labels)
    if scale is None:
        scale = _scale([row.target for row in parts.rows["train"]]) if name == "regression" else (0.0, 1.0)
    notes = [f"{parts.notes[0]}{_classes(name, parts.labels)}", *parts.notes[1:]]
    if name == "regression":
        notes.append(
            f"targets are standardised by the training rows' mean {scale[0]:.6g} and deviation {scale[1]:.6g}: what a model "
            f"gives, times the deviation, plus the mean, is the target"
        )
    made = functools.partial(kind.examples, labels=labels, scale=scale)
    content = _content_hash(parts)
    return OwnTask(
        name=data.name,
        kind=name,
        num_labels=max(1, len(labels)),
        label_names=labels,
        metric=chosen[0],
        licence="the user's own data",
        sizes={split: len(rows) for split, rows in parts.rows.items()},
        read=lambda split: made(parts.rows[split][:]),
        measure=functools.partial(_measure, kind, chosen, scale[1]),
        resampled=kind.metrics[chosen[0]].resampled,
        identity=lambda: content,
        caption=tuple(f"{data.name}: {note}." for note in notes),
        notes=tuple(notes),
        chosen=chosen,
        scale=scale,
        rows=parts.rows,
        made=made,
    )


def _measure(kind: OwnKind, chosen: tuple[str, ...], deviation: float, *scored: Any) -> dict[str, float]:
    """The chosen metrics, each family of them computed once."""
    families = {kind.metrics[name].values: None for name in chosen}
    values = {family: family(*scored) for family in families}
    found = {name: values[kind.metrics[name].values][name] for name in chosen}
    return {name: value * deviation if kind.metrics[name].in_units else value for name, value in found.items()}


def _metrics(data: OwnData, kind: OwnKind, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The metrics that a study names, or the kind's own.

    Raises:
        ValueError: one that there is not, or that cannot be the first.
    """
    chosen = tuple(data.metrics) or kind.default(labels)
    where = f'data "{data.name}": metrics'
    allowed = [name for name, one in kind.metrics.items() if not one.two_labels or len(labels) == 2]
    if kind is KINDS["token-classification"] and by_entities(labels) is None:
        allowed = [name for name in allowed if name not in ("f1", "precision", "recall")]  # of entities
    for name in chosen:
        if kind is KINDS["generation"] and name.lower() in text_metrics.MISSING:
            reason = text_metrics.MISSING[name.lower()]
            raise ValueError(f"{where}: {quoted(name)} is missing here: {reason}; there are: {', '.join(allowed)}")
        if name not in allowed:
            why = "is not for these labels" if name in kind.metrics else "is no metric of this kind"
            raise ValueError(f"{where}: {quoted(name)} {why}{nearest(name, allowed)}; there are: {', '.join(allowed)}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{where}: {', '.join(chosen)} has one twice: take it out")
    if not kind.metrics[chosen[0]].leads:
        leading = ", ".join(name for name in allowed if kind.metrics[name].leads)
        raise ValueError(f"{where}: methods cannot be compared by {chosen[0]}: name one of {leading} before it")
    return chosen


def check_rows(parts: own.Parts, data: OwnData) -> None:
    """What can be wrong with rows of one kind alone.

    Raises:
        ValueError: one line for each of the first faults.
    """
    faults, kind = [], parts.reading.kind
    for part, rows in parts.rows.items():
        where = getattr(data, part) or data.train
        if kind == "span":
            for number, row in enumerate(rows, start=1):
                try:
                    answers_of(row)
                except ValueError as error:
                    faults.append(rows.said(number, where, error))
        if kind == "regression" and len({row.target for row in rows}) < 2:
            faults.append(f"{where}: all targets of the {part} part are equal: add rows with other targets")
    if faults:
        raise ValueError("\n".join(faults[:5]))


def _scale(targets: list[float]) -> tuple[float, float]:
    """Mean and standard deviation of numbers that are not all equal."""
    return float(np.mean(targets)), float(np.std(targets))


def _classes(kind: str, labels: tuple[str, ...]) -> str:
    """ "; classification with 3 labels: a, b, c"; of a kind without labels its name."""
    if not labels:
        return f"; {kind}"
    shown = ", ".join(f'"{label}"' if "," in label else label for label in labels[:10])
    return f"; {kind} with {len(labels)} labels: {shown}{', ...' if len(labels) > 10 else ''}"


def _content_hash(parts: own.Parts) -> str:
    """sha256 over how every row of every part was read, to the last digit."""
    digest = hashlib.sha256()
    for part, rows in parts.rows.items():
        digest.update(part.encode())
        for row in rows:
            is_image = isinstance(row.input, own_images.OwnPicture)
            digest.update(row.input.digest if is_image else json.dumps(row.input, default=str).encode())
            digest.update(json.dumps([row.pair, row.choices, row.target], default=str).encode())
    return digest.hexdigest()
