"""Many tiny runs in one process: what it holds after each, which must not grow with their number.

rankwise bench --soak 2000 --json reports/bench/soak/soak.json --out reports/bench/soak

A run is all that `compare` does: the model loaded, the data encoded, a pack trained, evaluated and saved, its files written.
The methods take turns, so that every machinery has its share; the folder of each run goes with it.  What the process holds is
counted POINTS times over all runs, each time after a full collection.  A training step collects too, for its peak of memory,
which takes as long as a run over the 500,000 objects of the libraries: once each method has run these are set aside
(`gc.freeze`), and still counted.
"""

import contextlib
import gc
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from rankwise.experiments import config, models
from rankwise.experiments.study import Runner

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "adalora": {"initial_rank": 3, "target_rank": 2, "warmup_steps": 1, "final_steps": 1},
    "increlora": {"target_rank": 2, "warmup_steps": 1, "final_steps": 1},
    "full": {},
}
POINTS = 200
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TRAINING = {"epochs": 1, "max_steps": 3, "batch_size": 4, "max_length": 16, "precision": "fp32", "log_every": 1}


def run(number: int, progress: Callable[[str, float], None] = lambda what, done: None) -> Iterator[dict[str, Any]]:
    """A row after each run, or of many after every tenth or so and the last: bytes of resident memory, open files, threads, and
    objects that the collector knows."""
    every = max(1, number // POINTS)
    with contextlib.ExitStack() as stack:
        stack.callback(gc.unfreeze)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rankwise-soak-")))
        stack.enter_context(mock.patch.dict(os.environ, RANKWISE_CACHE=str(folder / "cache")))
        _world(folder)
        for index in range(number):
            method = list(METHODS)[index % len(METHODS)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                runner = Runner(_study(folder, method, seed=index), folder / "runs", device="cpu")
                runner.prepare()
                (result,) = runner.run()
            if result["status"] != "completed":
                raise RuntimeError(f"run {index + 1} of {method} failed: {result['error']}")
            del runner, result
            shutil.rmtree(folder / "runs")
            if index + 1 == len(METHODS):
                gc.collect()
                gc.freeze()
            progress(f"{method}, run {index + 1}", 1)
            if (index + 1) % every == 0 or index + 1 == number:
                yield {"run": index + 1, "method": method, **held()}


def held() -> dict[str, int]:
    """What this process holds now, on Linux."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "objects": len(gc.get_objects()) + gc.get_freeze_count(),
    }


def _world(folder: Path) -> None:
    """A model made from nothing and rows to classify."""
    whole = models.tiny("bert", num_labels=2)
    whole.base_model.save_pretrained(folder / "model")
    models.tiny_tokenizer().save_pretrained(folder / "model")
    texts = [" ".join(LETTERS[i * step % 26] for step in (1, 7, 3)) for i in range(60)]
    rows = [f"{text},{'early' if i % 26 < 13 else 'late'}" for i, text in enumerate(texts)]
    (folder / "letters.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")


def _study(folder: Path, method: str, seed: int) -> config.Study:
    entry = {"method": method, "learning_rate": 1e-3, **METHODS[method]}
    data = {"name": "letters", "train": str(folder / "letters.csv"), "kind": "classification"}
    raw = {"name": "soak", "model": str(folder / "model"), "quick": True, "seeds": [seed], "training": TRAINING}
    return config.parse(raw | {"data": [data], "methods": [entry]}, "soak")
