"""The command.  Results go to standard output, everything else to standard error.

Exit codes: 0 all completed, 1 some run failed, 2 the user can mend it (one clear line for each fault), 130 interrupted.
Settings are checked before torch is imported, so that help and refusals answer within a second.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rankwise.variants.settings import METHODS, nearest

app = typer.Typer(
    help="Adaptive-rank fine-tuning, compared fairly: LoRA, AdaLoRA, DoRA, full fine-tuning and relatives.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def main() -> None:
    """Entry point: turns what a user can mend into one line and an exit code."""
    try:
        code = app(standalone_mode=False)  # typer returns the code of an Exit, and 130 for an interrupt
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _complain("interrupted; the same command goes on where this one stopped")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (typer.Abort, EOFError):
        sys.exit(130)
    except ValueError as error:
        _complain(str(error))
        sys.exit(2)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _complain(f"the disk is full{_at(error)}: free some space and give the same command again; nothing done is lost")
        else:
            _complain(str(error) if error.errno is None else f"{error.strerror}{_at(error)}")
        sys.exit(2)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own usage errors
            _complain(error.format_message())
            sys.exit(2)
        raise


@app.command()
def compare(
    study: Annotated[Path | None, typer.Argument(help="A study file, or the name of one that ships; default: default")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs.  [default: runs/<study>]")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    methods: Annotated[str | None, typer.Option(help="Only these, by label, with commas between.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these, with commas between.")] = None,
    seeds: Annotated[int | None, typer.Option(help="So many seeds for the final runs, 0 to N-1.")] = None,
    pack: Annotated[int | None, typer.Option(help="Most members that train at once.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.  [default: what torch takes]")] = None,
    accept_licence: Annotated[list[str] | None, typer.Option(help="Accept the terms of research-only data.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed runs again.")] = False,
    as_json: Json = False,
) -> None:
    """Run a study's missing runs, print the comparison, and write its report."""
    from rankwise.experiments import checks, config

    chosen = config.read(study or config.DEFAULT_STUDY)
    chosen = _narrowed(chosen, methods, tasks, seeds, pack, accept_licence or [])
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads}: give at least 1")
    folder = out or Path("runs") / chosen.name
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: this is a file; name a folder")
    checks.check(chosen)

    with _progress() as bar:
        bar.say(f"{chosen.title or chosen.name}: loading torch, model and data ...")
        if _others_compute():
            # libgomp's threads spin for milliseconds when they wait: a little faster on an idle machine, several times
            # slower where another program wants the processor.  Read when torch is imported.
            os.environ.setdefault("GOMP_SPINCOUNT", "2000")
        import torch
        from rankwise.experiments.measure import keep_freed_memory
        from rankwise.experiments.study import Runner

        keep_freed_memory()
        if threads is not None:
            torch.set_num_threads(threads)
        _tell_of_plain_passes(bar)
        runner = Runner(chosen, folder, device, bar.warn, bar.advance, retry_failed, bar.more)
        runner.prepare()
        bar.start(runner.work())
        results = runner.run()
    _report(folder, None, as_json)
    if any(result["status"] == "failed" for result in results):
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[Path, typer.Argument(help="A folder of runs.")],
    out: Annotated[Path | None, typer.Option(help="Where to write it.  [default: RUNS/report]")] = None,
    with_runs: Annotated[bool, typer.Option("--with-runs", help="Copy finished runs, without weights, to OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Write the report of a folder of runs: a page (HTML), Markdown, figures (SVG, PNG), tables (CSV, LaTeX)."""
    if with_runs and out is None:
        raise ValueError("--with-runs copies runs to another folder: name it with --out")
    _report(runs, out, as_json)
    if with_runs:
        from rankwise.reports import results

        results.copy_finished(runs, out)


@app.command()
def paper(
    name: Annotated[str | None, typer.Argument(help="A paper's table, as adalora-1; without one they are listed.")] = None,
    cells: Annotated[str | None, typer.Option(help="Run these tasks of it, with commas between, or all.")] = None,
    rows: Annotated[list[str] | None, typer.Option(help="Only this row, by its label; may be given again.")] = None,
    variant: Annotated[str, typer.Option(help="paper: as the paper says; script: as its released code does.")] = "paper",
    model: Annotated[str | None, typer.Option(help="A model that stands in for the paper's.")] = None,
    scale: Annotated[float, typer.Option(help="Shrink the recipe, all its step counts in proportion.")] = 1.0,
    seeds: Annotated[int | None, typer.Option(help="So many seeds, 0 to N-1.  [default: as many as the paper's]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs.  [default: runs/papers/<table>]")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.  [default: what torch takes]")] = None,
    pack: Annotated[int | None, typer.Option(help="Most members that train at once.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed runs again.")] = False,
    as_json: Json = False,
) -> None:
    """A paper's table beside our own runs of its recipe: list them, look at one, or run cells of it."""
    from rankwise.experiments import checks, recipes

    width = shutil.get_terminal_size((120, 24)).columns
    if name is None or cells is None:
        given = {"--cells": cells, "--rows": rows, "--model": model, "--seeds": seeds, "--out": out, "--pack": pack}
        idle = next((flag for flag, value in given.items() if value is not None), None)
        if idle is not None or scale != 1:
            needed = "--cells, such as --cells stsb" if name else "the name of a table"
            raise ValueError(f"{idle or '--scale'} has no effect without {needed}")
    if name is None:
        chosen = [recipes.load(one) for one in recipes.names()]
    else:
        chosen = [recipes.load(name)]
    if cells is None:
        from rankwise.reports import beside, papers

        found = recipes.here(chosen, variant)
        if as_json:
            print(json.dumps(found, indent=1))
        else:
            print((beside.listing(found) if name is None else beside.detail(found, papers.load(chosen[0].table))).text(width))
        return
    recipe = chosen[0]
    wanted = [word.strip() for word in cells.split(",") if word.strip()]
    if any(word not in (*recipe.tasks, "all") for word in wanted):  # a column's own name stands for the cell that fills it
        from rankwise.reports import beside, papers

        published = papers.load(recipe.table)
        for cell, task in recipe.tasks.items():
            columns = beside.columns_of(published, task, recipe.beside)
            wanted = [cell if word in columns else word for word in wanted]
    chosen = recipes.choose(recipe, wanted, rows or [], variant)
    for flag, number in (("--seeds", seeds), ("--pack", pack), ("--threads", threads)):
        if number is not None and number < 1:
            raise ValueError(f"{flag} {number}: give at least 1")
    folder = out or Path("runs") / "papers" / recipe.name
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: this is a file; name a folder")
    faults: list[str] = []
    plans = []
    for row, cell in chosen:
        with checks.collecting(faults):
            plans.append(recipes.plan(recipe, row, cell, variant, model, scale, seeds, pack))
            checks.check(plans[-1].study)
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))
    recipes.check_at_hand(plans)
    from rankwise.reports import beside, papers

    published = papers.load(recipe.table)
    with _progress() as bar:
        bar.say(f"{recipe.title}: loading torch, model and data ...")
        if _others_compute():
            os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as in compare
        import torch
        from rankwise.experiments.measure import keep_freed_memory
        from rankwise.experiments.study import Runner

        keep_freed_memory()
        if threads is not None:
            torch.set_num_threads(threads)
        _tell_of_plain_passes(bar)
        runners = [Runner(one.study, folder, device, bar.warn, bar.advance, retry_failed, bar.more) for one in plans]
        for runner in runners:
            with checks.collecting(faults):
                runner.prepare()
        if faults:
            raise ValueError("\n".join(dict.fromkeys(faults)))
        bar.start(sum(runner.work() for runner in runners))
        lines = []
        for one, runner in zip(plans, runners, strict=True):
            finals = [result for result in runner.run() if result["phase"] == "final"]
            entry = one.study.methods[0]
            lines += beside.lines(
                published,
                one.row,
                beside.columns_of(published, one.study.tasks[0], recipe.beside),
                finals,
                cell=one.cell,
                variant=one.variant,
                scale=one.scale,
                model=one.study.model,
                stands_in_for=one.stands_in_for,
                reasons=[(reason.tag, reason.text) for reason in one.reasons],
                departures=one.departures,
                notes=runner.prepared[one.study.tasks[0]].captions,
                final_steps=entry.settings.get("final_steps"),
                miniature=bool(recipe.miniature),
                position=one.position,
            )
            beside.keep(recipe.table, lines, folder)  # after each cell, so that a cut keeps what was done
    from rankwise.reports import page

    written = page.write(folder, folder / "report", beside=beside.of_folder(folder))
    made = beside.table(published, lines)
    if as_json:
        print(json.dumps({"table": made.records(), "caption": list(made.caption), "report": str(written)}, indent=1))
    else:
        print(made.text(width))
        print(f"report: {written}")
        print(f"page: {written.with_suffix('.html')}")
    if any(line.failed for line in lines):
        raise typer.Exit(1)


@app.command()
def ranks(
    path: Annotated[Path, typer.Argument(help="A run's folder, a folder of runs, or any PEFT adapter folder.")],
    as_json: Json = False,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write a line for each site to FILE.")] = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw what there is data for into DIR.")] = None,
    beside: Annotated[Path | None, typer.Option(help="Another run or adapter: draw both and their difference.")] = None,
    knock_out: Annotated[bool, typer.Option("--knock-out", help="Measure the loss of a run without each site first.")] = False,
    rows: Annotated[int | None, typer.Option(help="Rows of the selection split to measure it on.  [default: 128]")] = None,
) -> None:
    """Print the rank of every layer and module, how much of it is used, and what is wrong with an adapter."""
    from rankwise.reports import allocation
    from rankwise.reports import figures as drawn
    from rankwise.reports.results import is_run, write_file

    if beside is not None and figures is None:
        raise ValueError("--beside draws two allocations side by side: name a folder with --figures")
    if rows is not None and not knock_out:
        raise ValueError("--rows has no effect without --knock-out")
    if rows is not None and rows < 1:
        raise ValueError(f"--rows {rows}: give at least 1")
    for flag, file in (("--csv", csv), ("--figures", figures)):
        if file is not None and file.exists() and file.is_dir() != (flag == "--figures"):
            raise ValueError(f"{flag} {file}: this is a {'folder; name a file' if file.is_dir() else 'file; name a folder'}")
    if knock_out:
        if not is_run(path):
            raise ValueError(
                f"--knock-out: {path} is not a run; give the folder of one run, which has config.json and adapter/"
            )
        from rankwise.experiments import knockout

        knockout.of_run(path, rows or knockout.ROWS)
    found = allocation.as_dict(path) if as_json else allocation.shown(path)
    if csv is not None:
        write_file(csv, allocation.as_csv(path))
    if figures is not None:
        for drawing in allocation.drawings(path, beside):
            drawn.save(drawing, figures)
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
        return
    width = shutil.get_terminal_size((120, 24)).columns
    print("\n\n".join(table.text(width).rstrip("\n") for table in found))


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="A run's folder, or any adapter's, ours or PEFT's.")],
    to: Annotated[str, typer.Option(help="lora: a plain LoRA; merged: a whole model, the adapter merged into it.")],
    out: Annotated[Path, typer.Option(help="Folder to write: a new or an empty one, or an earlier export.")],
    model: Annotated[str | None, typer.Option(help="Base model.  [default: the one that PATH names]")] = None,
    model_class: Annotated[str | None, typer.Option(help="Its class in transformers.  [default: the adapter's]")] = None,
    total_rank: Annotated[int | None, typer.Option(help="Truncate first, to so many ranks of all sites together.")] = None,
    total_parameters: Annotated[int | None, typer.Option(help="The same, to so many parameters.")] = None,
    as_json: Json = False,
) -> None:
    """Take a trained adapter elsewhere: as a plain LoRA, truncated if wanted, or merged into its model."""
    from rankwise.experiments import export as exports

    if total_rank is not None and total_parameters is not None:
        raise ValueError("--total-rank and --total-parameters are two budgets: give one")
    for flag, number in (("--total-rank", total_rank), ("--total-parameters", total_parameters)):
        if number is not None and number < 1:
            raise ValueError(f"{flag} {number}: give at least 1")
    source = exports.find(path, to, model, model_class)
    exports.check_out(out, source.adapter)
    with _progress() as bar, _nothing_kept_if_interrupted():
        bar.say(f"{source.model}: loading torch and the model ...")
        made = exports.export(source, to, out, total_rank, total_parameters)
    if as_json:
        print(json.dumps(made | {"out": str(out)}, indent=1))
        return
    what = "" if made["total_rank"] is None else f", {made['total_rank']} ranks in {made['sites']} sites"
    print(f"{made['method']}{what}{', truncated' if made['truncated'] else ''}, as {to}: {out}")


@app.command()
def bench(
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON to FILE.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json, bench.md and figures.")] = Path("runs/bench"),
    full: Annotated[bool, typer.Option("--full", help="Packed throughput, a study, and a Llama shape too.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.  [default: what torch takes]")] = None,
    cases: Annotated[str | None, typer.Option(help="Only these, as in 'train/dora/*'.")] = None,
    repetitions: Annotated[int | None, typer.Option(help="Timed rounds, instead of each case's own number.")] = None,
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
    known.check_peft()

    with _progress() as bar, _nothing_kept_if_interrupted():
        bar.say("bench: loading torch and models ...")
        if _others_compute():
            bar.warn("note: another program is computing on this machine; trust the ratios more than the times")
            os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as in compare
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, tells of every start
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what a study sets on a GPU
        import torch
        from rankwise.experiments import measure
        from rankwise.experiments.bench.run import Bench
        from rankwise.experiments.files import write_json

        where = measure.device(device)
        measure.keep_freed_memory()
        if threads is not None:
            torch.set_num_threads(threads)
        _tell_of_plain_passes(bar)
        bar.start(len(chosen))
        found = Bench(known.plan(where.type), where, chosen, repetitions, bar.warn, bar.advance).run()
        if json_file is not None:
            write_json(json_file, found)
    from rankwise.reports import speed

    print(speed.text(found, shutil.get_terminal_size((120, 24)).columns))
    print(f"report: {speed.write(found, out)}")
    if found["failures"]:
        raise typer.Exit(1)


@app.command(name="list")
def list_(as_json: Json = False) -> None:
    """List the methods, models, tasks and studies there are."""
    from rankwise.experiments import catalogue, config, recipes, tasks

    rows = {
        "methods": {m.name: f"{m.summary} ({m.source})" for m in METHODS.values()},
        "models": {name: f"{e.kind}, {e.licence}" for name, e in catalogue.CATALOGUE.items() if e.kind == "model"},
        "tasks": {name: tasks.get(name).licence for name in tasks.names()},
        "studies": {name: _first_comment(path) for name, path in config.shipped().items()},
        "papers": {name: recipes.load(name).title for name in recipes.names()},
    }
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for kind, entries in rows.items():
        print(kind)
        width = max(map(len, entries), default=0)
        for name, text in entries.items():
            print(f"  {name:<{width}}  {text}")


def _narrowed(
    study: Any, methods: str | None, tasks: str | None, seeds: int | None, pack: int | None, accepted: list[str]
) -> Any:
    """The study with what the command line says instead of the file."""
    change: dict[str, Any] = {"accept_licences": [*study.accept_licences, *accepted]}
    if methods is not None:
        wanted = _chosen("--methods", methods, [e.label for e in study.methods], study.name)
        change["methods"] = [e for e in study.methods if e.label in wanted]
        for entry in study.methods:  # a rate that some of its methods chose is not the rate that they share
            if entry.shared_with is not None and (entry.label in wanted) != (entry.shared_with in wanted):
                raise ValueError(
                    f'--methods {methods}: "{entry.label}" and "{entry.shared_with}" share a learning rate: name both or none'
                )
    if tasks is not None:
        wanted = _chosen("--tasks", tasks, study.tasks, study.name)
        change["tasks"] = [name for name in study.tasks if name in wanted]
    if seeds is not None:
        if seeds < 1:
            raise ValueError(f"--seeds {seeds}: give at least 1")
        change["seeds"] = list(range(seeds))
    if pack is not None:
        if pack < 1:
            raise ValueError(f"--pack {pack}: give at least 1")
        change["pack"] = pack
    return study.model_copy(update=change)


def _chosen(option: str, given: str, known: list[str], study: str) -> list[str]:
    """The names in a list with commas.

    Raises:
        ValueError: none, or one that the study does not have.
    """
    wanted = [name.strip() for name in given.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise ValueError(f'{option}: "{name}" is not in {study}{nearest(name, known)}; it has: {", ".join(known)}')
    if not wanted:
        raise ValueError(f"{option} is empty: name at least one of: {', '.join(known)}")
    return wanted


def _report(runs: Path, out: Path | None, as_json: bool) -> None:
    from rankwise.reports import beside, page, results, tables
    from rankwise.reports.verdicts import verdicts

    studies = results.load_all(runs)
    commands = {study.name: command for study in studies if study.quick and (command := _fair(study))}
    written = page.write(runs, out or runs / "report", beside.of_folder(runs), commands)
    parts = [part for study in studies for part in study.parts()]
    found = [tables.comparison(part) for part in parts]
    if as_json:
        names = [study.name for study in studies]
        said = [asdict(verdict) for part in parts for verdict in verdicts(part)]
        tables_of = [table.records() for table in found]
        print(json.dumps({"studies": names, "report": str(written), "tables": tables_of, "verdicts": said}, indent=1))
        return
    for part, table in zip(parts, found, strict=True):
        print(table.text(shutil.get_terminal_size((120, 24)).columns))
        for verdict in () if part.quick else verdicts(part):
            print(f"{verdict.setting}: {verdict.text}")
        print()
    for study in studies:
        if study.quick:
            fair = f"  The full protocol: {commands[study.name]}" if study.name in commands else ""
            print(f"{study.name} is a quick look, no fair comparison.{fair}")
    print(f"report: {written}")
    print(f"page: {written.with_suffix('.html')}")


def _fair(study: Any) -> str | None:
    """The command of a shipped full-protocol study of the same model and task, the one with the fewest tasks; None: none."""
    from rankwise.experiments import config

    shipped = [config.read(path) for path in sorted(config.STUDIES.glob("*.toml"))]
    fair = [other for other in shipped if not other.quick and other.model == study.model and study.task in other.tasks]
    return f"rankwise compare {min(fair, key=lambda other: len(other.tasks)).name}" if fair else None


def _others_compute() -> bool:
    """Whether other programs keep more than a third of one processor busy; looked at for a fifth of a second, on Linux."""

    def busy() -> float:
        user, nice, system, *_ = map(int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK")

    try:
        before, began = busy(), time.perf_counter()
        time.sleep(0.2)
        return (busy() - before) / (time.perf_counter() - began) > 1 / 3
    except (OSError, ValueError):
        return False


def _tell_of_plain_passes(bar: "_progress") -> None:
    """Nothing is slower without a word."""
    from rankwise.variants import native

    if native.library() is None:
        bar.warn(f"note: without the compiled passes steps on the CPU take longer: {native.library.reason}")


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8-sig").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


@contextlib.contextmanager
def _nothing_kept_if_interrupted() -> Iterator[None]:
    """Says so; what `main` says of an interrupt is about runs, which are kept."""
    try:
        yield
    except KeyboardInterrupt:
        _complain("interrupted; nothing was written")
        raise SystemExit(130) from None


def _complain(text: str) -> None:
    for line in text.splitlines():
        print(f"rankwise: {line}", file=sys.stderr)


def _at(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""


class _progress:
    """A bar with the time left on a terminal; nothing elsewhere, except what the user should know."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.bar: Any = None

    def __enter__(self) -> "_progress":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, line: str) -> None:
        if self.console.is_terminal:
            self.console.print(line, highlight=False)

    def warn(self, line: str) -> None:
        print(f"rankwise: {line}", file=sys.stderr)

    def start(self, total: float) -> None:
        if not self.console.is_terminal:
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            "{task.description}",
            BarColumn(),
            "{task.percentage:>3.0f}%",
            TimeElapsedColumn(),
            "left",
            TimeRemainingColumn(),
        )
        columns = [TextColumn(c) if isinstance(c, str) else c for c in columns]
        self.bar = Progress(*columns, console=self.console, speed_estimate_period=120)
        self.task = self.bar.add_task("", total=total)
        self.bar.start()

    def advance(self, what: str, rows: float) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=what, advance=rows)

    def more(self, rows: float) -> None:
        if self.bar is not None:
            self.bar.update(self.task, total=self.bar.tasks[self.task].total + rows)


if __name__ == "__main__":
    main()
