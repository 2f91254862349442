"""`rankwise compare`: run a study."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rankwise.experiments.cli.options import (
    Device,
    Json,
    LogFormat,
    Pack,
    Ray,
    RetryFailed,
    Threads,
    check_device,
    check_least,
    check_log_format,
    check_output_folder,
    check_quantization,
    check_ray,
    names,
)
from rankwise.experiments.cli.own_options import own_entry
from rankwise.experiments.cli.progress import Progress
from rankwise.experiments.cli.report import show_report
from rankwise.experiments.cli.start import elsewhere, processes, start_torch

if TYPE_CHECKING:
    from rankwise.experiments.config import Study
    from rankwise.experiments.data_entries import OwnData
    from rankwise.experiments.training.parallel import Processes
    from rankwise.variants.adapter.kinds.scheme import Scheme

OWN = "Your own data"


def compare(
    study: Annotated[Path | None, typer.Argument(help="A study file, or the name of one that ships; default: default")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs.  [default: runs/<study>]")] = None,
    device: Device = "auto",
    methods: Annotated[str | None, typer.Option(help="Only these, by label (with --data: these), with commas between.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these, with commas between.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds of the final runs: 0 to N-1.")] = None,
    pack: Pack = None,
    threads: Threads = None,
    accept_licence: Annotated[list[str] | None, typer.Option(help="Accept the terms of research-only data.")] = None,
    quantization: Annotated[str | None, typer.Option(help="Hold the base in nf4 or int8 (bitsandbytes).")] = None,
    double_quantization: Annotated[
        bool, typer.Option("--double-quantization", help="With nf4: quantise its scales too.")
    ] = False,
    retry_failed: RetryFailed = False,
    ray: Ray = None,
    as_json: Json = False,
    track: Annotated[str | None, typer.Option(help="Show the records in tensorboard, wandb, mlflow too.")] = None,
    log_format: LogFormat = "text",
    data: Annotated[
        str | None,
        typer.Option(
            help="Your own training data instead of a study: file, glob, folder of images, or hub id.", rich_help_panel=OWN
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --data: hub id or folder.", rich_help_panel=OWN)] = None,
    test: Annotated[str | None, typer.Option(help="The part reported.  [default: a tenth]", rich_help_panel=OWN)] = None,
    validation: Annotated[
        str | None, typer.Option(help="The part that rates are chosen on.  [default: a tenth]", rich_help_panel=OWN)
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Kind of task.  [default: by the fields]", rich_help_panel=OWN)] = None,
    input: Annotated[str | None, typer.Option(help="Field or template that the model reads.", rich_help_panel=OWN)] = None,
    target: Annotated[str | None, typer.Option(help="Field or template that it is to give.", rich_help_panel=OWN)] = None,
    full_protocol: Annotated[
        bool, typer.Option("--full-protocol", help="Every rate with each of ten seeds, not a quick look.", rich_help_panel=OWN)
    ] = False,
) -> None:
    """Run a study's missing runs, print the comparison, and write its report.

    With --model and --data the study is made of a file of your own, and written to OUT/study.toml.
    """
    from rankwise.experiments import checks, config
    from rankwise.experiments.tracking import TRACKERS

    with processes(device, threads) as joined:
        is_first = joined is None or joined.is_first
        check_least("--threads", threads)
        check_device(device)
        check_log_format(log_format)
        if ray is not None:
            check_ray(ray, joined)
        form = check_quantization(quantization, double_quantization)
        beside = {"--model": model, "--test": test, "--validation": validation, "--kind": kind, "--input": input}
        beside |= {"--target": target, "--full-protocol": full_protocol or None}
        if data is None:
            for option, value in beside.items():
                if value is not None:
                    raise ValueError(f"{option} has no effect without --data: name the data too, or take it out")
            source = config.find(study or config.DEFAULT_STUDY)
        else:
            if study is not None:
                raise ValueError(f"--data {data}: a study, {study}, is given too: keep one")
            if model is None:
                raise ValueError("--data needs --model: name a hub id or a folder with a model's files")
            if tasks is not None:
                raise ValueError(f"--tasks {tasks}: with --data there is one task: take it out")
            entry = own_entry(data, test, validation, kind, input, target)
            out = out or Path("runs") / entry.name
            check_output_folder("--out", out)
            source = _written(entry, model, methods, out, full_protocol, threads, form, log_format) if is_first else None
            if joined is not None:
                source = Path(joined.told(str(source)))
            methods = None
        chosen = config.read(source)
        if chosen.tune is not None:
            raise ValueError(
                f"{source.name}: [tune] has no effect on a comparison: rankwise tune {source} searches; or take it out"
            )
        chosen = narrowed(chosen, methods, tasks, seeds, pack, accept_licence or [])
        if form is not None and data is None:
            chosen = config.quantized(chosen, form.name, form.is_double)
            if faults := config.quantization_faults(chosen):
                raise ValueError("\n".join(f"--quantization {form.name}: {fault}" for fault in faults))
        if track is not None:
            wanted = names("--track", track, TRACKERS, "the trackers")
            chosen = chosen.model_copy(update={"track": list(dict.fromkeys([*chosen.track, *wanted]))})
        folder = out or Path("runs") / chosen.name
        check_output_folder("--out", folder)
        checks.check(chosen)

        here = device if joined is None else str(joined.device)
        if ray is not None and chosen.budget.equal in ("time", "memory"):
            raise ValueError(
                f'budget.equal = "{chosen.budget.equal}" is measured where one pack trains after the other: leave --ray out, '
                f"or take another budget"
            )
        results = _run(chosen, source, folder, here, threads, retry_failed, log_format, joined, ray)
    if results is None:
        return
    show_report(folder, None, as_json)
    if any(result["status"] == "failed" for result in results):
        raise typer.Exit(1)


def _run(
    study: "Study",
    source: Path,
    folder: Path,
    device: str,
    threads: int | None,
    retry_failed: bool,
    log_format: str,
    joined: "Processes | None",
    ray: str | None,
) -> list[dict[str, Any]] | None:
    """The results of every run; None in a process that is not the first of several, which writes and says nothing."""
    from rankwise.experiments import own_study

    is_first = joined is None or joined.is_first
    with Progress(log_format, is_quiet=not is_first) as bar, elsewhere(bar, ray, device, threads) as cluster:
        bar.say(f"{study.title or study.name}: loading torch, model and data ...")
        start_torch(bar, threads)
        from rankwise.experiments.study import Runner

        many = {} if joined is None else {"processes": joined}
        if cluster is not None:
            many, device = cluster()
        runner = Runner(study, folder, device, bar.warn, bar.advance, retry_failed, bar.more, **many)
        runner.prepare()
        if not is_first:
            runner.follow()
            return None
        bar.start(runner.work())
        own_study.copy(source, folder)
        return runner.run()


def _written(
    data: "OwnData",
    model: str,
    methods: str | None,
    out: Path,
    full_protocol: bool,
    threads: int | None,
    form: "Scheme | None",
    log_format: str,
) -> Path:
    """The file of a study of this data, made and written into the folder of its runs, and what was decided, said.

    Raises:
        ValueError: the data or the methods are at fault; or another study is there.
        Unavailable: the model cannot be had.
    """
    from rankwise.experiments import kinds, own_study
    from rankwise.experiments.tasks import in_study

    labels = own_study.check_methods(methods, full_protocol, form)
    task = in_study(data.name, [data])
    with Progress(log_format) as bar:
        start_torch(bar, threads)
        from rankwise.experiments import models

        loaded, processor, _ = models.load(model, task, quantization=form)
        lengths, rows = own_study.lengths_of(loaded, processor, task), task.sizes["train"]
        if lengths is None:
            max_length, (height, width) = None, own_study.image_size_of(processor, task)
            size = (
                f"images of {width} x {height} pixels, as the model's processor makes them, none changed at random; image_size "
                f"and augmentation of the study say otherwise"
            )
        else:
            max_length = lengths.max_length
            rows = kinds.get(task.kind).num_rows(lengths.of["train"], max_length)
            size = f"max_length = {max_length} tokens (the longest row has {lengths.longest})"
        if data.kind is None and data.input is not None:  # its kind follows from its values, and the study will name it
            bar.warn(task.notes[0])
        plan = own_study.training_for(rows)
        bar.warn(f"training: {plan['epochs']} epochs of {rows:,} rows, {plan['batch_size']} a step; {size}")
    read_as = data.model_copy(update={"kind": task.kind})
    text = own_study.compose(read_as, model, labels, rows, max_length, out, full_protocol, form)
    path = own_study.write(out, text)
    bar.warn(f"the study is {path}")
    return path


def narrowed(
    study: "Study", methods: str | None, tasks: str | None, seeds: int | None, pack: int | None, accepted: list[str]
) -> "Study":
    """The study with what the command line says instead of the file.

    Raises:
        ValueError: a label or task that the study does not have, or a number below 1.
    """
    change: dict[str, Any] = {"accept_licences": [*study.accept_licences, *accepted]}
    if methods is not None:
        labels = names("--methods", methods, [entry.label for entry in study.methods], study.name)
        change["methods"] = [entry for entry in study.methods if entry.label in labels]
        for entry in study.methods:  # a rate that some of its methods chose is not the rate that they share
            if entry.shared_with is not None and (entry.label in labels) != (entry.shared_with in labels):
                raise ValueError(
                    f'--methods {methods}: "{entry.label}" and "{entry.shared_with}" share a learning rate: name both or none'
                )
    if tasks is not None:
        kept = names("--tasks", tasks, study.tasks, study.name)
        change["tasks"] = [name for name in study.tasks if name in kept]
    if seeds is not None:
        check_least("--seeds", seeds)
        change["seeds"] = [*range(seeds)]
    if pack is not None:
        check_least("--pack", pack)
        change["pack"] = pack
    return study.model_copy(update=change)
