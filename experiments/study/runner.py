"""What happens in which order: prepare a study, run what is missing of it, pack by pack."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
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
from rankwise.experiments.study.order import Order, Step
from rankwise.experiments.study.packs import Job, PackRunner
from rankwise.experiments.study.plan import PackPlan, groups
from rankwise.experiments.study.prepare import PreparedTask, prepare
from rankwise.experiments.study.store import RunStore, begun_in
from rankwise.experiments.tracking import Tracking
from rankwise.experiments.training import sharding
from rankwise.experiments.training.parallel import ALONE, Processes

COMMITTED = Path(__file__).parents[2] / "reports" / "studies"
AUTO_PACK = {"cpu": 8, "cuda": 32}  # most members of a pack


def train_here(runner: "Runner") -> None:
    """Trains every pack of a study in this process, one after the other."""
    while (job := runner.next_job()) is not None:
        runner.packs.run(job.plan, job.runs, job.missing, job.what)
        runner.end(job)


class Runner:
    """Runs a study into a folder: first `prepare`, then `run`.

    Args:
        device: a name; or the device itself, of machines that train for this one.
        say: called with a line the user should see (a warning, what is being done).
        progress: called with (what is running, rows done since the last call).
        more: called with the rows of packs that were not known before, and become part of the work.
        processes: that every pack trains on; the first one runs the study, and the others `follow` it.
        train: takes jobs (`next_job`) and ends each (`end`) until there are no more.
        precision: what "auto" is on the machines that train; None: as this one has it.
    """

    def __init__(
        self,
        study: Study,
        out: Path,
        device: str | torch.device = "auto",
        say: Callable[[str], None] = lambda line: None,
        progress: Callable[[str, float], None] = lambda what, rows: None,
        retry_failed: bool = False,
        more: Callable[[float], None] = lambda rows: None,
        processes: Processes = ALONE,
        train: Callable[["Runner"], None] = train_here,
        precision: str | None = None,
    ):
        self.study, self.out, self.say, self.progress, self.more = study, Path(out), say, progress, more
        self.retry_failed, self.processes, self.train = retry_failed, processes, train
        self.as_read = study  # before what follows from the model is filled in
        self.device = measure.device(device) if isinstance(device, str) else device
        if study.training.optimizer_states == "offloaded" and self.device.type == "cpu":
            raise ValueError(
                'training.optimizer_states = "offloaded" has no effect on a CPU, whose memory they are in: take "32-bit"'
            )
        measure.make_deterministic(self.device)
        self.precision = self._precision(precision)
        self.versions, self.commit = measure.versions(), measure.commit()
        self.pack = AUTO_PACK[self.device.type] if study.pack == "auto" else study.pack
        labels = [entry.label for entry in study.methods]
        takers = [entry for entry in study.methods if entry.ranks_of is not None]
        sources = {entry.ranks_of: entry.source for entry in takers if entry.ranks_of not in labels}
        self.sources = list(sources.values())  # entries that --methods leaves out, and others take their ranks of
        self.sources_as_read = list(self.sources)
        self.prepared: dict[str, PreparedTask] = {}
        self.tracking = Tracking(study.track, study.name, self.out, say)
        self._results: dict[int, list[Any]] = {}  # of each pack that is finished, by its object's id

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

    def _precision(self, auto: str | None) -> str:
        """The study's precision; "auto" is that of the runs in its folder, which another machine may have begun.

        A machine chooses by its processor.  A folder that moved would else start anew, and compare seeds across precisions.
        """
        wanted = self.study.training.precision
        here = auto if wanted == "auto" and auto is not None else measure.precision(wanted, self.device)
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
            self._order = Order(self._steps())
            with contextlib.closing(self.tracking):
                self.train(self)
            results = [result for pack in self._order.packs for result in self._results[id(pack)]]
            overview.write(self.context, before, self.known.all, self.pack, complete=True)
        if self.processes.size > 1:
            self.processes.told(None)  # there is no more
        if foreign := sorted(self.store.foreign_versions):
            self.say(f"note: some results come from {'; '.join(foreign)}, and are kept as they are")
        return results

    def follow(self) -> None:
        """What every process but the first does after `prepare`, in place of `run`."""
        self.packs.follow()

    # -- what is trained when ---------------------------------------------------------------------------------------

    def _steps(self) -> list[Step]:
        """The sweeps and the final runs of each task; what takes ranks of others comes after these."""
        steps, sweeps, finals = [], {}, {}
        for takes_ranks in (False, True):
            entries = [entry for entry in self.study.methods if (entry.ranks_of is not None) == takes_ranks]
            for task in self.study.tasks:
                sources = {entry.label: finals.get((entry.ranks_of, task), []) for entry in entries}
                for entry in entries:
                    if self.study.sweeps(entry) and entry.shared_with is None:
                        sharers = self.known.sharers(entry)
                        needed = [step for one in sharers for step in sources.get(one.label, [])]
                        sweep = Step(self._sweep(sharers, task), needed)
                        sweeps |= {(one.label, task): [sweep] for one in sharers}
                        steps.append(sweep)
                for entry in entries:
                    packs = [pack for pack in self.known.of_study if pack.phase == "final" and pack.task == task]
                    own = [pack for pack in packs if pack.entry.label == entry.label]
                    finals[entry.label, task] = [
                        Step(iter([own]), [*sweeps.get((entry.label, task), []), *sources[entry.label]])
                    ]
                    steps += finals[entry.label, task]
        return steps

    def _sweep(self, entries: Sequence[Entry], task: str) -> Iterator[list[PackPlan]]:
        """A grid, then the packs that widen it while its best rate stands at the edge, then those of each rung.

        The packs that are yielded must be finished before the next ones are asked for.

        Args:
            entries: those that share one rate, which take every step together, by the scores of all of them.
        """
        grid = self.known.grid(entries, task)
        yield grid
        scores = partial(self.known.scores, entries, task)
        for added in plan.added_packs(self.study, self.pack, entries, task, len(grid), scores):
            self._add(added)
            yield added

    def next_job(self) -> Job | None:
        """The first pack that may train now and of which something is missing; None where all that are left need one that
        is training, or none is left (`is_finished`)."""
        while (pack := self._order.next()) is not None:
            job = self._job(pack)
            if job.missing:
                return job
            self.end(job)
        return None

    @property
    def is_finished(self) -> bool:
        """Whether nothing of the study is missing."""
        return self._order.is_finished

    def end(self, job: Job) -> None:
        """Every run of a job has its result."""
        self.packs.tidy(job.plan)
        for run in job.runs:
            self.tracking.follow(self.out / run.fingerprint)
        self._results[id(job.plan)] = [self.store.result(run) for run in job.runs]
        self._order.finish(job.plan)

    def _job(self, pack: PackPlan) -> Job:
        """What is missing of a pack; what is not counts as done."""
        runs = self.known.runs(pack)
        job = Job(pack, runs, self.store.missing(runs), f"{pack.entry.label} {pack.task} ({pack.phase})")
        if done := len(runs) - len(job.missing):
            self.progress(job.what, self.known.work(pack) * done / len(runs))
        return job

    def _look_up(self, source: Entry) -> None:
        """Takes the finished runs of an entry that others take their ranks of, and that was not asked for.

        Raises:
            ValueError: some are not finished.
        """
        alone = groups(self.study.model_copy(update={"methods": [source]}), self.pack)
        self._add(alone)
        for task in self.study.tasks:
            if self.study.sweeps(source):
                for packs in self._sweep([source], task):
                    self._check_finished(packs)
            self._check_finished([final for final in alone if final.phase == "final" and final.task == task])

    def _check_finished(self, packs: Sequence[PackPlan]) -> None:
        """
        Raises:
            ValueError: a run of these packs is missing.
        """
        for pack in packs:
            job = self._job(pack)
            if job.missing:
                takers = ", ".join(entry.label for entry in self.study.methods if entry.ranks_of == pack.entry.label)
                raise ValueError(
                    f'{takers}: takes its ranks from "{pack.entry.label}", of which {len(job.missing)} of {len(job.runs)} runs '
                    f"({pack.phase}, {pack.task}) are not finished in {self.out}: name it in --methods too"
                )
            for run in job.runs:
                self.tracking.follow(self.out / run.fingerprint)

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
        self.known.add(packs)
        self.more(sum(self.known.work(pack) for pack in packs))
