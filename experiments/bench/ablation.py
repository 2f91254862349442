"""What each change buys: our own step and evaluation without it, beside the whole, in one process.

python -m rankwise.experiments.bench.ablation --json reports/bench/ablation.json
"""

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rankwise.experiments import first_token, measure
from rankwise.experiments.bench import timing
from rankwise.experiments.bench.arms import Ours, Setup
from rankwise.experiments.bench.cases import MINILM, SHAPES, Shape
from rankwise.experiments.bench.run import machine
from rankwise.experiments.bench.workloads import POOL, random_rows
from rankwise.experiments.files import write_json
from rankwise.variants import native

METHODS = ("lora", "dora")
# What is taken out, and how: each is in force while an arm is made and whenever it runs.
CHANGES: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "compiled passes": lambda: mock.patch.object(native, "library", lambda: None),
    "first token only": lambda: mock.patch.object(first_token, "only", lambda model, draw: False),
    "merged evaluation": lambda: mock.patch("rankwise.variants.base.Adapter.mergeable", False),
    "fused AdamW": lambda: mock.patch("rankwise.experiments.optim.MemberAdamW._is_fusable", lambda self: False),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="*", choices=[shape.name for shape in SHAPES], default=[s.name for s in SHAPES])
    chosen = parser.parse_args()
    measure.keep_freed_memory()
    device = torch.device("cpu")
    precision = measure.precision("auto", device)
    found = {"machine": machine(device, precision, ((1024, 1024, 1024),)), "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        for shape in [shape for shape in SHAPES if shape.name in chosen.shapes]:
            for method in METHODS:
                for row in measured(shape, method, Setup(device, precision, Path(scratch)), chosen.rounds):
                    low, high = row["slower_spread"]
                    print(
                        f"{row['case']:18} without {row['without']:18} {1000 * row['seconds']:7.1f} ms "
                        f"{row['slower']:.3f} [{low:.3f}, {high:.3f}]",
                        flush=True,
                    )
                    found["rows"].append(row)
    if chosen.json is not None:
        write_json(chosen.json, found)


if __name__ == "__main__":
    main()
