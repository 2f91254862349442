"""`rankwise paper`: a published table beside our own runs of its recipe."""

import json
from collections.abc import Mapping, Sequence
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
    width,
)
from rankwise.experiments.cli.progress import Progress
from rankwise.experiments.cli.start import start_torch

if TYPE_CHECKING:
    from rankwise.experiments.recipes import Plan, Recipe
    from rankwise.experiments.study import Runner
    from rankwise.reports.papers import Published
    from rankwise.reports.papers.beside import Line


def paper(
    name: Annotated[str | None, typer.Argument(help="A paper's table, as adalora-1; without one they are listed.")] = None,
    cells: Annotated[str | None, typer.Option(help="Run these tasks of it, with commas between, or all.")] = None,
    rows: Annotated[list[str] | None, typer.Option(help="Only this row, by its label; may be given again.")] = None,
    variant: Annotated[str, typer.Option(help="paper: as the paper says; script: as its released code does.")] = "paper",
    model: Annotated[str | None, typer.Option(help="A model that stands in for the paper's.")] = None,
    scale: Annotated[float, typer.Option(help="Shrink the recipe, all its step counts in proportion.")] = 1.0,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds, 0 to N-1.  [default: as many as the paper's]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs.  [default: runs/papers/<table>]")] = None,
    device: Device = "auto",
    threads: Threads = None,
    pack: Pack = None,
    retry_failed: RetryFailed = False,
    as_json: Json = False,
) -> None:
    """A paper's table beside our own runs of its recipe: list them, look at one, or run cells of it."""
    if name is None or cells is None:
        given = {"--cells": cells, "--rows": rows, "--model": model, "--seeds": seeds, "--out": out, "--pack": pack}
        _refuse_idle(given, scale, "--cells, such as --cells stsb" if name else "the name of a table")
        _show(name, variant, as_json)
        return

    from rankwise.experiments import recipes
    from rankwise.reports import papers

    recipe = recipes.load(name)
    published = papers.load(recipe.table)
    chosen = recipes.choose(recipe, _cells(recipe, published, cells), rows or [], variant)
    for option, number in (("--seeds", seeds), ("--pack", pack), ("--threads", threads)):
        check_least(option, number)
    check_device(device)
    folder = out or Path("runs") / "papers" / recipe.name
    check_output_folder("--out", folder)
    plans = _plans(recipe, chosen, variant, model, scale, seeds, pack)

    with Progress() as bar:
        bar.say(f"{recipe.title}: loading torch, model and data ...")
        start_torch(bar, threads)
        from rankwise.experiments.study import Runner

        runners = [Runner(plan.study, folder, device, bar.warn, bar.advance, retry_failed, bar.more) for plan in plans]
        _prepare(runners)
        bar.start(sum(runner.work() for runner in runners))
        lines = _run(recipe, published, plans, runners, folder)
    _report(published, lines, folder, as_json)
    if any(line.failed for line in lines):
        raise typer.Exit(1)


# -- looking -------------------------------------------------------------------------------------------------------------


def _refuse_idle(given: Mapping[str, Any], scale: float, needed: str) -> None:
    """
    Raises:
        ValueError: an option of running where nothing is run.
    """
    idle = next((option for option, value in given.items() if value is not None), None)
    if idle is not None or scale != 1:
        raise ValueError(f"{idle or '--scale'} has no effect without {needed}")


def _show(name: str | None, variant: str, as_json: bool) -> None:
    """Prints every table, or the cells of one: what they need, and whether this machine can run them."""
    from rankwise.experiments import recipes
    from rankwise.reports import papers
    from rankwise.reports.papers import listing

    shown = [recipes.load(one) for one in (recipes.names() if name is None else [name])]
    known = dict.fromkeys(one for recipe in shown for one in recipe.variants)
    if known and variant not in known:
        raise ValueError(f"--variant {variant}: no such recipe of {name or 'any table'}; there are: {', '.join(known)}")
    needs = recipes.here(shown, variant)
    if as_json:
        print(json.dumps(needs, indent=1))
    elif name is None:
        print(listing.overview(needs).text(width()))
    else:
        print(listing.detail(needs, papers.load(shown[0].table)).text(width()))


# -- running -------------------------------------------------------------------------------------------------------------


def _cells(recipe: "Recipe", published: "Published", given: str) -> list[str]:
    """The names in `given`, which has commas between; the name of a column stands for the cell that fills it.

    Raises:
        ValueError: there is none.
    """
    from rankwise.reports.papers import beside

    cells = [word.strip() for word in given.split(",") if word.strip()]
    if not cells:
        raise ValueError(f"--cells is empty: name at least one of: {', '.join(recipe.tasks)}, or all")
    for cell, task in recipe.tasks.items():
        columns = beside.columns_of(published, task, recipe.beside, cell)
        cells = [cell if name in columns and name not in recipe.tasks else name for name in cells]
    return cells


def _plans(
    recipe: "Recipe",
    chosen: Sequence[tuple[str, str]],
    variant: str,
    model: str | None,
    scale: float,
    seeds: int | None,
    pack: int | None,
) -> list["Plan"]:
    """A plan for each (row, cell), checked; the models and data are there.

    Raises:
        ValueError: what the user can correct, one line for each fault of all plans.
    """
    from rankwise.experiments import checks, recipes

    plans, faults = [], []
    for row, cell in chosen:
        with checks.collecting(faults):
            plans.append(recipes.plan(recipe, row, cell, variant, model, scale, seeds, pack))
            checks.check(plans[-1].study)
    _refuse(faults)
    recipes.check_at_hand(plans)
    return plans


def _prepare(runners: Sequence["Runner"]) -> None:
    """
    Raises:
        ValueError: one line for each fault of all runners.
    """
    from rankwise.experiments import checks

    faults: list[str] = []
    for runner in runners:
        with checks.collecting(faults):
            runner.prepare()
    _refuse(faults)


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))


def _run(
    recipe: "Recipe", published: "Published", plans: Sequence["Plan"], runners: Sequence["Runner"], folder: Path
) -> list["Line"]:
    """Runs every plan; its results beside the published values, kept in the folder after each: an interrupt loses none."""
    from rankwise.reports.papers import beside

    lines = []
    for plan, runner in zip(plans, runners, strict=True):
        finals = [result for result in runner.run() if result["phase"] == "final"]
        lines += _beside(recipe, published, plan, finals, runner.prepared[plan.study.tasks[0]].captions)
        beside.keep(recipe.table, lines, folder)
    return lines


def _beside(
    recipe: "Recipe",
    published: "Published",
    plan: "Plan",
    finals: Sequence[Mapping[str, Any]],
    captions: Sequence[str],
) -> list["Line"]:
    """The results of one plan beside each column that they fill, with all in which they are not the paper's."""
    from rankwise.reports.papers import beside

    study = plan.study
    return beside.lines(
        published,
        plan.row,
        beside.columns_of(published, study.tasks[0], recipe.beside, plan.cell),
        finals,
        cell=plan.cell,
        variant=plan.variant,
        scale=plan.scale,
        model=study.model,
        stands_in_for=plan.stands_in_for,
        reasons=[(reason.tag, reason.text) for reason in plan.reasons],
        departures=plan.departures,
        notes=captions,
        final_steps=study.methods[0].settings.get("final_steps"),
        miniature=bool(recipe.miniature),
        position=plan.position,
    )


def _report(published: "Published", lines: Sequence["Line"], folder: Path, as_json: bool) -> None:
    """Writes the report of everything in the folder, and prints the table of what was asked for now."""
    from rankwise.reports import page
    from rankwise.reports.papers import beside_table

    written = page.write(folder, folder / "report", beside=beside_table.of_folder(folder))
    table = beside_table.table(published, lines)
    if as_json:
        print(json.dumps({"table": table.records(), "caption": list(table.caption), "report": str(written)}, indent=1))
    else:
        print(table.text(width()))
        print(f"report: {written}")
        print(f"page: {written.with_suffix('.html')}")
