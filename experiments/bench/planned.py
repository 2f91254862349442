"""What `rankwise plan` says of a step's memory beside what torch's allocator counts in a real one.

rankwise bench --planned --json reports/bench/planned.json
"""

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from rankwise import variants
from rankwise.experiments import kinds, measure, models
from rankwise.experiments.bench import timing
from rankwise.experiments.plan import step as planning
from rankwise.experiments.training import first_token
from rankwise.experiments.training.evaluation import autocast
from rankwise.experiments.training.optim import MemberAdamW
from rankwise.variants.adapter.step import Step
from rankwise.variants.settings import method as known

CPU = torch.device("cpu")
STEPS = 10**6  # of the run: long enough for every schedule
LOW_RANK = {"rank": 8, "alpha": 12.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": LOW_RANK,
    "adalora": {"initial_rank": 12, "target_rank": 8, "alpha": 12.0},
    "dora": LOW_RANK,
}
# model, kind of task, rows and tokens of a step, members of a pack
SIZES = (
    ("sentence-transformers/all-MiniLM-L6-v2", "regression", 32, 64, 1),
    ("sentence-transformers/all-MiniLM-L6-v2", "regression", 32, 64, 4),
    ("SmolLM2-135M-Instruct-Q4_1", "generation", 4, 128, 1),
)


def run(sizes: Any = SIZES, precisions: tuple[str, ...] = ("fp32", "bf16")) -> Iterator[dict[str, Any]]:
    """A row for each size, method, precision and checkpointing or not, as soon as it is measured."""
    for model, kind, rows, length, members in sizes:
        for name, settings in SETTINGS.items():
            for precision in precisions:
                for checkpointing in (False, True):
                    if members > 1 and not known(name).load().packable:
                        continue
                    shape = planning.Shape(rows, length, members, checkpointing=checkpointing, precision=precision)
                    yield compared(model, kind, name, settings, shape)


def compared(model: str, kind: str, name: str, settings: dict[str, Any], shape: planning.Shape) -> dict[str, Any]:
    """Planned and measured bytes at the fullest moment of a step, and planned over measured."""
    labels = {"regression": 1, "span": 2}.get(kind, 2)
    planned = planning.cost(model, kinds.get(kind), labels, name, settings, shape).peak
    measured = measured_peak(model, kind, labels, name, settings, shape)
    facts = {"model": model, "kind": kind, "method": name, "precision": shape.precision, "members": shape.members}
    facts |= {"rows": shape.rows, "length": shape.length, "checkpointing": shape.checkpointing}
    return {**facts, "planned_bytes": planned, "measured_bytes": measured, "ratio": planned / measured}


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    form = f"{row['members']} x {row['rows']} x {row['length']}{', checkpointing' if row['checkpointing'] else ''}"
    sizes = f"planned {row['planned_bytes'] / 1e6:7.1f} MB, measured {row['measured_bytes'] / 1e6:7.1f} MB"
    return f"{row['model']} {row['method']} {row['precision']}, {form}: {sizes}, ratio {row['ratio']:.3f}"


def versions() -> dict[str, str]:
    """Of what the figures rest on."""
    return measure.versions()


def measured_peak(
    model_id: str, kind_name: str, labels: int, name: str, settings: dict[str, Any], shape: planning.Shape
) -> int:
    """Bytes of all tensors at the fullest moment of the second step, with what kernels take from the allocator.

    Of a method that trains some of its tensors later on, of the last step.
    """
    kind, trains_base = kinds.get(kind_name), known(name).load().trains_base
    task = SimpleNamespace(kind=kind_name, num_labels=labels)
    precision = "fp32" if trains_base else shape.precision
    model, _, info = models.load(model_id, task, precision, quantization=shape.quantization)
    adapter = variants.create(name, members=shape.members, **settings)
    if not adapter.adds_tokens:
        first_token.only(model, adapter.draw)
    adapter.attach(model, head=info.heads, fresh_head=True)
    if shape.checkpointing:
        keyed = {"use_reentrant": False, "context_fn": adapter.draw.recompute_contexts}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keyed)
    rates = torch.full((shape.members,), 1e-4, dtype=torch.float64)
    optimizer = MemberAdamW(adapter.parameter_groups(), rates)

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
    resident = timing.live_bytes(timing.tensors_in(model, adapter, vars(optimizer), getattr(adapter, "_originals", {})))
    return resident + timing.peak_growth(lambda: step(second), CPU)
