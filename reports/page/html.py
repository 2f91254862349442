"""report.html: one self-contained page of a study, which opens from disk and asks no network for anything.

It has the same sections as report.md (report.py makes them). It holds the JavaScript of Vega, Vega-Lite and Vega-Embed once
and the figures as JSON (charts/); its own script (templates/report.js) sorts tables and changes the rank map. Everything that
comes from a run is escaped: text by jinja2, JSON by its `tojson`. The same runs give the same bytes.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from rankwise.reports.figures.style import colour
from rankwise.reports.page import charts
from rankwise.reports.results import Study
from rankwise.reports.tables.cells import Cell, Cost, Estimate, Rank, SweepScore, cell_text
from rankwise.reports.tables.table import Table

TEMPLATES = Path(__file__).parent / "templates"
NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
NUMBER_OR_RANGE = re.compile(f"({NUMBER})(?: to {NUMBER})?")
SIGNS = {"better": "\u25b2", "worse": "\u25bc", "equivalent": "=", "undecided": "?", "no claim": "\u2013"}


@dataclass(frozen=True)
class Shown:
    """A cell of a table on the page: its text, the number that it is sorted by (if any), and whether it is text alone."""

    text: str
    key: float | None
    is_text: bool
    colour: str | None = None  # of the method, where the cell names a setting


def render(parts: Sequence[dict], over_tasks: Sequence[Table] = (), beside: Table | None = None) -> str:
    """The page of these parts (`section` of report.py), in their order.

    over_tasks: what is said of all tasks of a study together.
    beside: a paper's numbers against ours.
    """
    from markupsafe import Markup

    titles = list(dict.fromkeys(part["study"].title for part in parts))
    drawn = [{**part, **_figures(part)} for part in parts]
    template = _environment().get_template("report.html.jinja")
    return template.render(
        title=titles[0] if len(titles) == 1 else f"{len(titles)} studies",
        parts=drawn,
        over_tasks=over_tasks,
        beside=beside,
        colours={setting: tint for part in drawn for setting, tint in part["colours"].items()},
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
        bundle=Markup(_bundle()),
        config=charts.CONFIG,
    )


def _figures(part: dict) -> dict:
    """The charts of a part, and the colour of each of its settings."""
    study: Study = part["study"]
    scores = [charts.score_against_parameters(study), charts.rate_curves(study, part["rates"])]
    ranks = charts.rank_map(study, part["ranks"])
    line = part["comparison"].reproduce

    def made(chart: charts.Chart | None) -> charts.Chart | None:
        return chart if chart is None or chart.table is None else replace(chart, table=replace(chart.table, reproduce=line))

    return {
        "differences": made(charts.differences(study, part["verdicts"])),
        "scores": [made(chart) for chart in scores if chart is not None],
        "rank_map": made(ranks),
        "choices": [asdict(choice) for choice in ranks.choices] if ranks else [],
        "budget": made(charts.budget(study)),
        "colours": {arm.setting: colour(arm.method) for arm in study.arms},
    }


def shown(table: Table, colours: dict[str, str]) -> list[list[Shown]]:
    """The cells of a table as the page shows them; a column of numbers is sorted by value, whatever its cells look like."""
    texts = table.cells()
    numeric = [not table.is_text(i) and _is_numeric(row[i] for row in table.rows) for i in range(len(table.columns))]
    return [
        [
            Shown(
                text if table.is_quoted else charts.words(text),
                sort_key(cell) if numeric[i] else None,
                not numeric[i],
                colours.get(cell) if i == 0 and isinstance(cell, str) else None,
            )
            for i, (cell, text) in enumerate(zip(row, line, strict=True))
        ]
        for row, line in zip(table.rows, texts, strict=True)
    ]


def sort_key(cell: Cell) -> float | None:
    """The number that a cell is sorted by; None where it has none."""
    match cell:
        case None | SweepScore(score=None):
            return None
        case bool() | int() | float():
            return float(cell)
        case Estimate():
            return cell.mean
        case Cost():
            return cell.each[0]
        case Rank():
            return cell.active
        case SweepScore():
            return cell.score
        case str():
            number = NUMBER_OR_RANGE.fullmatch(cell)
            return float(number[1].replace(",", "")) if number else None
    return None


def _is_numeric(cells) -> bool:
    return all(sort_key(cell) is not None for cell in cells if cell_text(cell) not in ("-", "failed", "unfinished"))


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, in which nothing reads as the end of a script element."""
    from vl_convert import javascript_bundle

    return re.sub(r"</(?=script)|<!--", lambda match: "\\x3c" + match[0][1:], javascript_bundle(), flags=re.IGNORECASE)


def _environment():
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":"), "allow_nan": False}
    environment.filters["words"] = charts.words
    environment.filters["shown"] = shown
    environment.globals["sign"] = lambda kind: SIGNS.get(kind, "")
    return environment
