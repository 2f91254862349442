"""From a trained pack to what became of each member."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.kinds import Undefined
from rankwise.experiments.tasks.task import Task
from rankwise.experiments.training.pack import Outcome
from rankwise.variants.adapter.interface import Adapter


def score(task: Task, predicted: np.ndarray, labels: Any, offsets: np.ndarray | None) -> dict[str, float] | Undefined:
    """The metrics of these predictions, in points, or why they have no value."""
    try:
        return task.metrics(predicted, labels, offsets)
    except Undefined as error:
        return error


def conclude(
    outcome: Outcome, task: Task, split: str, data: Dataset, predicted: np.ndarray, metrics: dict[str, float] | Undefined
) -> None:
    """Adds to an outcome what a member reached on a split."""
    if isinstance(metrics, Undefined):
        outcome.error, outcome.detail = metrics.error, metrics.detail
    else:
        outcome.metrics[split] = metrics
        outcome.standard_errors[split] = task.standard_error(predicted, *data.truth)
        outcome.rows[split] = data.num_examples
        outcome.predictions[split] = predicted


def take_best_epoch(outcome: Outcome, evaluations: Sequence[dict[str, Any]], split: str, metric: str, last: int) -> int:
    """Gives a member the metrics of its best evaluation on `split`, the first of equal ones; the step of that evaluation.

    evaluations: those of its log. last: the step at which it ended, which counts where no evaluation has a value.
    """
    valid = [line for line in evaluations if line["split"] == split and metric in line["metrics"]]
    if not valid or outcome.error == "diverged":
        return last
    best = max(valid, key=lambda line: line["metrics"][metric])["step"]
    outcome.error = outcome.detail = None  # where only the last epoch has no value, the best one still has
    outcome.metrics = {line["split"]: line["metrics"] for line in evaluations if line["step"] == best}
    if best != last:
        outcome.predictions = {}  # those of the end are not what counts
    return best


def adapter_facts(adapter: Adapter) -> list[dict[str, Any]]:
    """For each member what its adapter has become: parameters, scale (alpha/r in force) and ranks."""
    counts = {name: count.tolist() for name, count in adapter.parameter_counts().items()}
    ranks, nominal, physical = adapter.ranks(), adapter.nominal_ranks(), adapter.physical_ranks()
    scales = adapter.scales()
    facts = []
    for member in range(adapter.members):
        values = [float(f"{scale[member].item():.9g}") for scale in scales.values()]
        facts.append(
            {
                "trainable_parameters": counts["trainable"][member],
                "nominal_parameters": counts["nominal"][member],
                "active_parameters": counts["active"][member],
                "head_parameters": counts["head"][member],
                "scale": values[0] if len(set(values)) == 1 else dict(zip(scales, values, strict=True)) or None,
                "ranks": {name: int(rank[member]) for name, rank in ranks.items()},
                "nominal_ranks": {name: int(rank[member]) for name, rank in nominal.items()},
                "physical_ranks": {name: int(rank[member]) for name, rank in physical.items()},
            }
        )
    return facts
