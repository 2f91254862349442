"""What each rank of a curve scores and costs, and which is enough."""

from rankwise.reports.rank_curve import which_rank
from rankwise.reports.results import Study
from rankwise.reports.tables.captions import alarms
from rankwise.reports.tables.cells import Difference, rate_text
from rankwise.reports.tables.summaries import arm_of, estimate, memory_cell, parameters, seconds_cell, splits
from rankwise.reports.tables.table import Table


def rank_curve(study: Study) -> Table | None:
    """A row a rank of each curve; None where the study has no curve of two ranks with a score."""
    answers = which_rank(study)
    if not answers:
        return None
    _, split = splits(study)
    rows = []
    for answer in answers:
        for point in answer.points:
            arm = arm_of(study, point.setting)
            trainable, active, _ = parameters(arm)
            below = None if point.low is None else Difference(point.below, point.low, point.high, None, point.n)
            rows.append(
                (
                    answer.curve,
                    point.rank,
                    rate_text(arm.rate),
                    point.n,
                    estimate(arm.scores.values()),
                    below,
                    point.kind,
                    point.p_enough,
                    point.p_too_small,
                    trainable,
                    active,
                    memory_cell(arm),
                    seconds_cell(arm),
                )
            )
    columns = (
        "curve", "rank", "rate", "n", f"{split} score ({study.metric})", "below the best", "rank is", "p enough", "p too small",
        "trainable", "active", "peak memory", "time",
    )  # fmt: skip
    several = " and of each curve" if len(answers) > 1 else ""
    caption = [
        *alarms(study),
        f"Enough: the true mean lies less than {answers[0].margin:g} points below that of the best of these ranks; too small: "
        f"more. A rank is enough where a one-sided test against every other rank says so, too small where one does; each "
        f"family of claims errs at most 5 % (Holm over the ranks of one task{several}, no correction over tasks or curves).",
        "Below the best: points below the rank with the highest mean, with the 95 % paired t interval; that rank was chosen by "
        "these scores, so that the interval alone is no test.",
    ]
    title = f"Score and cost of each rank: {study.task}, {study.model}"
    return Table("rank-curve", title, columns, tuple(rows), tuple(caption))
