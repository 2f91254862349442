"""`rankwise calibration`: how often a verdict errs where nothing differs."""

from pathlib import Path
from typing import Annotated

import typer
from rankwise.experiments.cli.app import nothing_kept_if_interrupted
from rankwise.experiments.cli.options import check_least, check_output_folder

SWEEP_SEEDS = 3


def calibration(
    runs: Annotated[Path | None, typer.Argument(metavar="[STUDY_FOLDER]", help="Runs of one method, at several rates.")] = None,
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
    for option, number in (("--families", families), ("--comparisons", comparisons), ("--sweep-seeds", sweep_seeds)):
        check_least(option, number)
    check_least("--seeds", seeds, 2)
    if not designs and (sweep_seeds or SWEEP_SEEDS) > seeds:
        raise ValueError(f"--sweep-seeds {sweep_seeds or SWEEP_SEEDS}: a method has {seeds} seeds: give fewer, or more --seeds")
    check_output_folder("--out", out)
    with nothing_kept_if_interrupted():
        if runs is None:
            from rankwise.reports import simulation as made

            result = made.simulate(families=families, comparisons=comparisons or 5, seeds=seeds)
        else:
            from rankwise.reports import calibration as made
            from rankwise.reports.results import load

            result = made.calibrate(load(runs), made.Design(families, comparisons or 3, seeds, sweep_seeds or SWEEP_SEEDS))
    if out is not None:
        made.write(result, out)
    print(made.text(result), end="")
