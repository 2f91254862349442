"""The report of a folder of runs: report.md with its figures (SVG, PNG) and tables (CSV, LaTeX) beside it.

It is made from numbers and settings alone: no text of a corpus and no traceback reaches it. Every file is written whole
or not at all, report.md last, so that it never links to what is not there. The same runs give the same bytes.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from reports import figures, tables
from reports.results import Study, load_all, write_file
from reports.verdicts import verdicts, warnings

TEMPLATES = Path(__file__).parent / "templates"


def write(source: str | Path | Study, out_folder: str | Path) -> Path:
    """Write the report of a study, or of every study of a folder, into `out_folder`; the path of report.md.

    Raises:
        ValueError: the folder holds no runs, or a file of a run is cut off or foreign.
        OSError: the report cannot be written (a full disk): what was there before is still there.
    """
    out = Path(out_folder)
    studies = [source] if isinstance(source, Study) else load_all(source)
    parts = [part for study in studies for part in study.parts()]
    several = len(parts) > 1
    sections = [_section(part, out, _slug(part) + "-" if several else "") for part in parts]
    over_tasks = [(study, table) for study in studies if (table := tables.overall(study.parts())) is not None]
    if len(over_tasks) > 1:
        over_tasks = [(study, replace(table, name=f"{study.name}-{table.name}")) for study, table in over_tasks]
    for _, table in over_tasks:
        _write_table(table, out)
    text = _environment().get_template("report.md.jinja").render(parts=sections, over_tasks=[table for _, table in over_tasks])
    path = out / "report.md"
    write_file(path, _tidy(text))
    return path


def _section(study: Study, out: Path, prefix: str) -> dict:
    """Everything that the template says of one part; its figures and tables are written on the way."""
    comparison, rates, ranks = tables.comparison(study), tables.rate_sweep(study), tables.ranks(study)
    found, statistics = tables.verdict_table(study), tables.statistics_table(study)
    written = []
    for table in (comparison, found, statistics, rates, ranks, tables.every_run(study)):
        if table is not None:
            table = replace(table, name=prefix + table.name)
            _write_table(table, out)
            written.append(table.name)
    drawings = [replace(drawing, name=prefix + drawing.name) for drawing in figures.draw_all(study)]
    for drawing in drawings:
        figures.save(drawing, out / "figures")
    return {
        "study": study,
        "counts": _counts(run.status for run in study.runs),
        "alarms": tables.alarms(study),
        "notes": tables.task_caption(study),
        "verdicts": verdicts(study),
        "warnings": warnings(study),
        "comparison": comparison,
        "statistics": statistics,
        "rates": rates,
        "ranks": ranks,
        "figures": drawings,
        "tables": written,
        "troubles": _troubles(study),
        "facts": _facts(study),
        "settings": _settings(study),
        "training": _training(study),
    }


def _write_table(table: tables.Table, out: Path) -> None:
    write_file(out / "tables" / f"{table.name}.csv", table.csv())
    write_file(out / "tables" / f"{table.name}.tex", table.latex())


def _counts(statuses: Iterable[str]) -> str:
    count = Counter(statuses)
    total = sum(count.values())
    return f"{total} run{'s' if total > 1 else ''}: " + ", ".join(f"{count[name]} {name}" for name in sorted(count))


def _troubles(study: Study) -> list[str]:
    lines = []
    for run in study.runs:
        c = run.config
        name = f"{c.setting}, {c.phase}, rate {tables.rate_text(c.learning_rate)}, seed {c.seed}"
        if run.result and run.result.status == "failed":
            after = f" after {run.result.steps:,} steps" if run.result.steps else ""
            lines.append(f"{name}: failed{after}: {tables.error_text(run.result.error)}")
        elif run.result is None:
            last = run.train[-1].step if run.train else 0
            lines.append(f"{name}: unfinished, {last:,} steps written; the same `rankwise compare` goes on with it")
        elif run.result.skipped_steps:
            lines.append(f"{name}: completed, {run.result.skipped_steps} steps skipped (not finite)")
        lines += run.notes
    return lines


def _facts(study: Study) -> list[tuple[str, str]]:
    """Where and with what the runs were made; every value that occurs, with its count where there are several."""
    configs = [run.config for run in study.runs]
    results = study.results()
    names = dict.fromkeys(name for config in configs for name in config.versions)
    versions = "; ".join(f"{name} {_each(c.versions.get(name) for c in configs)}" for name in names)
    commits = [f"{(c.commit or 'unknown')[:12]}{' with changes' if c.dirty else ''}" for c in configs]
    devices = [f"{c.device} ({c.device_name})" if c.device_name else c.device for c in configs]
    facts = [
        ("Commit", _each(commits)),
        ("Versions", versions),
        ("Device", _each(devices)),
        ("Threads", _each(c.threads for c in configs)),
        ("Precision of the frozen weights", _each(c.precision for c in configs)),
        ("Runs trained together in a pack", _each(r.pack_size for r in results)),
        ("Packing", _each(r.packing_note for r in results if r.packing_note)),
        ("Dropout", _each(r.dropout_note for r in results if r.dropout_note)),
    ]
    return [(label, values) for label, values in facts if values]


def _each(values: Iterable[object]) -> str:
    count = Counter("unknown" if value is None else str(value) for value in values)
    if len(count) == 1:
        return escape(next(iter(count)))
    return ", ".join(escape(f"{value} ({n} runs)") for value, n in sorted(count.items()))


def _settings(study: Study) -> list[list[str]]:
    rows = []
    for arm in study.arms:
        config = next(run.config for run in (*arm.final, *(r for runs in arm.grid.values() for r in runs)))
        targets = config.targets if isinstance(config.targets, str) else _json(config.targets) if config.targets else "-"
        sites = f" ({len(config.targets_resolved)} sites)" if config.targets_resolved else ""
        rows.append([escape(arm.setting), escape(arm.method), escape(targets + sites), _code(config.method_settings)])
    return rows


def _training(study: Study) -> list[tuple[str, str]]:
    """The training settings of each phase; more than one line of a phase says that its runs differ."""
    found: dict[tuple[str, str], None] = {}
    for run in sorted(study.runs, key=lambda run: run.config.phase):
        if run.config.training:
            found[run.config.phase, _code(run.config.training)] = None
    return list(found)


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _code(value: dict) -> str:
    """Settings as a code span; a bar would end a table's cell."""
    return "`" + _json(value).replace("|", "\\|").replace("`", "'") + "`" if value else "-"


def escape(text: object) -> str:
    return tables.escape_markdown(str(text))


def _slug(study: Study) -> str:
    words = "-".join((study.name, study.task, study.model.split("/")[-1]))
    return "".join(char if char.isalnum() else "-" for char in words).lower()


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
    environment.filters["md"] = escape
    return environment
