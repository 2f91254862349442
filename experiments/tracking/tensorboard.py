"""TensorBoard: `tensorboard --logdir OUT/tracking/tensorboard`.

One folder of event files a run; that of an unfinished run of a process that was killed is replaced.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.experiments.tracking.interface import Point, TrackedRun

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    keeps = False

    def __init__(self, folder: Path, study: str):
        self.folder = folder
        self.writers: dict[str, SummaryWriter] = {}

    def send(self, run: TrackedRun, points: Sequence[Point]) -> None:
        writer = self._writer(run)
        for point in points:
            for name, value in point.values.items():
                writer.add_scalar(name, value, point.step)
        writer.flush()

    def finish(self, run: TrackedRun, status: str, summary: Mapping[str, float]) -> None:
        writer = self._writer(run)
        for name, value in summary.items():
            writer.add_scalar(f"result/{name}", value, 0)
        writer.add_text("status", status, 0)
        self.writers.pop(run.fingerprint).close()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.writers = {}

    def _writer(self, run: TrackedRun) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        if run.fingerprint not in self.writers:
            readable = "".join(char if char.isalnum() or char in "._-" else "-" for char in run.name)[:150]
            place = self.folder / f"{readable}-{run.fingerprint[:8]}"
            shutil.rmtree(place, ignore_errors=True)
            writer = self.writers[run.fingerprint] = SummaryWriter(str(place))
            lines = "\n".join(f"    {name} = {value}" for name, value in run.settings.items())  # indented: shown as it is
            writer.add_text("settings", lines, 0)
        return self.writers[run.fingerprint]
