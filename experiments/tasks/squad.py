"""SQuAD: the answer to a question is a span of a Wikipedia paragraph (v1.1: Rajpurkar et al. 2016; v2.0, where the
paragraph may hold no answer: Rajpurkar et al. 2018).

Scored (metrics.py) by the formula of the official script evaluate-v2.0.py (evaluate-v1.1.py gives another value only where
a text is nothing but articles and punctuation). Texts lose capitals, punctuation and articles; then, the best of the right
answers counted, exact match is equality, and

    F1 = 2 |P & G| / (|P| + |G|)      P, G: the words of prediction and right answer, with repeats

A question without an answer is answered right by the empty text alone. In v2.0 the model gives the empty text where
having no answer scores above its best span (a threshold of 0, as run_qa.py has it). The threshold that would have been
the best on this very split is reported too, as best_*, and scores nothing.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
from rankwise.experiments.data import draws
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data.reading import hub_columns
from rankwise.experiments.tasks import metrics
from rankwise.experiments.tasks.task import Task

HUB = {"v1": "rajpurkar/squad", "v2": "rajpurkar/squad_v2"}
OFFICIAL = {"v1": {"train": 87599, "validation": 10570}, "v2": {"train": 130319, "validation": 11873}}
OFFICIAL_TRAIN = "official-train"
COLUMNS = ("id", "title", "context", "question", "answers")


@functools.lru_cache(maxsize=4)
def official(version: str, split: str) -> tuple[Examples, list[str]]:
    """One official part from the hub, and the article that each question is about."""
    name = f"squad/{version}"
    columns = hub_columns(name, HUB[version], None, split, [f"pinned package: none holds {name}"])
    examples = parse(f"{name}, {split}", columns, version)
    if len(examples) != OFFICIAL[version][split]:
        raise ValueError(f"{name}: {len(examples)} questions in {split}, expected {OFFICIAL[version][split]}")
    return examples, columns["title"]


def parse(where: str, columns: dict, version: str) -> Examples:
    """Questions, contexts, and the first characters and texts of the right answers.

    Raises: ValueError: a column that is missing, a row of another form; names the row, shows no text.
    """
    lacking = [column for column in COLUMNS if column not in columns]
    if lacking:
        raise ValueError(f"{where}: no column {lacking[0]} in the hub's copy; expected {', '.join(COLUMNS)}")
    starts, answers = [], []
    for number, row in enumerate(zip(*(columns[column] for column in COLUMNS), strict=True), start=1):
        *texts, answer = row
        for column, text in zip(COLUMNS, texts, strict=False):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where}, row {number}: {column} is empty or no text")
        try:
            first, given = list(answer["answer_start"]), list(answer["text"])
            well_formed = len(first) == len(given) and all(isinstance(text, str) for text in given)
            well_formed &= all(isinstance(place, int) and place >= 0 for place in first)
        except (KeyError, TypeError):
            well_formed = False
        if not well_formed:
            raise ValueError(f"{where}, row {number}: answers should be texts and as many places (answer_start)")
        if not given and version == "v1":
            raise ValueError(f"{where}, row {number}: a question without an answer, which v1.1 does not have")
        starts.append(np.array(first, dtype=np.int64))
        answers.append(tuple(given))
    return Examples(columns["question"], columns["context"], starts, answers, columns["id"])


def kept_out(titles: Sequence[str]) -> np.ndarray:
    """(n,) bool, True for the validation part: whole articles, drawn once with a fixed seed, until they hold 10 % of the
    questions."""
    articles, article, counts = np.unique(np.array(titles), return_inverse=True, return_counts=True)
    order = draws.shuffled(len(articles), draws.SPLIT_SEED, draws.SQUAD_ARTICLES)
    before = np.cumsum(counts[order]) - counts[order]
    return np.isin(article, order[before * 10 < len(titles)])


def read(version: str, split: str) -> Examples:
    if split == "dev":
        return official(version, "validation")[0]
    examples, titles = official(version, "train")
    if split == OFFICIAL_TRAIN:
        return examples
    return examples.select(np.flatnonzero(kept_out(titles) == (split == "validation")))


@functools.lru_cache(maxsize=2)
def hub_identity(version: str) -> str:
    """sha256 over the official parts and their articles, by which a part is kept out."""
    digest = hashlib.sha256()
    for split in ("train", "validation"):
        examples, titles = official(version, split)
        digest.update(examples.content_hash().encode() + "\n".join(titles).encode())
    return digest.hexdigest()


def _questions(version: str) -> dict[str, int]:
    """Of each split; its rows are windows of the texts, a few more."""
    train, dev = OFFICIAL[version]["train"], OFFICIAL[version]["validation"]
    return {"train": train - train // 10, "validation": train // 10, "dev": dev, OFFICIAL_TRAIN: train}


def _task(version: str) -> Task:
    empty = version == "v2"
    caption = (
        "SQuAD's test part is hidden: whole articles with 10 % of the training questions, drawn once with a fixed seed, are "
        "kept out of training to choose on, and the official development part is scored."
    )
    threshold = "SQuAD v2.0: a question is left unanswered where having no answer scores above the best span (threshold 0)."
    return Task(
        name=f"squad/{version}",
        kind="span",
        num_labels=2,
        label_names=("start", "end"),
        metric="f1",
        licence="CC BY-SA 4.0",
        splits=("train", "validation", "dev", OFFICIAL_TRAIN),
        official_train_split=OFFICIAL_TRAIN,
        score_split="dev",
        dev_split="dev",
        read=functools.partial(read, version),
        measure=metrics.exact_match_and_f1_with_empty if empty else metrics.exact_match_and_f1,
        resampled=metrics.resampled_answer_f1_with_empty if empty else metrics.resampled_answer_f1,
        identity=functools.partial(hub_identity, version),
        about=_questions(version),
        caption=(caption, threshold) if empty else (caption,),
    )


TASKS = tuple(_task(version) for version in HUB)
