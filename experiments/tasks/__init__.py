"""The tasks by name, one file a family."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from rankwise.experiments import config
from rankwise.experiments.data_entries import OwnData
from rankwise.experiments.records import STUDY_FILE
from rankwise.experiments.tasks import conll2003, fashion_mnist, glue, own_tasks, reuters, sarcasm, squad
from rankwise.experiments.tasks.own_tasks import OwnTask
from rankwise.experiments.tasks.task import Task
from rankwise.variants.settings import quoted

__all__ = ["OwnTask", "Task", "get", "in_study", "names", "of_run"]

_TASKS: dict[str, Task] = {
    task.name: task for family in (glue, reuters, sarcasm, conll2003, squad, fashion_mnist) for task in family.TASKS
}


def names() -> list[str]:
    """The names of all tasks."""
    return list(_TASKS)


def get(name: str) -> Task:
    """The task of this name. Raises: ValueError: there is none; offers the nearest spelling and the list."""
    if name in _TASKS:
        return _TASKS[name]
    lower = name.lower()
    close = difflib.get_close_matches(lower, _TASKS, n=1) or [one for one in _TASKS if one.endswith("/" + lower)]
    hint = f"; closest: {close[0]}" if close else ""
    raise ValueError(f"no task {quoted(name)}{hint}; there are {', '.join(_TASKS)}")


def in_study(name: str, data: Sequence[OwnData]) -> Task:
    """The task of this name in a study with this data of the user's own, which is read.

    Raises:
        ValueError: there is no such task; or the data is at fault: one line for each.
    """
    entry = next((one for one in data if one.name == name), None)
    if entry is None:
        return get(name)
    if name in _TASKS:
        raise ValueError(f'data "{name}": a task that comes with Rankwise has this name: give it another')
    return own_tasks.task(entry)


def of_run(folder: Path, name: str) -> Task:
    """The task of a run, by its folder; of a user's own data by the study's file that lies beside the runs.

    Raises:
        ValueError: there is no such task, or its data is gone.
    """
    beside = folder.parent / STUDY_FILE
    return in_study(name, config.read(beside).data if name not in _TASKS and beside.is_file() else ())
