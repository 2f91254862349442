"""What a process holds over many runs: the figure and the page of what `rankwise bench --soak` wrote.

Only the JSON file is read here, nothing is measured.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rankwise.experiments.files import write_file
from rankwise.reports import figures

NAME = "soak"  # of the files
START = 0.25  # of the runs: caches of torch and of the allocator are filled in them


def growth(found: dict[str, Any], key: str) -> float:
    """What is added with each run, by the least squares over the runs after the start."""
    rows = found["rows"][int(START * len(found["rows"])) :]
    return float(np.polyfit([row["run"] for row in rows], [row[key] for row in rows], 1)[0]) if len(rows) > 1 else 0.0


def sentences(found: dict[str, Any]) -> list[str]:
    rows, machine = found["rows"], found["machine"]
    first, last = rows[int(START * len(rows))], rows[-1]
    number, methods = last["run"], found["methods"]
    seconds = found["seconds"] / number
    stopped = f", of {found['asked']:,} asked for," if number < found["asked"] else ""
    where = f"{machine['device_name']}, torch {machine['versions']['torch']}"
    before, after = (f"{row['resident_bytes'] / 1e6:,.1f} MB" for row in (first, last))
    return [
        f"{number:,} runs{stopped} of {methods} methods in one process, {seconds:.1f} s each; {where}.",
        f"Resident memory {before} after run {first['run']:,} and {after} after the last: "
        f"{growth(found, 'resident_bytes') / 1e3:+.2f} kB a run.",
        f"Open files {first['files']} and {last['files']}, threads {first['threads']} and {last['threads']}.",
        f"Objects that the collector knows {first['objects']:,} and {last['objects']:,}: "
        f"{growth(found, 'objects'):+.2f} a run.",
    ]


def drawing(found: dict[str, Any]) -> figures.Drawing:
    """Resident memory above, open files below, over the number of runs."""
    runs = [row["run"] for row in found["rows"]]
    with figures.house_style():
        figure, axes = figures.panels(2, 1, (7.4, 4.8))
        for ax, values, label in zip(
            axes,
            ([row["resident_bytes"] / 1e6 for row in found["rows"]], [row["files"] for row in found["rows"]]),
            ("resident memory, MB", "open files"),
            strict=True,
        ):
            ax.plot(runs, values, linewidth=1.2)
            ax.set_ylim(0, 1.15 * max(values))
            ax.set_ylabel(label)
        axes[-1].set_xlabel("runs in this process")
        title = f"What one process holds over {runs[-1]:,} runs"
        figures.title_above(figure, title)
    return figures.Drawing(NAME, title, " ".join(sentences(found)), figure)


def write(found: dict[str, Any], folder: Path) -> Path:
    """soak.json, soak.md, and the figure; the path of the page."""
    write_file(folder / f"{NAME}.json", json.dumps(found, allow_nan=False) + "\n")
    figures.save(drawing(found), folder)
    path = folder / f"{NAME}.md"
    notes = "".join(f"- {sentence}\n" for sentence in sentences(found))
    write_file(path, f"# What one process holds over many runs\n\n![{' '.join(sentences(found))}]({NAME}.svg)\n\n{notes}")
    return path
