"""Heat maps of ranks, layer x kind of module: of a study's settings, of one adapter, of two beside each other."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rankwise.reports.figures.style import (
    DIFFERENCE_COLOURS,
    FAINT,
    INK,
    RANK_COLOURS,
    Drawing,
    house_style,
    panels,
    seeds_text,
    setting_names,
    subject,
    title_above,
)
from rankwise.reports.ranks.maps import RankMap
from rankwise.reports.ranks.sites import module_labels, site_order, split_site
from rankwise.reports.results import Study
from rankwise.reports.tables.cells import decimal
from rankwise.reports.tables.summaries import mean_ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def rank_map(study: Study) -> Drawing | None:
    """A heat map of each setting, layer x kind of module, with the active rank (mean over seeds) in each cell."""
    arms = [arm for arm in study.arms if arm.has_ranks]
    ranks = [{site: rank.active for site, rank in mean_ranks(arm).items()} for arm in arms]
    if not any(ranks):
        return None
    layers, kinds, others, labels = _grid(site for of_arm in ranks for site in of_arm)
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
        for ax, arm, of_arm in zip(axes, arms, ranks, strict=False):
            _rank_panel(ax, of_arm, layers, kinds, others, labels, top, small=wide > 16)
            n = len(arm.completed)
            ax.set_title(f"{arm.setting}   total {decimal(sum(of_arm.values()))}", pad=5)
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
        title = f"Active rank of each layer and module after training, {subject(study)} ({seeds})"
        title_above(figure, title)
    alt = f"Heat-map of ranks, {len(kinds)} kinds of modules by {len(layers)} layers, for {', '.join(setting_names(arms))}."
    return Drawing("rank-map", title, alt, figure, is_main=True)


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
    """One heat map: a cell for each layer and kind, below it a full-width row for each site of no layer."""
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
    """The two settings whose allocations differ most, side by side; None where all are equal."""
    allocations = [(arm, {site: rank.active for site, rank in mean_ranks(arm).items()}) for arm in study.arms if arm.has_ranks]
    pairs = [
        (sum(abs(one.get(site, 0) - other.get(site, 0)) for site in one.keys() | other.keys()), -i, -j)
        for i, (_, one) in enumerate(allocations)
        for j, (_, other) in enumerate(allocations)
        if i < j
    ]
    if not pairs or not max(pairs)[0]:
        return None
    _, i, j = max(pairs)
    (first, one), (second, other) = allocations[-i], allocations[-j]
    return side_by_side(first.setting, one, second.setting, other, f"{subject(study)} ({seeds_text([first, second])})")


def worth_map(worth: Mapping[str, tuple[float, float]], unit: str, where: str) -> Drawing:
    """A heat map of an effect at each site, its 95 % interval's half-width below it; bold where the interval leaves out zero.

    worth: site -> (effect, half-width).
    """
    layers, kinds, others, labels = _grid(worth)
    most = max((abs(value) for value, _ in worth.values()), default=0) or 1
    with house_style():
        wide = max(len(layers), 4)
        figure, (ax,) = panels(1, 1, (wide * 0.78 + 3.4, 0.52 * (len(kinds) + len(others)) + 1.7))
        effects = {site: value for site, (value, _) in worth.items()}
        _rank_panel(ax, effects, layers, kinds, others, labels, most, False, DIFFERENCE_COLOURS, -most)
        for text in list(ax.texts):
            text.remove()
        for site, (value, half) in worth.items():
            layer = split_site(site)[1]
            row = len(kinds) + others.index(site) if layer is None else kinds.index(labels[site])
            x = (len(layers) or 1) / 2 if layer is None else layers.index(layer) + 0.5
            colour = "white" if abs(value) > 0.72 * most else INK
            weight = "bold" if abs(value) > half else "normal"
            ax.text(x, row + 0.38, f"{value:+.2f}", ha="center", va="center", fontsize=8.5, color=colour, fontweight=weight)
            ax.text(x, row + 0.75, f"\u00b1{half:.2f}", ha="center", va="center", fontsize=7, color=colour)
        ax.set_xlabel("layer")
        bar = figure.colorbar(ax.collections[0], ax=ax, shrink=0.8, aspect=20, pad=0.02)
        bar.set_label(unit)
        bar.outline.set_visible(False)
        title = f"What rank is worth at each site, {where}"
        title_above(figure, title)
    alt = f"Heat-map of what rank is worth, {len(kinds)} kinds of modules by {len(layers)} layers, with 95 % intervals."
    return Drawing("worth-map", title, alt, figure, is_main=True)


def one_map(one: RankMap) -> Drawing:
    """The heat map of one run or adapter."""
    ranks = {site.site: float(site.active) for site in one.sites}
    layers, kinds, others, labels = _grid(ranks)
    wide = max(len(layers), 4)
    with house_style():
        figure, (ax,) = panels(1, 1, (wide * 0.44 + 3.2, 0.36 * (len(kinds) + len(others)) + 1.6))
        top = max(site.nominal for site in one.sites) or 1
        _rank_panel(ax, ranks, layers, kinds, others, labels, top, small=wide > 16)
        ax.set_xlabel("layer")
        title = f"Active rank of each layer and module, {one.name} (total {decimal(sum(ranks.values()))})"
        title_above(figure, title)
    return Drawing("rank-map", title, f"Heat-map of ranks, {len(kinds)} kinds of modules by {len(layers)} layers.", figure)


def _grid(sites: Iterable[str]) -> tuple[list[int], list[str], list[str], dict[str, str]]:
    """Layers, module kinds, the sites of no layer, and the label of each site."""
    sites = site_order(sites)
    labels = module_labels(sites)
    layered = [site for site in sites if split_site(site)[1] is not None]
    others = [site for site in sites if split_site(site)[1] is None]
    layers = sorted({split_site(site)[1] for site in layered})
    return layers, list(dict.fromkeys(labels[site] for site in layered)), others, labels


def side_by_side(first: str, one: dict[str, float], second: str, other: dict[str, float], where: str) -> Drawing:
    """Heat maps of two allocations and of their difference, second minus first.

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
