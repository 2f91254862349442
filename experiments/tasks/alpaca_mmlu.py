"""Alpaca's instructions, asked with MMLU's questions after five examples each, as QLoRA's Table 4 is.

Trained on Stanford Alpaca (Taori et al. 2023, from the hub), scored on MMLU (Hendrycks et al. 2021): of the letters A to D the
likeliest is chosen.  The questions with their examples are the files of QLoRA's repository (Dettmers et al. 2023).  An
instruction is a question with one option, its answer, so that what is trained is the answer's tokens.
"""

import functools
import json

import numpy as np
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data.reading import hub_columns
from rankwise.experiments.sources.cache import digest
from rankwise.experiments.sources.github import Repository
from rankwise.experiments.tasks.task import Task
from rankwise.experiments.tasks.text_metrics import choice_accuracy

HUB = "tatsu-lab/alpaca"
COLUMNS = ("instruction", "input", "output")
LETTERS = ("A", "B", "C", "D")
QUESTIONS = {"validation": "data/mmlu/five_shot_mmlu_val.json", "test": "data/mmlu/five_shot_mmlu_test.json"}
REPOSITORY = Repository(
    name="artidoro/qlora",
    commit="7f4e95a68dc076bea9b3a413d2b512eca6d004e5",
    licence="MIT, as MMLU's",
    files={
        QUESTIONS["validation"]: "076f58d24e7b416f6aa6756e815cbbab8aa29b05",
        QUESTIONS["test"]: "b9d2aa54399b4cc92e291cf186c4d705b73f5881",
    },
)
BEGIN = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
ASKED = BEGIN.format("") + "### Instruction:\n{0}\n\n### Response: "
ASKED_WITH_INPUT = (
    BEGIN.format(", paired with an input that provides further context")
    + "### Instruction:\n{0}\n\n### Input:\n{1}\n\n### Response: "
)


def instructions() -> Examples:
    """Alpaca's rows; those without an answer are left out."""
    where = f"alpaca-mmlu: {HUB}, train"
    columns = hub_columns("alpaca-mmlu", HUB, None, "train", ["pinned package: none holds it"])
    if lacking := [name for name in COLUMNS if name not in columns]:
        raise ValueError(f"{where}: no column {lacking[0]}; expected {', '.join(COLUMNS)}")
    prompts, answers = [], []
    for number, row in enumerate(zip(*(columns[name] for name in COLUMNS), strict=True), start=1):
        if not all(isinstance(text, str) for text in row) or not row[0].strip():
            raise ValueError(f"{where}, row {number}: its instruction is empty, or something in it is no text")
        instruction, further, answer = row
        if answer.strip():
            prompts.append((ASKED_WITH_INPUT if further else ASKED).format(instruction, further))
            answers.append((answer,))
    return Examples(prompts, None, np.zeros(len(prompts), dtype=np.int64), answers)


def questions(split: str) -> Examples:
    """
    Raises:
        Unavailable: the file cannot be had.
        ValueError: a line of another form; names file and line.
    """
    path = QUESTIONS[split]
    prompts, right = [], []
    for number, line in enumerate(REPOSITORY.file(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        row = json.loads(line)
        if not (isinstance(row.get("input"), str) and row["input"].strip()) or row.get("output") not in LETTERS:
            raise ValueError(
                f"alpaca-mmlu: {path}, line {number}: its input is empty or no text, or its output none of A, B, C, D"
            )
        prompts.append(row["input"])
        right.append(LETTERS.index(row["output"]))
    return Examples(prompts, None, np.array(right, dtype=np.int64), [LETTERS] * len(prompts))


@functools.lru_cache(maxsize=3)
def read(split: str) -> Examples:
    """
    Raises:
        Unavailable: the hub or QLoRA's repository cannot be had.
        ValueError: they have another form.
    """
    return instructions() if split == "train" else questions(split)


def identity() -> str:
    """sha256 over Alpaca's rows and git's names of the questions' files."""
    return digest({"instructions": read("train").content_hash(), **REPOSITORY.files})


TASKS = (
    Task(
        name="alpaca-mmlu",
        kind="choice",
        num_labels=0,
        metric="accuracy",
        licence="CC BY-NC 4.0 (Alpaca), MIT (MMLU)",
        about={"train": 52_000, "validation": 1_531, "test": 14_042},
        read=read,
        measure=choice_accuracy,
        identity=identity,
        caption=(
            "Trained on Alpaca's instructions, of which those without an answer are left out, scored on MMLU with five "
            "examples: the share of all questions, where QLoRA's code takes the mean over their 57 subjects.",
        ),
    ),
)
