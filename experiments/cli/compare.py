"""rankwise compare: runs what is missing of a study, and reports it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rankwise.experiments.cli.app import Json
from rankwise.experiments.cli.progress import Progress
from rankwise.experiments.cli.report import show_report
from rankwise.experiments.cli.start import start_torch
from rankwise.variants.settings import nearest


def compare(
    study: Annotated[Path | None, typer.Argument(help="A study file, or the name of one that ships; default: default")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs.  [default: runs/<study>]")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    methods: Annotated[str | None, typer.Option(help="Only these, by label, with commas between.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these, with commas between.")] = None,
    seeds: Annotated[int | None, typer.Option(help="So many seeds for the final runs, 0 to N-1.")] = None,
    pack: Annotated[int | None, typer.Option(help="Most members that train at once.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.  [default: what torch takes]")] = None,
    accept_licence: Annotated[list[str] | None, typer.Option(help="Accept the terms of research-only data.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed runs again.")] = False,
    as_json: Json = False,
) -> None:
    """Run a study's missing runs, print the comparison, and write its report."""
    from rankwise.experiments import checks, config

    source = config.find(study or config.DEFAULT_STUDY)
    chosen = config.read(source)
    chosen = narrowed(chosen, methods, tasks, seeds, pack, accept_licence or [])
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads}: give at least 1")
    folder = out or Path("runs") / chosen.name
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: this is a file; name a folder")
    checks.check(chosen)

    with Progress() as bar:
        bar.say(f"{chosen.title or chosen.name}: loading torch, model and data ...")
        start_torch(bar, threads)
        from rankwise.experiments.files import write_file
        from rankwise.experiments.records import STUDY_FILE
        from rankwise.experiments.study import Runner

        runner = Runner(chosen, folder, device, bar.warn, bar.advance, retry_failed, bar.more)
        runner.prepare()
        bar.start(runner.work())
        write_file(folder / STUDY_FILE, source.read_bytes())
        results = runner.run()
    show_report(folder, None, as_json)
    if any(result["status"] == "failed" for result in results):
        raise typer.Exit(1)


def narrowed(
    study: Any, methods: str | None, tasks: str | None, seeds: int | None, pack: int | None, accepted: list[str]
) -> Any:
    """The study with what the command line says instead of the file."""
    change: dict[str, Any] = {"accept_licences": [*study.accept_licences, *accepted]}
    if methods is not None:
        wanted = chosen_names("--methods", methods, [e.label for e in study.methods], study.name)
        change["methods"] = [e for e in study.methods if e.label in wanted]
        for entry in study.methods:  # a rate that some of its methods chose is not the rate that they share
            if entry.shared_with is not None and (entry.label in wanted) != (entry.shared_with in wanted):
                raise ValueError(
                    f'--methods {methods}: "{entry.label}" and "{entry.shared_with}" share a learning rate: name both or none'
                )
    if tasks is not None:
        wanted = chosen_names("--tasks", tasks, study.tasks, study.name)
        change["tasks"] = [name for name in study.tasks if name in wanted]
    if seeds is not None:
        if seeds < 1:
            raise ValueError(f"--seeds {seeds}: give at least 1")
        change["seeds"] = list(range(seeds))
    if pack is not None:
        if pack < 1:
            raise ValueError(f"--pack {pack}: give at least 1")
        change["pack"] = pack
    return study.model_copy(update=change)


def chosen_names(option: str, given: str, known: list[str], study: str) -> list[str]:
    """The names in a list with commas.

    Raises:
        ValueError: none, or one that the study does not have.
    """
    wanted = [name.strip() for name in given.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise ValueError(f'{option}: "{name}" is not in {study}{nearest(name, known)}; it has: {", ".join(known)}')
    if not wanted:
        raise ValueError(f"{option} is empty: name at least one of: {', '.join(known)}")
    return wanted
