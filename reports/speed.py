"""The speed of our steps beside PEFT's and beside the frozen model's floor: tables and a plot of what `rankwise bench` wrote.

Only the JSON file is read here, nothing is measured.  Seconds are per member and step (of an evaluation: per member and
batch).  The ratio is PEFT's seconds over ours, the tax ours over the floor's, and the ceiling PEFT's over the floor's: the
ratio of a method that costs nothing.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.experiments.files import write_file
from rankwise.reports import figures
from rankwise.reports.tables.cells import bytes_text, seconds_text
from rankwise.reports.tables.table import Table, escape_markdown
from rankwise.variants.files import json_text

SCHEMA = 1


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians, and the quartiles of the rounds' own ratios."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]")


def read(path: Path) -> dict[str, Any]:
    """What `rankwise bench --json` wrote.

    Raises:
        ValueError: the file is no JSON, or not of this schema.
    """
    try:
        bench = json_text.read(path)
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from None
    if not isinstance(bench, dict) or bench.get("schema") != SCHEMA:
        schema = bench.get("schema") if isinstance(bench, dict) else None
        raise ValueError(f"{path}: schema {schema} where {SCHEMA} is known: give a file of `rankwise bench --json`")
    return bench


def text(bench: dict[str, Any], width: int = 120) -> str:
    """Every table with its notes, for a terminal."""
    return "\n".join(table.text(width) for table in tables(bench))


def write(bench: dict[str, Any], folder: Path) -> Path:
    """bench.json, figures/throughput.svg and .png where there is throughput, and bench.md; the path of the last."""
    write_file(folder / "bench.json", json.dumps(bench, indent=1, allow_nan=False) + "\n")
    drawing = throughput_plot(bench)
    if drawing is not None:
        figures.save(drawing, folder / "figures")
    else:
        for suffix in ("svg", "png"):  # left by an earlier bench: not of these numbers
            (folder / "figures" / f"throughput.{suffix}").unlink(missing_ok=True)
    path = folder / "bench.md"
    write_file(path, markdown(bench, drawing))
    return path


def markdown(bench: dict[str, Any], drawing: figures.Drawing | None = None) -> str:
    parts = ["# Speed beside PEFT and beside the floor\n"]
    for table in tables(bench):
        notes = "".join(f"- {escape_markdown(sentence)}\n" for sentence in table.caption)
        parts.append(f"## {escape_markdown(table.title)}\n\n{table.markdown()}" + (f"\n{notes}" if notes else ""))
    if drawing is not None:
        parts.append(f"![{drawing.alt}](figures/{drawing.name}.svg)\n")
    return "\n".join(parts)


def tables(bench: dict[str, Any]) -> list[Table]:
    """Steps, allocator, throughput, study; those of which anything was measured."""
    made = (steps(bench), allocator(bench), throughput(bench), study(bench))
    return [table for table in made if table is not None]


# -- steps -------------------------------------------------------------------------------------------------------------


def steps(bench: dict[str, Any]) -> Table | None:
    """A row a case, with its targets."""
    if not bench["rows"]:
        return None
    columns = ("case", "ours ms", "PEFT ms", "ratio", "target ratio", "ratio met", "ceiling", "floor ms", "improved floor ms")
    columns += ("tax", "target tax", "tax met", "ours MB", "PEFT MB")
    with_memory = any(row["target_memory_ratio"] is not None for row in bench["rows"])
    columns += ("target memory", "memory met") if with_memory else ()
    rows = []
    for row in bench["rows"]:
        memory = _over(row["peak_memory_bytes"], row["peft_peak_memory_bytes"])
        cells = (
            row["case"],
            _milliseconds(row["seconds"]),
            _milliseconds(row["peft_seconds"]),
            _ratio(row["ratio"], row["ratio_spread"]),
            _at(">=", row["target_ratio"]),
            _met(row["ratio"], row["target_ratio"], at_least=True),
            _over(row["peft_seconds"], row["floor_seconds"]),
            _milliseconds(row["floor_seconds"]),
            _milliseconds(row["improved_floor_seconds"]),
            _ratio(row["tax"], row["tax_spread"]),
            _at("<=", row["target_tax"]),
            _met(row["tax"], row["target_tax"], at_least=False),
            _megabytes(row["peak_memory_bytes"]),
            _megabytes(row["peft_peak_memory_bytes"]),
        )
        if with_memory:
            cells += (_at("<=", row["target_memory_ratio"]), _met(memory, row["target_memory_ratio"], at_least=False))
        rows.append(cells)
    return Table("steps", f"Time and memory per member and step, {_place(bench)}", columns, tuple(rows), tuple(_notes(bench)))


def _notes(bench: dict[str, Any]) -> list[str]:
    """What must be known to read the table, and what was measured beside it."""
    recipe, rows = bench["recipe"], bench["rows"]
    adalora = recipe["adalora"]
    notes = [
        f"Medians of {_range(row['repetitions'] for row in rows)} rounds, in brackets quartiles over rounds; every arm in turn "
        "in one process. ratio = PEFT / ours, ceiling = PEFT / "
        "floor (an adapter that costs nothing), tax = ours / floor. A pack's time and memory are divided by its members.",
        "Floor: the frozen model alone, forward and backward through activations, in "
        + f"{rows[0]['floor_precision']}; the improved floor is the same on the model as our trainer runs it.",
        f"Recipe of every arm: rank {recipe['rank']}, AdaLoRA {adalora['initial_rank']} to {adalora['target_rank']} with an "
        f"allocation every {adalora['interval']} step(s), orthogonality {adalora['orthogonality']}; LoRA dropout "
        f"{recipe['lora_dropout']}, attention dropout {recipe['attention_dropout']:g}; clip {recipe['clip']:g}; "
        f"{recipe['tokens']}; {recipe['data']}; {recipe['memory']}.",
        "Memory: an arm's own tensors and the most that one step adds to them.",
    ]
    for failure in bench.get("failures", []):
        notes.append(f"Failed: {', '.join(failure['cases'])}: {failure['error']}.")
    for name, tried in bench["peft_precisions"].items():
        times = ", ".join(f"{precision} {_ms(seconds)}" for precision, seconds in tried.items())
        notes.append(f"PEFT's precisions on {name}, a training step of LoRA: {times}.")
    if any(row.get("peft_merged_seconds") for row in rows):
        notes.append(
            "Evaluation: on a CPU in fp32 ours merges each member into the weights (one merge an evaluation of several "
            "batches); elsewhere it computes DoRA's norm once an evaluation. PEFT is timed as its forward pass is in evaluation"
            " mode; below is what it takes when its user merges and unmerges by hand around the same batches."
        )
    merged = [
        f"{row['case']} {_ms(row['peft_merged_seconds'])}, {row['peft_merged_seconds'] / row['seconds']:.2f}"
        for row in rows
        if row.get("peft_merged_seconds")
    ]
    if merged:
        notes.append("PEFT merged by hand, and the ratio to ours then: " + "; ".join(merged) + ".")
    if any(row["case"].startswith("language/") for row in rows):
        notes.append(
            "A language model: half of each row is a prompt, the other half is scored, or generated (greedily, with a cache). "
            "Ours trains, or generates for, all members at once, nothing merged; PEFT one run at a time, with the loss that "
            "transformers computes. The ratio of a step is that of runs a minute."
        )
    if any("train/dora" in row["case"] for row in rows):
        notes.append(
            "PEFT's DoRA multiplies by the frozen weight twice in a training step with dropout, as here, and once without; "
            "a part of train/dora's ratio comes from that."
        )
    for row in rows:
        if row["peft_cached_seconds"] is not None:
            ratio = row["peft_cached_seconds"] / row["seconds"]
            notes.append(
                f"{row['case']} with PEFT's optional DoraCaching, off by default, warm here: "
                f"{_ms(row['peft_cached_seconds'])}, a ratio of {ratio:.2f}."
            )
    shares = _floor_shares(rows)
    if shares:
        rate = bench["machine"]["matrix_product_gflops"]
        rates = ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in rate.items())
        notes.append(
            f"Share of the machine's matrix-product rate ({rates}) that floor / improved floor reach: {shares}. Both count "
            "the products of the whole model, also those that the improved floor leaves out, so that it may pass 100 %."
        )
    return notes


def _range(numbers: Iterable[int]) -> str:
    low, high = min(listed := list(numbers)), max(listed)
    return str(low) if low == high else f"{low} to {high}"


def _floor_shares(rows: Sequence[dict[str, Any]]) -> str:
    """One entry for the rows that share a floor: those that differ in the method alone."""
    by_floor: dict[str, str] = {}
    for row in rows:
        name = "/".join(part for part in row["case"].split("/") if part not in figures.METHOD_COLOURS)
        share, improved = row["floor_rate_share"], row["improved_floor_rate_share"]
        if share is not None:
            by_floor[name] = f"{name} {share:.0%}" + ("" if improved is None else f" / {improved:.0%}")
    return ", ".join(by_floor.values())


# -- allocator, throughput, study ------------------------------------------------------------------------------------


def allocator(bench: dict[str, Any]) -> Table | None:
    """AdaLoRA's bookkeeping after each step."""
    if not bench["allocator"]:
        return None
    rows = tuple(
        (
            row["case"],
            _milliseconds(row["seconds"]),
            _percent(row["share"]),
            "-" if row["target_share"] is None else f"<= {row['target_share']:.0%}",
            _met(row["share"], row["target_share"], at_least=False),
            _milliseconds(row["peft_seconds"]),
            _percent(row["peft_share"]),
        )
        for row in bench["allocator"]
    )
    columns = ("case", "ours ms", "share of step", "target", "met", "PEFT ms", "PEFT share of step")
    return Table("allocator", f"The allocator, per member and step, {_place(bench)}", columns, rows, ())


def throughput(bench: dict[str, Any]) -> Table | None:
    """Runs per minute in packs of K."""
    rows = bench["throughput"]
    if not rows:
        return None
    cells = tuple(
        (
            row["method"],
            row["members"],
            row["runs_per_minute"],
            row["peft_runs_per_minute"],
            _over(row["runs_per_minute"], row["peft_runs_per_minute"]),
        )
        for row in rows
    )
    caption = [
        f"Computed from measured steps: a run is {rows[0]['steps_per_run']} steps and {rows[0]['evaluated_per_run']:,} rows "
        "evaluated, as many as one epoch of STS-B at batch 32, for both sides; of 16 tokens each (experiments/bench/cases.py), "
        "where STS-B's rows have 27.8 on the average and 23 % more than 32, so that an epoch of it takes longer.",
        *(f"{row['case']}: {row['note']}." for row in rows if row["note"]),
    ]
    columns = ("method", "K", "ours runs per minute", "PEFT runs per minute", "ratio")
    return Table("throughput", f"Packed throughput, {_place(bench)}", columns, cells, tuple(caption))


def study(bench: dict[str, Any]) -> Table | None:
    """A small study that was run whole, ours and PEFT's."""
    one = bench["study"]
    if one is None:
        return None
    columns = ("study", "runs", "ours", "PEFT", "ratio", "target", "met")
    row = (
        f"{one['method']}, {one['task']}",
        one["runs"],
        seconds_text(one["seconds"]),
        seconds_text(one["peft_seconds"]),
        one["ratio"],
        _at(">=", one["target_ratio"]),
        _met(one["ratio"], one["target_ratio"], at_least=True),
    )
    caption = [
        f"{one['sweep_runs']} runs of a sweep and {one['final_runs']} final ones, {one['train_rows']} rows trained and "
        f"{one['evaluated_rows']} evaluated on each split; ours in packs of {one['pack']}, everything from reading the tokens "
        "to result.json.",
        f"PEFT, run by run: {one['peft_runs_made']} runs really made, half of either kind, in {one['peft_precision']}; "
        "their mean times all runs.",
    ]
    if one["failed_runs"]:
        caption.append(f"{one['failed_runs']} of our runs failed.")
    return Table("study", f"A small study, {_place(bench)}", columns, (row,), tuple(caption))


def throughput_plot(bench: dict[str, Any]) -> figures.Drawing | None:
    """Runs per minute against K, a line a method; PEFT's one run at a time as level dashes in the method's colour."""
    rows = [row for row in bench["throughput"] if row["runs_per_minute"] is not None]
    if not rows:
        return None
    methods = list(dict.fromkeys(row["method"] for row in rows))
    with figures.house_style():
        figure, (ax,) = figures.panels(1, 1, (7.4, 4.4))
        for method in methods:
            points = [(row["members"], row["runs_per_minute"]) for row in rows if row["method"] == method]
            style = {"color": figures.colour(method)}
            marker = figures.MARKERS.get(method, "o")
            ax.plot(*zip(*sorted(points), strict=True), label=method, marker=marker, markersize=6, **style)
            peft = [row["peft_runs_per_minute"] for row in rows if row["method"] == method and row["peft_runs_per_minute"]]
            if peft:
                ax.axhline(sum(peft) / len(peft), linestyle=(0, (4, 2.5)), linewidth=1.1, label=f"PEFT, {method}", **style)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        packs = sorted({row["members"] for row in rows})
        ax.set_xticks(packs, [str(k) for k in packs])
        low, high = ax.get_ylim()
        marks = [m * 10**e for e in range(-4, 7) for m in (1, 2, 5) if low <= m * 10**e <= high]
        ax.set_yticks(marks, [f"{mark:g}" for mark in marks])
        ax.minorticks_off()
        ax.set_xlabel("members that train together (K)")
        ax.set_ylabel("runs per minute")
        figure.legend(loc="outside lower center", ncols=4)
        title = f"Runs per minute against the size of a pack, {bench['machine']['device_name']}"
        figures.title_above(figure, title)
    return figures.Drawing("throughput", title, f"Runs per minute over K for {', '.join(methods)}, PEFT beside them.", figure)


# -- words -------------------------------------------------------------------------------------------------------------


def _place(bench: dict[str, Any]) -> str:
    """Where, with what, from which commit."""
    machine = bench["machine"]
    threads = machine["threads"]
    named = ("torch", "peft", "cpu passes")
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in named if name in machine["versions"])
    commit = f", commit {machine['commit'][:12]}" + (" with changes" if machine["dirty"] else "") if machine["commit"] else ""
    return (
        f"{machine['device_name']}, {threads} thread{'s' if threads != 1 else ''}, {bytes_text(machine['memory_bytes'])}, "
        f"{machine['precision']}, {versions}{commit}"
    )


def _milliseconds(seconds: float | None) -> str | None:
    """Three significant digits, and no fraction from 1000 on."""
    if seconds is None:
        return None
    return f"{1000 * seconds:#.3g}".rstrip(".") if 1000 * seconds < 999.5 else f"{1000 * seconds:,.0f}"


def _ms(seconds: float) -> str:
    return f"{_milliseconds(seconds)} ms"


def _megabytes(number: float | None) -> str | None:
    return None if number is None else f"{number / 1e6:,.0f}" if number >= 1e7 else f"{number / 1e6:.1f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _over(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _ratio(value: float | None, spread: Sequence[float] | None) -> Ratio | None:
    return None if value is None else Ratio(value, *(spread or (None, None)))


def _at(rule: str, target: float | None) -> str | None:
    return None if target is None else f"{rule} {target:.2f}"


def _met(value: float | None, target: float | None, at_least: bool) -> str | None:
    """Whether the unrounded number meets the target."""
    if value is None or target is None:
        return None
    return "yes" if (value >= target if at_least else value <= target) else "NO"
