"""Verdicts and statistics of one task's scores, a row a setting."""

from collections.abc import Sequence

from rankwise.reports import rows
from rankwise.reports.results import Study
from rankwise.reports.statistics import (
    FEWEST_FOR_BOOTSTRAP,
    bca_interval,
    paired_differences,
    probability_of_improvement,
    sign_flip_test,
    smallest_difference,
    summary,
)
from rankwise.reports.tables.captions import alarms
from rankwise.reports.tables.cells import Difference, interval_text
from rankwise.reports.tables.table import Table
from rankwise.reports.verdicts import test_set_error, verdicts, warnings


def verdict_table(study: Study) -> Table | None:
    """A row a setting: the verdict against the reference in words, and the numbers behind it; None without a reference."""
    given = verdicts(study)
    if not given:
        return None
    rows = []
    for v in given:
        difference = None if v.mean is None else Difference(v.mean, v.low, v.high, None, v.n)
        rows.append((v.setting, v.kind, v.text, v.n, difference, v.p, v.p_study, v.p_equivalent, v.smallest))
    columns = (
        "setting", "verdict", "in words", "n", "difference", "p (Holm)", "p over the study (Holm)", "TOST p (Holm)",
        "smallest detectable difference",
    )  # fmt: skip
    title = f"Verdicts against {given[0].reference}: {study.task}, {study.model}"
    margin = ""
    if study.margin is not None:
        margin = f" Equivalent: two one-sided tests (TOST) within {study.margin:g} points, 5 %, corrected alike."
    caption = [
        *alarms(study),
        *warnings(study),
        "Exact sign-flip test on differences paired by seed, Holm's correction over the family of "
        f"{max(len(study.settings) - 1, 1)} comparisons with {given[0].reference} on this task, 5 %.{margin}",
    ]
    return Table("verdicts", title, columns, tuple(rows), tuple(caption), text_columns=3)


def statistics_table(study: Study) -> Table | None:
    """A row a setting: everything that is computed from its scores; None where no run has finished."""
    arms = [arm for arm in study.arms if arm.scores]
    if not arms:
        return None
    reference = study.reference_arm
    m = max(len(study.settings) - 1, 1)
    table = []
    for arm in arms:
        values = list(arm.scores.values())
        s = summary(values)
        own = _bootstrapped(values)
        paired = improvement = smallest = p = None
        if reference is not None and arm is not reference:
            differences = paired_differences(arm.scores, reference.scores)
            paired, smallest = _bootstrapped(differences), smallest_difference(differences, m)
            improvement = probability_of_improvement(values, list(reference.scores.values()))
            p = sign_flip_test(differences) if len(differences) else None
        error = test_set_error(arm)
        table.append(
            (arm.setting, s.n, s.mean, s.sd, s.median, interval_text(s.low, s.high), own, paired, improvement, p, smallest,
             None if error is None else error[0])
        )  # fmt: skip
    to = "" if reference is None else f" to {reference.setting}"
    columns = (
        "setting", "n", "mean", "sd", "median", "95 % t interval", "BCa interval", f"BCa of difference{to}",
        "P(improvement)", "p (uncorrected)", "smallest detectable difference", "test-set error",
    )  # fmt: skip
    caption = [
        *alarms(study),
        "sd is over seeds, of the sample. BCa: bias-corrected and accelerated bootstrap (9,999 resamples, fixed seed)."
        + ("" if min(len(a.scores) for a in arms) >= FEWEST_FOR_BOOTSTRAP else
           " Below ten seeds it covers far less than it claims: take the t interval."),
        f"P(improvement): chance that a run beats one of {reference.setting}'s, ties counting half."
        if reference is not None
        else "No reference takes part.",
    ]  # fmt: skip
    title = f"Statistics of the scores: {study.task}, {study.model}"
    return Table("statistics", title, columns, tuple(table), tuple(caption))


def rows_table(study: Study) -> Table | None:
    """A row a setting: intervals over seeds, and over seeds and test rows; None where no run has finished.

    Where they cannot be computed the caption says why.
    """
    arms = [arm for arm in study.arms if arm.scores]
    if not arms:
        return None
    found, troubles = {}, {}  # by setting; reason -> settings
    for arm in arms:
        try:
            found[arm.setting] = rows.scored(study, arm)
        except rows.NoRows as error:
            troubles.setdefault(str(error), []).append(arm.setting)
    reference = None if study.reference_arm is None else found.get(study.reference_arm.setting)
    table = []
    for setting, ours in found.items():
        try:
            own = rows.of_setting(ours)
            to = rows.of_difference(ours, reference) if reference is not None and ours is not reference else None
        except rows.NoRows as error:
            troubles.setdefault(str(error), []).append(setting)
            continue
        table.append((setting, own.seeds.n, own.num_rows, own.seeds.mean, *_both(own), None if to is None else to.seeds.mean,
                      *((None, None) if to is None else _both(to))))  # fmt: skip
    to = "" if reference is None else f" to {reference.setting}"
    columns = (
        "setting", "n", "test rows", "mean", "over seeds", "over seeds and rows", f"difference{to}",
        "difference over seeds", "difference over seeds and rows",
    )  # fmt: skip
    caption = alarms(study)
    if table:
        caption.append(
            "95 % intervals. Over seeds: Student's t, for other seeds on these test rows. Over seeds and rows: for other rows "
            "of the same kind too, by the predictions that each run keeps (Obuchowski and Rockette 1995, Hillis 2007; 200 "
            "resamples of the rows). Neither is corrected for the number of comparisons."
        )
    caption += [f"No interval over test rows ({', '.join(settings)}): {why}." for why, settings in troubles.items()]
    return Table("rows", f"Seeds and test rows: {study.task}, {study.model}", columns, tuple(table), tuple(caption))


def _both(one: rows.Crossed) -> tuple[str, str]:
    return interval_text(one.seeds.low, one.seeds.high), interval_text(one.low, one.high)


def _bootstrapped(values: Sequence[float]) -> str | None:
    interval = bca_interval(values)
    return None if interval is None else interval_text(*interval)
