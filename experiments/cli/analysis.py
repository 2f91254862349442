"""`rankwise analysis`: what training did to the weights, in short runs of our own; results of others, read again."""

from pathlib import Path
from typing import Annotated

import typer
from rankwise.experiments.cli.app import nothing_kept_if_interrupted
from rankwise.experiments.cli.options import Device, check_device, check_least, check_output_folder
from rankwise.experiments.cli.progress import Progress
from rankwise.experiments.cli.start import start_torch

COMMANDS = "subspace | magnitude | report | peft-comparison | randomized | results"

analysis = typer.Typer(help="Look closer: LoRA's subspaces, DoRA's magnitudes, PEFT's own comparison, what rank is worth.")

Out = Annotated[Path, typer.Option(help="Folder of the results.")]
Model = Annotated[str, typer.Option(help="Hub id, or folder.")]
Task = Annotated[str, typer.Option(help="A task of `rankwise list`.")]
Examples = Annotated[int, typer.Option(help="Rows to train on.")]
Steps = Annotated[int, typer.Option(help="Steps of the optimizer.")]
BatchSize = Annotated[int, typer.Option(help="Rows of a step.")]
MaxLength = Annotated[int, typer.Option(help="Tokens at which an input is cut.")]
Seed = Annotated[int, typer.Option(help="The first seed.")]
Rate = Annotated[float, typer.Option(help="Learning rate of LoRA and DoRA.")]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@analysis.callback(invoke_without_command=True)
def choose(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        raise ValueError(f"analysis: name what to do: {COMMANDS}; rankwise analysis --help says more")


@analysis.command()
def subspace(
    out: Out,
    model: Model = MINILM,
    task: Task = "glue/stsb",
    examples: Examples = 800,
    steps: Steps = 100,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 128,
    seed: Seed = 0,
    rate: Rate = 1e-3,
    device: Device = "auto",
    ranks: Annotated[str, typer.Option(help="With commas between; the greatest is trained with two seeds.")] = "4,8,64",
) -> None:
    """LoRA at several ranks and two seeds: how far the learned subspaces overlap (subspace.json, subspace.npz)."""
    from rankwise.experiments import analysis as measured

    _check(out, device, examples, steps, batch_size, seed)
    numbers = _ranks(ranks)
    study = measured.subspace_study(
        numbers,
        rate,
        model=model,
        task=task,
        examples=examples,
        steps=steps,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
    )
    with Progress() as bar, nothing_kept_if_interrupted():
        bar.say("analysis: loading torch, model and data ...")
        start_torch(bar)
        measured.subspace(study, numbers, out, device, bar.warn)


@analysis.command()
def magnitude(
    out: Out,
    model: Model = MINILM,
    task: Task = "glue/stsb",
    examples: Examples = 800,
    steps: Steps = 100,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 128,
    seed: Seed = 0,
    rate: Rate = 1e-3,
    device: Device = "auto",
    rank: Annotated[int, typer.Option(help="Of LoRA and DoRA.")] = 8,
    full_rate: Annotated[float, typer.Option(help="Learning rate of full fine-tuning.")] = 5e-5,
    seeds: Annotated[int, typer.Option(help="Number of runs of each method.")] = 3,
) -> None:
    """Full fine-tuning, LoRA and DoRA: how far size and direction of each weight moved (magnitude.json)."""
    from rankwise.experiments import analysis as measured

    _check(out, device, examples, steps, batch_size, seed)
    check_least("--seeds", seeds)
    study = measured.magnitude_study(
        rank,
        rate,
        full_rate,
        model=model,
        task=task,
        examples=examples,
        steps=steps,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
    )
    with Progress() as bar, nothing_kept_if_interrupted():
        bar.say("analysis: loading torch, model and data ...")
        start_torch(bar)
        measured.magnitude(study, seeds, out, device, bar.warn)


@analysis.command()
def report(
    folder: Annotated[Path, typer.Argument(help="What `rankwise analysis subspace` and `magnitude` wrote.")],
    out: Annotated[Path | None, typer.Option(help="Folder of analysis.md, figures and tables.  [default: FOLDER]")] = None,
) -> None:
    """Write figures and tables of both, beside what the papers say."""
    from rankwise.reports import analysis as drawn

    check_output_folder("--out", out)
    print(f"report: {drawn.write(drawn.read(folder), out or folder)}")


@analysis.command(name="peft-comparison")
def peft_comparison(
    out: Annotated[Path | None, typer.Option(help="Folder for report.md.  [default: none]")] = None,
) -> None:
    """PEFT's public method comparison with its binomial errors: which results can be told apart from LoRA's."""
    from rankwise.experiments.files import write_file
    from rankwise.reports.papers import peft_comparison as compared

    check_output_folder("--out", out)
    said = compared.text(compared.entries())
    if out is not None:
        write_file(out / "report.md", said)
    print(said, end="")


@analysis.command()
def randomized(
    folder: Annotated[Path, typer.Argument(help='Runs of a study of kind = "randomized".')],
    out: Annotated[Path | None, typer.Option(help="Folder of randomized.md.  [default: FOLDER/randomized]")] = None,
    beside: Annotated[
        list[Path] | None, typer.Option(help="Runs of other studies whose importances and ranks are compared with it.")
    ] = None,
) -> None:
    """What rank is worth at each site, by runs that each drew an allocation at random; how much any placement could gain."""
    from rankwise.reports.analysis import randomized as drawn
    from rankwise.reports.results import load

    check_output_folder("--out", out)
    study = load(folder)
    for part in study.parts():
        for line in drawn.sentences(drawn.analysed(part)):
            print(line)
    print(f"report: {drawn.write(folder, out or folder / 'randomized', beside or ())}")


@analysis.command()
def results(
    folder: Annotated[Path | None, typer.Argument(help="Committed studies.  [default: reports/studies]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of both files.  [default: the folder above]")] = None,
) -> None:
    """One table of all committed studies (results.csv), and the best placement of rank so far (record.md)."""
    from rankwise.reports import committed

    check_output_folder("--out", out)
    folder = folder or committed.STUDIES
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name one with committed studies, such as reports/studies")
    for path in committed.write(folder, out or folder.parent):
        print(f"written: {path}")


def _check(out: Path, device: str, examples: int, steps: int, batch_size: int, seed: int) -> None:
    """What is wrong with a value by itself; the rest is checked as a study's settings are."""
    from rankwise.experiments.analysis import SNAPSHOTS

    check_output_folder("--out", out)
    check_device(device)
    check_least("--examples", examples)
    check_least("--steps", steps, SNAPSHOTS)
    check_least("--batch-size", batch_size)
    check_least("--seed", seed, 0)


def _ranks(text: str) -> list[int]:
    """The ranks, in rising order.

    Raises:
        ValueError: something else than whole numbers above 0, or fewer than two different ones.
    """
    words = [word.strip() for word in text.split(",")]
    ranks = sorted({int(word) for word in words if word.isdecimal()})
    if not all(word.isdecimal() for word in words) or len(ranks) < 2 or ranks[0] < 1:
        raise ValueError(f"--ranks {text}: give at least two different ranks, each at least 1, with commas between")
    return ranks
