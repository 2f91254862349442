"""AdamW's averages in 8 bits beside fp32: what training loses by them, and what they take.

rankwise bench --optimizer-states > reports/bench/optimizer-states.md

MiniLM-L6 on STS-B, the same steps, rates and seeds with both; three members in a pack.  What the 8 bits change is shown beside
what another seed changes, which is the size of a difference that nobody would call one.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rankwise.experiments import models, tasks
from rankwise.experiments.config import Training
from rankwise.experiments.data.draws import SUBSET
from rankwise.experiments.training.pack import Pack
from rankwise.experiments.training.trainer import Trainer
from rankwise.variants.settings import check

MODEL, TASK = "sentence-transformers/all-MiniLM-L6-v2", "glue/stsb"
METHODS = {"lora": ({"rank": 32, "alpha": 64}, 1e-3)}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Measured:
    """One pack at its end.  changes: of each member, its update of all sites, flat."""

    losses: list[float]
    scores: list[float]
    changes: torch.Tensor  # (K, numbers)
    state_bytes: int


def lines(steps: int = 40) -> Iterator[str]:
    """The page, a line at a time."""
    yield "# AdamW's averages in 8 bits\n"
    seeds = ", ".join(map(str, SEEDS))
    yield f"MiniLM-L6, STS-B, {steps} steps of 16 rows, seeds {seeds}, {torch.get_num_threads()} threads.\n"
    yield "| method | averages | MiB | last training loss | validation score | off the exact update |"
    yield "| :-- | :-- | --: | --: | --: | --: |"
    for name in METHODS:
        exact, coded = (_run(name, kept, steps) for kept in ("32-bit", "8-bit"))
        for kept, one in (("32-bit", exact), ("8-bit", coded)):
            off = "-" if kept == "32-bit" else f"{100 * _distance(exact.changes, one.changes):.1f} %"
            yield (
                f"| {name} | {kept} | {one.state_bytes / 2**20:.1f} | {_each(one.losses, 4)} | {_each(one.scores, 2)} | {off} |"
            )
        rolled = exact.changes.roll(1, 0)
        yield f"| {name} | 32-bit, another seed | | | | {100 * _distance(exact.changes, rolled):.0f} % |"
    yield "\nOff the exact update: the norm of the difference of both updates of all sites over that of the exact one, a mean"
    yield "over the seeds.  Losses and scores stand in the order of the seeds.  Made by `rankwise bench --optimizer-states`."


def _each(values: list[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


def _distance(exact: torch.Tensor, other: torch.Tensor) -> float:
    return float(((other - exact).norm(dim=1) / exact.norm(dim=1)).mean())


def _run(name: str, kept: str, steps: int) -> Measured:
    settings, rate = METHODS[name]
    training = Training(
        epochs=1, max_steps=steps, batch_size=16, max_length=32, precision="fp32", evaluations_per_epoch=0, log_every=10,
        train_examples=16 * steps, evaluation_examples=256, optimizer_states=kept,
    )  # fmt: skip
    task = tasks.get(TASK)
    pack = Pack(
        method=name, settings=check(name, settings), targets="all-linear", task=task, model=MODEL, training=training,
        seeds=SEEDS, learning_rates=(rate,) * len(SEEDS), splits=("validation",), device=torch.device("cpu"),
        precision="fp32", quantization=None, best_epoch=False,
    )  # fmt: skip
    _, processor, _ = models.load(MODEL, task)
    parts = {"train": training.train_examples, "validation": training.evaluation_examples}
    data = {part: task.encode(processor, part, 32).random_part(rows, SUBSET) for part, rows in parts.items()}
    with tempfile.TemporaryDirectory() as scratch:
        logs = [Path(scratch) / str(seed) for seed in SEEDS]
        for folder in logs:
            folder.mkdir()
        trainer = Trainer(pack, data, Path(scratch) / "checkpoint.safetensors", logs, 1e9)
        outcomes = trainer.run()
    averages = trainer.optimizer.state().items()
    return Measured(
        [outcome.facts["final_train_loss"] for outcome in outcomes],
        [outcome.metrics["validation"][task.metric] for outcome in outcomes],
        torch.cat([trainer.adapter.delta(n).detach().flatten(1) for n in trainer.adapter.changed_weights()], dim=1),
        sum(t.numel() * t.element_size() for key, t in averages if key.startswith(("first", "second"))),
    )
