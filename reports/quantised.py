"""What bases in 4 and 8 bits save and cost: the table of what `rankwise bench --quantised` wrote.

Only the JSON file is read here, nothing is measured.
"""

import json
from pathlib import Path
from typing import Any

from rankwise.experiments.files import write_file
from rankwise.reports.tables.cells import bytes_text
from rankwise.reports.tables.table import Table, escape_markdown

NAME = "quantised"  # of the files
REFERENCE = "fp32"


def table(found: dict[str, Any]) -> Table:
    """A row for each model and base; what was lost is against fp32, after as many steps."""
    rows = []
    for row in found["rows"]:
        whole = next(one for one in found["rows"] if (one["model"], one["base"]) == (row["model"], REFERENCE))
        cells = [row["model"], row["base"], f"{row['weights_bytes'] / 1e6:,.1f}", f"{row['linear_bits']:.3f}"]
        cells += [f"{1000 * row['step_seconds']:,.0f}", f"{row['step_seconds'] / whole['step_seconds']:.2f}"]
        cells += [f"{row['loss_before']:.4f}", *_beside(row["losses"], whole["losses"], 4)]
        rows.append((*cells, *_beside(row["scores"], whole["scores"], 2)))
    columns = (
        "model",
        "base",
        "weights, MB",
        "bits a weight",
        "step, ms",
        "of fp32",
        "loss before",
        "loss after",
        "less fp32's",
    )
    machine = found["machine"]
    versions = machine["versions"]
    caption = (
        f"{machine['device_name']}, {machine['threads']} threads of {machine['cores']} cores, "
        f"{bytes_text(machine['memory_bytes'])}, torch {versions['torch']}, bitsandbytes {versions['bitsandbytes']}"
        + (f", commit {machine['commit'][:12]}" if machine["commit"] else "")
        + ("; other programs were computing at the time, so that seconds are doubtful." if machine["shared"] else "."),
        "weights: all tensors of the frozen model, embeddings in full precision among them; bits a weight: of the adapted "
        "linears, scales and tables of levels counted.",
        "LoRA of rank 8 on all linears; step: the median, all bases of a model taking theirs in turn; bf16 multiplies in bf16, "
        "the quantised bases in fp32.",
        *(_trained(found, model) for model in dict.fromkeys(row["model"] for row in found["rows"])),
    )
    return Table(NAME, "Bases in 4 and 8 bits", (*columns, "score", "less fp32's"), tuple(rows), caption, text_columns=2)


def _beside(values: list[float | None], whole: list[float | None], digits: int) -> tuple[str, str]:
    """The mean over the members, with its range where there are several, and how far it is above that over fp32."""
    if None in values or None in whole:
        return "-", "-"
    mean = sum(values) / len(values)
    spread = f" [{min(values):.{digits}f}, {max(values):.{digits}f}]" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}", f"{mean - sum(whole) / len(whole):+.{digits}f}"


def _trained(found: dict[str, Any], model: str) -> str:
    row = next(one for one in found["rows"] if one["model"] == model)
    seeds = f" of {row['members']} seeds, mean and range" if row["members"] > 1 else ", one seed"
    low = " (lower is better)" if row["metric"] == "perplexity" else ""
    return (
        f"{model}: {row['steps']} steps{seeds}; loss and score ({row['metric']}{low}) are of rows that are not trained on.  So "
        f"short a run says what the base costs at its start, not what it costs in the end."
    )


def text(found: dict[str, Any], width: int = 120) -> str:
    return table(found).text(width)


def write(found: dict[str, Any], folder: Path) -> Path:
    """quantised.json and quantised.md; the path of the last."""
    write_file(folder / f"{NAME}.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    made = table(found)
    notes = "".join(f"- {escape_markdown(sentence)}\n" for sentence in made.caption)
    path = folder / f"{NAME}.md"
    write_file(path, f"# {made.title}\n\n{made.markdown()}\n{notes}")
    return path
