"""Interactive figures of a study for report.html, as Vega-Lite specifications made with Altair.

Numbers come from the same statistics and tables as report.md's. Each function takes one part of a study and returns a
`Chart`, or None where there is nothing to draw. A chart has a description for readers who cannot see it, and a table of its
numbers.
"""

from rankwise.reports.page.charts.parts import CONFIG, Chart, Panel, words
from rankwise.reports.page.charts.ranks import MOST_STATES, Choice, RankChart, budget, rank_map
from rankwise.reports.page.charts.scores import differences, rate_curves, score_against_parameters

__all__ = [
    "CONFIG",
    "MOST_STATES",
    "Chart",
    "Choice",
    "Panel",
    "RankChart",
    "budget",
    "differences",
    "rank_map",
    "rate_curves",
    "score_against_parameters",
    "words",
]
