"""`rankwise export`: a trained adapter for use elsewhere."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rankwise.experiments.cli.app import nothing_kept_if_interrupted
from rankwise.experiments.cli.options import Json, check_least, check_output_folder
from rankwise.experiments.cli.progress import Progress


def export(
    path: Annotated[Path, typer.Argument(help="A run's folder, or any adapter's, ours or PEFT's.")],
    to: Annotated[
        str,
        typer.Option(help="lora: a plain LoRA; kohya, gguf: the same for Kohya's programs, llama.cpp; merged: a whole model."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write: a new or an empty one, or an earlier export.")],
    model: Annotated[str | None, typer.Option(help="Base model.  [default: the one that PATH names]")] = None,
    model_class: Annotated[str | None, typer.Option(help="Its class in transformers.  [default: the adapter's]")] = None,
    total_rank: Annotated[int | None, typer.Option(help="Truncate first, to this many ranks over all sites.")] = None,
    total_parameters: Annotated[int | None, typer.Option(help="The same, to this many parameters.")] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Merged over a quantised base: quantise again, and say what that costs.")
    ] = False,
    prefix: Annotated[str | None, typer.Option(help="Of the names, for kohya: lora_unet, lora_te, lora_te1 ...")] = None,
    as_json: Json = False,
) -> None:
    """Take a trained adapter elsewhere: as a plain LoRA, truncated if wanted, or merged into its model."""
    from rankwise.experiments import export as exports

    if total_rank is not None and total_parameters is not None:
        raise ValueError("--total-rank and --total-parameters are two budgets: give one")
    if requantize and to != "merged":
        raise ValueError(f"--requantize has no effect with --to {to}: take it out, or give --to merged")
    check_least("--total-rank", total_rank)
    check_least("--total-parameters", total_parameters)
    check_output_folder("--out", out)
    if prefix is not None and to != "kohya":
        raise ValueError(f"--prefix {prefix} has no effect without --to kohya")
    if to in ("kohya", "gguf"):
        if to == "kohya" and prefix is None:
            raise ValueError("--to kohya: name what stands before the modules' names with --prefix: lora_unet, lora_te ...")
        given = {"--model-class": model_class, "--total-rank": total_rank, "--total-parameters": total_parameters}
        given |= {"--model": model} if to == "kohya" else {}
        for option in (option for option, value in given.items() if value is not None):
            raise ValueError(f"{option} has no effect with --to {to}, which loads no model; rankwise doctor --fix truncates")
        with nothing_kept_if_interrupted():
            made = exports.export_kohya(path, out, prefix) if to == "kohya" else exports.export_gguf(path, out, model)
    else:
        source = exports.find(path, to, model, model_class)
        exports.check_out(out, source.adapter)
        if requantize and source.scheme is None and source.run is not None:
            raise ValueError(f"--requantize: the base of {path} was not quantised: take it out")
        with Progress() as bar, nothing_kept_if_interrupted():
            bar.say(f"{source.model}: loading torch and the model ...")
            made = exports.export(source, to, out, total_rank, total_parameters, requantize)
    if as_json:
        print(json.dumps(made | {"out": str(out)}, indent=1))
        return
    what = "" if made["total_rank"] is None else f", {made['total_rank']} ranks in {made['sites']} sites"
    print(f"{made['method']}{what}{', truncated' if made['truncated'] else ''}, as {to}: {out}")
    if made.get("dequantised"):
        print(f"the base was quantised ({made['quantization']}); the merged model is written dequantised, in full")
    if made.get("requantised") is not None:
        print(exports.costs(made["requantised"]))
