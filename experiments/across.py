"""Each adapter on each task of its study: what it learned of one, what it lost or gained on the others.

A final run of one task is scored on the reported part of every other task too, with the head that it has.  That is possible
where all tasks are of one kind with the same labels: one model then answers all of them.  Where no head is made for the task,
as of language models, the pre-trained model answers too, and a change against it can be told.
"""

from collections.abc import Mapping
from typing import Any

import torch
from rankwise import variants
from rankwise.experiments import kinds, models
from rankwise.experiments.config import Study
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.kinds import Undefined
from rankwise.experiments.tasks import Task
from rankwise.experiments.training.evaluation import Evaluator
from rankwise.experiments.training.outcomes import score
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.kinds.scheme import Scheme


def scores(
    adapter: Adapter, processor: Any, tasks: Mapping[str, tuple[Task, Dataset]], batch_size: int, precision: str
) -> list[dict[str, float | None]]:
    """For each member its score on each of these tasks, in points; None where it is undefined.

    Args:
        tasks: name -> the task and the rows that it is scored on.
    """
    of_members: list[dict[str, float | None]] = [{} for _ in range(adapter.members)]
    was_training = adapter.model.training
    for name, (task, data) in tasks.items():
        evaluator = Evaluator(adapter, kinds.get(task.kind), processor, batch_size, precision)
        for found, predicted in zip(of_members, evaluator.predictions(data), strict=True):
            metrics = predicted if isinstance(predicted, Undefined) else score(task, predicted, *data.truth)
            found[name] = None if isinstance(metrics, Undefined) else metrics[task.metric]
    adapter.model.train(was_training)
    return of_members


def untuned(
    study: Study, tasks: Mapping[str, tuple[Task, Dataset]], device: torch.device, precision: str, form: Scheme | None
) -> dict[str, float | None]:
    """The pre-trained model's score on each task; empty where the task's head would be an untrained one."""
    first = next(iter(tasks.values()))[0]
    training = study.training
    model, processor, info = models.load(study.model, first, precision, str(device), training.image_size, form)
    if info.heads:
        return {}
    adapter = variants.create("lora", rank=1)  # whose update is zero until it is trained
    adapter.attach(model, "all-linear")
    return scores(adapter, processor, tasks, training.evaluation_batch_size, precision)[0]
