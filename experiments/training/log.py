"""What is written down along the way: metrics.jsonl and ranks.jsonl of each member, a line of strict JSON an event."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rankwise.experiments.kinds import Undefined
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.step import Step
from torch import Tensor

METRICS, RANKS = "metrics.jsonl", "ranks.jsonl"


class Log:
    """The logs of a pack.

    folders: one for each member.
    written: called with a member's folder after each line of its logs.
    """

    def __init__(self, folders: Sequence[Path], written: Callable[[Path], None] = lambda folder: None):
        self.folders, self.written = list(folders), written
        self.files = [[folder / name for name in (METRICS, RANKS)] for folder in self.folders]

    def start(self) -> None:
        """Empties all logs."""
        for path in chain.from_iterable(self.files):
            path.write_text("")

    def sizes(self) -> list[list[int]]:
        """Bytes of each member's two files."""
        return [[path.stat().st_size for path in pair] for pair in self.files]

    def has(self, sizes: Sequence[Sequence[int]]) -> bool:
        """Whether every file still holds at least so many bytes."""
        return all(path.is_file() and path.stat().st_size >= size for path, size in self._beside(sizes))

    def cut(self, sizes: Sequence[Sequence[int]]) -> None:
        """Takes back what was written after the files had these sizes."""
        for path, size in self._beside(sizes):
            os.truncate(path, size)

    def train(self, step: int, losses: Tensor, penalties: Tensor, rates: Sequence[float]) -> None:
        """losses, penalties: (K,), means over the steps since the last line. rates: of each member at this step."""
        for member, rate in enumerate(rates):
            line = {"kind": "train", "step": step, "loss": _finite(losses[member]), "learning_rate": rate}
            self._write(member, METRICS, {**line, "penalty": _finite(penalties[member])})

    def evaluation(self, member: int, step: int, epoch: float, split: str, metrics: dict[str, float] | Undefined) -> None:
        line = {"kind": "evaluation", "step": step, "split": split, "epoch": epoch}
        self._write(member, METRICS, {**line, "metrics": {} if isinstance(metrics, Undefined) else metrics})

    def ranks(self, adapter: Adapter, step: Step) -> None:
        """The rank of every site, kept and live, and the budget; nothing for a method without ranks."""
        ranks, live = adapter.ranks(), adapter.live_ranks()
        if not ranks:
            return
        budget = adapter.budget(step)
        table = torch.stack(list(ranks.values())).tolist()  # sites x K: one device sync for all sites
        total = torch.stack(list(live.values())).sum(0).tolist()
        for member in range(adapter.members):
            of_site = {name: row[member] for name, row in zip(ranks, table, strict=True)}
            line = {"step": step.index, "budget": None if budget is None else int(budget[member])}
            self._write(member, RANKS, {**line, "active": sum(of_site.values()), "live": total[member], "ranks": of_site})

    def evaluations(self, member: int) -> list[dict[str, Any]]:
        """A member's evaluations so far, those before an interruption among them."""
        lines = [json.loads(line) for line in (self.folders[member] / METRICS).read_text().splitlines()]
        return [line for line in lines if line["kind"] == "evaluation"]

    def _beside(self, sizes: Sequence[Sequence[int]]) -> Iterator[tuple[Path, int]]:
        return zip(chain.from_iterable(self.files), chain.from_iterable(sizes), strict=True)

    def _write(self, member: int, name: str, line: Mapping[str, Any]) -> None:
        with (self.folders[member] / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self.written(self.folders[member])


class Unwritten(Log):
    """The logs of a process that writes none."""

    def __init__(self) -> None:
        super().__init__([])

    def train(self, *_: Any) -> None: ...
    def evaluation(self, *_: Any) -> None: ...
    def ranks(self, *_: Any) -> None: ...
    def cut(self, *_: Any) -> None: ...

    def evaluations(self, member: int) -> list[dict[str, Any]]:
        return []


def _finite(value: Tensor) -> float | None:
    """A number as JSON can hold it."""
    return float(value) if bool(torch.isfinite(value)) else None
