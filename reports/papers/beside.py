"""Published values beside ours: the runs of each recipe, the difference to the paper, and whether the two agree.

A line is one published value and the scores of our runs of its cell. It stores the facts alone; how the two compare is
computed when the line is shown. Another model, a shortened recipe, another start, one seed or a failed run makes a line
`not comparable`: the numbers are shown and nothing is claimed.

    difference = ours - published;  inside the combined interval if |difference| <= h
    h: half-width of Welch's 95 % t interval from our sd over our n and the published sd over the published n;
       where no spread is published, the half-width of our own t interval plus the table's tolerance.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rankwise.experiments.files import write_file
from rankwise.experiments.records import read_json
from rankwise.reports.papers import published as published_tables
from rankwise.reports.papers.published import Published
from rankwise.reports.statistics import LEVEL, Summary, summary
from rankwise.reports.tables.cells import Difference

SCHEMA = 1
FILE = "beside.json"
# Spreads treated as standard deviations. A confidence interval whose level the paper does not give is not one.
SPREADS = ("standard deviation", "not said")
INSIDE = "inside the combined interval"
NOT_COMPARABLE = "not comparable"


class Reason(BaseModel):
    """Why a line is not comparable: a tag for the table's cell, a sentence for its caption."""

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
        """Of several lines with one key the last one counts."""
        return self.row, self.column, self.cell, self.variant, self.scale, self.model

    @property
    def ours(self) -> Summary | None:
        return summary([self.scores[seed] for seed in sorted(self.scores)])


@dataclass(frozen=True)
class Agreement:
    """How ours compares with the paper's: `kind` is INSIDE, "better", "worse" or NOT_COMPARABLE; tags of its reasons."""

    kind: str
    tags: tuple[str, ...]
    difference: Difference | None

    @property
    def text(self) -> str:
        return f"{self.kind}: {', '.join(self.tags)}" if self.tags else self.kind


def columns_of(published: Published, task: str, beside: str = "", cell: str = "") -> list[str]:
    """The columns that runs of a task are compared with: `beside` if given, else every column of the task but averages.

    cell: the recipe's; where it has the name of one of these columns, which each have a model of their own, that one alone.
    """
    if beside:
        return [beside]
    of_task = [name for name, column in published.columns.items() if column.task == task and not column.averages]
    return [cell] if cell in of_task else of_task


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
        notes: sentences that the task asks to be said beside every number.
        final_steps: steps that a shrinking method spends at its final budget; a departure names runs scored before them.
        miniature: the runs are of another task than the column, so that only a curve's shape is compared.
        position: of the row on that curve.
    """
    results = list(results)
    done = [r for r in results if r["status"] == "completed"]
    made = []
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
        made.append(
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
    return made


def _departures(published: Published, metric: str | None, done: list[Mapping[str, Any]], final_steps: int | None) -> list[str]:
    """Departures that are known only once the runs are made."""
    sentences = []
    if published.statistic not in (None, "mean"):
        sentences.append(f"The paper reports the {published.statistic} of its seeds; ours is their mean.")
    if done and metric is not None and metric != done[0]["metric"]:
        sentences.append(f"Our best epoch is the best in {done[0]['metric']}; the column is {metric}.")
    sentences += dict.fromkeys(
        r["dropout_note"][0].upper() + r["dropout_note"][1:] + "." for r in done if r.get("dropout_note")
    )
    precisions = sorted({r["precision"] for r in done} - {"fp32"})
    sentences += [f"Frozen weights in {precision}." for precision in precisions]
    if final_steps is not None:
        early = [r for r in done if r.get("scored_step") is not None and r["scored_step"] < r["total_steps"] - final_steps]
        if early:
            sentences.append(f"{len(early)} of {len(done)} runs had their best epoch before the rank budget was reached.")
    return sentences


def agreement(line: Line) -> Agreement:
    """How the runs of a line compare with its published value."""
    ours, tags = line.ours, [reason.tag for reason in line.reasons]
    if line.failed:
        tags.append(f"failed ({len(line.failed)} of {line.asked})")
    if ours is None and not line.failed and "no such score" not in tags:
        tags.append("no run")
    if ours is not None and ours.n == 1:
        tags.append("one seed")
    if ours is None or line.miniature:
        return Agreement(NOT_COMPARABLE, tuple(tags), None)
    gap = ours.mean - line.published
    half = half_width(ours, line.spread, line.published_n, line.tolerance)
    low, high = (None, None) if half is None else (gap - half, gap + half)
    difference = Difference(gap, low, high, ours.sd, ours.n)
    if tags:
        return Agreement(NOT_COMPARABLE, tuple(tags), difference)
    if abs(gap) <= half:
        return Agreement(INSIDE, (), difference)
    return Agreement("better" if (gap > 0) == line.higher_is_better else "worse", (), difference)


def half_width(ours: Summary, spread: float | None, published_n: int | None, tolerance: float) -> float | None:
    """Half-width of the combined 95 % interval of a difference of means; None for one seed of ours.

    With a published sd over two seeds or more Welch's t interval, its degrees of freedom by Welch and Satterthwaite;
    without, our own interval widened by the table's tolerance.
    """
    if ours.half_width is None:
        return None
    if spread is None or published_n is None or published_n < 2:
        return ours.half_width + tolerance
    variance, published_variance = ours.sd**2 / ours.n, spread**2 / published_n
    if variance + published_variance == 0:
        return 0.0
    degrees = (variance + published_variance) ** 2 / (variance**2 / (ours.n - 1) + published_variance**2 / (published_n - 1))
    from scipy.stats import t

    return float(t.ppf(0.5 + LEVEL / 2, degrees)) * sqrt(variance + published_variance)


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
    published = published_tables.load(name)
    kept = {line.key: line for line in (*before, *new)}
    order = list(kept)
    ordered = sorted(kept.values(), key=lambda line: (_place(published, line), order.index(line.key)))
    stored = {"schema": SCHEMA, "published": name, "lines": [line.model_dump(mode="json") for line in ordered]}
    write_file(Path(folder) / FILE, json.dumps(stored, indent=1, allow_nan=False) + "\n")


def _place(published: Published, line: Line) -> tuple[int, int]:
    labels = [row.label for row in published.rows]
    return labels.index(line.row), list(published.columns).index(line.column)
