"""The two tiers: which cases of a large matrix stand for the rest in the quick one.

A claim over every method is made by the contract in the quick tier; where another test repeats it at the level of the trainer,
of a file or of another model, methods that differ in their machinery stand for the rest there, and the slow tier runs them all.
"""

from collections.abc import Iterable
from typing import Any

import pytest

# One of each machinery: the model's own tensors, triplets with magnitudes, growing, two factors placed by gradients.
STAND_INS = ("full", "adalora+dora", "increlora", "gora")


def quick(cases: Iterable[Any], stand_ins: Iterable[Any] = STAND_INS) -> list[Any]:
    """The cases, each that is none of the stand-ins marked slow; a case of several arguments is a tuple."""
    stand_ins = set(stand_ins)
    return [
        case if case in stand_ins else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


def diagonal(rows: Iterable[Any], columns: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Pairs in which each row comes once and the columns take turns: what stands for their whole product."""
    columns = list(columns)
    return [(row, columns[i % len(columns)]) for i, row in enumerate(rows)]
