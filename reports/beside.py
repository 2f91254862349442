"""Published beside ours: a paper's value, the runs of its recipe, their difference, and what may be said of it.

A line is one value of a published table and the scores that our runs of its cell came to; it keeps the facts, and the
verdict follows from them whenever it is shown. `not comparable` comes before every other verdict: with another model, a
shortened recipe, another start, one seed or a failed run the numbers are shown and nothing is claimed.

    difference = ours - published;  inside the combined interval if |difference| <= h
    h: half-width of Welch's 95 % t interval from our sd over our n and the published sd over the published n;
       where no spread is published, the half-width of our own t interval plus the table's tolerance.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rankwise.experiments.files import write_file
from rankwise.experiments.records import read_json
from rankwise.reports import papers
from rankwise.reports.papers import Published
from rankwise.reports.statistics import LEVEL, Summary, summary
from rankwise.reports.tables import Difference, Estimate, Table, bytes_text, rate_text

SCHEMA = 1
FILE = "beside.json"
SPREADS = ("standard deviation", "not said")  # what is taken as one; a confidence interval of unsaid level is not
INSIDE = "inside the combined interval"
NOT_COMPARABLE = "not comparable"


class Reason(BaseModel):
    """Why nothing is claimed: a word for the cell, a sentence for the caption."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    tag: str
    text: str


class Line(BaseModel):
    """One published value and our runs of its cell; `cell` and `variant` are the recipe's names."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    table: str
    row: str
    column: str
    title: str
    cell: str
    variant: str
    scale: float
    model: str
    stands_in_for: str | None
    split: str | None
    metric: str | None
    higher_is_better: bool
    published: float
    spread: float | None
    published_n: int | None
    where: str
    tolerance: float
    scores: dict[int, float]
    asked: int
    failed: list[str]
    miniature: bool
    position: float | None
    reasons: list[Reason]
    departures: list[str]
    notes: list[str]

    @property
    def key(self) -> tuple:
        """Lines of one key are one line, the later one."""
        return self.row, self.column, self.cell, self.variant, self.scale, self.model

    @property
    def ours(self) -> Summary | None:
        return summary([self.scores[seed] for seed in sorted(self.scores)])


@dataclass(frozen=True)
class Verdict:
    """What may be said: `kind` is INSIDE, "better", "worse" or NOT_COMPARABLE, with the tags of its reasons."""

    kind: str
    tags: tuple[str, ...]
    difference: Difference | None

    @property
    def text(self) -> str:
        return f"{self.kind}: {', '.join(self.tags)}" if self.tags else self.kind


@dataclass(frozen=True)
class Reported:
    """A published value, and its spread over so many seeds where the paper gives one."""

    value: float
    spread: float | None
    n: int | None

    def __str__(self) -> str:
        return f"{self.value:.2f}" + (f" (sd {self.spread:.2f})" if self.spread is not None else "")


def columns_of(published: Published, task: str, beside: str = "") -> list[str]:
    """The columns that runs of a task are set beside: that one, or every column of the task that is no average."""
    found = [name for name, column in published.columns.items() if column.task == task and not column.averages]
    return [beside] if beside else found


def lines(
    published: Published,
    row: str,
    columns: Sequence[str],
    results: Iterable[Mapping[str, Any]],
    *,
    cell: str,
    variant: str,
    scale: float,
    model: str,
    stands_in_for: str | None,
    reasons: Iterable[tuple[str, str]],
    departures: Iterable[str],
    notes: Iterable[str] = (),
    final_steps: int | None = None,
    miniature: bool = False,
    position: float | None = None,
) -> list[Line]:
    """The lines of one cell, one for each column of the published table that its runs fill.

    Args:
        results: result.json of each final run.
        notes: what the task says must stand beside every number of it.
        final_steps: steps that a shrinking method spends at its final budget; a checkpoint scored before them is told.
        miniature: the runs are of another task than the column, so that only a curve's shape is compared.
        position: of the row on that curve.
    """
    results = list(results)
    done = [r for r in results if r["status"] == "completed"]
    found = []
    for name in columns:
        if name not in published.row(row).values:
            continue
        column, value = published.columns[name], published.value(row, name)
        metric = done[0]["metric"] if miniature and done else column.metric
        split = None if not done else done[0]["split"] if miniature else column.split or done[0]["split"]
        scores = {r["seed"]: r["metrics"][split][metric] for r in done if metric in r["metrics"].get(split, {})}
        whys = [Reason(tag=tag, text=text) for tag, text in reasons]
        if not scores and done:
            lacking = f"{metric} of {split}" if metric else "metric of this column"
            whys.append(Reason(tag="no such score", text=f"{column.title}: the runs have no {lacking}."))
        found.append(
            Line(
                table=published.where,
                row=row,
                column=name,
                title=column.title,
                cell=cell,
                variant=variant,
                scale=scale,
                model=model,
                stands_in_for=stands_in_for,
                split=split,
                metric=metric,
                higher_is_better=column.higher_is_better,
                published=value.value,
                spread=value.spread if (published.spread_is or "").startswith(SPREADS) else None,
                published_n=value.n,
                where=value.where,
                tolerance=published.tolerance,
                scores=scores,
                asked=len(results),
                failed=[r["error"] or "no reason given" for r in results if r["status"] != "completed"],
                miniature=miniature,
                position=position,
                reasons=whys,
                departures=[*departures, *_departures(published, column.metric, done, final_steps)],
                notes=list(notes),
            )
        )
    return found


def _departures(published: Published, metric: str | None, done: list[Mapping[str, Any]], final_steps: int | None) -> list[str]:
    """What only the runs can tell."""
    found = []
    if published.statistic not in (None, "mean"):
        found.append(f"The paper reports the {published.statistic} of its seeds; ours is their mean.")
    if done and metric is not None and metric != done[0]["metric"]:
        found.append(f"Our best epoch is the best in {done[0]['metric']}; the column is {metric}.")
    found += dict.fromkeys(r["dropout_note"][0].upper() + r["dropout_note"][1:] + "." for r in done if r.get("dropout_note"))
    precisions = sorted({r["precision"] for r in done} - {"fp32"})
    found += [f"Frozen weights in {precision}." for precision in precisions]
    if final_steps is not None:
        early = [r for r in done if r.get("scored_step") is not None and r["scored_step"] < r["total_steps"] - final_steps]
        if early:
            found.append(f"{len(early)} of {len(done)} runs had their best epoch before the rank budget was reached.")
    return found


# -- the verdict ----------------------------------------------------------------------------------------------------------


def verdict(line: Line) -> Verdict:
    """What may be said of a line."""
    ours, tags = line.ours, [reason.tag for reason in line.reasons]
    if line.failed:
        tags.append(f"failed ({len(line.failed)} of {line.asked})")
    if ours is None and not line.failed and "no such score" not in tags:
        tags.append("no run")
    if ours is not None and ours.n == 1:
        tags.append("one seed")
    if ours is None or line.miniature:
        return Verdict(NOT_COMPARABLE, tuple(tags), None)
    gap = ours.mean - line.published
    half = half_width(ours, line.spread, line.published_n, line.tolerance)
    low, high = (None, None) if half is None else (gap - half, gap + half)
    difference = Difference(gap, low, high, ours.sd, ours.n)
    if tags:
        return Verdict(NOT_COMPARABLE, tuple(tags), difference)
    if abs(gap) <= half:
        return Verdict(INSIDE, (), difference)
    return Verdict("better" if (gap > 0) == line.higher_is_better else "worse", (), difference)


def half_width(ours: Summary, spread: float | None, published_n: int | None, tolerance: float) -> float | None:
    """Half-width of the combined 95 % interval of a difference of means; None for one seed of ours.

    With a published sd over two seeds or more Welch's t interval, its degrees of freedom by Welch and Satterthwaite;
    without, our own interval widened by the table's tolerance.
    """
    if ours.half_width is None:
        return None
    if spread is None or published_n is None or published_n < 2:
        return ours.half_width + tolerance
    mine, theirs = ours.sd**2 / ours.n, spread**2 / published_n
    if mine + theirs == 0:
        return 0.0
    degrees = (mine + theirs) ** 2 / (mine**2 / (ours.n - 1) + theirs**2 / (published_n - 1))
    from scipy.stats import t

    return float(t.ppf(0.5 + LEVEL / 2, degrees)) * sqrt(mine + theirs)


def shape(found: Sequence[Line]) -> list[str]:
    """A sentence for each curve among lines of a miniature: where each is best, how far it spans, how alike their order is."""
    curves: dict[tuple, list[Line]] = {}
    for line in found:
        if line.miniature and line.position is not None and line.ours is not None:
            what = line.row.rpartition(", ")[0]  # a row that names its size after a comma is a point of what stands before
            curves.setdefault((what, line.column, line.cell, line.variant, line.scale, line.model), []).append(line)
    sentences = []
    for (what, *_), curve in curves.items():
        label = f"{what}: " if what else ""
        if len(curve) < 3:
            sentences.append(f"{label}The shape of a curve needs three points or more; here are {len(curve)}.")
            continue
        curve = sorted(curve, key=lambda line: line.position)
        first, better = curve[0], max if curve[0].higher_is_better else min
        theirs, ours = [line.published for line in curve], [line.ours.mean for line in curve]
        tops = better(range(len(curve)), key=theirs.__getitem__), max(range(len(curve)), key=ours.__getitem__)
        sentences.append(
            f"{label}Shape over rank {first.position:g} to {curve[-1].position:g}, no numbers compared: published "
            f"{first.title} is best at {curve[tops[0]].position:g} and spans {max(theirs) - min(theirs):.2f}; ours "
            f"({first.metric} of {first.cell}, {first.model}) is best at {curve[tops[1]].position:g} and spans "
            f"{max(ours) - min(ours):.2f}; "
            f"rank correlation of the two curves {_rank_correlation(theirs, ours, first.higher_is_better)}, "
            f"{len(curve)} points."
        )
    return sentences


def _rank_correlation(theirs: list[float], ours: list[float], higher_is_better: bool) -> str:
    if len(set(theirs)) == 1 or len(set(ours)) == 1:
        return "undefined"
    from scipy.stats import spearmanr

    value = float(spearmanr(theirs, ours).statistic)
    return f"{value if higher_is_better else -value:+.2f}"


# -- the table ------------------------------------------------------------------------------------------------------------


def table(published: Published, found: Sequence[Line]) -> Table:
    """Published beside ours, a row for each line; the caption says which model stands in, and every departure."""
    rows = []
    several = len({(line.variant, line.scale, line.model) for line in found}) > 1
    for line in found:
        ours, said = line.ours, verdict(line)
        label = line.row
        if several:
            label += f" [{line.variant}" + (f", scale {line.scale:g}" if line.scale < 1 else "") + f", {_short(line.model)}]"
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
    models = dict.fromkeys(line.model for line in found)
    stand_ins = {line.model: line.stands_in_for for line in found if line.stands_in_for}
    names = ", ".join(f"{m} standing in for {stand_ins[m]}" if m in stand_ins else m for m in models)
    title = f"{published.paper}, {published.table}, beside ours ({names})"
    columns = ("row", "column", "verdict", "published", "ours", "n", "difference")
    return Table("beside", title, columns, tuple(rows), tuple(_caption(published, found)), text_columns=3)


def _caption(published: Published, found: Sequence[Line]) -> list[str]:
    what = "" if "seed" in published.about else f"; {published.statistic or 'statistic not said'}, seeds not said"
    if what and published.seeds:
        what = what.replace("seeds not said", f"{published.seeds} seeds")
    caption = [f"Published: {published.source}; {published.about}{what}."]
    if any(line.spread is not None for line in found):
        known = published.spread_is not in (None, "not said")
        caption.append(
            f"The published spread is {published.spread_is}." if known
            else "What the published spread is, the paper does not say; it is taken as a standard deviation over its seeds."
        )  # fmt: skip
    splits = sorted({line.split for line in found if line.split})
    caption.append(
        f"Ours: mean over n seeds of the best epoch's score on the development part ({', '.join(splits)}); +- is the "
        "half-width of the 95 % t interval."
    )
    if any(line.spread is not None and not line.miniature for line in found):
        caption.append("Where a spread is published the difference has Welch's 95 % interval, of both spreads.")
    if any(line.spread is None and not line.miniature for line in found):
        tolerance = max(line.tolerance for line in found)
        caption.append(
            f"No spread is published{' for the others' if any(line.spread is not None for line in found) else ''}: the "
            f"difference has our own interval, widened by the table's tolerance of {tolerance:g}."
        )
    caption += dict.fromkeys(f"Not comparable ({r.tag}): {r.text}" for line in found for r in line.reasons)
    if any(line.failed for line in found):
        errors = dict.fromkeys(error.split("\n")[0] for line in found for error in line.failed)
        caption.append(f"Failed runs: {'; '.join(errors)}.")
    caption += dict.fromkeys(note for line in found for note in line.notes)
    caption += shape(found)
    caption += departures(found)
    caption += [f"The paper's own inconsistency: {sentence}" for sentence in published.inconsistencies]
    return caption


def departures(found: Sequence[Line]) -> list[str]:
    """Every departure from the paper's protocol once; with the lines that it is of, where it is not of all."""
    of: dict[str, list[Line]] = {}
    for line in found:
        for sentence in dict.fromkeys(line.departures):
            of.setdefault(sentence, []).append(line)
    said = []
    for sentence, among in of.items():
        places = dict.fromkeys(f"{line.row}, {line.cell}" for line in among)
        everywhere = len(among) == len(found)
        said.append(f"Departure: {sentence}" if everywhere else f"Departure ({'; '.join(places)}): {sentence}")
    return said


def _short(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


# -- what there is --------------------------------------------------------------------------------------------------------


def listing(found: Mapping[str, Any]) -> Table:
    """Every table of `rankwise.experiments.recipes.here`: what it needs, and whether this machine can run it."""
    rows, waiting = [], []
    for one in found["tables"]:
        ready = [cell for cell in one["cells"] if not cell["waits"]]
        if not ready:
            reasons = dict.fromkeys(cell["waits"] for cell in one["cells"])
            waiting.append(f"{one['table']} waits for {one['waits'] or '; '.join(reasons)}.")
            continue
        by_state = {state: _names(c["cell"] for c in ready if c["here"] == state) for state in ("yes", "with --model")}
        rows.append(
            (
                one["table"],
                "; ".join(f"{state}: {names}" for state, names in by_state.items() if names) or "no",
                f"{len(ready)} of {len(one['cells'])}",
                _by_place((_short(c["model"]), c["model_at"]) for c in ready),
                _by_place((c["cell"], c["data_at"]) for c in ready),
                _span([c["memory_bytes"] for c in ready], lambda b: f"{b / 2**30:.0f} GiB"),
                _span([c["seconds"] for c in ready], duration),
            )
        )
    columns = ("table", "runs here", "cells", "model", "data", "memory", "time a cell")
    caption = (*_estimates(found), *waiting)
    return Table("papers", f"The papers' tables ({found['variant']}) and what they need", columns, tuple(rows), caption, 7)


def detail(found: Mapping[str, Any], published: Published) -> Table:
    """The cells of one table, with what was published, the settings in which they differ, and what they need."""
    one = found["tables"][0]
    ready = [cell for cell in one["cells"] if not cell["waits"]]
    settings = [{k: v for k, v in cell["settings"].items() if k != "departures"} for cell in ready]
    keys = dict.fromkeys(key for values in settings for key in values)
    common = {key for key in keys if len({json.dumps(values.get(key)) for values in settings}) == 1}
    differing = [key for key in keys if key not in common]
    rows = []
    for cell, values in zip(ready, settings, strict=True):
        columns = columns_of(published, cell["task"], one["beside"])
        printed = [f"{published.value(cell['row'], c).value:.2f}" for c in columns if c in published.row(cell["row"]).values]
        needs = (cell["here"], bytes_text(cell["memory_bytes"]), duration(cell["seconds"]))
        rows.append((cell["row"], cell["cell"], "/".join(printed), *needs, *(_plain(values.get(key)) for key in differing)))
    waiting: dict[str, list[str]] = {}
    for cell in one["cells"]:
        if cell["waits"]:
            waiting.setdefault(cell["waits"], []).append(cell["row"])
    known = {cell["row"] for cell in one["cells"]}
    if not known:
        waiting[one["waits"]] = [row.label for row in published.rows]
    caption = [f"Source: {one['source']}.", f"Variants: {', '.join(one['variants']) or 'none'}."]
    if one["about"]:
        caption.append(f"{found['variant'].capitalize()}: {one['about']}.")
    if common:
        caption.append(f"All cells: {', '.join(f'{key} {_plain(settings[0][key])}' for key in keys if key in common)}.")
    caption += [f"Departure: {sentence}" for sentence in one["departures"]]
    caption += [f"Waits for {why}: {'; '.join(dict.fromkeys(labels))}." for why, labels in waiting.items()]
    if rows:
        caption += _estimates(found)
        caption.append(
            f"To run: rankwise paper {one['table']} --cells {rows[0][1]} [--rows LABEL] [--variant NAME] [--scale X]."
        )
    head = ("row", "cell", "published", "runs here", "memory", "time", *differing)
    return Table("paper", one["title"], head, tuple(rows), tuple(caption), len(head))


def duration(seconds: float) -> str:
    """Two digits and the unit that suits them: an estimate has no more."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _estimates(found: Mapping[str, Any]) -> list[str]:
    free = found["free_memory_bytes"]
    return [
        f"Hub: {found['hub']}. Free memory: {'unknown' if free is None else bytes_text(free)}.",
        "Memory: of one run, weights, AdamW's averages and the activations of a micro-batch of the longest inputs, in fp32.",
        f"Time: estimated for this CPU, all seeds and rates one after the other: operations by parameters and assumed tokens, "
        f"at {found['reached_share']:g} (share seen in reports/studies/quick-look) of the "
        f"{found['matrix_product_flops'] / 1e9:.0f} Gflop/s of matrix products measured just now; good to a factor of three. "
        "--scale shortens a recipe.",
        f"with --model: the data is here, the model is not or does not fit; {found['stand_in']} can stand in, and every table "
        "says so.",
    ]


def _names(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _by_place(names: Iterable[tuple[str, str]]) -> str:
    """(name, place) as "hub: a, b; cache: c"."""
    places: dict[str, list[str]] = {}
    for name, place in names:
        places.setdefault(place, []).append(name)
    return "; ".join(f"{place}: {_names(found)}" for place, found in places.items())


def _span(values: Sequence[float], show: Callable[[float], str]) -> str:
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return "-" if value is None else rate_text(value) if isinstance(value, float) and 0 < value < 0.01 else str(value)


# -- files ----------------------------------------------------------------------------------------------------------------


def load(folder: str | Path) -> tuple[str | None, list[Line]]:
    """The published table whose cells were run into a folder, and their lines; (None, []) where none were.

    Raises:
        ValueError: a file of another schema.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None, []
    stored = read_json(path)
    if stored.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {stored.get('schema')!r}, this version reads {SCHEMA}; move the file away")
    return stored["published"], [Line(**one) for one in stored["lines"]]


def keep(name: str, new: Sequence[Line], folder: str | Path) -> None:
    """Keeps the lines of published table `name` in the folder, with those of earlier calls, in the table's order.

    Raises:
        ValueError: the folder has cells of another table.
    """
    known, before = load(folder)
    if known not in (None, name):
        raise ValueError(f"{folder} holds cells of {known}: give {name} a folder of its own with --out")
    published = papers.load(name)
    kept = {line.key: line for line in (*before, *new)}
    order = list(kept)
    found = sorted(kept.values(), key=lambda line: (_place(published, line), order.index(line.key)))
    stored = {"schema": SCHEMA, "published": name, "lines": [line.model_dump(mode="json") for line in found]}
    write_file(Path(folder) / FILE, json.dumps(stored, indent=1, allow_nan=False) + "\n")


def of_folder(folder: str | Path) -> Table | None:
    """Published beside ours, of every cell that was run into a folder; None where none was."""
    name, found = load(folder)
    return None if name is None else table(papers.load(name), found)


def _place(published: Published, line: Line) -> tuple[int, int]:
    labels = [row.label for row in published.rows]
    return labels.index(line.row), list(published.columns).index(line.column)
