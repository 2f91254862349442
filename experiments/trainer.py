"""The loop, once, for every method: K members over one frozen model, on CPU or GPU.

The order of one step belongs to the trainer:

    begin -> forward -> losses (K,) -> (losses + penalty).sum().backward() -> clip per member -> before_step
    -> optimizer.step -> after_step -> the optimizer follows changes of size -> zero_grad

Everything random is keyed by (seed, step, ...), so a checkpoint holds no generator: the adapter's tensors, the
optimizer's averages and a few counts are all that a killed run needs to end bit for bit where it would have ended.
"""

import contextlib
import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rankwise import variants
from rankwise.experiments import first_token, measure, models, objective
from rankwise.experiments.config import Training
from rankwise.experiments.files import replacing
from rankwise.experiments.optim import MemberAdamW, schedule_factor
from rankwise.experiments.tasks.common import KINDS, Encoded, Task, Undefined, batches, collate, evaluation_batches
from rankwise.variants import native
from rankwise.variants.base import Adapter, Calibration, CannotMerge, Group, Step
from rankwise.variants.settings import Settings, method
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Members of one method that train together; K = len(seeds)."""

    method: str
    settings: Settings
    targets: str | list[str]
    task: Task
    model: str
    training: Training
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    splits: tuple[str, ...]  # evaluated at the end; the first is also evaluated along the way
    device: torch.device
    precision: str
    best_epoch: bool = False  # the first split's best evaluation is what counts, not the last

    @property
    def members(self) -> int:
        return len(self.seeds)

    def identity(self) -> str:
        """Everything that a checkpoint must agree with to be this pack's."""
        settings, training = self.settings.model_dump(mode="json"), self.training.model_dump(mode="json", exclude={"log_every"})
        parts = [self.method, settings, self.targets, self.task.name, self.model, training, self.seeds, self.learning_rates]
        return json.dumps([*parts, self.splits, self.device.type, self.precision, *(["best epoch"] if self.best_epoch else [])])


@dataclass
class Outcome:
    """What became of one member.

    By split: metrics, the standard error of the primary metric (points), the number of rows scored (of questions, where
    rows are their windows), and the predictions that were scored, in the order of the split's rows.
    """

    error: str | None = None
    detail: str | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    standard_errors: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """One pack from start, or from its checkpoint, to the end.

    Args:
        data: the training part as "train", and each of `pack.splits`.
        checkpoint: where the pack's state is kept; its folder exists.
        logs: for each member the folder of its metrics.jsonl and ranks.jsonl.
        progress: called with the rows trained or evaluated since the last call.
    """

    def __init__(
        self,
        pack: Pack,
        data: Mapping[str, Encoded],
        checkpoint: Path,
        logs: Sequence[Path],
        checkpoint_seconds: float = 60.0,
        progress: Callable[[float], None] = lambda rows: None,
    ):
        self.pack, self.data, self.checkpoint, self.logs = pack, data, checkpoint, list(logs)
        self.checkpoint_seconds, self.progress = checkpoint_seconds, progress
        training = pack.training
        self.memory = measure.PeakMemory(pack.device)
        self.memory.start()
        # What trains the model's own weights starts from them in full precision.
        precision = "fp32" if method(pack.method).load().trains_base else pack.precision
        self.model, self.tokenizer, self.info = models.load(pack.model, pack.task, precision, str(pack.device))
        settings = pack.settings.model_dump(exclude_unset=True)
        self.adapter: Adapter = variants.create(pack.method, members=pack.members, seeds=list(pack.seeds), **settings)
        self.rows = len(data["train"])
        self.per_epoch = training.steps_per_epoch(self.rows)
        self.pad = self.tokenizer.pad_token_id or 0
        self._plan: tuple[int, list[list[tuple[np.ndarray, int]]]] | None = None
        first_token.only(self.model, self.adapter.draw)
        began = time.perf_counter()
        self.adapter.attach(self.model, pack.targets, head=self.info.heads, calibration=self._calibration())
        self.seconds = 0.0 if self.adapter.needs is None else time.perf_counter() - began
        if training.gradient_checkpointing:
            keyed = {"use_reentrant": False, "context_fn": self.adapter.draw.recompute_contexts}
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keyed)
        rates = torch.tensor(pack.learning_rates, dtype=torch.float64, device=pack.device)
        self.optimizer = MemberAdamW(self._groups(rates), rates, training.weight_decay)
        self.total = training.total_steps(self.rows)
        self.warmup = round(training.warmup_ratio * self.total)
        self.evaluate_after = training.evaluation_steps(self.rows)
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
        found = []
        for group in groups:
            body = [p for p in group.params if id(p) not in head]
            mine = [p for p in group.params if id(p) in head]
            found += [replace(group, params=body)] if body else []
            found += [replace(group, params=mine, lr_scale=rate / rates)] if mine else []
        return found

    # -- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> list[Outcome]:
        """Trains what is left to train, evaluates, and says what became of each member."""
        if not self._resume():
            for folder in self.logs:
                for name in ("metrics.jsonl", "ranks.jsonl"):
                    (folder / name).write_text("")
            self._log_ranks()
        saved = began = time.perf_counter()
        while self.step < self.total and bool(self.alive.any()):
            self.step += 1
            self.train_step()
            if self.step % self.pack.training.log_every == 0 or self.step == self.total:
                self._log_step()
                self._log_ranks()
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
        outcomes = self._finish()
        self.seconds += time.perf_counter() - began
        for outcome in outcomes:
            outcome.facts["pack_seconds"] = self.seconds
            outcome.facts["seconds"] = self.seconds / self.pack.members
        return outcomes

    def train_step(self) -> None:
        """One optimizer step of every member that is alive."""
        pack, adapter = self.pack, self.adapter
        began = time.perf_counter()
        self.model.train()
        factor = schedule_factor(pack.training.schedule, self.step, self.total, self.warmup)
        rates = self.optimizer.learning_rates * factor
        state = Step(self.step, self.total, learning_rates=rates, factor=factor)
        chunks = self._chunks(self.step)
        self.tokens += sum(int(batch["attention_mask"].sum()) for batch, _ in chunks)
        totals = sum(count for _, count in chunks).clamp_min(1)
        loss = torch.zeros(pack.members, dtype=torch.float64, device=pack.device)
        penalty = None
        for micro_batch, (batch, count) in enumerate(chunks):
            labels = batch.pop("labels")
            adapter.begin(state, micro_batch, training=True)
            torch.manual_seed(random_seed(pack.seeds, self.step, micro_batch))  # for what a model draws by itself
            with self._autocast():
                output = self.model(**adapter.prepare(batch))
            logits = objective.logits(pack.task.kind, output, batch["attention_mask"])
            losses = objective.losses(pack.task.kind, logits, labels, pack.members) * count / totals
            objective_value = losses
            if micro_batch == len(chunks) - 1:
                penalty = adapter.penalty(state)  # once a step, whatever the accumulation
                objective_value = losses + penalty
            objective_value.sum().backward()
            loss += losses.detach()
        if self.silent is None:
            self.silent = adapter.silent_dropout()
        norms = self.optimizer.gradient_norms()
        taken = norms.isfinite() & loss.isfinite() & self.alive
        self.skipped += self.alive & ~taken
        if pack.training.clip is not None:
            self.optimizer.clip(norms, pack.training.clip)
        state = replace(state, taken=None if bool(taken.all()) else taken)
        adapter.before_step(state)
        self.optimizer.step(factor, state.taken)
        adapter.after_step(state)
        self.optimizer.follow(adapter.take_changes())
        self.optimizer.zero_grad()
        self.alive &= self.skipped <= pack.training.max_skipped_steps
        self.sums += torch.where(taken, torch.stack([loss, penalty.detach().double(), torch.ones_like(loss)]), 0.0)
        self.training_seconds += time.perf_counter() - began
        self.progress(sum(len(b) for b, _ in self._rows(self.step)))

    def _rows(self, step: int) -> list[tuple[np.ndarray, int]]:
        """For each member its rows of this step and their planned length."""
        epoch, at = divmod(step - 1, self.per_epoch)
        if self._plan is None or self._plan[0] != epoch:
            size, train = self.pack.training.batch_size, self.data["train"]
            self._plan = epoch, [batches(train, size, seed, epoch) for seed in self.pack.seeds]
        return [plan[at] for plan in self._plan[1]]

    def _chunks(self, step: int) -> list[tuple[dict[str, Tensor], Tensor]]:
        """A step's micro-batches, members' rows one after the other, and how much each member's mean is over (K,)."""
        members = self._rows(step)
        length = members[0][1]
        pieces = [np.array_split(rows, self.pack.training.accumulation) for rows, _ in members]
        chunks = []
        for parts in zip(*pieces, strict=True):
            if len(parts[0]):
                batch = self._tensors(collate(self.data["train"], np.concatenate(parts), length, self.pad))
                chunks.append((batch, objective.counts(self.pack.task.kind, batch["labels"], self.pack.members)))
        return chunks

    def _calibration(self) -> Calibration | None:
        """The first batches of each member's own order, for a method that measures the model before it trains.

        A run that goes on from a checkpoint measures again, the same bit for bit: sizes come from it, values from the file.
        """
        if self.adapter.needs is None:
            return None
        steps = range(1, self.pack.settings.calibration_batches + 1)
        return Calibration([batch for step in steps for batch, _ in self._chunks(step)], self._calibration_losses)

    def _calibration_losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(K,): each member's loss on a batch, in which every token passes through every layer."""
        kind, inputs = self.pack.task.kind, {k: v for k, v in batch.items() if k != "labels"}
        torch.manual_seed(random_seed(self.pack.seeds, 0, 0))
        with first_token.every(self.model), self._autocast():
            output = self.model(**self.adapter.prepare(inputs))
        logits = objective.logits(kind, output, batch["attention_mask"])
        return objective.losses(kind, logits, batch["labels"], self.pack.members)

    def _tensors(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        takes = self.model_inputs
        return {k: torch.from_numpy(v).to(self.pack.device) for k, v in arrays.items() if k == "labels" or k in takes}

    @property
    def model_inputs(self) -> set[str]:
        return set(self.tokenizer.model_input_names) | {"input_ids", "attention_mask"}

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.pack.precision == "bf16":
            return torch.autocast(self.pack.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, split: str) -> list[dict[str, float] | Undefined]:
        """Each member's metrics on a split, in points, or why they have no value."""
        truth = self.data[split].truth
        return [one if isinstance(one, Undefined) else self._score(one, *truth) for one in self.predictions(split)]

    @torch.no_grad()
    def predictions(self, split: str) -> list[np.ndarray | Undefined]:
        """Each member's predictions for a split, in the order of its rows, as `Task.metrics` takes them."""
        encoded = self.data[split]
        self.model.eval()
        return collect(self.pack.task.kind, encoded, self._evaluation_logits(encoded), self.pack.members)

    def _evaluation_logits(self, encoded: Encoded) -> Iterator[tuple[np.ndarray, int, Tensor]]:
        """For each batch its rows, their length, and the logits of every member, (K*N, ...).

        Members cannot share an evaluation as they share a training step, because their activations differ from the first
        adapted layer on.  On a CPU they are therefore merged into the model's weights one by one, each of which then costs
        what the bare model costs.  A GPU would wait for the launches of small batches, and a 16-bit weight would round small
        updates away: there the whole pack is evaluated, its rows repeated.
        """
        pack = self.pack
        if pack.device.type == "cpu" and pack.precision == "fp32" and self.adapter.mergeable:
            with contextlib.suppress(CannotMerge):  # raised before anything has been yielded
                yield from self._merged_logits(encoded)
                return
        for rows, length in evaluation_batches(encoded, pack.training.evaluation_batch_size):
            yield rows, length, self._logits(encoded, rows, length, pack.members)

    def _merged_logits(self, encoded: Encoded) -> Iterator[tuple[np.ndarray, int, Tensor]]:
        """The same with each member in turn merged into the model."""
        size, members = self.pack.training.evaluation_batch_size, self.pack.members
        # Up to 256 rows at once, never more than a packed evaluation would have: small batches are slower a row.
        plan = evaluation_batches(encoded, max(size, min(size * members, 256)))
        found: list[list[Tensor]] = [[] for _ in plan]
        for member in range(members):
            try:
                self.adapter.merge(member)
                for parts, (rows, length) in zip(found, plan, strict=True):
                    parts.append(self._logits(encoded, rows, length, 1))
            finally:
                self.adapter.unmerge()
        for parts, (rows, length) in zip(found, plan, strict=True):
            yield rows, length, torch.cat(parts)

    def _logits(self, encoded: Encoded, rows: np.ndarray, length: int, members: int) -> Tensor:
        """The model's logits for a batch, its rows repeated for so many members."""
        batch = self._tensors(collate(encoded, rows, length, self.pad))
        batch.pop("labels")
        self.adapter.begin(Step(max(self.step, 1), self.total), training=False)
        batch = {k: v.repeat(members, 1) for k, v in batch.items()}
        with self._autocast():
            output = self.model(**self.adapter.prepare(batch))
        self.progress(members * len(rows) / 3)  # a forward pass alone costs about a third of a step
        return objective.logits(self.pack.task.kind, output, batch["attention_mask"])

    def _score(self, predicted: np.ndarray, labels: Any, offsets: np.ndarray | None) -> dict[str, float] | Undefined:
        try:
            return self.pack.task.metrics(predicted, labels, offsets)
        except Undefined as error:
            return error

    def _finish(self) -> list[Outcome]:
        outcomes = [Outcome() for _ in range(self.pack.members)]
        for member, outcome in enumerate(outcomes):
            if not bool(self.alive[member]) or int(self.skipped[member]) == self.step:
                outcome.error = "diverged"
                outcome.detail = f"{int(self.skipped[member])} steps with a non-finite loss or gradient by step {self.step}"
        if bool(self.alive.any()):
            for split in self.pack.splits:
                for member, predicted in enumerate(self.predictions(split)):
                    if outcomes[member].error != "diverged":
                        self._conclude(outcomes[member], member, split, predicted)
        scored = [self.step] * self.pack.members
        if self.pack.best_epoch:
            scored = [self._take_best_epoch(member, outcome) for member, outcome in enumerate(outcomes)]
        peak = self.memory.read()
        peak = None if peak is None or self.peak is None else max(peak, self.peak)
        self.peak = peak
        counts = {k: v.tolist() for k, v in self.adapter.parameter_counts().items()}
        ranks, nominal, scales = self.adapter.ranks(), self.adapter.nominal_ranks(), self.adapter.scales()
        for member, outcome in enumerate(outcomes):
            values = [float(f"{s[member].item():.9g}") for s in scales.values()]
            outcome.facts = {
                "steps": self.step,
                "total_steps": self.total,
                "epochs": round(self.step / self.per_epoch, 4),
                "skipped_steps": int(self.skipped[member]),
                "scored_step": scored[member],
                "tokens_per_second": self.tokens / self.training_seconds if self.training_seconds else 0.0,
                "peak_memory_bytes": peak if self.pack.members == 1 else None,
                "pack_peak_memory_bytes": peak,
                "trainable_parameters": counts["trainable"][member],
                "nominal_parameters": counts["nominal"][member],
                "active_parameters": counts["active"][member],
                "head_parameters": counts["head"][member],
                "scale": values[0] if len(set(values)) == 1 else dict(zip(scales, values, strict=True)) or None,
                "ranks": {name: int(rank[member]) for name, rank in ranks.items()},
                "nominal_ranks": {name: int(rank[member]) for name, rank in nominal.items()},
                "physical_ranks": {name: int(rank[member]) for name, rank in self.adapter.physical_ranks().items()},
                "final_train_loss": None if self.last_loss[member].isnan() else float(self.last_loss[member]),
                "dropout_note": None
                if not self.silent
                else f"dropout inside the attention is off ({len(self.silent)} places): a fused kernel cannot draw it by key",
            }
        if hasattr(self.adapter, "nested_ranks") and bool(self.alive.any()):
            for outcome, scores in zip(outcomes, self._rank_scores(), strict=True):
                outcome.facts["rank_scores"] = scores
        return outcomes

    def _rank_scores(self) -> list[dict[str, float | None]]:
        """For each member its metric on the last split at every rank that it can be used at; None where it has no value."""
        found: list[dict[str, float | None]] = [{} for _ in range(self.pack.members)]
        own = self.adapter.nested_ranks()
        report, self.progress = self.progress, lambda rows: None  # these evaluations are not in the plan of the work
        try:
            for rank in range(min(r.start for r in own), max(r.stop for r in own)):
                with self.adapter.at_rank(rank):
                    for scores, ranks, metrics in zip(found, own, self.evaluate(self.pack.splits[-1]), strict=True):
                        value = None if isinstance(metrics, Undefined) else metrics.get(self.pack.task.metric)
                        if rank in ranks:
                            scores[str(rank)] = value
        finally:
            self.progress = report
        return found

    def _take_best_epoch(self, member: int, outcome: Outcome) -> int:
        """Gives a member the metrics of its best evaluation, the first of equal ones; the step of that evaluation.

        They are read from its own metrics.jsonl, so that a run that was cut off has those before the cut too.
        """
        split, metric = self.pack.splits[0], self.pack.task.metric
        lines = [json.loads(line) for line in (self.logs[member] / "metrics.jsonl").read_text().splitlines()]
        found = [x for x in lines if x["kind"] == "evaluation" and x["split"] == split and metric in x["metrics"]]
        if not found or outcome.error == "diverged":
            return self.step
        best = max(found, key=lambda line: line["metrics"][metric])["step"]
        outcome.error = outcome.detail = None  # where only the last epoch has no value, the best one still has
        outcome.metrics = {x["split"]: x["metrics"] for x in lines if x["kind"] == "evaluation" and x["step"] == best}
        if best != self.step:
            outcome.predictions = {}  # those of the end are not what counts
        return best

    def _conclude(self, outcome: Outcome, member: int, split: str, predicted: np.ndarray | Undefined) -> None:
        """Adds what a member reached on a split to its outcome, and to its log."""
        encoded = self.data[split]
        metrics = predicted if isinstance(predicted, Undefined) else self._score(predicted, *encoded.truth)
        self._log_evaluation(member, split, metrics)
        if isinstance(metrics, Undefined):
            outcome.error, outcome.detail = metrics.error, metrics.detail
        else:
            outcome.metrics[split] = metrics
            outcome.standard_errors[split] = self.pack.task.standard_error(predicted, *encoded.truth)
            outcome.rows[split] = encoded.num_examples
            outcome.predictions[split] = predicted

    # -- what is written down ------------------------------------------------------------------------------------------

    def _log(self, member: int, name: str, line: Mapping[str, Any]) -> None:
        with (self.logs[member] / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def _log_step(self) -> None:
        factor = schedule_factor(self.pack.training.schedule, self.step, self.total, self.warmup)
        loss, penalty, steps = self.sums
        mean = torch.where(steps > 0, loss / steps.clamp_min(1), torch.nan)
        self.last_loss = torch.where(steps > 0, mean, self.last_loss)
        for member in range(self.pack.members):
            line = {"kind": "train", "step": self.step, "loss": finite(mean[member])}
            line["learning_rate"] = self.pack.learning_rates[member] * factor
            line["penalty"] = finite(penalty[member] / steps[member].clamp_min(1))
            self._log(member, "metrics.jsonl", line)
        self.sums.zero_()

    def _log_evaluation(self, member: int, split: str, metrics: dict[str, float] | Undefined) -> None:
        line = {"kind": "evaluation", "step": self.step, "split": split, "epoch": round(self.step / self.per_epoch, 4)}
        undefined = isinstance(metrics, Undefined)
        self._log(member, "metrics.jsonl", {**line, "metrics": {} if undefined else metrics})

    def _log_ranks(self) -> None:
        ranks, live = self.adapter.ranks(), self.adapter.live_ranks()
        if not ranks:
            return
        budget = self.adapter.budget(Step(self.step, self.total))
        table = torch.stack(list(ranks.values())).tolist()  # sites x K: one device sync for all sites
        total = torch.stack(list(live.values())).sum(0).tolist()
        for member in range(self.pack.members):
            mine = {name: row[member] for name, row in zip(ranks, table, strict=True)}
            line = {"step": self.step, "budget": None if budget is None else int(budget[member])}
            self._log(member, "ranks.jsonl", {**line, "active": sum(mine.values()), "live": total[member], "ranks": mine})

    # -- checkpoints -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the pack's state, whole or not at all."""
        tensors = {f"adapter.{k}": v for k, v in self.adapter.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in self.optimizer.state().items()}
        tensors |= {"skipped": self.skipped, "alive": self.alive, "sums": self.sums, "last_loss": self.last_loss}
        peak = self.memory.read()
        facts = {
            "step": self.step,
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
            "tokens": self.tokens,
            "peak": None if peak is None or self.peak is None else max(peak, self.peak),
            "pack": self.pack.identity(),
            "silent": self.silent,
            "threads": torch.get_num_threads(),
            "compiled": native.library() is not None,
            "logs": [[(f / n).stat().st_size for n in ("metrics.jsonl", "ranks.jsonl")] for f in self.logs],
        }
        with replacing(self.checkpoint) as path:
            try:
                save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path, {"state": json.dumps(facts)})
            except SafetensorError as error:  # safetensors' word for a full disk
                raise as_os_error(error, self.checkpoint) from None

    @torch.no_grad()
    def _resume(self) -> bool:
        """Takes the checkpoint up where there is a good one of the same pack."""
        if not self.checkpoint.is_file():
            return False
        try:
            with safe_open(self.checkpoint, framework="pt", device=str(self.pack.device)) as file:
                facts = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError, OSError):
            return False  # cut off by a power failure: the run starts again
        files = [[folder / name for name in ("metrics.jsonl", "ranks.jsonl")] for folder in self.logs]
        if facts.get("pack") != self.pack.identity():
            return False
        for pair, lengths in zip(files, facts["logs"], strict=True):
            if any(not path.is_file() or path.stat().st_size < length for path, length in zip(pair, lengths, strict=True)):
                return False
        self.adapter.load_state_dict({k.removeprefix("adapter."): v for k, v in tensors.items() if k.startswith("adapter.")})
        self.optimizer.load_state({k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")})
        for name in ("skipped", "alive", "sums", "last_loss"):
            setattr(self, name, tensors[name])
        for name in ("step", "seconds", "training_seconds", "tokens", "peak", "silent"):
            setattr(self, name, facts[name])
        if facts["threads"] != torch.get_num_threads():
            warnings.warn(
                f"this run was begun with {facts['threads']} threads and goes on with {torch.get_num_threads()}: it ends equal "
                f"to rounding, not to the bit",
                stacklevel=2,
            )
        if facts.get("compiled") != (native.library() is not None):
            words = ("without", "with") if facts.get("compiled") is False else ("with", "without")
            warnings.warn(
                f"this run was begun {words[0]} the compiled passes and goes on {words[1]} them: it ends equal to rounding, "
                f"not to the bit",
                stacklevel=2,
            )
        for pair, lengths in zip(files, facts["logs"], strict=True):
            for path, length in zip(pair, lengths, strict=True):
                os.truncate(path, length)
        # What was read back counts as done, so that the bar and the time left are those of the whole pack.
        self.progress(sum(len(rows) for step in range(1, self.step + 1) for rows, _ in self._rows(step)))
        return True


def collect(
    kind: str, encoded: Encoded, evaluated: Iterable[tuple[np.ndarray, int, Tensor]], members: int
) -> list[np.ndarray | Undefined]:
    """Each member's predictions for a split, in the order of its rows, as `Task.metrics` takes them.

    evaluated: for each batch its rows, their length, and the logits of every member, (K*N, ...).
    """
    by_token = KINDS[kind].by_token
    number, shape = KINDS[kind].predictions
    kept = np.zeros((members, len(encoded.ids) if by_token else len(encoded), *shape), number)
    finite = np.ones(members, bool)
    for rows, length, logits in evaluated:
        finite &= logits.isfinite().view(members, -1).all(1).cpu().numpy()
        found = objective.predictions(kind, logits)
        found = found.view(members, len(rows), *found.shape[1:]).cpu().numpy()
        if by_token:
            mask = np.arange(length) < encoded.lengths[rows][:, None]
            kept[:, (encoded.offsets[rows][:, None] + np.arange(length))[mask]] = found[:, mask]
        else:
            kept[:, rows] = found
    infinite = Undefined("collapsed", "the model's outputs are not finite numbers")
    return [kept[k] if finite[k] else infinite for k in range(members)]


def as_os_error(error: SafetensorError, path: Path) -> OSError:
    """What the system said, out of the words of safetensors: "... I/O error: ... (os error 28)"."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(str(error)) if found is None else OSError(int(found[1]), os.strerror(int(found[1])), str(path))


def random_seed(seeds: Sequence[int], step: int, micro_batch: int) -> int:
    """A seed for torch's own generator, from all that keys a draw."""
    digest = hashlib.blake2b(f"{list(seeds)}/{step}/{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def finite(value: Tensor) -> float | None:
    """A number as JSON can hold it."""
    return float(value) if bool(torch.isfinite(value)) else None
