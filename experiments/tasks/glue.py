"""GLUE: nine tasks about English sentences (Wang et al. 2019), STS-B among them in its original release.

STS-B has test labels there, so it is chosen on the official development part and scored on the test part. The other
tasks come from the hub, which hides their test labels: a part of the training data is kept out to choose on, and the
official development part is scored.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rankwise.experiments import sources
from rankwise.experiments.data.draws import carve
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data.reading import check_pinned, hub_columns, lines_of, malformed
from rankwise.experiments.tasks.metrics import (
    accuracy_and_f1,
    accuracy_and_macro_f1,
    correlations,
    matthews,
    resampled_correlations,
    resampled_matthews,
)
from rankwise.experiments.tasks.task import Task

HUB = "nyu-mll/glue"
STSB = sources.CATALOGUE["glue/stsb"]
STSB_FILES = {"train": "sts-train.csv", "validation": "sts-dev.csv", "test": "sts-test.csv"}
STSB_CONTENT = {  # Examples.content_hash() of the pinned files
    "train": "9aa4701e6eb280242ae3af35aa3f9ac2f42ca5be42643e2132b9e369166be3d5",
    "validation": "dbd270810ca0de496a726d1af370fbb9ce944416ccf32328be40cae3ca9242ec",
    "test": "778974df6f987abb6ca1de8ea4c48a9010490728ec56df876d24a0c15168998c",
}
MAX_VALIDATION = 5000
OFFICIAL_TRAIN = "official-train"  # all of the official training part: "train" and "validation" in their first order

# name: first text, second text, labels, rows of the official training and development parts
COLUMNS: dict[str, tuple[str, str | None, tuple[str, ...], int, int]] = {
    "cola": ("sentence", None, ("unacceptable", "acceptable"), 8551, 1043),
    "sst2": ("sentence", None, ("negative", "positive"), 67349, 872),
    "mrpc": ("sentence1", "sentence2", ("not_equivalent", "equivalent"), 3668, 408),
    "qqp": ("question1", "question2", ("not_duplicate", "duplicate"), 363846, 40430),
    "mnli": ("premise", "hypothesis", ("entailment", "neutral", "contradiction"), 392702, 9815),
    "qnli": ("question", "sentence", ("entailment", "not_entailment"), 104743, 5463),
    "rte": ("sentence1", "sentence2", ("entailment", "not_entailment"), 2490, 277),
    "wnli": ("sentence1", "sentence2", ("not_entailment", "entailment"), 635, 71),
}


def parse_stsb(path: Path) -> Examples:
    """Tab separated, without quoting: column 4 (from 0) is the score, 5 and 6 the sentences; two more may follow.

    Labels are score / 5. Raises: ValueError: a line of another form, a score outside 0..5; names file and line.
    """
    first, second, labels = [], [], []
    for number, line in enumerate(lines_of(path), start=1):
        columns = line.split("\t")
        if not 7 <= len(columns) <= 9:
            raise malformed(path, number, f"expected 7 to 9 columns, found {len(columns)}")
        try:
            score = float(columns[4])
        except ValueError:
            raise malformed(path, number, "the score in column 5 is no number") from None
        if not 0 <= score <= 5:  # NaN fails this too
            raise malformed(path, number, "the score in column 5 is outside 0 to 5")
        one, other = columns[5].strip(), columns[6].strip()
        if not one or not other:
            raise malformed(path, number, "a sentence is empty")
        first.append(one)
        second.append(other)
        labels.append(score / 5)
    return Examples(first, second, np.array(labels, dtype=np.float32))


def read_stsb(split: str) -> Examples:
    try:
        folder = sources.fetch("glue/stsb")
    except sources.Unavailable as missing:
        return stsb_from_hub(split, missing.tried)
    return parse_stsb(folder / STSB_FILES[split])


def stsb_from_hub(split: str, tried: list[str]) -> Examples:
    hub = STSB.hub  # not GLUE's own copy, which hides the test labels
    columns = hub_columns("glue/stsb", hub, None, split, tried)
    first, second = ([text.strip() for text in columns[one]] for one in ("sentence1", "sentence2"))
    examples = Examples(first, second, np.array(columns["score"], dtype=np.float32))
    return check_pinned("glue/stsb", examples, STSB_CONTENT[split], hub, tried)


def validation_size(num_rows: int) -> int:
    """10 % of the training rows, at most 5,000."""
    return min(math.ceil(num_rows / 10), MAX_VALIDATION)


@functools.lru_cache(maxsize=4)
def official(name: str, split: str) -> Examples:
    """One official split of a GLUE task, from the hub."""
    column, partner, labels, *_ = COLUMNS[name]
    tried = [f"pinned package: none holds {name}"]
    columns = hub_columns(f"glue/{name}", HUB, name, split, tried)
    wanted = [column, "label"] + ([partner] if partner else [])
    lacking = [one for one in wanted if one not in columns]
    if lacking:
        raise ValueError(f"glue/{name}, {split}: no column {lacking[0]} in the hub's copy; expected {', '.join(wanted)}")
    values = np.array(columns["label"])
    if len(values) and (values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= len(labels)):
        wrong = next(i for i, v in enumerate(columns["label"]) if not isinstance(v, int) or not 0 <= v < len(labels))
        raise ValueError(f"glue/{name}, {split}, row {wrong + 1}: the label is outside 0 to {len(labels) - 1}")
    for one in wanted[:1] + wanted[2:]:
        wrong = [i for i, text in enumerate(columns[one]) if not isinstance(text, str)]
        if wrong:
            raise ValueError(f"glue/{name}, {split}, row {wrong[0] + 1}: {one} is no text")
    return Examples(columns[column], columns[partner] if partner else None, values.astype(np.int64))


def read(name: str, split: str) -> Examples:
    if split == "dev":
        return official(name, "validation_matched" if name == "mnli" else "validation")
    if split == "dev-mismatched":
        return official(name, "validation_mismatched")
    examples = official(name, "train")
    if split == OFFICIAL_TRAIN:
        return examples
    kept = carve(examples.labels, validation_size(len(examples))) == (split == "validation")
    return examples.select(np.flatnonzero(kept))


@functools.lru_cache(maxsize=8)
def hub_identity(name: str) -> str:
    """sha256 over the official parts, in which every split of ours has its rows."""
    dev = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
    parts = [official(name, split).content_hash() for split in ["train", *dev]]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _measure(name: str) -> tuple[str, Callable[..., dict[str, float]]]:
    if name == "cola":
        return "matthews", matthews
    return "accuracy", accuracy_and_f1 if name in ("mrpc", "qqp") else accuracy_and_macro_f1


def _task(name: str) -> Task:
    _, _, labels, num_train, num_dev = COLUMNS[name]
    size = validation_size(num_train)
    metric, measure = _measure(name)
    sizes = {"train": num_train - size, "validation": size, "dev": num_dev, OFFICIAL_TRAIN: num_train}
    if name == "mnli":
        sizes["dev-mismatched"] = 9832
    return Task(
        name=f"glue/{name}",
        kind="classification",
        num_labels=len(labels),
        label_names=labels,
        metric=metric,
        licence="the terms of its sources, as listed by GLUE (Wang et al. 2019)",
        splits=tuple(sizes),
        official_train_split=OFFICIAL_TRAIN,
        score_split="dev",
        dev_split="dev",
        extra_dev_splits=("dev-mismatched",) if name == "mnli" else (),
        sizes=sizes,
        read=functools.partial(read, name),
        measure=measure,
        resampled=resampled_matthews if metric == "matthews" else None,
        identity=functools.partial(hub_identity, name),
        caption=(
            f"The test labels of {name.upper()} are hidden: {size} of the {num_train} training examples (each class by "
            "its share, drawn once with a fixed seed) are kept out of training to choose on, and the official "
            f"development part{' (matched)' if name == 'mnli' else ''} is scored.",
        ),
    )


TASKS = (
    Task(
        name="glue/stsb",
        kind="regression",
        num_labels=1,
        metric="pearson_spearman",
        licence=STSB.licence,
        data="glue/stsb",
        sizes={"train": 5749, "validation": 1500, "test": 1379},
        read=read_stsb,
        measure=correlations,
        resampled=resampled_correlations,
        identity=lambda: sources.content_hash("glue/stsb"),
        captions_by_model={
            "sentence-transformers/all-MiniLM-L6-v2": (
                "MiniLM was tuned for sentence similarity already (zero-shot cosine Spearman 0.820 on the STS-B test "
                "split; tests/test_models.py measures it), so there is little to gain.",
            )
        },
    ),
    *(_task(name) for name in COLUMNS),
)
