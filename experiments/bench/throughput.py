"""How many runs a minute: from measured steps and evaluations for a pack of K, and a small study really run.

A run is one epoch of STS-B at batch 32 and its evaluation; both sides are charged the same steps and batches.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rankwise.experiments import config, memory, models
from rankwise.experiments.bench import timing
from rankwise.experiments.bench.arms import Setup, with_peft
from rankwise.experiments.bench.cases import PEFT_METHODS, RECIPE, Case, Plan, Shape, settings
from rankwise.experiments.bench.workloads import EncoderArms, peft_config, plain
from rankwise.experiments.data.encoded import Encoded
from rankwise.experiments.data.lengths import batches, collate, evaluation_batches
from rankwise.experiments.kinds import Undefined
from rankwise.experiments.study import Runner
from rankwise.experiments.tasks import Task
from rankwise.experiments.tasks import get as get_task
from rankwise.experiments.training.schedule import schedule_factor

TRIED = 4  # members of the step from which a pack's memory is foretold
SPARE = 0.8  # of the free memory that a pack may take


def of_members(shape: Shape, members: int) -> Shape:
    return dataclasses.replace(shape, name=f"k{members}", members=members)


def measure_case(
    case: Case, members: int, arms: Callable[[int], EncoderArms], plan: Plan, precision: str, repetitions: int | None = None
) -> dict[str, Any]:
    """Runs a minute in packs of K, from the median step and evaluation batch; PEFT's one run after the other."""
    row = {"case": case.name, "method": case.method, "members": members, "runs_per_minute": None, "peft_runs_per_minute": None}
    row |= {"step_seconds": None, "evaluation_batch_seconds": None, "peft_step_seconds": None}
    row |= {"peft_evaluation_batch_seconds": None, "steps_per_run": plan.steps_per_run}
    row |= {"evaluated_per_run": plan.evaluated_per_run, "note": None}
    if members > TRIED and (why := _too_large(case.method, members, arms)):
        return row | {"note": why}
    these = arms(members)
    rounds, shape = repetitions or these.shape.repetitions, these.shape
    for phase, field in (("train", "step_seconds"), ("eval", "evaluation_batch_seconds")):
        ours = these.ours(case.method)
        steps = {"": ours.train if phase == "train" else ours.evaluate}
        if case.method in PEFT_METHODS:
            peft = these.peft(case.method, precision)
            steps["peft_"] = peft.train if phase == "train" else peft.evaluate
        times = timing.interleave(steps, these.setup.device, rounds, shape.warmup, {"peft_": shape.peft_repeat})
        for whose, taken in times.items():
            row[whose + field] = statistics.median(taken) / these.batches[phase]
    evaluations = plan.evaluated_per_run / shape.rows
    for whose, packed in (("", members), ("peft_", 1)):
        if row[f"{whose}step_seconds"] is not None:
            each = plan.steps_per_run * row[f"{whose}step_seconds"] + evaluations * row[f"{whose}evaluation_batch_seconds"]
            row[f"{whose}runs_per_minute"] = 60 * packed / each
    return row


def _too_large(method: str, members: int, arms: Callable[[int], EncoderArms]) -> str | None:
    """Why a pack of so many does not fit in the memory that is free; None where it does."""
    tried = arms(TRIED)
    arm, device = tried.ours(method), tried.setup.device
    arm.train()
    needed = (memory.live_bytes(arm.tensors()) + memory.peak_growth(arm.train, device)) / TRIED * members
    free = _free_memory(device)
    if free is None or needed <= SPARE * free:
        return None
    return f"not measured: a pack of {members} needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return None


# -- a study, really run -----------------------------------------------------------------------------------------------


def measure_study(plan: Plan, setup: Setup, peft_precision: str) -> dict[str, Any]:
    """A sweep and final runs of LoRA by our Runner, packed, and runs of both kinds by PEFT, one after the other.

    Both with reading the tokens, loading the model, training, evaluating; tokens are on disk for both.
    """
    size = plan.study
    task = get_task(size.task)
    _, tokenizer, _ = models.load(plan.model, task, "fp32", "cpu")
    study = _study(plan)
    length = study.training.max_length
    for split in (*task.splits,):
        task.encode(tokenizer, split, length)
    began = time.perf_counter()
    runner = Runner(study, setup.scratch / "study", str(setup.device))
    runner.prepare()
    results = runner.run()
    timing.synchronize(setup.device)
    seconds = time.perf_counter() - began
    if setup.device.type == "cuda":
        torch.use_deterministic_algorithms(False)  # the Runner's own
    data = runner.prepared[task.name].data
    failed = sum(result["status"] == "failed" for result in results)
    sweep, final = (task.selection_split,), (task.selection_split, task.score_split)
    sweeps, finals = len(size.rates) * size.sweep_seeds, size.seeds
    each = {}
    for kind, splits in (("sweep", sweep), ("final", final)):
        taken = []
        for seed in range(size.peft_runs // 2):
            began = time.perf_counter()
            _peft_run(plan, setup, peft_precision, task, study.training, data, splits, seed, size.rates[seed % len(size.rates)])
            timing.synchronize(setup.device)
            taken.append(time.perf_counter() - began)
        each[kind] = statistics.mean(taken)
    peft_seconds = sweeps * each["sweep"] + finals * each["final"]
    return {
        "task": task.name,
        "method": "lora",
        "runs": sweeps + finals,
        "sweep_runs": sweeps,
        "final_runs": finals,
        "failed_runs": failed,
        "pack": size.pack,
        "train_rows": len(data["train"]),
        "evaluated_rows": len(data[task.selection_split]),
        "seconds": seconds,
        "runs_per_minute": 60 * (sweeps + finals) / seconds,
        "peft_runs_made": 2 * (size.peft_runs // 2),
        "peft_run_seconds": each,
        "peft_seconds": peft_seconds,
        "peft_runs_per_minute": 60 * (sweeps + finals) / peft_seconds,
        "peft_precision": peft_precision,
        "ratio": peft_seconds / seconds,
    }


def _study(plan: Plan) -> config.Study:
    size = plan.study
    raw = {
        "model": plan.model,
        "tasks": [size.task],
        "seeds": size.seeds,
        "pack": size.pack,
        "quick": True,
        "training": {
            "epochs": 1,
            "weight_decay": RECIPE["weight_decay"],
            "clip": RECIPE["clip"],
            "max_length": 64,
            "train_examples": size.train_examples,
            "evaluation_examples": size.evaluation_examples,
        },
        "sweep": {"epochs": 1, "seeds": size.sweep_seeds},
        "methods": [{"method": "lora", "learning_rates": list(size.rates), **settings("lora")}],
    }
    return config.parse(raw, default_name="bench")


def _peft_run(
    plan: Plan,
    setup: Setup,
    precision: str,
    task: Task,
    training: config.Training,
    data: dict[str, Encoded],
    splits: tuple[str, ...],
    seed: int,
    rate: float,
) -> dict[str, Any]:
    """One run with PEFT as a careful user writes it: the same batches, padding, schedule and evaluation; its metrics."""
    torch.manual_seed(seed)
    model, heads, targets = plain(plan.model, "bf16" if precision == "bf16 weights" else "fp32", setup.device)
    pad = model.config.pad_token_id or 0
    dtype = model.dtype
    model = with_peft(model, peft_config("lora", targets, {}, modules_to_save=heads, task_type="SEQ_CLS"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=training.weight_decay, fused=True)
    total = training.total_steps(len(data["train"]))
    warmup = round(training.warmup_ratio * total)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: schedule_factor(training.schedule, min(done + 1, total), total, warmup)
    )

    def tensors(encoded: Encoded, rows: np.ndarray, length: int) -> dict[str, torch.Tensor]:
        arrays = collate(encoded, rows, length, pad)
        return {name: torch.from_numpy(array).to(setup.device) for name, array in arrays.items()}

    @contextlib.contextmanager
    def autocast() -> Iterator[None]:
        with torch.autocast(setup.device.type, dtype=torch.bfloat16, enabled=precision == "bf16 autocast"):
            yield

    model.train()
    for epoch in range(training.epochs):
        for rows, length in batches(data["train"], training.batch_size, seed, epoch):
            batch = tensors(data["train"], rows, length)
            batch["labels"] = batch["labels"].to(dtype)
            with autocast():
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, training.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    model.eval()
    found = {}
    for split in splits:
        encoded = data[split]
        predicted = np.zeros(len(encoded))
        with torch.no_grad():
            for rows, length in evaluation_batches(encoded, training.evaluation_batch_size):
                batch = tensors(encoded, rows, length)
                del batch["labels"]
                with autocast():
                    predicted[rows] = model(**batch).logits.float().squeeze(-1).cpu().numpy()
        with contextlib.suppress(Undefined):  # a run that collapsed took as long
            found[split] = task.metrics(predicted, encoded.labels)
    return found
