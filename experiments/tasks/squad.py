"""SQuAD: the answer to a question is a span of a Wikipedia paragraph (v1.1: Rajpurkar et al. 2016; v2.0, where the
paragraph may hold no answer: Rajpurkar et al. 2018).

Scored by the formula of the official script evaluate-v2.0.py (evaluate-v1.1.py gives another value only where a text is
nothing but articles and punctuation). Texts lose capitals, punctuation and articles; then, the best of the right answers
counted, exact match is equality, and

    F1 = 2 |P & G| / (|P| + |G|)      P, G: the words of prediction and right answer, with repeats

A question without an answer is answered right by the empty text alone. In v2.0 the model gives the empty text where
having no answer scores above its best span (a threshold of 0, as run_qa.py has it). The threshold that would have been
the best on this very split is reported too, as best_*, and scores nothing.
"""

import collections
import functools
import hashlib
import re
import string
from collections.abc import Sequence

import numpy as np
from rankwise.experiments.tasks.common import SPLIT_SEED, Examples, Task, hub_columns, shuffled
from rankwise.experiments.tasks.spans import Questions

HUB = {"v1": "rajpurkar/squad", "v2": "rajpurkar/squad_v2"}
OFFICIAL = {"v1": {"train": 87599, "validation": 10570}, "v2": {"train": 130319, "validation": 11873}}
OFFICIAL_TRAIN = "official-train"
PUNCTUATION = str.maketrans("", "", string.punctuation)
COLUMNS = ("id", "title", "context", "question", "answers")


@functools.lru_cache(maxsize=4)
def official(version: str, split: str) -> tuple[Examples, list[str]]:
    """One official part from the hub, and the article that each question is about."""
    name = f"squad/{version}"
    columns = hub_columns(name, HUB[version], None, split, [f"pinned package: none holds {name}"])
    examples = parse(f"{name}, {split}", columns, version)
    if len(examples) != OFFICIAL[version][split]:
        raise ValueError(f"{name}: {len(examples)} questions in {split} where {OFFICIAL[version][split]} are the rule")
    return examples, columns["title"]


def parse(where: str, columns: dict, version: str) -> Examples:
    """Questions, contexts, and the first characters and texts of the right answers.

    Raises: ValueError: a column that is missing, a row of another form; names the row, shows no text.
    """
    lacking = [column for column in COLUMNS if column not in columns]
    if lacking:
        raise ValueError(f"{where}: no column {lacking[0]} in the hub's copy; {', '.join(COLUMNS)} are the rule")
    starts, answers = [], []
    for number, row in enumerate(zip(*(columns[column] for column in COLUMNS), strict=True), start=1):
        *texts, found = row
        for column, text in zip(COLUMNS, texts, strict=False):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where}, row {number}: {column} is empty or no text")
        try:
            first, given = list(found["answer_start"]), list(found["text"])
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
    order = shuffled(len(articles), SPLIT_SEED, 5)
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


# ----------------------------------------------------------------------------------------------------------- scoring


@functools.lru_cache(maxsize=1 << 16)
def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and needless blanks."""
    text = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1_of_words(predicted: str, right: str) -> float:
    """Of two normalized texts; 1 where both are empty, 0 where one is."""
    mine, theirs = predicted.split(), right.split()
    if not mine or not theirs:
        return float(mine == theirs)
    shared = sum((collections.Counter(mine) & collections.Counter(theirs)).values())
    return 2 * shared / (len(mine) + len(theirs))


def scores(texts: Sequence[str], answers: Sequence[tuple[str, ...]]) -> np.ndarray:
    """(Q, 2) exact match and F1 of each text, 0..1, against the best of its right answers."""
    found = np.zeros((len(texts), 2))
    for row, (text, given) in enumerate(zip(texts, answers, strict=True)):
        mine = normalized(text)
        right = [answer for answer in map(normalized, given) if answer] or [""]
        found[row] = mine in right, max(f1_of_words(mine, one) for one in right)
    return found


def measure(texts: Sequence[str], gaps: np.ndarray, questions: Questions) -> dict[str, float]:
    """Exact match and F1, in points, where every question has an answer."""
    exact, f1 = 100 * scores(texts, questions.answers).mean(0)
    return {"exact_match": exact, "f1": f1}


def resampled_f1(texts: Sequence[str], gaps: np.ndarray, questions: Questions, weights: np.ndarray) -> np.ndarray:
    """(B,) F1 on each resample of the questions."""
    return 100 * (weights @ scores(texts, questions.answers)[:, 1]) / weights.sum(1)


def with_empty(texts: Sequence[str], gaps: np.ndarray) -> list[str]:
    """The texts that v2.0 scores: empty where having no answer scores higher."""
    return ["" if gap > 0 else text for text, gap in zip(texts, gaps, strict=True)]


def measure_with_empty(texts: Sequence[str], gaps: np.ndarray, questions: Questions) -> dict[str, float]:
    """Exact match and F1 of v2.0, over all questions and over those with and without an answer; best_*: with the threshold
    that suits this split best, for each metric its own (in points; the threshold of F1 in units of the model's scores)."""
    chosen = scores(with_empty(texts, gaps), questions.answers)
    exact, f1 = 100 * chosen.mean(0)
    values = {"exact_match": exact, "f1": f1}
    answerable = np.array([bool(given) for given in questions.answers])
    if answerable.any():
        values["has_answer_exact_match"], values["has_answer_f1"] = 100 * chosen[answerable].mean(0)
    if not answerable.all():
        values["no_answer_accuracy"] = 100 * chosen[~answerable, 0].mean()
    answered, empty = scores(texts, questions.answers), scores([""] * len(texts), questions.answers)
    values["best_exact_match"], _ = best_threshold(answered[:, 0], empty[:, 0], gaps)
    values["best_f1"], values["best_f1_threshold"] = best_threshold(answered[:, 1], empty[:, 1], gaps)
    return values


def best_threshold(answered: np.ndarray, empty: np.ndarray, gaps: np.ndarray) -> tuple[float, float]:
    """The best mean score (in points) that any threshold gives on these questions, and that threshold.

    Questions whose gap is at most the threshold are answered. answered, empty: (Q,) the score of a question with its span,
    and with the empty text. The script's find_best_thresh; like it, 0 stands for answering nothing.
    """
    order = np.argsort(gaps, kind="stable")
    gained = np.cumsum((answered - empty)[order])
    best = int(gained.argmax())
    if gained[best] <= 0:
        return 100 * empty.mean(), 0.0
    return 100 * (empty.sum() + gained[best]) / len(gaps), float(gaps[order[best]])


def resampled_f1_with_empty(texts: Sequence[str], gaps: np.ndarray, questions: Questions, weights: np.ndarray) -> np.ndarray:
    """(B,) F1 of v2.0 on each resample of the questions."""
    return resampled_f1(with_empty(texts, gaps), gaps, questions, weights)


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
        measure=measure_with_empty if empty else measure,
        resampled=resampled_f1_with_empty if empty else resampled_f1,
        identity=functools.partial(hub_identity, version),
        caption=(caption, threshold) if empty else (caption,),
    )


TASKS = tuple(_task(version) for version in HUB)
