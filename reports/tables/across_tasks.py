"""Each setting's adapters on each task of the study: a row a setting and the task that it was trained on."""

from collections.abc import Sequence

from rankwise.reports.results import Arm, Study
from rankwise.reports.statistics import summary
from rankwise.reports.tables.captions import alarms
from rankwise.reports.tables.cells import Cell, Difference
from rankwise.reports.tables.summaries import arm_of, estimate
from rankwise.reports.tables.table import Table


def across_tasks(parts: Sequence[Study]) -> Table | None:
    """The matrix of a study with `across_tasks = true`; None where no run has been scored on another task."""
    if not any(run.across for part in parts for arm in part.arms for run in arm.of("completed")):
        return None
    tasks = [part.task for part in parts]
    rows: list[tuple[Cell, ...]] = []
    base = _untuned(parts)
    if base:
        rows.append(("pre-trained", "-", 0, *(base.get(task) for task in tasks), None))
    missing = 0
    for setting in parts[0].settings:
        for part in parts:
            arm = arm_of(part, setting)
            if arm is None or not arm.completed:
                continue
            missing += sum(not run.across for run in arm.of("completed"))
            cells = [estimate(_scores(arm, task)) for task in tasks]
            rows.append((setting, part.task, len(arm.completed), *cells, _change(arm, tasks, base)))
    caption = [
        *dict.fromkeys(line for part in parts for line in alarms(part)),
        "Points on the reported part of each task, of the adapter that was trained on the task of the row; +- is the "
        "half-width of the 95 % t interval over seeds.",
    ]
    if base:
        caption.append(
            "On the others: mean change on the other tasks against the pre-trained model, with its 95 % t interval over seeds; "
            "below zero something was forgotten."
        )
    else:
        caption.append("The pre-trained model has no head for these tasks, so that no change against it can be told.")
    if missing:
        caption.append(f"{missing} runs were made before across_tasks was set, and are scored on their own task alone.")
    columns = ("setting", "trained on", "n", *tasks, "on the others")
    return Table(
        "across-tasks", f"Each adapter on each task: {parts[0].title}", columns, tuple(rows), tuple(caption), text_columns=2
    )


def _scores(arm: Arm, task: str) -> list[float]:
    """Of each seed that has a score on the task."""
    found = [run.result.score if run.config.task == task else run.across.get(task) for run in arm.of("completed")]
    return [score for score in found if score is not None]


def _change(arm: Arm, tasks: Sequence[str], base: dict[str, float | None]) -> Difference | None:
    """The mean change on the tasks that a run was not trained on, over its seeds."""
    changes = []
    for run in arm.of("completed"):
        apart = [
            run.across[task] - base[task]
            for task in tasks
            if task != run.config.task and run.across.get(task) is not None and base.get(task) is not None
        ]
        changes += [sum(apart) / len(apart)] if apart else []
    s = summary(changes)
    return s and Difference(s.mean, s.low, s.high, s.sd, s.n)


def _untuned(parts: Sequence[Study]) -> dict[str, float | None]:
    """The pre-trained model's scores, the same in every run that has them."""
    runs = (run for part in parts for arm in part.arms for run in arm.of("completed"))
    return next((run.untuned for run in runs if run.untuned), {})
