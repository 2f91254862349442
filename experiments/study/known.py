"""The packs that are known so far, and the runs that their members are once the scores before them give their rate."""

from collections.abc import Sequence

from rankwise.experiments.config import Entry
from rankwise.experiments.study import plan, splits, sweep
from rankwise.experiments.study.context import Context
from rankwise.experiments.study.equalize import Equalizer
from rankwise.experiments.study.placement import Placements
from rankwise.experiments.study.plan import PackPlan
from rankwise.experiments.study.runs import PlannedRun, planned
from rankwise.experiments.study.store import RunStore


class KnownPacks:
    """Packs of the study's file, those added since, and their runs.

    Args:
        sources: entries that are not run, whose ranks others take.
        size: most members of a pack.
    """

    def __init__(self, context: Context, sources: Sequence[Entry], size: int, store: RunStore, equalizer: Equalizer):
        self.context, self.sources, self.store, self.equalizer = context, sources, store, equalizer
        self.of_study = plan.groups(context.study, size)
        self.added: list[PackPlan] = []
        self.placements = Placements(context, store, self._final_run)

    @property
    def all(self) -> list[PackPlan]:
        return [*self.of_study, *self.added]

    def add(self, packs: Sequence[PackPlan]) -> None:
        """Packs that the study's file does not show, kept in the order in which one process adds them."""
        entries = [entry.label for entry in (*self.sources, *self.context.study.methods)]

        def place(pack: PackPlan) -> tuple[bool, bool, int, int]:
            is_source = pack.entry.label in [source.label for source in self.sources]
            first = pack.entry.shared_with or pack.entry.label
            at = entries.index(first) if first in entries else len(entries)
            return not is_source, pack.entry.ranks_of is not None, self.context.study.tasks.index(pack.task), at

        self.added = sorted([*self.added, *packs], key=place)

    def grid(self, entries: Sequence[Entry], task: str) -> list[PackPlan]:
        """The packs of the entries' sweeps."""
        labels = [entry.label for entry in entries]
        return [pack for pack in self.all if pack.phase == "sweep" and pack.entry.label in labels and pack.task == task]

    def sharers(self, entry: Entry) -> list[Entry]:
        """The entries that train at one rate with this one, itself among them."""
        first = entry.shared_with or entry.label
        entries = (*self.context.study.methods, *self.sources)
        return [other for other in entries if first in (other.label, other.shared_with)] or [entry]

    def work(self, pack: PackPlan) -> float:
        """Rows of a pack, for the progress bar; see `plan.work`."""
        prepared = self.context.tasks[pack.task]
        rows = {split: len(data) for split, data in prepared.data.items()}
        evaluated = splits.evaluated_in(self.context.study, pack.phase, prepared.task)
        return plan.work(pack, self.equalizer.training(pack), rows, evaluated)

    def scores(self, entries: Sequence[Entry], task: str, rung: int) -> sweep.Scores:
        """Selection scores of the entries' seeds, at one rung of a sweep, of what has finished."""
        at = [pack for pack in self.grid(entries, task) if pack.rung == rung]
        results = [(run.learning_rate, self.store.result(run)) for pack in at for run in self.runs(pack)]
        return sweep.by_rate((rate, result["selection_score"]) for rate, result in results if result is not None)

    def rates(self, pack: PackPlan) -> list[tuple[int, float]]:
        """The (seed, rate) of each member; the rate of a final run after a sweep is the best of the sweep."""
        known = [(seed, rate) for seed, rate in pack.members if rate is not None]
        if len(known) == len(pack.members):
            return known
        rung = plan.last_rung(self.context.study)
        best = sweep.best_rate(self.scores(self.sharers(pack.entry), pack.task, rung))
        return [(seed, best) for seed, _ in pack.members]

    def runs(self, pack: PackPlan) -> list[PlannedRun]:
        return [self.planned(pack, seed, rate) for seed, rate in self.rates(pack)]

    def planned(self, pack: PackPlan, seed: int, rate: float) -> PlannedRun:
        training = self.equalizer.training(pack)
        total = training.total_steps(self.context.num_rows(pack.task))
        settings = self.placements.settings(pack.entry, pack.task, seed, total)
        return planned(self.context, pack, settings, training, seed, rate)

    def _final_run(self, label: str, task: str, seed: int) -> PlannedRun | None:
        """The final run of that setting with that seed; None where the study has none."""
        finals = [pack for pack in self.all if (pack.phase, pack.entry.label, pack.task) == ("final", label, task)]
        pack = next((one for one in finals if seed in [s for s, _ in one.members]), None)
        return None if pack is None else self.planned(pack, seed, dict(self.rates(pack))[seed])
