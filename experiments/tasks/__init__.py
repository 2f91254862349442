"""The tasks by name, one file a family."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.experiments.config import read as config_of_study
from rankwise.experiments.data_entries import OwnData
from rankwise.experiments.records import STUDY_FILE
from rankwise.experiments.tasks import (
    alpaca_mmlu,
    commonsense,
    conll2003,
    e2e_nlg,
    fashion_mnist,
    glue,
    metamathqa,
    own_tasks,
    reuters,
    sarcasm,
    socialiqa,
    squad,
)
from rankwise.experiments.tasks.own_tasks import OwnTask
from rankwise.experiments.tasks.task import Task
from rankwise.variants.settings import quoted

__all__ = ["Outputs", "OwnTask", "Task", "get", "in_study", "names", "of_run", "outputs_of_run"]

_FAMILIES = (glue, reuters, sarcasm, conll2003, squad, fashion_mnist, socialiqa, e2e_nlg, metamathqa, commonsense, alpaca_mmlu)
_TASKS: dict[str, Task] = {task.name: task for family in _FAMILIES for task in family.TASKS}


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


@dataclass(frozen=True)
class Outputs:
    """What the models of a task give, which is all that is needed to load one: no data.

    scale: mean and deviation of a regression's targets, where these were standardised.
    """

    kind: str
    num_labels: int
    label_names: tuple[str, ...] = ()
    scale: tuple[float, float] = (0.0, 1.0)


def outputs_of_run(folder: Path, config: Mapping[str, Any]) -> Outputs:
    """What the model of a run gives; of a user's own data as the run wrote it down, wherever the data is now.

    config: what config.json holds.

    Raises:
        ValueError: there is no such task; or an older run's own data is gone.
    """
    own = config.get("own_data")
    if own is not None:
        return Outputs(own["kind"], max(1, len(own["labels"])), tuple(own["labels"]), tuple(own["scale"]))
    task = of_run(folder, config)
    return Outputs(task.kind, task.num_labels, task.label_names)


def of_run(folder: Path, config: Mapping[str, Any]) -> Task:
    """The task of a run, with its data; of a user's own data by the study's file that lies beside the runs.

    config: what config.json holds.

    Raises:
        ValueError: there is no such task; or its data is gone, or no longer what the run was trained on.
    """
    name, own, beside = config["task"], config.get("own_data"), folder.parent / STUDY_FILE
    data = config_of_study(beside).data if name not in _TASKS and beside.is_file() else ()
    entry = next((one for one in data if one.name == name), None)
    if entry is None:
        if own is not None:
            raise ValueError(
                f"{folder} is a run on a user's own data, \"{name}\", and no {beside} says where that is: put the study's file "
                f"there, with its [[data]]"
            )
        return get(name)
    remedy = f'say in {beside}, under [[data]] name = "{name}", where it is now'
    try:
        task = in_study(name, data)
    except ValueError as error:
        raise ValueError(f"{str(error).splitlines()[0]} ({remedy})") from None
    if own is not None and own["content"] != task.data_hash():
        raise ValueError(
            f'{entry.train}: the data of "{name}" is no longer what {folder.name} was trained on: put the old file back, '
            f"or {remedy}"
        )
    return task
