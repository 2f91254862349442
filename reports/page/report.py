"""The report of a folder of runs: report.md with its figures (SVG, PNG) and tables (CSV, LaTeX) beside it, and report.html.

It is made from numbers and settings, and of runs that generate texts a few rows (tables/samples.py): no other text of a corpus
and no traceback reaches it. Every file is written whole or not at all, report.md last, so that it never links to what is not
there. The same runs give the same bytes.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rankwise.experiments.files import write_file
from rankwise.reports import figures, hypotheses, tables
from rankwise.reports.factors import decompositions
from rankwise.reports.page import facts, html
from rankwise.reports.rank_curve import which_rank
from rankwise.reports.results import Study, load_all
from rankwise.reports.verdicts import verdicts, warnings

TEMPLATES = Path(__file__).parent / "templates"
OVER_TASKS = (tables.verdicts_over_tasks, tables.overall, tables.across_tasks)  # tables of all parts of a study


def write(
    source: str | Path | Study,
    out_folder: str | Path,
    beside: tables.Table | None = None,
    commands: Mapping[str, str] | None = None,
) -> Path:
    """Write the report of a study, or of every study of a folder, into `out_folder`; the path of report.md.

    beside: a paper's numbers against ours, shown in a section of its own.
    commands: study -> the command that runs the full protocol of a quick one.

    Raises:
        ValueError: the folder holds no runs, or a file of a run is cut off or foreign.
        OSError: the report cannot be written (a full disk): what was there before is still there.
    """
    out = Path(out_folder)
    studies = [source] if isinstance(source, Study) else load_all(source)
    parts = [part for study in studies for part in study.parts()]
    sections = [section(part, (commands or {}).get(part.name)) for part in parts]
    for entry in sections:
        prefix = facts.slug(entry["study"]) + "-" if len(parts) > 1 else ""
        entry["tables"] = [_write_table(table, out / "tables", prefix) for table in _named(entry) if table is not None]
        entry["figures"] = _write_figures(entry["study"], out / "figures", prefix)
    made = [(study, hypotheses.hypothesis_table(study)) for study in studies]
    made += [(study, make(study.parts())) for study in studies for make in OVER_TASKS]
    over_tasks = [(study, replace(table, reproduce=facts.reproduce([study]))) for study, table in made if table is not None]
    for study, table in over_tasks:
        _write_table(table, out / "tables", f"{facts.file_name(study.name)}-" if len(studies) > 1 else "")
    if beside is not None:
        beside = replace(beside, reproduce=facts.reproduce(studies))
        _write_table(beside, out / "tables")
    whole = {"parts": sections, "over_tasks": [table for _, table in over_tasks], "beside": beside}
    write_file(out / "report.html", html.render(**whole))
    text = _environment().get_template("report.md.jinja").render(**whole)
    path = out / "report.md"
    write_file(path, _tidy(text))
    return path


def section(study: Study, command: str | None = None) -> dict:
    """The content of one part, of both pages; command: runs the full protocol of a quick study."""
    line = facts.reproduce([study])

    def made(table: tables.Table | None) -> tables.Table | None:
        return None if table is None else replace(table, reproduce=line)

    return {
        "study": study,
        "command": command if study.quick else None,
        "counts": facts.counts(study),
        "alarms": tables.alarms(study),
        "notes": tables.task_caption(study),
        "verdicts": verdicts(study),
        "warnings": warnings(study),
        "comparison": made(tables.comparison(study)),
        "statistics": made(tables.statistics_table(study)),
        "rows": made(tables.rows_table(study)),
        "curves": made(tables.rank_curve(study)),
        "answers": which_rank(study),
        "factors": made(tables.factors(study)),
        "parts_worth": decompositions(study),
        "rates": made(tables.rate_sweep(study)),
        "ranks": made(tables.ranks(study)),
        "allocation": [made(table) for table in tables.study_tables(study)],
        "samples": made(tables.samples(study)),
        "troubles": facts.troubles(study),
        "places": facts.places(study),
        "settings": facts.settings(study),
        "training": facts.training(study),
    }


def _named(entry: dict) -> list[tables.Table | None]:
    """The tables that get files of their own."""
    study = entry["study"]
    rows = entry["rows"] if entry["rows"] and entry["rows"].rows else None
    made = [entry["comparison"], tables.verdict_table(study), entry["curves"], entry["factors"], entry["statistics"], rows]
    made += [entry["rates"], entry["ranks"]]
    return [*made, *entry["allocation"], entry["samples"], tables.every_run(study)]


def _write_table(table: tables.Table, folder: Path, prefix: str = "") -> str:
    """Writes CSV and LaTeX; returns the name of the files."""
    table = replace(table, name=prefix + table.name)
    write_file(folder / f"{table.name}.csv", table.csv())
    write_file(folder / f"{table.name}.tex", table.latex())
    return table.name


def _write_figures(study: Study, folder: Path, prefix: str) -> list[figures.Drawing]:
    drawings = [replace(drawing, name=prefix + drawing.name) for drawing in figures.draw_all(study)]
    for drawing in drawings:
        figures.save(drawing, folder)
    return drawings


def _code(text: str) -> str:
    """Settings as a code span; a bar would end a table's cell."""
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`" if text else "-"


def _tidy(text: str) -> str:
    """The text with no two empty lines in a row and one newline at the end."""
    lines: list[str] = []
    for line in text.split("\n"):
        if line.strip() or (lines and lines[-1]):
            lines.append(line.rstrip())
    return "\n".join(lines).rstrip() + "\n"


def _environment():
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters["md"] = tables.escape_markdown
    environment.filters["code"] = _code
    return environment
