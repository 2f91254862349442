"""`rankwise tune`: search a method's rank, scale, rate and targets, and test what was found."""

from pathlib import Path
from typing import Annotated

import typer
from rankwise.experiments.cli.compare import narrowed
from rankwise.experiments.cli.options import (
    Device,
    Json,
    Pack,
    RetryFailed,
    Threads,
    check_device,
    check_least,
    check_output_folder,
)
from rankwise.experiments.cli.progress import Progress
from rankwise.experiments.cli.report import show_report
from rankwise.experiments.cli.start import start_torch


def tune(
    study: Annotated[Path, typer.Argument(help="A study file with a section [tune].")],
    out: Annotated[Path | None, typer.Option(help="Folder of the runs.  [default: runs/<study>]")] = None,
    device: Device = "auto",
    tasks: Annotated[str | None, typer.Option(help="Search on this task alone.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds of the final runs: 0 to N-1.")] = None,
    runs: Annotated[int | None, typer.Option(help="Runs of the search, instead of the study's.")] = None,
    pack: Pack = None,
    threads: Threads = None,
    accept_licence: Annotated[list[str] | None, typer.Option(help="Accept the terms of research-only data.")] = None,
    retry_failed: RetryFailed = False,
    as_json: Json = False,
) -> None:
    """Search rank, alpha, rate and targets on the validation part, then test what was found against the reference.

    The report has the final runs alone: fresh seeds, on the part that the search has not seen.  The same command goes on where
    one was cut off.
    """
    from rankwise.experiments import checks, config, own_study, search_space

    check_least("--threads", threads)
    check_least("--runs", runs)
    check_device(device)
    source = config.find(study)
    chosen = narrowed(config.read(source), None, tasks, seeds, pack, accept_licence or [])
    if runs is not None and chosen.tune is not None:
        chosen = chosen.model_copy(update={"tune": chosen.tune.model_copy(update={"runs": runs})})
    if faults := search_space.faults(chosen):
        raise ValueError("\n".join(f"{source.name}: {fault}" for fault in faults))
    if (lacking := search_space.missing()) is not None:
        raise ValueError(lacking)
    folder = out or Path("runs") / chosen.name
    check_output_folder("--out", folder)
    checks.check(chosen)

    with Progress() as bar:
        said: set[str] = set()

        def say(line: str) -> None:
            if line not in said:  # two runners read the same data
                bar.warn(line)
            said.add(line)

        bar.say(f"{chosen.title or chosen.name}: loading torch, model and data ...")
        start_torch(bar, threads)
        from rankwise.experiments.study import Runner, search

        runner = Runner(search.of_search(chosen), folder / search.FOLDER, device, say, bar.advance, retry_failed, bar.more)
        runner.prepare()
        one = search.Search(runner, chosen.tune)
        bar.start(one.work())
        found = one.run()
        bar.warn(
            f"the search of {chosen.tune.runs} runs found rank {found.rank}, alpha/r {found.scale:g}, learning rate "
            f"{found.learning_rate:g} ({folder / search.FOLDER / search.RECORD}); now its final runs"
        )
        final = Runner(search.tested(chosen, found, chosen.tune.runs), folder, device, say, bar.advance, retry_failed, bar.more)
        final.prepare()
        bar.more(final.work())
        own_study.copy(source, folder)
        results = final.run()
    show_report(folder, None, as_json)
    if any(result["status"] == "failed" for result in results):
        raise typer.Exit(1)
