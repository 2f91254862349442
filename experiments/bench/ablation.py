"""What each change buys: our own step and evaluation without it, beside the whole, in one process.

rankwise bench --ablation --json reports/bench/ablation.json
"""

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rankwise.experiments import measure
from rankwise.experiments.bench import timing
from rankwise.experiments.bench.arms import Ours, Setup
from rankwise.experiments.bench.cases import MINILM, SHAPES, Case, Shape, of_group
from rankwise.experiments.bench.run import machine
from rankwise.experiments.bench.workloads import POOL, random_rows
from rankwise.experiments.training import first_token
from rankwise.variants import native

CPU = torch.device("cpu")
# What is taken out, and how: each is in force while an arm is made and whenever it runs.
CHANGES: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "compiled passes": lambda: mock.patch.object(native, "library", lambda: None),
    "first token only": lambda: mock.patch.object(first_token, "only", lambda model, draw: False),
    "merged evaluation": lambda: mock.patch("rankwise.variants.adapter.interface.Adapter.mergeable", False),
    "fused AdamW": lambda: mock.patch("rankwise.experiments.training.optim.MemberAdamW._is_fusable", lambda self: False),
}
UNUSED = {"train": {"merged evaluation"}, "eval": {"compiled passes", "fused AdamW"}}  # what a phase does not have


def run(chosen: Sequence[Case], rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of these cases, on the CPU, each case's as soon as it is measured; rounds: timed ones."""
    precision = measure.precision("auto", CPU)
    with tempfile.TemporaryDirectory(prefix="rankwise-bench-") as scratch:
        for shape in SHAPES:
            at_shape = of_group(chosen, "encoder", shape.name)
            for method in dict.fromkeys(case.method for case in at_shape):
                phases = [case.phase for case in at_shape if case.method == method]
                yield from measured(shape, method, Setup(CPU, precision, Path(scratch)), rounds, phases)


def measured(
    shape: Shape, method: str, setup: Setup, rounds: int, phases: Sequence[str] = ("train", "eval")
) -> Iterator[dict[str, Any]]:
    """A row for each change: seconds per member without it, and how many times slower that is."""
    rows = random_rows(MINILM, POOL * shape.rows, shape.length)
    arms = {}
    for name, change in CHANGES.items():
        with change():
            arms[name] = Ours(method, setup, MINILM, shape, rows)

    def without(name: str, phase: str) -> Callable[[], None]:
        def step() -> None:
            with CHANGES[name]():
                arms[name].train() if phase == "train" else arms[name].evaluate()

        return step

    for phase in phases:
        batches = 1 if phase == "train" else shape.evaluation_batches
        names = [name for name in CHANGES if name not in UNUSED[phase]]
        times = timing.interleave({name: without(name, phase) for name in names}, setup.device, rounds)
        whole = times["nothing"]
        for name, taken in times.items():
            yield {
                "case": f"{phase}/{method}/{shape.name}",
                "without": name,
                "seconds": statistics.median(taken) / shape.members / batches,
                "slower": statistics.median(taken) / statistics.median(whole),
                "slower_spread": timing.quartiles(a / b for a, b in zip(taken, whole, strict=True)),
            }


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    low, high = row["slower_spread"]
    return (
        f"{row['case']:18} without {row['without']:18} {1000 * row['seconds']:7.1f} ms "
        f"{row['slower']:.3f} [{low:.3f}, {high:.3f}]"
    )


def machine_of_cpu() -> dict[str, Any]:
    """What the rows were measured on."""
    return machine(CPU, measure.precision("auto", CPU), ((1024, 1024, 1024),))
