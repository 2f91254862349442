"""The tables of one task: the comparison of its settings, the learning rates tried, and every run."""

from rankwise.reports.results import Arm, Study, best_rate, rate_score
from rankwise.reports.tables.captions import alarms, comparison_caption, edge_sentences
from rankwise.reports.tables.cells import SweepScore, error_text, rate_text
from rankwise.reports.tables.summaries import (
    difference_to,
    estimate,
    mean_known,
    memory_cell,
    parameters,
    scale_text,
    seconds_cell,
    splits,
    status_text,
)
from rankwise.reports.tables.table import Table


def comparison(study: Study) -> Table:
    """The main table of one task: a row a setting, scores of the final runs at the chosen rate."""
    assert len(study.parts()) == 1, "a comparison is of one task and one model: take one of study.parts()"
    arms = study.arms
    references = study.reference_arms
    metric, (selection, split) = study.metric or "score", splits(study)
    columns = ["setting", "rate", "n", f"{split} score ({metric})", f"{selection} score (selection)"]
    columns += [f"difference to {'full fine-tuning' if arm.method == 'full' else arm.setting}" for arm in references]
    columns += ["trainable", "active", "head", "alpha/r", "peak memory", "time", "status"]
    rows = []
    for arm in arms:
        differences = [None if arm is other else difference_to(arm, other) for other in references]
        rows.append(
            (
                arm.setting,
                rate_text(arm.rate),
                len(arm.scores),
                estimate(arm.scores.values()),
                mean_known(result.selection_score for result in arm.completed),
                *differences,
                *parameters(arm),
                scale_text(arm),
                memory_cell(arm),
                seconds_cell(arm),
                status_text(arm),
            )
        )
    title = f"{study.title}: {study.task}, {study.model}"
    return Table("comparison", title, tuple(columns), tuple(rows), tuple(comparison_caption(study)))


def rate_sweep(study: Study) -> Table | None:
    """Setting x rate -> selection score; None where no setting tried two rates."""
    arms = [arm for arm in study.arms if len(arm.grid) > 1]
    if not arms:
        return None
    selection, _ = splits(study)
    rates = sorted({rate for arm in arms for rate in arm.grid})
    rows = []
    for arm in arms:
        best = best_rate(arm)
        cells = []
        for rate in rates:
            runs = arm.grid.get(rate, ())
            mark = ("best, edge" if best.at_edge else "best") if best and best.rate == rate else ""
            cells.append(SweepScore(rate_score(runs), sum(run.status == "failed" for run in runs), len(runs), mark))
        verdict = (
            "-"
            if best is None
            else "best rate at the edge of its grid: no winner named"
            if best.at_edge
            else "best inside the grid"
        )
        rows.append((arm.setting, *cells, verdict))
    seeds = sorted({len(runs) for arm in arms for runs in arm.grid.values()})
    caption = [
        *alarms(study),
        f"Mean selection score ({study.metric} on the {selection} split) at each rate, n = {'/'.join(map(str, seeds))}; "
        "* is the best, which the final runs use; no score of the score split was used to choose.",
        "An empty cell (-) was not tried; a rate at which a seed failed is not chosen where another went through.",
    ]
    caption += _trial_sentences(study, arms)
    caption += _sharing_sentences(study, arms)
    caption += edge_sentences(arms)
    title = f"Learning rates tried: {study.task}, {study.model}"
    columns = ("setting", *(rate_text(rate) for rate in rates), "status")
    return Table("rates", title, columns, tuple(rows), tuple(caption))


def _sharing_sentences(study: Study, arms: list[Arm]) -> list[str]:
    """Which settings train at one rate, whose best is then not the best of each row."""
    groups = dict.fromkeys(tuple(sorted([arm.setting, *study.sharers(arm.setting)])) for arm in arms)
    return [
        f"{' and '.join(group)} share one rate: the one with the best mean over the runs of all of them."
        for group in groups
        if len(group) > 1
    ]


def _trial_sentences(study: Study, arms: list[Arm]) -> list[str]:
    """How many rates each setting was allowed and how many it tried."""
    tried = ", ".join(f"{arm.setting} {len(arm.grid)}" for arm in arms)
    allowed = sorted({study.trials[arm.setting] for arm in arms if arm.setting in study.trials})
    if len(allowed) == 1:
        grid = "a grid is widened by its own step while its best rate stands at the edge"
        return [f"Every setting might try {allowed[0]} rates ({grid}); tried: {tried}."]
    if len({len(arm.grid) for arm in arms}) > 1:
        return [f"Warning: not every setting had the same number of rates: {tried}."]
    return []


def every_run(study: Study) -> Table:
    """A row for each run, for the CSV beside the report."""
    columns = (
        "setting", "method", "phase", "rate", "seed", "status", "error", "selection score", "score", "steps", "seconds",
        "pack size", "peak memory bytes", "pack peak memory bytes", "tokens per second", "skipped steps", "device",
        "precision", "commit", "fingerprint",
    )  # fmt: skip
    rows = []
    for run in study.runs:
        c, r = run.config, run.result
        values = (None,) * 9 if r is None else (
            r.selection_score, r.score, r.steps, r.seconds, r.pack_size, r.peak_memory_bytes, r.pack_peak_memory_bytes,
            r.tokens_per_second, r.skipped_steps,
        )  # fmt: skip
        error = error_text(r.error) if r and r.status == "failed" else None
        rows.append(
            (c.setting, c.method, c.phase, rate_text(c.learning_rate), c.seed, run.status, error, *values,
             c.device, c.precision, (c.commit or "")[:12] + ("+" if c.dirty else ""), c.fingerprint)
        )  # fmt: skip
    return Table("runs", f"Every run: {study.task}, {study.model}", columns, tuple(rows), (), text_columns=3)
