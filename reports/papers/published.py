"""The papers' tables as data: what was printed, where it stands, and what is known to be wrong with it.

One file a table in tables/, values as printed and in the printed order; a cell that was not printed is absent.  A cell
with two numbers (90.76/90.79) is two columns, and a heading that is a budget is part of the row's label.  `counts` says
what a row trained, so that its number of parameters can be computed (shapes.py).  Where a printed average or count is
not what its own parts give, the row names the reason, and for a count what the formula gives instead.
"""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rankwise.reports.papers.shapes import Trained
from rankwise.variants.settings import explain, nearest

FOLDER = Path(__file__).with_name("tables")
ROUNDING = 1e-9  # of binary fractions: 89.31 - 89.30 is not 0.01
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "%": 1.0}

Number = Annotated[float, Field(allow_inf_nan=False)]
Spread = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]


class Data(BaseModel):
    """What every part of a file shares: strict types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=(), use_attribute_docstrings=True)


class Column(Data):
    """One printed column."""

    title: Text
    task: str | None = None
    """Our task, where there is one."""
    split: str | None = None
    """The part of our task that it is, where that is not the task's official development part."""
    metric: str | None = None
    """Our name of the metric, where we have it."""
    higher_is_better: bool
    averages: list[Text | list[Text]] = []
    """For a printed average: the columns that it is the mean of; a list within counts as one, by its own mean."""
    spread: Spread | None = None
    """Of every value of this column, where the paper gives one for all."""
    seeds: PositiveInt | None = None
    """Where they differ from the table's."""
    note: str = ""


class Counts(Trained):
    """What a row trained, to compare with the number of parameters that was printed."""

    percent_of: Literal["pretrained", "all"] = "pretrained"
    """What a percentage is of: the pretrained parameters, or these and the trained ones."""
    inferred: Literal["rank", "bottleneck", "tokens"] | None = None
    """The size that the source of this file does not give: the one whose count comes nearest to the printed number."""
    gives: PositiveInt | None = None
    """The count by the formula, where the printed one is another."""
    differs: str | None = None
    """Why, or that it is not known: a key of `reasons`."""

    @model_validator(mode="after")
    def _reason_comes_with_number(self) -> "Counts":
        if (self.gives is None) != (self.differs is None):
            raise ValueError("gives and differs belong together: what the formula gives, and the reason")
        if self.inferred and getattr(self, self.inferred) is None:
            raise ValueError(f'inferred = "{self.inferred}", which is not given: name a size that is')
        return self


class PrintedRow(Data):
    """One printed row, or one printed row at one budget."""

    label: Text
    """Unique in its table."""
    model: str | None = None
    """The model's name on the hub, where it has one."""
    method: str | None = None
    """Our method, where we have it."""
    parameters: str | None = None
    """Trained parameters as printed: "1.27M", or "0.83 %"."""
    copied: bool = False
    """Whether the paper took the row from earlier work."""
    note: str = ""
    settings: dict[str, int | float | str] = {}
    """What else the row is labelled with."""
    counts: Counts | None = None
    not_counted: str | None = None
    """Why `parameters` cannot be computed: a key of `reasons`."""
    average_differs: str | None = None
    """Why the printed average is not that of the row: a key of `reasons`."""
    values: dict[str, Number]
    spread: dict[str, Spread] = {}

    @model_validator(mode="after")
    def _is_whole(self) -> "PrintedRow":
        stray = self.spread.keys() - self.values.keys()
        if stray:
            raise ValueError(f"spread of {', '.join(sorted(stray))}, which has no value: give one, or drop the spread")
        if not self.values:
            raise ValueError("no values: give at least one, or drop the row")
        if self.parameters is not None:
            printed(self.parameters)
        elif self.counts or self.not_counted:
            raise ValueError("counts without parameters: there is nothing to compare with")
        if self.counts and self.not_counted:
            raise ValueError("counts and not_counted exclude each other: keep one")
        return self


@dataclass(frozen=True)
class Value:
    """One printed value. n: runs behind it, None where that is not known or the row was copied from elsewhere."""

    value: float
    spread: float | None
    n: int | None
    where: str


@dataclass(frozen=True)
class Printed:
    """A printed number of parameters: the number (or the percentage) and half a unit of its last place."""

    number: float
    half: float
    is_percent: bool

    def is_rounded_from(self, value: float) -> bool:
        return abs(value - self.number) <= self.half * (1 + ROUNDING)


class Published(Data):
    """One table of one paper."""

    paper: Text
    """Short name."""
    title: Text
    source: Text
    table: Text
    page: PositiveInt | None = None
    page_note: str | None = None
    """Of which edition the page is, or that it is not known."""
    about: Text
    seeds: PositiveInt | None = None
    statistic: Literal["mean", "median", "best"] | None = None
    protocol: str | None = None
    """How the reported value was chosen, where that is known."""
    spread_is: str | None = None
    tolerance: Spread = 0.05
    """How far a printed average may be from the mean of its columns."""
    inconsistencies: list[Text] = []
    """What is known to contradict the table, and what makes its rows unequal."""
    reasons: dict[str, Text] = {}
    """Key -> sentence, named by rows and counts."""
    not_counted: str | None = None
    """For a table none of whose parameters are computed: a key of `reasons`."""
    columns: dict[str, Column]
    rows: list[PrintedRow]

    @model_validator(mode="after")
    def _is_consistent(self) -> "Published":
        labels = [row.label for row in self.rows]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f'two rows are called "{label}": make the labels differ')
        used = set()
        for row in self.rows:
            for column in row.values:
                if column not in self.columns:
                    raise ValueError(f'"{row.label}": no column "{column}"{nearest(column, self.columns)}')
            used |= row.values.keys()
        if unused := self.columns.keys() - used:
            raise ValueError(f"columns without a value: {', '.join(sorted(unused))}; drop them")
        self._check_averages()
        self._check_reasons()
        spreads = any(row.spread for row in self.rows) or any(c.spread is not None for c in self.columns.values())
        if spreads != (self.spread_is is not None):
            raise ValueError('spread_is says what the spread means ("not said" too), where there is one and nowhere else')
        if self.page is None and not self.page_note:
            raise ValueError("neither page nor page_note: give the page, or say that it is not known")
        return self

    def _check_averages(self) -> None:
        averaged = [name for name, column in self.columns.items() if column.averages]
        if len(averaged) > 1:
            raise ValueError(f"columns {', '.join(averaged)} are all averages; one can be checked")
        for name in averaged:
            for part in _flat(self.columns[name].averages):
                if part not in self.columns or part == name:
                    raise ValueError(f'{name} averages "{part}", which is no other column{nearest(part, self.columns)}')

    def _check_reasons(self) -> None:
        named = {self.not_counted}
        for row in self.rows:
            named |= {row.not_counted, row.average_differs, row.counts.differs if row.counts else None}
            if row.parameters and not (row.counts or row.not_counted or self.not_counted):
                raise ValueError(f'"{row.label}": parameters without counts; give counts, or not_counted with the reason')
        named.discard(None)
        if missing := named - self.reasons.keys():
            raise ValueError(f'no reason "{min(missing)}"{nearest(min(missing), self.reasons)}; write the sentence')
        if unused := self.reasons.keys() - named:
            raise ValueError(f'nothing names the reason "{min(unused)}": drop it')

    @property
    def where(self) -> str:
        """ "AdaLoRA, Table 1", with the page where it is known."""
        return f"{self.paper}, {self.table}" + (f", p. {self.page}" if self.page else "")

    @property
    def average(self) -> str | None:
        """The column that is an average of others, if there is one."""
        return next((name for name, column in self.columns.items() if column.averages), None)

    def row(self, label: str) -> PrintedRow:
        """The row of that label. Raises: ValueError: there is none; offers the nearest."""
        one = next((row for row in self.rows if row.label == label), None)
        if one is None:
            labels = [row.label for row in self.rows]
            raise ValueError(f'{self.where} has no row "{label}"{nearest(label, labels)}; there are: {"; ".join(labels)}')
        return one

    def value(self, row: str, column: str) -> Value:
        """What the table prints in a cell.

        Raises: ValueError: no such row or column (with the nearest), or nothing printed there.
        """
        one = self.row(row)
        if column not in self.columns:
            there = ", ".join(self.columns)
            raise ValueError(f'{self.where} has no column "{column}"{nearest(column, self.columns)}; there are: {there}')
        if column not in one.values:
            raise ValueError(f'{self.where} prints no {column} for "{row}"; it prints {", ".join(one.values)}')
        about = self.columns[column]
        n = None if one.copied else about.seeds or self.seeds
        return Value(one.values[column], one.spread.get(column, about.spread), n, self.where)

    def average_gap(self, row: str) -> float | None:
        """The printed average minus the mean of the columns that it averages; None where either was not printed.

        Raises: ValueError: no such row.
        """
        values = self.row(row).values
        name = self.average
        if name is None or name not in values:
            return None
        parts = [part if isinstance(part, list) else [part] for part in self.columns[name].averages]
        if any(column not in values for column in _flat(parts)):
            return None
        means = [sum(values[column] for column in part) / len(part) for part in parts]
        return values[name] - sum(means) / len(means)

    def average_is_reproduced(self, row: str) -> bool | None:
        """Whether the gap is within the table's tolerance; None where there is no gap to look at."""
        gap = self.average_gap(row)
        return None if gap is None else abs(gap) <= self.tolerance + ROUNDING

    def count_is_reproduced(self, row: str) -> bool | None:
        """Whether the printed number of parameters is what `counts` gives, rounded; None where it cannot be computed."""
        one = self.row(row)
        if one.counts is None:
            return None
        text = printed(one.parameters)
        return text.is_rounded_from(one.counts.percent(one.counts.percent_of) if text.is_percent else one.counts.count())


def printed(text: str) -> Printed:
    """A printed number of parameters as a number: "1.33M", "175,255.8M", "0.83 %".

    Raises: ValueError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:,\d{3})*(?:\.(\d+))?)\s?([KMB%])", text)
    if not match:
        raise ValueError(f'parameters = "{text}": a number and K, M, B or %, like "1.33M" or "0.83 %"')
    digits, decimals, unit = match.groups()
    scale = UNITS[unit]
    return Printed(float(digits.replace(",", "")) * scale, 0.5 * scale * 10 ** -len(decimals or ""), unit == "%")


def names() -> list[str]:
    """The names of all tables: "adalora-1", ..."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


@cache
def load(name: str) -> Published:
    """One table.

    Raises: ValueError: no table of that name (with the nearest), or a file that breaks a rule.
    """
    if name not in names():
        raise ValueError(f'no published table "{name}"{nearest(name, names())}; there are: {", ".join(names())}')
    return read((FOLDER / f"{name}.toml").read_text(encoding="utf-8"), name)


def read(text: str, name: str) -> Published:
    """A table from the text of its file. Raises: ValueError: one line for each fault, each beginning with the file's name."""
    try:
        return Published(**tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{name}.toml: {error}") from None
    except ValidationError as error:
        raise ValueError("\n".join(explain(error, Published, where=f"{name}.toml"))) from None


def _flat(parts: list) -> list[str]:
    return [column for part in parts for column in (part if isinstance(part, list) else [part])]
