"""`rankwise plan`: what a study will take, before anything is trained or downloaded."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rankwise.experiments.cli.options import Device, Json, Pack, Threads, check_device, check_least, names, width
from rankwise.experiments.cli.own_options import own_entry
from rankwise.experiments.cli.progress import Progress
from rankwise.experiments.cli.start import start_torch

if TYPE_CHECKING:
    from rankwise.experiments.config import Entry, Study
    from rankwise.experiments.plan.table import Asked, Row
    from rankwise.variants.adapter.kinds.scheme import Scheme

WITHOUT = "Without a study"
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
OPTIMIZER_STATES = ("32-bit", "8-bit", "offloaded")  # experiments/training/stored_states.py
LABELS = 2  # of a model planned without data
SAID = {"8-bit": "in 8 bits", "offloaded": "in the CPU's memory"}
STEPS = 1000  # of a run planned without data: phases are shares of it


def plan(
    study: Annotated[Path | None, typer.Argument(help="A study file, or the name of one that ships.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory there is, such as 24GB: says what fits.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these, with commas between.")] = None,
    pack: Pack = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16.  [default: as a run would take]")] = None,
    curve: Annotated[str | None, typer.Option(help="Also parameters and memory of this method at each rank.")] = None,
    no_time: Annotated[bool, typer.Option("--no-time", help="Do not measure how fast this machine is.")] = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or a shape that ships.", rich_help_panel=WITHOUT)] = None,
    data: Annotated[str | None, typer.Option(help="Your own data, for its kind and labels.", rich_help_panel=WITHOUT)] = None,
    kind: Annotated[str | None, typer.Option(help="Kind of task.  [default: generation]", rich_help_panel=WITHOUT)] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of each adapter.  [default: 8]", rich_help_panel=WITHOUT)] = None,
    targets: Annotated[
        str | None, typer.Option(help="Modules, with commas between.  [default: all-linear]", rich_help_panel=WITHOUT)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a step.  [default: 8]", rich_help_panel=WITHOUT)] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a row.  [default: 512]", rich_help_panel=WITHOUT)] = None,
    quantization: Annotated[str | None, typer.Option(help="nf4 or int8: a quantised base.", rich_help_panel=WITHOUT)] = None,
    double_quantization: Annotated[
        bool, typer.Option("--double-quantization", help="With nf4: its scales too.", rich_help_panel=WITHOUT)
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="With gradient checkpointing.", rich_help_panel=WITHOUT)
    ] = False,
    optimizer_states: Annotated[
        str | None, typer.Option(help="32-bit, 8-bit or offloaded.  [default: 32-bit]", rich_help_panel=WITHOUT)
    ] = None,
) -> None:
    """Say what each method will take: parameters, memory, time; nothing is trained or downloaded."""
    check_device(device)
    for option, value in {"--threads": threads, "--pack": pack, "--rank": rank, "--batch-size": batch_size}.items():
        check_least(option, value)
    check_least("--length", length, 8)
    if precision not in (None, "fp32", "bf16"):
        raise ValueError(f"--precision {precision}: give fp32 or bf16")
    there = None if memory is None else in_bytes(memory)
    alone = {"--data": data, "--kind": kind, "--rank": rank, "--targets": targets, "--batch-size": batch_size}
    alone |= {"--length": length, "--checkpointing": checkpointing or None, "--quantization": quantization}
    alone |= {"--double-quantization": double_quantization or None, "--optimizer-states": optimizer_states}
    if optimizer_states not in (None, *OPTIMIZER_STATES):
        raise ValueError(
            f"--optimizer-states {optimizer_states}: give {', '.join(OPTIMIZER_STATES[:-1])} or {OPTIMIZER_STATES[-1]}"
        )
    form = _scheme(quantization, double_quantization)
    if model is None:
        for option, value in alone.items():
            if value is not None:
                raise ValueError(f"{option} has no effect without --model: name the model, or take it out")
        chosen = _of_file(study, methods, pack)
    else:
        if study is not None:
            raise ValueError(f"--model {model}: a study, {study}, is given too: keep one")
        chosen = None
    with Progress() as bar:
        start_torch(bar, threads)
        from rankwise.experiments import measure
        from rankwise.experiments.plan import table
        from rankwise.experiments.plan.rate import products_per_second

        where = measure.device(device)
        taken = measure.precision(precision or (chosen.training.precision if chosen is not None else "auto"), where)
        if chosen is not None:
            asked = table.of_study(chosen, taken, bar.warn)
        else:
            entries = _entries(methods, rank, targets, form is not None)
            shape = {"rows": batch_size or 8, "length": length or 512, "members": pack or 1}
            shape |= {"checkpointing": checkpointing, "precision": taken, "quantization": form}
            shape |= {"optimizer_states": optimizer_states or OPTIMIZER_STATES[0]}
            asked = [_of_model(model, data, kind, entries, shape)]
            if length is not None and asked[0].of_kind.has_images:
                raise ValueError(f"--length {length}: rows of kind = {asked[0].kind} have no tokens: take it out")
        found: list[tuple[Asked, list[Row]]] = []
        for one in asked:
            rate = None
            if not no_time:
                rate = products_per_second(one.model, one.of_kind, one.num_labels, one.shape, where)
            found.append((one, list(table.rows(one, there, rate))))
        curves = [(one, table.rank_curve(one, _named(curve, one.entries))) for one in asked] if curve is not None else []
    if as_json:
        listed: dict[str, Any] = {"rows": [row.as_dict() for _, rows in found for row in rows]}
        if curves:
            listed["curve"] = [
                {"task": one.task, "method": curve, "rank": r, "trainable_parameters": p, "peak_bytes": b}
                for one, points in curves
                for r, p, b in points
            ]
        print(json.dumps(listed, indent=1))
        return
    for one, rows in found:
        print(_shown(one, rows, there))
    for one, points in curves:
        print(_curve_shown(one, curve or "", points))


def in_bytes(text: str) -> int:
    """24GB is 24 * 10**9 bytes, 24GiB 24 * 2**30.

    Raises:
        ValueError: no number with a unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?i?B)", text.strip(), flags=re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ValueError(f"--memory {text}: give a number with its unit, such as 24GB or 80GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _of_file(study: Path | None, methods: str | None, pack: int | None) -> "Study":
    from rankwise.experiments import checks, config, sources
    from rankwise.experiments.cli.compare import narrowed

    read = config.read(config.find(study or config.DEFAULT_STUDY))
    terms = [name for name in read.tasks if name in sources.CATALOGUE and sources.CATALOGUE[name].research_only]
    chosen = narrowed(read, methods, None, None, pack, terms)  # no data is read, so none need be accepted
    checks.check(chosen)
    return chosen


def _scheme(name: str | None, is_double: bool) -> "Scheme | None":
    from rankwise.experiments import quantization

    if name is not None and name not in quantization.NAMES:
        raise ValueError(f"--quantization {name}: give {' or '.join(quantization.NAMES)}")
    if (fault := quantization.fault(name, is_double)) is not None:
        raise ValueError(f"--double-quantization: {fault}")
    return quantization.scheme(name, is_double)


def _entries(methods: str | None, rank: int | None, targets: str | None, is_quantised: bool) -> "tuple[Entry, ...]":
    """The methods of a quick look, each of one rank; without full fine-tuning over a quantised base, unless it is named."""
    from rankwise.experiments import config, own_study

    known = own_study.shipped_entries(full_protocol=False)
    usual = [name for name in own_study.METHODS if name != "full" or not is_quantised]
    chosen = usual if methods is None else names("--methods", methods, known, "what a plan knows")
    mean = rank or 8
    ranks = {"rank": mean, "alpha": 2.0 * mean}
    pruned = {"initial_rank": -(-3 * mean // 2), "target_rank": mean, "alpha": 2.0 * mean}
    at = {} if targets is None else {"targets": [t.strip() for t in targets.split(",")] if "," in targets else targets}
    tables = []
    for name in chosen:
        own = {k: v for k, v in known[name].items() if k not in (*ranks, *pruned)}
        has = {"rank": ranks, "initial_rank": pruned}
        given = next((values for key, values in has.items() if key in known[name]), {})
        tables.append({**own, **given, **(at if given else {}), "label": name})
    raw = {"name": "plan", "quick": True, "model": "plan", "tasks": ["glue/stsb"], "methods": tables}
    return tuple(config.parse(raw, default_name="plan", where="plan").methods)


def _of_model(model: str, data: str | None, kind: str | None, entries: "tuple[Entry, ...]", shape: dict[str, Any]) -> "Asked":
    """What is asked for a model and a kind of task, or data of one's own, which says both kind and labels."""
    from rankwise.experiments import kinds
    from rankwise.experiments.plan import step, table
    from rankwise.experiments.tasks import in_study

    if data is None:
        kind = kind or "generation"
        kinds.check(kind)
        labels, steps, name = {"regression": 1, "span": 2}.get(kind, LABELS), STEPS, kind
    else:
        entry = own_entry(data, None, None, kind, None, None)
        task = in_study(entry.name, [entry])
        kind, labels, name = task.kind, task.num_labels, entry.name
        steps = max(STEPS // 10, -(-task.sizes["train"] // shape["rows"]))
    return table.Asked(name, model, kind, labels, entries, step.Shape(**shape), steps)


def _named(label: str, entries: "tuple[Entry, ...]") -> "Entry":
    names("--curve", label, [entry.label for entry in entries], "the plan")
    return next(entry for entry in entries if entry.label == label)


def _shown(asked: "Asked", rows: "list[Row]", memory: int | None) -> str:
    from rankwise.reports.tables import Table

    shape = asked.shape
    columns = ["method", "members", "trained", "active", "head", "weights", "adapter", "gradients", "optimizer", "activations"]
    columns += ["peak", "file", "TFLOP a step", "seconds a step"]
    columns += [] if memory is None else ["fits", "largest batch", "largest pack"]
    cells = []
    for row in rows:
        cost = row.cost
        sizes = (cost.weights, cost.adapter, cost.gradients, cost.optimizer, cost.activations, cost.peak, row.file_bytes)
        *sizes_before, file = map(readable, sizes)
        counts = (row.members, f"{cost.trainable:,}", f"{cost.active:,}", f"{cost.head:,}")
        speed = (f"{cost.products / 1e12:.3g}", "-" if row.seconds is None else f"{row.seconds:.3g}")
        fit = () if memory is None else ("yes" if row.fits else "no", row.largest_batch, row.largest_pack or "-")
        cells.append((row.method, *counts, *sizes_before, file, *speed, *fit))
    size = f"rows of {shape.length} tokens"
    if asked.of_kind.has_images:
        side = shape.image_size
        size = "images as large as its configuration says" if side is None else f"images of {side} x {side} pixels"
    form = shape.precision if shape.quantization is None else f"{shape.precision} over {shape.quantization}"
    form += ", gradient checkpointing" if shape.checkpointing else ""
    form += "" if shape.optimizer_states == "32-bit" else f", averages {SAID[shape.optimizer_states]}"
    caption = (
        f"{asked.kind} on {asked.model}: {shape.micro_rows} {size} a member at a time, {form}. "
        "Nothing was trained or downloaded.",
        "The peak is of tensors: what the process, a CUDA context or a kernel's own work space takes comes on top.",
        "Full fine-tuning keeps the model's own weights beside the trained copies (column adapter), to give them back.",
    )
    return Table("plan", f"Plan: {asked.task}", tuple(columns), tuple(cells), caption).text(width())


def _curve_shown(asked: "Asked", label: str, points: list[tuple[int, int, int]]) -> str:
    from rankwise.reports.tables import Table

    cells = tuple((str(rank), f"{parameters:,}", readable(peak)) for rank, parameters, peak in points)
    caption = ("Counted at the least and the greatest rank; both columns are straight lines between.",)
    return Table("curve", f"Ranks of {label}: {asked.task}", ("rank", "trained", "peak"), cells, caption).text(width())


def readable(size: int) -> str:
    """Bytes as a person reads them, in decimal units."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"
