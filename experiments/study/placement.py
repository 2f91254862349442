"""Ranks that an entry takes from the finished run of another one."""

from collections.abc import Callable

from rankwise.experiments.config import Entry
from rankwise.experiments.study import budget
from rankwise.experiments.study.context import Context
from rankwise.experiments.study.runs import PlannedRun
from rankwise.experiments.study.store import RunStore
from rankwise.variants.settings import Settings


class Placements:
    """Settings of runs, with the ranks that another entry's run ended with where an entry takes them.

    Args:
        final_run: (label, task, seed) -> that setting's final run with that seed; None where the study has none.
    """

    def __init__(self, context: Context, store: RunStore, final_run: Callable[[str, str, int], PlannedRun | None]):
        self.context, self.store, self.final_run = context, store, final_run
        self._known: dict[tuple[str, str, int], tuple[dict[str, int], dict[str, float]]] = {}

    def settings(self, entry: Entry, task: str, seed: int, total_steps: int) -> Settings:
        """The settings of a run of `total_steps` steps."""
        if entry.ranks_of is not None:
            whose = seed if entry.ranks_seed == "same" else self._partner(entry.label, seed)
            ranks, scales = self._placement(entry.label, entry.ranks_of, task, whose)
            if entry.permuted:
                ranks = budget.permuted(ranks, self.context.tasks[task].shapes, seed)
            entry = budget.taking(entry, ranks, scales)
        return entry.resolved(total_steps)

    def _partner(self, label: str, seed: int) -> int:
        """The final seed whose ranks a run with this seed takes, which is another one (`Entry.ranks_seed`).

        Raises:
            ValueError: there is none.
        """
        study = self.context.study
        pilots = [] if study.sweep is None else study.sweep.seeds
        # The first and the second final seed take each other's, the third and the fourth ...
        at = study.seeds.index(seed) ^ 1 if seed in study.seeds else pilots.index(seed)
        if at >= len(study.seeds):
            raise ValueError(
                f"{label}: seed {seed} has no partner among the {len(study.seeds)} seeds of the final runs: give an even "
                f"number of them, and at least as many as the sweep has"
            )
        return study.seeds[at]

    def _placement(self, label: str, source: str, task: str, seed: int) -> tuple[dict[str, int], dict[str, float]]:
        """Rank and scale of each site at the end of the source's final run with that seed.

        Args:
            label: of the entry that takes them.
            source: label of the entry that it takes them of.

        Raises:
            ValueError: that run is not there, or failed.
        """
        key = source, task, seed
        if key not in self._known:
            run = self.final_run(*key)
            if run is None:
                raise ValueError(f'{label}: "{source}" has no final run with seed {seed}: add it to the seeds')
            result = self.store.result(run)
            if result is None or result["status"] != "completed":
                what = "is not finished" if result is None else f"failed ({result['error']})"
                raise ValueError(
                    f'{label}: the run of "{source}" on {task} with seed {seed} {what}, so that there are no '
                    f"ranks to take: run it again (--retry-failed), or take the entry out"
                )
            ranks, scale = result["ranks"], result["scale"]
            self._known[key] = ranks, scale if isinstance(scale, dict) else {site: scale for site in ranks}
        return self._known[key]
