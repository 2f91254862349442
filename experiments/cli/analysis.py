"""rankwise analysis: LoRA's subspaces and DoRA's magnitudes in short runs of our own, and results of others read again."""

from pathlib import Path
from typing import Annotated

import typer
from rankwise.experiments.analysis import FULL_RATE, MINILM, RATE, Options
from rankwise.experiments.analysis import magnitude as measure_magnitude
from rankwise.experiments.analysis import subspace as measure_subspace
from rankwise.experiments.cli.app import nothing_kept_if_interrupted

analysis = typer.Typer(help="Look closer: LoRA's subspaces, DoRA's magnitudes, PEFT's comparison.", no_args_is_help=False)

Out = Annotated[Path, typer.Option(help="Folder of the results.")]
Model = Annotated[str, typer.Option(help="Hub id or folder.")]
TaskName = Annotated[str, typer.Option("--task", help="A task.")]
Examples = Annotated[int, typer.Option(help="Train on so many.")]
Steps = Annotated[int, typer.Option(help="Steps of the optimizer.")]
BatchSize = Annotated[int, typer.Option(help="Rows of a step.")]
MaxLength = Annotated[int, typer.Option(help="Tokens at which an input is cut.")]
Seed = Annotated[int, typer.Option(help="The first seed.")]
Rate = Annotated[float, typer.Option(help="Learning rate of LoRA and DoRA.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")]


@analysis.callback(invoke_without_command=True)
def chosen(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        raise ValueError("analysis: name one of: subspace | magnitude | report | peft-comparison")


@analysis.command()
def subspace(
    out: Out,
    model: Model = MINILM,
    task: TaskName = "glue/stsb",
    examples: Examples = 800,
    steps: Steps = 100,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 128,
    seed: Seed = 0,
    rate: Rate = RATE,
    device: Device = "auto",
    ranks: Annotated[str, typer.Option(help="With commas between; the greatest has two seeds.")] = "4,8,64",
) -> None:
    """How alike the subspaces are that LoRA finds at several ranks and seeds (LoRA, section 7)."""
    try:
        numbers = [int(word) for word in ranks.split(",")]
    except ValueError:
        raise ValueError(f"--ranks {ranks}: give whole numbers with commas between, such as 4,8,64") from None
    options = Options(kind="subspace", out=out, model=model, task=task, examples=examples, steps=steps, batch_size=batch_size,
                      max_length=max_length, seed=seed, rate=rate, device=device, ranks=numbers)  # fmt: skip
    with nothing_kept_if_interrupted():
        measure_subspace(options)


@analysis.command()
def magnitude(
    out: Out,
    model: Model = MINILM,
    task: TaskName = "glue/stsb",
    examples: Examples = 800,
    steps: Steps = 100,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 128,
    seed: Seed = 0,
    rate: Rate = RATE,
    device: Device = "auto",
    rank: Annotated[int, typer.Option(help="Rank of LoRA and DoRA.")] = 8,
    full_rate: Annotated[float, typer.Option(help="Learning rate of full fine-tuning.")] = FULL_RATE,
    seeds: Annotated[int, typer.Option(help="Runs of each method.")] = 3,
) -> None:
    """How sizes and directions of weight columns move together (DoRA, section 3.2)."""
    options = Options(kind="magnitude", out=out, model=model, task=task, examples=examples, steps=steps, batch_size=batch_size,
                      max_length=max_length, seed=seed, rate=rate, device=device, rank=rank, full_rate=full_rate,
                      seeds=seeds)  # fmt: skip
    with nothing_kept_if_interrupted():
        measure_magnitude(options)


@analysis.command()
def report(
    folder: Annotated[Path, typer.Argument(help="What `rankwise analysis` wrote.")],
    out: Annotated[Path | None, typer.Option(help="Folder of analysis.md, figures and tables.  [default: FOLDER]")] = None,
) -> None:
    """Draw and tabulate what was measured, beside the papers' figures."""
    from rankwise.reports import analysis as made

    print(f"report: {made.write(made.read(folder), out or folder)}")


@analysis.command(name="peft-comparison")
def peft_comparison(
    out: Annotated[Path | None, typer.Option(help="Folder for report.md.")] = None,
) -> None:
    """PEFT's public method comparison with its binomial errors: which results can be told apart from LoRA."""
    from rankwise.experiments.files import write_file
    from rankwise.reports import reread

    said = reread.text(reread.entries())
    if out is not None:
        write_file(out / "report.md", said)
    print(said, end="")
