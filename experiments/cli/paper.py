"""rankwise paper: a published table beside our own runs of its recipe."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rankwise.experiments.cli.app import Json
from rankwise.experiments.cli.progress import Progress
from rankwise.experiments.cli.start import start_torch


def paper(
    name: Annotated[str | None, typer.Argument(help="A paper's table, as adalora-1; without one they are listed.")] = None,
    cells: Annotated[str | None, typer.Option(help="Run these tasks of it, with commas between, or all.")] = None,
    rows: Annotated[list[str] | None, typer.Option(help="Only this row, by its label; may be given again.")] = None,
    variant: Annotated[str, typer.Option(help="paper: as the paper says; script: as its released code does.")] = "paper",
    model: Annotated[str | None, typer.Option(help="A model that stands in for the paper's.")] = None,
    scale: Annotated[float, typer.Option(help="Shrink the recipe, all its step counts in proportion.")] = 1.0,
    seeds: Annotated[int | None, typer.Option(help="So many seeds, 0 to N-1.  [default: as many as the paper's]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs.  [default: runs/papers/<table>]")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.  [default: what torch takes]")] = None,
    pack: Annotated[int | None, typer.Option(help="Most members that train at once.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed runs again.")] = False,
    as_json: Json = False,
) -> None:
    """A paper's table beside our own runs of its recipe: list them, look at one, or run cells of it."""
    from rankwise.experiments import checks, recipes

    width = shutil.get_terminal_size((120, 24)).columns
    if name is None or cells is None:
        given = {"--cells": cells, "--rows": rows, "--model": model, "--seeds": seeds, "--out": out, "--pack": pack}
        idle = next((flag for flag, value in given.items() if value is not None), None)
        if idle is not None or scale != 1:
            needed = "--cells, such as --cells stsb" if name else "the name of a table"
            raise ValueError(f"{idle or '--scale'} has no effect without {needed}")
    if name is None:
        chosen = [recipes.load(one) for one in recipes.names()]
    else:
        chosen = [recipes.load(name)]
    if cells is None:
        from rankwise.reports import beside, papers

        found = recipes.here(chosen, variant)
        if as_json:
            print(json.dumps(found, indent=1))
        else:
            print((beside.listing(found) if name is None else beside.detail(found, papers.load(chosen[0].table))).text(width))
        return
    recipe = chosen[0]
    wanted = [word.strip() for word in cells.split(",") if word.strip()]
    if any(word not in (*recipe.tasks, "all") for word in wanted):  # a column's own name stands for the cell that fills it
        from rankwise.reports import beside, papers

        published = papers.load(recipe.table)
        for cell, task in recipe.tasks.items():
            columns = beside.columns_of(published, task, recipe.beside)
            wanted = [cell if word in columns else word for word in wanted]
    chosen = recipes.choose(recipe, wanted, rows or [], variant)
    for flag, number in (("--seeds", seeds), ("--pack", pack), ("--threads", threads)):
        if number is not None and number < 1:
            raise ValueError(f"{flag} {number}: give at least 1")
    folder = out or Path("runs") / "papers" / recipe.name
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: this is a file; name a folder")
    faults: list[str] = []
    plans = []
    for row, cell in chosen:
        with checks.collecting(faults):
            plans.append(recipes.plan(recipe, row, cell, variant, model, scale, seeds, pack))
            checks.check(plans[-1].study)
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))
    recipes.check_at_hand(plans)
    from rankwise.reports import beside, papers

    published = papers.load(recipe.table)
    with Progress() as bar:
        bar.say(f"{recipe.title}: loading torch, model and data ...")
        start_torch(bar, threads)
        from rankwise.experiments.study import Runner

        runners = [Runner(one.study, folder, device, bar.warn, bar.advance, retry_failed, bar.more) for one in plans]
        for runner in runners:
            with checks.collecting(faults):
                runner.prepare()
        if faults:
            raise ValueError("\n".join(dict.fromkeys(faults)))
        bar.start(sum(runner.work() for runner in runners))
        lines = []
        for one, runner in zip(plans, runners, strict=True):
            finals = [result for result in runner.run() if result["phase"] == "final"]
            entry = one.study.methods[0]
            lines += beside.lines(
                published,
                one.row,
                beside.columns_of(published, one.study.tasks[0], recipe.beside),
                finals,
                cell=one.cell,
                variant=one.variant,
                scale=one.scale,
                model=one.study.model,
                stands_in_for=one.stands_in_for,
                reasons=[(reason.tag, reason.text) for reason in one.reasons],
                departures=one.departures,
                notes=runner.prepared[one.study.tasks[0]].captions,
                final_steps=entry.settings.get("final_steps"),
                miniature=bool(recipe.miniature),
                position=one.position,
            )
            beside.keep(recipe.table, lines, folder)  # after each cell, so that a cut keeps what was done
    from rankwise.reports import page

    written = page.write(folder, folder / "report", beside=beside.of_folder(folder))
    made = beside.table(published, lines)
    if as_json:
        print(json.dumps({"table": made.records(), "caption": list(made.caption), "report": str(written)}, indent=1))
    else:
        print(made.text(width))
        print(f"report: {written}")
        print(f"page: {written.with_suffix('.html')}")
    if any(line.failed for line in lines):
        raise typer.Exit(1)
