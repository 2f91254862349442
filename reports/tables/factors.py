"""What each part of a method is worth, of a study with every combination of its parts."""

from rankwise.reports.factors import Effect, decompositions
from rankwise.reports.results import Study
from rankwise.reports.tables.captions import alarms
from rankwise.reports.tables.cells import Difference
from rankwise.reports.tables.table import Table


def factors(study: Study) -> Table | None:
    """A row an effect, single factors first, all parts together last; None where nothing has an effect yet."""
    found = [one for one in decompositions(study) if one.effects]
    if not found:
        return None
    rows = []
    for one in found:
        labelled = [(" x ".join(effect.factors), effect) for effect in one.effects]
        rows += [(one.design, label, *_cells(effect, one.n)) for label, effect in labelled]
        rows.append((one.design, "all parts against none", *_cells(one.whole, one.n)[:3], None))
    caption = [
        *alarms(study),
        "Effect of one factor: the mean score with it less that without it, over all combinations of the others; of a x b: "
        "half of what a adds to the effect of b, and so on. In points, with the 95 % t interval over seeds.",
        "p: exact sign-flip test over seeds; corrected by Holm over the single factors, and over all combinations of factors, "
        "as two families. The difference of all parts and none is the sum of the effects of one factor and of three.",
    ]
    if failed := sum(one.failed for one in found):
        caption.append(f"{failed} failed runs are scored as a constant predictor.")
    title = f"What each part is worth: {study.task}, {study.model}"
    return Table("factors", title, ("of", "factor", "n", "effect", "p", "p corrected"), tuple(rows), tuple(caption))


def _cells(effect: Effect, n: int) -> tuple:
    difference = effect.mean if effect.low is None else Difference(effect.mean, effect.low, effect.high, None, n)
    return n, difference, effect.p, effect.p_adjusted
