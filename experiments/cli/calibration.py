"""rankwise calibration: how often a comparison errs when nothing is there."""

from pathlib import Path
from typing import Annotated

import typer
from rankwise.experiments.cli.app import nothing_kept_if_interrupted


def calibration(
    runs: Annotated[Path | None, typer.Argument(help="Folder of a pool of runs of one method.")] = None,
    designs: Annotated[bool, typer.Option("--designs", help="Simulate methods instead, and compare the designs.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the result as JSON and Markdown.")] = None,
    families: Annotated[int, typer.Option(help="Families of comparisons to draw.")] = 2_000,
    comparisons: Annotated[int | None, typer.Option(help="Comparisons of a family.  [default: 3; with --designs 5]")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of each method.")] = 8,
    sweep_seeds: Annotated[int | None, typer.Option(help="Seeds that choose the rate, among them.  [default: 3]")] = None,
) -> None:
    """Measure how often verdicts name a wrong winner: on committed runs of one method, or on simulated methods."""
    if (runs is None) != designs:
        raise ValueError("give the folder of a pool of runs, or --designs to simulate, one of the two")
    if designs and sweep_seeds is not None:
        raise ValueError("--sweep-seeds has no effect with --designs: take it out")
    for flag, number in (("--families", families), ("--comparisons", comparisons), ("--sweep-seeds", sweep_seeds)):
        if number is not None and number < 1:
            raise ValueError(f"{flag} {number}: give at least 1")
    if seeds < 2:
        raise ValueError(f"--seeds {seeds}: give at least 2")
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: this is a file; name a folder")
    with nothing_kept_if_interrupted():
        if designs:
            from rankwise.reports import simulation as made

            found = made.simulate(families=families, comparisons=comparisons or 5, seeds=seeds)
        else:
            from rankwise.reports import calibration as made
            from rankwise.reports.results import load

            found = made.calibrate(load(runs), made.Design(families, comparisons or 3, seeds, sweep_seeds or 3))
    if out is not None:
        made.write(found, out)
    print(made.text(found), end="")
