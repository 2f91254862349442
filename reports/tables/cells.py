"""Cells of tables: types that know how they are printed, and how numbers, rates, times and sizes are written.

A cell is None, text, a number, or one of the types here, which people read as text and programs as several columns.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half-width of its 95 % t interval."""

    mean: float
    low: float | None
    high: float | None
    sd: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" +- {self.high - self.mean:.2f}" if self.high is not None else "")


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean of paired differences and its 95 % t interval."""

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + (f" ({self.low:+.2f} to {self.high:+.2f})" if self.high is not None else "")


@dataclass(frozen=True)
class Cost:
    """A cost (time or memory), a value for each size of pack, for a run alone does not cost what it costs in a pack."""

    each: tuple[float, ...]  # seconds or bytes
    pack_sizes: tuple[int, ...]
    show: Callable[[float], str]

    def __str__(self) -> str:
        return ", ".join(
            self.show(value) + (f" (pack of {size})" if size > 1 else "")
            for value, size in zip(self.each, self.pack_sizes, strict=True)
        )


@dataclass(frozen=True)
class Rank:
    """Active of nominal ranks; a mean over seeds where they differ."""

    active: float
    nominal: float

    def __str__(self) -> str:
        return decimal(self.active) if self.active == self.nominal else f"{decimal(self.active)}/{decimal(self.nominal)}"


@dataclass(frozen=True)
class SweepScore:
    """The selection score at one learning rate, and how many of its runs failed."""

    score: float | None
    failed: int
    n: int
    mark: str  # "", "best" or "best, edge"

    def __str__(self) -> str:
        if not self.n:
            return "-"
        failed = (f"failed ({self.failed} of {self.n})" if self.n > 1 else "failed") if self.failed else ""
        score = f"{self.score:.2f}" if self.score is not None else ("" if failed else "unfinished")
        star = {"": "", "best": " *", "best, edge": " * (edge)"}[self.mark]
        return score + star + (f" {failed}" if score and failed else failed)


Cell = None | str | int | float | Estimate | Cost | Rank | SweepScore


def rate_text(rate: float | None) -> str:
    """5e-5 rather than 5.00e-05."""
    if rate is None:
        return "-"
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def decimal(value: float) -> str:
    """At most one decimal, and none for a whole number."""
    return f"{value:.0f}" if abs(value - round(value)) < 0.05 else f"{value:.1f}"


def seconds_text(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def bytes_text(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def interval_text(low: float | None, high: float | None) -> str | None:
    return None if low is None else f"{low:.2f} to {high:.2f}"


def error_text(error: str | None) -> str:
    """The first line of an error, short enough for a cell."""
    line = (error or "no reason given").strip().split("\n")[0]
    return line if len(line) <= 60 else line[:57] + "..."


def cell_text(cell: Cell) -> str:
    if cell is None or cell == "":
        return "-"
    if isinstance(cell, bool | str):
        return str(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)
