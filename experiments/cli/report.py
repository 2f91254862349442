"""`rankwise report`: tables, figures and pages of runs that are there."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rankwise.experiments.cli.options import Json, check_output_folder, width

if TYPE_CHECKING:
    from rankwise.reports.results import Study


def report(
    runs: Annotated[Path, typer.Argument(help="A folder of runs.")],
    out: Annotated[Path | None, typer.Option(help="Where to write it.  [default: RUNS/report]")] = None,
    with_runs: Annotated[
        bool, typer.Option("--with-runs", help="Put finished runs, without weights, into one archive in OUT.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the report of a folder of runs: a page (HTML), Markdown, figures (SVG, PNG), tables (CSV, LaTeX)."""
    if with_runs and out is None:
        raise ValueError("--with-runs writes their archive to another folder: name it with --out")
    check_output_folder("--out", out)
    show_report(runs, out, as_json)
    if with_runs and out is not None:
        from rankwise.reports import results

        results.archive_finished(runs, out)


def show_report(runs: Path, out: Path | None, as_json: bool) -> None:
    """Writes the report of a folder of runs, and prints its comparisons and verdicts."""
    from rankwise.reports import page, results, tables
    from rankwise.reports.factors import decompositions
    from rankwise.reports.papers import beside_table
    from rankwise.reports.rank_curve import which_rank
    from rankwise.reports.verdicts import verdicts

    studies = results.load_all(runs)
    commands = {study.name: command for study in studies if study.quick and (command := full_protocol(study))}
    written = page.write(runs, out or runs / "report", beside_table.of_folder(runs), commands)
    parts = [part for study in studies for part in study.parts()]
    comparisons = [tables.comparison(part) for part in parts]
    if as_json:
        value = {
            "studies": [study.name for study in studies],
            "report": str(written),
            "tables": [table.records() for table in comparisons],
            "ranks": [asdict(answer) for part in parts for answer in which_rank(part)],
            "factors": [asdict(one) | {"text": one.text} for part in parts for one in decompositions(part)],
            "verdicts": [asdict(verdict) for part in parts for verdict in verdicts(part)],
        }
        print(json.dumps(value, indent=1))
        return
    for part, table in zip(parts, comparisons, strict=True):
        print(table.text(width()))
        for verdict in () if part.quick else verdicts(part):
            print(f"{verdict.setting}: {verdict.text}")
        for answer in which_rank(part):
            print(f"which rank of {answer.curve}? {answer.text}")
        for one in decompositions(part):
            print(f"what each part of {one.design} is worth: {one.text}")
        print()
    for study in studies:
        if study.quick:
            remedy = f"  The full protocol: {commands[study.name]}" if study.name in commands else ""
            print(f"{study.name} is a quick look, no fair comparison.{remedy}")
    for study in studies:
        if study.kind == "randomized":
            print(f"What rank is worth at each site: rankwise analysis randomized {runs}")
    print(f"report: {written}")
    print(f"page: {written.with_suffix('.html')}")


def full_protocol(study: "Study") -> str | None:
    """The command of a shipped study of the same model and task that is no quick look: the one with most of its settings.

    Of several the one with fewest others, so that the quick look's own protocol comes before a study of something else.
    """
    from rankwise.experiments import config

    shipped = [config.read(path) for path in sorted(config.STUDIES.glob("*.toml"))]
    fair = [
        other
        for other in shipped
        if not other.quick and other.kind == "comparison" and other.model == study.model and study.task in other.tasks
    ]
    own = set(study.settings)
    fair = [other for other in fair if own & {entry.label for entry in other.methods}]
    if not fair:
        return None

    def unlike(other: config.Study) -> tuple[int, int, int]:
        labels = {entry.label for entry in other.methods}
        return len(own - labels), len(labels - own), len(other.tasks)

    return f"rankwise compare {min(fair, key=unlike).name}"
