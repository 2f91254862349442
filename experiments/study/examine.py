"""What is measured of a pack once it has trained: what became of each weight, and what each site's rank is worth."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rankwise.experiments import across, knockout, records
from rankwise.experiments.data.draws import KNOCKOUT_ROWS
from rankwise.experiments.study import splits
from rankwise.experiments.study.context import Context
from rankwise.experiments.study.runs import PlannedRun
from rankwise.experiments.training.trainer import Trainer
from rankwise.variants.weights.anatomy import COSINE, INTRUDERS, TOP, anatomy


class Examiner:
    """Writes sites.json, knockout.json and across.json of final runs, as the study asks for them."""

    def __init__(self, context: Context):
        self.context = context
        self._untuned: dict[Any, dict[str, float | None]] = {}  # how the base is quantised -> its score on each task
        self._bases: dict[str, Any] = {}  # what anatomy asks of the pre-trained weights, the same for every run

    def examine(self, trainer: Trainer, runs: Sequence[PlannedRun], is_new: Sequence[bool]) -> None:
        """
        Args:
            trainer: at the end of its training.
            is_new: for each run whether it completed just now, and is to be examined.
        """
        if not any(is_new):
            return
        if self.context.study.across_tasks:
            self._write_across(trainer, runs, is_new)
        if not trainer.adapter.changed_weights():
            return
        if self.context.study.anatomy:
            self._write_sites(trainer, runs, is_new)
        seeds = knockout.seeds(self.context.study.knock_out, self.context.study.seeds)
        members = [k for k, (run, new) in enumerate(zip(runs, is_new, strict=True)) if new and run.seed in seeds]
        if members:
            self._write_knock_outs(trainer, runs, members)

    def reads_weights(self, trainer: Trainer, is_new: Sequence[bool]) -> bool:
        """Whether `examine` reads the frozen weights, which other processes that share them must do at the same time."""
        return any(is_new) and self.context.study.anatomy and bool(trainer.adapter.changed_weights())

    def follow(self, trainer: Trainer) -> None:
        """What every process but the first does meanwhile, where they share the base: reads each weight when the first does."""
        with contextlib.suppress(np.linalg.LinAlgError, torch.linalg.LinAlgError):
            anatomy(trainer.adapter, bases=self._bases)

    def _write_sites(self, trainer: Trainer, runs: Sequence[PlannedRun], is_new: Sequence[bool]) -> None:
        try:
            sites_of_each = anatomy(trainer.adapter, bases=self._bases)
        except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:
            self.context.say(f"note: {runs[0].entry.label}: no sites.json, a decomposition did not converge ({error})")
            return
        intruders = {"looked_at": INTRUDERS, "cosine": COSINE}
        for run, new, sites in zip(runs, is_new, sites_of_each, strict=True):
            if new:
                records.write_sites(self.context.out / run.fingerprint, TOP, intruders, sites)

    def _write_across(self, trainer: Trainer, runs: Sequence[PlannedRun], is_new: Sequence[bool]) -> None:
        study, precision, form = self.context.study, self.context.precision, runs[0].entry.scheme
        tasks = {name: (one.task, one.data[splits.scored(study, one.task)]) for name, one in self.context.tasks.items()}
        if form not in self._untuned:
            self._untuned[form] = across.untuned(study, tasks, self.context.device, precision, form)
        others = {name: one for name, one in tasks.items() if name != runs[0].task}
        size = trainer.pack.training.evaluation_batch_size
        found = across.scores(trainer.adapter, trainer.processor, others, size, trainer.pack.precision)
        for run, new, scores in zip(runs, is_new, found, strict=True):
            if new:
                records.write_across(self.context.out / run.fingerprint, scores, self._untuned[form])

    def _write_knock_outs(self, trainer: Trainer, runs: Sequence[PlannedRun], members: Sequence[int]) -> None:
        prepared = self.context.tasks[runs[0].task]
        split = splits.selection(self.context.study, prepared.task)
        measured = knockout.knock_out(
            trainer.adapter,
            trainer.processor,
            prepared.task,
            split,
            prepared.data[split].random_part(knockout.ROWS, KNOCKOUT_ROWS),
            trainer.pack.training.evaluation_batch_size,
            self.context.precision,
            members,
        )
        for member, one in zip(members, measured, strict=True):
            records.write_knock_out(self.context.out / runs[member].fingerprint, one)
