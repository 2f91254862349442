"""Many runs on many machines: the tables of what `rankwise bench --fleet` wrote.

Only the JSON file is read here, nothing is measured or simulated.
"""

import json
from pathlib import Path
from typing import Any

from rankwise.experiments.files import write_file
from rankwise.reports.tables.table import Table, escape_markdown

NAME = "fleet"  # of the files


def table(found: dict[str, Any]) -> Table:
    """A row for each kind and number of machines, with and without failures."""
    rows = [
        (
            row["kind"],
            f"{row['machines']:,}",
            "none" if row["failure_hours"] is None else f"every {row['failure_hours']:g} h",
            duration(row["makespan"]),
            duration(max(row["work_bound"], row["chain_bound"], row["writer_bound"])),
            _bound(row),
            f"{100 * row['idle_share']:.1f} %",
            f"{row['checkpoint_bytes'] / 1e9:,.1f}",
            f"{(row['checkpoint_bytes'] + row['result_bytes']) / 1e6 / row['makespan']:,.2f}",
            f"{100 * row['writer_share']:.1f} %",
            f"{row['failures']:,}",
            f"{row['lost'] / 3600:,.2f}",
        )
        for row in found["rows"]
    ]
    columns = ("machines are", "machines", "failures of one", "until the end", "no less than", "for its", "idle")
    columns += ("checkpoints, GB", "traffic, MB/s", "writer busy", "failures", "lost, machine hours")
    times, writer = found["times"], found["writer"]
    packs = {row["kind"]: row for row in found["rows"]}
    charged = ", ".join(f"{method} is charged the steps of {other}" for method, other in found["unmeasured"].items())
    caption = (
        f"{found['runs']:,} runs: the study {found['study']} with {found['seeds']} times its seeds; simulated event by event, "
        f"nothing was trained for it.",
        f"Steps: {times['file']}, measured in packs on one {times['device_name']} with {times['threads']} threads; {charged}.  "
        f"No GPU was measured: a row that says so assumes a speed.",
        *(
            f"{kind}: {row['packs']:,} packs of at most {row['pack']} runs, of {_seconds(row['pack_seconds'])}; a checkpoint "
            f"of {row['checkpoint_bytes_range'][0] / 1e6:.1f} to {row['checkpoint_bytes_range'][1] / 1e6:.1f} MB."
            for kind, row in packs.items()
        ),
        f"The writer was measured on {found['machine']['device_name']}, each file with fsync: at its fastest "
        f"{_writes(writer)}, by which is simulated; in the middle {_writes(writer['median'])}"
        + ("; other programs were computing at the time." if found["machine"]["shared"] else "."),
        f"A checkpoint every {found['checkpoint_seconds']:g} s of training; a failed machine is back after "
        f"{found['repair_seconds'] / 60:g} minutes.  Lost: what was trained twice.",
        "No less than: the greatest of all work shared out evenly (work), the longest chain of packs that need each other "
        "(chain), and the writer's own work on the results (writer).",
        "Not simulated: the network, loading a model, a grid that is widened at its edge, a writer that fails.",
    )
    return Table(NAME, "Many runs on many machines", columns, tuple(rows), caption, text_columns=1)


def growth(found: dict[str, Any]) -> Table:
    """A row for each kind and size of a fleet whose work grows with it: where the one writer is full."""
    rows, sentences = [], []
    for kind in dict.fromkeys(row["kind"] for row in found["growth"]):
        of_kind = [row for row in found["growth"] if row["kind"] == kind]
        first = of_kind[0]
        for row in of_kind:
            rows.append(
                (
                    kind,
                    "results first" if row["results_first"] else "as they come",
                    f"{row['machines']:,}",
                    f"{row['copies'] * found['runs']:,}",
                    duration(row["makespan"]),
                    f"{row['makespan'] / first['makespan']:.2f}",
                    f"{100 * row['idle_share']:.1f} %",
                    f"{100 * row['writer_share']:.1f} %",
                    f"{100 * row['skipped'] / max(1, row['skipped'] + row['checkpoints']):.1f} %",
                    f"{row['longest_line']:,}",
                )
            )
        sentences.append(
            f"{kind}: {first['full_at']:,.0f} machines that train all the time hand over what one writer can write at its "
            f"fastest, {first['full_at_median']:,.0f} what it can in the middle; its files and bytes over the seconds of the "
            f"packs, without simulation."
        )
    columns = ("machines are", "writer takes", "machines", "runs", "until the end", "of the first", "idle", "writer busy")
    columns += ("checkpoints skipped", "longest line")
    sentences.append(
        "Results first: before checkpoints that wait, and without those of packs that have ended.  Skipped: due while the "
        "machine's last one still waited for the writer.  Line: checkpoints and packs' results that wait at one time."
    )
    return Table("growth", "Where one writer is full", columns, tuple(rows), tuple(sentences), text_columns=2)


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, to three digits."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _bound(row: dict[str, Any]) -> str:
    return max(("work", "chain", "writer"), key=lambda name: row[f"{name}_bound"])


def _writes(line: dict[str, float]) -> str:
    return f"{1000 * line['file_seconds']:.2f} ms a file and {line['bytes_per_second'] / 1e6:,.0f} MB/s"


def _seconds(spread: list[float]) -> str:
    low, middle, high = map(duration, spread)
    return f"{low} to {high}, {middle} in the middle"


def text(found: dict[str, Any], width: int = 120) -> str:
    return f"{table(found).text(width)}\n{growth(found).text(width)}"


def write(found: dict[str, Any], folder: Path) -> Path:
    """fleet.json and fleet.md; the path of the last."""
    write_file(folder / f"{NAME}.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    parts = []
    for level, made in (("#", table(found)), ("##", growth(found))):
        notes = "".join(f"- {escape_markdown(sentence)}\n" for sentence in made.caption)
        parts.append(f"{level} {made.title}\n\n{made.markdown()}\n{notes}")
    path = folder / f"{NAME}.md"
    write_file(path, "\n".join(parts))
    return path
