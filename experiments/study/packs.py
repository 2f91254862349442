"""Packs in their folders: begun, gone on with after a kill, split where their members cannot train together.

A pack's folder, packs/<name>-<members>/, holds its checkpoint and pack.json: its members, and the size of the smaller packs
that they are split into.  It goes once all of its runs are finished.
"""

import dataclasses
import gc
import glob
import hashlib
import re
import shutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rankwise import variants
from rankwise.experiments import models, records
from rankwise.experiments.files import write_file, write_json
from rankwise.experiments.records import SCHEMA, read_object
from rankwise.experiments.study.context import Context
from rankwise.experiments.study.examine import Examiner
from rankwise.experiments.study.plan import PackPlan
from rankwise.experiments.study.runs import PlannedRun, as_pack
from rankwise.experiments.study.store import RunStore
from rankwise.experiments.training.pack import Outcome, Pack
from rankwise.experiments.training.trainer import Trainer
from rankwise.variants.adapter.step import NotPackable

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Job:
    """A pack that is to be trained: all of its runs, those without a result, and what the progress bar calls it."""

    plan: PackPlan
    runs: Sequence[PlannedRun]
    missing: Sequence[PlannedRun]
    what: str


@dataclass(frozen=True)
class Split:
    """Why members cannot train together, and how many of them are to be tried next."""

    size: int
    reason: str


class PackRunner:
    """Trains the missing runs of planned packs, and writes their folders."""

    def __init__(self, context: Context, store: RunStore):
        self.context, self.store, self.examiner = context, store, Examiner(context)

    def run(self, plan: PackPlan, runs: Sequence[PlannedRun], missing: Sequence[PlannedRun], what: str) -> None:
        """
        Args:
            runs: every member of the pack.
            missing: those without a result.
            what: what the progress bar calls it.
        """
        while missing:
            members = self._begun(plan, runs, missing) or missing
            self._run_members(members, self._folder(plan, members), plan.index, what)
            missing = self.store.missing(runs)
        self.tidy(plan)

    def tidy(self, plan: PackPlan) -> None:
        """Removes the folders of packs of which every run is finished."""
        for folder, fingerprints in self._folders(plan):
            if all(self.store.has_files(fingerprint) for fingerprint in fingerprints):
                shutil.rmtree(folder, ignore_errors=True)

    # -- folders ----------------------------------------------------------------------------------------------------

    def _folder(self, plan: PackPlan, members: Sequence[PlannedRun]) -> Path:
        """A folder that no other pack has: other members, or other settings of theirs, are another pack."""
        digest = hashlib.sha256("".join(run.fingerprint for run in members).encode()).hexdigest()[:8]
        return self.context.out / "packs" / f"{plan.name}-{digest}"

    def _folders(self, plan: PackPlan) -> Iterator[tuple[Path, list[str]]]:
        """The folders of packs of this plan that were begun, under this study or an earlier form of it; their members."""
        for folder in sorted((self.context.out / "packs").glob(f"{glob.escape(plan.name)}-????????")):
            fingerprints = (read_object(folder / "pack.json") or {}).get("members", [])
            if fingerprints:
                yield folder, fingerprints

    def _begun(
        self, plan: PackPlan, runs: Sequence[PlannedRun], missing: Sequence[PlannedRun]
    ) -> list[PlannedRun] | None:  # fmt: skip
        """The members of a pack that was begun and cut off: it goes on as it was, whoever has finished since."""
        known = {run.fingerprint: run for run in runs}
        wanted = {run.fingerprint for run in missing}
        for _, fingerprints in self._folders(plan):
            if all(one in known for one in fingerprints) and wanted & set(fingerprints):
                return [known[one] for one in fingerprints]
        return None

    # -- elsewhere --------------------------------------------------------------------------------------------------

    def files(self, job: Job) -> dict[str, bytes]:
        """What is written of a pack so far, by its path in the study's folder, for who goes on with it in another.

        Of finished runs what tells that they are; of a result that is to be made again nothing.
        """
        missing = {run.fingerprint for run in job.missing}
        folders = [folder for folder, _ in self._folders(job.plan)]
        folders += [self.context.out / run.fingerprint for run in job.runs if run.fingerprint in missing]
        found = [path for folder in folders for path in sorted(folder.rglob("*")) if path.name != records.RESULT]
        for run in job.runs:
            if run.fingerprint not in missing:
                found += [self.context.out / run.fingerprint / name for name in (records.CONFIG, records.RESULT)]
        return {
            path.relative_to(self.context.out).as_posix(): path.read_bytes()
            for path in found
            if path.is_file() and not path.name.startswith(".")
        }

    def is_of(self, job: Job, name: str) -> bool:
        """Whether a file of that path in the study's folder is one of this pack."""
        first, *rest = name.split("/")
        if not rest or any(part in ("", "..") or part.startswith(".") or "\\" in part for part in rest):
            return False
        if first == "packs":
            return len(rest) > 1 and re.fullmatch(re.escape(job.plan.name) + "-[0-9a-f]{8}", rest[0]) is not None
        return first in {run.fingerprint for run in job.missing}

    def take(self, job: Job, files: Mapping[str, bytes]) -> None:
        """Writes what was made of a pack elsewhere.  A checkpoint comes after the logs that it counts on, a result last."""
        last = {CHECKPOINT: 1, records.RESULT: 2}
        for name in sorted(files, key=lambda name: last.get(name.rpartition("/")[2], 0)):
            write_file(self.context.out / name, files[name])
        self.store.made(run for run in job.missing if f"{run.fingerprint}/{records.RESULT}" in files)

    # -- members that train together --------------------------------------------------------------------------------

    def _run_members(
        self, runs: Sequence[PlannedRun], folder: Path, index: int, what: str, note: str | None = None
    ) -> None:  # fmt: skip
        """
        Args:
            note: why a larger pack was split into this one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        pack_file = {"schema": SCHEMA, "members": [run.fingerprint for run in runs], "size": None, "note": None}
        begun = read_object(folder / "pack.json")
        if begun is None or begun.get("members") != pack_file["members"]:
            begun = None
            write_json(folder / "pack.json", pack_file)
        elif begun["size"] is not None:  # it was split before it was cut off, and stays so
            self._run_smaller_packs(runs, folder, index, what, Split(begun["size"], begun["note"]))
            return
        for member, run in enumerate(runs):
            self.store.write_config(run, runs, index, member, keep=begun is not None)
        trained = self._train(runs, folder, what)
        if isinstance(trained, Split):
            gc.collect()  # the model that did not fit, which a traceback may have held
            if self.context.device.type == "cuda":
                torch.cuda.empty_cache()
            size = trained.size
            self.context.say(f"note: {what}: {trained.reason}" + (f", so {size} are packed" if size > 1 else ""))
            write_json(folder / "pack.json", {**pack_file, "size": size, "note": trained.reason})
            self._run_smaller_packs(runs, folder, index, what, trained)
        else:
            self._write(*trained, runs, index, note)

    def _run_smaller_packs(self, runs: Sequence[PlannedRun], folder: Path, index: int, what: str, split: Split) -> None:
        """The same members in smaller packs, each with a folder of its own, so that each resumes."""
        for at in range(0, len(runs), split.size):
            part = runs[at : at + split.size]
            if self.store.missing(part):
                self._run_members(part, folder / f"part-{at}", index, what, split.reason)

    def _train(self, runs: Sequence[PlannedRun], folder: Path, what: str) -> tuple[Trainer | None, list[Outcome]] | Split:
        """The trainer at its end and what became of each run; None and failures alike, where an error ended them all."""
        pack, data = as_pack(self.context, runs), self.context.tasks[runs[0].task].data
        label = f"{what}, {len(runs)} packed" if len(runs) > 1 else what
        logs = [self.context.out / run.fingerprint for run in runs]
        checkpoint = folder / CHECKPOINT
        processes, shares_base = self.context.processes, pack.training.shard_base
        if processes.size > 1:
            processes.told({"pack": pack.as_words(), **self._inputs(runs[0].task, pack.model)})
        try:
            trainer = processes.attempt(
                lambda: Trainer(
                    pack,
                    data,
                    checkpoint,
                    logs,
                    self.context.study.checkpoint_seconds,
                    lambda rows: self.context.progress(label, rows),
                    self.context.written,
                    processes,
                    self.context.saved,
                ),
                shares_base,
            )
            return trainer, trainer.run()
        except OSError:
            raise
        except NotPackable as error:
            return Split(1, str(error))
        except Exception as error:  # a failed run is a result, and the others go on
            if not processes.agreed(error):  # other processes are in the middle of the pack
                raise
            if not _is_out_of_memory(error):
                line = str(error).splitlines()[0] if str(error) else ""
                failed = Outcome(f"{type(error).__name__}: {line}", traceback.format_exc())
            elif len(runs) == 1:
                remedy = "lower batch_size, raise accumulation, or set gradient_checkpointing"
                failed = Outcome("out of memory", f"{error}\n{remedy}")
            else:
                return Split((len(runs) + 1) // 2, f"a pack of {len(runs)} does not fit in memory")
        return None, [dataclasses.replace(failed, facts={}) for _ in runs]

    def follow(self) -> None:
        """What every process but the first does: trains the packs that it is told, until there is no more."""
        context, processes = self.context, self.context.processes
        while (told := processes.told()) is not None:

            def started(told: dict[str, Any] = told) -> Trainer:
                """
                Raises:
                    ValueError: this process has other data, or another model.
                """
                task = told["pack"]["task"]
                own = self._inputs(task, told["pack"]["model"])
                if differing := [name for name, value in own.items() if told[name] != value]:
                    raise ValueError(
                        f"{task}: its {' and its '.join(differing)} differ from the first process's: give all the same"
                    )
                prepared = context.tasks[task]
                pack = Pack.of_words(told["pack"], prepared.task, context.device)
                return Trainer(pack, prepared.data, Path(), [], processes=processes)

            try:
                trainer = processes.attempt(started, told["pack"]["training"]["shard_base"])
                trainer.run()
                if trainer.shares_base and processes.told():
                    self.examiner.follow(trainer)
            except Exception as error:
                if not processes.agreed(error):
                    raise
            trainer = None
            gc.collect()  # the model, which the first process has let go of too

    def _inputs(self, task: str, model: str) -> dict[str, str]:
        """What must be the same in all processes."""
        return {"data": self.context.tasks[task].data_hash, "model": models.content_hash(model)}

    def _write(
        self,
        trainer: Trainer | None,
        outcomes: Sequence[Outcome],
        runs: Sequence[PlannedRun],
        index: int,
        note: str | None,
    ) -> None:
        """Writes what became of each run, but for those that finished before the pack was cut off."""
        if trainer is not None:
            is_final = runs[0].phase == "final"
            completed = [is_final and outcome.error is None for outcome in outcomes]
            is_new = [done and self.store.result(run) is None for run, done in zip(runs, completed, strict=True)]
            if trainer.shares_base:
                self.context.processes.told(self.examiner.reads_weights(trainer, is_new))
            self.examiner.examine(trainer, runs, is_new)
        for member, (run, outcome) in enumerate(zip(runs, outcomes, strict=True)):
            if self.store.result(run) is not None:
                continue
            if run.phase == "final" and trainer is not None and outcome.error is None:
                variants.save_pretrained(trainer.adapter, self.context.out / run.fingerprint / "adapter", member=member)
                self.store.write_predictions(run, outcome, trainer.processor)
            self.store.write_result(run, outcome, index, len(runs), note)


def _is_out_of_memory(error: Exception) -> bool:
    # torch has no class of its own for the CPU's allocator, which raises RuntimeError("... DefaultCPUAllocator: ...").
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
