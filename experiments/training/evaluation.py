"""Members evaluated on the rows of a split: each one's predictions, and its loss where that is asked for."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.kinds import Kind, Undefined
from rankwise.experiments.kinds.interface import Planned
from rankwise.experiments.training.parallel import ALONE, Processes, as_bytes, from_bytes
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.kinds.quantised import scheme_of
from rankwise.variants.adapter.shards import is_sharded
from rankwise.variants.adapter.step import CannotMerge, Step
from torch import Tensor

AT_REST = Step(1, 1)  # for an adapter that is evaluated outside of a run
MERGED_ROWS = 256  # of a batch at the most where members are merged one by one: small batches cost more per row


@dataclass
class Evaluator:
    """Evaluates the members of an adapter, on the rows of any split of one kind.

    processor: of the model's inputs, as `models.load` gave it. step: where training stands.
    progress: called with the rows done since the last call, an evaluated row counted as a third of a trained one.
    processes: predict in turn, batch by batch; the first one has what all of them predicted.
    counted: gives what counts the memory of the largest batch, called with its size: rows x tokens.
    """

    adapter: Adapter
    kind: Kind
    processor: Any
    batch_size: int
    precision: str
    step: Step = AT_REST
    progress: Callable[[float], None] = lambda rows: None
    processes: Processes = ALONE
    counted: Callable[[int], contextlib.AbstractContextManager] = lambda size: contextlib.nullcontext()

    @torch.no_grad()
    def predictions(self, data: Dataset) -> list[np.ndarray | Undefined]:
        """Each member's predictions for a split, in the order of its rows, as `Task.metrics` takes them.

        Members cannot share an evaluation as they share a training step, because their activations differ from the first
        adapted layer on.  On a CPU they are therefore merged into the model's weights one by one, each of which then costs
        what the bare model costs.  A GPU would wait for the launches of small batches, and a 16-bit weight would round small
        updates away: there the whole pack is evaluated, its rows repeated.

        Of several processes each takes its turn at the batches, which are those of one process, and all but the first have no
        predictions in the end.
        """
        self.adapter.model.eval()
        collected = Predictions(self.kind, data, self.adapter.members, self.processor, self.processes)
        self.processes.attempt(lambda: self._predict(data, collected), is_sharded(self.adapter.model))
        return collected.of_members()

    def _predict(self, data: Dataset, collected: "Predictions") -> None:
        if self.can_merge:
            with contextlib.suppress(CannotMerge):  # raised before any prediction is in its place
                for rows, size, outputs in self._merged(data):
                    collected.add(rows, size, outputs)
                return
        plan = self._plan(data, self.batch_size)
        own = self._own(plan)
        for rows, size in own:
            collected.add(rows, size, self._forward(data, rows, size, self.adapter.members)[0])
        if is_sharded(self.adapter.model):  # each layer is gathered by all processes, or by none
            for rows, size in plan[: -(-len(plan) // self.processes.size) - len(own)]:
                self._forward(data, rows, size, self.adapter.members)

    def _plan(self, data: Dataset, batch_size: int) -> list[Planned]:
        plan = self.kind.evaluation_plan(data, batch_size)
        self._largest = max((_size(rows, size) for rows, size in plan), default=0)
        return plan

    def _own(self, plan: list[Planned]) -> list[Planned]:
        """The batches that are this process's."""
        return plan[self.processes.rank :: self.processes.size]

    @torch.no_grad()
    def losses_and_predictions(self, data: Dataset, members: int) -> tuple[list[float], list[np.ndarray | Undefined]]:
        """Each member's mean loss, the task's own, and its predictions.

        members: all of the adapter's, or 1 while one is merged.
        """
        sums = torch.zeros(2, members, dtype=torch.float64, device=self.adapter.device)  # losses; over how many rows or tokens
        collected = Predictions(self.kind, data, members, self.processor)
        for rows, size in self._plan(data, self.batch_size):
            outputs, inputs, labels = self._forward(data, rows, size, members)
            with autocast(self.adapter.device, self.precision):
                losses = self.kind.evaluation_losses(self.adapter.model, inputs, outputs, labels, members)
            count = self.kind.counts(labels, members)
            sums[0] += losses.double() * count
            sums[1] += count
            collected.add(rows, size, outputs)
        return (sums[0] / sums[1]).tolist(), collected.of_members()

    @torch.no_grad()
    def of_rows(self, data: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray | Undefined]:
        """Of an adapter of one member: each row's loss (n,), of how many tokens it is the mean (n,), and the predictions.

        Where a row has one loss it is the mean of 1.
        """
        losses, counts = np.zeros(len(data)), np.zeros(len(data))
        collected = Predictions(self.kind, data, 1, self.processor)
        for rows, size in self._plan(data, self.batch_size):
            outputs, inputs, labels = self._forward(data, rows, size, 1)
            with autocast(self.adapter.device, self.precision):  # a loss is taken of each member's rows: here of each row
                found = self.kind.evaluation_losses(self.adapter.model, inputs, outputs, labels, len(rows))
            losses[rows], counts[rows] = found.double().cpu().numpy(), self.kind.counts(labels, len(rows)).cpu().numpy()
            collected.add(rows, size, outputs)
        return losses, counts, collected.of_members()[0]

    @property
    def can_merge(self) -> bool:
        """Whether one member after the other is quicker than all at once, and as exact."""
        merges = self.adapter.mergeable and scheme_of(self.adapter.model) is None  # else the weights would be dequantised
        return merges and self.adapter.device.type == "cpu" and self.precision == "fp32"

    def _merged(self, data: Dataset) -> Iterator[tuple[np.ndarray, int | None, Tensor]]:
        """For each batch its rows, their size, and the outputs of every member, (K*N, ...), each merged in its turn."""
        members = self.adapter.members
        size = max(self.batch_size, min(self.batch_size * members, MERGED_ROWS))  # never more than the whole pack would have
        plan = self._own(self._plan(data, size))
        outputs: list[list[Tensor]] = [[] for _ in plan]
        for member in range(members):
            try:
                self.adapter.merge(member)
                for of_batch, (rows, size) in zip(outputs, plan, strict=True):
                    of_batch.append(self._forward(data, rows, size, 1)[0])
            finally:
                self.adapter.unmerge()
        for of_batch, (rows, size) in zip(outputs, plan, strict=True):
            yield rows, size, torch.cat(of_batch)

    def _forward(
        self, data: Dataset, rows: np.ndarray, size: int | None, members: int
    ) -> tuple[Tensor, Mapping[str, Tensor], Tensor]:
        """Outputs, inputs and labels of a batch, its rows repeated for so many members: (K*N, ...) each."""
        arrays = self.kind.collate_evaluation(data, rows, size, self.processor)
        batch = {name: repeat(tensor, "n ... -> (k n) ...", k=members) for name, tensor in self._tensors(arrays).items()}
        labels = batch.pop("labels")
        self.adapter.begin(self.step, training=False)
        is_largest = _size(rows, size) == self._largest
        counted = self.counted(members * self._largest) if is_largest else contextlib.nullcontext()
        with counted, autocast(self.adapter.device, self.precision):
            inputs = self.adapter.prepare(batch)
            outputs = self.kind.outputs(self.adapter.model, inputs)
        self.progress(self.processes.size * members * len(rows) / 3)  # a forward pass alone costs about a third of a step
        return outputs, inputs, labels

    def _tensors(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array).to(self.adapter.device) for name, array in arrays.items()}


def _size(rows: np.ndarray, size: int | None) -> int:
    return len(rows) * (size or 1)


class Predictions:
    """Every member's predictions of a split, as they come in batch by batch."""

    def __init__(self, kind: Kind, data: Dataset, members: int, processor: Any, processes: Processes = ALONE):
        self.kind, self.data, self.members, self.processor = kind, data, members, processor
        self.processes, self._own = processes, []  # here: of each batch its rows, their size, and what was predicted
        self.kept = kind.empty(data, members)
        self.finite = np.ones(members, bool)

    def add(self, rows: np.ndarray, size: int | None, outputs: Tensor) -> None:
        """outputs: (K*N, ...), what the batch of these rows gave."""
        finite = rearrange(outputs.isfinite(), "(k n) ... -> k (n ...)", k=self.members).all(1)
        self.finite &= finite.cpu().numpy()
        predicted = self.kind.predictions(outputs)
        predicted = predicted.cpu().numpy() if isinstance(predicted, Tensor) else predicted
        predicted = self.kind.decoded(predicted, self.processor)
        predicted = rearrange(predicted, "(k n) ... -> k n ...", k=self.members)
        self.kind.place(self.kept, self.data, rows, size, predicted)
        if not self.processes.is_first:
            self._own += [rows, np.array(-1 if size is None else size), predicted]

    def of_members(self) -> list[np.ndarray | Undefined]:
        if self.processes.size > 1:
            self._gather()
            if not self.processes.is_first:
                return [Undefined("elsewhere", "the first process has the predictions")] * self.members
        infinite = Undefined("collapsed", "the model's outputs are not finite numbers")
        return [self.kept[member] if self.finite[member] else infinite for member in range(self.members)]

    def _gather(self) -> None:
        """Puts what the other processes predicted in its place."""
        for content in self.processes.gathered(as_bytes([self.finite, *self._own])):
            finite, *batches = from_bytes(content)
            self.finite &= finite
            for rows, size, predicted in zip(*(batches[at::3] for at in range(3)), strict=True):
                self.kind.place(self.kept, self.data, rows, None if size < 0 else int(size), predicted)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Within it products are taken in bf16, where that is the precision."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
