"""`rankwise compare`: run a study."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rankwise.experiments.cli.options import (
    Device,
    Json,
    Pack,
    RetryFailed,
    Threads,
    check_device,
    check_least,
    check_output_folder,
    names,
)
from rankwise.experiments.cli.progress import Progress
from rankwise.experiments.cli.report import show_report
from rankwise.experiments.cli.start import start_torch

if TYPE_CHECKING:
    from rankwise.experiments.config import Study


def compare(
    study: Annotated[Path | None, typer.Argument(help="A study file, or the name of one that ships; default: default")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs.  [default: runs/<study>]")] = None,
    device: Device = "auto",
    methods: Annotated[str | None, typer.Option(help="Only these, by label, with commas between.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these, with commas between.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds of the final runs: 0 to N-1.")] = None,
    pack: Pack = None,
    threads: Threads = None,
    accept_licence: Annotated[list[str] | None, typer.Option(help="Accept the terms of research-only data.")] = None,
    retry_failed: RetryFailed = False,
    as_json: Json = False,
) -> None:
    """Run a study's missing runs, print the comparison, and write its report."""
    from rankwise.experiments import checks, config

    source = config.find(study or config.DEFAULT_STUDY)
    chosen = config.read(source)
    chosen = narrowed(chosen, methods, tasks, seeds, pack, accept_licence or [])
    check_least("--threads", threads)
    check_device(device)
    folder = out or Path("runs") / chosen.name
    check_output_folder("--out", folder)
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
    study: "Study", methods: str | None, tasks: str | None, seeds: int | None, pack: int | None, accepted: list[str]
) -> "Study":
    """The study with what the command line says instead of the file.

    Raises:
        ValueError: a label or task that the study does not have, or a number below 1.
    """
    change: dict[str, Any] = {"accept_licences": [*study.accept_licences, *accepted]}
    if methods is not None:
        labels = names("--methods", methods, [entry.label for entry in study.methods], study.name)
        change["methods"] = [entry for entry in study.methods if entry.label in labels]
        for entry in study.methods:  # a rate that some of its methods chose is not the rate that they share
            if entry.shared_with is not None and (entry.label in labels) != (entry.shared_with in labels):
                raise ValueError(
                    f'--methods {methods}: "{entry.label}" and "{entry.shared_with}" share a learning rate: name both or none'
                )
    if tasks is not None:
        kept = names("--tasks", tasks, study.tasks, study.name)
        change["tasks"] = [name for name in study.tasks if name in kept]
    if seeds is not None:
        check_least("--seeds", seeds)
        change["seeds"] = [*range(seeds)]
    if pack is not None:
        check_least("--pack", pack)
        change["pack"] = pack
    return study.model_copy(update=change)
