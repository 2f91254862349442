"""LoRA's subspaces and DoRA's magnitudes and directions beside the papers: figures and tables of `experiments.analysis`.

rankwise analysis report DIR --out DIR        (writes analysis.md, figures/ and tables/)

Only the files that `experiments.analysis` wrote are read here, nothing is trained.  Means and ranges are over layers (of
correlations: over seeds), and say nothing of other models, tasks or lengths of training.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Any,
    NotRequired,  # pydantic reads typing's own from Python 3.12 on alone
)

import numpy as np
from pydantic import TypeAdapter, ValidationError
from rankwise.experiments.files import write_file
from rankwise.reports.figures import FAINT, INK, RANK_COLOURS, Drawing, colour, house_style, panels, save, title_above
from rankwise.reports.ranks import module_labels, split_site
from rankwise.reports.tables import Cell, Table, escape_markdown
from typing_extensions import TypedDict

SCHEMA = 1
KINDS = ("subspace", "magnitude")
SHARED = 0.5  # Hu et al. 2021, sec. 7.2: "normalized similarity > 0.5" is what they call shared
INTRUDER = 0.5  # greatest |cosine| below which a singular vector counts as an intruder here; the data allow any other
WORDS = {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}
# Liu et al. 2024, sec. 3.2: corr(dD, dM) over the query matrices of 6 layers at 4 checkpoints of VL-BART.
PAPER_CORRELATION = {"full": -0.62, "lora": 0.83, "dora": -0.31}
# Hu et al. 2021, Table 7: W_q of GPT-3's layer 48.  |U^T W V|_F for U, V of dW, of W, random; |W|_F, |dW|_F.
PAPER_AMPLIFICATION = {4: (0.32, 21.67, 0.02, 61.95, 6.91), 64: (1.90, 37.71, 0.33, 61.95, 3.57)}
CHECKPOINT_MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Span:
    """A mean, and the least and the greatest of what it is over."""

    mean: float
    low: float
    high: float
    show: Callable[[float], str]

    def __str__(self) -> str:
        mean, low, high = map(self.show, (self.mean, self.low, self.high))
        return mean if low == high else f"{mean} ({low} to {high})"


def three(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3g}"


def share(value: float) -> str:
    return f"{value:.2f}"


def signed(value: float) -> str:
    return f"{value:+.2f}"


def span(values: Iterable[float], show: Callable[[float], str] = three) -> Span:
    values = list(values)
    return Span(float(np.mean(values)), float(min(values)), float(max(values)), show)


# -- what is read -------------------------------------------------------------------------------------------------------


class Made(TypedDict):
    """What both analyses say of themselves, as far as it is read here."""

    model: str
    task: str
    metric: str
    split: str
    captions: list[str]
    methods: list[dict[str, Any]]
    training: dict[str, Any]
    versions: dict[str, str]
    device_name: str
    precision: str
    commit: str | None
    dirty: bool | None
    files_sha256: dict[str, str]


class Member(TypedDict):
    rank: int
    seed: int
    score: float | None


class Site(TypedDict):
    name: str
    in_features: int


class Amplified(TypedDict):
    site: str
    rank: int
    seed: int
    of_update: float
    of_weight: float
    of_random: float
    weight_norm: float
    update_norm: float
    factor: float


class Subspace(Made):
    members: list[Member]
    sites: list[Site]
    gaussian_width: int
    pairs: dict[str, list[int]]  # two members
    amplification: list[Amplified]


class Ended(TypedDict):
    method: str
    seed: int
    score: float | None


class Move(TypedDict):
    method: str
    seed: int
    step: int
    site: str
    dM_rows: float
    dD_rows: float
    dM_columns: float
    dD_columns: float
    familiarity: NotRequired[list[float]]


class Magnitude(Made):
    runs: list[Ended]
    snapshots: list[int]
    sites: list[str]
    moves: list[Move]


WRITTEN = {"subspace": TypeAdapter(Subspace), "magnitude": TypeAdapter(Magnitude)}


# -- reading ------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """What `experiments.analysis` left in a folder, by kind; the grids of subspace.npz under "grids".

    Raises:
        ValueError: there is nothing, or something that is not what it should be.
    """
    found = {kind: _read(folder, kind) for kind in KINDS if (folder / f"{kind}.json").is_file()}
    if not found:
        raise ValueError(f"{folder}: neither subspace.json nor magnitude.json: give what `rankwise analysis` wrote")
    return found


def _read(folder: Path, kind: str) -> dict[str, Any]:
    path, again = folder / f"{kind}.json", f"make it again with `rankwise analysis {kind}`"
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}): {again}") from None
    if not isinstance(found, dict) or (found.get("schema"), found.get("kind")) != (SCHEMA, kind):
        raise ValueError(f"{path}: no {kind} analysis of schema {SCHEMA}: {again}")
    try:
        WRITTEN[kind].validate_python(found, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise ValueError(f"{path}: {place}: {fault['msg'][0].lower()}{fault['msg'][1:]}: {again}") from None
    for name, digest in found["files_sha256"].items():
        try:
            content = (folder / name).read_bytes()
        except FileNotFoundError:
            raise ValueError(f"{folder / name}: missing, and {path.name} speaks of it: {again}") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{folder / name}: not the file that {path.name} speaks of: {again}")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            found["grids"] = {key: archive[key].astype(np.float64) for key in archive.files}
    return found


def _labels(sites: Sequence[str]) -> dict[str, list[int]]:
    """Kind of module -> where its sites stand in `sites`."""
    labels = module_labels(sites)
    return {kind: [i for i, site in enumerate(sites) if labels[site] == kind] for kind in dict.fromkeys(labels.values())}


# -- subspaces ----------------------------------------------------------------------------------------------------------


def pair_name(found: dict[str, Any], pair: str) -> str:
    """ "r = 8 and r = 64, one seed": that is, with starts that share rows."""
    first, second = (found["members"][member] for member in found["pairs"][pair])
    seeds = "one seed" if first["seed"] == second["seed"] else "two seeds"
    return f"r = {first['rank']} and r = {second['rank']}, {seeds}"


def shared_dimensions(grid: np.ndarray) -> int:
    """The greatest i with phi(i, i) > 0.5, 0 if there is none."""
    above = np.flatnonzero(np.diagonal(grid) > SHARED)
    return int(above[-1]) + 1 if len(above) else 0


def overlaps(found: dict[str, Any]) -> Table:
    """A row for each kind of module, pair and matrix whose singular vectors are compared, and one of random matrices."""
    columns = ("module", "pair", "of", "phi(1, 1)", "phi(r1, r1)", "phi(r1, r2)", "random phi(r1, r2)", "shared dimensions")
    rows: list[tuple[Cell | Span, ...]] = []
    for kind, sites in _labels([site["name"] for site in found["sites"]]).items():
        for key in ("start/nested", "A/nested", "A/ranks", "dW/ranks", "A/seeds", "dW/seeds"):
            of, _, pair = key.partition("/")
            widths = [found["sites"][site]["in_features"] for site in sites]
            cells = _overlap(found["grids"][key][sites], widths)
            rows.append((kind, pair_name(found, pair), {"start": "A untrained"}.get(of, of), *cells))
    grid = found["grids"]["gaussian"]
    rows.append(("-", f"r = {len(grid)} twice", "random Gaussian", *_overlap(grid[None], [found["gaussian_width"]])))
    caption = (
        "phi(i, j): overlap of the top i and the top j right singular vectors, 0 to 1; mean over layers (least to greatest).",
        "Random subspaces of R^n overlap by max(i, j) / n, which is far from 0 in a model this narrow (GPT-3: 64 / 12,288).",
        f"Shared dimensions: the greatest i with phi(i, i) > {SHARED}.",
        "A's of one seed share their first rows at the start: their overlap is no sign of training, that of two seeds is.",
        _made(found),
    )
    return Table("overlaps", "Overlap of learned subspaces (Hu et al. 2021, sec. 7.2)", columns, tuple(rows), caption, 3)


def _overlap(grids: np.ndarray, widths: Sequence[int]) -> tuple[Cell | Span, ...]:
    """phi(1, 1), phi(r1, r1), phi(r1, r2), what random subspaces have there, and shared dimensions: of (sites, r1, r2)."""
    _, small, large = grids.shape
    spans = [span(grids[:, i - 1, j - 1], share) for i, j in ((1, 1), (small, small), (small, large))]
    random = span([max(small, large) / width for width in widths], share)
    return (*spans, random, span([shared_dimensions(grid) for grid in grids]))


def amplifications(found: dict[str, Any]) -> Table:
    """A row for each kind of module and rank, the paper's two rows below."""
    columns = ("weight", "rank", "inside dW", "inside W", "inside random", "|W|", "|dW|", "factor")
    keys = ("of_update", "of_weight", "of_random", "weight_norm", "update_norm", "factor")
    rows: list[tuple[Cell | Span, ...]] = []
    ranks = {member["rank"]: member["seed"] for member in reversed(found["members"])}  # the first seed of each rank
    for kind, sites in _labels([site["name"] for site in found["sites"]]).items():
        names = {found["sites"][i]["name"] for i in sites}
        for rank, seed in sorted(ranks.items()):
            of = [r for r in found["amplification"] if r["site"] in names and (r["rank"], r["seed"]) == (rank, seed)]
            rows.append((kind, rank, *(span([row[key] for row in of]) for key in keys)))
    for rank, values in PAPER_AMPLIFICATION.items():
        cells = (*values, values[-1] / values[0])
        rows.append(("the paper's W_q", rank, *(span([value]) for value in cells)))
    caption = (
        "|U^T W V|_F with the top r singular vectors U, V of dW, of W, and of a random matrix; factor = |dW| / inside dW.",
        "Mean over layers (least to greatest). One alpha for all ranks, so that the scale falls as the rank grows.",
        "The paper's: layer 48 of GPT-3 (Table 7); its factors 21.5 and 1.9 are 6.91 / 0.32 and 3.57 / 1.90.",
        _made(found),
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


def _axes_names(found: dict[str, Any], pair: str) -> tuple[str, str]:
    first, second = (found["members"][member] for member in found["pairs"][pair])
    return f"i  (r = {first['rank']}, seed {first['seed']})", f"j  (r = {second['rank']}, seed {second['seed']})"


def _cells(found: dict[str, Any], keys: dict[str, str]) -> list[list[tuple[np.ndarray, str, tuple[str, str]]]]:
    """A row for each kind of module, a panel for each grid: its mean over layers, a title, the axes' names."""
    return [
        [
            (found["grids"][key][sites].mean(0), f"{kind}: {words}", _axes_names(found, key.partition("/")[2]))
            for key, words in keys.items()
        ]
        for kind, sites in _labels([site["name"] for site in found["sites"]]).items()
    ]


def ranks_figure(found: dict[str, Any]) -> Drawing:
    """Two ranks, as the paper's Figure 3: two seeds, one seed, and one seed before any training."""
    keys = {"A/ranks": "two seeds", "A/nested": "one seed", "start/nested": "one seed, untrained"}
    cells = _cells(found, keys)
    title = f"Overlap of A learned at two ranks, mean over layers, {_of(found)}"
    alt = f"Heat-maps of phi(i, j) for {pair_name(found, 'ranks')}, for one seed, and for one seed untrained."
    return _heats("subspace-ranks", title, alt, cells, (12.4, 2.5 * len(cells) + 0.5))


def seeds_figure(found: dict[str, Any]) -> Drawing:
    """Two seeds, as the paper's Figure 4: each kind of module, and two random matrices."""
    cells = [cell for row in _cells(found, {"A/seeds": "A"}) for cell in row]
    cells.append((found["grids"]["gaussian"], "random Gaussian", ("i", "j")))
    title = f"Overlap of A learned from two seeds, mean over layers, {_of(found)}"
    alt = f"Heat-maps of phi(i, j) for {pair_name(found, 'seeds')}, and for two random Gaussian matrices."
    return _heats("subspace-seeds", title, alt, [cells], (4.1 * len(cells), 3.9))


def updates_figure(found: dict[str, Any]) -> Drawing:
    """The same two comparisons for dW, whose directions are those of A that B makes use of."""
    cells = _cells(found, {"dW/ranks": "two ranks", "dW/seeds": "two seeds"})
    title = f"Overlap of dW's right singular vectors, mean over layers, {_of(found)}"
    alt = f"Heat-maps of phi(i, j) of dW for {pair_name(found, 'ranks')}, and for {pair_name(found, 'seeds')}."
    return _heats("subspace-updates", title, alt, cells, (9.6, 3.1 * len(cells) + 0.5))


def subspace_sentences(found: dict[str, Any]) -> list[str]:
    """What was seen, against what the paper says."""
    labels = _labels([site["name"] for site in found["sites"]])
    grids, out = found["grids"], []
    for of in ("A", "dW"):
        at = {kind: grids[f"{of}/ranks"][sites] for kind, sites in labels.items()}
        first = ", ".join(f"{kind} {span(g[:, 0, 0], share)}" for kind, g in at.items())
        shared = ", ".join(f"{kind} {np.mean([shared_dimensions(g) for g in gs]):.1f}" for kind, gs in at.items())
        out.append(
            f"{of} of {pair_name(found, 'ranks')}: phi(1, 1) is {first}; dimensions that share more than {SHARED}, mean over "
            f"layers: {shared} (paper, of A: one)."
        )
    whole = span(grids["start/nested"][:, -1, -1], share)
    firsts = ", ".join(
        f"{kind} {grids['start/nested'][sites, 0, 0].mean():.2f} and {grids['A/nested'][sites, 0, 0].mean():.2f}"
        for kind, sites in labels.items()
    )
    out.append(
        f"A of {pair_name(found, 'nested')}: the smaller one lies inside the larger one before any training (phi(r1, r2) "
        f"{whole}), so that large overlaps of this pair are no sign of training; phi(1, 1) before and after it is {firsts}."
    )
    for of in ("A", "dW"):
        at = {kind: grids[f"{of}/seeds"][sites] for kind, sites in labels.items()}
        over = {kind: excess(g.mean(0), found["gaussian_width"]) for kind, g in at.items()}
        text = ", ".join(
            f"{kind} {over[kind]:+.3f} (phi(1, 1) {span(g[:, 0, 0], share)}; shared dimensions "
            f"{np.mean([shared_dimensions(one) for one in g]):.1f})"
            for kind, g in at.items()
        )
        random = excess(grids["gaussian"], found["gaussian_width"])
        out.append(
            f"{of} of {pair_name(found, 'seeds')}: phi(i, i) above that of random subspaces, mean over i: {text}; two "
            f"Gaussians {random:+.3f}; {max(over, key=over.get)} shares more (paper, of A: query more than value, Gaussians "
            f"nothing)."
        )
    ours = {row[:2]: row for row in amplifications(found).rows}
    for kind in labels:
        mine = [row for (name, _), row in ours.items() if name == kind]
        factors = ", ".join(f"{row[-1].mean:.3g} at r = {row[1]}" for row in mine)
        beside = ", ".join(f"{row[2].mean / row[4].mean:.2f} at r = {row[1]}" for row in mine)
        means = [row[-1].mean for row in mine]
        falls = (
            "falls with the rank, as in the paper" if means == sorted(means, reverse=True) else "does not fall with the rank"
        )
        out.append(
            f"{kind}: the amplification factor is {factors} (paper: 21.5 at r = 4, 1.9 at r = 64) and {falls}. W holds in dW's "
            f"directions {beside} times what it holds in random ones (paper: 16 at r = 4, 5.8 at r = 64)."
        )
    return out


def excess(grid: np.ndarray, width: int) -> float:
    """Mean over i of phi(i, i) - i / width: how far above two random subspaces a square grid lies."""
    sizes = np.arange(1, len(grid) + 1)
    return float((np.diagonal(grid) - sizes / width).mean())


# -- magnitudes and directions ------------------------------------------------------------------------------------------


def correlation(rows: Sequence[dict[str, Any]], convention: str = "rows") -> float | None:
    """Pearson's, of dD and dM; None where it has no value."""
    dD, dM = (np.array([row[f"{key}_{convention}"] for row in rows]) for key in ("dD", "dM"))
    if len(rows) < 3 or not dD.std() or not dM.std():
        return None
    return float(np.corrcoef(dD, dM)[0, 1])


def correlations_of(
    found: dict[str, Any], method: str, kind: str, convention: str = "rows", keep: Callable[[dict], bool] = lambda row: True
) -> list[float]:
    """One for each seed, over the sites of that kind and the snapshots that `keep` lets through."""
    labels = module_labels(found["sites"])
    mine = [row for row in found["moves"] if row["method"] == method and labels[row["site"]] == kind and keep(row)]
    each = [correlation([row for row in mine if row["seed"] == seed], convention) for seed in _seeds(found)]
    return [value for value in each if value is not None]


def _seeds(found: dict[str, Any]) -> list[int]:
    return sorted({row["seed"] for row in found["moves"]})


def _methods(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in found["moves"]))


def correlations(found: dict[str, Any]) -> Table:
    """A row for each method and kind of module."""
    columns = ("method", "module", "seeds", "correlation", "last snapshot", "per column", "paper", "dD last", "dM last")
    columns += ("intruders",)
    last = found["snapshots"][-1]
    rows: list[tuple[Cell | Span, ...]] = []
    for method in _methods(found):
        for kind, sites in _labels(found["sites"]).items():
            names = {found["sites"][i] for i in sites}
            ends = [r for r in found["moves"] if r["method"] == method and r["site"] in names and r["step"] == last]
            values = (
                correlations_of(found, method, kind),
                correlations_of(found, method, kind, keep=lambda row: row["step"] == last),
                correlations_of(found, method, kind, "columns"),
            )
            spans = [span(of, signed) if of else None for of in values]
            paper = PAPER_CORRELATION.get(method) if kind == "query" else None
            intruders = [sum(value < INTRUDER for value in row["familiarity"]) for row in ends]
            moved = [span([row[f"{key}_rows"] for row in ends]) for key in ("dD", "dM")]
            rows.append((method, kind, len(_seeds(found)), *spans, paper, *moved, span(intruders)))
    layers = len(found["sites"]) // max(1, len(_labels(found["sites"])))
    looked = len(next(row["familiarity"] for row in found["moves"] if "familiarity" in row))
    caption = (
        f"Correlation of dD and dM over {layers} layers and {len(found['snapshots'])} snapshots (steps "
        f"{', '.join(map(str, found['snapshots']))}), a seed at a time: mean (least to greatest) over seeds.",
        "Last snapshot: over the layers alone. Both dM and dD grow while training, which by itself makes the first positive.",
        "Norms are of output rows, as PEFT's DoRA takes them; per column: of columns, as DoRA's paper writes them.",
        "Paper: Liu et al. 2024, sec. 3.2, VL-BART, query matrices.",
        f"Intruders: of the top {looked} left singular vectors of the tuned weight those whose cosine with every pre-trained "
        f"one is below {INTRUDER}; mean (least to greatest) over layers and seeds (Shuttleworth et al. 2024).",
        _made(found),
    )
    title = "Size and direction of the weight's rows (Liu et al. 2024, sec. 3.2)"
    return Table("correlations", title, columns, tuple(rows), caption, 2)


def movement_figure(found: dict[str, Any]) -> Drawing:
    """dM against dD of one seed, as the paper's Figure 2: a panel a method, a row a kind of module, a line a layer."""
    methods, sites, steps, seed = _methods(found), _labels(found["sites"]), found["snapshots"], _seeds(found)[0]
    with house_style():
        figure, axes = panels(len(sites), len(methods), (3.7 * len(methods), 3.3 * len(sites) + 0.7))
        for ax, (kind, method) in zip(axes, ((k, m) for k in sites for m in methods), strict=True):
            for i in sites[kind]:
                name = found["sites"][i]
                path = [r for r in found["moves"] if (r["method"], r["seed"], r["site"]) == (method, seed, name)]
                points = [(row["dD_rows"], row["dM_rows"]) for row in path]
                ax.plot(*zip(*points, strict=True), color=FAINT, linewidth=0.8, zorder=1)
                for at, point in enumerate(points):
                    marker = CHECKPOINT_MARKERS[at % len(CHECKPOINT_MARKERS)]
                    ax.plot(*point, marker=marker, color=colour(method), markersize=5, linestyle="")
                layer = split_site(name)[1]
                ax.annotate(f" {layer}", points[-1], fontsize=8, color=INK, va="center")
            values = correlations_of(found, method, kind, keep=lambda row: row["seed"] == seed)
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
        title = f"Change of size (dM) against change of direction (dD), with their correlation, {_of(found)} (seed {seed})"
        title_above(figure, title)
    alt = f"Scatter of dM against dD for {', '.join(methods)}, a line a layer, a marker a snapshot."
    return Drawing("movement", title, alt, figure)


def magnitude_sentences(found: dict[str, Any]) -> list[str]:
    """What was seen, against what the papers say."""
    out, last = [], found["snapshots"][-1]
    for method in _methods(found):
        for kind in _labels(found["sites"]):
            values = correlations_of(found, method, kind)
            if not values:
                continue
            ends = correlations_of(found, method, kind, keep=lambda row: row["step"] == last)
            paper = PAPER_CORRELATION.get(method) if kind == "query" else None
            beside = ""
            if paper is not None:
                agree = "the same sign" if (np.mean(values) > 0) == (paper > 0) else "the opposite sign"
                beside = f" (paper {paper:+.2f}: {agree})"
            alone = f"; over layers at the last snapshot alone {signed(np.mean(ends))}" if ends else ""
            name = WORDS.get(method, method)
            out.append(f"{name}, {kind}: the correlation of dD and dM is {signed(np.mean(values))}{beside}{alone}.")
    moved = {
        method: [row["dD_rows"] for row in found["moves"] if row["method"] == method and row["step"] == last]
        for method in _methods(found)
    }
    order = sorted(moved, key=lambda method: np.mean(moved[method]))
    text = ", ".join(f"{WORDS.get(method, method)} {np.mean(moved[method]):.2g}" for method in order)
    out.append(f"Directions turn least to most (mean dD at the end): {text} (paper: full fine-tuning, LoRA, DoRA).")
    counts = {row[:2]: row[-1].mean for row in correlations(found).rows}
    text = ", ".join(f"{WORDS.get(method, method)} {kind} {count:.2g}" for (method, kind), count in counts.items())
    out.append(f"Intruder dimensions a matrix: {text} (Shuttleworth et al. 2024: LoRA has them, full fine-tuning hardly any).")
    return out


# -- the page -----------------------------------------------------------------------------------------------------------


def _of(found: dict[str, Any]) -> str:
    return f"{found['task']}, {found['model'].rstrip('/').split('/')[-1]}"


def _made(found: dict[str, Any]) -> str:
    """Where the numbers come from."""
    training = found["training"]
    where = "an unknown commit" if found["commit"] is None else f"commit {found['commit'][:7]}"
    rates = ", ".join(f"{entry['label']} {entry['learning_rates'][0]:g}" for entry in found["methods"])
    return (
        f"Made with {found['model']} on {found['task']}: {training['max_steps']} steps of {training['batch_size']} rows out of "
        f"{training['train_examples']}, rates not tuned ({rates}), {found['precision']} on {found['device_name']}, torch "
        f"{found['versions']['torch']}, {where}{' with changes' if found['dirty'] else ''}."
    )


def _scores(found: dict[str, Any]) -> str:
    """How well the runs did that were looked at."""

    def one(run: dict[str, Any]) -> str:
        name = run.get("method") or f"r {run['rank']}"
        return f"{name} seed {run['seed']} " + ("without a value" if run["score"] is None else f"{run['score']:.1f}")

    runs = found["members"] if found["kind"] == "subspace" else found["runs"]
    return f"Scores at the end ({found['metric']} on a part of the {found['split']} split): {', '.join(map(one, runs))}."


def write(found: dict[str, dict[str, Any]], out: Path) -> Path:
    """analysis.md with its figures (SVG, PNG) and tables (CSV, LaTeX); the path of the page."""
    parts = ["# What training did to the weights\n"]
    if "subspace" in found:
        one = found["subspace"]
        drawings = [ranks_figure(one), seeds_figure(one), updates_figure(one)]
        parts += _section("LoRA's subspaces", subspace_sentences(one), drawings, [overlaps(one), amplifications(one)], one, out)
    if "magnitude" in found:
        one = found["magnitude"]
        sentences = magnitude_sentences(one)
        parts += _section("Sizes and directions", sentences, [movement_figure(one)], [correlations(one)], one, out)
    path = out / "analysis.md"
    write_file(path, "\n".join(parts))
    return path


def _section(
    title: str,
    sentences: Sequence[str],
    drawings: Sequence[Drawing],
    tables: Sequence[Table],
    found: dict[str, Any],
    out: Path,
) -> list[str]:
    parts = [f"## {title}\n", "".join(f"- {escape_markdown(line)}\n" for line in (*sentences, _scores(found)))]
    for drawing in drawings:
        save(drawing, out / "figures")
        parts.append(f"![{drawing.alt}](figures/{drawing.name}.png)\n")
    for table in tables:
        write_file(out / "tables" / f"{table.name}.csv", table.csv())
        write_file(out / "tables" / f"{table.name}.tex", table.latex())
        notes = "".join(f"- {escape_markdown(sentence)}\n" for sentence in table.caption)
        parts.append(f"### {escape_markdown(table.title)}\n\n{table.markdown()}\n{notes}")
    parts.append("".join(f"{escape_markdown(caption)}\n" for caption in found["captions"]))
    return parts
