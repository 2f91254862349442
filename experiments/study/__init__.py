"""Methods x tasks x rates x seeds: expands a study, runs what is missing, writes each run's folder.

    from rankwise.experiments.study import Runner
    runner = Runner(config.read(Path("my-study.toml")), Path("runs/mine"))
    runner.prepare()
    results = runner.run()

    runner.py       what happens in which order; read it first
    plan.py         the runs and their packs, before any of them is made (no torch)
    sweep.py        which rate is best, where a grid grows, who goes up a rung (no torch)
    splits.py       which part of the data is trained on, chosen on, reported (no torch)
    prepare.py      data, model and targets of each task
    runs.py         one run: its fingerprint
    known.py        the packs that are known so far, with the rates that scores give them
    order.py        which packs may train now (no torch)
    packs.py        a pack in its folder: resumed, split where memory runs out
    store.py        the folders of the runs, and those of a committed study
    placement.py    ranks that are taken from another entry's run
    budget.py       ranks, steps or micro-batches for an equal budget
    equalize.py     equal time and equal memory, measured
    examine.py      what became of each weight of a trained pack
    overview.py     study.json, packs.json, the lock

A study has up to two phases: "sweep" runs choose each method's learning rate by the selection split alone, "final" runs
make the table.  Importing this package does not import torch; the first use of `Runner` does.
"""

import importlib
from typing import Any

from rankwise.experiments.study.plan import NUMERICS, PackPlan, groups

__all__ = ["NUMERICS", "PackPlan", "Runner", "groups"]


def __getattr__(name: str) -> Any:
    if name == "Runner":
        return importlib.import_module("rankwise.experiments.study.runner").Runner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
