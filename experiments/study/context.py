"""What the parts of a runner share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rankwise.experiments.config import Study
from rankwise.experiments.study.prepare import PreparedTask
from rankwise.experiments.training.parallel import ALONE, Processes


@dataclass(frozen=True, kw_only=True)
class Context:
    """A study as it is run, its data, where it runs, and who is told of it."""

    study: Study
    tasks: Mapping[str, PreparedTask]
    out: Path  # the folder of its runs
    committed: Path  # that of the committed study of the same name, which may not be there
    device: torch.device
    precision: str
    versions: Mapping[str, str]
    commit: Mapping[str, Any]  # "commit" and "dirty"
    say: Callable[[str], None]
    progress: Callable[[str, float], None]
    written: Callable[[Path], None]  # called with the folder of a run that has new records
    processes: Processes = ALONE  # that every pack trains on
    saved: Callable[[], None] = lambda: None  # called after each checkpoint

    def num_rows(self, task: str) -> int:
        """Rows of the task's training part."""
        return len(self.tasks[task].data["train"])
