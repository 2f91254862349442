"""Verdicts, means and chances of improvement over the tasks of one study, a row a setting."""

from collections.abc import Sequence

import numpy as np
from rankwise.reports.results import Study
from rankwise.reports.statistics import (
    interquartile_mean,
    paired_differences,
    probability_of_improvement,
    random_effects,
    stratified_interval,
)
from rankwise.reports.tables.captions import alarms
from rankwise.reports.tables.cells import Difference, Estimate, interval_text
from rankwise.reports.tables.summaries import arm_of
from rankwise.reports.tables.table import Table
from rankwise.reports.verdicts import Verdict, verdicts, warnings


def verdicts_over_tasks(parts: Sequence[Study]) -> Table | None:
    """A row a setting, a column a task: the verdict and the difference to the reference; None below two tasks of one model."""
    by_task = {part.task: {v.setting: v for v in verdicts(part)} for part in parts}
    references = {v.reference for by_setting in by_task.values() for v in by_setting.values()}
    if len(by_task) < 2 or len({part.model for part in parts}) > 1 or len(references) != 1:
        return None
    [reference] = references
    settings = [s for s in parts[0].settings if any(s in by_setting for by_setting in by_task.values())]
    rows = []
    for setting in settings:
        given = [by_setting.get(setting) for by_setting in by_task.values()]
        rows.append((setting, *(None if v is None or v.mean is None else _verdict_words(v) for v in given)))
    n = sorted({v.n for by_setting in by_task.values() for v in by_setting.values()})
    caption = [
        *dict.fromkeys(line for part in parts for line in alarms(part)),
        f"Difference to {reference} in points with its 95 % paired t interval, n = {'/'.join(map(str, n))} seeds.",
        *dict.fromkeys(line for part in parts for line in warnings(part)),
    ]
    title = f"Verdicts against {reference}: {parts[0].title}, {parts[0].model}"
    return Table("verdicts-over-tasks", title, ("setting", *by_task), tuple(rows), tuple(caption), 1 + len(by_task))


def _verdict_words(verdict: Verdict) -> str:
    interval = "" if verdict.low is None else f" ({verdict.low:+.1f} to {verdict.high:+.1f})"
    return f"{verdict.kind} {verdict.mean:+.1f}{interval}"


def overall(parts: Sequence[Study]) -> Table | None:
    """A row a setting over the tasks of one study: means, interquartile mean, chance of improvement, verdicts counted.

    None where there are not two tasks of one model, or some task has no finished run.
    """
    if len({part.task for part in parts}) < 2 or len({part.model for part in parts}) > 1:
        return None
    shared = [s for s in parts[0].settings if all(arm_of(p, s) is not None and arm_of(p, s).scores for p in parts)]
    references = [part.reference_arm for part in parts]
    if not shared or any(r is None for r in references) or len({r.setting for r in references}) > 1:
        return None
    reference = references[0].setting
    rows = []
    for setting in shared:
        scores = [np.array(list(arm_of(part, setting).scores.values())) for part in parts]
        mean, iqm = float(np.mean([s.mean() for s in scores])), interquartile_mean(np.concatenate(scores))
        low, high = stratified_interval(scores) or (None, None)
        middle = stratified_interval(scores, "iqm") or (None, None)
        difference = improvement = counted = elsewhere = next_task = None
        if setting != reference:
            pairs = [paired_differences(arm_of(p, setting).scores, r.scores) for p, r in zip(parts, references, strict=True)]
            if all(map(len, pairs)):
                bounds = stratified_interval(pairs) or (None, None)
                n = min(map(len, pairs))
                difference = Difference(float(np.mean([d.mean() for d in pairs])), *bounds, None, n)
                elsewhere, next_task = _for_other_tasks(pairs)
            others = [list(r.scores.values()) for r in references]
            improvement = float(np.mean([probability_of_improvement(s, o) for s, o in zip(scores, others, strict=True)]))
            kinds = [v.kind for part in parts for v in verdicts(part) if v.setting == setting]
            counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        n = min(map(len, scores))
        rows.append(
            (setting, Estimate(mean, low, high, None, n), iqm, interval_text(*middle), difference, elsewhere, next_task,
             improvement, counted)
        )  # fmt: skip
    columns = (
        "setting", "mean over tasks", "interquartile mean", "its interval", f"difference to {reference}",
        "over tasks like these", "on another task", "P(improvement)", "verdicts",
    )  # fmt: skip
    tasks = ", ".join(part.task for part in parts)
    caption = [
        *dict.fromkeys(line for part in parts for line in alarms(part)),
        f"Over {len(parts)} tasks ({tasks}), each counted alike; intervals: 95 % percentile bootstrap, seeds drawn within each "
        "task. Metrics of different kinds are averaged here, as benchmarks do: the verdicts of each task are what counts.",
        "Those intervals speak of these tasks alone. Over tasks like these: random effects (DerSimonian and Laird) with "
        "Hartung and Knapp's 95 % interval; on another task: its 95 % prediction interval, from three tasks on.",
    ]
    return Table("overall", f"Over all tasks: {parts[0].title}, {parts[0].model}", columns, tuple(rows), tuple(caption))


def _for_other_tasks(differences: Sequence[np.ndarray]) -> tuple[Difference | None, str | None]:
    """The random-effects difference, and the interval in which that of another task lies; differences: each task's, by seed."""
    if min(map(len, differences)) < 2:
        return None, None
    found = random_effects([d.mean() for d in differences], [d.var(ddof=1) / len(d) for d in differences])
    if found is None:
        return None, None
    return Difference(found.mean, found.low, found.high, None, len(differences)), interval_text(
        found.predicted_low, found.predicted_high
    )
