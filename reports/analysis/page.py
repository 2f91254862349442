"""analysis.md: LoRA's subspaces and DoRA's magnitudes and directions beside the papers, with figures and tables.

rankwise analysis report DIR --out DIR        (writes analysis.md, figures/ and tables/)

Only the files that `experiments.analysis` wrote are read, nothing is trained.  Means and ranges are over layers (of
correlations: over seeds), and say nothing of other models, tasks or lengths of training.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.experiments.files import write_file
from rankwise.reports.analysis.directions import correlations, magnitude_sentences, movement_figure
from rankwise.reports.analysis.measured import scores_sentence
from rankwise.reports.analysis.subspaces import (
    amplifications,
    overlaps,
    ranks_figure,
    seeds_figure,
    subspace_sentences,
    updates_figure,
)
from rankwise.reports.figures.style import Drawing, save
from rankwise.reports.tables.table import Table, escape_markdown


def write(by_kind: dict[str, dict[str, Any]], out: Path) -> Path:
    """analysis.md with its figures (SVG, PNG) and tables (CSV, LaTeX); the path of the page."""
    parts = ["# What training did to the weights\n"]
    if "subspace" in by_kind:
        one = by_kind["subspace"]
        drawings = [ranks_figure(one), seeds_figure(one), updates_figure(one)]
        parts += _section("LoRA's subspaces", subspace_sentences(one), drawings, [overlaps(one), amplifications(one)], one, out)
    if "magnitude" in by_kind:
        one = by_kind["magnitude"]
        sentences = magnitude_sentences(one)
        parts += _section("Sizes and directions", sentences, [movement_figure(one)], [correlations(one)], one, out)
    path = out / "analysis.md"
    write_file(path, "\n".join(parts))
    return path


def _section(
    title: str,
    sentences: Sequence[str],
    drawings: Sequence[Drawing],
    tables: Sequence[Table],
    measured: dict[str, Any],
    out: Path,
) -> list[str]:
    parts = [f"## {title}\n", "".join(f"- {escape_markdown(line)}\n" for line in (*sentences, scores_sentence(measured)))]
    for drawing in drawings:
        save(drawing, out / "figures")
        parts.append(f"![{drawing.alt}](figures/{drawing.name}.png)\n")
    for table in tables:
        write_file(out / "tables" / f"{table.name}.csv", table.csv())
        write_file(out / "tables" / f"{table.name}.tex", table.latex())
        notes = "".join(f"- {escape_markdown(sentence)}\n" for sentence in table.caption)
        parts.append(f"### {escape_markdown(table.title)}\n\n{table.markdown()}\n{notes}")
    parts.append("".join(f"{escape_markdown(caption)}\n" for caption in measured["captions"]))
    return parts
