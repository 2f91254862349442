"""Parts of a method tried in every combination: an entry with `factors` stands for one entry a combination.

    [[methods]]
    method = "allocated"
    [methods.factors]
    start = [{ form = "doublet" }, { form = "triplet" }]
    penalty = [{ orthogonality = 0.0 }, { orthogonality = 0.1 }]

Each factor has two levels, tables of settings, the first of which is "without" it; k factors make 2^k entries, labelled by
those that they are with ("allocated: start + penalty", "allocated: none").  `rankwise.reports.factors` says of such a study
what each part is worth, and each combination of parts (the full factorial design: Box, Hunter & Hunter 2005, chapter 5).
"""

from itertools import product
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rankwise.variants.settings import quoted, shown

KEY = "factors"
MOST = 5  # factors of one entry: 32 settings
NOT_OF_A_LEVEL = ("label", "factors", "ranks", "seeds", "ranks_of", "permuted", "ranks_seed", "shared_with")


class Cell(BaseModel):
    """Which combination an entry is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    design: str
    """Label of the entry that was written out."""
    levels: dict[str, Literal[0, 1]]
    """Factor -> 1 with it, 0 without."""


def written_out(entry: dict[str, Any], where: str) -> list[tuple[dict[str, Any], Cell | None]]:
    """An entry as it stands in the file, or one for each combination of its factors.

    Raises:
        ValueError: factors that are no table of two different levels each, or a setting that two of them, or the entry, give.
    """
    if KEY not in entry:
        return [(entry, None)]
    factors, rest = entry[KEY], {key: value for key, value in entry.items() if key != KEY}
    if not isinstance(factors, dict) or not 1 <= len(factors) <= MOST:
        raise ValueError(
            f"{where}.{KEY} = {shown(factors)}: give a table of 1 to {MOST} factors, such as "
            f"penalty = [{{ orthogonality = 0.0 }}, {{ orthogonality = 0.1 }}]"
        )
    if "ranks" in entry:
        raise ValueError(f"{where}: ranks and {KEY} both stand for several entries: keep one")
    given = dict.fromkeys(rest, "the entry")
    for name, levels in factors.items():
        at = f"{where}.{KEY}.{name}"
        _check_levels(levels, at)
        for key in dict.fromkeys(key for level in levels for key in level):
            if key in NOT_OF_A_LEVEL:
                raise ValueError(f"{at}: {key} is no setting of a level: take it out")
            if key in given:
                raise ValueError(f"{at}: {key} is given by {given[key]} too: keep it in one place")
            given[key] = f"the factor {quoted(name)}"
    label = rest.get("label") or rest.get("method")
    cells = []
    for levels in product((0, 1), repeat=len(factors)):
        chosen = dict(zip(factors, levels, strict=True))
        settings = {key: value for name, level in chosen.items() for key, value in factors[name][level].items()}
        parts = " + ".join(name for name, level in chosen.items() if level) or "none"
        written = {**rest, **settings, "label": f"{label}: {parts}"}
        cells.append((written, Cell(design=str(label), levels=chosen)))
    return cells


def _check_levels(levels: Any, at: str) -> None:
    is_pair = isinstance(levels, list) and len(levels) == 2 and all(isinstance(level, dict) for level in levels)
    if not is_pair or levels[0] == levels[1]:
        raise ValueError(
            f"{at} = {shown(levels)}: give two different tables of settings, without it first, such as "
            f"[{{ orthogonality = 0.0 }}, {{ orthogonality = 0.1 }}]"
        )
