"""What is written of a study as a whole: study.json and packs.json; and the lock on its folder."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.experiments import labels, records
from rankwise.experiments.files import write_json
from rankwise.experiments.records import SCHEMA
from rankwise.experiments.study.context import Context
from rankwise.experiments.study.plan import PackPlan

PACKS = "packs.json"


def write(context: Context, before: Mapping[str, Any], plans: Sequence[PackPlan], pack: int, complete: bool) -> None:
    """
    Args:
        before: what study.json said before this sitting; of it stay the methods that were not asked for now.
        plans: every pack that is known.
        pack: most members of a pack.
        complete: whether every run that was asked for now is finished.
    """
    labels = [entry.label for entry in context.study.methods]
    others = [label for label in before.get("methods", []) if label not in labels]
    records.write_study(context.out, _study(context, before, labels, others, complete))
    _write_packs(context.out, plans, pack, keep_others=bool(others))


def _study(
    context: Context, before: Mapping[str, Any], labels: Sequence[str], others: Sequence[str], complete: bool
) -> dict[str, Any]:
    """
    Args:
        labels: of the methods that were asked for now.
        others: of those that were not.
    """
    study, known = context.study, before.get("methods", [])
    full = next((entry.label for entry in study.methods if entry.method == "full"), None)
    trials = {}
    if study.sweep is not None:
        swept = [entry for entry in study.methods if study.sweeps(entry)]
        trials = {entry.label: study.sweep.most_trials(len(entry.learning_rates), study.quick) for entry in swept}
    shared = {label: first for label, first in before.get("shared_with", {}).items() if label in others}
    shared |= {entry.label: entry.shared_with for entry in study.methods if entry.shared_with is not None}
    curves = {label: place for label, place in before.get("curves", {}).items() if label in others}
    curves |= {entry.label: entry.place.model_dump() for entry in study.methods if entry.place is not None}
    cells = {label: cell for label, cell in before.get("cells", {}).items() if label in others}
    cells |= {entry.label: entry.cell.model_dump() for entry in study.methods if entry.cell is not None}
    searched = {entry.label: entry.searched.model_dump() for entry in study.methods if entry.searched is not None}
    return {
        "study": study.name,
        "quick": study.quick,
        "title": study.title or study.name,
        "captions": list(dict.fromkeys(line for prepared in context.tasks.values() for line in prepared.captions)),
        "reference": study.reference or full or before.get("reference"),
        "protocol": study.protocol,
        "margin": study.margin,
        "seeds": list(study.seeds),
        "trials": {**before.get("trials", {}), **trials},
        "budget": study.budget.model_dump(mode="json"),
        "methods": [*known, *(label for label in labels if label not in known)] if others else list(labels),
        "complete": complete and (not others or bool(before.get("complete"))),
        **({"kind": study.kind} if study.kind != "comparison" else {}),
        **({"shared_with": shared} if shared else {}),
        **({"design": study.sweep.design} if study.sweep is not None and study.sweep.design != "chosen-rate" else {}),
        **({"hypotheses": [one.model_dump(mode="json") for one in study.hypothesis]} if study.hypothesis else {}),
        **({"looks": list(study.looks)} if study.looks else {}),
        **({"curves": curves} if curves else {}),
        **({"cells": cells} if cells else {}),
        **({"searched": searched} if searched else {}),
    }


def _write_packs(out: Path, plans: Sequence[PackPlan], pack: int, keep_others: bool) -> None:
    packs = [
        {"pack": plan.name, "members": [{"seed": seed, "learning_rate": rate} for seed, rate in plan.members]} for plan in plans
    ]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        names = {one["pack"] for one in packs}
        written = json.loads((out / PACKS).read_text())["packs"]
        packs += [one for one in written if keep_others and one["pack"] not in names]
    write_json(out / PACKS, {"schema": SCHEMA, "pack": pack, "packs": packs})


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second `compare` out of the same folder; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on this platform
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another compare is running there: wait for it, or give another --out") from None
        yield


def clear_leftovers(out: Path) -> None:
    """Removes the temporary files of a killed process: those of our own names, in our own folders."""
    names = (*records.FILES, records.STUDY, labels.NAME, PACKS, "pack.json", "checkpoint.safetensors")
    runs = [folder for folder in out.iterdir() if re.fullmatch(r"[0-9a-f]{24}", folder.name)]
    packs = [path.parent for path in (out / "packs").rglob("pack.json")]
    for folder in (out, *runs, *packs):
        for name in names:
            for leftover in folder.glob(f".{name}.*.tmp"):
                leftover.unlink(missing_ok=True)
