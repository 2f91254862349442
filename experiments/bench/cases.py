"""What `rankwise bench` measures, under what name, at what size, and what it must reach.

No torch here: a wrong word, or a missing PEFT, is refused within a second.
"""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from rankwise.variants.settings import nearest

PEFT_VERSION = "0.21.2"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
METHODS = ("lora", "adalora", "dora", "adalora+dora")
PEFT_METHODS = ("lora", "adalora", "dora")  # PEFT has no AdaLoRA with magnitudes
ABLATED = ("lora", "dora")  # what --ablation takes our changes out of
ABLATION_REPETITIONS = 3

# The same for every arm.
RECIPE: dict[str, Any] = {
    "rank": 8,
    "alpha": 16,
    "adalora": {"initial_rank": 12, "target_rank": 8, "alpha": 24, "orthogonality": 0.1, "interval": 1},
    "lora_dropout": 0.1,
    "hidden_dropout": 0.1,  # the models' own
    "attention_dropout": 0.0,  # a draw inside a fused kernel cannot be keyed, so it is off in every arm
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "clip": 1.0,
    "targets": "all-linear",
    "tokens": "random, no padding; the same rows in every arm",
    "data": "ours with its data path (plan of lengths, padding, copies); PEFT and the floors on tensors that are ready",
    "memory": "freed memory is kept for the next tensor (glibc), in every arm",
}
LINEAR_SIZES = {"rank": 16, "initial_rank": 16, "target_rank": 10, "alpha": 16}  # of the one linear
# Allocations are timed in the middle of the pruning phase: it begins after step 1 and ends one step before the last.
TOTAL_STEPS, FIRST_STEP = 100_000, 40_000


@dataclass(frozen=True)
class Shape:
    """How much one step works on.

    rows, length: of one member's batch. repetitions: timed rounds; warmup: rounds before them that are dropped.
    evaluation_batches: of one timed evaluation, which begins with new parameters; evaluation_repetitions: its rounds, where
    they are not as many. peft_repeat: steps of PEFT in one round, whose median counts: beside a pack's
    step one of PEFT's is short.
    """

    name: str
    members: int
    rows: int
    length: int
    repetitions: int
    warmup: int = 1
    evaluation_batches: int = 1
    evaluation_repetitions: int | None = None
    peft_repeat: int = 1


@dataclass(frozen=True)
class LlamaSize:
    """Of a random Llama, with a classifier or as a language model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int = 1024


@dataclass(frozen=True)
class ImageSize:
    """Of a random Dinov2ForImageClassification, and the side of its images in pixels."""

    hidden: int
    layers: int
    heads: int
    patch: int
    side: int


@dataclass(frozen=True)
class StudySize:
    """Of the small study that is really run: a sweep of `rates` over `sweep_seeds`, then `seeds` final runs."""

    rates: tuple[float, ...]
    sweep_seeds: int
    seeds: int
    pack: int
    peft_runs: int  # of them PEFT makes so many, half of the sweep's kind and half of the final kind
    train_examples: int | None = 512
    evaluation_examples: int | None = 128
    task: str = "glue/stsb"


@dataclass(frozen=True)
class Plan:
    """Every size; tests give smaller ones."""

    model: str
    shapes: tuple[Shape, ...]
    linear: Shape  # its tokens are rows x length
    features: int
    llama: LlamaSize
    llama_shape: Shape
    images: ImageSize
    images_shape: Shape  # its length is that of patches and the first token
    language: LlamaSize
    language_shape: Shape  # members are runs that train, or generate, together
    throughput: Shape  # of one run; members are those of `packs`
    packs: tuple[int, ...]
    steps_per_run: int  # one epoch of STS-B
    evaluated_per_run: int
    study: StudySize
    products: tuple[tuple[int, int, int], ...]  # matrices whose product gives the machine's rate: rows, inner, columns


SHAPES = (
    Shape("k1", 1, 32, 32, repetitions=7, warmup=2, evaluation_batches=8, evaluation_repetitions=3),
    Shape("k16", 16, 32, 16, repetitions=3, evaluation_batches=4, evaluation_repetitions=2, peft_repeat=3),
)
LLAMA = {
    "cpu": LlamaSize(hidden=512, layers=4, heads=8, kv_heads=4, feed_forward=1408),
    "cuda": LlamaSize(hidden=2048, layers=16, heads=32, kv_heads=8, feed_forward=8192),
}
DINOV2 = ImageSize(hidden=384, layers=12, heads=6, patch=14, side=98)  # DINOv2-small at 7 x 7 patches
SMOLLM2 = LlamaSize(hidden=576, layers=30, heads=9, kv_heads=3, feed_forward=1536, vocabulary=49_152)  # its 135M
STUDY = {
    "cpu": StudySize((3e-4, 1e-3, 3e-3, 1e-2), sweep_seeds=4, seeds=16, pack=16, peft_runs=16),
    "cuda": StudySize((3e-4, 1e-3, 3e-3, 1e-2), sweep_seeds=16, seeds=64, pack=64, peft_runs=16),
}
# Square ones, and tall ones as a model multiplies.
PRODUCTS = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (8192, 384, 1536), (8192, 1536, 384)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 2048, 8192), (65536, 384, 1536)),
}


def plan(device: str) -> Plan:
    """The sizes for a device type, "cpu" or "cuda"."""
    return Plan(
        model=MINILM,
        shapes=SHAPES,
        linear=Shape("", 1, 64, 1, repetitions=30, warmup=2, evaluation_batches=8, evaluation_repetitions=15),
        features=2048,
        llama=LLAMA[device],
        llama_shape=Shape("k1", 1, 8, 128, repetitions=5, warmup=2, evaluation_batches=8, evaluation_repetitions=3),
        images=DINOV2,
        images_shape=Shape("k1", 1, 16, 50, repetitions=5, warmup=2, evaluation_batches=4, evaluation_repetitions=3),
        language=SMOLLM2,
        language_shape=Shape("k8", 8, 2, 64, repetitions=2),
        throughput=Shape("run", 1, 32, 16, repetitions=2, peft_repeat=3),
        packs=(1, 4, 16, 64),
        steps_per_run=180,
        evaluated_per_run=1379,
        study=STUDY[device],
        products=PRODUCTS[device],
    )


# Ratio: PEFT's seconds over ours, at least. Tax: our seconds over the floor's, at most. Memory: ours over PEFT's, at most.
TARGETS: dict[str, dict[str, dict[str, float]]] = {
    "cpu": {
        "ratio": {
            "train/lora/k1": 1.1,
            "train/adalora/k1": 1.4,
            "train/dora/k1": 1.9,
            "train/lora/k16": 1.5,
            "train/adalora/k16": 1.9,
            "train/dora/k16": 2.4,
            "eval/dora/k1": 1.9,
            "eval/dora/k16": 1.9,
            "linear/train/lora": 1.0,
            "linear/train/adalora": 1.5,
            "linear/train/dora": 2.5,
            "linear/eval/dora": 8.0,
            "images/train/lora/k1": 1.3,
            "images/train/adalora/k1": 1.3,
            "images/train/dora/k1": 1.3,
            "llama/train/lora/k1": 1.5,
            "llama/train/adalora/k1": 1.5,
            "llama/train/dora/k1": 2.0,
            **{f"language/train/{m}/k8": 1.5 for m in PEFT_METHODS},
            **{f"language/generate/{m}/k8": 2.0 for m in PEFT_METHODS},
        },
        "tax": {f"train/{m}/k1": 1.35 for m in METHODS} | {f"train/{m}/k16": 1.15 for m in METHODS},
        "memory": {f"{c}/{m}/{k}": 1.0 for c, k in (("llama/train", "k1"), ("language/train", "k8")) for m in PEFT_METHODS},
        "allocator": {f"allocator/{m}/{k}": 0.03 for m in ("adalora", "adalora+dora") for k in ("k1", "k16")},
        "study": {},
    },
    "cuda": {
        "ratio": {},
        "tax": {"llama/train/lora/k1": 1.10, "llama/train/adalora/k1": 1.15, "llama/train/dora/k1": 1.15},
        "memory": {"train/dora/k1": 0.8, "train/dora/k16": 0.8, "llama/train/dora/k1": 0.8},
        "allocator": {f"allocator/{m}/{k}": 0.03 for m in ("adalora", "adalora+dora") for k in ("k1", "k16")},
        "study": {"study/lora": 20.0},
    },
}


@dataclass(frozen=True)
class Case:
    """One line of the result. group: what is timed together; member count or shape is in `shape`."""

    name: str
    group: str  # "encoder", "linear", "llama", "images", "language", "allocator", "throughput" or "study"
    phase: str  # "train", "eval" or ""
    method: str
    shape: str
    full: bool  # measured with --full alone


def cases() -> list[Case]:
    """Every case there is, in the order of the table."""
    found = [Case(f"{p}/{m}/{k}", "encoder", p, m, k, False) for k in ("k1", "k16") for p in ("train", "eval") for m in METHODS]
    found += [Case(f"linear/train/{m}", "linear", "train", m, "", False) for m in PEFT_METHODS]
    found += [Case("linear/eval/dora", "linear", "eval", "dora", "", False)]
    found += [
        Case(f"allocator/{m}/{k}", "allocator", "", m, k, False) for k in ("k1", "k16") for m in ("adalora", "adalora+dora")
    ]
    found += [Case(f"llama/{p}/{m}/k1", "llama", p, m, "k1", True) for p in ("train", "eval") for m in METHODS]
    found += [Case(f"images/{p}/{m}/k1", "images", p, m, "k1", True) for p in ("train", "eval") for m in PEFT_METHODS]
    found += [
        Case(f"language/{word}/{m}/k8", "language", p, m, "k8", True)
        for word, p in (("train", "train"), ("generate", "eval"))
        for m in PEFT_METHODS
    ]
    found += [Case(f"throughput/{m}/k{k}", "throughput", "", m, f"k{k}", True) for m in METHODS for k in (1, 4, 16, 64)]
    return [*found, Case("study/lora", "study", "", "lora", "", True)]


def select(pattern: str | None, full: bool) -> list[Case]:
    """The cases to measure: those of the pattern (`train/dora/*`), without one all; those of `full` only if it is set.

    Raises:
        ValueError: the pattern matches none.
    """
    everything = cases()
    chosen = _matching(pattern, [case for case in everything if full or not case.full])
    if not chosen and _matching(pattern, everything):
        raise ValueError(f"--cases {pattern}: this is measured with --full alone: add --full")
    return chosen or _refuse(str(pattern), everything, [case for case in everything if full or not case.full])


def select_ablated(pattern: str | None) -> list[Case]:
    """The cases of `--ablation`: steps and evaluations of the methods in ABLATED, at each of SHAPES.

    Raises:
        ValueError: the pattern matches none.
    """
    everything = [case for case in cases() if case.group == "encoder" and case.method in ABLATED]
    return _matching(pattern, everything) or _refuse(str(pattern), everything, everything)


def _matching(pattern: str | None, of: Sequence[Case]) -> list[Case]:
    return [case for case in of if pattern is None or fnmatchcase(case.name, pattern)]


def _refuse(pattern: str, known: Sequence[Case], shown: Sequence[Case]) -> NoReturn:
    near = nearest(pattern, [case.name for case in known])
    raise ValueError(f'--cases "{pattern}" matches no case{near}; there are: {", ".join(case.name for case in shown)}')


def check_peft() -> None:
    """
    Raises:
        ValueError: PEFT is not installed in the version that we compare with.
    """
    remedy = "give: pip install -c constraints.txt -e '.[bench]'"
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"bench compares with PEFT {PEFT_VERSION}, which is not installed; {remedy}") from None
    if version != PEFT_VERSION:
        raise ValueError(f"bench compares with PEFT {PEFT_VERSION}, and {version} is installed; {remedy}")


def settings(method: str, sizes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The settings for `variants.create`: the recipe's, with other sizes where they are given."""
    own = RECIPE["adalora"] if method.startswith("adalora") else {key: RECIPE[key] for key in ("rank", "alpha")}
    own = {**own, "dropout": RECIPE["lora_dropout"]}
    if method.startswith("adalora"):
        own |= {"warmup_steps": 1, "final_steps": 1}
    return {key: (sizes or {}).get(key, value) for key, value in own.items()}


def of_group(chosen: Sequence[Case], group: str, shape: str | None = None) -> list[Case]:
    return [case for case in chosen if case.group == group and (shape is None or case.shape == shape)]
