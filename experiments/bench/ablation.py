"""What each change buys: our own step and evaluation without it, beside the whole, in one process.

rankwise bench --ablation --json reports/bench/ablation.json
"""

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rankwise.experiments import measure
from rankwise.experiments.bench import timing
from rankwise.experiments.bench.arms import Ours, Setup
from rankwise.experiments.bench.cases import MINILM, SHAPES, Shape
from rankwise.experiments.bench.run import machine
from rankwise.experiments.bench.workloads import POOL, random_rows
from rankwise.experiments.files import write_json
from rankwise.experiments.training import first_token
from rankwise.variants import native

METHODS = ("lora", "dora")
# What is taken out, and how: each is in force while an arm is made and whenever it runs.
CHANGES: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "compiled passes": lambda: mock.patch.object(native, "library", lambda: None),
    "first token only": lambda: mock.patch.object(first_token, "only", lambda model, draw: False),
    "merged evaluation": lambda: mock.patch("rankwise.variants.adapter.interface.Adapter.mergeable", False),
    "fused AdamW": lambda: mock.patch("rankwise.experiments.training.optim.MemberAdamW._is_fusable", lambda self: False),
}
UNUSED = {"train": {"merged evaluation"}, "eval": {"compiled passes", "fused AdamW"}}  # what a phase does not have


def measured(shape: Shape, method: str, setup: Setup, rounds: int) -> Iterator[dict[str, Any]]:
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

    for phase, batches in (("train", 1), ("eval", shape.evaluation_batches)):
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


def show(json_file: Path | None, rounds: int) -> None:
    """Prints a line for each change taken out; all rows into a file where one is named."""
    measure.keep_freed_memory()
    device = torch.device("cpu")
    precision = measure.precision("auto", device)
    found = {"machine": machine(device, precision, ((1024, 1024, 1024),)), "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        for shape in SHAPES:
            for method in METHODS:
                for row in measured(shape, method, Setup(device, precision, Path(scratch)), rounds):
                    low, high = row["slower_spread"]
                    print(
                        f"{row['case']:18} without {row['without']:18} {1000 * row['seconds']:7.1f} ms "
                        f"{row['slower']:.3f} [{low:.3f}, {high:.3f}]",
                        flush=True,
                    )
                    found["rows"].append(row)
    if json_file is not None:
        write_json(json_file, found)
