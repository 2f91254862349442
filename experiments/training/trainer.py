"""The loop, once, for every method: K members over one frozen model, on CPU or GPU.

The order of one step belongs to the trainer:

    begin -> forward -> losses (K,) -> (losses + penalty).sum().backward() -> clip per member -> before_step
    -> optimizer.step -> after_step -> the optimizer follows changes of size -> zero_grad

Everything random is keyed by (seed, step, ...), so a checkpoint holds no generator: the adapter's tensors, the
optimizer's averages and a few counts are all that a killed run needs to end bit for bit where it would have ended.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rankwise import variants
from rankwise.experiments import kinds, memory, models
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.kinds import Undefined
from rankwise.experiments.training import first_token, outcomes, sharding, state
from rankwise.experiments.training.batches import Batches, Part
from rankwise.experiments.training.evaluation import Evaluator, autocast
from rankwise.experiments.training.log import Log, Unwritten
from rankwise.experiments.training.pack import Outcome, Pack
from rankwise.experiments.training.parallel import ALONE, Processes
from rankwise.experiments.training.schedule import schedule_factor
from rankwise.experiments.training.stored_states import STORED
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.step import Calibration, Group, Step
from rankwise.variants.files.doors import close_door
from rankwise.variants.lowrank.adapter import LowRankAdapter
from rankwise.variants.settings import method
from torch import Tensor

TENSORS = ("skipped", "alive", "sums", "last_loss")  # tensors of the loop that a checkpoint holds
FACTS = ("step", "seconds", "training_seconds", "tokens", "peak", "silent")  # and what else it holds of the loop


class Trainer:
    """One pack from start, or from its checkpoint, to the end.

    Args:
        data: the training part as "train", and each of `pack.splits`.
        checkpoint: where the pack's state is kept; its folder exists.
        logs: for each member the folder of its metrics.jsonl and ranks.jsonl.
        progress: called with the rows trained or evaluated since the last call.
        written: called with the folder of a member that has a new line in its logs.
        processes: that train together; every one has a Trainer of the same pack and data, and the first alone writes.
        saved: called after each checkpoint.
    """

    def __init__(
        self,
        pack: Pack,
        data: Mapping[str, Dataset],
        checkpoint: Path,
        logs: Sequence[Path],
        checkpoint_seconds: float = 60.0,
        progress: Callable[[float], None] = lambda rows: None,
        written: Callable[[Path], None] = lambda folder: None,
        processes: Processes = ALONE,
        saved: Callable[[], None] = lambda: None,
    ):
        self.pack, self.data, self.checkpoint, self.logs = pack, data, checkpoint, list(logs)
        self.processes, self.kind = processes, kinds.get(pack.task.kind)
        self.log = Log(logs, written) if processes.is_first else Unwritten()
        self.checkpoint_seconds, self.progress, self.saved = checkpoint_seconds, progress, saved
        training = pack.training
        self.memory = memory.PeakMemory(pack.device)
        self.memory.start()
        # What trains the model's own weights starts from them in full precision.
        precision = "fp32" if method(pack.method).load().trains_base else pack.precision
        self.shares_base = training.shard_base and processes.size > 1
        if self.shares_base:
            self.model, self.processor, self.info = sharding.load(pack, precision, processes)
        else:
            self.model, self.processor, self.info = models.load(
                pack.model, pack.task, precision, str(pack.device), training.image_size, pack.quantization
            )
        settings = pack.settings.model_dump(exclude_unset=True)
        self.adapter: Adapter = variants.create(pack.method, members=pack.members, seeds=list(pack.seeds), **settings)
        self.batches = Batches(self.kind, data["train"], self.processor, training, pack.seeds, pack.device)
        if not self.adapter.adds_tokens:
            first_token.only(self.model, self.adapter.draw)
        began = time.perf_counter()
        self.adapter.attach(self.model, pack.targets, head=self.info.heads, fresh_head=True, calibration=self._calibration())
        close_door(self.model)  # nobody saves this model by its own name, and packs must be freed one by one
        self.seconds = 0.0 if self.adapter.needs is None else time.perf_counter() - began
        if training.gradient_checkpointing:
            if not self.adapter.checkpointable:
                raise ValueError(
                    f"gradient_checkpointing = true: {pack.method} cannot train with it: leave it out for this method"
                )
            keyed = {"use_reentrant": False, "context_fn": self.adapter.draw.recompute_contexts}
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keyed)
        rates = torch.tensor(pack.learning_rates, dtype=torch.float64, device=pack.device)
        kept = STORED[training.optimizer_states]
        self.optimizer = kept(self._groups(rates), rates, training.weight_decay)
        rows = len(data["train"])
        self.total = training.total_steps(rows)
        self.warmup = round(training.warmup_ratio * self.total)
        self.evaluate_after = training.evaluation_steps(rows)
        self.step = 0
        self.skipped = torch.zeros(pack.members, dtype=torch.int64, device=pack.device)
        self.alive = torch.ones(pack.members, dtype=torch.bool, device=pack.device)
        self.sums = torch.zeros(3, pack.members, dtype=torch.float64, device=pack.device)  # loss, penalty, steps since a log
        self.last_loss = torch.full((pack.members,), torch.nan, dtype=torch.float64, device=pack.device)
        self.training_seconds = 0.0
        self.tokens = 0
        self.peak: int | None = 0
        self.silent: list[str] | None = None  # dropout that no step draws; known after the first step

    def _groups(self, rates: Tensor) -> list[Group]:
        """The adapter's groups, the head's tensors with the head's own rate where the study gives one."""
        groups, rate = self.adapter.parameter_groups(), self.pack.training.head_learning_rate
        head = {id(p) for p in self.adapter.heads.parameters()}
        if rate is None or len(head) == len(list(self.adapter.parameters())):
            return groups
        split = []
        for group in groups:
            of_body = [p for p in group.params if id(p) not in head]
            of_head = [p for p in group.params if id(p) in head]
            split += [replace(group, params=of_body)] if of_body else []
            split += [replace(group, params=of_head, lr_scale=rate / rates)] if of_head else []
        return split

    # -- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> list[Outcome]:
        """Trains what is left to train, evaluates, and says what became of each member."""
        if not self._resume():
            self.log.start()
            self._log_ranks()
        self._check_equal()
        saved = began = time.perf_counter()
        while self.step < self.total and bool(self.alive.any()):
            self.step += 1
            self.train_step()
            if self.step % self.pack.training.log_every == 0 or self.step == self.total:
                self._log_step()
                self._log_ranks()
                self._check_equal()
            if self.step in self.evaluate_after and self.step < self.total and bool(self.alive.any()):
                for split in self.pack.splits if self.pack.best_epoch else self.pack.splits[:1]:
                    for member, metrics in enumerate(self.evaluate(split)):
                        self._log_evaluation(member, split, metrics)
            now = time.perf_counter()
            self.seconds += now - began
            began = now
            if now - saved >= self.checkpoint_seconds and self.step < self.total:
                self.save()
                saved = time.perf_counter()
        if self.step == self.total:
            self.save()  # a run that is killed in its last evaluation need not train again
        ended = self._finish()
        self.seconds += time.perf_counter() - began
        for outcome in ended:
            outcome.facts["pack_seconds"] = self.seconds
            outcome.facts["seconds"] = self.seconds / self.pack.members
        return ended

    def train_step(self) -> None:
        """One optimizer step of every member that is alive."""
        pack = self.pack
        began = time.perf_counter()
        self.model.train()
        factor = schedule_factor(pack.training.schedule, self.step, self.total, self.warmup)
        rates = self.optimizer.learning_rates * factor
        now = Step(self.step, self.total, learning_rates=rates, factor=factor)
        with self._counted_if_fullest():
            taken, loss, penalty = self._updated(now)
        self.alive &= self.skipped <= pack.training.max_skipped_steps
        self.sums += torch.where(taken, torch.stack([loss, penalty.detach().double(), torch.ones_like(loss)]), 0.0)
        self.training_seconds += time.perf_counter() - began
        self.progress(self.batches.num_rows(self.step))

    def _counted_if_fullest(self) -> contextlib.AbstractContextManager[None]:
        """Counts the memory of this step where it is the largest of its epoch, and of those before it."""
        size = self.batches.size(self.step)
        if size < self.batches.largest(self.step, self.total):
            return contextlib.nullcontext()
        trained = sum(p.numel() for p in self.optimizer.params if p.requires_grad)
        return self.memory.part("step", (size, trained), self._tensors)

    def _tensors(self) -> list[Tensor]:
        return memory.of_training(self.model, self.adapter, self.optimizer)

    def _updated(self, now: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Takes the step: (K,) which members took it, their losses and penalties."""
        pack, adapter = self.pack, self.adapter
        chunks = self.batches.parts(self.step, self.processes)
        totals = self._totals(chunks)
        loss, penalty = self.processes.attempt(lambda: self._backward(now, chunks, totals), self.shares_base)
        if self.silent is None:
            self.silent = adapter.silent_dropout()
        loss = self.processes.sum(loss)
        self.processes.sum_gradients(self.optimizer.params)
        norms = self.optimizer.gradient_norms()
        taken = norms.isfinite() & loss.isfinite() & self.alive
        self.skipped += self.alive & ~taken
        if pack.training.clip is not None:
            self.optimizer.clip(norms, pack.training.clip)
        now = replace(now, taken=None if bool(taken.all()) else taken, losses=loss)
        adapter.before_step(now)
        self.optimizer.step(now.factor, now.taken)
        adapter.after_step(now)
        self.optimizer.follow(adapter.take_changes())
        self.optimizer.zero_grad()
        return taken, loss, penalty

    def _totals(self, chunks: Sequence[Part]) -> Tensor:
        """(K,): over how many rows or scored tokens each member's mean of this step is; counts the step's tokens."""
        totals, tokens = sum(count for _, count, _ in chunks), sum(self.kind.num_tokens(batch) for batch, _, _ in chunks)
        if self.processes.size > 1:
            totals, tokens = self.processes.sum(torch.cat([totals, totals.new_tensor([tokens])])).split([len(totals), 1])
        self.tokens += int(tokens)
        return totals.clamp_min(1)

    def _backward(self, now: Step, chunks: Sequence[Part], totals: Tensor) -> tuple[Tensor, Tensor]:
        """Leaves the gradients of what this process has of the step; (K,) its share of the losses, and (K,) penalties."""
        pack, adapter = self.pack, self.adapter
        loss = torch.zeros(pack.members, dtype=torch.float64, device=pack.device)
        penalty = None
        for micro_batch, (batch, count, before) in enumerate(chunks):
            labels = batch.pop("labels")
            adapter.begin(now, micro_batch, training=True)
            torch.manual_seed(random_seed(pack.seeds, self.step, micro_batch))  # for what a model draws by itself
            with adapter.draw.rows.shared(before, self.processes.sum):
                losses = self._losses(batch, labels) * count / totals
                objective_value = losses
                if micro_batch == len(chunks) - 1:
                    penalty = adapter.penalty(now)  # once a step, whatever the accumulation
                    if self.processes.is_first:
                        objective_value = losses + penalty
                objective_value.sum().backward()
            loss += losses.detach()
        return loss, penalty

    def _losses(self, batch: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """(K,): each member's loss, the task's own, on a batch with the rows of every member."""
        with autocast(self.pack.device, self.pack.precision):
            return self.kind.training_losses(self.model, self.adapter.prepare(batch), labels, self.pack.members)

    def _calibration(self) -> Calibration | None:
        """The first batches of each member's own order, for a method that measures the model before it trains.

        A run that goes on from a checkpoint measures again, the same bit for bit: sizes come from it, values from the file.
        """
        if self.adapter.needs is None:
            return None
        steps = range(1, self.pack.settings.calibration_batches + 1)
        return Calibration([batch for step in steps for batch, _ in self.batches.micro_batches(step)], self._calibration_losses)

    def _calibration_losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(K,): each member's loss on a batch, in which every token passes through every layer."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        torch.manual_seed(random_seed(self.pack.seeds, 0, 0))
        with first_token.every(self.model):
            return self._losses(inputs, batch["labels"])

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, split: str) -> list[dict[str, float] | Undefined]:
        """Each member's metrics on a split, in points, or why they have no value."""
        truth = self.data[split].truth
        return [one if isinstance(one, Undefined) else self._score(one, *truth) for one in self.predictions(split)]

    def predictions(self, split: str) -> list[np.ndarray | Undefined]:
        """Each member's predictions for a split, in the order of its rows, as `Task.metrics` takes them."""
        size, step = self.pack.training.evaluation_batch_size, Step(max(self.step, 1), self.total)
        evaluator = Evaluator(
            self.adapter,
            self.kind,
            self.processor,
            size,
            self.pack.precision,
            step,
            self.progress,
            self.processes,
            lambda size: self.memory.part("evaluation", (size,), self._tensors),
        )
        return evaluator.predictions(self.data[split])

    def _score(self, predicted: np.ndarray, labels: Any, offsets: np.ndarray | None) -> dict[str, float] | Undefined:
        return outcomes.score(self.pack.task, predicted, labels, offsets)

    def _finish(self) -> list[Outcome]:
        ended = [Outcome() for _ in range(self.pack.members)]
        for member, outcome in enumerate(ended):
            if not bool(self.alive[member]) or int(self.skipped[member]) == self.step:
                outcome.error = "diverged"
                outcome.detail = f"{int(self.skipped[member])} steps with a non-finite loss or gradient by step {self.step}"
        if bool(self.alive.any()):
            for split in self.pack.splits:
                for member, predicted in enumerate(self.predictions(split)):
                    if ended[member].error != "diverged":
                        self._conclude(ended[member], member, split, predicted)
        scored = [self.step] * self.pack.members
        if self.pack.best_epoch:
            split, metric = self.pack.splits[0], self.pack.task.metric
            scored = [
                outcomes.take_best_epoch(outcome, self.log.evaluations(member), split, metric, self.step)
                for member, outcome in enumerate(ended)
            ]
        self.peak = self._peak()
        if self.processes.size > 1:  # a process's own, the most of any
            self.peak = self.processes.most(-1 if self.peak is None else self.peak)
            self.peak = None if self.peak < 0 else self.peak
        for member, (outcome, facts) in enumerate(zip(ended, outcomes.adapter_facts(self.adapter), strict=True)):
            outcome.facts = {
                "steps": self.step,
                "total_steps": self.total,
                "epochs": round(self.step / self.batches.per_epoch, 4),
                "skipped_steps": int(self.skipped[member]),
                "scored_step": scored[member],
                "tokens_per_second": self.tokens / self.training_seconds if self.tokens else None,
                "peak_memory_bytes": self.peak or None if self.pack.members == 1 else None,
                "pack_peak_memory_bytes": self.peak or None,
                **facts,
                "final_train_loss": None if self.last_loss[member].isnan() else float(self.last_loss[member]),
                "dropout_note": None
                if not self.silent
                else f"dropout inside the attention is off ({len(self.silent)} places): a fused kernel cannot draw it by key",
            }
        if self.adapter.nested and bool(self.alive.any()):
            for outcome, scores in zip(ended, self._rank_scores(), strict=True):
                outcome.facts["rank_scores"] = scores
        return ended

    def _rank_scores(self) -> list[dict[str, float | None]]:
        """For each member its metric on the last split at every rank that it can be used at; None where it has no value."""
        of_members: list[dict[str, float | None]] = [{} for _ in range(self.pack.members)]
        own = self.adapter.nested_ranks()
        report, self.progress = self.progress, lambda rows: None  # these evaluations are not in the plan of the work
        try:
            for rank in range(min(r.start for r in own), max(r.stop for r in own)):
                with self.adapter.at_rank(rank):
                    for scores, ranks, metrics in zip(of_members, own, self.evaluate(self.pack.splits[-1]), strict=True):
                        value = None if isinstance(metrics, Undefined) else metrics.get(self.pack.task.metric)
                        if rank in ranks:
                            scores[str(rank)] = value
        finally:
            self.progress = report
        return of_members

    def _conclude(self, outcome: Outcome, member: int, split: str, predicted: np.ndarray | Undefined) -> None:
        """Adds what a member reached on a split to its outcome, and to its log."""
        data = self.data[split]
        metrics = predicted if isinstance(predicted, Undefined) else self._score(predicted, *data.truth)
        self._log_evaluation(member, split, metrics)
        outcomes.conclude(outcome, self.pack.task, split, data, predicted, metrics)

    # -- what is written down ------------------------------------------------------------------------------------------

    def _log_step(self) -> None:
        factor = schedule_factor(self.pack.training.schedule, self.step, self.total, self.warmup)
        loss, penalty, steps = self.sums
        mean = torch.where(steps > 0, loss / steps.clamp_min(1), torch.nan)
        self.last_loss = torch.where(steps > 0, mean, self.last_loss)
        self.log.train(self.step, mean, penalty / steps.clamp_min(1), [rate * factor for rate in self.pack.learning_rates])
        self.sums.zero_()

    def _log_evaluation(self, member: int, split: str, metrics: dict[str, float] | Undefined) -> None:
        self.log.evaluation(member, self.step, round(self.step / self.batches.per_epoch, 4), split, metrics)

    def _log_ranks(self) -> None:
        self.log.ranks(self.adapter, Step(self.step, self.total))

    def _check_equal(self) -> None:
        """
        Raises:
            ValueError: the processes have not the same weights.
        """
        self.processes.check_equal(list(self.adapter.parameters()), f"{self.pack.method}: after step {self.step}")

    def _peak(self) -> int | None:
        """The most memory in use so far, in bytes, before an interruption too; None where it cannot be known."""
        peak = self.memory.read()
        return None if peak is None or self.peak is None else max(peak, self.peak)

    def save(self) -> None:
        """Writes the pack's state, whole or not at all."""
        if not self.processes.is_first:
            return
        tensors = {f"adapter.{name}": tensor for name, tensor in self.adapter.state_dict().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        tensors |= {name: getattr(self, name) for name in TENSORS}
        facts = {name: getattr(self, name) for name in FACTS} | {"peak": self._peak(), "logs": self.log.sizes()}
        state.write(self.checkpoint, self.pack.identity(), tensors, facts, self.processes.size)
        self.saved()

    @torch.no_grad()
    def _resume(self) -> bool:
        """Takes the checkpoint up where there is a good one of the same pack."""
        kept = None
        if self.processes.is_first:
            kept = state.read(self.checkpoint, self.pack.identity(), self.pack.device)
            kept = None if kept is None or not self.log.has(kept[1]["logs"]) else kept
        kept = self.processes.shared(kept, self.pack.device)
        if kept is None:
            return False
        tensors, facts = kept

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.adapter.load_state_dict(part("adapter."))
        self.optimizer.load_state(part("optimizer."))
        for names, values in ((TENSORS, tensors), (FACTS, facts)):
            for name in names:
                setattr(self, name, values[name])
        if self.step and isinstance(self.adapter, LowRankAdapter):
            self.adapter.loaded(
                self.total
            )  # else one that has no step left would write a file that knows no length of training
        if self.processes.is_first:
            state.warn_of_changes(facts, self.processes.size)
        self.log.cut(facts["logs"])
        # What was read back counts as done, so that the bar and the time left are those of the whole pack.
        self.progress(sum(self.batches.num_rows(step) for step in range(1, self.step + 1)))
        return True


def random_seed(seeds: Sequence[int], step: int, micro_batch: int) -> int:
    """A seed for torch's own generator, from all that keys a draw."""
    digest = hashlib.blake2b(f"{list(seeds)}/{step}/{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
