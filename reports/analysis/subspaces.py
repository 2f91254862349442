"""LoRA's learned subspaces beside Hu et al. 2021: overlaps over ranks and seeds, and amplification."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rankwise.reports.analysis.measured import made_with, sites_by_kind, subject
from rankwise.reports.analysis.spans import Span, share, span
from rankwise.reports.figures.style import RANK_COLOURS, Drawing, house_style, panels, title_above
from rankwise.reports.papers.quoted import quoted
from rankwise.reports.tables.cells import Cell
from rankwise.reports.tables.table import Table


def pair_name(measured: dict[str, Any], pair: str) -> str:
    """ "r = 8 and r = 64, one seed"; runs of one seed start with the same first rows of A."""
    first, second = (measured["members"][member] for member in measured["pairs"][pair])
    seeds = "one seed" if first["seed"] == second["seed"] else "two seeds"
    return f"r = {first['rank']} and r = {second['rank']}, {seeds}"


def shared_dimensions(grid: np.ndarray) -> int:
    """The greatest i at which phi(i, i) is above what Hu et al. call shared, 0 if there is none."""
    above = np.flatnonzero(np.diagonal(grid) > quoted().subspaces.shared_above)
    return int(above[-1]) + 1 if len(above) else 0


def overlaps(measured: dict[str, Any]) -> Table:
    """A row for each kind of module, pair and matrix whose singular vectors are compared, and one of random matrices."""
    columns = ("module", "pair", "of", "phi(1, 1)", "phi(r1, r1)", "phi(r1, r2)", "random phi(r1, r2)", "shared dimensions")
    rows: list[tuple[Cell | Span, ...]] = []
    for kind, sites in sites_by_kind([site["name"] for site in measured["sites"]]).items():
        for key in ("start/nested", "A/nested", "A/ranks", "dW/ranks", "A/seeds", "dW/seeds"):
            of, _, pair = key.partition("/")
            widths = [measured["sites"][site]["in_features"] for site in sites]
            cells = _overlap(measured["grids"][key][sites], widths)
            rows.append((kind, pair_name(measured, pair), {"start": "A untrained"}.get(of, of), *cells))
    grid = measured["grids"]["gaussian"]
    rows.append(("-", f"r = {len(grid)} twice", "random Gaussian", *_overlap(grid[None], [measured["gaussian_width"]])))
    caption = (
        "phi(i, j): overlap of the top i and the top j right singular vectors, 0 to 1; mean over layers (least to greatest).",
        "Random subspaces of R^n overlap by max(i, j) / n, which is far from 0 in a model this narrow (GPT-3: 64 / 12,288).",
        f"Shared dimensions: the greatest i with phi(i, i) > {quoted().subspaces.shared_above}.",
        "A's of one seed share their first rows at the start: their overlap is no sign of training, that of two seeds is.",
        made_with(measured),
    )
    return Table("overlaps", "Overlap of learned subspaces (Hu et al. 2021, sec. 7.2)", columns, tuple(rows), caption, 3)


def _overlap(grids: np.ndarray, widths: Sequence[int]) -> tuple[Cell | Span, ...]:
    """phi(1, 1), phi(r1, r1), phi(r1, r2), the last of random subspaces, and shared dimensions; grids: (sites, r1, r2)."""
    _, small, large = grids.shape
    spans = [span(grids[:, i - 1, j - 1], share) for i, j in ((1, 1), (small, small), (small, large))]
    random = span([max(small, large) / width for width in widths], share)
    return (*spans, random, span([shared_dimensions(grid) for grid in grids]))


def amplifications(measured: dict[str, Any]) -> Table:
    """A row for each kind of module and rank, the paper's two rows below."""
    columns = ("weight", "rank", "inside dW", "inside W", "inside random", "|W|", "|dW|", "factor")
    keys = ("of_update", "of_weight", "of_random", "weight_norm", "update_norm", "factor")
    rows: list[tuple[Cell | Span, ...]] = []
    ranks = {member["rank"]: member["seed"] for member in reversed(measured["members"])}  # the first seed of each rank
    for kind, sites in sites_by_kind([site["name"] for site in measured["sites"]]).items():
        names = {measured["sites"][i]["name"] for i in sites}
        for rank, seed in sorted(ranks.items()):
            of = [r for r in measured["amplification"] if r["site"] in names and (r["rank"], r["seed"]) == (rank, seed)]
            rows.append((kind, rank, *(span([row[key] for row in of]) for key in keys)))
    paper = quoted().amplification
    for row in paper.rows:
        factor = row.update_norm / row.of_update
        cells = (row.of_update, row.of_weight, row.of_random, row.weight_norm, row.update_norm, factor)
        rows.append(("the paper's W_q", row.rank, *(span([value]) for value in cells)))
    printed = " and ".join(f"{row.factor:g}" for row in paper.rows)
    quotients = " and ".join(f"{row.update_norm:.2f} / {row.of_update:.2f}" for row in paper.rows)
    caption = (
        "|U^T W V|_F with the top r singular vectors U, V of dW, of W, and of a random matrix; factor = |dW| / inside dW.",
        "Mean over layers (least to greatest). One alpha for all ranks, so that the scale falls as the rank grows.",
        f"The paper's: {paper.weight} ({paper.table}); its factors {printed} are {quotients}.",
        made_with(measured),
    )
    title = "How much dW amplifies what W holds in dW's directions (Hu et al. 2021, sec. 7.3, Table 7)"
    return Table("amplification", title, columns, tuple(rows), caption, 1)


def _heat(ax: Any, grid: np.ndarray, title: str, names: tuple[str, str]) -> Any:
    """A panel: i upwards, j to the right, one colour scale from 0 to 1."""
    small, large = grid.shape
    extent = (0.5, large + 0.5, 0.5, small + 0.5)
    colours = {"cmap": RANK_COLOURS, "vmin": 0, "vmax": 1}
    shown = ax.imshow(grid, origin="lower", aspect="auto", extent=extent, interpolation="nearest", **colours)
    ax.grid(False)
    for axis, size in ((ax.xaxis, large), (ax.yaxis, small)):
        axis.set_ticks(sorted({1, *(round(size * part / 4) for part in range(1, 5))} - {0}))
    ax.set_title(title)
    ax.set_xlabel(names[1])
    ax.set_ylabel(names[0])
    return shown


def _heats(
    name: str,
    title: str,
    alt: str,
    grid: Sequence[Sequence[tuple[np.ndarray, str, tuple[str, str]]]],
    size: tuple[float, float],
) -> Drawing:
    with house_style():
        figure, axes = panels(len(grid), len(grid[0]), size)
        for ax, cell in zip(axes, (cell for row in grid for cell in row), strict=True):
            shown = _heat(ax, *cell)
        bar = figure.colorbar(shown, ax=list(axes), shrink=0.85, aspect=28, pad=0.015)
        bar.set_label("phi(i, j)")
        bar.outline.set_visible(False)
        title_above(figure, title)
    return Drawing(name, title, alt, figure)


def _axes_names(measured: dict[str, Any], pair: str) -> tuple[str, str]:
    first, second = (measured["members"][member] for member in measured["pairs"][pair])
    return f"i  (r = {first['rank']}, seed {first['seed']})", f"j  (r = {second['rank']}, seed {second['seed']})"


def _cells(measured: dict[str, Any], keys: dict[str, str]) -> list[list[tuple[np.ndarray, str, tuple[str, str]]]]:
    """A row for each kind of module, a panel for each grid: its mean over layers, a title, the axes' names."""
    return [
        [
            (measured["grids"][key][sites].mean(0), f"{kind}: {words}", _axes_names(measured, key.partition("/")[2]))
            for key, words in keys.items()
        ]
        for kind, sites in sites_by_kind([site["name"] for site in measured["sites"]]).items()
    ]


def ranks_figure(measured: dict[str, Any]) -> Drawing:
    """Two ranks, as the paper's Figure 3: two seeds, one seed, and one seed before any training."""
    keys = {"A/ranks": "two seeds", "A/nested": "one seed", "start/nested": "one seed, untrained"}
    cells = _cells(measured, keys)
    title = f"Overlap of A learned at two ranks, mean over layers, {subject(measured)}"
    alt = f"Heat-maps of phi(i, j) for {pair_name(measured, 'ranks')}, for one seed, and for one seed untrained."
    return _heats("subspace-ranks", title, alt, cells, (12.4, 2.5 * len(cells) + 0.5))


def seeds_figure(measured: dict[str, Any]) -> Drawing:
    """Two seeds, as the paper's Figure 4: each kind of module, and two random matrices."""
    cells = [cell for row in _cells(measured, {"A/seeds": "A"}) for cell in row]
    cells.append((measured["grids"]["gaussian"], "random Gaussian", ("i", "j")))
    title = f"Overlap of A learned from two seeds, mean over layers, {subject(measured)}"
    alt = f"Heat-maps of phi(i, j) for {pair_name(measured, 'seeds')}, and for two random Gaussian matrices."
    return _heats("subspace-seeds", title, alt, [cells], (4.1 * len(cells), 3.9))


def updates_figure(measured: dict[str, Any]) -> Drawing:
    """The same two comparisons for dW, whose right singular vectors are the directions of A that B uses."""
    cells = _cells(measured, {"dW/ranks": "two ranks", "dW/seeds": "two seeds"})
    title = f"Overlap of dW's right singular vectors, mean over layers, {subject(measured)}"
    alt = f"Heat-maps of phi(i, j) of dW for {pair_name(measured, 'ranks')}, and for {pair_name(measured, 'seeds')}."
    return _heats("subspace-updates", title, alt, cells, (9.6, 3.1 * len(cells) + 0.5))


def subspace_sentences(measured: dict[str, Any]) -> list[str]:
    """What was measured beside what the paper reports, a sentence each."""
    labels = sites_by_kind([site["name"] for site in measured["sites"]])
    grids, out = measured["grids"], []
    for of in ("A", "dW"):
        at = {kind: grids[f"{of}/ranks"][sites] for kind, sites in labels.items()}
        first = ", ".join(f"{kind} {span(g[:, 0, 0], share)}" for kind, g in at.items())
        shared = ", ".join(f"{kind} {np.mean([shared_dimensions(g) for g in gs]):.1f}" for kind, gs in at.items())
        out.append(
            f"{of} of {pair_name(measured, 'ranks')}: phi(1, 1) is {first}; dimensions that share more than "
            f"{quoted().subspaces.shared_above}, mean over layers: {shared} (paper, of A: one)."
        )
    whole = span(grids["start/nested"][:, -1, -1], share)
    firsts = ", ".join(
        f"{kind} {grids['start/nested'][sites, 0, 0].mean():.2f} and {grids['A/nested'][sites, 0, 0].mean():.2f}"
        for kind, sites in labels.items()
    )
    out.append(
        f"A of {pair_name(measured, 'nested')}: the smaller one lies inside the larger one before any training (phi(r1, r2) "
        f"{whole}), so that large overlaps of this pair are no sign of training; phi(1, 1) before and after it is {firsts}."
    )
    for of in ("A", "dW"):
        at = {kind: grids[f"{of}/seeds"][sites] for kind, sites in labels.items()}
        over = {kind: excess(g.mean(0), measured["gaussian_width"]) for kind, g in at.items()}
        text = ", ".join(
            f"{kind} {over[kind]:+.3f} (phi(1, 1) {span(g[:, 0, 0], share)}; shared dimensions "
            f"{np.mean([shared_dimensions(one) for one in g]):.1f})"
            for kind, g in at.items()
        )
        random = excess(grids["gaussian"], measured["gaussian_width"])
        out.append(
            f"{of} of {pair_name(measured, 'seeds')}: phi(i, i) above that of random subspaces, mean over i: {text}; two "
            f"Gaussians {random:+.3f}; {max(over, key=over.get)} shares more (paper, of A: query more than value, Gaussians "
            f"nothing)."
        )
    ours = {row[:2]: row for row in amplifications(measured).rows}
    paper = quoted().amplification
    paper_factors = ", ".join(f"{row.factor:g} at r = {row.rank}" for row in paper.rows)
    paper_over_random = ", ".join(f"{row.over_random:.2g} at r = {row.rank}" for row in paper.rows)
    for kind in labels:
        of_kind = [row for (name, _), row in ours.items() if name == kind]
        factors = ", ".join(f"{row[-1].mean:.3g} at r = {row[1]}" for row in of_kind)
        beside = ", ".join(f"{row[2].mean / row[4].mean:.2f} at r = {row[1]}" for row in of_kind)
        means = [row[-1].mean for row in of_kind]
        falls = (
            "falls with the rank, as in the paper" if means == sorted(means, reverse=True) else "does not fall with the rank"
        )
        out.append(
            f"{kind}: the amplification factor is {factors} (paper: {paper_factors}) and {falls}. W holds in dW's "
            f"directions {beside} times what it holds in random ones (paper: {paper_over_random})."
        )
    return out


def excess(grid: np.ndarray, width: int) -> float:
    """Mean over i of phi(i, i) - i / width: the overlap of a square grid beyond that of two random subspaces."""
    sizes = np.arange(1, len(grid) + 1)
    return float((np.diagonal(grid) - sizes / width).mean())
