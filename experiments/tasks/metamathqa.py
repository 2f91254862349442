"""MetaMathQA and GSM8K: trained on the one (Yu et al. 2023), asked with the other (Cobbe et al. 2021), read from the hub.

As PEFT's method comparison has it: questions and answers of more than 1,300 characters together are left out of training, 50 of
GSM8K's training questions are chosen on, and its 1,319 test questions are scored by the number that is answered.
"""

import hashlib

import numpy as np
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data.reading import hub_columns
from rankwise.experiments.tasks import text_metrics
from rankwise.experiments.tasks.task import Task

MATH, SCHOOL = "meta-math/MetaMathQA", "openai/gsm8k"
MOST_CHARACTERS = 1300  # of "question answer"
NUM_VALIDATION = 50
ASKED = "Question: {} Think step by step.\nAnswer:"


def _texts(hub: str, config: str | None, split: str, wanted: tuple[str, str]) -> tuple[list[str], list[str]]:
    columns = hub_columns("metamathqa", hub, config, split, ["pinned package: none holds it"])
    if lacking := [name for name in wanted if name not in columns]:
        raise ValueError(f"metamathqa: no column {lacking[0]} in {hub}; expected {', '.join(wanted)}")
    for name in wanted:
        bad = next((row for row, text in enumerate(columns[name]) if not isinstance(text, str) or not text.strip()), None)
        if bad is not None:
            raise ValueError(f"metamathqa: {hub}, {split}, row {bad + 1}: {name} is empty or no text")
    return columns[wanted[0]], columns[wanted[1]]


def read(split: str) -> Examples:
    """
    Raises:
        Unavailable: the hub did not give it.
        ValueError: it has another form.
    """
    if split == "train":
        questions, answers = _texts(MATH, None, "train", ("query", "response"))
        kept = [i for i, pair in enumerate(zip(questions, answers, strict=True)) if len(" ".join(pair)) <= MOST_CHARACTERS]
    else:
        questions, answers = _texts(SCHOOL, "main", "test" if split == "test" else "train", ("question", "answer"))
        kept = list(range(len(questions)))
        if split == "validation":  # the comparison's own draw
            order = np.arange(len(questions))
            np.random.RandomState(0).shuffle(order)
            kept = order[:NUM_VALIDATION].tolist()
    return Examples([ASKED.format(questions[i]) for i in kept], None, [answers[i] for i in kept])


def identity() -> str:
    """sha256 over the three parts."""
    return hashlib.sha256("".join(read(split).content_hash() for split in ("train", "validation", "test")).encode()).hexdigest()


TASKS = (
    Task(
        name="metamathqa",
        kind="generation",
        num_labels=0,
        metric="numeric_answer",
        licence="MIT (both)",
        about={"train": 370_510, "validation": NUM_VALIDATION, "test": 1_319},  # 93.8 % of 395,000 are short enough
        read=read,
        measure=text_metrics.of_texts(("numeric_answer",)),
        resampled=text_metrics.resampled("numeric_answer"),
        identity=identity,
        caption=(
            "Trained on MetaMathQA, scored on GSM8K's test questions: right is a greedy answer whose last number is that of "
            "GSM8K's.",
        ),
    ),
)
