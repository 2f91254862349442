"""What a chart of report.html is made of: its panels, scales, axes, tooltips, and how Vega-Lite gets them.

Colours are those of `figures.METHOD_COLOURS`. Altair is imported when the first chart is made. Names of settings are data of
a specification, never a part of one of its expressions.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.reports.figures.style import INK, colour, floor_of
from rankwise.reports.results import Arm
from rankwise.reports.tables.table import Table

HEIGHT = 300
CROSS = "M-1,-.7L-.7,-1L0,-.3L.7,-1L1,-.7L.3,0L1,.7L.7,1L0,.3L-.7,1L-1,.7L-.3,0Z"
SHAPES = {"full": "square", "head": "triangle-down", "bitfit": "triangle-up", "lora": "circle", "adalora": "diamond",
          "dora": "cross", "adalora+dora": CROSS}  # fmt: skip
DASHES = ([1, 0], [6, 4], [2, 2], [6, 3, 2, 3])  # as figures.LINES: the first, second, ... setting of one method

CONFIG = {
    "background": "white",
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif",
    "view": {"stroke": None},
    "axis": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titleColor": INK, "labelColor": INK,
             "gridColor": "#e9e9e9", "domainColor": "#b0b0b0", "tickColor": "#b0b0b0", "titlePadding": 8},
    "legend": {"labelFontSize": 12, "labelColor": INK, "symbolSize": 90, "symbolStrokeWidth": 1.8, "title": None},
    "text": {"fontSize": 11, "fill": INK},
}  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """One drawing: its heading where a figure has several, its description, and its Vega-Lite specification."""

    heading: str
    description: str
    specification: dict
    widest: int = 860  # px


@dataclass(frozen=True)
class Chart:
    """A figure of the page: drawings, the sentences under them, and the numbers they show."""

    name: str
    title: str
    caption: tuple[str, ...]
    panels: tuple[Panel, ...]
    table: Table | None


def words(text: object) -> str:
    """Plus-minus and the minus sign of negative numbers as they are printed."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\u2212", str(text).replace("+-", "\u00b1"))


def specification_of(chart, height: int, **datasets: list[dict]) -> dict:
    """The chart as Vega-Lite, as wide as its container; the page gives its one configuration when it draws.

    The data are added afterwards, by the names that the chart gives them, for Altair would validate each number.
    """
    sized = chart.properties(width="container", height=height, autosize={"type": "fit-x", "contains": "padding"})
    specification = sized.to_dict()
    del specification["$schema"], specification["config"]
    return specification | {"datasets": {name: rows for name, rows in datasets.items() if rows}}


def colour_scale(arms: Sequence[Arm], legend: bool = True):
    import altair as alt

    scale = alt.Scale(domain=[arm.setting for arm in arms], range=[colour(arm.method) for arm in arms])
    return alt.Color("setting:N", scale=scale, legend=_legend(arms) if legend else None)


def shape_scale(arms: Sequence[Arm], legend: bool = True):
    import altair as alt

    scale = alt.Scale(domain=[arm.setting for arm in arms], range=[SHAPES.get(arm.method, "circle") for arm in arms])
    return alt.Shape("setting:N", scale=scale, legend=_legend(arms) if legend else None)


def _legend(arms: Sequence[Arm]):
    """A legend below the chart, in as many columns as fit."""
    import altair as alt

    entry = 34 + 7 * min(max(len(arm.setting) for arm in arms), 26)  # px
    return alt.Legend(orient="bottom", title=None, columns=alt.expr(f"max(1, floor(width / {entry}))"), labelLimit=180)


def hollow_for_second():
    """The second setting of a method is hollow, for they share shape and colour."""
    import altair as alt

    return alt.FillOpacity("turn:O", scale=alt.Scale(domain=[0, 1, 2, 3], range=[1, 0, 0.5, 0.25]), legend=None)


def tooltip_of(*names: str) -> list:
    import altair as alt

    titles = {"text": "value"}
    return [alt.Tooltip(f"{name}:{'N' if name in ('setting', 'text', 'verdict', 'outcome') else 'Q'}",
                        title=titles.get(name, name)) for name in names]  # fmt: skip


def bare_axis(**more):
    import altair as alt

    return alt.Axis(ticks=False, domain=False, grid=False, **more)


def score_scale(means: Sequence[float], lows: Sequence[float] = (), highs: Sequence[float] = ()):
    """The scale of an axis of scores, with some room at its ends; it is cut where `floor_of` says."""
    bottom, top = floor_of([*lows, *means]), max([*highs, *means])
    bottom = max(bottom, floor_of(means)) if floor_of(means) > min(means) else bottom
    return scale_with_air(bottom, top)


def scale_with_air(bottom: float, top: float):
    import altair as alt

    air = 0.08 * (top - bottom) or 0.5
    return alt.Scale(domain=[bottom - air, top + air], nice=False, zero=False)
