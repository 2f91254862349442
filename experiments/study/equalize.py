"""How the runs of a study train; with a budget of time or memory, by what a step of each method was measured to take."""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from rankwise.experiments.checks import phase_training
from rankwise.experiments.config import Entry, Training
from rankwise.experiments.files import write_json
from rankwise.experiments.records import SCHEMA, read_object
from rankwise.experiments.study import budget
from rankwise.experiments.study import plan as plans
from rankwise.experiments.study.context import Context
from rankwise.experiments.study.plan import PackPlan
from rankwise.experiments.study.runs import PlannedRun, as_pack
from rankwise.experiments.training.trainer import Trainer

PROBE_STEPS = 6  # a step's time is the median of so many, the first left out; its peak that of the fullest step


class Equalizer:
    """The training of each pack."""

    def __init__(self, context: Context):
        self.context = context
        self.measured: dict[str, dict[str, dict[str, float]]] = {}  # task -> label -> what a step of it takes

    def training(self, plan: PackPlan) -> Training:
        """How the runs of a pack train: as its phase and rung say, with the steps or micro-batches of the budget."""
        rows = self.context.num_rows(plan.task)
        training = phase_training(self.context.study, plan.phase, rows, plan.rung if plan.phase == "sweep" else None)
        measured = self.measured.get(plan.task, {})
        if not measured:
            return training
        own = measured[plan.entry.label]
        if self.context.study.budget.equal == "memory":
            return training.model_copy(update={"accumulation": int(own["accumulation"])})
        reference = measured[plans.reference(self.context.study)]
        return budget.steps_for_time(training, rows, own["seconds_per_step"], reference["seconds_per_step"])

    def measure(self) -> None:
        """Takes the time or the memory of a step of each method where that is what the budget makes equal.

        Measured once and written down: every later sitting, and who takes up the committed study, goes on with the same.

        Raises:
            ValueError: several processes would share the steps that are measured.
        """
        context, equal = self.context, self.context.study.budget.equal
        if equal not in ("time", "memory"):
            return
        if context.processes.size > 1:
            raise ValueError(
                f'budget.equal = "{equal}" is measured in steps of one process, and there are {context.processes.size}: run '
                f"the study without torchrun, or take another budget"
            )
        for folder in (context.committed, context.out):
            self.measured |= (read_object(folder / "budget.json") or {}).get("measured", {})
        for task in context.study.tasks:
            known = self.measured.setdefault(task, {})
            for entry in context.study.methods:
                if entry.label not in known:
                    context.say(f"{entry.label} {task}: measuring a step")
                    known[entry.label] = self._fitted(entry, task) if equal == "memory" else self._probe(entry, task, 1)
        write_json(context.out / "budget.json", {"schema": SCHEMA, "equal": equal, "measured": self.measured})

    def _fitted(self, entry: Entry, task: str) -> dict[str, float]:
        """The fewest micro-batches with which a step stays within the budget of memory.

        Raises:
            ValueError: a step of one row each does not.
        """
        study = self.context.study
        batch, accumulation = study.training.batch_size, study.training.accumulation
        while True:
            measured = self._probe(entry, task, accumulation)
            if measured["peak_bytes"] <= study.budget.bytes:
                return {**measured, "accumulation": accumulation}
            if accumulation == batch:
                raise ValueError(
                    f"{entry.label} on {task} needs {int(measured['peak_bytes']):,} bytes for a step of one row at a time, "
                    f"above budget.bytes = {study.budget.bytes:,}: raise it, or take the method out"
                )
            accumulation = min(2 * accumulation, batch)

    def _probe(self, entry: Entry, task: str, accumulation: int) -> dict[str, float]:
        """Seconds and peak bytes of a training step of this method alone, on this machine, now."""
        context = self.context
        training = context.study.training.model_copy(update={"accumulation": accumulation})
        settings = entry.resolved(training.total_steps(context.num_rows(task)))
        with tempfile.TemporaryDirectory() as folder:
            run = PlannedRun("final", entry, settings, task, 0, min(entry.learning_rates), training, 0, "")
            data = context.tasks[task].data
            trainer = Trainer(as_pack(context, [run]), data, Path(folder) / "checkpoint", [Path(folder)])
            seconds = []
            steps = range(1, trainer.total + 1)
            fullest = max(steps[: trainer.batches.per_epoch], key=trainer.batches.size)
            for step in dict.fromkeys([*steps[:PROBE_STEPS], fullest]):
                trainer.step = step
                began = time.perf_counter()
                trainer.train_step()
                if context.device.type == "cuda":
                    torch.cuda.synchronize(context.device)
                seconds.append(time.perf_counter() - began)
            peak = trainer.memory.read()
        if not peak and context.study.budget.equal == "memory":
            raise ValueError('budget.equal = "memory": another profiler is at work here: end it, or take another budget')
        return {"seconds_per_step": statistics.median(seconds[1:PROBE_STEPS] or seconds), "peak_bytes": peak or 0}
