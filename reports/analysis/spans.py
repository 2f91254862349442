"""A mean with its least and greatest value, as cells of the analyses' tables."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Span:
    """A mean, with the least and the greatest of the values averaged."""

    mean: float
    low: float
    high: float
    show: Callable[[float], str]

    def __str__(self) -> str:
        mean, low, high = map(self.show, (self.mean, self.low, self.high))
        return mean if low == high else f"{mean} ({low} to {high})"


def three(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def share(value: float) -> str:
    return f"{value:.2f}"


def signed(value: float) -> str:
    return f"{value:+.2f}"


def span(values: Iterable[float], show: Callable[[float], str] = three) -> Span:
    values = list(values)
    return Span(float(np.mean(values)), float(min(values)), float(max(values)), show)
