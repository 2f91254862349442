"""Tables: one object each, which renders to Markdown, CSV, LaTeX (booktabs) and plain text.

A number never travels alone: n, interval, parameters, memory and time stand in the row, what was equal and what was not
in the caption. A cell is a value (None, text, number, or one of the few cell types below, which know how to be read by
people and, under several headings, by programs); the renderers know nothing of runs.
"""

import csv
import io
import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from rankwise.experiments.records import Result
from rankwise.reports import ranks as rank_maps
from rankwise.reports.results import Arm, Study, best_rate, rate_score
from rankwise.reports.statistics import (
    FEWEST_FOR_BOOTSTRAP,
    bca_interval,
    interquartile_mean,
    paired_differences,
    probability_of_improvement,
    sign_flip_test,
    smallest_difference,
    stratified_interval,
    summary,
)
from rankwise.reports.verdicts import Verdict, budget_reached, test_set_error, verdicts, warnings

QUICK = (
    "A quick look, no fair comparison: rates fixed or hardly tuned, and too few seeds for a claim. "
    "A fair study tunes the rate of every method on the same kind of grid and repeats each over seeds."
)
ONE_SEED = "n = 1 has no interval, and one seed supports no claim."
SPECTRA = (
    "Of dW's singular values: effective is exp of the entropy of their shares (Roy & Vetterli 2007), stable |dW|_F^2/|dW|_2^2, "
    "95 % how many hold that share of |dW|_F^2."
)
UNEQUAL = 0.005  # design: budgets are equal within 0.5 % of parameters, or the caption gives the difference


# --- cells ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half-width of its 95 % t interval."""

    mean: float
    low: float | None
    high: float | None
    sd: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" +- {self.high - self.mean:.2f}" if self.high is not None else "")


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean of paired differences and its 95 % t interval."""

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + (f" ({self.low:+.2f} to {self.high:+.2f})" if self.high is not None else "")


@dataclass(frozen=True)
class Shared:
    """A cost, given apart for each size of pack: what a run cost alone is not what it cost in a pack."""

    each: tuple[float, ...]  # seconds or bytes
    pack_sizes: tuple[int, ...]
    show: Callable[[float], str]

    def __str__(self) -> str:
        return ", ".join(
            self.show(value) + (f" (pack of {size})" if size > 1 else "")
            for value, size in zip(self.each, self.pack_sizes, strict=True)
        )


@dataclass(frozen=True)
class Rank:
    """Active of nominal ranks; a mean over seeds where they differ."""

    active: float
    nominal: float

    def __str__(self) -> str:
        return decimal(self.active) if self.active == self.nominal else f"{decimal(self.active)}/{decimal(self.nominal)}"


@dataclass(frozen=True)
class Tried:
    """The selection score at one rate, and how it went."""

    score: float | None
    failed: int
    n: int
    mark: str  # "", "best" or "best, edge"

    def __str__(self) -> str:
        if not self.n:
            return "-"
        failed = (f"failed ({self.failed} of {self.n})" if self.n > 1 else "failed") if self.failed else ""
        score = f"{self.score:.2f}" if self.score is not None else ("" if failed else "unfinished")
        star = {"": "", "best": " *", "best, edge": " * (edge)"}[self.mark]
        return score + star + (f" {failed}" if score and failed else failed)


Cell = None | str | int | float | Estimate | Shared | Rank | Tried


def rate_text(rate: float | None) -> str:
    """5e-5 rather than 5.00e-05."""
    if rate is None:
        return "-"
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def decimal(value: float) -> str:
    """At most one decimal; a mean of whole numbers that is whole has none."""
    return f"{value:.0f}" if abs(value - round(value)) < 0.05 else f"{value:.1f}"


def seconds_text(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def bytes_text(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def cell_text(cell: Cell) -> str:
    if cell is None or cell == "":
        return "-"
    if isinstance(cell, bool | str):
        return str(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


# --- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Columns, rows and the sentences that must travel with them."""

    name: str  # of its files
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: tuple[str, ...]
    text_columns: int = 1  # so many columns from the left are words, the others numbers; "status" is words too

    def cells(self) -> list[list[str]]:
        return [[cell_text(cell) for cell in row] for row in self.rows]

    def is_text(self, column: int) -> bool:
        return column < self.text_columns or self.columns[column] == "status"

    def markdown(self) -> str:
        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cells) + " |"

        head = line(map(escape_markdown, self.columns))
        rule = line(":--" if self.is_text(i) else "--:" for i in range(len(self.columns)))
        body = [line(escape_markdown(cell).replace("+-", "&plusmn;") for cell in row) for row in self.cells()]
        return "\n".join([head, rule, *body]) + "\n"

    def records(self) -> list[dict[str, str | int | float | None]]:
        """Full precision, one value a key: "time" becomes "time each" and "time pack sizes"."""
        columns: dict[str, list] = {}
        for i, title in enumerate(self.columns):
            cells = [row[i] for row in self.rows]
            kind = next((type(cell) for cell in cells if is_dataclass(cell)), None)
            if kind is None:
                columns[title] = cells
                continue
            for name in (field.name for field in fields(kind) if field.name != "show"):
                columns[f"{title} {name.replace('_', ' ')}"] = [_plain(getattr(cell, name, cell)) for cell in cells]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def csv(self) -> str:
        rows = self.records()
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]) if rows else self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def latex(self) -> str:
        spec = "".join("l" if self.is_text(i) else "r" for i in range(len(self.columns)))

        def line(cells: Iterable[str]) -> str:
            return " & ".join(cells) + r" \\"

        caption = " ".join(escape_latex(sentence) for sentence in (self.title + ".", *self.caption))
        return "\n".join(
            [
                r"% \usepackage{booktabs}",
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{caption}}}",
                rf"\label{{tab:{self.name}}}",
                rf"\begin{{tabular}}{{{spec}}}",
                r"\toprule",
                line(map(escape_latex, self.columns)),
                r"\midrule",
                *(line(map(escape_latex, row)) for row in self.cells()),
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    def text(self, width: int = 100) -> str:
        """For a terminal: blocks of columns that fit, each with the first column, then the caption."""
        cells = [list(self.columns), *self.cells()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]

        def line(row: Sequence[str], block: Sequence[int]) -> str:
            parts = (row[i].ljust(widths[i]) if self.is_text(i) else row[i].rjust(widths[i]) for i in block)
            return "  ".join(parts).rstrip()

        out = [*textwrap.wrap(self.title, width), ""]
        for block in _blocks(widths, width):
            rule = "  ".join("-" * widths[i] for i in block)
            out += [line(cells[0], block), rule, *(line(row, block) for row in cells[1:]), ""]
        for sentence in self.caption:
            out += textwrap.wrap(sentence, width, initial_indent="- ", subsequent_indent="  ")
        return "\n".join(out).rstrip() + "\n"


def _blocks(widths: list[int], width: int) -> list[list[int]]:
    blocks = [[0]]
    used = widths[0]
    for i in range(1, len(widths)):
        if used + 2 + widths[i] > width and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(i)
        used += 2 + widths[i]
    return blocks


def _plain(value: object) -> object:
    """A tuple is a single value, or a list in one cell."""
    if not isinstance(value, tuple):
        return value
    return value[0] if len(value) == 1 else ";".join(map(str, value))


def escape_markdown(text: str) -> str:
    for char, code in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("*", "\\*"), ("_", "\\_"), ("\n", " ")):
        text = text.replace(char, code)
    return text


def escape_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " "}
    special |= {char: "\\" + char for char in "&%$#_{}"}
    out = "".join(special.get(char, char) for char in text).replace("+-", r"$\pm$")
    return out.replace("<", "$<$").replace(">", "$>$")


# --- the comparison ------------------------------------------------------------------------------------------------


def comparison(study: Study) -> Table:
    """The main table of one task: a row a setting, scores of the final runs at the chosen rate."""
    assert len(study.parts()) == 1, "a comparison is of one task and one model: take one of study.parts()"
    arms = study.arms
    references = study.reference_arms
    metric, (selection, split) = study.metric or "score", _splits(study)
    columns = ["setting", "rate", "n", f"{split} score ({metric})", f"{selection} score (selection)"]
    columns += [f"difference to {'full fine-tuning' if arm.method == 'full' else arm.setting}" for arm in references]
    columns += ["trainable", "active", "head", "alpha/r", "peak memory", "time", "status"]
    rows = []
    for arm in arms:
        differences = [None if arm is other else _difference(arm, other) for other in references]
        rows.append(
            (
                arm.setting,
                rate_text(arm.rate),
                len(arm.scores),
                _estimate(arm.scores.values()),
                _mean(result.selection_score for result in arm.completed),
                *differences,
                *parameters(arm),
                scale_text(arm),
                _memory(arm),
                _seconds(arm),
                status_text(arm),
            )
        )
    title = f"{study.title}: {study.task}, {study.model}"
    return Table("comparison", title, tuple(columns), tuple(rows), tuple(_comparison_caption(study)))


def _estimate(scores: Iterable[float]) -> Estimate | None:
    s = summary(list(scores))
    return s and Estimate(s.mean, s.low, s.high, s.sd, s.n)


def _difference(arm: Arm, reference: Arm) -> Difference | None:
    s = summary(paired_differences(arm.scores, reference.scores))
    return s and Difference(s.mean, s.low, s.high, s.sd, s.n)


def _mean(values: Iterable[float | None]) -> float | None:
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def parameters(arm: Arm) -> tuple[int | None, int | None, int | None]:
    """Trainable, active and head parameters, the head's in none of the first two; means over seeds, rounded."""

    def mean(field: str) -> int | None:
        value = _mean(getattr(result, field) for result in arm.completed)
        return None if value is None else round(value)

    return mean("trainable_parameters"), mean("active_parameters"), mean("head_parameters")


def scales(arm: Arm) -> list[float]:
    """The distinct scales alpha/r in force in the arm's completed runs, ascending; equal within 0.1 % is equal."""
    found: list[float] = []
    for result in arm.completed:
        values = result.scale.values() if isinstance(result.scale, dict) else [result.scale]
        found += [value for value in values if value is not None]
    distinct: list[float] = []
    for value in sorted(found):
        if not distinct or abs(value - distinct[-1]) > 1e-3 * abs(value):
            distinct.append(value)
    return distinct


def scale_text(arm: Arm) -> str:
    values = scales(arm)
    if not values or not arm.has_ranks:
        return "-"
    return f"{values[0]:.3g}" if len(values) == 1 else f"{values[0]:.3g} to {values[-1]:.3g}"


def status_text(arm: Arm) -> str:
    """ "completed", "failed (2 of 5): collapsed", "unfinished (1 of 3)", or what is missing."""
    if not arm.final:
        return f"no final run ({sum(map(len, arm.grid.values()))} in the sweep)"
    n = len(arm.final)
    failed, unfinished = arm.of("failed"), arm.of("unfinished")
    parts = []
    if failed:
        errors = dict.fromkeys(error_text(run.result.error) for run in failed)
        parts.append(f"failed ({len(failed)} of {n}): {', '.join(errors)}")
    if unfinished:
        parts.append(f"unfinished ({len(unfinished)} of {n})")
    return "; ".join(parts) or "completed"


def error_text(error: str | None) -> str:
    """The first line of an error, short enough for a cell."""
    line = (error or "no reason given").strip().split("\n")[0]
    return line if len(line) <= 60 else line[:57] + "..."


def _grouped(arm: Arm, value: Callable[[Result], float | None], show: Callable[[float], str], size) -> Shared | None:
    pairs = sorted((size(result), value(result)) for result in arm.completed if value(result) is not None)
    groups = {key: [value for _, value in group] for key, group in groupby(pairs, key=lambda pair: pair[0])}
    if not groups:
        return None
    return Shared(tuple(sum(v) / len(v) for v in groups.values()), tuple(groups), show)


def _seconds(arm: Arm) -> Shared | None:
    return _grouped(arm, lambda r: r.seconds, seconds_text, lambda r: r.pack_size)


def _memory(arm: Arm) -> Shared | None:
    return _grouped(
        arm,
        lambda r: r.peak_memory_bytes if r.peak_memory_bytes is not None else r.pack_peak_memory_bytes,
        bytes_text,
        lambda r: 1 if r.peak_memory_bytes is not None else r.pack_size,
    )


def _splits(study: Study) -> tuple[str, str]:
    result = next(iter(study.results()), None)
    return (result.selection_split, result.split) if result else ("selection", "score")


# --- captions ------------------------------------------------------------------------------------------------------


def alarms(study: Study) -> list[str]:
    """How far the study is to be believed, where that is not far."""
    incomplete = study.complete is False or any(run.status == "unfinished" for run in study.runs)
    return [
        *([QUICK] if study.quick else []),
        *(["The study is not complete: runs that it names are missing here."] if incomplete else []),
    ]


def task_caption(study: Study) -> list[str]:
    """What the study and its task say must stand beside every number of theirs."""
    told = dict.fromkeys(line for run in study.runs for line in run.config.caption)
    return list(told or study.captions)  # the study's own are those of all its tasks


def _comparison_caption(study: Study) -> list[str]:
    arms = study.arms
    selection, split = _splits(study)
    n = sorted({len(arm.scores) for arm in arms if arm.scores})
    caption = [*alarms(study), *task_caption(study)]
    if n:
        seeds = str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}"
        caption.append(
            f"Scores are points on the {split} split; n = {seeds} seed{'s' if n != [1] else ''}; "
            + _rate_words(arms, selection)
        )
        if n[-1] > 1:
            caption.append(
                "+- is the half-width of the 95 % t interval over seeds; differences are paired by seed, "
                "with their 95 % paired t interval in brackets."
            )
        if n[0] == 1:
            caption.append(ONE_SEED)
    caption += warnings(study)
    caption += _seed_sentences(study)
    caption += _planned_budget(study)
    caption += _budget_sentences(arms)
    caption += _edge_sentences(arms)
    caption += _place_sentences(arms)
    sizes = sorted({result.pack_size for arm in arms for result in arm.completed})
    if sizes and sizes[-1] > 1:
        caption.append(
            "(pack of k): k runs shared the frozen model; the time is a k-th of the pack's, the memory all of it, "
            "and neither is to be compared with that of a run alone."
        )
    failed = [f"{arm.setting} {status_text(arm)}" for arm in arms if arm.of("failed")]
    if failed:
        caption.append(f"Scores are of the completed runs only, where some failed: {'; '.join(failed)}.")
    return caption


def _rate_words(arms: list[Arm], selection: str) -> str:
    tuned = [arm.setting for arm in arms if len(arm.grid) > 1]
    if not tuned:
        return "rates were fixed beforehand, not tuned."
    if len(tuned) == len(arms):
        return f"rates were chosen on the {selection} split alone."
    return f"only {', '.join(tuned)} had a choice of rates, made on the {selection} split alone."


def _seed_sentences(study: Study) -> list[str]:
    """The differences that these seeds could have seen, and how far the test part itself can be trusted."""
    sentences = []
    found = verdicts(study)
    seen = [f"{v.setting} {v.smallest:.2f}" for v in found if v.smallest is not None]
    if seen:
        sentences.append(
            f"Smallest difference to {found[0].reference} that these seeds could have seen (80 % of the time, at the level "
            f"that the family asks of its first comparison): {', '.join(seen)}."
        )
    errors = {arm.setting: test_set_error(arm) for arm in study.arms}
    if told := {setting: error for setting, error in errors.items() if error is not None}:
        rows = next(iter(told.values()))[1]
        each = ", ".join(f"{setting} {error:.2f}" for setting, (error, _) in told.items())
        sentences.append(f"Standard error of one score for want of test rows ({rows:,} scored): {each} points.")
    return sentences


def _planned_budget(study: Study) -> list[str]:
    """The budget that the study's file makes equal, where it is another than steps; what came of it stands beside."""
    wanted = study.budget.get("equal", "steps")
    if wanted == "parameters":
        return [
            f"The budget of each low-rank setting is {study.budget['parameters']:,} active parameters, the head not counted, "
            f"at alpha/r = {study.budget['scale']:g}: its ranks follow from it."
        ]
    if wanted == "time":
        return ["Equal in training time: each setting has as many steps as fit into the reference's time, by measured steps."]
    if wanted == "memory":
        return [
            f"Equal in memory: no training step may need more than {bytes_text(study.budget['bytes'])}, in micro-batches where "
            "it would."
        ]
    return []


def _budget_sentences(arms: list[Arm]) -> list[str]:
    """What was equal: steps, and among the low-rank settings active parameters and scale."""
    sentences = []
    steps = {arm.setting: sorted({result.total_steps or 0 for result in arm.completed}) for arm in arms if arm.completed}
    distinct = {tuple(value) for value in steps.values()}
    if len(distinct) == 1 and len(next(iter(distinct))) == 1:
        sentences.append(f"Equal in steps: {next(iter(distinct))[0]:,} optimizer steps each.")
    elif steps:
        each = ", ".join(f"{setting} {'/'.join(f'{n:,}' for n in value)}" for setting, value in steps.items())
        sentences.append(f"Not equal in steps: {each}.")
    low_rank = [arm for arm in arms if arm.has_ranks]
    active = {arm.setting: parameters(arm)[1] for arm in low_rank}
    active = {setting: count for setting, count in active.items() if count}
    if len(active) > 1:
        least, most = min(active, key=active.get), max(active, key=active.get)
        gap = active[most] / active[least] - 1
        each = ", ".join(f"{setting} {count:,}" for setting, count in active.items())
        if gap > UNEQUAL:
            sentences.append(
                f"Not equal in active parameters among the low-rank settings, {most} has {100 * gap:.1f} % more than "
                f"{least}: {each} (the head not counted)."
            )
        else:
            sentences.append(
                f"Equal in active parameters among the low-rank settings, within {100 * UNEQUAL:g} %: {each} "
                "(the head not counted)."
            )
    elif active:
        setting, count = next(iter(active.items()))
        sentences.append(f"Active parameters of {setting}, the head not counted: {count:,}.")
    by_scale = {arm.setting: tuple(f"{value:.3g}" for value in scales(arm)) for arm in low_rank}
    if len(set(by_scale.values())) > 1:
        each = ", ".join(f"{setting} {' to '.join((v[0], v[-1]) if len(v) > 1 else v)}" for setting, v in by_scale.items())
        sentences.append(f"Warning: scales (alpha/r) differ, which alone can make a difference: {each}.")
    unreached = [arm.setting for arm in low_rank if not budget_reached(arm)]
    if unreached:
        sentences.append(f"Warning: scored before its rank budget was reached: {', '.join(unreached)}.")
    return sentences


def _place_sentences(arms: list[Arm]) -> list[str]:
    """Runs of one table may have been made in several sittings, but not unnoticed on several devices."""
    configs = [run.config for arm in arms for run in arm.of("completed")]
    places = sorted({f"{c.device_name or c.device}, {c.precision}, {c.threads} threads" for c in configs})
    if len(places) < 2:
        return []
    return [f"Warning: made in {len(places)} places, whose times and memory do not compare: {'; '.join(places)}."]


def _edge_sentences(arms: list[Arm]) -> list[str]:
    edges = [arm.setting for arm in arms if (best := best_rate(arm)) and best.at_edge]
    sentences = []
    if edges:
        sentences.append(f"Best rate at the edge of its grid: no winner named ({', '.join(edges)}).")
    for arm in arms:
        best = best_rate(arm)
        if best and arm.rate is not None and arm.rate != best.rate:
            sentences.append(
                f"{arm.setting}: the final runs used {rate_text(arm.rate)}, but {rate_text(best.rate)} is the best rate now."
            )
    return sentences


# --- rates --------------------------------------------------------------------------------------------


def rate_sweep(study: Study) -> Table | None:
    """Setting x rate -> selection score; None where no setting tried two rates."""
    arms = [arm for arm in study.arms if len(arm.grid) > 1]
    if not arms:
        return None
    selection, _ = _splits(study)
    rates = sorted({rate for arm in arms for rate in arm.grid})
    rows = []
    for arm in arms:
        best = best_rate(arm)
        cells = []
        for rate in rates:
            runs = arm.grid.get(rate, ())
            mark = ("best, edge" if best.at_edge else "best") if best and best.rate == rate else ""
            cells.append(Tried(rate_score(runs), sum(run.status == "failed" for run in runs), len(runs), mark))
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
    caption += _edge_sentences(arms)
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
    """What each setting might try and did; a grid is widened only while its best rate stands at the edge."""
    tried = ", ".join(f"{arm.setting} {len(arm.grid)}" for arm in arms)
    allowed = sorted({study.trials[arm.setting] for arm in arms if arm.setting in study.trials})
    if len(allowed) == 1:
        grid = "a grid is widened by its own step while its best rate stands at the edge"
        return [f"Every setting might try {allowed[0]} rates ({grid}); tried: {tried}."]
    if len({len(arm.grid) for arm in arms}) > 1:
        return [f"Warning: not every setting had the same number of rates: {tried}."]
    return []


# --- what follows from it ------------------------------------------------------------------------------------------


def verdict_table(study: Study) -> Table | None:
    """A row a setting: the verdict against the reference in words, and the numbers behind it; None without a reference."""
    found = verdicts(study)
    if not found:
        return None
    rows = []
    for v in found:
        difference = None if v.mean is None else Difference(v.mean, v.low, v.high, None, v.n)
        rows.append((v.setting, v.kind, v.text, v.n, difference, v.p, v.smallest))
    columns = ("setting", "verdict", "in words", "n", "difference", "p (Holm)", "could have seen")
    title = f"Verdicts against {found[0].reference}: {study.task}, {study.model}"
    margin = "" if study.margin is None else f" Equivalent: the 95 % interval lies within {study.margin:g} points."
    caption = [
        *alarms(study),
        *warnings(study),
        "Exact sign-flip test on differences paired by seed, Holm's correction over the family of "
        f"{max(len(study.settings) - 1, 1)} comparisons with {found[0].reference} on this task, 5 %.{margin}",
    ]
    return Table("verdicts", title, columns, tuple(rows), tuple(caption), text_columns=3)


def statistics_table(study: Study) -> Table | None:
    """A row a setting: everything that is computed from its scores; None where no run has finished."""
    arms = [arm for arm in study.arms if arm.scores]
    if not arms:
        return None
    reference = study.reference_arm
    m = max(len(study.settings) - 1, 1)
    rows = []
    for arm in arms:
        values = list(arm.scores.values())
        s = summary(values)
        own = _bootstrapped(values)
        paired = improvement = smallest = p = None
        if reference is not None and arm is not reference:
            differences = paired_differences(arm.scores, reference.scores)
            paired, smallest = _bootstrapped(differences), smallest_difference(differences, m)
            improvement = probability_of_improvement(values, list(reference.scores.values()))
            p = sign_flip_test(differences) if len(differences) else None
        error = test_set_error(arm)
        rows.append(
            (arm.setting, s.n, s.mean, s.sd, s.median, interval_text(s.low, s.high), own, paired, improvement, p, smallest,
             None if error is None else error[0])
        )  # fmt: skip
    to = "" if reference is None else f" to {reference.setting}"
    columns = (
        "setting", "n", "mean", "sd", "median", "95 % t interval", "BCa interval", f"BCa of difference{to}",
        "P(improvement)", "p (uncorrected)", "could have seen", "test-set error",
    )  # fmt: skip
    caption = [
        *alarms(study),
        "sd is over seeds, of the sample. BCa: bias-corrected and accelerated bootstrap (9,999 resamples, fixed seed)."
        + ("" if min(len(a.scores) for a in arms) >= FEWEST_FOR_BOOTSTRAP else
           " Below ten seeds it covers far less than it claims: take the t interval."),
        f"P(improvement): chance that a run beats one of {reference.setting}'s, ties counting half."
        if reference is not None
        else "No reference takes part.",
    ]  # fmt: skip
    title = f"Statistics of the scores: {study.task}, {study.model}"
    return Table("statistics", title, columns, tuple(rows), tuple(caption))


def _bootstrapped(values: Sequence[float]) -> str | None:
    found = bca_interval(values)
    return None if found is None else interval_text(*found)


def interval_text(low: float | None, high: float | None) -> str | None:
    return None if low is None else f"{low:.2f} to {high:.2f}"


def verdicts_over_tasks(parts: Sequence[Study]) -> Table | None:
    """A row a setting, a column a task: the verdict and the difference to the reference; None below two tasks of one model."""
    found = {part.task: {v.setting: v for v in verdicts(part)} for part in parts}
    references = {v.reference for by_setting in found.values() for v in by_setting.values()}
    if len(found) < 2 or len({part.model for part in parts}) > 1 or len(references) != 1:
        return None
    [reference] = references
    settings = [s for s in parts[0].settings if any(s in by_setting for by_setting in found.values())]
    rows = []
    for setting in settings:
        given = [by_setting.get(setting) for by_setting in found.values()]
        rows.append((setting, *(None if v is None or v.mean is None else _verdict_words(v) for v in given)))
    n = sorted({v.n for by_setting in found.values() for v in by_setting.values()})
    caption = [
        *dict.fromkeys(line for part in parts for line in alarms(part)),
        f"Difference to {reference} in points with its 95 % paired t interval, n = {'/'.join(map(str, n))} seeds.",
        *dict.fromkeys(line for part in parts for line in warnings(part)),
    ]
    title = f"Verdicts against {reference}: {parts[0].title}, {parts[0].model}"
    return Table("verdicts-over-tasks", title, ("setting", *found), tuple(rows), tuple(caption), 1 + len(found))


def _verdict_words(verdict: Verdict) -> str:
    interval = "" if verdict.low is None else f" ({verdict.low:+.1f} to {verdict.high:+.1f})"
    return f"{verdict.kind} {verdict.mean:+.1f}{interval}"


def overall(parts: Sequence[Study]) -> Table | None:
    """A row a setting over the tasks of one study: means, interquartile mean, chance of improvement, verdicts counted.

    None where there are not two tasks of one model, or some task has no finished run.
    """
    if len({part.task for part in parts}) < 2 or len({part.model for part in parts}) > 1:
        return None
    shared = [s for s in parts[0].settings if all(_arm_of(p, s) is not None and _arm_of(p, s).scores for p in parts)]
    references = [part.reference_arm for part in parts]
    if not shared or any(r is None for r in references) or len({r.setting for r in references}) > 1:
        return None
    reference = references[0].setting
    rows = []
    for setting in shared:
        scores = [np.array(list(_arm_of(part, setting).scores.values())) for part in parts]
        mean, iqm = float(np.mean([s.mean() for s in scores])), interquartile_mean(np.concatenate(scores))
        low, high = stratified_interval(scores) or (None, None)
        middle = stratified_interval(scores, "iqm") or (None, None)
        difference = improvement = counted = None
        if setting != reference:
            pairs = [paired_differences(_arm_of(p, setting).scores, r.scores) for p, r in zip(parts, references, strict=True)]
            if all(map(len, pairs)):
                bounds = stratified_interval(pairs) or (None, None)
                n = min(map(len, pairs))
                difference = Difference(float(np.mean([d.mean() for d in pairs])), *bounds, None, n)
            others = [list(r.scores.values()) for r in references]
            improvement = float(np.mean([probability_of_improvement(s, o) for s, o in zip(scores, others, strict=True)]))
            kinds = [v.kind for part in parts for v in verdicts(part) if v.setting == setting]
            counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        n = min(map(len, scores))
        rows.append(
            (setting, Estimate(mean, low, high, None, n), iqm, interval_text(*middle), difference, improvement, counted)
        )
    columns = (
        "setting", "mean over tasks", "interquartile mean", "its interval", f"difference to {reference}", "P(improvement)",
        "verdicts",
    )  # fmt: skip
    tasks = ", ".join(part.task for part in parts)
    caption = [
        *dict.fromkeys(line for part in parts for line in alarms(part)),
        f"Over {len(parts)} tasks ({tasks}), each counted alike; intervals: 95 % percentile bootstrap, seeds drawn within each "
        "task. Metrics of different kinds are averaged here, as benchmarks do: the verdicts of each task are what counts.",
    ]
    return Table("overall", f"Over all tasks: {parts[0].title}, {parts[0].model}", columns, tuple(rows), tuple(caption))


def _arm_of(part: Study, setting: str) -> Arm | None:
    return next((arm for arm in part.arms if arm.setting == setting), None)


# --- ranks and runs ------------------------------------------------------------------------------------------------


def ranks(study: Study) -> Table | None:
    """Site x setting -> active and nominal rank at the end of the final runs; None where nothing has ranks."""
    arms = [arm for arm in study.arms if arm.has_ranks]
    if not arms:
        return None
    by_arm = [mean_ranks(arm) for arm in arms]
    sites = rank_maps.site_order(site for found in by_arm for site in found)
    rows = [(site, *(found.get(site) for found in by_arm)) for site in sites]
    totals = [Rank(sum(r.active for r in found.values()), sum(r.nominal for r in found.values())) for found in by_arm]
    n = sorted({len(arm.completed) for arm in arms})
    caption = [
        *alarms(study),
        "Active rank after training; active/nominal where they differ.",
        f"Means over n = {'/'.join(map(str, n))} seeds." if n != [1] else "n = 1 seed.",
    ]
    title = f"Rank of every site: {study.task}, {study.model}"
    columns = ("site", *(arm.setting for arm in arms))
    return Table("ranks", title, columns, (*rows, ("total", *totals)), tuple(caption))


def mean_ranks(arm: Arm) -> dict[str, Rank]:
    """Site -> active and nominal rank, means over the completed runs."""
    with_ranks = [result for result in arm.completed if result.ranks]
    sites = dict.fromkeys(site for result in with_ranks for site in result.ranks)
    return {
        site: Rank(
            _mean(result.ranks.get(site) for result in with_ranks),
            _mean(result.nominal_ranks.get(site, result.ranks.get(site)) for result in with_ranks),
        )
        for site in sites
    }


def every_run(study: Study) -> Table:
    """One row a run, as it is: for the CSV beside the report."""
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


# What `rankwise ranks` shows of a site beside its ranks, where it is known: heading, field of `SiteRank`, digits.
KNOWN_OF_A_SITE = (
    ("effective", "effective_rank", "{:.2f}"),
    ("stable", "stable_rank", "{:.2f}"),
    ("95 %", "energy_rank", "{}"),
    ("|dW|/|W|", "relative_norm", "{:.4f}"),
    ("parameters", "parameters", "{:,}"),
    ("share", "share", "{:.4f}"),
    ("importance", "importance", "{:.3g}"),
    ("intruders", "intruders", "{}"),
    ("loss without", "loss_increase", "{:+.5f}"),
)


def rank_table(path: str | Path | rank_maps.RankMap) -> Table:
    """The ranks of one run's folder or of any adapter folder in PEFT's format (`rankwise ranks`).

    Raises:
        ValueError: neither of the two, cut off, foreign, or pickled.
    """
    found = path if isinstance(path, rank_maps.RankMap) else rank_maps.read(path)
    known = [entry for entry in KNOWN_OF_A_SITE if any(getattr(site, entry[1]) is not None for site in found.sites)]

    def more(site: rank_maps.SiteRank) -> list[str]:
        values = [(getattr(site, field), show) for _, field, show in known]
        return ["" if value is None else show.format(value) for value, show in values]

    rows = [
        (s.site, "-" if s.layer is None else str(s.layer), s.active, s.nominal, _short(s.alpha), _short(s.scale), *more(s))
        for s in found.sites
    ]
    empty = sum(site.active == 0 for site in found.sites)
    caption = [
        f"{found.active:,} of {found.nominal:,} ranks are active in {len(found.sites)} sites"
        + (f"; {empty} of them {'are' if empty > 1 else 'is'} at rank 0." if empty else "."),
        *([found.note[0].upper() + found.note[1:] + "."] if found.note else []),
        *([SPECTRA] if any(site.effective_rank is not None for site in found.sites) else []),
        *([f"Loss without: its rise with dW = 0 there, on {found.evaluated}."] if found.evaluated else []),
        *(f"Warning: {fault}." for fault in found.faults),
    ]
    columns = ("site", "layer", "active", "nominal", "alpha", "scale", *(heading for heading, _, _ in known))
    rows.append(("total", "", found.active, found.nominal, "", "", *("" for _ in known)))
    return Table("ranks", f"Ranks of {found.name} ({found.method})", columns, tuple(rows), tuple(caption))


def rank_json(path: str | Path) -> str:
    """The same as strict JSON, for `rankwise ranks --json`."""
    return json.dumps(rank_maps.read(path).as_dict(), indent=2, allow_nan=False) + "\n"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
