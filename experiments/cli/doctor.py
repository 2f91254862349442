"""`rankwise doctor`: what is wrong with an adapter, and how small it can be."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rankwise.experiments.cli.app import nothing_kept_if_interrupted
from rankwise.experiments.cli.options import Json, check_least, check_output_file, check_output_folder, width
from rankwise.variants.settings import nearest


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
) -> None:
    """Say what is wrong with an adapter, how much of its rank is used, and how small it can be at which error.

    Needs no base model; with --base its weights are read, not the model.  Exit code 1 where a finding is an error.
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
    adapter = reading.read(path)
    if fix is not None:
        exports.check_out(fix, adapter.stored.path.parent, "--fix")
    one = examining.examine(adapter, None if base is None else Base(base), **settings)
    if by is not None and by not in one.suggestions:
        raise ValueError(f"--by {by}: no such criterion{nearest(by, one.suggestions)}; give {', '.join(one.suggestions)}")
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

        uri = adapter.stored.path.as_posix()
        write_file(sarif, json.dumps(findings.sarif(one.findings, uri, version("rankwise")), indent=1, allow_nan=False) + "\n")
    if figures is not None:
        from rankwise.reports import figures as drawn

        for drawing in drawn.of_adapter(one):
            drawn.save(drawing, figures)
    if as_json:
        fixed = {} if cut is None else {"fixed": cut.as_dict() | {"by": by}}
        print(json.dumps(one.as_dict() | fixed, indent=2, allow_nan=False))
    else:
        print(shown.text(one, width()))
        if cut is not None:
            print(f"\n{shown.cut_line(cut, by)}")
    if one.has_errors:
        raise typer.Exit(1)
