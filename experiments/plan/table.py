"""The rows of `rankwise plan`: what each method of a study, or of a model and a kind of task, will take."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise import variants
from rankwise.experiments import kinds
from rankwise.experiments.config import Entry, Study
from rankwise.experiments.plan import shapes, step
from rankwise.experiments.study import budget
from rankwise.experiments.tasks import Task, in_study
from rankwise.variants.settings import method

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # of the curve; what lies between two that were counted is on their line


@dataclass(frozen=True)
class Asked:
    """What a plan is made for: one task's kind on one model, the methods, and the rows of a step."""

    task: str
    model: str
    kind: str
    num_labels: int
    entries: tuple[Entry, ...]
    shape: step.Shape
    total_steps: int

    @property
    def of_kind(self) -> Any:
        return kinds.get(self.kind)


@dataclass(frozen=True)
class Row:
    """What one method takes.

    cost: of a step. members: that train at once. file_bytes: of one member's saved adapter. seconds: of a step.
    """

    task: str
    method: str
    members: int
    cost: step.StepCost
    file_bytes: int
    seconds: float | None
    fits: bool | None
    largest_batch: int | None
    largest_pack: int | None

    def as_dict(self) -> dict[str, Any]:
        cost = self.cost
        return {
            "task": self.task,
            "method": self.method,
            "members": self.members,
            "trainable_parameters": cost.trainable,
            "active_parameters": cost.active,
            "head_parameters": cost.head,
            "weights_bytes": cost.weights,
            "adapter_bytes": cost.adapter,
            "gradient_bytes": cost.gradients,
            "optimizer_bytes": cost.optimizer,
            "activation_bytes": cost.activations,
            "logits_bytes": cost.logits,
            "peak_bytes": cost.peak,
            "file_bytes": self.file_bytes,
            "products": cost.products,
            "fits": self.fits,
            "largest_batch": self.largest_batch,
            "largest_pack": self.largest_pack,
            "seconds_per_step": self.seconds,
        }


def of_study(study: Study, precision: str, say: Callable[[str], None]) -> list[Asked]:
    """What a study asks for, one a task, the ranks of a budget of parameters worked out; no model is loaded.

    Raises:
        ValueError: the data of the user's own, a model's configuration or a budget is at fault.
    """
    return [_of_task(study, in_study(name, study.data), precision, say) for name in study.tasks]


def _of_task(study: Study, task: Task, precision: str, say: Callable[[str], None]) -> Asked:
    training = study.training
    rows = training.train_examples or task.rows_of("train")
    total = training.total_steps(rows)
    kind, entries = kinds.get(task.kind), []
    for entry in study.methods:
        if entry.ranks_of is not None:
            say(f"{task.name}: {entry.label} takes the ranks of {entry.ranks_of}'s run: planned with equal ones")
        if study.budget.equal == "parameters":
            model = shapes.build(study.model, kind, task.num_labels, "fp32")
            with_ranks = {**entry.settings, **({"rank": 1} if entry.ranks_of is not None else {})}
            started = entry.model_copy(update={"settings": with_ranks, "ranks_of": None})
            adapter = variants.create(entry.method, **started.resolved(total).model_dump(exclude_unset=True))
            adapter.attach(model, entry.targets, head=kind.head_names(model), calibration=variants.Uncalibrated())
            entry = budget.solved(started, adapter, study.budget.parameters, entry.scale or study.budget.scale)
        elif entry.ranks_of is not None:
            continue  # said above; without a budget its ranks are known after the run alone
        entries.append(entry)
    shape = step.Shape(
        rows=training.batch_size,
        length=training.max_length,
        members=1 if study.pack == "auto" else study.pack,
        accumulation=training.accumulation,
        checkpointing=training.gradient_checkpointing,
        precision=precision,
        image_size=training.image_size,
        optimizer_states=training.optimizer_states,
    )
    return Asked(task.name, study.model, task.kind, task.num_labels, tuple(entries), shape, total)


def rows(asked: Asked, memory: int | None, rate: float | None) -> Iterator[Row]:
    """A row a method, in order.

    memory: bytes that there are. rate: products a second.

    Raises:
        ValueError: a method that the model cannot have.
    """
    for entry in asked.entries:
        kind = method(entry.method).load()
        members = asked.shape.members if kind.packable else 1
        form = entry.scheme or asked.shape.quantization
        shape = dataclasses.replace(asked.shape, members=members, targets=entry.targets, quantization=form)
        settings = entry.resolved(asked.total_steps).model_dump(exclude_unset=True)

        def count(shape: step.Shape = shape, entry: Entry = entry, settings: dict[str, Any] = settings) -> step.StepCost:
            return step.cost(asked.model, asked.of_kind, asked.num_labels, entry.method, settings, shape)

        def at_batch(rows: int, shape: step.Shape = shape, count: Callable = count) -> int:
            return count(dataclasses.replace(shape, rows=rows, accumulation=1)).peak

        def at_pack(members: int, shape: step.Shape = shape, count: Callable = count) -> int:
            return count(dataclasses.replace(shape, members=members)).peak

        cost = count()
        batch = pack = None
        if memory is not None:
            fixed = cost.weights + cost.adapter + cost.optimizer + cost.gradients
            batch = _largest(memory, shape.micro_rows, cost.peak, fixed, at_batch)
            pack = _largest(memory, members, cost.peak, cost.weights, at_pack) if kind.packable else None
        yield Row(
            task=asked.task,
            method=entry.label,
            members=members,
            cost=cost,
            file_bytes=4 * (cost.active + cost.head),
            seconds=None if rate is None else cost.products / rate,
            fits=None if memory is None else cost.peak <= memory,
            largest_batch=batch,
            largest_pack=pack,
        )


def _largest(memory: int, size: int, peak: int, fixed: int, count: Callable[[int], int]) -> int:
    """The largest size (of a batch, a pack) whose peak fits.

    Nearly all that moves has the size as an axis, so that two points give the line, of which the second is near the answer.

    Args:
        peak: at `size`. fixed: what would be left of it at size 0, about. count: the peak at another size.
    """
    first = int((memory - fixed) / max(1, (peak - fixed) / size))
    if first < 1 or first == size:
        return max(0, first)
    slope = (count(first) - peak) / (first - size)
    return max(0, int(size + (memory - peak) / slope))


def rank_curve(asked: Asked, entry: Entry, ranks: Sequence[int] = RANKS) -> list[tuple[int, int, int]]:
    """(rank, trainable parameters, peak bytes) of a method with one rank for all sites; counted at two, the rest on their line.

    Raises:
        ValueError: its rank is no single number.
    """
    if not method(entry.method).takes_ranks:
        raise ValueError(f"{entry.label}: a curve of ranks is of a method that has one rank from start to end, such as lora")
    settings = {k: v for k, v in entry.settings.items() if k not in ("rank_pattern", "alpha_pattern")}
    low, high = min(ranks), max(ranks)
    found = []
    for rank in (low, high):
        at = entry.model_copy(update={"settings": {**settings, "rank": rank}})
        (row,) = rows(dataclasses.replace(asked, entries=(at,)), None, None)
        found.append(row.cost)
    slope = [(b - a) / (high - low) for a, b in zip(*((c.trainable, c.peak) for c in found), strict=True)]
    first = found[0]
    return [(r, round(first.trainable + slope[0] * (r - low)), round(first.peak + slope[1] * (r - low))) for r in ranks]
