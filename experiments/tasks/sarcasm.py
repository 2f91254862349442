"""Sarcasm headlines: was a headline written by a satirical paper or by a news site? (Misra and Arora 2023)"""

import json
from pathlib import Path

import numpy as np
from rankwise.experiments import sources
from rankwise.experiments.data import draws
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data.reading import lines_of, malformed
from rankwise.experiments.tasks.metrics import accuracy_and_macro_f1
from rankwise.experiments.tasks.task import Task

DISTINCT = 28498


def parse(path: Path) -> Examples:
    """JSON lines: `input` is a list of messages whose last `content` is the headline, `ideal` is "0" or "1".

    A headline that comes again is dropped. Raises: ValueError: a line of another form; names file and line.
    """
    texts: dict[str, int] = {}
    for number, line in enumerate(lines_of(path), start=1):
        try:
            record = json.loads(line)
            text, label = record["input"][-1]["content"], record["ideal"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise malformed(path, number, "expected a JSON object with input[-1].content and ideal") from None
        if not isinstance(text, str) or not text.strip():
            raise malformed(path, number, "the headline is empty or no text")
        if label not in ("0", "1"):
            raise malformed(path, number, 'the label (ideal) is neither "0" nor "1"')
        texts.setdefault(text.strip(), int(label))
    return Examples(list(texts), None, np.array(list(texts.values()), dtype=np.int64))


def parts(num_rows: int) -> dict[str, np.ndarray]:
    """80 / 10 / 10 %, drawn once with a fixed seed: the rows of each split."""
    tenth = num_rows // 10
    order = draws.shuffled(num_rows, draws.SPLIT_SEED, draws.SARCASM_SPLIT)
    cut = {"test": order[:tenth], "validation": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    return {split: np.sort(rows) for split, rows in cut.items()}


def read(split: str) -> Examples:
    examples = parse(sources.fetch("sarcasm") / "samples.jsonl")
    return examples.select(parts(len(examples))[split])


ENTRY = sources.CATALOGUE["sarcasm"]
TASKS = (
    Task(
        name="sarcasm",
        kind="classification",
        num_labels=2,
        label_names=("sincere", "sarcastic"),
        metric="accuracy",
        licence=ENTRY.licence,
        data="sarcasm",
        sizes={"train": DISTINCT - 2 * (DISTINCT // 10), "validation": DISTINCT // 10, "test": DISTINCT // 10},
        read=read,
        measure=accuracy_and_macro_f1,
        identity=lambda: sources.content_hash("sarcasm"),
        caption=(
            f"The sarcasm headlines have no official split: the {DISTINCT} distinct ones are cut 80 / 10 / 10 %, "
            "once, with a fixed seed.",
        ),
    ),
)
