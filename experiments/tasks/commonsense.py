"""Eight tests of common sense, trained on their 170,420 training rows together (LLM-Adapters, Hu et al. 2023).

What DoRA's Tables 1 and 15 are about: a question with its options as an instruction, answered with "the correct answer is
answer2"; right is a text whose first word of that form is the right one.  The files are those of LLM-Adapters' repository.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence

import numpy as np
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.sources.cache import digest
from rankwise.experiments.sources.github import Repository
from rankwise.experiments.tasks.metrics import ratio
from rankwise.experiments.tasks.task import Task

TRAIN = "ft-training_set/commonsense_170k.json"
TESTS = {  # name in the papers' tables -> folder in the repository, and rows
    "boolq": ("boolq", 3_270),
    "piqa": ("piqa", 1_838),
    "siqa": ("social_i_qa", 1_954),
    "hellaswag": ("hellaswag", 10_042),
    "winogrande": ("winogrande", 1_267),
    "arc_e": ("ARC-Easy", 2_376),
    "arc_c": ("ARC-Challenge", 1_172),
    "obqa": ("openbookqa", 500),
}
REPOSITORY = Repository(
    name="AGI-Edgerunners/LLM-Adapters",
    commit="816657208af4db747803f87ba40a4c71383fed7a",
    licence="Apache-2.0; each of the eight sets has terms of its own",
    files={
        TRAIN: "529e426b33d4cdb1d0c4a275a1a7245ad081fd91",
        "dataset/boolq/test.json": "6d7edb0a8e8a6566b546ccf0d98d24e48db3fdf3",
        "dataset/piqa/test.json": "f7a1c260692ef31796d4763cb6334f316a754fed",
        "dataset/social_i_qa/test.json": "eadf221799ca394367b144c0f86ee0436db409d2",
        "dataset/hellaswag/test.json": "183c4920415f83ba4b793c4873a33e7e10bd1be5",
        "dataset/winogrande/test.json": "21257263593dd4d00546e1918c88ca0f357b08ad",
        "dataset/ARC-Easy/test.json": "6c0d30aaedaeca148df6bcd7aaacf7c31e6ad70f",
        "dataset/ARC-Challenge/test.json": "9540685439144200b5a7e48dab9ca4655be2af09",
        "dataset/openbookqa/test.json": "a6e69676104bcb77237388c3b5a3f0dcbb81d1e2",
    },
)
NUM_ROWS = 170_420  # of training, those that are validated on among them
NUM_VALIDATION = 120
VALIDATION_SEED = 42
TOGETHER = "of all eight"  # what the validation part is, whose rows do not say of which set they are
ASKED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
FORMS = (
    "true|false",  # BoolQ
    "solution[12]",  # PIQA
    "ending[1-4]",  # HellaSwag
    "option[12]",  # WinoGrande
    "answer[1-5]",  # the others
)
ANSWER = re.compile("|".join(FORMS))

# ------------------------------------------------------------------------------------------------------------------------- rows


def parse(path: str, test: str | None) -> Examples:
    """The rows of one file: a JSON list of {"instruction", "input", "output"}.

    test: what its right answers are marked with, for scores of each test; None for a part that is only trained on.
    Raises: Unavailable: the file cannot be had. ValueError: a row of another form; names file and row.
    """
    rows = json.loads(REPOSITORY.file(path).read_text(encoding="utf-8"))
    prompts, answers = [], []
    for number, row in enumerate(rows, start=1):
        question, further, answer = (row.get(name) for name in ("instruction", "input", "output"))
        if not all(isinstance(one, str) and one.strip() for one in (question, answer)):
            raise ValueError(f"commonsense: {path}, row {number}: its instruction or its output is empty or no text")
        if test is not None and ANSWER.search(answer) is None:
            raise ValueError(f"commonsense: {path}, row {number}: its output names none of the answers that it could")
        prompts.append(ASKED.format(f"{question}\n\n{further}" if further else question))
        answers.append(answer)
    return Examples(prompts, None, answers, None if test is None else [(answer, test) for answer in answers])


@functools.lru_cache(maxsize=3)
def read(split: str) -> Examples:
    """
    Raises:
        Unavailable: LLM-Adapters' files cannot be had.
        ValueError: they have another form.
    """
    if split == "test":
        parts = [parse(f"dataset/{folder}/test.json", test) for test, (folder, _) in TESTS.items()]
        first, labels, answers = (
            [one for part in parts for one in getattr(part, name)] for name in ("first", "labels", "answers")
        )
        return Examples(first, None, labels, answers)
    rows = parse(TRAIN, None if split == "train" else TOGETHER)
    order = np.random.default_rng(VALIDATION_SEED).permutation(len(rows))  # as datasets' train_test_split draws it
    return rows.select(order[NUM_VALIDATION:] if split == "train" else order[:NUM_VALIDATION])


def identity() -> str:
    """sha256 over git's names of the nine files; nothing is downloaded for it."""
    return digest(dict(REPOSITORY.files))


# ----------------------------------------------------------------------------------------------------------------------- scores


def right(texts: Sequence[str], references: Sequence[tuple[str, ...]]) -> np.ndarray:
    """(n,) 0 or 1: the first answer that a text names, of the form that the right one has, is the right one."""
    found = []
    for text, (answer, *_) in zip(texts, references, strict=True):
        wanted = ANSWER.search(answer)[0]
        form = next(one for one in FORMS if re.fullmatch(one, wanted))
        first = re.search(form, text)
        found.append(first is not None and first[0] == wanted)
    return np.array(found, dtype=float)


def _of_each(references: Sequence[tuple[str, ...]]) -> Mapping[str, np.ndarray]:
    """Test -> (n,) which rows are of it, in the order of the papers' tables."""
    tests = np.array([test for _, test in references])
    return {name: rows for name in (*TESTS, TOGETHER) if (rows := tests == name).any()}


def measure(texts: Sequence[str], references: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """Accuracy on each test, and "average": the mean over the tests, which count alike whatever their size."""
    hits = right(texts, references)
    of_tests = {name: 100 * float(hits[rows].mean()) for name, rows in _of_each(references).items()}
    average = {"average": float(np.mean(list(of_tests.values())))}
    return {**average, **{name: value for name, value in of_tests.items() if name != TOGETHER}}


def resampled(texts: Sequence[str], references: Sequence[tuple[str, ...]], weights: np.ndarray) -> np.ndarray:
    """(B,) the average on each resample of the rows; a test of which it has none counts as 0."""
    hits = right(texts, references)
    of_tests = [ratio(weights[:, rows] @ hits[rows], weights[:, rows].sum(1)) for rows in _of_each(references).values()]
    return 100 * np.mean(of_tests, axis=0)


TASKS = (
    Task(
        name="commonsense",
        kind="generation",
        num_labels=0,
        metric="average",
        licence=REPOSITORY.licence,
        about={
            "train": NUM_ROWS - NUM_VALIDATION,
            "validation": NUM_VALIDATION,
            "test": sum(rows for _, rows in TESTS.values()),
        },
        read=read,
        measure=measure,
        resampled=resampled,
        identity=identity,
        caption=(
            "Eight tests of common sense, trained on together: right is a greedy text whose first word of an answer is the "
            "right one. A text without one counts as wrong, so that a score below chance says that answers were not readable.",
        ),
    ),
)
