"""The look of all figures: one colour a method, fonts, panels, titles; how a figure is saved.

One colour a method, everywhere, from `METHOD_COLOURS` (Okabe and Ito's palette, distinct to colour-blind readers);
settings of one method differ by line style. matplotlib is imported when the first figure is drawn, without pyplot: no
global state. The same runs give the same bytes.
"""

import io
import textwrap
import zlib
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rankwise.experiments.files import write_file
from rankwise.reports.results import Arm, Study

if TYPE_CHECKING:
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
    "pdf.fonttype": 42,  # TrueType, which journals ask for, and not Type 3
}


@dataclass(frozen=True)
class Drawing:
    """A figure, the name of its files, and a description for readers who cannot see it.

    is_main: one that a paper would print, which is saved as PDF too.
    """

    name: str
    title: str
    alt: str
    figure: "Figure"
    is_main: bool = False


def save(drawing: Drawing, folder: Path) -> tuple[Path, Path]:
    """`<name>.svg` and `<name>.png`, a main figure's `<name>.pdf` too, each whole or not at all; no date and no program's
    version in them."""
    plain = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}}
    of_paper = {".pdf": {"CreationDate": None, "Creator": None, "Producer": None}} if drawing.is_main else {}
    with house_style():
        for suffix, metadata in (plain | of_paper).items():
            out = io.BytesIO()
            drawing.figure.savefig(out, format=suffix[1:], dpi=160, metadata=metadata)
            write_file(folder / f"{drawing.name}{suffix}", out.getvalue())
    return folder / f"{drawing.name}.svg", folder / f"{drawing.name}.png"


def colour(method: str) -> str:
    """A method's colour, the same in every figure; a method that METHOD_COLOURS lacks gets one by its name."""
    if method in METHOD_COLOURS:
        return METHOD_COLOURS[method]
    return OTHER_COLOURS[zlib.crc32(method.encode()) % len(OTHER_COLOURS)]


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


def line_styles(arms: Sequence[Arm]) -> list[tuple[Arm, str]]:
    return [(arm, LINES[turn]) for arm, turn in zip(arms, turns(arms), strict=True)]


def turns(arms: Sequence[Arm]) -> list[int]:
    """0 for the first setting of a method, 1 for its second, ...: they share the colour and differ in line style."""
    methods = [arm.method for arm in arms]
    return [methods[:i].count(method) % len(LINES) for i, method in enumerate(methods)]


def setting_names(arms: Sequence[Arm]) -> list[str]:
    return [arm.setting for arm in arms]


def subject(study: Study) -> str:
    return f"{study.task}, {study.model.split('/')[-1]}"


def seeds_text(arms: Sequence[Arm]) -> str:
    n = sorted({len(arm.completed) for arm in arms})
    if n == [1]:
        return "one seed"
    return f"{'/'.join(map(str, n))} seeds"


def floor_of(values: Sequence[float], room: float = 12.0) -> float:
    """Where an axis of scores begins: at the lowest value, but at most 2 * room points below the best.

    A collapsed run or a bare head, far below the others, would else leave them no room.
    """
    best, lowest = max(values), min(values)
    return lowest if best - lowest <= 2 * room else best - 2 * room
