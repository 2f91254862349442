"""Which runs a study has, and in which packs they train.

Which members form a pack is computed from the whole study before anything runs, never from what is missing, so that a study
that was cut off goes on with the same packs.  Only a rate beyond the grid, and the later rungs of successive halving, are
added when the scores before them are known; the same scores add the same packs.

Everything here is a function of the study and of scores.  No torch, but for the question whether a method can be packed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rankwise.experiments.config import Entry, Study, Training
from rankwise.experiments.study import sweep
from rankwise.variants.settings import method

NUMERICS = 2  # raised by every commit that changes what a run computes


@dataclass(frozen=True)
class PackPlan:
    """The members of one pack before their rate is known: a method, a task, a phase, and (seed, rate or None)."""

    phase: str
    entry: Entry
    task: str
    index: int
    members: tuple[tuple[int, float | None], ...]
    rung: int = 0  # of successive halving

    @property
    def name(self) -> str:
        rung = f"rung{self.rung}-" if self.rung else ""
        return f"{self.phase}-{self.entry.label}-{self.task}-{rung}{self.index}".replace("/", "_").replace(" ", "_")


def is_packable(name: str) -> bool:
    """Whether members of the method of that name may train in one pack; imports torch."""
    return method(name).load().packable


def groups(study: Study, pack: int, packable: Callable[[str], bool] = is_packable) -> list[PackPlan]:
    """Every pack of the study that is known before it runs, sweeps before finals, in the order of the file.

    Args:
        pack: most members of a pack.
    """
    plans = []
    for task in study.tasks:
        for entry in study.methods:
            if study.sweeps(entry):
                plans += grid_packs(study, pack, entry, task, entry.learning_rates, packable=packable)
        for entry in study.methods:
            rates = [None] if study.sweeps(entry) else entry.learning_rates  # more than one: a whole curve
            members = [(seed, rate) for seed in study.seeds_of(entry) for rate in rates]  # more seeds later leave packs alone
            plans += _cut("final", entry, task, members, pack if packable(entry.method) else 1)
    return plans


def grid_packs(
    study: Study,
    pack: int,
    entry: Entry,
    task: str,
    rates: Sequence[float],
    rung: int = 0,
    index: int = 0,
    packable: Callable[[str], bool] = is_packable,
) -> list[PackPlan]:
    """The packs of these rates in the sweep of one method, numbered from `index`."""
    assert study.sweep is not None
    members = [(seed, rate) for rate in rates for seed in study.sweep.seeds]
    return _cut("sweep", entry, task, members, pack if packable(entry.method) else 1, rung, index)


def _cut(
    phase: str, entry: Entry, task: str, members: Sequence[tuple[int, float | None]], size: int, rung: int = 0, index: int = 0
) -> list[PackPlan]:
    parts = [tuple(members[i : i + size]) for i in range(0, len(members), size)]
    return [PackPlan(phase, entry, task, index + i, part, rung) for i, part in enumerate(parts)]


def added_packs(
    study: Study,
    pack: int,
    entries: Sequence[Entry],
    task: str,
    index: int,
    scores: Callable[[int], sweep.Scores],
    packable: Callable[[str], bool] = is_packable,
) -> Iterator[list[PackPlan]]:
    """The packs that scores add to the grid of a sweep: rates beyond its edge, then the later rungs of successive halving.

    The packs that are yielded must have run before the next ones are asked for.

    Args:
        entries: those that share one rate, and take every step together by the scores of all; else one.
        index: the number of the first added pack, one more than the grid's last.
        scores: of a rung, all that has finished.
    """
    assert study.sweep is not None
    most = study.sweep.most_trials(len(entries[0].learning_rates), study.quick)
    while (rate := sweep.next_rate(scores(0), most)) is not None:
        yield [
            plan for entry in entries for plan in grid_packs(study, pack, entry, task, [rate], index=index, packable=packable)
        ]
        index += 1
    if study.sweep.halving is None:
        return
    for rung in range(1, study.sweep.rungs):
        rates = sweep.survivors(scores(rung - 1), study.sweep.halving)
        yield [
            plan for entry in entries for plan in grid_packs(study, pack, entry, task, rates, rung, packable=packable)
        ]  # fmt: skip


def last_rung(study: Study) -> int:
    """The rung whose scores choose the rate of the final runs."""
    assert study.sweep is not None
    return 0 if study.sweep.halving is None else study.sweep.rungs - 1


def reference(study: Study) -> str:
    """The label that the others are held against: the study's own, else full fine-tuning, else the first."""
    labels = [entry.label for entry in study.methods]
    full = next((entry.label for entry in study.methods if entry.method == "full"), labels[0])
    return study.reference if study.reference in labels else full


def work(plan: PackPlan, training: Training, rows: Mapping[str, int], splits: Sequence[str]) -> float:
    """Rows that a pack trains on, for the progress bar; a row that is only evaluated counts a third.

    Args:
        rows: of each split of the task's data.
        splits: those that are evaluated at the end, the first of them along the way too.
    """
    trained = training.total_steps(rows["train"]) / training.steps_per_epoch(rows["train"]) * rows["train"]
    evaluated = sum(rows[split] for split in splits)
    evaluated += (len(training.evaluation_steps(rows["train"])) - 1) * rows[splits[0]]
    return len(plan.members) * (trained + evaluated / 3)
