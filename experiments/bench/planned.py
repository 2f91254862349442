"""What `rankwise plan` says of a step beside what a real one takes: memory by the count of torch's allocator, and seconds.

rankwise bench --planned --json reports/bench/planned.json

A run that was cut off goes on from the JSON file: what was measured with the same versions is taken from it, and what the
plan says is worked out anew.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from rankwise import variants
from rankwise.experiments import kinds, memory, models
from rankwise.experiments.plan import rate
from rankwise.experiments.plan import step as planning
from rankwise.experiments.training import first_token
from rankwise.experiments.training.evaluation import autocast
from rankwise.experiments.training.stored_states import STORED
from rankwise.variants.adapter.kinds.scheme import Scheme
from rankwise.variants.adapter.step import Step
from rankwise.variants.settings import method as known

CPU = torch.device("cpu")
STEPS = 10**6  # of the run: long enough for every schedule
TIMED = 3  # steps, whose median is the measured time
LOW_RANK = {"rank": 8, "alpha": 12.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": LOW_RANK,
    "adalora": {"initial_rank": 12, "target_rank": 8, "alpha": 12.0},
    "dora": LOW_RANK,
}
# Type of what is not quantised, and of products: over a base in 4 bits that is bf16, as in QLoRA.
PRECISIONS: dict[str, tuple[str, Scheme | None]] = {
    "fp32": ("fp32", None),
    "bf16": ("bf16", None),
    "nf4": ("bf16", Scheme("nf4", True)),
}
SIZES = (  # model, kind of task, rows of a step
    ("sentence-transformers/all-MiniLM-L6-v2", "regression", planning.Shape(16, 64)),
    ("dinov2-small-saliency", "image-classification", planning.Shape(8, 50, image_size=98)),
    ("SmolLM2-135M-Instruct-Q4_1", "generation", planning.Shape(2, 128)),
)


@dataclass(frozen=True)
class Case:
    """A method on a model with the head of a kind of task, and the rows of a step."""

    model: str
    kind: str
    method: str
    shape: planning.Shape

    def facts(self) -> dict[str, Any]:
        """What its row is known by."""
        shape = self.shape
        facts = {"model": self.model, "kind": self.kind, "method": self.method, "precision": shape.precision}
        facts |= {"quantization": None if shape.quantization is None else str(shape.quantization), "members": shape.members}
        facts |= {"rows": shape.rows, "length": shape.length, "image_size": shape.image_size}
        return facts | {"checkpointing": shape.checkpointing, "optimizer_states": shape.optimizer_states}

    @property
    def is_timed(self) -> bool:
        """One member in full precision, with nothing that saves memory and costs time; of the methods that differ most."""
        shape = self.shape
        saves = shape.checkpointing or shape.optimizer_states != "32-bit" or shape.quantization is not None
        return self.method in ("full", "lora") and shape.members == 1 and shape.precision == "fp32" and not saves


def cases() -> list[Case]:
    """Every method on every model in every precision; then some with averages in 8 bits, with checkpointing, and packed."""
    found = []
    for model, kind, shape in SIZES:
        for products, scheme in PRECISIONS.values():
            of = dataclasses.replace(shape, precision=products, quantization=scheme)
            # Weights in 4 bits cannot be trained: full fine-tuning of them is refused.
            names = [name for name in SETTINGS if scheme is None or not known(name).load().trains_base]
            found += [Case(model, kind, name, of) for name in names]
    model, kind, shape = SIZES[0]
    further = [
        (name, changed) for name in ("full", "lora") for changed in ({"optimizer_states": "8-bit"}, {"checkpointing": True})
    ]
    further.append(("lora", {"members": 4}))
    return found + [Case(model, kind, name, dataclasses.replace(shape, **changed)) for name, changed in further]


def run(chosen: Sequence[Case], before: Sequence[dict[str, Any]] = ()) -> Iterator[list[dict[str, Any]]]:
    """The rows so far, after each that is measured, with those of `before` that are still to come.

    before: rows of an earlier sitting.
    """
    left, rows = list(before), []
    for case in chosen:
        facts = case.facts()
        earlier = next((row for row in left if facts.items() <= row.items()), None)
        left = [row for row in left if row is not earlier]
        rows.append(compared(case, SETTINGS[case.method], case.is_timed, earlier))
        yield rows + left


def compared(
    case: Case, settings: dict[str, Any], is_timed: bool = False, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Planned and measured bytes at the fullest moment of a step, seconds of one if it is timed, planned over measured.

    settings: of the method. before: the row of an earlier sitting, for what is measured in it, the machine's rate among it.
    """
    kind, labels = kinds.get(case.kind), {"regression": 1, "span": 2}.get(case.kind, 2)
    planned = planning.cost(case.model, kind, labels, case.method, settings, case.shape)
    if before is None:
        before = {**measured(case, labels, settings, is_timed), "products_per_second": None}
        if is_timed:
            before["products_per_second"] = rate.products_per_second(case.model, kind, labels, case.shape, CPU)
    row = {**case.facts(), "planned_bytes": planned.peak, "measured_bytes": before["measured_bytes"]}
    row |= {"ratio": planned.peak / before["measured_bytes"], "planned_optimizer_bytes": planned.optimizer}
    row |= {"measured_optimizer_bytes": before["measured_optimizer_bytes"]}
    row |= {name: before[name] if is_timed else None for name in ("measured_seconds", "products_per_second")}
    if is_timed:
        row["planned_seconds"] = planned.products / row["products_per_second"]
        row["seconds_ratio"] = row["planned_seconds"] / row["measured_seconds"]
    return row


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    size = row["length"] if row["image_size"] is None else f"{row['image_size']} px"
    form = f"{row['quantization'] or row['precision']}, {row['members']} x {row['rows']} x {size}"
    form += ", checkpointing" if row["checkpointing"] else ""
    form += "" if row["optimizer_states"] == "32-bit" else f", averages in {row['optimizer_states']}"
    sizes = f"planned {row['planned_bytes'] / 1e6:7.1f} MB, measured {row['measured_bytes'] / 1e6:7.1f} MB"
    found = f"{row['model']} {row['method']} {form}: {sizes}, ratio {row['ratio']:.3f}"
    if row["measured_seconds"] is None:
        return found
    seconds = f"planned {row['planned_seconds']:.2f} s, measured {row['measured_seconds']:.2f} s"
    return f"{found}; {seconds}, ratio {row['seconds_ratio']:.3f}"


def taken(before: dict[str, Any] | None, versions: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of an earlier sitting's file, where it was measured with the same versions."""
    if before is None or before["machine"]["versions"] != versions:
        return []
    return list(before["rows"])


def measured(case: Case, labels: int, settings: dict[str, Any], is_timed: bool = False) -> dict[str, Any]:
    """Bytes of all tensors at the fullest moment of the second step, with what kernels take from the allocator; bytes of the
    optimizer's averages between steps; and the median seconds of some further steps, or None.

    Of a method that trains some of its tensors later on, of the last step.
    """
    shape, kind, trains_base = case.shape, kinds.get(case.kind), known(case.method).load().trains_base
    task = SimpleNamespace(kind=case.kind, num_labels=labels)
    precision = "fp32" if trains_base else shape.precision
    model, _, info = models.load(
        case.model, task, precision, image_size=shape.image_size if kind.has_images else None, quantization=shape.quantization
    )
    adapter = variants.create(case.method, members=shape.members, **settings)
    if not adapter.adds_tokens:
        first_token.only(model, adapter.draw)
    adapter.attach(model, head=info.heads, fresh_head=True)
    if shape.checkpointing:
        keyed = {"use_reentrant": False, "context_fn": adapter.draw.recompute_contexts}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keyed)
    rates = torch.full((shape.members,), 1e-4, dtype=torch.float64)
    optimizer = STORED[shape.optimizer_states](adapter.parameter_groups(), rates)

    def step(index: int) -> None:
        now = Step(index, STEPS, learning_rates=rates)
        model.train()
        batch = kind.example(model.config, labels, shape.members * shape.micro_rows, shape.size(kind))
        targets = batch.pop("labels")
        adapter.begin(now, 0, training=True)
        with autocast(CPU, shape.precision):
            losses, _ = kind.example_losses(model, adapter.prepare(batch), targets, shape.members)
        (losses + adapter.penalty(now)).sum().backward()
        optimizer.clip(optimizer.gradient_norms(), 1.0)
        adapter.before_step(now)
        optimizer.step(1.0)
        adapter.after_step(now)
        optimizer.follow(adapter.take_changes())
        optimizer.zero_grad()

    second = 2 if adapter.trains_from_the_start else STEPS
    step(second - 1)
    gc.collect()
    resident = memory.live_bytes(memory.of_training(model, adapter, optimizer))
    peak = resident + memory.peak_growth(lambda: step(second), CPU, before=lambda: step(second))
    averages = memory.tensors_in(optimizer.first, optimizer.second, getattr(optimizer, "stored", []))
    found = {"measured_bytes": peak, "measured_optimizer_bytes": memory.live_bytes(averages), "measured_seconds": None}
    seconds = []
    for index in range(second + 1, second + 1 + TIMED) if is_timed else ():
        began = time.perf_counter()
        step(min(index, STEPS))
        seconds.append(time.perf_counter() - began)
    return {**found, "measured_seconds": statistics.median(seconds)} if is_timed else found
