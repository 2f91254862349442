"""What `rankwise paper` lists: every published table and its cells, what each needs, and whether this machine can run it."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rankwise.reports.papers.beside import columns_of
from rankwise.reports.papers.published import Published
from rankwise.reports.tables.cells import bytes_text, rate_text
from rankwise.reports.tables.table import Table


def overview(here: Mapping[str, Any]) -> Table:
    """Every table of `rankwise.experiments.recipes.here`: what it needs, and whether this machine can run it."""
    rows, waiting = [], []
    for one in here["tables"]:
        ready = [cell for cell in one["cells"] if not cell["waits"]]
        if not ready:
            reasons = dict.fromkeys(cell["waits"] for cell in one["cells"])
            waiting.append(f"{one['table']} waits for {one['waits'] or '; '.join(reasons)}.")
            continue
        by_state = {state: _names(c["cell"] for c in ready if c["here"] == state) for state in ("yes", "with --model")}
        rows.append(
            (
                one["table"],
                "; ".join(f"{state}: {names}" for state, names in by_state.items() if names) or "no",
                f"{len(ready)} of {len(one['cells'])}",
                _by_place((short_name(c["model"]), c["model_at"]) for c in ready),
                _by_place((c["cell"], c["data_at"]) for c in ready),
                _span([c["memory_bytes"] for c in ready], lambda b: f"{b / 2**30:.0f} GiB"),
                _span([c["seconds"] for c in ready], duration),
            )
        )
    columns = ("table", "runs here", "cells", "model", "data", "memory", "time a cell")
    caption = (*_estimates(here), *waiting)
    return Table("papers", f"The papers' tables ({here['variant']}) and what they need", columns, tuple(rows), caption, 7)


def detail(here: Mapping[str, Any], published: Published) -> Table:
    """The cells of one table, with what was published, the settings in which they differ, and what they need."""
    one = here["tables"][0]
    ready = [cell for cell in one["cells"] if not cell["waits"]]
    settings = [{k: v for k, v in cell["settings"].items() if k != "departures"} for cell in ready]
    keys = dict.fromkeys(key for values in settings for key in values)
    common = {key for key in keys if len({json.dumps(values.get(key)) for values in settings}) == 1}
    differing = [key for key in keys if key not in common]
    rows = []
    for cell, values in zip(ready, settings, strict=True):
        columns = columns_of(published, cell["task"], one["beside"], cell["cell"])
        printed = [f"{published.value(cell['row'], c).value:.2f}" for c in columns if c in published.row(cell["row"]).values]
        needs = (cell["here"], bytes_text(cell["memory_bytes"]), duration(cell["seconds"]))
        rows.append((cell["row"], cell["cell"], "/".join(printed), *needs, *(_plain(values.get(key)) for key in differing)))
    waiting: dict[str, list[str]] = {}
    for cell in one["cells"]:
        if cell["waits"]:
            waiting.setdefault(cell["waits"], []).append(cell["row"])
    known = {cell["row"] for cell in one["cells"]}
    if not known:
        waiting[one["waits"]] = [row.label for row in published.rows]
    caption = [f"Source: {one['source']}.", f"Variants: {', '.join(one['variants']) or 'none'}."]
    if one["about"]:
        caption.append(f"{here['variant'].capitalize()}: {one['about']}.")
    if common:
        caption.append(f"All cells: {', '.join(f'{key} {_plain(settings[0][key])}' for key in keys if key in common)}.")
    caption += [f"Departure: {sentence}" for sentence in one["departures"]]
    caption += [f"Waits for {why}: {'; '.join(dict.fromkeys(labels))}." for why, labels in waiting.items()]
    if rows:
        caption += _estimates(here)
        caption.append(
            f"To run: rankwise paper {one['table']} --cells {rows[0][1]} [--rows LABEL] [--variant NAME] [--scale X]."
        )
    head = ("row", "cell", "published", "runs here", "memory", "time", *differing)
    return Table("paper", one["title"], head, tuple(rows), tuple(caption), len(head), keys=2)


def duration(seconds: float) -> str:
    """Two digits and the unit that suits them: an estimate has no more."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _estimates(here: Mapping[str, Any]) -> list[str]:
    free = here["free_memory_bytes"]
    return [
        f"Hub: {here['hub']}. Free memory: {'unknown' if free is None else bytes_text(free)}.",
        "Memory: of one run, weights, AdamW's averages and the activations of a micro-batch of the longest inputs, in fp32.",
        f"Time: estimated for this CPU, all seeds and rates one after the other: operations by parameters and assumed tokens, "
        f"at {here['reached_share']:g} (share seen in reports/studies/quick-look) of the "
        f"{here['matrix_product_flops'] / 1e9:.0f} Gflop/s of matrix products measured just now; good to a factor of three. "
        "--scale shortens a recipe.",
        f"with --model: the data is here, the model is not or does not fit; {' (an encoder) or '.join(here['stand_ins'])} (a "
        "decoder) can stand in, and every table says so.",
    ]


def _names(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _by_place(names: Iterable[tuple[str, str]]) -> str:
    """(name, place) as "hub: a, b; cache: c"."""
    places: dict[str, list[str]] = {}
    for name, place in names:
        places.setdefault(place, []).append(name)
    return "; ".join(f"{place}: {_names(at_place)}" for place, at_place in places.items())


def _span(values: Sequence[float], show: Callable[[float], str]) -> str:
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return "-" if value is None else rate_text(value) if isinstance(value, float) and 0 < value < 0.01 else str(value)


def short_name(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]
