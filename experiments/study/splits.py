"""Which part of a task's data is trained on, which one the learning rate is chosen on, and which one is reported.

"best-dev-epoch" is a paper's own protocol: it keeps nothing back to choose on, and reports the official development part.
"""

from rankwise.experiments.config import Study
from rankwise.experiments.tasks import Task


def trained(study: Study, task: Task) -> str:
    return task.official_train_split if study.protocol == "best-dev-epoch" else task.train_split


def selection(study: Study, task: Task) -> str:
    return task.dev_split if study.protocol == "best-dev-epoch" else task.selection_split


def scored(study: Study, task: Task) -> str:
    return task.dev_split if study.protocol == "best-dev-epoch" else task.score_split


def evaluated(study: Study, task: Task) -> tuple[str, ...]:
    """Every split that some run is evaluated on."""
    if study.protocol == "best-dev-epoch":
        return (task.dev_split, *task.extra_dev_splits)
    return (task.selection_split, task.score_split)


def evaluated_in(study: Study, phase: str, task: Task) -> tuple[str, ...]:
    """What a run is evaluated on: a sweep's on the selection split alone, a final one's on the score split too."""
    if study.protocol == "best-dev-epoch":
        return evaluated(study, task)
    if phase == "sweep":
        return (task.selection_split,)
    return (*((task.selection_split,) if study.training.evaluations_per_epoch else ()), task.score_split)
