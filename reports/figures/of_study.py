"""Every figure of a study, in the report's order.

Each function takes one part of a study and returns a `Drawing`, or None where there is nothing to draw.
"""

from rankwise.reports.figures.curves import learning_curves, rates
from rankwise.reports.figures.differences import differences
from rankwise.reports.figures.factors import factors
from rankwise.reports.figures.hypotheses import hypotheses
from rankwise.reports.figures.rank_curves import rank_curve
from rankwise.reports.figures.rank_histories import budget, ranks_over_time
from rankwise.reports.figures.rank_maps import allocation_pair, rank_map
from rankwise.reports.figures.site_figures import importance, knock_out, spectra, stability
from rankwise.reports.figures.style import Drawing
from rankwise.reports.results import Study

# The figures of a report, in its order.
DRAWN = (
    hypotheses,
    factors,
    differences,
    rank_curve,
    rank_map,
    allocation_pair,
    stability,
    budget,
    ranks_over_time,
    importance,
    spectra,
    knock_out,
    learning_curves,
    rates,
)


def draw_all(study: Study) -> list[Drawing]:
    """Every figure that the part has data for, in the order of the report."""
    drawings = (function(study) for function in DRAWN)
    return [drawing for drawing in drawings if drawing is not None]
