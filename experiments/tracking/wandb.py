"""Weights & Biases: one run each, its id the run's fingerprint, its group the study.

Where runs go (project, entity, offline or not) is said by W&B's own variables: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline.
Steps are a metric of their own, as packed members and evaluations do not come in the order that W&B's counter wants.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.experiments.tracking.interface import Point, TrackedRun


class WeightsAndBiases:
    keeps = True

    def __init__(self, folder: Path, study: str):
        self.folder, self.study = folder, study
        self.folder.mkdir(parents=True, exist_ok=True)
        self.runs: dict[str, Any] = {}

    def send(self, run: TrackedRun, points: Sequence[Point]) -> None:
        open_run = self._run(run)
        for point in points:
            open_run.log({"step": point.step, **point.values})

    def finish(self, run: TrackedRun, status: str, summary: Mapping[str, float]) -> None:
        open_run = self._run(run)
        open_run.summary.update({**summary, "status": status})
        self.runs.pop(run.fingerprint).finish(exit_code=0 if status == "completed" else 1)

    def close(self) -> None:
        for open_run in self.runs.values():
            open_run.finish()
        self.runs = {}

    def _run(self, run: TrackedRun) -> Any:
        import wandb

        if run.fingerprint not in self.runs:
            is_offline = os.environ.get("WANDB_MODE") == "offline"
            self.runs[run.fingerprint] = wandb.init(
                dir=self.folder,
                project=os.environ.get("WANDB_PROJECT", "rankwise"),
                id=run.fingerprint,
                name=run.name,
                group=self.study,
                config=dict(run.settings),
                resume=None if is_offline else "allow",
                reinit="create_new",  # members of a pack are open at once
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )
            self.runs[run.fingerprint].define_metric("*", step_metric="step")
        return self.runs[run.fingerprint]
