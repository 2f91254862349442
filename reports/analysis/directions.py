"""Magnitudes and directions of DoRA, LoRA and full fine-tuning beside Liu et al. 2024, and intruder dimensions."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rankwise.reports.analysis.measured import made_with, sites_by_kind, subject
from rankwise.reports.analysis.spans import Span, signed, span
from rankwise.reports.figures.style import FAINT, INK, Drawing, colour, house_style, panels, title_above
from rankwise.reports.papers.quoted import quoted
from rankwise.reports.ranks.sites import module_labels, split_site
from rankwise.reports.tables.cells import Cell
from rankwise.reports.tables.table import Table

INTRUDER = 0.5  # greatest |cosine| below which a singular vector counts as an intruder here; the data allow any other
WORDS = {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}
CHECKPOINT_MARKERS = ("o", "s", "^", "D", "v", "P")


def correlation(rows: Sequence[dict[str, Any]], convention: str = "rows") -> float | None:
    """Pearson's correlation of dD and dM; None below three rows, or where one of them does not vary."""
    dD, dM = (np.array([row[f"{key}_{convention}"] for row in rows]) for key in ("dD", "dM"))
    if len(rows) < 3 or not dD.std() or not dM.std():
        return None
    return float(np.corrcoef(dD, dM)[0, 1])


def correlations_of(
    measured: dict[str, Any], method: str, kind: str, convention: str = "rows", keep: Callable[[dict], bool] = lambda row: True
) -> list[float]:
    """The correlation of each seed, over the sites of that kind and the rows (site x snapshot) that `keep` accepts."""
    labels = module_labels(measured["sites"])
    moves = [row for row in measured["moves"] if row["method"] == method and labels[row["site"]] == kind and keep(row)]
    each = [correlation([row for row in moves if row["seed"] == seed], convention) for seed in _seeds(measured)]
    return [value for value in each if value is not None]


def _seeds(measured: dict[str, Any]) -> list[int]:
    return sorted({row["seed"] for row in measured["moves"]})


def _methods(measured: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in measured["moves"]))


def correlations(measured: dict[str, Any]) -> Table:
    """The correlations of dD and dM beside the paper's, a row for each method and kind of module."""
    columns = ("method", "module", "seeds", "correlation", "last snapshot", "per column", "paper", "dD last", "dM last")
    columns += ("intruders",)
    last = measured["snapshots"][-1]
    rows: list[tuple[Cell | Span, ...]] = []
    for method in _methods(measured):
        for kind, sites in sites_by_kind(measured["sites"]).items():
            names = {measured["sites"][i] for i in sites}
            ends = [r for r in measured["moves"] if r["method"] == method and r["site"] in names and r["step"] == last]
            values = (
                correlations_of(measured, method, kind),
                correlations_of(measured, method, kind, keep=lambda row: row["step"] == last),
                correlations_of(measured, method, kind, "columns"),
            )
            spans = [span(of, signed) if of else None for of in values]
            paper = quoted().directions.correlations.get(method) if kind == "query" else None
            intruders = [sum(value < INTRUDER for value in row["familiarity"]) for row in ends]
            moved = [span([row[f"{key}_rows"] for row in ends]) for key in ("dD", "dM")]
            rows.append((method, kind, len(_seeds(measured)), *spans, paper, *moved, span(intruders)))
    layers = len(measured["sites"]) // max(1, len(sites_by_kind(measured["sites"])))
    looked = len(next(row["familiarity"] for row in measured["moves"] if "familiarity" in row))
    caption = (
        f"Correlation of dD and dM over {layers} layers and {len(measured['snapshots'])} snapshots (steps "
        f"{', '.join(map(str, measured['snapshots']))}), a seed at a time: mean (least to greatest) over seeds.",
        "Last snapshot: over the layers alone. Both dM and dD grow while training, which by itself makes the first positive.",
        "Norms are of output rows, as PEFT's DoRA takes them; per column: of columns, as DoRA's paper writes them.",
        f"Paper: {quoted().directions.source}, {quoted().directions.weights}.",
        f"Intruders: of the top {looked} left singular vectors of the tuned weight those whose cosine with every pre-trained "
        f"one is below {INTRUDER}; mean (least to greatest) over layers and seeds (Shuttleworth et al. 2024).",
        made_with(measured),
    )
    title = "Size and direction of the weight's rows (Liu et al. 2024, sec. 3.2)"
    return Table("correlations", title, columns, tuple(rows), caption, 2)


def movement_figure(measured: dict[str, Any]) -> Drawing:
    """dM against dD of one seed, as the paper's Figure 2: a panel a method, a row a kind of module, a line a layer."""
    methods, sites, steps, seed = (
        _methods(measured),
        sites_by_kind(measured["sites"]),
        measured["snapshots"],
        _seeds(measured)[0],
    )
    with house_style():
        figure, axes = panels(len(sites), len(methods), (3.7 * len(methods), 3.3 * len(sites) + 0.7))
        for ax, (kind, method) in zip(axes, ((k, m) for k in sites for m in methods), strict=True):
            for i in sites[kind]:
                name = measured["sites"][i]
                path = [r for r in measured["moves"] if (r["method"], r["seed"], r["site"]) == (method, seed, name)]
                points = [(row["dD_rows"], row["dM_rows"]) for row in path]
                ax.plot(*zip(*points, strict=True), color=FAINT, linewidth=0.8, zorder=1)
                for at, point in enumerate(points):
                    marker = CHECKPOINT_MARKERS[at % len(CHECKPOINT_MARKERS)]
                    ax.plot(*point, marker=marker, color=colour(method), markersize=5, linestyle="")
                layer = split_site(name)[1]
                ax.annotate(f" {layer}", points[-1], fontsize=8, color=INK, va="center")
            values = correlations_of(measured, method, kind, keep=lambda row: row["seed"] == seed)
            words = f"  {signed(values[0])}" if values else ""
            ax.set_title(f"{method}, {kind}{words}")
            ax.set_xlabel("dD")
            ax.set_ylabel("dM")
            ax.margins(0.1)
            ax.ticklabel_format(style="sci", scilimits=(-2, 3), axis="both")
        marks = [
            axes[0].plot([], [], marker=CHECKPOINT_MARKERS[at % len(CHECKPOINT_MARKERS)], color=INK, linestyle="")[0]
            for at in range(len(steps))
        ]
        figure.legend(marks, [f"step {step}" for step in steps], loc="outside lower center", ncols=len(steps))
        title = (
            f"Change of size (dM) against change of direction (dD), with their correlation, {subject(measured)} (seed {seed})"
        )
        title_above(figure, title)
    alt = f"Scatter of dM against dD for {', '.join(methods)}, a line a layer, a marker a snapshot."
    return Drawing("movement", title, alt, figure)


def magnitude_sentences(measured: dict[str, Any]) -> list[str]:
    """What was measured beside what the papers report, a sentence each."""
    out, last = [], measured["snapshots"][-1]
    for method in _methods(measured):
        for kind in sites_by_kind(measured["sites"]):
            values = correlations_of(measured, method, kind)
            if not values:
                continue
            ends = correlations_of(measured, method, kind, keep=lambda row: row["step"] == last)
            paper = quoted().directions.correlations.get(method) if kind == "query" else None
            beside = ""
            if paper is not None:
                agree = "the same sign" if (np.mean(values) > 0) == (paper > 0) else "the opposite sign"
                beside = f" (paper {paper:+.2f}: {agree})"
            alone = f"; over layers at the last snapshot alone {signed(np.mean(ends))}" if ends else ""
            name = WORDS.get(method, method)
            out.append(f"{name}, {kind}: the correlation of dD and dM is {signed(np.mean(values))}{beside}{alone}.")
    moved = {
        method: [row["dD_rows"] for row in measured["moves"] if row["method"] == method and row["step"] == last]
        for method in _methods(measured)
    }
    order = sorted(moved, key=lambda method: np.mean(moved[method]))
    text = ", ".join(f"{WORDS.get(method, method)} {np.mean(moved[method]):.2g}" for method in order)
    out.append(f"Directions turn least to most (mean dD at the end): {text} (paper: full fine-tuning, LoRA, DoRA).")
    counts = {row[:2]: row[-1].mean for row in correlations(measured).rows}
    text = ", ".join(f"{WORDS.get(method, method)} {kind} {count:.2g}" for (method, kind), count in counts.items())
    out.append(f"Intruder dimensions a matrix: {text} (Shuttleworth et al. 2024: LoRA has them, full fine-tuning hardly any).")
    return out
