"""What can be known to be wrong with a study without torch and without a download."""

import contextlib
from collections.abc import Iterator, Sequence

from rankwise.experiments import quantization, sources, tracking
from rankwise.experiments.config import Study, Training
from rankwise.experiments.study.sweep import rung_steps
from rankwise.experiments.tasks import Task, in_study


def phase_training(study: Study, phase: str, rows: int, rung: int | None = None) -> Training:
    """How runs of that phase train over `rows` examples; of a sweep by successive halving those of that rung, or the last."""
    if phase == "final" or study.sweep is None:
        return study.training
    sweep = study.sweep
    training = study.training.model_copy(update={"epochs": sweep.epochs, "max_steps": sweep.max_steps})
    if sweep.halving is None or rung is None or rung == sweep.rungs - 1:
        return training
    steps = rung_steps(training.total_steps(rows), sweep.halving, sweep.rungs)[rung]
    return training.model_copy(update={"max_steps": steps})


def check(study: Study) -> None:
    """What can be known to be wrong without torch and without a download.

    Raises:
        ValueError: an unknown task, data that is at fault, terms not accepted, phases longer than the run; one line for each
            fault.
    """
    faults = []
    for entry in study.methods:
        if entry.ranks_of is None or not study.sweeps(entry):
            continue
        if entry.ranks_seed == "other" and len(study.sweep.seeds) > len(study.seeds):
            faults.append(
                f"{entry.label}: the sweep has {len(study.sweep.seeds)} seeds, which take the ranks of as many final runs of "
                f'"{entry.ranks_of}", and there are {len(study.seeds)}: give fewer, or more final seeds'
            )
        if entry.ranks_seed == "same" and not set(study.sweep.seeds) <= set(study.seeds):
            beside = sorted(set(study.sweep.seeds) - set(study.seeds))
            faults.append(
                f'{entry.label}: the sweep has seeds {beside}, with which "{entry.ranks_of}" has no final run to take ranks '
                f"of: take sweep.seeds among the study's seeds, or give one learning rate"
            )
    if any(entry.scheme is not None for entry in study.methods) and (lacking := quantization.missing()) is not None:
        faults.append(lacking)
    faults += tracking.faults(study.track)
    own = {entry.name for entry in study.data}
    tasks = []
    for name in study.tasks:
        try:
            task = in_study(name, study.data)
            tasks.append(task)
            if task.data is not None:
                sources.require_acceptance(task.data, study.accept_licences)
            if task.sizes is None:
                continue
            rows = min(task.sizes["train"], study.training.train_examples or task.sizes["train"])
            check_phases(study, rows, faults)
        except ValueError as error:
            faults.extend(str(error).splitlines() if name in own else [f"tasks: {error}"])
    if len(tasks) == len(study.tasks):
        faults.extend(_across_faults(study, tasks))
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))


def _across_faults(study: Study, tasks: Sequence[Task]) -> list[str]:
    """Why an adapter of the study cannot answer another of its tasks (experiments/across.py)."""
    if not study.across_tasks:
        return []
    if len(study.tasks) < 2:
        return [f"across_tasks = true has no effect with one task ({study.tasks[0]}): take it out, or name more tasks"]
    first, *others = tasks
    for other in others:
        if (other.kind, other.num_labels, other.label_names) != (first.kind, first.num_labels, first.label_names):
            return [
                f"across_tasks = true: {first.name} ({_said(first)}) and {other.name} ({_said(other)}) are not answered by one "
                f"head: name tasks of one kind with the same labels, or take it out"
            ]
    return []


def _said(task: Task) -> str:
    labels = task.label_names
    few = ", ".join(labels[:4]) + (", ..." if len(labels) > 4 else "")
    return task.kind + (f": {few}" if labels else f", {task.num_labels} outputs" if task.num_labels else "")


def check_phases(study: Study, rows: int, faults: list[str]) -> None:
    """Adds every entry whose step counts do not fit into the runs it takes part in."""
    halves = study.sweep is not None and study.sweep.halving is not None
    phases = [("sweep", rung) for rung in range(study.sweep.rungs)] if halves else [("sweep", None)]
    for phase, rung in (*phases, ("final", None)):
        total = phase_training(study, phase, rows, rung).total_steps(rows)
        for entry in study.methods:
            if phase == "final" or study.sweeps(entry):
                with collecting(faults):
                    entry.resolved(total)


@contextlib.contextmanager
def collecting(faults: list[str]) -> Iterator[None]:
    """Adds what the user can mend to `faults`, so that all of it is said at once."""
    try:
        yield
    except ValueError as error:
        faults.extend(str(error).splitlines())
