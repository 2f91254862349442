"""rankwise bench: our steps beside PEFT's and beside the frozen model's floor."""

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rankwise.experiments.cli.app import nothing_kept_if_interrupted
from rankwise.experiments.cli.progress import Progress
from rankwise.experiments.cli.start import start_torch


def bench(
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON to FILE.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json, bench.md and figures.")] = Path("runs/bench"),
    full: Annotated[bool, typer.Option("--full", help="Packed throughput, a study, and a Llama shape too.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.  [default: what torch takes]")] = None,
    cases: Annotated[str | None, typer.Option(help="Only these, as in 'train/dora/*'.")] = None,
    repetitions: Annotated[int | None, typer.Option(help="Timed rounds, instead of each case's own number.")] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="What each change for speed buys: one taken out at a time.")
    ] = False,
    tried: Annotated[bool, typer.Option("--tried", help="Times of what was tried and not kept.")] = False,
) -> None:
    """Time our steps beside PEFT's and beside the frozen model's floor."""
    from rankwise.experiments.bench import cases as known

    chosen = known.select(cases, full)
    known.positive("--threads", threads)
    known.positive("--repetitions", repetitions)
    if json_file is not None and not json_file.parent.is_dir():
        raise ValueError(f"--json {json_file}: the folder {json_file.parent} is not there; make it, or name another")
    if json_file is not None and json_file.is_dir():
        raise ValueError(f"--json {json_file}: this is a folder; name a file")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: this is a file; name a folder")
    if ablation or tried:
        idle = {"--full": full, "--cases": cases is not None, "both of --ablation and --tried": ablation and tried}
        for flag in [flag for flag, given in idle.items() if given]:
            raise ValueError(f"{flag} has no effect with --{'ablation' if ablation else 'tried'}: take it out")
        with Progress() as bar, nothing_kept_if_interrupted():
            start_torch(bar, threads)
            if tried:
                from rankwise.experiments.bench.tried import show
            else:
                from rankwise.experiments.bench.ablation import show
            show(json_file, repetitions or 3) if ablation else show()
        return
    known.check_peft()

    with Progress() as bar, nothing_kept_if_interrupted():
        bar.say("bench: loading torch and models ...")
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, tells of every start
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what a study sets on a GPU
        if start_torch(bar, threads):
            bar.warn("note: another program is computing on this machine; trust the ratios more than the times")
        from rankwise.experiments import measure
        from rankwise.experiments.bench.run import Bench
        from rankwise.experiments.files import write_json

        where = measure.device(device)
        bar.start(len(chosen))
        found = Bench(known.plan(where.type), where, chosen, repetitions, bar.warn, bar.advance).run()
        if json_file is not None:
            write_json(json_file, found)
    from rankwise.reports import speed

    print(speed.text(found, shutil.get_terminal_size((120, 24)).columns))
    print(f"report: {speed.write(found, out)}")
    if found["failures"]:
        raise typer.Exit(1)
