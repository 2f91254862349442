"""`rankwise generate`: what a model with a trained adapter gives: texts, or a classifier's labels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rankwise.experiments.cli.app import nothing_kept_if_interrupted
from rankwise.experiments.cli.options import Device, Json, check_device, check_least, check_output_file
from rankwise.experiments.cli.own_options import as_written
from rankwise.experiments.cli.progress import Progress


def generate(
    adapter: Annotated[Path | None, typer.Argument(help="A run's folder, or any adapter's, ours or PEFT's.")] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=FOLDER", help="Instead, and several times: each goes on from every prompt."),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to go on from; may be given several times.")] = None,
    data: Annotated[str | None, typer.Option(help="File with a prompt in every row (JSONL, CSV, TSV, Parquet).")] = None,
    input: Annotated[str | None, typer.Option(help="Field of the file, or a template of fields.  [default: said]")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens of a text.  [default: 128]")] = None,
    temperature: Annotated[float | None, typer.Option(help="Draw tokens, at this temperature.  [default: greedy]")] = None,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 8,
    out: Annotated[Path | None, typer.Option(help="File to write, one JSON object a row.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model.  [default: the one that the adapter names]")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Print what a model with a trained adapter generates after a prompt, or after every prompt of a file.

    Of a classifier: the label of each text, by name, and its probability (with --json that of every label).
    """
    from rankwise.experiments import generate as generating

    if (adapter is None) == (not adapters):
        raise ValueError("give an adapter's folder, or several as --adapter NAME=FOLDER, and not both")
    _check(prompt, data, input, max_new_tokens, temperature, top_p, seed, batch_size)
    check_device(device)
    check_output_file("--out", out)
    several = generating.find_several(adapters or [], model) if adapter is None else {}
    source = generating.find(adapter, model) if adapter is not None else next(iter(several.values()))
    is_classifier = generating.kind_of(source) == "classification"  # of several none is
    if is_classifier and (max_new_tokens is not None or temperature is not None):
        option = "--temperature" if max_new_tokens is None else "--max-new-tokens"
        raise ValueError(f"{option} is about texts to generate, and {adapter} is of a classifier: take it out")
    with Progress() as bar, nothing_kept_if_interrupted():
        prompts, pairs = list(prompt or []), None
        if data is not None:
            both = generating.read_pairs(data) if is_classifier and input is None else None
            if both is not None:
                prompts, pairs, field = both
            else:
                prompts, field = generating.read_prompts(data, as_written(input), has_chats=not is_classifier)
            bar.warn(f"{data}: {len(prompts)} {'texts' if is_classifier else 'prompts'}, read from {field}")
        bar.say(f"{source.model}: loading torch and the model ...")
        bar.start(len(prompts) * max(len(several), 1))
        texts: Sequence[generating.Generated | generating.Classified]
        if is_classifier:
            texts, num_cut, longest = generating.classify(
                source,
                list(map(str, prompts)),
                pairs,
                batch_size=batch_size,
                device=device,
                progress=lambda rows: bar.advance("reading", rows),
            )
            if num_cut:
                bar.warn(f"{num_cut} of {len(prompts)} texts are longer than {longest} tokens: the end is not read")
        else:
            texts = generating.generate(
                several or source,
                prompts,
                max_new_tokens or 128,
                batch_size=batch_size,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                device=device,
                progress=lambda rows: bar.advance("generating", rows),
            )
    rows = [json.dumps(text.as_row(number), ensure_ascii=False) for number, text in enumerate(texts, start=1)]
    if out is not None:
        from rankwise.experiments.files import write_file

        write_file(out, "".join(f"{row}\n" for row in rows))
    if as_json:
        print("\n".join(rows))
    elif out is not None:
        print(f"{len(rows)} texts: {out}")
    else:
        print("\n\n".join(_shown(text, number, len(texts)) for number, text in enumerate(texts, start=1)))


def _shown(text: Any, number: int, of: int) -> str:
    named = f"[{number}] {text.adapter}: " if text.adapter is not None else f"[{number}] "
    return text.text if of == 1 and text.adapter is None else named + text.text


def _check(
    prompt: list[str] | None,
    data: str | None,
    input: str | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float,
    seed: int,
    batch_size: int,
) -> None:
    """
    Raises:
        ValueError: options that make no sense, alone or together.
    """
    if bool(prompt) == (data is not None):
        raise ValueError("give --prompt, or a file of prompts as --data, and not both")
    if input is not None and data is None:
        raise ValueError("--input names a field of a file: give --data too")
    if prompt and not all(text.strip() for text in prompt):
        raise ValueError("--prompt: an empty text; give some words to go on from")
    check_least("--max-new-tokens", max_new_tokens)
    check_least("--batch-size", batch_size)
    check_least("--seed", seed, 0)
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ValueError(f"--temperature {temperature:g}: give a number above 0; leave it out for the likeliest tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p {top_p:g}: give a number above 0, at most 1")
    if temperature is None and (top_p != 1 or seed != 0):
        raise ValueError("--top-p and --seed are about drawing tokens: give --temperature too")
