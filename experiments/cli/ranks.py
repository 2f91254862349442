"""`rankwise ranks`: the rank of every site of a run or of an adapter."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rankwise.experiments.cli.options import Json, check_least, check_output_file, check_output_folder, width


def ranks(
    path: Annotated[Path, typer.Argument(help="A run's folder, a folder of runs, or any PEFT adapter folder.")],
    as_json: Json = False,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write a line for each site to FILE.")] = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for figures of what there is data for.")] = None,
    beside: Annotated[Path | None, typer.Option(help="Another run or adapter: draw both and their difference.")] = None,
    knock_out: Annotated[bool, typer.Option("--knock-out", help="Measure the loss of a run without each site first.")] = False,
    rows: Annotated[int | None, typer.Option(help="Rows of the selection split to measure it on.  [default: 128]")] = None,
) -> None:
    """Print the rank of every layer and module, how much of it is used, and what is wrong with an adapter."""
    from rankwise.experiments.files import write_file
    from rankwise.experiments.records import is_run
    from rankwise.reports import figures as drawn
    from rankwise.reports.ranks import listing

    if beside is not None and figures is None:
        raise ValueError("--beside draws two allocations side by side: name a folder with --figures")
    if rows is not None and not knock_out:
        raise ValueError("--rows has no effect without --knock-out")
    check_least("--rows", rows)
    check_output_file("--csv", csv)
    check_output_folder("--figures", figures)
    if knock_out:
        if not is_run(path):
            raise ValueError(
                f"--knock-out: {path} is not a run; give the folder of one run, which has config.json and adapter/"
            )
        from rankwise.experiments import knockout

        knockout.of_run(path, rows or knockout.ROWS)
    shown = listing.as_dict(path) if as_json else listing.shown(path)
    if csv is not None:
        write_file(csv, listing.as_csv(path))
    if figures is not None:
        for drawing in listing.drawings(path, beside):
            drawn.save(drawing, figures)
    if as_json:
        print(json.dumps(shown, indent=2, allow_nan=False))
    else:
        print("\n\n".join(table.text(width()).rstrip("\n") for table in shown))
