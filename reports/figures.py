"""Figures of a study, as SVG and PNG: the same runs give the same bytes.

One colour a method, everywhere, from `METHOD_COLOURS` (Okabe and Ito's palette, told apart by colour-blind readers);
settings of one method differ by line style. Each function takes one part of a study and returns a `Drawing`, or None
where there is nothing to draw. matplotlib is imported when the first figure is drawn, without pyplot: no global state.
"""

import io
import itertools
import textwrap
import zlib
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rankwise.experiments.files import write_file
from rankwise.experiments.records import Result, Run
from rankwise.reports.ranks import RankMap, believed_and_measured, module_labels, site_order, split_site
from rankwise.reports.results import Arm, Study, best_rate, rate_score
from rankwise.reports.statistics import jaccard, spearman
from rankwise.reports.tables import decimal, mean_ranks, rate_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHOD_COLOURS = {
    "full": "#000000",
    "head": "#7f7f7f",
    "bitfit": "#e69f00",
    "lora": "#0072b2",
    "adalora": "#d55e00",
    "dora": "#009e73",
    "adalora+dora": "#cc79a7",
}
OTHER_COLOURS = ("#56b4e9", "#8c6d31", "#637939", "#843c39", "#7b4173", "#3182bd")  # a method not named above
MARKERS = {"full": "s", "head": "v", "bitfit": "^", "lora": "o", "adalora": "D", "dora": "P", "adalora+dora": "X"}
LINES = ("-", "--", ":", "-.")  # the first, second, ... setting of one method
# Paul Tol's "muted": the kinds of modules, which must not be mistaken for methods.
KIND_COLOURS = ("#332288", "#44aa99", "#cc6677", "#ddaa33", "#88ccee", "#882255", "#117733", "#aa4499", "#999933")
INK, FAINT = "#222222", "#8a8a8a"
RANK_COLOURS, DIFFERENCE_COLOURS = "YlGnBu", "PuOr"

STYLE = {
    "font.family": "DejaVu Sans",  # matplotlib carries it: the same letters on every machine
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b0b0b0",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.titlesize": 11,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "rankwise",  # else the ids in the file are random
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Drawing:
    """A figure, the name of its files, and the words for who cannot see it."""

    name: str
    title: str
    alt: str
    figure: "Figure"


def draw_all(study: Study) -> list[Drawing]:
    """Every figure that the part has data for, in the order of the report."""
    drawings = (function(study) for function in DRAWN)
    return [drawing for drawing in drawings if drawing is not None]


def save(drawing: Drawing, folder: Path) -> tuple[Path, Path]:
    """`<name>.svg` and `<name>.png`, each whole or not at all; no date and no program's version in them."""
    paths = folder / f"{drawing.name}.svg", folder / f"{drawing.name}.png"
    with house_style():
        for path, metadata in zip(paths, ({"Date": None, "Creator": None}, {"Software": None}), strict=True):
            out = io.BytesIO()
            drawing.figure.savefig(out, format=path.suffix[1:], dpi=160, metadata=metadata)
            write_file(path, out.getvalue())
    return paths


def colour(method: str) -> str:
    """A method's colour; one that the dict does not name gets its own, the same in every figure."""
    if method in METHOD_COLOURS:
        return METHOD_COLOURS[method]
    return OTHER_COLOURS[zlib.crc32(method.encode()) % len(OTHER_COLOURS)]


# --- where the rank went -------------------------------------------------------------------------------------------


def rank_map(study: Study) -> Drawing | None:
    """Layer x module kind, a panel a setting, the active rank written in each cell (a mean over seeds)."""
    arms = [arm for arm in study.arms if arm.has_ranks]
    ranks = [{site: rank.active for site, rank in mean_ranks(arm).items()} for arm in arms]
    if not any(ranks):
        return None
    layers, kinds, others, labels = _grid(site for found in ranks for site in found)
    top = max(rank.nominal for arm in arms for rank in mean_ranks(arm).values()) or 1

    wide = max(len(layers), 4)
    cell = 0.44 if wide <= 16 else 0.30
    columns = 2 if wide <= 8 and len(arms) > 1 else 1
    rows = -(-len(arms) // columns)
    margin = 0.25 + 0.075 * max(map(len, [*kinds, *(labels[site] for site in others)]))
    height = cell * 0.78 * (len(kinds) + len(others)) + 0.75
    with house_style():
        size = (columns * (wide * cell + 0.55) + margin + 0.9, rows * height + 0.8)
        figure, axes = panels(rows, columns, size, sharey=True)
        for ax, arm, found in zip(axes, arms, ranks, strict=False):
            _rank_panel(ax, found, layers, kinds, others, labels, top, small=wide > 16)
            n = len(arm.completed)
            ax.set_title(f"{arm.setting}   total {decimal(sum(found.values()))}", pad=5)
            if n != len(arms[0].completed):
                ax.set_title(f"n = {n}", loc="right", fontsize=8.5, fontweight="normal", color=FAINT)
        for ax in axes[len(arms) :]:
            ax.set_axis_off()
        for ax in axes[: len(arms)][-columns:]:
            ax.set_xlabel("layer")
        bar = figure.colorbar(axes[0].collections[0], ax=list(axes), shrink=0.8, aspect=30, pad=0.015)
        bar.set_label("active rank")
        bar.outline.set_visible(False)
        n = len(arms[0].completed)
        seeds = f"mean of {n} seeds" if n > 1 else "one seed"
        title = f"Active rank of each layer and module after training, {_of(study)} ({seeds})"
        title_above(figure, title)
    alt = f"Heat-map of ranks, {len(kinds)} kinds of modules by {len(layers)} layers, for {', '.join(_names(arms))}."
    return Drawing("rank-map", title, alt, figure)


def _rank_panel(
    ax: "Axes",
    ranks: dict[str, float],
    layers: Sequence[int],
    kinds: Sequence[str],
    others: Sequence[str],
    labels: dict[str, str],
    top: float,
    small: bool,
    colours: str = RANK_COLOURS,
    bottom: float = 0.0,
) -> None:
    """Cells of the layers, then a row as wide as the panel for each site that belongs to no layer."""
    grid = np.full((len(kinds) + len(others), len(layers) or 1), np.nan)
    where = {}
    for site, rank in ranks.items():
        layer = split_site(site)[1]
        if layer is None:
            row = len(kinds) + others.index(site)
            grid[row, :] = rank
            where[row, None] = rank
        else:
            row, column = kinds.index(labels[site]), layers.index(layer)
            grid[row, column] = rank
            where[row, column] = rank
    mesh = ax.pcolormesh(np.ma.masked_invalid(grid), cmap=colours, vmin=bottom, vmax=top)
    ax.grid(False)
    for x in range(grid.shape[1] + 1):
        ax.plot([x, x], [0, len(kinds)], color="white", linewidth=1.2)
    for y in range(grid.shape[0] + 1):
        ax.axhline(y, color="white", linewidth=1.2 if y < len(kinds) or not others else 3)
    longest = max(len(decimal(rank)) for rank in ranks.values()) if ranks else 1
    size = (7 if longest < 3 else 5.5) if small else (9 if longest < 4 else 8.2)
    for (row, column), rank in where.items():
        x = grid.shape[1] / 2 if column is None else column + 0.5
        red, green, blue, _ = mesh.cmap((rank - bottom) / (top - bottom))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        ax.text(x, row + 0.52, decimal(rank), ha="center", va="center", fontsize=size, color="white" if dark else INK)
    ax.set_xticks(np.arange(len(layers)) + 0.5, layers, fontsize=7.5 if small else None)
    ax.set_yticks(np.arange(grid.shape[0]) + 0.5, [*kinds, *(labels[site] for site in others)])
    ax.set_ylim(grid.shape[0], 0)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def allocation_pair(study: Study) -> Drawing | None:
    """The two allocations that differ most of the part's settings, side by side; None where all are alike."""
    found = [(arm, {site: rank.active for site, rank in mean_ranks(arm).items()}) for arm in study.arms if arm.has_ranks]
    pairs = [
        (sum(abs(one.get(site, 0) - other.get(site, 0)) for site in one.keys() | other.keys()), -i, -j)
        for i, (_, one) in enumerate(found)
        for j, (_, other) in enumerate(found)
        if i < j
    ]
    if not pairs or not max(pairs)[0]:
        return None
    _, i, j = max(pairs)
    (first, one), (second, other) = found[-i], found[-j]
    return side_by_side(first.setting, one, second.setting, other, f"{_of(study)} ({_seeds([first, second])})")


def one_map(found: RankMap) -> Drawing:
    """Layer x module of one run or adapter."""
    ranks = {site.site: float(site.active) for site in found.sites}
    layers, kinds, others, labels = _grid(ranks)
    wide = max(len(layers), 4)
    with house_style():
        figure, (ax,) = panels(1, 1, (wide * 0.44 + 3.2, 0.36 * (len(kinds) + len(others)) + 1.6))
        top = max(site.nominal for site in found.sites) or 1
        _rank_panel(ax, ranks, layers, kinds, others, labels, top, small=wide > 16)
        ax.set_xlabel("layer")
        title = f"Active rank of each layer and module, {found.name} (total {decimal(sum(ranks.values()))})"
        title_above(figure, title)
    return Drawing("rank-map", title, f"Heat-map of ranks, {len(kinds)} kinds of modules by {len(layers)} layers.", figure)


def one_spectrum(found: RankMap) -> Drawing:
    """Singular values of every site's dW in one run or adapter, a colour a kind of module."""
    labels = module_labels([site.site for site in found.sites])
    kinds = list(dict.fromkeys(labels.values()))
    with house_style():
        figure, (ax,) = panels(1, 1, (7.6, 4.2))
        for site in found.sites:
            tint = KIND_COLOURS[kinds.index(labels[site.site]) % len(KIND_COLOURS)]
            ax.plot(range(1, len(site.singular_values) + 1), site.singular_values, color=tint, linewidth=1.1, alpha=0.75,
                    label=labels[site.site])  # fmt: skip
        ax.set_yscale("log")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("place")
        ax.set_ylabel("singular value of dW")
        handles = {line.get_label(): line for line in ax.lines}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 4))
        title = f"Spectrum of each site's update, {found.name}"
        title_above(figure, title)
    return Drawing("spectra", title, f"Singular values of dW of {len(found.sites)} sites.", figure)


def _grid(sites: Iterable[str]) -> tuple[list[int], list[str], list[str], dict[str, str]]:
    """Layers, module kinds, the sites of no layer, and the label of each site."""
    sites = site_order(sites)
    labels = module_labels(sites)
    layered = [site for site in sites if split_site(site)[1] is not None]
    others = [site for site in sites if split_site(site)[1] is None]
    layers = sorted({split_site(site)[1] for site in layered})
    return layers, list(dict.fromkeys(labels[site] for site in layered)), others, labels


def side_by_side(first: str, one: dict[str, float], second: str, other: dict[str, float], where: str) -> Drawing:
    """Two allocations, and second minus first, in a grid of layers and modules each.

    one, other: site -> active rank.
    """
    layers, kinds, others, labels = _grid([*one, *other])
    difference = {site: other.get(site, 0.0) - one.get(site, 0.0) for site in labels}
    top = max([*one.values(), *other.values()], default=0) or 1
    most = max(map(abs, difference.values()), default=0) or 1
    wide = max(len(layers), 4)
    size = (min(3 * wide * 0.4 + 3.6, 22), 0.34 * (len(kinds) + len(others)) + 1.7)
    with house_style():
        figure, axes = panels(1, 3, size, sharey=True)
        for ax, name, ranks in zip(axes, (first, second), (one, other), strict=False):
            _rank_panel(ax, ranks, layers, kinds, others, labels, top, small=wide > 16)
            ax.set_title(f"{name}   total {decimal(sum(ranks.values()))}", pad=5)
        _rank_panel(axes[2], difference, layers, kinds, others, labels, most, wide > 16, DIFFERENCE_COLOURS, -most)
        axes[2].set_title("second minus first", pad=5)
        for ax in axes:
            ax.set_xlabel("layer")
        for ax, words in ((axes[1], "active rank"), (axes[2], "difference")):
            bar = figure.colorbar(ax.collections[0], ax=ax, shrink=0.8, aspect=20, pad=0.02)
            bar.set_label(words)
            bar.outline.set_visible(False)
        title = f"{first} and {second}: where the rank went, {where}"
        title_above(figure, title)
    alt = (
        f"Heat-maps of the ranks of {first}, of {second} and of their difference, {len(kinds)} modules by {len(layers)} layers."
    )
    return Drawing("side-by-side", title, alt, figure)


def stability(study: Study) -> Drawing | None:
    """How alike two seeds of one setting are: for each pair Spearman's correlation and Jaccard's overlap of their ranks."""
    found = {arm: pairs for arm in study.arms if (pairs := seed_pairs(arm))}
    if not found:
        return None
    measures = ("Spearman", "Jaccard, ranks", "Jaccard, sites")
    with house_style():
        figure, axes = panels(1, 3, (9.8, 0.42 * len(found) + 1.9), sharey=True)
        for ax, name, at in zip(axes, measures, range(3), strict=True):
            for row, (arm, pairs) in enumerate(found.items()):
                values = [pair[at] for pair in pairs if pair[at] is not None]
                # Points of one setting are moved apart up and down, so that equal ones can be counted.
                spread = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else [0.0]
                ax.plot(values, row + np.asarray(spread)[: len(values)], linestyle="", marker=MARKERS.get(arm.method, "o"),
                        markersize=4, alpha=0.6, color=colour(arm.method))  # fmt: skip
                if values:
                    ax.plot([np.mean(values)] * 2, [row - 0.34, row + 0.34], color=colour(arm.method), linewidth=2.2)
            ax.set_title(name)
            ax.set_xlim(-1.05 if name == "Spearman" else -0.05, 1.05)
        axes[0].set_yticks(range(len(found)), _names(list(found)))
        axes[0].set_ylim(len(found) - 0.5, -0.5)
        title = f"Is the allocation the same at another seed? {_of(study)} (a point a pair of seeds, a line their mean)"
        title_above(figure, title)
    alt = f"Agreement of the ranks of pairs of seeds for {', '.join(_names(list(found)))}."
    return Drawing("stability", title, alt, figure)


def seed_pairs(arm: Arm) -> list[tuple[float | None, float | None, float | None]]:
    """For each pair of seeds Spearman's correlation of their ranks, and Jaccard's overlap of ranks and of the sites kept.

    Empty where there is one seed, or where every seed has one rank everywhere, so that there is nothing to be alike.
    """
    ranks = [result.ranks for result in arm.completed if result.ranks]
    if all(len(set(one.values())) == 1 for one in ranks):
        return []
    found = []
    for one, other in itertools.combinations(ranks, 2):
        sites = [site for site in one if site in other]
        kept = [{site: int(rank > 0) for site, rank in ranks.items()} for ranks in (one, other)]
        correlation = spearman([one[site] for site in sites], [other[site] for site in sites])
        found.append((correlation, jaccard(one, other), jaccard(*kept)))
    return found


# --- what became of the weights ------------------------------------------------------------------------------------


def importance(study: Study) -> Drawing | None:
    """The allocator's score of every slot against its place, kept and cut, of the first seed; a panel a setting."""
    shown = {arm: run for arm in study.arms for run in _with_scores(arm)[:1]}
    if not shown:
        return None
    columns = min(len(shown), 2)
    rows = -(-len(shown) // columns)
    with house_style():
        figure, axes = panels(rows, columns, (9.6 if columns == 2 else 6.4, 3.0 * rows + 0.6))
        for ax, (arm, run) in zip(axes, shown.items(), strict=False):
            slots = [
                (score, keep == "1")
                for facts in run.sites.values()
                for score, keep in zip(facts.scores or (), facts.kept or "", strict=True)
                if score is not None
            ]
            slots.sort(key=lambda slot: -slot[0])
            for keep, tint, label in ((False, FAINT, "cut"), (True, colour(arm.method), "kept")):
                points = [(i + 1, score) for i, (score, kept) in enumerate(slots) if kept == keep]
                if points:
                    ax.plot(*zip(*points, strict=True), linestyle="", marker=".", markersize=4, color=tint, label=label)
            kept = sum(keep for _, keep in slots)
            ax.axvline(kept + 0.5, color=INK, linewidth=1.0, linestyle=(0, (4, 2.5)))
            ax.annotate(f"{kept:,} kept", (kept + 0.5, 0.97), xycoords=("data", "axes fraction"), xytext=(4, 0),
                        textcoords="offset points", va="top", fontsize=8.5, color=INK)  # fmt: skip
            positive = [score for score, _ in slots if score > 0]
            if len(positive) == len(slots) and max(positive) > 20 * min(positive):
                ax.set_yscale("log")
            ax.set_title(f"{arm.setting}, seed {run.config.seed}")
            ax.set_xlabel("slot, the most important first")
            ax.legend(loc="lower left")
        axes[0].set_ylabel("importance (the allocator's score)")
        for ax in axes[len(shown) :]:
            ax.set_axis_off()
        title = f"Importance of every slot at the end, and the cut, {_of(study)}"
        title_above(figure, title)
    alt = f"Sorted importance scores and which slots were kept, for {', '.join(_names(list(shown)))}."
    return Drawing("importance", title, alt, figure)


def _with_scores(arm: Arm) -> list[Run]:
    return [run for run in arm.of("completed") if any(facts.scores for facts in run.sites.values())]


def spectra(study: Study) -> Drawing | None:
    """Singular values of dW, the mean over layers and seeds of each kind of module; full fine-tuning's real dW beside."""
    found = {arm: values for arm in study.arms if (values := _mean_spectra(arm))}
    if not found:
        return None
    sites = site_order(site for values in found.values() for site in values)
    labels = module_labels(sites)
    kinds = list(dict.fromkeys(labels[site] for site in sites))
    columns = min(len(kinds), 3)
    rows = -(-len(kinds) // columns)
    with house_style():
        figure, axes = panels(rows, columns, (3.3 * columns, 2.6 * rows + 0.9), sharex=True, sharey=True)
        for ax, kind in zip(axes, kinds, strict=False):
            for arm, line in _lines(list(found)):
                members = [found[arm][site] for site in sites if labels[site] == kind and site in found[arm]]
                length = max(map(len, members), default=0)
                padded = np.array([values + [0.0] * (length - len(values)) for values in members])
                if not length:
                    continue
                means = padded.mean(0)
                shown = means > 0
                ax.plot(np.arange(1, length + 1)[shown], means[shown], label=arm.setting, color=colour(arm.method),
                        linestyle=line, linewidth=1.5, marker=MARKERS.get(arm.method, "o"), markersize=3)  # fmt: skip
            ax.set_yscale("log")
            ax.set_title(kind)
            ax.xaxis.get_major_locator().set_params(integer=True)
        for ax in axes[len(kinds) :]:
            ax.set_axis_off()
        for ax in axes[: len(kinds)][-columns:]:
            ax.set_xlabel("place")
        for ax in axes[::columns]:
            ax.set_ylabel("singular value of dW")
        handles = {line.get_label(): line for ax in axes for line in ax.lines}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 6))
        title = f"Spectrum of each update, {_of(study)} (means over layers; {_seeds(list(found))})"
        title_above(figure, title)
    alt = f"Singular values of dW by kind of module for {', '.join(_names(list(found)))}."
    return Drawing("spectra", title, alt, figure)


def _mean_spectra(arm: Arm) -> dict[str, list[float]]:
    """Site -> the mean over seeds of each of its singular values that were kept; one that is not there is 0."""
    runs = [run.sites for run in arm.of("completed") if run.sites]
    found = {}
    for site in dict.fromkeys(site for sites in runs for site in sites):
        values = [sites[site].singular_values or [] for sites in runs if site in sites]
        length = max(map(len, values), default=0)
        if length:
            found[site] = np.mean([one + [0.0] * (length - len(one)) for one in values], axis=0).tolist()
    return found


def knock_out(study: Study) -> Drawing | None:
    """The rise of the loss without each site against what was believed of it: importance, or |dW|/|W| where there is none."""
    shown = {}
    for arm in study.arms:
        runs = [run for run in arm.of("completed") if run.knock_out and run.sites]
        if runs:
            shown[arm] = runs
    if not shown:
        return None
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    with house_style():
        figure, axes = panels(rows, columns, (3.3 * columns + 0.4, 2.8 * rows + 0.7))
        for ax, (arm, runs) in zip(axes, shown.items(), strict=False):
            by = "importance" if any(believed_and_measured(run, "importance")[0] for run in runs) else "relative_norm"
            for run in runs:
                believed, increases = believed_and_measured(run, by)
                ax.plot(believed, increases, linestyle="", marker=MARKERS.get(arm.method, "o"), markersize=4, alpha=0.6,
                        color=colour(arm.method))  # fmt: skip
            correlations = [spearman(*believed_and_measured(run, by)) for run in runs]
            known = [value for value in correlations if value is not None]
            ax.axhline(0, color=FAINT, linewidth=0.8)
            ax.set_title(arm.setting)
            if known:
                told = f"rho {np.mean(known):+.2f}, n = {len(known)}"
                ax.set_title(told, loc="right", fontsize=9, fontweight="normal", color=INK)
            ax.set_xlabel("importance, sum of the site" if by == "importance" else "|dW| / |W|")
        for ax in axes[::columns]:
            ax.set_ylabel("rise of the loss without it")
        for ax in axes[len(shown) :]:
            ax.set_axis_off()
        title = f"What each site is worth when it is taken out, {_of(study)} (rho: Spearman, mean over n seeds)"
        title_above(figure, title)
    alt = f"Rise of the loss without each site against what was believed of it, for {', '.join(_names(list(shown)))}."
    return Drawing("knock-out", title, alt, figure)


# --- ranks and budget while training -------------------------------------------------------------------------------


def budget(study: Study) -> Drawing | None:
    """Active ranks in all against the total that the schedule asks for; a panel a setting that has a schedule."""
    histories = {arm: _histories(arm) for arm in study.arms}
    arms = [arm for arm, runs in histories.items() if any(row.budget is not None for run in runs for row in run)]
    if not arms:
        return None
    columns = min(len(arms), 2)
    rows = -(-len(arms) // columns)
    with house_style():
        figure, axes = panels(rows, columns, (9.6 if columns == 2 else 6.4, 3.1 * rows + 0.5), sharey=True)
        for ax, arm in zip(axes, arms, strict=False):
            for i, run in enumerate(histories[arm]):
                steps = [row.step for row in run]
                first = i == 0
                active = [row.active for row in run]
                alive = [(row.step, row.live) for row in run if row.live]  # at the start every E is 0
                if any(row.live not in (0, row.active) for row in run):
                    ax.step(*zip(*alive, strict=True), where="post", color=colour(arm.method), alpha=0.3, linewidth=1.0,
                            label="live (E not 0)" if first else None)  # fmt: skip
                ax.step(steps, active, where="post", color=colour(arm.method), alpha=1.0 if first else 0.5,
                        linewidth=2.6, label="active" if first else None)  # fmt: skip
            scheduled = [(row.step, row.budget) for row in histories[arm][0] if row.budget is not None]
            ax.step(*zip(*scheduled, strict=True), where="post", color=INK, linestyle=(0, (4, 2.5)), linewidth=1.1,
                    label="schedule")  # fmt: skip
            ax.annotate(f"{scheduled[-1][1]:,}", scheduled[-1], xytext=(0, -13), textcoords="offset points", ha="right",
                        fontsize=9, color=INK)  # fmt: skip
            ax.set_title(arm.setting)
            ax.set_xlabel("step")
            ax.set_ylim(bottom=0)
            ax.margins(x=0.02)
            ax.legend(loc="lower left")
        axes[0].set_ylabel("ranks, all sites together")
        for ax in axes[len(arms) :]:
            ax.set_axis_off()
        title = f"Rank budget over time against its schedule, {_of(study)} ({_seeds(arms)})"
        title_above(figure, title)
    return Drawing("budget", title, f"Active ranks fall with the schedule for {', '.join(_names(arms))}.", figure)


def ranks_over_time(study: Study) -> Drawing | None:
    """Mean active rank of each kind of module, over its layers and the seeds; settings whose ranks change."""
    histories = {arm: _histories(arm) for arm in study.arms}
    arms = [arm for arm, runs in histories.items() if any(row.ranks != run[0].ranks for run in runs for row in run)]
    if not arms:
        return None
    sites = site_order(site for arm in arms for run in histories[arm] for site in run[0].ranks)
    labels = module_labels(sites)
    kinds = list(dict.fromkeys(labels[site] for site in sites))
    colours = {kind: KIND_COLOURS[i % len(KIND_COLOURS)] for i, kind in enumerate(kinds)}
    columns = min(len(arms), 2)
    rows = -(-len(arms) // columns)
    with house_style():
        figure, axes = panels(rows, columns, (9.6 if columns == 2 else 7.0, 3.3 * rows + 0.5), sharey=True)
        for ax, arm in zip(axes, arms, strict=False):
            ends = []
            for kind in kinds:
                members = [site for site in sites if labels[site] == kind]
                steps, means = _mean_series(
                    [(row.step, [row.ranks[site] for site in members if site in row.ranks]) for row in run]
                    for run in histories[arm]
                )
                if steps:
                    ax.step(steps, means, where="post", color=colours[kind], linewidth=1.9)
                    ends.append((means[-1], kind))
            ax.set_title(arm.setting)
            ax.set_xlabel("step")
            ax.set_ylim(bottom=0)
            ax.margins(x=0.0)
            _end_labels(ax, ends, colours)
        axes[0].set_ylabel("active rank, mean over layers")
        for ax in axes[len(arms) :]:
            ax.set_axis_off()
        title = f"Active rank of each kind of module over time, {_of(study)} ({_seeds(arms)})"
        title_above(figure, title)
    return Drawing("ranks-over-time", title, f"Mean rank of {', '.join(kinds)} while training.", figure)


def _histories(arm: Arm) -> list[list]:
    return [run.rank_history for run in arm.of("completed") if run.rank_history]


def _mean_series(runs: Iterable[list[tuple[int, list[float]]]]) -> tuple[list[int], list[float]]:
    """The mean at each step over the runs that have it."""
    at: dict[int, list[float]] = {}
    for run in runs:
        for step, values in run:
            at.setdefault(step, []).extend(values)
    steps = sorted(step for step, values in at.items() if values)
    return steps, [sum(at[step]) / len(at[step]) for step in steps]


def _end_labels(ax: "Axes", ends: list[tuple[float, str]], colours: dict[str, str]) -> None:
    """Each line's name at its right end, moved apart where two would overlap."""
    gap = 0.062 * ax.get_ylim()[1]
    ends = sorted(ends)
    heights = [value for value, _ in ends]
    for _ in range(200):  # neighbours that are too near push each other apart, by halves
        for i in range(len(heights) - 1):
            short = gap - (heights[i + 1] - heights[i])
            if short > 1e-9:
                heights[i], heights[i + 1] = heights[i] - short / 2, heights[i + 1] + short / 2
    lift = max(0.0, -min(heights, default=0.0))
    for (_, name), height in zip(ends, heights, strict=True):
        ax.annotate(name, (1.0, height + lift), xycoords=("axes fraction", "data"), xytext=(6, 0),
                    textcoords="offset points", va="center", fontsize=8.5, color=colours[name])  # fmt: skip


# --- how it was learned --------------------------------------------------------------------------------------------


def learning_curves(study: Study) -> Drawing | None:
    """Training loss (in bins of steps) and the metric on the selection split, means over seeds."""
    arms = [arm for arm in study.arms if any(run.train or run.evaluations for run in arm.of("completed"))]
    if not arms:
        return None
    result = next(iter(study.results()))
    split = _evaluated_split(arms, result)
    with house_style():
        figure, (left, right) = panels(1, 2, (9.8, 4.1), sharex=True)
        for arm, line in _lines(arms):
            runs = arm.of("completed")
            steps, losses = _binned([(row.step, row.loss) for row in run.train if row.loss is not None] for run in runs)
            if steps:
                left.plot(steps, losses, label=arm.setting, color=colour(arm.method), linestyle=line, linewidth=1.5)
            curves = [
                {e.step: e.metrics[result.metric] for e in run.evaluations if e.split == split and result.metric in e.metrics}
                for run in runs
            ]
            steps, means = _mean_series([(step, [value]) for step, value in curve.items()] for curve in curves)
            if not steps:
                continue
            if len(runs) > 1:
                bounds = [[curve[step] for curve in curves if step in curve] for step in steps]
                right.fill_between(steps, [min(b) for b in bounds], [max(b) for b in bounds], color=colour(arm.method),
                                   alpha=0.13, linewidth=0)  # fmt: skip
            right.plot(steps, means, label=arm.setting, color=colour(arm.method), linestyle=line, linewidth=1.5,
                       marker=MARKERS.get(arm.method, "o"), markersize=4.5)  # fmt: skip
        left.set_title("training loss")
        losses = [y for line in left.lines for y in line.get_ydata()]
        if losses and min(losses) > 0 and max(losses) > 20 * min(losses):
            left.set_yscale("log")
        right.set_title(f"{result.metric} on the {split} split (points)")
        _show_near_best(right, [y for line in right.lines for y in line.get_ydata()])
        for ax in (left, right):
            ax.set_xlabel("step")
            ax.margins(x=0.02)
        handles = {line.get_label(): line for line in [*left.lines, *right.lines] if not line.get_label().startswith("_")}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 6))
        band = "; band: lowest to highest seed" if any(len(arm.completed) > 1 for arm in arms) else ""
        title = f"Learning curves, {_of(study)} ({_seeds(arms)}{band})"
        title_above(figure, title)
    return Drawing("learning-curves", title, f"Loss and {result.metric} over steps for {', '.join(_names(arms))}.", figure)


def _evaluated_split(arms: Sequence[Arm], result: Result) -> str:
    """The selection split, or what was evaluated most often where final runs never looked at it."""
    splits = [e.split for arm in arms for run in arm.of("completed") for e in run.evaluations]
    if result.selection_split in splits or not splits:
        return result.selection_split
    return max(sorted(set(splits)), key=splits.count)


def _binned(runs: Iterable[list[tuple[int, float]]], bins: int = 60) -> tuple[list[float], list[float]]:
    points = sorted(point for run in runs for point in run)
    if not points:
        return [], []
    last = points[-1][0] or 1
    at: dict[int, list[tuple[int, float]]] = {}
    for step, loss in points:
        at.setdefault(min(step * bins // last, bins - 1), []).append((step, loss))
    return [float(np.mean([s for s, _ in b])) for b in at.values()], [float(np.mean([y for _, y in b])) for b in at.values()]


def floor_of(values: Sequence[float], room: float = 12.0) -> float:
    """Where an axis of scores begins: at the lowest, or where what lies far below the best (a collapsed run, a bare head)
    would squash the others: then 2 * room points below the best."""
    best, lowest = max(values), min(values)
    return lowest if best - lowest <= 2 * room else best - 2 * room


def _show_near_best(ax: "Axes", values: Sequence[float]) -> float:
    """Cut the axis below, see `floor_of`; the cut, which is said, or the lowest."""
    if not len(values):
        return 0.0
    best, floor = max(values), floor_of(values)
    if floor > min(values):
        ax.set_ylim(floor - 0.06 * (best - floor), best + 0.08 * (best - floor))
        ax.set_title(f"cut below {floor:.0f}", loc="right", fontsize=8.5, fontweight="normal", color=FAINT)
    return floor


def rates(study: Study) -> Drawing | None:
    """Selection score against learning rate; the best is filled, what failed or lies far below stands at the foot."""
    arms = [arm for arm in study.arms if len(arm.grid) > 1]
    if not any(rate_score(runs) is not None for arm in arms for runs in arm.grid.values()):
        return None
    result = next(iter(study.results()))
    with house_style():
        figure, (ax,) = panels(1, 1, (8.2, 4.4))
        ax.set_xscale("log")
        scores = {arm: {rate: rate_score(runs) for rate, runs in arm.grid.items()} for arm in arms}
        floor = _show_near_best(ax, [s for found in scores.values() for s in found.values() if s is not None])
        failed: list[tuple[float, Arm]] = []
        for arm, line in _lines(arms):
            shown = [(rate, score) for rate, score in scores[arm].items() if score is not None]
            failed += [(rate, arm) for rate, score in scores[arm].items() if _lost(arm.grid[rate], score)]
            style = {"color": colour(arm.method), "marker": MARKERS.get(arm.method, "o"), "markersize": 6.5}
            if shown:
                ax.plot(*zip(*shown, strict=True), label=arm.setting, linestyle=line, markerfacecolor="white", **style)
            for rate, score in shown:
                if score < floor:
                    ax.annotate(f"{score:.0f}", (rate, floor), ha="center", fontsize=8, color=style["color"])
            best = best_rate(arm)
            if best:
                ax.plot(best.rate, best.score, linestyle="", **style)
                if best.at_edge:
                    ax.annotate("edge", (best.rate, best.score), xytext=(0, 8), textcoords="offset points", ha="center",
                                fontsize=8, color=style["color"])  # fmt: skip
        for i, (rate, arm) in enumerate(sorted(failed, key=lambda pair: pair[0])):
            level = sum(1 for other, _ in failed[:i] if other == rate)
            ax.plot(rate, 0.03 + 0.05 * level, transform=ax.get_xaxis_transform(), marker="x", markersize=8,
                    markeredgewidth=2, color=colour(arm.method), linestyle="", clip_on=False)  # fmt: skip
        tried = sorted({rate for arm in arms for rate in arm.grid})
        ax.set_xticks(tried, [rate_text(rate) for rate in tried], rotation=0 if len(tried) < 9 else 45)
        ax.minorticks_off()
        ax.set_xlabel("learning rate")
        ax.set_ylabel(f"{result.metric} on the {result.selection_split} split")
        ax.margins(y=0.14)
        figure.legend(loc="outside lower center", ncols=min(len(arms), 6))
        marks = "filled: best" + (", x: failed" if failed else "")
        title = f"Score against learning rate, {_of(study)} ({marks})"
        title_above(figure, title)
    return Drawing("rates", title, f"Selection score over learning rates for {', '.join(_names(arms))}.", figure)


def _lost(runs: Sequence[Run], score: float | None) -> bool:
    return score is None and any(run.status == "failed" for run in runs)


# The figures of a report, in its order.
DRAWN = (
    rank_map,
    allocation_pair,
    stability,
    budget,
    ranks_over_time,
    importance,
    spectra,
    knock_out,
    learning_curves,
    rates,
)


# --- what they share -----------------------------------------------------------------------------------------------


@contextmanager
def house_style():
    from matplotlib import rc_context, rcParamsDefault

    with rc_context({**{k: v for k, v in rcParamsDefault.items() if k != "backend"}, **STYLE}):
        yield


def panels(rows: int, columns: int, size: tuple[float, float], **share: bool) -> tuple["Figure", np.ndarray]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **share).ravel()
    return figure, axes


def title_above(figure: "Figure", title: str) -> None:
    """Left-aligned, broken where the figure is narrower than the title."""
    width = int(figure.get_figwidth() * 13.2)
    figure.suptitle("\n".join(textwrap.wrap(title, width)), x=0.012, ha="left", fontweight="bold", color=INK)


def _lines(arms: Sequence[Arm]) -> list[tuple[Arm, str]]:
    return [(arm, LINES[turn]) for arm, turn in zip(arms, turns(arms), strict=True)]


def turns(arms: Sequence[Arm]) -> list[int]:
    """0 for the first setting of a method, 1 for its second, ...: they share the colour and differ in line style."""
    methods = [arm.method for arm in arms]
    return [methods[:i].count(method) % len(LINES) for i, method in enumerate(methods)]


def _names(arms: Sequence[Arm]) -> list[str]:
    return [arm.setting for arm in arms]


def _of(study: Study) -> str:
    return f"{study.task}, {study.model.split('/')[-1]}"


def _seeds(arms: Sequence[Arm]) -> str:
    n = sorted({len(arm.completed) for arm in arms})
    if n == [1]:
        return "one seed"
    return f"{'/'.join(map(str, n))} seeds"
