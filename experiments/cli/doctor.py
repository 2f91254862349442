"""`rankwise doctor`: what is wrong with an adapter, and how small it can be."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rankwise.experiments.cli.app import nothing_kept_if_interrupted
from rankwise.experiments.cli.options import Json, check_device, check_least, check_output_file, check_output_folder, width
from rankwise.experiments.cli.own_options import own_entry
from rankwise.experiments.cli.progress import Progress
from rankwise.experiments.cli.start import start_torch
from rankwise.variants.settings import nearest

if TYPE_CHECKING:
    from rankwise.experiments.data_entries import OwnData
    from rankwise.variants.doctor.examining import Examination


def doctor(
    path: Annotated[Path, typer.Argument(help="An adapter's folder or file: PEFT's, Kohya's, diffusers' or ours; or a run.")],
    as_json: Json = False,
    sarif: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the findings to FILE as SARIF 2.1.0.")] = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for figures of spectra and criteria.")] = None,
    base: Annotated[Path | None, typer.Option(help="Base model's folder: adds |dW|/|W| and the drift of DoRA's m.")] = None,
    fix: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a plain LoRA of the ranks that --by keeps.")] = None,
    by: Annotated[str | None, typer.Option(help="exact, energy, sv_fro, sv_ratio, mp or total, for --fix.")] = None,
    energy: Annotated[float | None, typer.Option(help="energy: share of |dW|^2 to keep; 0.95 if not given.")] = None,
    sv_fro: Annotated[float | None, typer.Option(help="sv_fro: share of |dW| to keep; 0.9 if not given.")] = None,
    sv_ratio: Annotated[float | None, typer.Option(help="sv_ratio: keep sigma > sigma_1/RATIO; 10 if not given.")] = None,
    total: Annotated[int | None, typer.Option(help="total: ranks over all sites; half of them if not given.")] = None,
    data: Annotated[str | None, typer.Option(help="Measure the loss of each criterion on this file of yours too.")] = None,
    model: Annotated[
        str | None, typer.Option(help="For --data: base model.  [default: the one that the adapter names]")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="For --data: kind of task.  [default: by the fields]")] = None,
    input: Annotated[str | None, typer.Option(help="For --data: field or template that the model reads.")] = None,
    target: Annotated[str | None, typer.Option(help="For --data: field or template that it is to give.")] = None,
    rows: Annotated[int | None, typer.Option(help="For --data: most rows, drawn by a fixed seed.  [default: 128]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="For --data: rows at once.  [default: 16]")] = None,
    device: Annotated[str | None, typer.Option(help="For --data: cpu, cuda, cuda:N, or auto.  [default: auto]")] = None,
) -> None:
    """Say what is wrong with an adapter, how much of its rank is used, and how small it can be at which error.

    Needs no base model; with --base its weights are read, not the model.  With --data the model is loaded, and each criterion
    has a measured loss.  Exit code 1 where a finding is an error.
    """
    from rankwise.experiments import export as exports
    from rankwise.experiments.files import write_file
    from rankwise.reports import doctor as shown
    from rankwise.variants.doctor import examining, findings, reading, writing
    from rankwise.variants.doctor.base import Base

    given = {"energy": energy, "sv_fro": sv_fro, "sv_ratio": sv_ratio, "total": total}
    settings = {name: value for name, value in given.items() if value is not None}
    if (fix is None) != (by is None):
        raise ValueError("--fix DIR writes the ranks that a criterion keeps: name it with --by" if by is None else
                         f"--by {by} has no effect without --fix DIR")  # fmt: skip
    check_least("--total", total)
    check_output_file("--sarif", sarif)
    check_output_folder("--figures", figures)
    asked = {"--model": model, "--kind": kind, "--input": input, "--target": target, "--rows": rows}
    asked |= {"--batch-size": batch_size, "--device": device}
    if data is None and (idle := next((option for option, value in asked.items() if value is not None), None)):
        raise ValueError(f"{idle} is about measuring the loss: name a file with --data, or take it out")
    check_least("--rows", rows)
    check_least("--batch-size", batch_size)
    check_device(device or "auto")
    adapter = reading.read(path)
    if data is not None and adapter.form != "PEFT":
        raise ValueError(f"--data: {path} is in {adapter.form}'s format, whose modules no model here has by these names")
    if fix is not None:
        exports.check_out(fix, adapter.stored.path.parent, "--fix")
    one = examining.examine(adapter, None if base is None else Base(base), **settings)
    if by is not None and by not in one.suggestions:
        raise ValueError(f"--by {by}: no such criterion{nearest(by, one.suggestions)}; give {', '.join(one.suggestions)}")
    measured = None
    if data is not None:
        with Progress() as bar:
            given = own_entry(data, None, None, kind, input, target).beside(Path())
            measured = _measured(bar, path, one, model, given, rows, batch_size, device or "auto")
    cut = None
    if fix is not None:
        with nothing_kept_if_interrupted(), exports.replaced(fix) as partial:
            cut = writing.truncated(adapter, one.suggestions[by].ranks, partial)
            record = {"exported": "lora", "of": str(path), "method": adapter.method, "truncated": True, "by": by,
                      "setting": one.suggestions[by].setting, "total_rank": sum(cut.ranks.values()),
                      "error_bound": cut.bound, "error_measured": cut.measured}  # fmt: skip
            (partial / exports.RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        cut = cut.moved(fix)
    if sarif is not None:
        from importlib.metadata import version
        from urllib.parse import quote

        uri = quote(adapter.stored.path.as_posix())  # a blank or a "#" in a path is none in a URI
        write_file(sarif, json.dumps(findings.sarif(one.findings, uri, version("rankwise")), indent=1, allow_nan=False) + "\n")
    if figures is not None:
        from rankwise.reports import figures as drawn

        for drawing in drawn.of_adapter(one):
            drawn.save(drawing, figures)
    if as_json:
        fixed = {} if cut is None else {"fixed": cut.as_dict() | {"by": by}}
        fixed |= {} if measured is None else {"measured": measured}
        print(json.dumps(one.as_dict() | fixed, indent=2, allow_nan=False))
    else:
        print(shown.text(one, width(), measured))
        if cut is not None:
            print(f"\n{shown.cut_line(cut, by)}")
    if one.has_errors:
        raise typer.Exit(1)


def _measured(
    bar: Progress,
    path: Path,
    one: "Examination",
    model: str | None,
    data: "OwnData",
    rows: int | None,
    batch_size: int | None,
    device: str,
) -> dict[str, Any]:
    """
    Raises:
        ValueError: as `truncations.task_for` and `measure`; an adapter that cannot be written at other ranks.
    """
    from rankwise.experiments import export as exports
    from rankwise.experiments import truncations
    from rankwise.variants.doctor import writing

    if (reason := writing.not_written(one.adapter)) is not None:
        raise ValueError(f"--data: {path} cannot be truncated, so nothing is measured: {reason}; without --data it is examined")
    source = exports.find(path if path.is_dir() else path.parent, "merged", model)
    task = truncations.task_for(source, data)
    bar.say(f"{source.model}: loading torch and the model ...")
    start_torch(bar)
    done = iter(range(1, 100))
    return truncations.measure(
        source,
        one.adapter,
        {name: made.ranks for name, made in one.suggestions.items()},
        task,
        rows or truncations.ROWS,
        batch_size or 16,
        device,
        lambda name, of: bar.say(f"{name}: evaluation {next(done)} of at most {of} ..."),
    )
