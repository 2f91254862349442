"""The report of a folder of runs: report.md with its figures (SVG, PNG) and tables (CSV, LaTeX) beside it.

It is made from numbers and settings alone: no text of a corpus and no traceback reaches it. Every file is written whole
or not at all, report.md last, so that it never links to what is not there. The same runs give the same bytes.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from reports import facts, figures, html, tables
from reports.results import Study, load_all, write_file

TEMPLATES = Path(__file__).parent / "templates"


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
    several = len(parts) > 1
    sections = [_section(part, out, facts.slug(part) + "-" if several else "") for part in parts]
    for section in sections:
        section["command"] = (commands or {}).get(section["study"].name)
    write_file(out / "report.html", html.render(sections, beside))
    text = _environment().get_template("report.md.jinja").render(parts=sections, beside=beside)
    path = out / "report.md"
    write_file(path, _tidy(text))
    return path


def _section(study: Study, out: Path, prefix: str) -> dict:
    """Everything that the template says of one part; its figures and tables are written on the way."""
    comparison, rates, ranks = tables.comparison(study), tables.rate_sweep(study), tables.ranks(study)
    written = []
    for table in (comparison, rates, ranks, tables.every_run(study)):
        if table is not None:
            table = replace(table, name=prefix + table.name)
            write_file(out / "tables" / f"{table.name}.csv", table.csv())
            write_file(out / "tables" / f"{table.name}.tex", table.latex())
            written.append(table.name)
    drawings = [replace(drawing, name=prefix + drawing.name) for drawing in figures.draw_all(study)]
    for drawing in drawings:
        figures.save(drawing, out / "figures")
    return {
        "study": study,
        "counts": facts.counts(study),
        "alarms": tables.alarms(study),
        "notes": tables.task_caption(study),
        "verdicts": [],
        "warnings": [],
        "comparison": comparison,
        "rates": rates,
        "ranks": ranks,
        "figures": drawings,
        "tables": written,
        "troubles": facts.troubles(study),
        "places": facts.places(study),
        "settings": facts.settings(study),
        "training": facts.training(study),
    }


def _code(text: str) -> str:
    """Settings as a code span; a bar would end a table's cell."""
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`" if text else "-"


def _tidy(text: str) -> str:
    """At most one empty line in a row, one line end at the end."""
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
