"""A world small enough to train in a second, made from nothing: a two-layer model in a folder, tasks of letters.

`model` writes a folder that `experiments.models.load` takes like any other; `task` makes a Task whose examples are drawn
here; `pack` and `study` are the least that a Trainer and a Runner need.  `run` is what a child process does, so that it
can be killed.
"""

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats  # noqa: F401  (this and transformers, so that a fork of a server that imported this module starts at once)
import torch
from rankwise.experiments import config, kinds, models, tasks
from rankwise.experiments.config import Study, Training
from rankwise.experiments.data.encoded import Encoded
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.study import Runner
from rankwise.experiments.tasks import Task, metrics
from rankwise.experiments.training.pack import Outcome, Pack
from rankwise.experiments.training.trainer import Trainer
from rankwise.variants.settings import METHODS, check
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification  # noqa: F401

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ROWS = {"train": 60, "validation": 24, "test": 20}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "alpha": 5, "dropout": 0.1},
    "vera": {"rank": 8, "dropout": 0.1},
    "lora+": {"rank": 3, "alpha": 5, "dropout": 0.1},
    "trained-alpha": {"rank": 3, "alpha": 5, "dropout": 0.1},
    "loftq": {"rank": 3, "alpha": 5, "dropout": 0.1},
    "pissa": {"rank": 3, "alpha": 5, "dropout": 0.1},
    "olora": {"rank": 3, "alpha": 5, "dropout": 0.1},
    "orthogonal": {"rank": 3, "alpha": 5, "dropout": 0.1},
    "lora-fa": {"rank": 3, "alpha": 5, "dropout": 0.1},
    "dora": {"rank": 3, "alpha": 5, "dropout": 0.1},
    # Of 12 steps 3 are warm-up, 3 final; allocations at 4, 6, 8 and 9.
    "adalora": {"initial_rank": 4, "target_rank": 2, "alpha": 5, "dropout": 0.1, "warmup_steps": 3, "final_steps": 3}
    | {"interval": 2, "orthogonality": 0.3},
}
SETTINGS["dylora"] = {"rank": 4, "alpha": 5, "dropout": 0.1, "update": "frozen"}
SETTINGS["sora"] = {
    "initial_rank": 4,
    "target_rank": 2,
    "alpha": 5,
    "dropout": 0.1,
    "final_steps": 3,
    "sparsity": 2.0,
    "l1": 0.1,
}
SETTINGS["increlora"] = {"target_rank": 3, "alpha": 5, "dropout": 0.1, "warmup_steps": 2, "final_steps": 3, "interval": 2}
SETTINGS["elalora"] = SETTINGS["increlora"] | {"initial_rank": 3}
SETTINGS["flexlora"] = SETTINGS["elalora"] | {"added_std": 0.02, "initial_rank": 3}
SETTINGS["l1ra"] = {"initial_rank": 3, "alpha": 5, "dropout": 0.1, "sparsity": 0.4, "interval": 2, "final_steps": 3}
# Of 12 steps the bases grow at 1 and 5; truncations at 4, 8 and 9.
SETTINGS["geolora"] = {"initial_rank": 3, "alpha": 5, "dropout": 0.1, "interval": 4, "final_steps": 3, "tolerance": 0.4}
# Halved at 3 and 6: one of four sites is left, at rank 8.
SETTINGS["weightlora"] = {"rank": 2, "alpha": 5, "dropout": 0.1, "growth": "smart", "interval": 3}
# Pruned at 4, 8 and 9.
SETTINGS["bayeslora"] = {"initial_rank": 4, "alpha": 5, "dropout": 0.1, "interval": 4, "final_steps": 3, "kl_weight": 1e-4}
SETTINGS["adalora+dora"] = SETTINGS["adalora"]
SETTINGS["allocated"] = SETTINGS["adalora"] | {"score": "norm-share", "form": "doublet", "cost": "parameters"}
SETTINGS["dynamic-dora"] = {k: v for k, v in SETTINGS["adalora"].items() if k != "orthogonality"}
SETTINGS["truncated"] = {"initial_rank": 4, "target_rank": 2, "alpha": 5, "dropout": 0.1}
# Of 10 steps of an epoch 4 are measured; sites may end without a rank.
SETTINGS["eva"] = SETTINGS["gora"] = SETTINGS["fim-lora"] = SETTINGS["lora"] | {"calibration_batches": 4}
SETTINGS["spectral-rank"] = SETTINGS["eva"]
SETTINGS["stable-rank"] = SETTINGS["random-rank"] = SETTINGS["lora"]
SETTINGS["heavy-tail"] = SETTINGS["lora"] | {"more_to": "heavy"}
SETTINGS["houlsby"] = SETTINGS["pfeiffer"] = {"bottleneck": 4}
SETTINGS["prompt-tuning"] = SETTINGS["prefix-tuning"] = {"tokens": 3}
RATES = {"full": 3e-3, "partial": 3e-3, "gradual": 3e-3, "head": 1e-2, "bitfit": 1e-2}  # any other 1e-2


def settings(method: str) -> dict[str, Any]:
    return SETTINGS.get(method, {})


def model(folder: Path, name: str = "bert", dropout: float = 0.1) -> str:
    """The id (a folder) of a tiny model without a head, and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = models.tiny(name, dropout=dropout)
    getattr(whole, whole.base_model_prefix).save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def task(kind: str = "regression", name: str = "") -> Task:
    """A task over random letters that can be learnt: how many of the first letters of the alphabet there are."""
    metric, measure, resampled, num_labels = KINDS[kind]
    return Task(
        name=name or f"small/{kind}",
        kind=kind,
        num_labels=num_labels,
        metric=metric,
        licence="made up",
        read=lambda split: _examples(kind, split),
        measure=measure,
        resampled=resampled,
        identity=lambda: f"{kind} 1",
        caption=("Made-up data.",),
    )


def _token_accuracy(predicted: np.ndarray, true: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    return {"accuracy": 100 * float((predicted == true).mean())}


def _resampled_token_accuracy(predicted: np.ndarray, true: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    right, all_ = (np.bincount(rows, w, minlength=weights.shape[1]) for w in (predicted == true, None))
    return 100 * (weights @ right) / (weights @ all_)


KINDS = {  # kind -> metric, measure, its resampled form, labels
    "regression": ("pearson_spearman", metrics.correlations, metrics.resampled_correlations, 1),
    "classification": ("accuracy", metrics.accuracy_and_macro_f1, None, 3),
    "multi-label": ("micro_f1", metrics.f1_of_labels, metrics.resampled_micro_f1, 3),
    "token-classification": ("accuracy", _token_accuracy, _resampled_token_accuracy, 3),
    "span": ("f1", metrics.exact_match_and_f1, metrics.resampled_answer_f1, 2),
}


def _examples(kind: str, split: str) -> Examples:
    random = np.random.default_rng(list(ROWS).index(split))
    texts = [random.choice(list(LETTERS), size=random.integers(3, 17)).tolist() for _ in range(ROWS[split])]
    early = [np.array([LETTERS.index(letter) < 13 for letter in text]) for text in texts]
    share = np.array([e.mean() for e in early])
    if kind == "token-classification":
        return Examples(texts, None, [e.astype(np.int64) + (i % 2) for i, e in enumerate(early)])
    if kind == "span":  # the last letter, twice as many of which need two windows or more
        contexts = [" ".join(text * 2) for text in texts]
        starts = [np.array([len(context) - 1]) for context in contexts]
        answers = [(text[-1],) for text in texts]
        return Examples([text[0] for text in texts], contexts, starts, answers, [str(i) for i in range(len(texts))])
    if kind == "multi-label":  # is there any of a to d, of e to h, of i to l?
        named = [[any(letter in some for letter in text) for some in ("abcd", "efgh", "ijkl")] for text in texts]
        return Examples([" ".join(text) for text in texts], None, np.array(named, dtype=np.int64))
    labels = share.astype(np.float32) if kind == "regression" else np.digitize(share, [0.4, 0.6]).astype(np.int64)
    return Examples([" ".join(text) for text in texts], None, labels)


def encoded(one: Task, max_length: int = 24) -> dict[str, Encoded]:
    tokenizer = models.tiny_tokenizer()
    return {split: kinds.get(one.kind).encode(_examples(one.kind, split), tokenizer, max_length) for split in ROWS}


def training(**changes: Any) -> Training:
    """12 steps in 2 epochs of 10: evaluated after 5, 10 and 12."""
    values = {"epochs": 2, "max_steps": 12, "batch_size": 6, "warmup_ratio": 0.2, "max_length": 24, "precision": "fp32"}
    values |= {"evaluation_batch_size": 7, "evaluations_per_epoch": 2, "log_every": 2, "max_skipped_steps": 3}
    return Training(**values | changes)


def pack(
    model_id: str,
    method: str = "lora",
    *,
    seeds: Sequence[int] = (0,),
    learning_rates: Sequence[float] | None = None,
    kind: str = "regression",
    changes: dict[str, Any] | None = None,
    precision: str = "fp32",
    targets: Sequence[str] = ("query", "intermediate.dense"),  # of a BERT four sites of two shapes: enough, and quick
    **training_changes: Any,
) -> Pack:
    return Pack(
        method=method,
        settings=check(method, settings(method) | (changes or {})),
        targets=list(targets),
        task=task(kind),
        model=model_id,
        training=training(**training_changes),
        seeds=tuple(seeds),
        learning_rates=tuple(learning_rates or [RATES.get(method, 1e-2)] * len(seeds)),
        splits=("validation", "test"),
        device=torch.device("cpu"),
        precision=precision,
    )


def trainer(one: Pack, folder: Path, data: dict[str, Encoded] | None = None, **options: Any) -> Trainer:
    """A trainer that keeps its checkpoint and its members' logs under `folder`."""
    logs = [folder / f"member-{k}" for k in range(one.members)]
    for log in logs:
        log.mkdir(parents=True, exist_ok=True)
    data = encoded(one.task) if data is None else data
    return Trainer(one, data, folder / "checkpoint.safetensors", logs, **options)


def trained(one: Pack, folder: Path, **options: Any) -> tuple[Trainer, list[Outcome]]:
    made = trainer(one, folder, **options)
    return made, made.run()


def study(model_id: str, methods: Sequence[str] | Sequence[dict[str, Any]] = ("lora",), **changes: Any) -> Study:
    """A study of the small world; methods by name, or as a study file's [[methods]]."""
    entries = [
        {"method": m, "learning_rate": RATES.get(m, 1e-2), **settings(m)} if isinstance(m, str) else dict(m) for m in methods
    ]
    raw = {"name": "small", "model": model_id, "tasks": ["small/regression"], "seeds": 2, "checkpoint_seconds": 1e-6}
    if isinstance(changes.get("sweep"), dict):  # most tests are about sweeps
        changes = {**changes, "sweep": {"design": "chosen-rate", **changes["sweep"]}}
    raw |= {"training": training().model_dump(), "methods": entries, **changes}
    return config.parse(raw, default_name="small")


def register(set_item: Callable[[dict, str, Task], None] = dict.__setitem__) -> None:
    """Makes the small tasks known by name; with pytest pass monkeypatch.setitem."""
    for kind in KINDS:
        one = task(kind)
        set_item(tasks._TASKS, one.name, one)


def assert_same_runs(one: Path, other: Path, number: int) -> None:
    """That two folders hold the same completed runs: fingerprints, ranks, and predictions to rounding in fp32.

    Predictions, not scores: a rank correlation of a few rows moves by a tenth of a point where rounding parts two that tie.
    """
    mine, theirs = (
        {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/result.json")} for out in (one, other)
    )
    assert mine.keys() == theirs.keys() and len(mine) == number
    for name, result in mine.items():
        assert result["status"] == theirs[name]["status"] == "completed" and result["ranks"] == theirs[name]["ranks"]
        found, expected = (load_file(out / name / "predictions.safetensors")["predictions"] for out in (one, other))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def in_float64(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Every model that a Trainer loads from here on is in float64; pass the setattr of a pytest.MonkeyPatch."""
    load = models.load

    def load_double(*args: Any, **options: Any) -> Any:
        made, processor, info = load(*args, **options)
        return made.double(), processor, info

    set_attribute(models, "load", load_double)


def run(what: Study, out: Path, cache: str, kill_at: int | None = None, after: bool = False) -> None:
    """Runs a study; with `kill_at` the process ends by SIGKILL right before (or after) that file takes its name."""
    os.environ["RANKWISE_CACHE"] = cache
    torch.set_num_threads(1)
    register()
    if kill_at is not None:
        replace, count = os.replace, 0

        def counting(*args: Any, **options: Any) -> None:
            nonlocal count
            count += 1
            if count == kill_at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args, **options)
            if count == kill_at and after:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = counting
    runner = Runner(what, out, device="cpu")
    runner.prepare()
    runner.run()


ALL_METHODS = tuple(METHODS)
