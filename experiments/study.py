"""Methods x tasks x rates x seeds: expands a study, runs what is missing, writes each run's folder.

A study has up to two phases: "sweep" runs choose each method's learning rate by the selection split alone, "final" runs
make the table.  Which members form a pack is computed from the whole study before anything runs, never from what is
missing, and written down, so that a study that was cut off goes on with the same packs.  Only a rate beyond the grid, and
the later rungs of successive halving, are added when the scores before them are known; the same scores add the same packs.
"""

import contextlib
import dataclasses
import datetime
import gc
import glob
import hashlib
import json
import os
import re
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rankwise import variants
from rankwise.experiments import archive, budget, kinds, knockout, measure, models, records, sweep
from rankwise.experiments.checks import check_phases, collecting, phase_training
from rankwise.experiments.config import Entry, Study, Training
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.data.draws import KNOCKOUT_ROWS, SUBSET
from rankwise.experiments.files import write_file, write_json
from rankwise.experiments.records import SCHEMA, read_object
from rankwise.experiments.tasks import Task
from rankwise.experiments.tasks import get as get_task
from rankwise.experiments.training.pack import Outcome, Pack
from rankwise.experiments.training.trainer import Trainer
from rankwise.variants.adapter.linears import weight_of
from rankwise.variants.adapter.step import NotPackable
from rankwise.variants.settings import Settings, method, together
from rankwise.variants.weights.anatomy import COSINE, INTRUDERS, TOP, anatomy

NUMERICS = 2  # raised by every commit that changes what a run computes
COMMITTED = Path(__file__).parent.parent / "reports" / "studies"
AUTO_PACK = {"cpu": 8, "cuda": 32}
PROBE_STEPS = 6  # a step's time is the median of so many, the first left out; its peak that of all


@dataclass(frozen=True)
class Prepared:
    """One task of a study, ready to run: its data, and each entry's targets in the model."""

    task: Task
    data: dict[str, Dataset]  # "train", and each split that is evaluated
    data_hash: str
    targets: dict[str, list[str]]  # entry label -> names of the sites
    shapes: dict[str, tuple[int, int]]  # site -> (out, in)
    captions: list[str]


@dataclass(frozen=True)
class Run:
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


@dataclass(frozen=True)
class Group:
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


def groups(study: Study, pack: int) -> list[Group]:
    """Every pack of the study that is known before it runs, sweeps before finals, in the order of the file."""
    found = []
    for task in study.tasks:
        for entry in study.methods:
            found += grid_groups(study, pack, entry, task, entry.learning_rates) if entry.swept else []
        for entry in study.methods:
            members = [(s, None if entry.swept else entry.learning_rates[0]) for s in study.seeds]
            found += _cut("final", entry, task, members, pack)
    return found


def grid_groups(
    study: Study, pack: int, entry: Entry, task: str, rates: Sequence[float], rung: int = 0, index: int = 0
) -> list[Group]:
    """The packs of these rates in the sweep of one method, numbered from `index`."""
    return _cut("sweep", entry, task, [(s, r) for r in rates for s in study.sweep.seeds], pack, rung, index)


def _cut(
    phase: str, entry: Entry, task: str, members: Sequence[tuple[int, float | None]], pack: int, rung: int = 0, index: int = 0
) -> list[Group]:
    size = pack if method(entry.method).load().packable else 1
    parts = [tuple(members[i : i + size]) for i in range(0, len(members), size)]
    return [Group(phase, entry, task, index + i, part, rung) for i, part in enumerate(parts)]


class Runner:
    """Runs a study into a folder.

    Args:
        say: called with a line the user should see (a warning, what is being done).
        progress: called with (what is running, rows done since the last call).
        more: called with the rows of packs that were not known before, and become part of the work.
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
    ):
        self.study, self.out, self.say, self.progress, self.more = study, Path(out), say, progress, more
        self.retry_failed = retry_failed
        self.device = measure.device(device)
        if self.device.type == "cuda":  # a run that was cut off ends bit for bit as it would have
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)  # warn_only leaves the attention's backward pass as it is
        self.precision = measure.precision(study.training.precision, self.device)
        self.versions, self.commit = measure.versions(), measure.commit()
        self.pack = AUTO_PACK[self.device.type] if study.pack == "auto" else study.pack
        self.groups = groups(study, self.pack)
        self.added: list[Group] = []  # packs that became known while running
        self.prepared: dict[str, Prepared] = {}
        self.measured: dict[str, dict[str, dict[str, float]]] = {}  # task -> label -> what a step of it takes
        labels = [entry.label for entry in study.methods]
        takers = [entry for entry in study.methods if entry.ranks_of is not None]
        self.sources = {e.ranks_of: e.source for e in takers if e.ranks_of not in labels}  # those that --methods leaves out
        self._placements: dict[tuple[str, str, int], tuple[dict[str, int], dict[str, float]]] = {}
        self._makes = True  # False: what is missing is not made
        self._bases: dict[str, Any] = {}  # what anatomy asks of the pre-trained weights, the same for every run
        self._archived: dict[str, dict[str, bytes]] | None = None  # fingerprint -> files; None: not read yet
        self._strangers: set[str] = set()
        self._made: set[str] = set()  # fingerprints of the runs that ended here, which are not tried again

    def prepare(self) -> None:
        """Fetches and encodes the data, loads the model once, and finds every entry's targets in it.

        Raises:
            ValueError: what the user can mend, one line for each fault, before anything has run.
            Unavailable: model or data cannot be had.
        """
        faults: list[str] = []
        for name in self.study.tasks:
            task = get_task(name)
            model, tokenizer, info = models.load(self.study.model, task, "fp32", "cpu")
            training = self.study.training
            faults.extend(models.unfit(model, training))
            if faults:
                continue
            parts = {"train": self._train_split(task), **{split: split for split in self._evaluated(task)}}
            data = {
                part: _subset(task.encode(tokenizer, split, training.max_length), part, training)
                for part, split in parts.items()
            }
            digest = hashlib.sha256()
            for split in sorted(data):
                for block in data[split].content():
                    digest.update(block)
            targets, shapes = {}, {}
            total = training.total_steps(len(data["train"]))
            entries = []
            for entry in (*self.study.methods, *self.sources.values()):
                with collecting(faults):
                    adapter = variants.create(entry.method, **_given(entry.resolved(total)))
                    adapter.attach(model, entry.targets, head=info.heads, calibration=variants.Uncalibrated())
                    targets[entry.label] = [n for n, site in adapter.named_sites() if hasattr(site, "rank")]
                    shapes |= {name: tuple(weight_of(adapter.base(name)).shape) for name in targets[entry.label]}
                    equal = self.study.budget
                    if equal.equal == "parameters" and entry.ranks_of is None:
                        entry = budget.solved(entry, adapter, equal.parameters, equal.scale)
                    adapter.detach()
                entries.append(entry)
            self.sources = {entry.label: entry for entry in entries[len(self.study.methods) :]}
            self._take(entries[: len(self.study.methods)])
            faults.extend(_twins(self.study.methods, total, targets))
            check_phases(self.study, len(data["train"]), faults)
            captions = [
                *task.caption,
                *task.captions_by_model.get(self.study.model, ()),
                *_subset_captions(task, data, training),
            ]
            self.prepared[name] = Prepared(task, data, digest.hexdigest(), targets, shapes, captions)
        if faults:
            raise ValueError("\n".join(dict.fromkeys(faults)))

    def _take(self, entries: list[Entry]) -> None:
        """Goes on with these entries, whose ranks are known now."""
        if entries != self.study.methods:
            self.study = self.study.model_copy(update={"methods": entries})
            self.groups = groups(self.study, self.pack)

    def work(self) -> float:
        """Rows of the whole study, for the progress bar; a row that is only evaluated counts a third."""
        return sum(self._work(group) for group in self.groups)

    def _work(self, group: Group) -> float:
        prepared, training = self.prepared[group.task], self._training(group)
        rows = len(prepared.data["train"])
        trained = training.total_steps(rows) / training.steps_per_epoch(rows) * rows
        splits = self._splits(group.phase, prepared.task)
        evaluated = sum(len(prepared.data[split]) for split in splits)
        evaluated += (len(training.evaluation_steps(rows)) - 1) * len(prepared.data[splits[0]])
        return len(group.members) * (trained + evaluated / 3)

    def run(self) -> list[dict[str, Any]]:
        """Runs every pack of which a result is missing; all results of the study, in its order."""
        self.out.mkdir(parents=True, exist_ok=True)
        with _locked(self.out):
            self._clear_leftovers()
            known = read_object(self.out / "study.json") or {}
            self._measure()
            self._write_study(known, complete=False)
            for source in self.sources.values():
                self._look_up(source)
            results = []
            for takes in (False, True):  # those that take ranks of others come after these
                for task in self.study.tasks:
                    for entry in self.study.methods:
                        if entry.swept and entry.shared_with is None and (entry.ranks_of is not None) == takes:
                            results += self._sweep(self._sharers(entry), task)
                    for group in self.groups:
                        if group.phase == "final" and group.task == task and (group.entry.ranks_of is not None) == takes:
                            results += self._run_group(group)
            self._write_study(known, complete=True)
        if self._strangers:
            self.say(f"note: some results come from {'; '.join(sorted(self._strangers))}, and are kept as they are")
        return results

    def _clear_leftovers(self) -> None:
        """Removes the temporary files of a killed process: those of our own names, in our own folders."""
        names = (*records.FILES, "study.json", "packs.json", "pack.json", "checkpoint.safetensors")
        runs = [folder for folder in self.out.iterdir() if re.fullmatch(r"[0-9a-f]{24}", folder.name)]
        packs = [path.parent for path in (self.out / "packs").rglob("pack.json")]
        for folder in (self.out, *runs, *packs):
            for name in names:
                for leftover in folder.glob(f".{name}.*.tmp"):
                    leftover.unlink(missing_ok=True)

    # -- the sweep --------------------------------------------------------------------------------------------------

    def _sharers(self, entry: Entry) -> list[Entry]:
        """The entries that train at one rate with this one, itself first where the others name it."""
        first = entry.shared_with or entry.label
        return [e for e in (*self.study.methods, *self.sources.values()) if first in (e.label, e.shared_with)] or [entry]

    def _sweep(self, entries: list[Entry], task: str) -> list[dict[str, Any]]:
        """Runs a method's grid, widens it while its best rate stands at the edge, and goes up the rungs; all results.

        Entries that share a rate take every step together, by the scores of all of them.
        """
        labels = [entry.label for entry in entries]
        known = (*self.groups, *self.added)
        grid = [g for g in known if g.phase == "sweep" and g.entry.label in labels and g.task == task]
        results = [result for group in grid for result in self._run_group(group)]
        size = len(entries[0].learning_rates)
        most = self.study.sweep.most_trials(size, self.study.quick)
        index = len(grid)
        while (rate := sweep.next_rate(self._scores(entries, task, 0), most)) is not None:
            for entry in entries:
                results += self._run_added(grid_groups(self.study, self.pack, entry, task, [rate], index=index))
            index += 1
        if self.study.sweep.halving is not None:
            for rung in range(1, self.study.sweep.rungs):
                rates = sweep.survivors(self._scores(entries, task, rung - 1), self.study.sweep.halving)
                for entry in entries:
                    results += self._run_added(grid_groups(self.study, self.pack, entry, task, rates, rung))
        return results

    def _run_added(self, found: list[Group]) -> list[dict[str, Any]]:
        """Runs packs that the study's file does not show."""
        self.added += found
        self.more(sum(self._work(group) for group in found))
        return [result for group in found for result in self._run_group(group)]

    def _scores(self, entries: Sequence[Entry], task: str, rung: int) -> dict[float, list[float | None]]:
        """Rate -> selection scores of the entries' seeds, at one rung of a sweep, of what has finished."""
        labels, found = [entry.label for entry in entries], []
        for group in (*self.groups, *self.added):
            if (group.phase, group.task, group.rung) == ("sweep", task, rung) and group.entry.label in labels:
                for seed, rate in group.members:
                    result = self._result(self._specify(group, seed, rate))
                    if result is not None:
                        found.append((rate, result["selection_score"]))
        return sweep.by_rate(found)

    # -- ranks of another entry -------------------------------------------------------------------------------------

    def _look_up(self, source: Entry) -> None:
        """Finds the finished runs of an entry that others take their ranks of, and that was not asked for.

        Raises:
            ValueError: some are not finished.
        """
        self._makes = False
        alone = groups(self.study.model_copy(update={"methods": [source]}), self.pack)
        self.added += alone
        self.more(sum(self._work(group) for group in alone))
        try:
            for task in self.study.tasks:
                if source.swept:
                    self._sweep([source], task)
                for group in alone:
                    if group.phase == "final" and group.task == task:
                        self._run_group(group)
        finally:
            self._makes = True

    def _placement(self, entry: Entry, task: str, seed: int) -> tuple[dict[str, int], dict[str, float]]:
        """Rank and scale of each site at the end of the final run, with that seed, of the entry that this one takes them of.

        Raises:
            ValueError: that run is not there, or failed.
        """
        key = entry.ranks_of, task, seed
        if key not in self._placements:
            known = (*self.groups, *self.added)
            finals = [g for g in known if (g.phase, g.entry.label, g.task) == ("final", entry.ranks_of, task)]
            group = next((g for g in finals if seed in [s for s, _ in g.members]), None)
            if group is None:
                raise ValueError(f'{entry.label}: "{entry.ranks_of}" has no final run with seed {seed}: add it to the seeds')
            result = self._result(self._specify(group, seed, dict(self._rates(group))[seed]))
            if result is None or result["status"] != "completed":
                what = "is not finished" if result is None else f"failed ({result['error']})"
                raise ValueError(
                    f'{entry.label}: the run of "{entry.ranks_of}" on {task} with seed {seed} {what}, so that there are no '
                    f"ranks to take: run it again (--retry-failed), or take the entry out"
                )
            scale = result["scale"]
            scales = scale if isinstance(scale, dict) else dict.fromkeys(result["ranks"], scale)
            self._placements[key] = result["ranks"], scales
        return self._placements[key]

    def _settings(self, entry: Entry, task: str, seed: int, total: int) -> Settings:
        """The settings of a run: the entry's, with the ranks of another entry's run where it takes them."""
        if entry.ranks_of is not None:
            ranks, scales = self._placement(entry, task, seed)
            if entry.permuted:
                ranks = budget.permuted(ranks, self.prepared[task].shapes, seed)
            entry = budget.taking(entry, ranks, scales)
        return entry.resolved(total)

    # -- equal time, equal memory -----------------------------------------------------------------------------------

    def _measure(self) -> None:
        """Takes the time or the memory of a step of each method where that is what the budget makes equal.

        Measured once and written down: every later sitting, and who takes up the committed study, goes on with the same.
        """
        equal = self.study.budget.equal
        if equal not in ("time", "memory"):
            return
        for folder in (COMMITTED / self.study.name, self.out):
            self.measured |= (read_object(folder / "budget.json") or {}).get("measured", {})
        for task in self.study.tasks:
            known = self.measured.setdefault(task, {})
            for entry in self.study.methods:
                if entry.label not in known:
                    self.say(f"{entry.label} {task}: measuring a step")
                    known[entry.label] = self._fitted(entry, task) if equal == "memory" else self._probe(entry, task, 1)
        write_json(self.out / "budget.json", {"schema": SCHEMA, "equal": equal, "measured": self.measured})

    def _fitted(self, entry: Entry, task: str) -> dict[str, float]:
        """The fewest micro-batches with which a step stays within the budget of memory.

        Raises:
            ValueError: a step of one row each does not.
        """
        batch, accumulation = self.study.training.batch_size, self.study.training.accumulation
        while True:
            found = self._probe(entry, task, accumulation)
            if found["peak_bytes"] <= self.study.budget.bytes:
                return {**found, "accumulation": accumulation}
            if accumulation == batch:
                raise ValueError(
                    f"{entry.label} on {task} needs {int(found['peak_bytes']):,} bytes for a step of one row at a time, above "
                    f"budget.bytes = {self.study.budget.bytes:,}: raise it, or take the method out"
                )
            accumulation = min(2 * accumulation, batch)

    def _probe(self, entry: Entry, task: str, accumulation: int) -> dict[str, float]:
        """Seconds and peak bytes of a training step of this method alone, on this machine, now."""
        prepared = self.prepared[task]
        training = self.study.training.model_copy(update={"accumulation": accumulation})
        settings = entry.resolved(training.total_steps(len(prepared.data["train"])))
        with tempfile.TemporaryDirectory() as folder:
            run = Run("final", entry, settings, task, 0, min(entry.learning_rates), training, 0, "")
            trainer = Trainer(self._as_pack([run]), prepared.data, Path(folder) / "checkpoint", [Path(folder)])
            seconds = []
            for step in range(1, min(PROBE_STEPS, trainer.total) + 1):
                trainer.step = step
                began = time.perf_counter()
                trainer.train_step()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                seconds.append(time.perf_counter() - began)
            peak = trainer.memory.read()
        if peak is None and self.study.budget.equal == "memory":
            raise ValueError('budget.equal = "memory": this system does not tell the peak; take another budget')
        return {"seconds_per_step": statistics.median(seconds[1:] or seconds), "peak_bytes": peak or 0}

    def _training(self, group: Group) -> Training:
        """How the runs of a group train: as its phase and rung say, with the steps or micro-batches of the budget."""
        rows = len(self.prepared[group.task].data["train"])
        rung = group.rung if group.phase == "sweep" else None
        training = phase_training(self.study, group.phase, rows, rung)
        measured = self.measured.get(group.task, {})
        if not measured:
            return training
        mine = measured[group.entry.label]
        if self.study.budget.equal == "memory":
            return training.model_copy(update={"accumulation": int(mine["accumulation"])})
        reference = measured[self._reference()]
        return budget.steps_for_time(training, rows, mine["seconds_per_step"], reference["seconds_per_step"])

    def _reference(self) -> str:
        """The label that the others are held against: the study's own, else full fine-tuning, else the first."""
        labels = [entry.label for entry in self.study.methods]
        full = next((entry.label for entry in self.study.methods if entry.method == "full"), labels[0])
        return self.study.reference if self.study.reference in labels else full

    # -- packs ------------------------------------------------------------------------------------------------------

    def _run_group(self, group: Group) -> list[dict[str, Any]]:
        runs = [self._specify(group, seed, rate) for seed, rate in self._rates(group)]
        what = f"{group.entry.label} {group.task} ({group.phase})"
        missing = [run for run in runs if self._result(run) is None]
        done = len(runs) - len(missing)
        if done:
            self.progress(what, self._work(group) * done / len(runs))
        if missing and not self._makes:
            takers = ", ".join(e.label for e in self.study.methods if e.ranks_of == group.entry.label)
            raise ValueError(
                f'{takers}: takes its ranks from "{group.entry.label}", of which {len(missing)} of {len(runs)} runs '
                f"({group.phase}, {group.task}) are not finished in {self.out}: name it in --methods too"
            )
        while missing:
            begun = self._begun(group, runs, missing)
            members = missing if begun is None else begun
            folder = self._pack_folder(group, members)
            self._run_pack(members, folder, group.index, what)
            missing = [run for run in runs if self._result(run) is None]
        for folder, names in self._pack_folders(group):
            if all((self.out / name / "result.json").is_file() for name in names):
                shutil.rmtree(folder, ignore_errors=True)
        return [self._result(run) for run in runs]

    def _pack_folders(self, group: Group) -> Iterator[tuple[Path, list[str]]]:
        """The folders of packs of this group that were begun, under this study or an earlier form of it, and their members."""
        for folder in sorted((self.out / "packs").glob(f"{glob.escape(group.name)}-????????")):
            names = (read_object(folder / "pack.json") or {}).get("members", [])
            if names:
                yield folder, names

    def _pack_folder(self, group: Group, members: Sequence[Run]) -> Path:
        """A folder that no other pack has: other members, or other settings of theirs, are another pack."""
        digest = hashlib.sha256("".join(run.fingerprint for run in members).encode()).hexdigest()[:8]
        return self.out / "packs" / f"{group.name}-{digest}"

    def _begun(self, group: Group, runs: Sequence[Run], missing: Sequence[Run]) -> list[Run] | None:
        """The members of a pack that was begun and cut off: it goes on as it was, whoever has finished since."""
        known = {run.fingerprint: run for run in runs}
        wanted = {run.fingerprint for run in missing}
        for _, names in self._pack_folders(group):
            if all(name in known for name in names) and wanted & set(names):
                return [known[name] for name in names]
        return None

    def _run_pack(self, runs: Sequence[Run], folder: Path, index: int, what: str, note: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        pack_file = {"schema": SCHEMA, "members": [run.fingerprint for run in runs], "size": None, "note": None}
        begun = read_object(folder / "pack.json")
        if begun is not None and begun.get("members") == pack_file["members"]:
            if begun["size"] is not None:  # it was split before it was cut off, and stays so
                self._apart(runs, folder, index, what, begun["size"], begun["note"])
                return
        else:
            begun = None
            write_json(folder / "pack.json", pack_file)
        pack, prepared = self._as_pack(runs), self.prepared[runs[0].task]
        for member, run in enumerate(runs):
            self._write_config(run, runs, index, member, keep=begun is not None)
        logs = [self.out / run.fingerprint for run in runs]
        label = f"{what}, {len(runs)} packed" if len(runs) > 1 else what
        tell = lambda rows: self.progress(label, rows)  # noqa: E731
        trainer, split = None, None
        try:
            checkpoint = folder / "checkpoint.safetensors"
            trainer = Trainer(pack, prepared.data, checkpoint, logs, self.study.checkpoint_seconds, tell)
            outcomes = trainer.run()
        except OSError:
            raise
        except NotPackable as error:
            split = 1, str(error)
        except Exception as error:  # a failed run is a result, and the others go on
            if not _is_out_of_memory(error):
                line = str(error).splitlines()[0] if str(error) else ""
                failed = Outcome(f"{type(error).__name__}: {line}", traceback.format_exc())
            elif len(runs) == 1:
                failed = Outcome(
                    "out of memory", f"{error}\nlower batch_size, raise accumulation, or set gradient_checkpointing"
                )
            else:
                split = (len(runs) + 1) // 2, f"a pack of {len(runs)} does not fit in memory"
            outcomes = [] if split else [dataclasses.replace(failed, facts={}) for _ in runs]
        if split:
            # Out of the except block: the error's traceback, which holds the model that did not fit, is gone by now.
            trainer = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            size, why = split
            self.say(f"note: {what}: {why}" + (f", so {size} are packed" if size > 1 else ""))
            write_json(folder / "pack.json", {**pack_file, "size": size, "note": why})
            self._apart(runs, folder, index, what, size, why)
            return
        if runs[0].phase == "final" and any(outcome.error is None for outcome in outcomes):
            self._examine(trainer, runs, outcomes)
        for member, (run, outcome) in enumerate(zip(runs, outcomes, strict=True)):
            if self._result(run) is not None:  # finished before this pack was cut off
                continue
            if run.phase == "final" and outcome.error is None:
                variants.save_pretrained(trainer.adapter, self.out / run.fingerprint / "adapter", member=member)
                self._write_predictions(run, outcome)
            self._write_result(run, outcome, index, len(runs), note)

    def _examine(self, trainer: Trainer, runs: Sequence[Run], outcomes: Sequence[Outcome]) -> None:
        """Writes what became of each weight (sites.json) and, where asked for, what each site's rank is worth."""
        adapter, study = trainer.adapter, self.study
        is_new = [outcome.error is None and self._result(run) is None for run, outcome in zip(runs, outcomes, strict=True)]
        if not any(is_new) or not adapter.changed_weights():
            return
        if study.anatomy:
            try:
                found = anatomy(adapter, bases=self._bases)
            except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:
                self.say(f"note: {runs[0].entry.label}: no sites.json, a decomposition did not converge ({error})")
                found = None
            intruders = {"looked_at": INTRUDERS, "cosine": COSINE}
            for run, new, sites in zip(runs, is_new, found or [], strict=found is not None):
                if new:
                    records.write_sites(self.out / run.fingerprint, TOP, intruders, sites)
        wanted = knockout.seeds(study.knock_out, study.seeds)
        members = [k for k, (run, new) in enumerate(zip(runs, is_new, strict=True)) if new and run.seed in wanted]
        if members:
            prepared = self.prepared[runs[0].task]
            split = self._selection_split(prepared.task)
            measured = knockout.knock_out(
                adapter,
                trainer.processor,
                prepared.task,
                split,
                prepared.data[split].random_part(knockout.ROWS, KNOCKOUT_ROWS),
                trainer.pack.training.evaluation_batch_size,
                self.precision,
                members,
            )
            for member, one in zip(members, measured, strict=True):
                records.write_knock_out(self.out / runs[member].fingerprint, one)

    def _as_pack(self, runs: Sequence[Run]) -> Pack:
        first = runs[0]
        prepared = self.prepared[first.task]
        return Pack(
            method=first.entry.method,
            settings=together([run.settings for run in runs]),
            targets=["^" + re.escape(name) for name in prepared.targets[first.entry.label]] or first.entry.targets,
            task=prepared.task,
            model=self.study.model,
            training=first.training,
            seeds=tuple(run.seed for run in runs),
            learning_rates=tuple(run.learning_rate for run in runs),
            splits=self._splits(first.phase, prepared.task),
            device=self.device,
            precision=self.precision,
            best_epoch=self.study.protocol == "best-dev-epoch",
        )

    def _apart(self, runs: Sequence[Run], folder: Path, index: int, what: str, size: int, note: str | None) -> None:
        """The same members in smaller packs, each with a folder of its own, so that each resumes."""
        for at in range(0, len(runs), size):
            part = runs[at : at + size]
            if any(self._result(run) is None for run in part):
                self._run_pack(part, folder / f"part-{at}", index, what, note)

    def _splits(self, phase: str, task: Task) -> tuple[str, ...]:
        """What a run is evaluated on: a sweep's on the selection split alone, a final one's on the score split too."""
        if self.study.protocol == "best-dev-epoch":
            return (task.dev_split, *task.extra_dev_splits)
        if phase == "sweep":
            return (task.selection_split,)
        selection = (task.selection_split,) if self.study.training.evaluations_per_epoch else ()
        return (*selection, task.score_split)

    def _selection_split(self, task: Task) -> str:
        return task.dev_split if self.study.protocol == "best-dev-epoch" else task.selection_split

    def _score_split(self, task: Task) -> str:
        return task.dev_split if self.study.protocol == "best-dev-epoch" else task.score_split

    def _train_split(self, task: Task) -> str:
        """What is trained on: a paper's own protocol keeps nothing back to choose on."""
        return task.official_train_split if self.study.protocol == "best-dev-epoch" else task.train_split

    def _evaluated(self, task: Task) -> list[str]:
        if self.study.protocol == "best-dev-epoch":
            return [task.dev_split, *task.extra_dev_splits]
        return [task.selection_split, task.score_split]

    # -- runs -------------------------------------------------------------------------------------------------------

    def _rates(self, group: Group) -> list[tuple[int, float]]:
        """The members with their rates; that of a final run after a sweep is the best of the sweep."""
        if all(rate is not None for _, rate in group.members):
            return list(group.members)
        rung = 0 if self.study.sweep.halving is None else self.study.sweep.rungs - 1
        best = sweep.ranked(self._scores(self._sharers(group.entry), group.task, rung))[0]
        return [(seed, best) for seed, _ in group.members]

    def _specify(self, group: Group, seed: int, rate: float) -> Run:
        prepared, training = self.prepared[group.task], self._training(group)
        settings = self._settings(group.entry, group.task, seed, training.total_steps(len(prepared.data["train"])))
        facts = {
            "numerics": NUMERICS,
            "phase": group.phase,
            "protocol": self.study.protocol,
            "method": group.entry.method,
            "settings": settings.identity(),
            "targets": prepared.targets[group.entry.label],
            "task": group.task,
            "data": prepared.data_hash,
            "model": models.content_hash(self.study.model),
            "seed": seed,
            "learning_rate": rate,
            "training": {**training.identity(), "precision": self.precision},
            "device": self.device.type,
        }
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:24]
        return Run(group.phase, group.entry, settings, group.task, seed, rate, training, group.rung, fingerprint)

    def _result(self, run: Run) -> dict[str, Any] | None:
        """The run's result, from this folder or from the committed ones, which are copied here."""
        mine = self.out / run.fingerprint
        if not (mine / "result.json").is_file():
            for name, content in self._committed(run.fingerprint).items():  # the result last: a folder with one is whole
                write_file(mine / name, content)
        if not (mine / "result.json").is_file():
            return None
        result, config = read_object(mine / "result.json"), read_object(mine / "config.json")
        if result is None or config is None or "status" not in result:
            self.say(f"note: {mine / 'result.json'} or its config.json is missing or no JSON; the run is made again")
            return None
        if result["status"] == "failed" and self.retry_failed and run.fingerprint not in self._made:
            return None
        if any(written.get(k) != v for written in (result, config) for k, v in self._names(run).items()):
            # The same run under another label or in another study: the numbers stay, the names follow the file.
            records.rename(mine, config, result, self._names(run), self.study.quick)
            result = read_object(mine / "result.json")
        for name, version in self.versions.items():
            if config.get("versions", {}).get(name, version) != version:
                self._strangers.add(f"{name} {config['versions'][name]} (here {version})")
        return result

    def _committed(self, fingerprint: str) -> Mapping[str, bytes]:
        """The files of a run that an archive, of the committed study or in our own folder, or its folder has; else none.

        Raises:
            ValueError: an archive is damaged.
        """
        theirs = COMMITTED / self.study.name
        if self._archived is None:
            self._archived = archive.read(theirs / archive.NAME) | archive.read(self.out / archive.NAME)
        if fingerprint in self._archived:
            return self._archived[fingerprint]
        folder = theirs / "runs" / fingerprint
        return records.contents(folder) if (folder / records.RESULT).is_file() else {}

    # -- what is written ------------------------------------------------------------------------------------------------

    def _write_config(self, run: Run, runs: Sequence[Run], index: int, member: int, keep: bool) -> None:
        """Writes config.json; of a run that goes on (`keep`) the one that it was begun with stays."""
        prepared = self.prepared[run.task]
        folder = self.out / run.fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "fingerprint": run.fingerprint,
            "numerics": NUMERICS,
            **self._names(run),
            "quick": self.study.quick,
            "method_settings": run.settings.model_dump(mode="json"),
            "allocation": _placed_by(run),
            "ranks_of": run.entry.ranks_of,
            "training": run.training.model_dump(mode="json"),
            "targets": run.entry.targets if method(run.entry.method).takes_targets else None,
            "targets_resolved": prepared.targets[run.entry.label],
            "caption": prepared.captions,
            "licence": prepared.task.licence,
            "data_hash": prepared.data_hash,
            "model_hash": models.content_hash(self.study.model),
            "versions": self.versions,
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "device_name": measure.device_name(self.device),
            "precision": self.precision,
            **self.commit,
            "pack": {"index": index, "size": len(runs), "member": member, "members": [r.fingerprint for r in runs]},
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        if not keep or read_object(folder / "config.json") is None:
            records.write_config(folder, config)

    def _write_predictions(self, run: Run, outcome: Outcome) -> None:
        """Writes the predictions of the scored split, where the kind of task keeps them."""
        task = self.prepared[run.task].task
        split = self._score_split(task)
        made = outcome.predictions.get(split)
        stored = None if made is None else kinds.get(task.kind).stored(made)
        if stored is not None:
            records.write_predictions(self.out / run.fingerprint, split, stored)

    def _write_result(self, run: Run, outcome: Outcome, index: int, size: int, note: str | None) -> None:
        task = self.prepared[run.task].task
        selection, split = self._selection_split(task), self._score_split(task)
        scores = {split: metrics.get(task.metric) for split, metrics in outcome.metrics.items()}
        failed = outcome.error is not None
        result = {
            "fingerprint": run.fingerprint,
            **self._names(run),
            "status": "failed" if failed else "completed",
            "error": outcome.error,
            "traceback": outcome.detail,
            "metric": task.metric,
            "protocol": self.study.protocol,
            "selection_score": None if failed else scores.get(selection),
            "selection_split": selection,
            "score": None if failed else scores.get(split),
            "split": split,
            "score_standard_error": None if failed else outcome.standard_errors.get(split),
            "score_rows": None if failed else outcome.rows.get(split),
            "metrics": outcome.metrics,
            **outcome.facts,
            "pack_size": size,
            "pack_index": index,
            "device": self.device.type,
            "precision": self.precision,
            "packing_note": note,
        }
        records.write_result(self.out / run.fingerprint, result)
        self._made.add(run.fingerprint)

    def _names(self, run: Run) -> dict[str, Any]:
        return {
            "study": self.study.name,
            "phase": run.phase,
            "method": run.entry.method,
            "setting": run.entry.label,
            "task": run.task,
            "model": self.study.model,
            "seed": run.seed,
            "learning_rate": run.learning_rate,
            "rung": run.rung,
        }

    def _set_out_to_test(self) -> dict[str, Any]:
        study = self.study
        hypotheses = [one.model_dump(mode="json") for one in study.hypothesis]
        return {key: value for key, value in (("hypotheses", hypotheses), ("looks", list(study.looks))) if value}

    def _write_study(self, known: dict[str, Any], complete: bool) -> None:
        """`known`: what study.json said before; of it stay the methods that were not asked for now."""
        labels = [entry.label for entry in self.study.methods]
        full = next((entry.label for entry in self.study.methods if entry.method == "full"), None)
        trials = {e.label: self.study.sweep.most_trials(len(e.learning_rates), self.study.quick)
                  for e in self.study.methods if e.swept}  # fmt: skip
        others = [label for label in known.get("methods", []) if label not in labels]
        value = {
            "study": self.study.name,
            "quick": self.study.quick,
            "title": self.study.title or self.study.name,
            "captions": list(dict.fromkeys(c for p in self.prepared.values() for c in p.captions)),
            "reference": self.study.reference or full or known.get("reference"),
            "protocol": self.study.protocol,
            "margin": self.study.margin,
            "seeds": list(self.study.seeds),
            "trials": {**known.get("trials", {}), **trials},
            "budget": self.study.budget.model_dump(mode="json"),
            **self._set_out_to_test(),
            "methods": [*known.get("methods", []), *(x for x in labels if x not in known.get("methods", []))]
            if others
            else labels,
            "complete": complete and (not others or bool(known.get("complete"))),
        }
        records.write_study(self.out, value)
        known_packs = (*self.groups, *self.added)
        packs = [{"pack": g.name, "members": [{"seed": s, "learning_rate": r} for s, r in g.members]} for g in known_packs]
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            mine = {pack["pack"] for pack in packs}
            written = json.loads((self.out / "packs.json").read_text())["packs"]
            packs += [pack for pack in written if others and pack["pack"] not in mine]
        write_json(self.out / "packs.json", {"schema": SCHEMA, "pack": self.pack, "packs": packs})


def _twins(entries: Sequence[Entry], total: int, targets: dict[str, list[str]]) -> list[str]:
    """Faults: entries that would be the same runs, which could carry one label only."""
    faults, seen = [], {}
    for entry in entries:
        if entry.label not in targets:
            continue  # it has a fault of its own
        taken = entry.ranks_of, entry.permuted
        same = entry.method, entry.resolved(total).model_dump_json(), tuple(targets[entry.label]), taken
        for rate in entry.learning_rates:
            other = seen.setdefault((same, rate), entry.label)
            if other != entry.label:
                faults.append(f'"{other}" and "{entry.label}" are the same runs at learning rate {rate:g}: take one out')
    return faults


def _placed_by(run: Run) -> str:
    """What placed the ranks of a run: see `Settings.allocation`; "taken" from another run, or taken and "permuted"."""
    if run.entry.ranks_of is not None:
        return "permuted" if run.entry.permuted else "taken"
    return method(run.entry.method).placed_by(run.settings)


def _is_out_of_memory(error: Exception) -> bool:
    # torch has no class of its own for the CPU's allocator, which raises RuntimeError("... DefaultCPUAllocator: ...").
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _given(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(exclude_unset=True)


def _subset(encoded: Dataset, split: str, training: Training) -> Dataset:
    """A fixed random part of a split, the same for every method and seed, where the study asks for one."""
    return encoded.random_part(training.train_examples if split == "train" else training.evaluation_examples, SUBSET)


def _subset_captions(task: Task, data: dict[str, Dataset], training: Training) -> list[str]:
    cut = training.train_examples is not None or training.evaluation_examples is not None
    parts = ", ".join(f"{split} {encoded.num_examples}" for split, encoded in data.items())
    return [f"{task.name}: a fixed random part of the data ({parts} examples)."] if cut else []


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
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
