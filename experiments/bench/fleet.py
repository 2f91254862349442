"""10,000 runs on many machines, simulated from measured times: idle machines, checkpoints' bytes, where the writer is full.

rankwise bench --fleet reports/bench/bench.json --json reports/bench/fleet/fleet.json --out reports/bench/fleet

The study is `thousand` with ten times its seeds: the packs, the phases and the needs of its plan (experiments/study/plan.py).
Seconds of a step are those that `rankwise bench --full` measured in packs (FILE), between two sizes of pack on their line.  A
checkpoint's bytes are counted from the pack's own tensors.  What a file costs the one writer is measured here: written whole,
with fsync, as every file of a run is (experiments/files.py).  experiments/plan/fleet.py has the rest.
"""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rankwise.experiments import checks, config, kinds
from rankwise.experiments.config import Entry, Study
from rankwise.experiments.files import write_file
from rankwise.experiments.plan import step
from rankwise.experiments.plan.fleet import Fleet, Job, Writer, lower_bounds, saturation, simulate
from rankwise.experiments.study import PackPlan, groups, plan, splits
from rankwise.experiments.tasks import Task, in_study

STUDY, SEEDS = "thousand", 10  # times the seeds of its sweep and of its final runs
MACHINES = (1, 10, 32, 100, 320, 1000)
MANY = 100  # machines of the rows with failures, and for each copy of the study where the fleet grows
FAILURES = (24.0, 6.0)  # hours between two of one machine, on average
REPAIR_SECONDS = 600.0
MOST_COPIES = 64  # of the study, where the fleet grows
FULL = 0.95  # of the time, in which a writer that wrote is full
UNMEASURED = {"bitfit": "lora"}  # methods of the study that the benchmark has no packs of -> whose steps they are charged
SIZES = tuple(1 << power for power in range(12, 27, 2))  # bytes of the files that the writer is measured with
REPETITIONS = 15
# Files of a run, and their bytes in reports/studies/allocation (MiniLM on STS-B, 160 steps), the adapter's apart.
FILES = {"sweep": 4, "final": 8}  # config, metrics, ranks, result; and sites, predictions, the adapter's two
RECORD_BYTES = {"sweep": 43_000, "final": 57_000}


@dataclasses.dataclass(frozen=True)
class Machine:
    """A kind of machine: how much faster than the one of the measured steps, and the most members of a pack on it."""

    name: str
    speed: float
    pack: int


MEASURED = Machine("as measured", 1.0, 8)
# No GPU has been measured.  reports/bench/notes.md expects 1,000 runs of this study in half an hour on one H100.
ASSUMED = Machine("assumed: 25 times as fast", 25.0, 32)


def measured_writer(folder: Path) -> dict[str, Any]:
    """The least and the median seconds to write a file of each size into that folder, and the line of the least ones.

    Of the least: what else computes on the machine makes a file wait for the processor, and no file takes less than it does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    least, median = [], []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writer-") as made:
        for size in SIZES:
            content, taken = os.urandom(size), []
            for number in range(REPETITIONS):
                began = time.perf_counter()
                write_file(Path(made) / f"{size}-{number}", content)
                taken.append(time.perf_counter() - began)
            least.append(min(taken))
            median.append(statistics.median(taken))
    return {**_line(least), "sizes": list(SIZES), "seconds": least, "median": {**_line(median), "seconds": median}}


def _line(seconds: Sequence[float]) -> dict[str, float]:
    """Through the smallest and the largest size."""
    slope = (seconds[-1] - seconds[0]) / (SIZES[-1] - SIZES[0])
    return {"file_seconds": seconds[0], "bytes_per_second": 1 / max(slope, 1e-12)}


def scaled(study: Study, times: int) -> Study:
    """The study with so many times its seeds, in the sweep and in the final runs."""
    assert study.sweep is not None
    sweep = study.sweep.model_copy(update={"seeds": list(range(times * len(study.sweep.seeds)))})
    return study.model_copy(update={"seeds": list(range(times * len(study.seeds))), "sweep": sweep})


def needs(study: Study, plans: Sequence[PackPlan]) -> list[tuple[int, ...]]:
    """Of each pack the places of those that it needs: of a final one the sweeps that choose its rate, of one that takes ranks
    of another entry that entry's final runs."""

    def places(phase: str, labels: Sequence[str], task: str) -> list[int]:
        return [i for i, one in enumerate(plans) if (one.phase, one.task) == (phase, task) and one.entry.label in labels]

    found = []
    for one in plans:
        own = one.entry.shared_with or one.entry.label
        sharers = [entry.label for entry in study.methods if own in (entry.label, entry.shared_with)]
        wanted = places("sweep", sharers, one.task) if one.phase == "final" and study.sweeps(one.entry) else []
        if one.entry.ranks_of is not None:
            wanted += places("final", [one.entry.ranks_of], one.task)
        found.append(tuple(sorted(wanted)))
    return found


def step_seconds(times: dict[str, Any]) -> Callable[[str, int], float]:
    """(method, members) -> seconds of a step of a pack, on the line between the packs that were measured.

    Args:
        times: what `rankwise bench --full` wrote.

    Raises:
        ValueError: it has no packs.
    """
    measured: dict[str, list[tuple[int, float]]] = {}
    for row in times.get("throughput", []):
        if row["step_seconds"] is not None:
            measured.setdefault(row["method"], []).append((row["members"], row["step_seconds"]))

    def seconds(method: str, members: int) -> float:
        points = sorted(measured.get(UNMEASURED.get(method, method), []))
        if not points or members > points[-1][0]:
            raise ValueError(f"no step of {method} in a pack of {members} was measured: make the file with --full")
        return float(np.interp(members, [size for size, _ in points], [taken for _, taken in points]))

    return seconds


def jobs(study: Study, machine: Machine, seconds: Callable[[str, int], float]) -> list[Job]:
    """The packs of a study as they cost on such machines, in the order of its plan."""
    plans = groups(study, machine.pack)
    tasks = {name: in_study(name, study.data) for name in study.tasks}
    costs: dict[tuple[str, str, int], step.StepCost] = {}
    found = []
    for one, needed in zip(plans, needs(study, plans), strict=True):
        members, task = len(one.members), tasks[one.task]
        key = one.entry.label, one.task, members
        if key not in costs:
            costs[key] = _cost(study, one.entry, task, members)
        cost = costs[key]
        rows = _rows(study, task)
        training = checks.phase_training(study, one.phase, rows["train"])
        trained = plan.work(one, training, rows, splits.evaluated_in(study, one.phase, task)) / members
        each = seconds(one.entry.method, members) / training.batch_size
        adapter = 4 * (cost.active + cost.head) if one.phase == "final" else 0
        found.append(
            Job(
                seconds=trained * each / machine.speed,
                checkpoint_bytes=cost.adapter + cost.optimizer,
                result_files=members * FILES[one.phase],
                result_bytes=members * (RECORD_BYTES[one.phase] + adapter),
                needs=needed,
            )
        )
    return found


def _rows(study: Study, task: Task) -> dict[str, int]:
    most = {"train": study.training.train_examples}
    most |= dict.fromkeys(splits.evaluated(study, task), study.training.evaluation_examples)
    found = {}
    for name, limit in most.items():
        size = (task.sizes or {})[splits.trained(study, task) if name == "train" else name]
        found[name] = size if limit is None else min(size, limit)
    return found


def _cost(study: Study, entry: Entry, task: Task, members: int) -> step.StepCost:
    """What a step of the pack takes; its rows do not count for what a checkpoint holds, and are few."""
    total = study.training.total_steps(_rows(study, task)["train"])
    settings = entry.resolved(total).model_dump(exclude_unset=True)
    shape = step.Shape(rows=1, length=8, members=members, targets=entry.targets)
    return step.cost(study.model, kinds.get(task.kind), task.num_labels, entry.method, settings, shape)


def copies(of: Sequence[Job], number: int) -> list[Job]:
    """So many studies of these packs, one after the other."""
    return [
        dataclasses.replace(job, needs=tuple(need + at * len(of) for need in job.needs)) for at in range(number) for job in of
    ]


def run(
    measured: dict[str, Any], folder: Path, progress: Callable[[str, float], None] = lambda what, done: None
) -> dict[str, Any]:
    """Measures the writer in that folder, and simulates by the measured times (`step_seconds`).

    Raises:
        ValueError: a method or a size of pack has none.
    """
    study = scaled(config.read(config.find(Path(STUDY))), SEEDS)
    written = measured_writer(folder)
    writer, slow = (Writer(one["file_seconds"], one["bytes_per_second"]) for one in (written, written["median"]))
    every, seconds = study.checkpoint_seconds, step_seconds(measured)
    rows, growth = [], []
    for machine in (MEASURED, ASSUMED):
        of = jobs(study, machine, seconds)
        lengths, sizes = sorted(one.seconds for one in of), sorted(one.checkpoint_bytes for one in of)
        facts: dict[str, Any] = {"kind": machine.name, "pack": machine.pack, "packs": len(of)}
        facts["pack_seconds"] = [lengths[0], statistics.median(lengths), lengths[-1]]
        facts["checkpoint_bytes_range"] = [sizes[0], sizes[-1]]
        for number in MACHINES:
            rows.append({**facts, "failure_hours": None, **_row(of, Fleet(number, every), writer)})
        for hours in FAILURES:
            fleet = Fleet(MANY, every, hours * 3600, REPAIR_SECONDS)
            rows.append({**facts, "failure_hours": hours, **_row(of, fleet, writer)})
        full, slow_full = saturation(of, every, writer), saturation(of, every, slow)
        for first in (False, True):
            number = 1
            while True:
                fleet = Fleet(number * MANY, every, results_first=first)
                row = _row(copies(of, number), fleet, writer)
                growth.append(
                    {
                        "kind": machine.name,
                        "results_first": first,
                        "copies": number,
                        "full_at": full,
                        "full_at_median": slow_full,
                        **row,
                    }
                )
                number *= 2
                if number > MOST_COPIES or (row["writer_share"] > FULL and row["machines"] > 2 * full):
                    break
        progress(machine.name, 1)
    of_times = {name: measured["machine"].get(name) for name in ("device_name", "threads", "commit")}
    study_facts = {"study": STUDY, "seeds": SEEDS, "runs": sum(len(one.members) for one in groups(study, MEASURED.pack))}
    return {
        **study_facts,
        "checkpoint_seconds": every,
        "repair_seconds": REPAIR_SECONDS,
        "unmeasured": UNMEASURED,
        "times": of_times,
        "writer": written,
        "rows": rows,
        "growth": growth,
    }


def _row(of: Sequence[Job], fleet: Fleet, writer: Writer) -> dict[str, Any]:
    outcome = simulate(of, fleet, writer)
    bounds = lower_bounds(of, fleet.machines, writer)
    return {
        **dataclasses.asdict(outcome),
        "idle_share": outcome.idle_share,
        "writer_share": outcome.writer_share,
        "work_bound": bounds["work"],
        "chain_bound": bounds["chain"],
        "writer_bound": bounds["writer"],
    }
