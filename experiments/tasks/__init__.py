"""The tasks by name, one file a family."""

import difflib

from rankwise.experiments.tasks import conll2003, glue, reuters, sarcasm, squad
from rankwise.experiments.tasks.task import Task
from rankwise.variants.settings import quoted

__all__ = ["Task", "get", "names"]

_TASKS: dict[str, Task] = {task.name: task for family in (glue, reuters, sarcasm, conll2003, squad) for task in family.TASKS}


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
