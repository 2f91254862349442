"""What `rankwise plan` says of a step beside what a real one took: the table of what `rankwise bench --planned` wrote.

Only the JSON file is read here, nothing is measured.
"""

from pathlib import Path
from typing import Any

from rankwise.experiments.files import write_file
from rankwise.reports.tables.table import Table, escape_markdown

NAME = "planned"  # of the file
CLOSE = 0.15  # a plan is right within this share of what was measured


def table(found: dict[str, Any]) -> Table:
    """A row for each step that was measured."""
    columns = ("model", "method", "base", "step", "planned, MB", "measured, MB", "ratio")
    cells = tuple(_cells(row) for row in found["rows"])
    machine = found["machine"]
    caption = (
        f"{machine['device_name']}, torch {machine['versions']['torch']}"
        + (f", commit {machine['commit'][:12]}" if machine["commit"] else "")
        + ("; other programs were computing at the time, so that seconds are doubtful." if machine["shared"] else "."),
        _sentence("Peak", [row["ratio"] for row in found["rows"]]),
        *_of_seconds(found["rows"]),
        "step: members x rows x tokens, or pixels a side. Measured: all tensors at the fullest moment of a whole step, by the "
        "count of torch's allocator; the optimizer's step is in it. Ranks are 8, and 12 of AdaLoRA, which ends with 8.",
        "base: fp32, bf16, or 4 bits with double quantization, multiplied in bf16. Full fine-tuning keeps fp32 weights.",
        "Seconds: products of a step over the products a second of one layer of the model, measured beside it; the median of "
        "three real steps. The optimizer's step, norms, and what is elementwise are not products.",
    )
    return Table(
        NAME, "Plans beside real steps", (*columns, "planned, s", "measured, s", "ratio"), cells, caption, text_columns=4
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    size = f"{row['length']}" if row["image_size"] is None else f"{row['image_size']} px"
    form = f"{row['members']} x {row['rows']} x {size}" + (", checkpointing" if row["checkpointing"] else "")
    form += "" if row["optimizer_states"] == "32-bit" else f", {row['optimizer_states']} averages"
    sizes = f"{row['planned_bytes'] / 1e6:,.1f}", f"{row['measured_bytes'] / 1e6:,.1f}", f"{row['ratio']:.3f}"
    seconds = ("-",) * 3
    if row["measured_seconds"] is not None:
        seconds = f"{row['planned_seconds']:.2f}", f"{row['measured_seconds']:.2f}", f"{row['seconds_ratio']:.2f}"
    model = row["model"].rpartition("/")[2]
    return (model, row["method"], row["quantization"] or row["precision"], form, *sizes, *seconds)


def _sentence(what: str, ratios: list[float]) -> str:
    near = sum(abs(ratio - 1) <= CLOSE for ratio in ratios)
    spread = f"planned over measured {min(ratios):.3f} to {max(ratios):.3f}"
    return f"{what}: {near} of {len(ratios)} plans within {CLOSE:.0%} of what was measured; {spread}."


def _of_seconds(rows: list[dict[str, Any]]) -> list[str]:
    ratios = [row["seconds_ratio"] for row in rows if row["measured_seconds"] is not None]
    return [_sentence("Seconds", ratios)] if ratios else []


def text(found: dict[str, Any], width: int = 120) -> str:
    return table(found).text(width)


def write(found: dict[str, Any], folder: Path) -> Path:
    """planned.md; its path."""
    made = table(found)
    notes = "".join(f"- {escape_markdown(sentence)}\n" for sentence in made.caption)
    path = folder / f"{NAME}.md"
    write_file(path, f"# {made.title}\n\n{made.markdown()}\n{notes}")
    return path
