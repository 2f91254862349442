"""A user's file that is larger than memory: rows stay on disk, and are tokenised in pieces that give the same tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rankwise.experiments.data import encoded
from rankwise.experiments.data_entries import OwnData
from rankwise.experiments.tasks import own_tasks

from tests import language_models
from tests.test_own_study import jsonl
from tests.test_own_view import ROWS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))


def arrays(data) -> dict[str, np.ndarray | tuple | int]:
    data = getattr(data, "rows", data)  # of a choice
    return {name: value for name, value in vars(data).items() if name != "questions" and value is not None}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("is_apart", [False, True])
def test_pieces_and_files_give_the_tokens_that_one_piece_in_memory_gives(tmp_path, monkeypatch, kind, is_apart):
    if is_apart and kind != "generation":
        pytest.skip("only texts to generate have an encoder-decoder")
    ask = language_models.tokenizer()
    ask.is_encoder_decoder = is_apart
    rows = ROWS[kind]
    if kind == "generation":  # the longest target, which says how much may be generated, is in one piece alone
        rows = [{**row, "completion": "x y" + " z" * (number % 13)} for number, row in enumerate(rows)]
    task = own_tasks.task(OwnData(name="mine", train=str(jsonl(tmp_path / "a.jsonl", rows))))
    whole = {split: task.encode(ask, split, 16) for split in task.splits}
    cut = {split: task.cut(split, data, ask, 16) for split, data in whole.items()}
    monkeypatch.setattr(own_tasks, "PIECE", 7)
    monkeypatch.setattr(encoded, "IN_MEMORY", 64)
    monkeypatch.setattr(encoded, "BLOCK", 5)
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "another"))  # where nothing is kept yet
    for split, expected in whole.items():
        found = task.encode(ask, split, 16)
        assert type(found) is type(expected) and found.truth[0] is not None
        assert b"".join(found.content()) == b"".join(expected.content())
        assert task.cut(split, found, ask, 16) == cut[split]
        theirs = arrays(expected)
        for name, value in arrays(found).items():
            assert np.array_equal(value, theirs[name]) if isinstance(value, np.ndarray) else value == theirs[name]
        if split == "train" and kind not in ("span", "choice"):
            assert isinstance(found.ids, np.memmap)
            part = found.select_examples([3, 1])  # no view of the file
            assert b"".join(part.content()) == b"".join(expected.select_examples([3, 1]).content())


MEASURED = """
import re, sys, threading, time
from pathlib import Path
import datasets, torch, transformers
from rankwise.experiments.data import encoded
from rankwise.experiments.data_entries import OwnData
from rankwise.experiments.tasks import own_tasks
from tests import language_models

def held():  # bytes that no file stands behind
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

own_tasks.PIECE, encoded.IN_MEMORY = 200, 1 << 20
ask = language_models.tokenizer()
ask.is_encoder_decoder = False
peak, done = [0], []
def watch():
    while not done:
        peak[0] = max(peak[0], held())
        time.sleep(0.003)
thread = threading.Thread(target=watch)
for name in sys.argv[1:]:  # the first imports what is needed, and is not measured
    if name == sys.argv[-1]:
        before = held()
        thread.start()
    task = own_tasks.task(OwnData(name="mine", train=name))
    rows = sum(len(task.encode(ask, split, 64)) for split in task.splits)
done.append(1)
thread.join()
print(rows, peak[0] - before)
"""


@pytest.mark.slow
def test_the_memory_that_a_file_takes_does_not_follow_its_size(tmp_path):
    """49 megabytes and 127: what the process holds beyond its files, 0.1 GB of which `datasets` takes to read any file."""
    random = np.random.default_rng(0)
    words = [bytes(random.integers(97, 123, 120, dtype=np.uint8)).decode() for _ in range(400)]  # unknown ones: few tokens
    peaks, sizes = {}, {}
    for name, rows in (("first", 100), ("small", 10_000), ("large", 26_000)):
        path = tmp_path / f"{name}.jsonl"
        with path.open("w") as file:
            for number in range(rows):
                text = " ".join([str(number), *(words[(7 * number + at) % 400] for at in range(40))])
                file.write(json.dumps({"prompt": text, "completion": "x"}) + "\n")
        sizes[name] = path.stat().st_size
    environment = {"RANKWISE_CACHE": str(tmp_path / "cache"), "HF_DATASETS_CACHE": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    for name in ("small", "large"):
        made = subprocess.run(
            [sys.executable, "-c", MEASURED, *(str(tmp_path / f"{one}.jsonl") for one in ("first", name))],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, **environment},
        )
        assert made.returncode == 0, made.stderr[-2000:]
        peaks[name] = int(made.stdout.split()[-1])
    # Texts alone, as Python's own, would add as much as the file does; their tokens as Python's lists several times that.
    assert peaks["large"] - peaks["small"] < (sizes["large"] - sizes["small"]) / 2, peaks
