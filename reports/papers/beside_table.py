"""The table of published values beside ours, with its caption: spreads, stand-in models, departures, shapes of curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.reports.papers import published as published_tables
from rankwise.reports.papers.beside import Line, agreement, load
from rankwise.reports.papers.listing import short_name
from rankwise.reports.papers.published import Published
from rankwise.reports.tables.cells import Estimate
from rankwise.reports.tables.table import Table


@dataclass(frozen=True)
class Reported:
    """A published value, and its spread over so many seeds where the paper gives one."""

    value: float
    spread: float | None
    n: int | None

    def __str__(self) -> str:
        return f"{self.value:.2f}" + (f" (sd {self.spread:.2f})" if self.spread is not None else "")


def table(published: Published, lines: Sequence[Line]) -> Table:
    """Published beside ours, a row for each line; the caption says which model stands in, and every departure."""
    rows = []
    several = len({(line.variant, line.scale, line.model) for line in lines}) > 1
    for line in lines:
        ours, said = line.ours, agreement(line)
        label = line.row
        if several:
            label += (
                f" [{line.variant}" + (f", scale {line.scale:g}" if line.scale < 1 else "") + f", {short_name(line.model)}]"
            )
        rows.append(
            (
                label,
                line.title,
                said.text,
                Reported(line.published, line.spread, line.published_n),
                None if ours is None else Estimate(ours.mean, ours.low, ours.high, ours.sd, ours.n),
                len(line.scores),
                said.difference,
            )
        )
    models = dict.fromkeys(line.model for line in lines)
    stand_ins = {line.model: line.stands_in_for for line in lines if line.stands_in_for}
    names = ", ".join(f"{m} standing in for {stand_ins[m]}" if m in stand_ins else m for m in models)
    title = f"{published.paper}, {published.table}, beside ours ({names})"
    columns = ("row", "column", "verdict", "published", "ours", "n", "difference")
    return Table("beside", title, columns, tuple(rows), tuple(_caption(published, lines)), text_columns=3)


def _caption(published: Published, lines: Sequence[Line]) -> list[str]:
    what = "" if "seed" in published.about else f"; {published.statistic or 'statistic not said'}, seeds not said"
    if what and published.seeds:
        what = what.replace("seeds not said", f"{published.seeds} seeds")
    caption = [f"Published: {published.source}; {published.about}{what}."]
    if any(line.spread is not None for line in lines):
        known = published.spread_is not in (None, "not said")
        caption.append(
            f"The published spread is {published.spread_is}." if known
            else "What the published spread is, the paper does not say; it is taken as a standard deviation over its seeds."
        )  # fmt: skip
    splits = sorted({line.split for line in lines if line.split})
    caption.append(
        f"Ours: mean over n seeds of the best epoch's score on the development part ({', '.join(splits)}); +- is the "
        "half-width of the 95 % t interval."
    )
    if any(line.spread is not None and not line.miniature for line in lines):
        caption.append("Where a spread is published the difference has Welch's 95 % interval, of both spreads.")
    if any(line.spread is None and not line.miniature for line in lines):
        tolerance = max(line.tolerance for line in lines)
        caption.append(
            f"No spread is published{' for the others' if any(line.spread is not None for line in lines) else ''}: the "
            f"difference has our own interval, widened by the table's tolerance of {tolerance:g}."
        )
    caption += dict.fromkeys(f"Not comparable ({r.tag}): {r.text}" for line in lines for r in line.reasons)
    if any(line.failed for line in lines):
        errors = dict.fromkeys(error.split("\n")[0] for line in lines for error in line.failed)
        caption.append(f"Failed runs: {'; '.join(errors)}.")
    caption += dict.fromkeys(note for line in lines for note in line.notes)
    caption += shape(lines)
    caption += departures(lines)
    caption += [f"The paper's own inconsistency: {sentence}" for sentence in published.inconsistencies]
    return caption


def departures(lines: Sequence[Line]) -> list[str]:
    """Every departure from the paper's protocol once, with its lines where it does not concern all of them."""
    of: dict[str, list[Line]] = {}
    for line in lines:
        for sentence in dict.fromkeys(line.departures):
            of.setdefault(sentence, []).append(line)
    said = []
    for sentence, among in of.items():
        places = dict.fromkeys(f"{line.row}, {line.cell}" for line in among)
        everywhere = len(among) == len(lines)
        said.append(f"Departure: {sentence}" if everywhere else f"Departure ({'; '.join(places)}): {sentence}")
    return said


def shape(lines: Sequence[Line]) -> list[str]:
    """A sentence for each curve of a miniature: where it is best, its range, and the rank correlation with the paper's."""
    curves: dict[tuple, list[Line]] = {}
    for line in lines:
        if line.miniature and line.position is not None and line.ours is not None:
            what = line.row.rpartition(", ")[0]  # a label ends with a comma and the size, the point on the curve
            curves.setdefault((what, line.column, line.cell, line.variant, line.scale, line.model), []).append(line)
    sentences = []
    for (what, *_), curve in curves.items():
        label = f"{what}: " if what else ""
        if len(curve) < 3:
            sentences.append(f"{label}The shape of a curve needs three points or more; here are {len(curve)}.")
            continue
        curve = sorted(curve, key=lambda line: line.position)
        first, better = curve[0], max if curve[0].higher_is_better else min
        published, ours = [line.published for line in curve], [line.ours.mean for line in curve]
        tops = better(range(len(curve)), key=published.__getitem__), max(range(len(curve)), key=ours.__getitem__)
        sentences.append(
            f"{label}Shape over rank {first.position:g} to {curve[-1].position:g}, no numbers compared: published "
            f"{first.title} is best at {curve[tops[0]].position:g} and spans {max(published) - min(published):.2f}; ours "
            f"({first.metric} of {first.cell}, {first.model}) is best at {curve[tops[1]].position:g} and spans "
            f"{max(ours) - min(ours):.2f}; "
            f"rank correlation of the two curves {_rank_correlation(published, ours, first.higher_is_better)}, "
            f"{len(curve)} points."
        )
    return sentences


def _rank_correlation(published: list[float], ours: list[float], higher_is_better: bool) -> str:
    if len(set(published)) == 1 or len(set(ours)) == 1:
        return "undefined"
    from scipy.stats import spearmanr

    value = float(spearmanr(published, ours).statistic)
    return f"{value if higher_is_better else -value:+.2f}"


def of_folder(folder: str | Path) -> Table | None:
    """Published beside ours, of every cell that was run into a folder; None where none was."""
    name, lines = load(folder)
    return None if name is None else table(published_tables.load(name), lines)
