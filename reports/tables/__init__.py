"""Tables: one object each, which is written as Markdown, CSV, LaTeX (booktabs) and plain text."""

from rankwise.reports.tables.across_tasks import across_tasks
from rankwise.reports.tables.captions import alarms, task_caption
from rankwise.reports.tables.cells import Cost, Difference, Estimate, Rank, SweepScore, decimal, rate_text, seconds_text
from rankwise.reports.tables.comparisons import comparison, every_run, rate_sweep
from rankwise.reports.tables.factors import factors
from rankwise.reports.tables.over_tasks import overall, verdicts_over_tasks
from rankwise.reports.tables.rank_curves import rank_curve
from rankwise.reports.tables.rank_tables import rank_table, ranks
from rankwise.reports.tables.samples import samples
from rankwise.reports.tables.scores import rows_table, statistics_table, verdict_table
from rankwise.reports.tables.site_tables import agreement, study_tables
from rankwise.reports.tables.table import Table, escape_latex, escape_markdown

__all__ = [
    "Cost",
    "Difference",
    "Estimate",
    "Rank",
    "SweepScore",
    "Table",
    "across_tasks",
    "agreement",
    "alarms",
    "comparison",
    "decimal",
    "escape_latex",
    "escape_markdown",
    "every_run",
    "factors",
    "overall",
    "rank_curve",
    "rank_table",
    "ranks",
    "rate_sweep",
    "rate_text",
    "rows_table",
    "samples",
    "seconds_text",
    "statistics_table",
    "study_tables",
    "task_caption",
    "verdict_table",
    "verdicts_over_tasks",
]
