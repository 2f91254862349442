"""A curve of ranks in a study file: an entry with `ranks = [2, 4, 8]` stands for one entry a rank.

The scale follows a rule that the entry states: `scale = 2` keeps alpha/r (alpha/sqrt(r) with that scaling) the same at every
rank, `alpha = 16` keeps alpha the same, so that the scale falls as the rank rises.  Where a method starts with other ranks than
it ends with, `ranks` are those that it ends with, and it starts as a budget of parameters has it start (`Settings.for_budget`).
`rankwise.reports.rank_curve` says of such a study which rank is enough.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict
from rankwise.variants.settings import FROM_BUDGET, METHODS, Settings, shown

KEYS = ("ranks", "scale")  # of an entry that stands for several


class Place(BaseModel):
    """Where an entry stands on a curve."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    curve: str
    """Label of the entry that was written out."""
    rank: int


def expanded(
    entry: dict[str, Any], defaults: Mapping[str, Any], where: str, solved: bool
) -> list[tuple[dict[str, Any], Place | None]]:
    """An entry as it stands in the file, or one for each of its ranks, labelled "lora r=8".

    Args:
        solved: ranks follow from a budget of parameters, so that an entry's `scale` is its own alpha/r.

    Raises:
        ValueError: ranks that are no list of different numbers, a rule for the scale that is missing or said twice, or a method
            without ranks.
    """
    if "ranks" not in entry:
        if "scale" in entry and not solved:
            raise ValueError(f"{where}.scale has no effect without ranks or a budget of parameters: take it out, or set alpha")
        return [(entry, None)]
    ranks, rest = entry["ranks"], {key: value for key, value in entry.items() if key not in KEYS}
    if not isinstance(ranks, list) or len(ranks) < 2 or not all(_is_rank(rank) for rank in ranks):
        raise ValueError(f"{where}.ranks = {shown(ranks)}: give two or more whole numbers above 0, such as [2, 4, 8, 16]")
    if len(set(ranks)) < len(ranks):
        raise ValueError(f"{where}.ranks = {shown(ranks)} has one twice: take it out")
    spec = METHODS.get(entry.get("method", ""))
    if spec is None:
        return [(rest, None)]  # whose fault is said where methods are looked up
    names = spec.settings.with_role("rank")
    if not names:
        raise ValueError(f"{where}.ranks: {spec.name} has no ranks: take it out")
    if solved:
        raise ValueError(f"{where}.ranks: ranks follow from the budget of parameters: take it out, or [budget]")
    if "ranks_of" in entry:
        raise ValueError(f"{where}.ranks: follows from ranks_of: take it out")
    if given := [name for name in spec.settings.with_role("rank", "total", "rank pattern", "alpha pattern") if name in entry]:
        raise ValueError(f"{where}.{given[0]}: a curve has each of ranks = {shown(ranks)} at every site: take it out")
    inherited = {key: value for key, value in defaults.items() if key in spec.settings.model_fields and key not in names}
    own = {key: value for key, value in rest.items() if key in spec.settings.model_fields}
    scale = entry.get("scale")
    if scale is not None and "alpha" in entry:
        raise ValueError(
            f"{where}: scale = {shown(scale)} and alpha = {shown(entry['alpha'])}: keep the one that holds at all ranks"
        )
    if scale is None and "alpha" not in own and "alpha" not in inherited:
        raise ValueError(
            f"{where}: ranks need a rule for the scale: give scale = 2 (the same alpha/r at every rank), or alpha = 16 "
            f"(the same alpha, so that alpha/r falls as the rank rises)"
        )
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf")):
        raise ValueError(f"{where}.scale = {shown(scale)}: give a number above 0")
    label = rest.get("label") or spec.name
    written = []
    for rank in sorted(ranks):
        follows = at_rank(spec.settings, {**inherited, **own}, rank, scale, where)
        written.append(({**rest, **follows, "label": f"{label} r={rank}"}, Place(curve=str(label), rank=rank)))
    return written


def at_rank(kind: type[Settings], given: Mapping[str, Any], rank: int, scale: float | None, where: str) -> dict[str, Any]:
    """What follows from a rank: the method's own ranks, and alpha where a scale is given.

    Raises:
        ValueError: nothing says what one rank means for this method.
    """
    follows = set(kind.with_role(*FROM_BUDGET))
    try:
        found = kind.for_budget({k: v for k, v in given.items() if k not in follows}, {"": rank}, rank, scale or 1.0)
    except ValueError as error:
        raise ValueError(f"{where}.ranks: {error}") from None
    return {name: found[name] for name in kind.with_role("rank", *(("alpha",) if scale is not None else ())) if name in found}


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
