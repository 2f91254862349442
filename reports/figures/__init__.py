"""Figures of a study, as SVG and PNG, the main ones as PDF: the same runs give the same bytes."""

from rankwise.reports.figures.curves import learning_curves, rates
from rankwise.reports.figures.differences import differences
from rankwise.reports.figures.factors import factors
from rankwise.reports.figures.hypotheses import hypotheses
from rankwise.reports.figures.of_adapter import of_adapter
from rankwise.reports.figures.of_study import DRAWN, draw_all
from rankwise.reports.figures.rank_curves import rank_curve
from rankwise.reports.figures.rank_histories import budget, ranks_over_time
from rankwise.reports.figures.rank_maps import allocation_pair, one_map, rank_map, side_by_side, worth_map
from rankwise.reports.figures.site_figures import importance, knock_out, one_spectrum, spectra, stability
from rankwise.reports.figures.style import MARKERS, METHOD_COLOURS, Drawing, colour, house_style, panels, save, title_above

__all__ = [
    "DRAWN",
    "MARKERS",
    "METHOD_COLOURS",
    "Drawing",
    "allocation_pair",
    "budget",
    "colour",
    "differences",
    "draw_all",
    "factors",
    "house_style",
    "hypotheses",
    "importance",
    "knock_out",
    "learning_curves",
    "of_adapter",
    "one_map",
    "one_spectrum",
    "panels",
    "rank_curve",
    "rank_map",
    "ranks_over_time",
    "rates",
    "save",
    "side_by_side",
    "spectra",
    "stability",
    "title_above",
    "worth_map",
]
