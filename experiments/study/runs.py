"""One run before it is made: its settings, and the fingerprint that tells it from every other."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.experiments import models
from rankwise.experiments.config import Entry, Training
from rankwise.experiments.study import splits
from rankwise.experiments.study.context import Context
from rankwise.experiments.study.plan import NUMERICS, PackPlan
from rankwise.experiments.training.pack import Pack
from rankwise.variants.settings import Settings, method, together


@dataclass(frozen=True)
class PlannedRun:
    """One member of one pack."""

    phase: str
    entry: Entry
    settings: Settings
    task: str
    seed: int
    learning_rate: float
    training: Training
    rung: int
    fingerprint: str

    @property
    def placed_by(self) -> str:
        """What places its ranks: see `Settings.allocation`; "taken" from another run, or taken and "permuted"."""
        if self.entry.ranks_of is not None:
            return "permuted" if self.entry.permuted else "taken"
        return method(self.entry.method).placed_by(self.settings)


def planned(
    context: Context, plan: PackPlan, settings: Settings, training: Training, seed: int, learning_rate: float
) -> PlannedRun:
    """A member of a planned pack.

    Args:
        settings: the entry's, with every share of the run made a number of steps, and with the ranks that it takes.
    """
    prepared = context.tasks[plan.task]
    facts = {
        "numerics": NUMERICS,
        "phase": plan.phase,
        "protocol": context.study.protocol,
        "method": plan.entry.method,
        "settings": settings.identity(),
        "targets": prepared.targets[plan.entry.label],
        "task": plan.task,
        "data": prepared.data_hash,
        **({"own_data": own} if (own := prepared.task.facts()) else {}),
        "model": models.content_hash(context.study.model),
        "seed": seed,
        "learning_rate": learning_rate,
        "training": {**training.identity(), "precision": context.precision},
        "device": context.device.type,
        **({"quantization": form.as_fact()} if (form := plan.entry.scheme) is not None else {}),
    }
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:24]
    return PlannedRun(plan.phase, plan.entry, settings, plan.task, seed, learning_rate, training, plan.rung, fingerprint)


def as_pack(context: Context, runs: Sequence[PlannedRun]) -> Pack:
    """The runs, which differ in seed, rate and ranks alone, as what trains together."""
    first = runs[0]
    prepared = context.tasks[first.task]
    return Pack(
        method=first.entry.method,
        settings=together([run.settings for run in runs]),
        targets=["^" + re.escape(name) for name in prepared.targets[first.entry.label]] or first.entry.targets,
        task=prepared.task,
        model=context.study.model,
        training=first.training,
        seeds=tuple(run.seed for run in runs),
        learning_rates=tuple(run.learning_rate for run in runs),
        splits=splits.evaluated_in(context.study, first.phase, prepared.task),
        device=context.device,
        precision=context.precision,
        quantization=first.entry.scheme,
        best_epoch=context.study.protocol == "best-dev-epoch",
    )
