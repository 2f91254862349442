"""What happens in which order: prepare a study, run what is missing of it, pack by pack."""

import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rankwise.experiments import labels, measure, records
from rankwise.experiments.config import Entry, Study
from rankwise.experiments.records import read_object
from rankwise.experiments.study import overview, plan, splits
from rankwise.experiments.study.context import Context
from rankwise.experiments.study.equalize import Equalizer
from rankwise.experiments.study.known import KnownPacks
from rankwise.experiments.study.packs import PackRunner
from rankwise.experiments.study.plan import PackPlan, groups
from rankwise.experiments.study.prepare import PreparedTask, prepare
from rankwise.experiments.study.store import RunStore, begun_in
from rankwise.experiments.tracking import Tracking
from rankwise.experiments.training import sharding
from rankwise.experiments.training.parallel import ALONE, Processes

COMMITTED = Path(__file__).parents[2] / "reports" / "studies"
AUTO_PACK = {"cpu": 8, "cuda": 32}  # most members of a pack


class Runner:
    """Runs a study into a folder: first `prepare`, then `run`.

    Args:
        say: called with a line the user should see (a warning, what is being done).
        progress: called with (what is running, rows done since the last call).
        more: called with the rows of packs that were not known before, and become part of the work.
        processes: that every pack trains on; the first one runs the study, and the others `follow` it.
    """

    def __init__(
        self,
        study: Study,
        out: Path,
        device: str = "auto",
        say: Callable[[str], None] = lambda line: None,
        progress: Callable[[str, float], None] = lambda what, rows: None,
        retry_failed: bool = False,
        more: Callable[[float], None] = lambda rows: None,
        processes: Processes = ALONE,
    ):
        self.study, self.out, self.say, self.progress, self.more = study, Path(out), say, progress, more
        self.retry_failed, self.processes = retry_failed, processes
        self.device = measure.device(device)
        if study.training.optimizer_states == "offloaded" and self.device.type == "cpu":
            raise ValueError(
                'training.optimizer_states = "offloaded" has no effect on a CPU, whose memory they are in: take "32-bit"'
            )
        if self.device.type == "cuda":  # a run that was cut off ends bit for bit as it would have
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)  # warn_only leaves the attention's backward pass as it is
        self.precision = self._precision()
        self.versions, self.commit = measure.versions(), measure.commit()
        self.pack = AUTO_PACK[self.device.type] if study.pack == "auto" else study.pack
        labels = [entry.label for entry in study.methods]
        takers = [entry for entry in study.methods if entry.ranks_of is not None]
        sources = {entry.ranks_of: entry.source for entry in takers if entry.ranks_of not in labels}
        self.sources = list(sources.values())  # entries that --methods leaves out, and others take their ranks of
        self.prepared: dict[str, PreparedTask] = {}
        self.tracking = Tracking(study.track, study.name, self.out, say)

    def prepare(self) -> None:
        """Fetches and encodes the data, loads the model once, and finds every entry's targets in it.

        Of several processes the first does so before the others, which find in the cache what it has fetched.

        Raises:
            ValueError: what the user can correct, one line for each fault, before anything has run.
            Unavailable: model or data cannot be had.
        """
        shared = self._shared()
        if self.processes.is_first:
            ready = prepare(self.study, self.sources, self.say, self.precision if shared else "fp32")
        if self.processes.size > 1:
            heads = self.processes.told(
                {name: one.heads for name, one in ready.tasks.items()} if self.processes.is_first else None
            )
            own = {"precision": self.precision, "heads": heads} if shared else {}  # the first alone reads what is shared
            ready = self.processes.attempt(
                lambda: ready if self.processes.is_first else prepare(self.study, self.sources, self.say, **own)
            )
        self.study, self.sources, self.prepared = ready.study, ready.sources, ready.tasks
        self.context = Context(
            study=self.study,
            tasks=self.prepared,
            out=self.out,
            committed=COMMITTED / self.study.name,
            device=self.device,
            precision=self.precision,
            versions=self.versions,
            commit=self.commit,
            say=self.say,
            progress=self.progress,
            written=self.tracking.follow,
            processes=self.processes,
        )
        self.store = RunStore(self.context, self.retry_failed)
        self.equalizer = Equalizer(self.context)
        self.known = KnownPacks(self.context, self.sources, self.pack, self.store, self.equalizer)
        self.packs = PackRunner(self.context, self.store)

    def _shared(self) -> bool:
        """Whether the processes share the base.

        Raises:
            ValueError: a study that asks for it, and cannot.
        """
        if not self.study.training.shard_base:
            return False
        if self.processes.size == 1:
            self.say("note: training.shard_base = true shares the base among processes, and there is one: it changes nothing")
            return False
        if faults := sharding.faults(self.study):
            raise ValueError("\n".join(faults))
        return True

    def _precision(self) -> str:
        """The study's precision; "auto" is that of the runs in its folder, which another machine may have begun.

        A machine chooses by its processor.  A folder that moved would else start anew, and compare seeds across precisions.
        """
        here = measure.precision(self.study.training.precision, self.device)
        if self.study.training.precision != "auto":
            return here
        begun = begun_in(self.out)
        if not begun or here in begun:
            return here
        kept = min(begun)
        self.say(f'note: the runs of {self.out} were begun in {kept}, and go on in it; precision "auto" would be {here} here')
        return kept

    def work(self) -> float:
        """Rows of the whole study, for the progress bar; see `plan.work`."""
        return sum(self.known.work(pack) for pack in self.known.of_study)

    def run(self) -> list[dict[str, Any]]:
        """Runs every pack of which a result is missing; all results of the study, in its order."""
        self.out.mkdir(parents=True, exist_ok=True)
        with overview.locked(self.out):
            overview.clear_leftovers(self.out)
            before = read_object(self.out / records.STUDY) or {}
            labels.add(self.out, self._labels())
            self.equalizer.measure()
            overview.write(self.context, before, self.known.all, self.pack, complete=False)
            for source in self.sources:
                self._look_up(source)
            results = []
            with contextlib.closing(self.tracking):
                for takes_ranks in (False, True):  # what takes ranks of others comes after these
                    for task in self.study.tasks:
                        results += self._run_task(task, takes_ranks)
            overview.write(self.context, before, self.known.all, self.pack, complete=True)
        if self.processes.size > 1:
            self.processes.told(None)  # there is no more
        if foreign := sorted(self.store.foreign_versions):
            self.say(f"note: some results come from {'; '.join(foreign)}, and are kept as they are")
        return results

    def follow(self) -> None:
        """What every process but the first does after `prepare`, in place of `run`."""
        self.packs.follow()

    def _run_task(self, task: str, takes_ranks: bool) -> list[dict[str, Any]]:
        """The sweeps and the final runs of one task, of the entries that take ranks of others or of those that do not."""
        results = []
        for entry in self.study.methods:
            if self.study.sweeps(entry) and entry.shared_with is None and (entry.ranks_of is not None) == takes_ranks:
                results += self._sweep(self.known.sharers(entry), task)
        for final in self.known.of_study:
            if final.phase == "final" and final.task == task and (final.entry.ranks_of is not None) == takes_ranks:
                results += self._run_pack(final)
        return results

    def _look_up(self, source: Entry) -> None:
        """Takes the finished runs of an entry that others take their ranks of, and that was not asked for.

        Raises:
            ValueError: some are not finished.
        """
        alone = groups(self.study.model_copy(update={"methods": [source]}), self.pack)
        self._add(alone)
        for task in self.study.tasks:
            if self.study.sweeps(source):
                self._sweep([source], task, may_train=False)
            for final in alone:
                if final.phase == "final" and final.task == task:
                    self._run_pack(final, may_train=False)

    def _sweep(self, entries: Sequence[Entry], task: str, may_train: bool = True) -> list[dict[str, Any]]:
        """Runs a grid, widens it while its best rate stands at the edge, and goes up the rungs; all results.

        Args:
            entries: those that share one rate, which take every step together, by the scores of all of them.
        """
        grid = self.known.grid(entries, task)
        results = [result for pack in grid for result in self._run_pack(pack, may_train)]
        scores = partial(self.known.scores, entries, task)
        for added in plan.added_packs(self.study, self.pack, entries, task, len(grid), scores):
            self._add(added)
            results += [result for pack in added for result in self._run_pack(pack, may_train)]
        return results

    def _run_pack(self, pack: PackPlan, may_train: bool = True) -> list[dict[str, Any]]:
        """Makes what is missing of a pack; the results of all its members.

        Raises:
            ValueError: something is missing, and it may not be trained now.
        """
        runs = self.known.runs(pack)
        what = f"{pack.entry.label} {pack.task} ({pack.phase})"
        missing = self.store.missing(runs)
        if done := len(runs) - len(missing):
            self.progress(what, self.known.work(pack) * done / len(runs))
        if missing and not may_train:
            takers = ", ".join(entry.label for entry in self.study.methods if entry.ranks_of == pack.entry.label)
            raise ValueError(
                f'{takers}: takes its ranks from "{pack.entry.label}", of which {len(missing)} of {len(runs)} runs '
                f"({pack.phase}, {pack.task}) are not finished in {self.out}: name it in --methods too"
            )
        self.packs.run(pack, runs, missing, what)
        for run in runs:
            self.tracking.follow(self.out / run.fingerprint)
        return [self.store.result(run) for run in runs]

    def _labels(self) -> dict[labels.Key, labels.Labels]:
        """What predictions of the evaluated splits are scored against, where that is numbers."""
        found = {}
        for one in self.prepared.values():
            for split in splits.evaluated(self.study, one.task):
                if (of_split := labels.of_data(one.task.kind, one.data[split])) is not None:
                    found[one.data_hash, split] = of_split
        return found

    def _add(self, packs: Sequence[PackPlan]) -> None:
        """Takes up packs that the study's file does not show."""
        self.known.added += packs
        self.more(sum(self.known.work(pack) for pack in packs))
