"""`rankwise bench`: how fast a step is."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rankwise.experiments.cli.app import nothing_kept_if_interrupted
from rankwise.experiments.cli.options import Device, Threads, check_device, check_least, check_output_file, check_output_folder
from rankwise.experiments.cli.options import width as terminal_width
from rankwise.experiments.cli.progress import Progress
from rankwise.experiments.cli.start import start_torch

OUT = Path("runs/bench")
READ = {
    "--quantised": ("--out", "--device"),
    "--soak": ("--out",),
    "--fleet": ("--out",),
    "--planned": ("--out",),
}  # by a measurement in the place of the usual one


def bench(
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON to FILE.")] = None,
    out: Annotated[Path | None, typer.Option(help=f"Folder for bench.json, bench.md and figures.  [default: {OUT}]")] = None,
    full: Annotated[bool, typer.Option("--full", help="Packed throughput, a study, Llama and DINOv2 shapes.")] = False,
    device: Device = "auto",
    threads: Threads = None,
    cases: Annotated[str | None, typer.Option(help="Only these, as in 'train/dora/*'.")] = None,
    repetitions: Annotated[int | None, typer.Option(help="Timed rounds, instead of each case's own number.")] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="Instead: our own steps on the CPU without each change.")
    ] = False,
    tried: Annotated[bool, typer.Option("--tried", help="Instead: attention kernels and packed weights, not kept.")] = False,
    mixed: Annotated[bool, typer.Option("--mixed", help="Instead: a bank's mixed batch beside PEFT's.")] = False,
    planned: Annotated[bool, typer.Option("--planned", help="Instead: plans beside what a step takes.")] = False,
    optimizer_states: Annotated[
        bool, typer.Option("--optimizer-states", help="Instead: AdamW's averages in 8 bits beside fp32.")
    ] = False,
    quantised: Annotated[
        bool, typer.Option("--quantised", help="Instead: bases in 4 and 8 bits beside fp32 and bf16.")
    ] = False,
    soak: Annotated[
        int | None, typer.Option(metavar="RUNS", help="Instead: what one process holds after so many tiny runs.")
    ] = None,
    fleet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead: 10,000 runs on many machines, by the packs' times in FILE.")
    ] = None,
) -> None:
    """Time our steps beside PEFT's and beside the frozen model's floor."""
    from rankwise.experiments.bench import cases as known

    _refuse_idle(
        {"--ablation": ablation, "--tried": tried, "--mixed": mixed, "--planned": planned, "--quantised": quantised}
        | {"--optimizer-states": optimizer_states, "--soak": soak is not None, "--fleet": fleet is not None},
        idle={"--out": out, "--full": full or None, "--device": None if device == "auto" else device},
        also={
            "--tried": {"--json": json_file, "--cases": cases, "--repetitions": repetitions},
            "--mixed": {"--cases": cases, "--repetitions": repetitions},
            "--optimizer-states": {"--json": json_file, "--cases": cases, "--repetitions": repetitions},
            "--planned": {"--cases": cases, "--repetitions": repetitions},
            "--quantised": {"--cases": cases, "--repetitions": repetitions},
            "--soak": {"--cases": cases, "--repetitions": repetitions},
            "--fleet": {"--cases": cases, "--repetitions": repetitions},
        },
    )
    check_least("--threads", threads)
    check_least("--repetitions", repetitions)
    check_least("--soak", soak, 4)
    check_device(device)
    _check_json(json_file)
    check_output_folder("--out", out)
    if tried:
        return _tried(threads)
    if planned:
        return _planned(json_file, out or OUT, threads)
    if quantised:
        return _quantised(json_file, out or OUT, device, threads)
    if soak is not None:
        return _soak(soak, json_file, out or OUT, threads)
    if fleet is not None:
        return _fleet(fleet, json_file, out or OUT, threads)
    if mixed:
        known.check_peft()
        return _mixed(json_file, threads)
    if optimizer_states:
        return _optimizer_states(threads)
    chosen = known.select_ablated(cases) if ablation else known.select(cases, full)
    known.check_peft()
    if ablation:
        return _ablation(chosen, json_file, threads, repetitions or known.ABLATION_REPETITIONS)

    with Progress() as bar, nothing_kept_if_interrupted():
        bar.say("bench: loading torch and models ...")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what a study sets on a GPU
        _start(bar, threads)
        from rankwise.experiments import measure
        from rankwise.experiments.bench.run import Bench
        from rankwise.experiments.files import write_json

        where = measure.device(device)
        bar.start(len(chosen))
        result = Bench(known.plan(where.type), where, chosen, repetitions, bar.warn, bar.advance).run()
        if json_file is not None:
            write_json(json_file, result)
    from rankwise.reports import speed

    print(speed.text(result, terminal_width()))
    print(f"report: {speed.write(result, out or OUT)}")
    if result["failures"]:
        raise typer.Exit(1)


def _ablation(chosen: list, json_file: Path | None, threads: int | None, repetitions: int) -> None:
    """Prints a line for each case and change as it is measured."""
    with Progress() as bar, nothing_kept_if_interrupted():
        bar.say("bench: loading torch and models ...")
        _start(bar, threads)
        from rankwise.experiments.bench import ablation
        from rankwise.experiments.files import write_json

        rows = []
        for row in ablation.run(chosen, repetitions):
            print(ablation.line(row), flush=True)
            rows.append(row)
        if json_file is not None:
            write_json(json_file, {"machine": ablation.machine_of_cpu(), "rows": rows})


def _tried(threads: int | None) -> None:
    """Prints a line for each kernel as it is measured."""
    with Progress() as bar, nothing_kept_if_interrupted():
        bar.say("bench: loading torch ...")
        _start(bar, threads)
        from rankwise.experiments.bench import tried

        for line in tried.lines():
            print(line, flush=True)


def _optimizer_states(threads: int | None) -> None:
    """Prints a page (Markdown) as it is measured."""
    with Progress() as bar, nothing_kept_if_interrupted():
        bar.say("bench: loading torch and models ...")
        _start(bar, threads)
        from rankwise.experiments.bench import optimizer_states

        for line in optimizer_states.lines():
            print(line, flush=True)


def _mixed(json_file: Path | None, threads: int | None) -> None:
    """Prints a line for each method and length as it is measured; the JSON file is written at the end."""
    with Progress() as bar, nothing_kept_if_interrupted():
        bar.say("bench: loading torch ...")
        is_shared = _start(bar, threads)
        from rankwise.experiments.bench import mixed
        from rankwise.experiments.files import write_json

        print(mixed.head(), flush=True)
        rows = []
        for row in mixed.rows():
            print(mixed.line(row), flush=True)
            rows.append(row)
        if json_file is not None:
            write_json(json_file, {"machine": _machine(is_shared), "rows": rows})


def _planned(json_file: Path | None, out: Path, threads: int | None) -> None:
    """Prints a line for each step as it is measured, then the table, and writes it.

    The JSON file is written after each row: a run that is cut off goes on from it.
    """
    with Progress() as bar:
        bar.say("bench: loading torch and models ...")
        is_shared = _start(bar, threads)
        import torch
        from rankwise.experiments import measure
        from rankwise.experiments.bench import planned
        from rankwise.experiments.files import write_json
        from rankwise.experiments.records import read_object
        from rankwise.reports import planned as report

        file = json_file or out / "planned.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        versions, before = measure.versions(), read_object(file)
        earlier = planned.taken(before, versions)
        machine = {"device_name": measure.device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
        machine |= {"versions": versions, **measure.commit(), "shared": is_shared}
        if earlier:  # of any sitting
            machine["shared"] |= before["machine"]["shared"]
        found: dict[str, Any] = {"machine": machine, "rows": earlier}
        for done, rows in enumerate(planned.run(planned.cases(), earlier)):
            print(planned.line(rows[done]), flush=True)
            found["rows"] = rows
            write_json(file, found)
    print(report.text(found, terminal_width()))
    print(f"report: {report.write(found, out if json_file is None else json_file.parent)}")


def _quantised(json_file: Path | None, out: Path, device: str, threads: int | None) -> None:
    """Measures, prints the table, and writes it."""
    from rankwise.experiments import quantization

    if (lacking := quantization.missing()) is not None:
        raise ValueError(f"--quantised: {lacking}")
    with Progress() as bar, nothing_kept_if_interrupted():
        bar.say("bench: loading torch and models ...")
        is_shared = _start(bar, threads)
        import importlib.metadata

        from rankwise.experiments import measure
        from rankwise.experiments.bench import quantised
        from rankwise.experiments.bench.run import machine
        from rankwise.experiments.files import write_json

        where = measure.device(device)
        bar.start(len(quantised.BASES) * sum(subject.steps for subject in quantised.SUBJECTS))
        rows = quantised.run(where, progress=bar.advance)
        place = machine(where, "fp32", ((1024, 1024, 1024),))
        place["versions"]["bitsandbytes"] = importlib.metadata.version("bitsandbytes")
        result = {"machine": {**place, "shared": is_shared}, "rows": rows}
        if json_file is not None:
            write_json(json_file, result)
    from rankwise.reports import quantised as report

    print(report.text(result, terminal_width()))
    print(f"report: {report.write(result, out)}")


def _soak(number: int, json_file: Path | None, out: Path, threads: int | None) -> None:
    """Runs, prints what was held, and writes it; one that is interrupted has the runs until then."""
    import time

    rows: list[dict[str, Any]] = []
    is_whole = True
    with Progress() as bar:
        bar.say("bench: loading torch ...")
        is_shared = _start(bar, threads)
        from rankwise.experiments.bench import soak
        from rankwise.experiments.files import write_json

        bar.start(number)
        began = time.perf_counter()
        try:
            for row in soak.run(number, bar.advance):
                rows.append(row)
        except KeyboardInterrupt:
            if not rows:
                raise
            is_whole = False
        seconds = time.perf_counter() - began
        result = {
            "machine": _machine(is_shared),
            "asked": number,
            "methods": len(soak.METHODS),
            "seconds": seconds,
            "rows": rows,
        }
        if json_file is not None:
            write_json(json_file, result, indent=None)
    from rankwise.reports import soak as report

    print("\n".join(report.sentences(result)))
    print(f"report: {report.write(result, out)}")
    if not is_whole:
        raise typer.Exit(130)


def _fleet(times: Path, json_file: Path | None, out: Path, threads: int | None) -> None:
    """Measures the writer, simulates, prints the tables, and writes them."""
    from rankwise.experiments.plan.fleet import read_times

    measured = read_times(times)
    with Progress() as bar, nothing_kept_if_interrupted():
        bar.say("bench: loading torch ...")
        is_shared = _start(bar, threads)
        from rankwise.experiments.bench import fleet
        from rankwise.experiments.files import write_json

        bar.start(2)  # kinds of machines
        found = fleet.run(measured, out, bar.advance)
        found["times"]["file"] = str(times)
        result = {"machine": _machine(is_shared), **found}
        if json_file is not None:
            write_json(json_file, result)
    from rankwise.reports import fleet as report

    print(report.text(result, terminal_width()))
    print(f"report: {report.write(result, out)}")


def _start(bar: Progress, threads: int | None) -> bool:
    """Whether another program is computing, which is said."""
    is_shared = start_torch(bar, threads)
    if is_shared:
        bar.warn("note: another program is computing on this machine; trust the ratios more than the times")
    return is_shared


def _machine(is_shared: bool) -> dict[str, Any]:
    """What was measured on: this processor, its threads, the versions and the commit."""
    import torch
    from rankwise.experiments import measure

    where = {"device_name": measure.device_name(torch.device("cpu")), "threads": torch.get_num_threads(), "shared": is_shared}
    return {**where, "versions": measure.versions(), **measure.commit()}


def _refuse_idle(instead: dict[str, bool], idle: dict[str, Any], also: dict[str, dict[str, Any]]) -> None:
    """
    Args:
        instead: measurements in the place of the usual one. idle: options that none of them reads, but for READ; also: that
            one does not.

    Raises:
        ValueError: two measurements at once, or an option that the one asked for does not read.
    """
    chosen = [option for option, value in instead.items() if value]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} are two measurements: give one")
    for measurement in chosen:
        unread = {option: value for option, value in idle.items() if option not in READ.get(measurement, ())}
        unread |= also.get(measurement, {})
        option = next((option for option, value in unread.items() if value is not None), None)
        if option is not None:
            raise ValueError(f"{option} has no effect with {measurement}: leave it out")


def _check_json(path: Path | None) -> None:
    """
    Raises:
        ValueError: nothing can be written there.
    """
    if path is not None and not path.parent.exists():
        raise ValueError(f"--json {path}: the folder {path.parent} is not there; make it, or name another")
    check_output_file("--json", path)
