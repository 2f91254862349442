"""The batches of a pack's training part: which rows each member sees at a step, and the tensors made of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rankwise.experiments.config import Training
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.kinds import Kind
from rankwise.experiments.kinds.interface import Planned
from rankwise.experiments.training.parallel import ALONE, Processes
from torch import Tensor

# Of a micro-batch what one process has: the inputs and labels, the count (K,) of each member's, and its rows before these.
Part = tuple[dict[str, Tensor], Tensor, int]


class Batches:
    """Any step's batches, computed from nothing but its number.

    processor: of the model's inputs, as `models.load` gave it. seeds: of the members, each with an order of its own.
    """

    def __init__(
        self, kind: Kind, data: Dataset, processor: Any, training: Training, seeds: Sequence[int], device: torch.device
    ):
        self.kind, self.data, self.processor = kind, data, processor
        self.batch_size, self.accumulation = training.batch_size, training.accumulation
        self.augmentation = training.augmentation
        self.per_epoch = training.steps_per_epoch(len(data))
        self.seeds, self.device = list(seeds), device
        self._plan: tuple[int, list[list[Planned]]] | None = None  # of one epoch, for each member
        self._largest: tuple[int, int] | None = None  # of one epoch

    def rows(self, step: int) -> list[Planned]:
        """For each member its rows of this step (1-based), and the size they are brought to, the same for all members."""
        epoch, at = divmod(step - 1, self.per_epoch)
        if self._plan is None or self._plan[0] != epoch:
            self._plan = epoch, [self.kind.plan(self.data, self.batch_size, seed, epoch) for seed in self.seeds]
        return [plan[at] for plan in self._plan[1]]

    def size(self, step: int) -> int:
        """Rows of one member at this step, times the tokens that each is brought to, where rows have tokens."""
        rows, size = self.rows(step)[0]
        return len(rows) * (size or 1)

    def largest(self, step: int, last: int) -> int:
        """The most that any step of the same epoch has, up to the last one that is taken."""
        epoch = (step - 1) // self.per_epoch
        if self._largest is None or self._largest[0] != epoch:
            steps = range(epoch * self.per_epoch + 1, min(last, (epoch + 1) * self.per_epoch) + 1)
            self._largest = epoch, max(map(self.size, steps))
        return self._largest[1]

    def num_rows(self, step: int) -> int:
        """Rows of this step, all members together."""
        return sum(len(rows) for rows, _ in self.rows(step))

    def micro_batches(self, step: int) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Micro-batches grouped by member, with the count (K,) that each member's mean divides by."""
        return [(batch, count) for batch, count, _ in self.parts(step, ALONE)]

    def parts(self, step: int, processes: Processes) -> list[Part]:
        """Of each micro-batch what is this process's.

        Where there are fewer rows than processes some compute the first row again, with counts of zero, because a backward
        pass may need all of them.
        """
        members = self.rows(step)
        size = members[0][1]
        pieces = [np.array_split(rows, self.accumulation) for rows, _ in members]
        made = []
        for whole in zip(*pieces, strict=True):
            if len(whole[0]):
                own = processes.part(len(whole[0]))
                is_spare = own.start == own.stop
                parts = [rows[:1] if is_spare else rows[own] for rows in whole]
                arrays = self.kind.collate(self.data, np.concatenate(parts), size, self.processor)
                if self.augmentation:
                    arrays = self.kind.augment(arrays, parts, self.seeds, step, self.augmentation)
                batch = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
                count = self.kind.counts(batch["labels"], len(self.seeds))
                made.append((batch, torch.zeros_like(count) if is_spare else count, 0 if is_spare else own.start))
        return made
