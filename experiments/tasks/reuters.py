"""Reuters R8: which of eight topics a newswire story is about (the R8 split of Cardoso-Cachopo 2007)."""

from pathlib import Path

import numpy as np
from rankwise.experiments import sources
from rankwise.experiments.data.draws import carve
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data.reading import lines_of, malformed
from rankwise.experiments.tasks.metrics import accuracy_and_macro_f1
from rankwise.experiments.tasks.task import Task

TOPICS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
OFFICIAL = {"train": 5485, "test": 2189}
VALIDATION = 549  # 10 % of the official training part


def parse(path: Path) -> Examples:
    """Three header lines, then topic, tab, text; empty lines are passed over.

    Raises: ValueError: another header, a line of another form, an unknown topic; names file and line.
    """
    lines = lines_of(path)
    if lines[0].split("\t") != ["Category", "Text"] or len(lines) < 3:
        raise malformed(path, 1, "expected three header lines, the first of them: Category, tab, Text")
    texts, labels = [], []
    for number, line in enumerate(lines[3:], start=4):
        if not line.strip():
            continue
        columns = line.split("\t")
        if len(columns) != 2:
            raise malformed(path, number, f"expected 2 columns (topic, text), found {len(columns)}")
        if columns[0] not in TOPICS:
            raise malformed(path, number, f"the topic is none of {', '.join(TOPICS)}")
        if not columns[1].strip():
            raise malformed(path, number, "the text is empty")
        labels.append(TOPICS.index(columns[0]))
        texts.append(columns[1].strip())
    if not texts:
        raise ValueError(f"{path.name}: no example in it; at least one is needed")
    return Examples(texts, None, np.array(labels, dtype=np.int64))


def read(split: str) -> Examples:
    folder = sources.fetch("reuters-r8")
    if split == "test":
        return parse(folder / "reuters-r8-test.tab")
    examples = parse(folder / "reuters-r8-train.tab")
    kept = carve(examples.labels, VALIDATION) == (split == "validation")
    return examples.select(np.flatnonzero(kept))


ENTRY = sources.CATALOGUE["reuters-r8"]
TASKS = (
    Task(
        name="reuters-r8",
        kind="classification",
        num_labels=len(TOPICS),
        label_names=TOPICS,
        metric="accuracy",
        licence=ENTRY.licence,
        data="reuters-r8",
        sizes={"train": OFFICIAL["train"] - VALIDATION, "validation": VALIDATION, "test": OFFICIAL["test"]},
        read=read,
        measure=accuracy_and_macro_f1,
        identity=lambda: sources.content_hash("reuters-r8"),
        caption=(
            f"Reuters R8 has no official validation part: {VALIDATION} of the {OFFICIAL['train']} training stories "
            "(10 % of each topic, drawn once with a fixed seed) are kept out of training to choose on.",
        ),
    ),
)
