"""What a base in 4 or 8 bits saves and costs, beside fp32 and bf16: bytes of its weights, seconds of a step, loss and score.

rankwise bench --quantised --out reports/bench/quantised

LoRA of the recipe's size (cases.py) trains over each base, from the same start on the same rows.  All bases of a model take
their steps in turn, so that what else the machine does is shared among them.  Loss and score are those of fixed rows that are
not trained on, before the first step and after the last.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rankwise.experiments import kinds, memory, sources, tasks
from rankwise.experiments.bench import timing
from rankwise.experiments.bench.cases import MINILM, RECIPE, settings
from rankwise.experiments.config import Training
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.kinds import Undefined
from rankwise.experiments.tasks import Task, text_metrics
from rankwise.experiments.training import outcomes
from rankwise.experiments.training.evaluation import Evaluator
from rankwise.experiments.training.pack import Pack
from rankwise.experiments.training.trainer import Trainer
from rankwise.variants.adapter.kinds.quantised import bits, quant_state, row_scales
from rankwise.variants.adapter.kinds.scheme import Scheme
from rankwise.variants.settings import check
from torch import Tensor, nn

SMOLLM2 = "SmolLM2-135M-Instruct-Q4_1"
SOURCE = "glue/stsb"  # its pairs and scores for the encoder, its sentences for the language model


@dataclass(frozen=True)
class Base:
    """A base as it is held. precision: of what is not quantised."""

    name: str
    precision: str
    scheme: Scheme | None = None


BASES = (
    Base("fp32", "fp32"),
    Base("bf16", "bf16"),
    Base("int8", "fp32", Scheme("int8")),
    Base("nf4", "fp32", Scheme("nf4")),
    Base("nf4 + double quantization", "fp32", Scheme("nf4", True)),
)


@dataclass(frozen=True)
class Subject:
    """A model and how long it trains.

    rows, length: of one member's batch. evaluated: rows whose loss and score are taken. members: seeds, packed; loss and score
    are their means.
    """

    name: str
    model: str
    kind: str
    rows: int
    length: int
    steps: int
    evaluated: int
    learning_rate: float
    members: int = 1


SUBJECTS = (
    Subject("SmolLM2-135M", SMOLLM2, "language-modelling", 4, 32, 8, 16, 1e-3),
    Subject("all-MiniLM-L6-v2", MINILM, "regression", 16, 32, 30, 200, 1e-3, members=3),
)


def run(
    device: torch.device,
    subjects: tuple[Subject, ...] = SUBJECTS,
    progress: Callable[[str, float], None] = lambda what, steps: None,
) -> list[dict[str, Any]]:
    """A row for each model and base."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="rankwise-bench-") as scratch:
        for subject in subjects:
            rows += list(measured(subject, device, Path(scratch), progress))
    return rows


def measured(
    subject: Subject, device: torch.device, scratch: Path, progress: Callable[[str, float], None]
) -> Iterator[dict[str, Any]]:
    """The rows of one model."""
    task = _task(subject)
    data = _data(subject, task)
    trainers, before = {}, {}
    for base in BASES:
        trainers[base.name] = trainer = _trainer(subject, task, data, base, device, scratch)
        before[base.name] = _evaluated(trainer)
    steps = {name: _step(trainer, progress, f"{subject.name}, {name}") for name, trainer in trainers.items()}
    times = timing.interleave(steps, device, subject.steps - 1, warmup=1)
    for base in BASES:
        trainer, taken = trainers[base.name], times[base.name]
        losses, scores = _evaluated(trainer)
        weights, held, size = weight_bytes(trainer)
        yield {
            "model": subject.name,
            "base": base.name,
            "weights_bytes": weights,
            "linear_bits": 8 * held / size,
            "step_seconds": statistics.median(taken),
            "step_spread": timing.quartiles(taken),
            "steps": subject.steps,
            "members": subject.members,
            "loss_before": statistics.mean(before[base.name][0]),
            "losses": losses,
            "metric": task.metric,
            "scores": scores,
        }


def weight_bytes(trainer: Trainer) -> tuple[int, int, int]:
    """Bytes of all tensors of the frozen model, of its adapted linears, and how many weights these have."""
    of_adapter = {id(tensor) for tensor in (*trainer.adapter.parameters(), *trainer.adapter.buffers())}
    whole = [t for t in memory.tensors_in(trainer.model) if id(t) not in of_adapter]
    linears = [trainer.adapter.base(name) for name, _ in trainer.adapter.named_sites()]
    extra = [t for module in trainer.model.modules() for t in scales(module)]
    held = [t for module in linears for t in (module.weight, *scales(module))]
    size = sum(module.in_features * module.out_features for module in linears)
    return memory.live_bytes([*whole, *extra]), memory.live_bytes(held), size


def scales(module: nn.Module) -> list[Tensor]:
    """What bitsandbytes holds beside the codes of a linear, tables of levels among it."""
    if bits(module) == 8:
        return [row_scales(module)]
    if bits(module) != 4:
        return []
    state = quant_state(module)
    inner = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *inner]


def _step(trainer: Trainer, progress: Callable[[str, float], None], what: str) -> Callable[[], None]:
    def step() -> None:
        trainer.step += 1
        trainer.train_step()
        progress(what, 1)

    return step


def _evaluated(trainer: Trainer) -> tuple[list[float], list[float | None]]:
    """Each member's loss and score on the rows that are not trained on."""
    pack = trainer.pack
    data = trainer.data["validation"]
    size = pack.training.evaluation_batch_size
    trainer.model.eval()
    evaluator = Evaluator(trainer.adapter, trainer.kind, trainer.processor, size, pack.precision)
    losses, predictions = evaluator.losses_and_predictions(data, pack.members)
    found = [one if isinstance(one, Undefined) else outcomes.score(pack.task, one, *data.truth) for one in predictions]
    return losses, [None if isinstance(one, Undefined) else one[pack.task.metric] for one in found]


def _task(subject: Subject) -> Task:
    source = tasks.get(SOURCE)
    if subject.kind == source.kind:
        return dataclasses.replace(source, name=f"bench/{subject.kind}", sizes=None)

    def read(split: str) -> Examples:
        pairs = source.examples(split)
        texts = [text for pair in zip(pairs.first, pairs.second, strict=True) for text in pair]
        return Examples(texts, None, texts)

    return Task(
        name=f"bench/{subject.kind}",
        kind=subject.kind,
        num_labels=0,
        metric="perplexity",
        licence=source.licence,
        read=read,
        measure=text_metrics.modelled,
        resampled=text_metrics.resampled_compression,
        identity=source.identity,
    )


def _data(subject: Subject, task: Task) -> dict[str, Dataset]:
    """The first rows of each part."""
    folder, kind = sources.fetch(subject.model), kinds.get(task.kind)
    processor = kind.processor(folder)
    kind.fit(processor, transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True))
    encode, counts = kind.encode, {"train": subject.rows * subject.steps, "validation": subject.evaluated}
    found = {}
    for split, count in counts.items():
        examples = task.examples(split)
        some = examples.select(range(min(len(examples), count * 8)))  # a block of text holds several sentences
        encoded = encode(some, processor, subject.length)
        found[split] = encoded.select(range(min(len(encoded), count)))
    return found


def _trainer(
    subject: Subject, task: Task, data: dict[str, Dataset], base: Base, device: torch.device, scratch: Path
) -> Trainer:
    training = Training(
        epochs=1,
        batch_size=subject.rows,
        schedule="constant",
        warmup_ratio=0.0,
        weight_decay=RECIPE["weight_decay"],
        clip=RECIPE["clip"],
        max_length=subject.length,
        evaluations_per_epoch=0,
    )
    pack = Pack(
        method="lora",
        settings=check("lora", settings("lora")),
        targets=RECIPE["targets"],
        task=task,
        model=subject.model,
        training=training,
        seeds=tuple(range(subject.members)),
        learning_rates=(subject.learning_rate,) * subject.members,
        splits=("validation",),
        device=device,
        precision=base.precision,
        quantization=base.scheme,
    )
    return Trainer(pack, data, scratch / "checkpoint.safetensors", [scratch] * subject.members)
