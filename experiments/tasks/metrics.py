"""Every metric of the tasks, in points (0..100), and the primary ones on bootstrap resamples of the rows.

Accuracy, F1 of classes and Matthews' correlation are scikit-learn's.  What is written by hand here, and why:

- `correlations`: scipy's pearsonr and spearmanr give the same to rounding (tests/test_tasks.py), not to the bit, and a
  committed run that is repeated must give its score to the bit.
- `entity_f1`: seqeval's (its conlleval mode) is the same number (tests/test_tasks.py), from lists of strings; here
  entities come as arrays, because the standard error needs their counts in each of 200 resamples of the sentences.
- Exact match and F1 of answers: torchmetrics' SQuAD gives the means alone; a standard error needs the score of each
  question, and v2.0 its threshold.  tests/test_squad.py holds the two together.
- `resampled_*`: no library scores 200 weighted resamples in one pass; 200 calls of one would take longer than training.
"""

import collections
import functools
import math
import re
import string
from collections.abc import Sequence

import numpy as np
from rankwise.experiments.data.questions import Questions
from rankwise.experiments.kinds import Undefined

RESAMPLES = 200  # of a bootstrap: its standard error is then known to about 5 %
PUNCTUATION = str.maketrans("", "", string.punctuation)

# ------------------------------------------------------------------------------------------------------------------------- rows


def correlations(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Pearson, Spearman and their mean, in points."""
    from scipy.stats import rankdata

    if not np.isfinite(predicted).all():
        raise Undefined("collapsed", "the model's outputs are not finite numbers")
    true = true.astype(np.float64)
    # A model that ignores its input still differs by rounding between batches: 1e-6 is 8 times float32's epsilon.
    if np.ptp(predicted) <= 1e-6 * np.abs(predicted).max():
        raise Undefined("collapsed", f"the model predicts one value for all {len(predicted)} rows")
    if np.ptp(true) == 0:
        raise Undefined("collapsed", f"all {len(true)} labels are equal, so that a correlation has no value")

    def pearson(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - a.mean(), b - b.mean()
        a, b = a / np.abs(a).max(), b / np.abs(b).max()
        return 100 * float(np.clip((a @ b) / math.sqrt((a @ a) * (b @ b)), -1, 1))

    linear = pearson(predicted, true)
    by_rank = pearson(rankdata(predicted), rankdata(true))
    return {"pearson": linear, "spearman": by_rank, "pearson_spearman": (linear + by_rank) / 2}


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return 100 * float(accuracy_score(true, predicted))


def accuracy_and_macro_f1(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Accuracy, and the mean of the F1 of each class that occurs among labels or predictions."""
    from sklearn.metrics import f1_score

    return {
        "accuracy": accuracy(predicted, true),
        "macro_f1": 100 * float(f1_score(true, predicted, average="macro", zero_division=0)),
    }


def accuracy_and_f1(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Accuracy, the F1 of class 1, and their mean, as GLUE scores MRPC and QQP."""
    from sklearn.metrics import f1_score

    share, f1 = accuracy(predicted, true), 100 * float(f1_score(true, predicted, zero_division=0))
    return {"accuracy": share, "f1": f1, "accuracy_f1": (share + f1) / 2}


def matthews(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Matthews' correlation (0 / 0 where one class only is predicted, so undefined there) and accuracy."""
    from sklearn.metrics import matthews_corrcoef

    if len(np.unique(predicted)) < 2 or len(np.unique(true)) < 2:
        raise Undefined("collapsed", f"one class for all {len(true)} rows, so that Matthews' correlation has no value")
    return {"matthews": 100 * float(matthews_corrcoef(true, predicted)), "accuracy": accuracy(predicted, true)}


def f1_of_labels(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Of (n, L) labels: micro F1 over all of them, macro F1 over each label that occurs, rows that are wholly right."""
    from sklearn.metrics import f1_score

    if not predicted.any() and not true.any():
        raise Undefined("collapsed", "neither labels nor predictions name a label, so that F1 has no value")
    micro, macro = (100 * float(f1_score(true, predicted, average=way, zero_division=np.nan)) for way in ("micro", "macro"))
    return {"micro_f1": micro, "macro_f1": macro, "exact_match": accuracy(predicted, true)}


def resampled_micro_f1(predicted: np.ndarray, true: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,) micro F1 of (n, L) labels on each resample of the rows."""
    right, both = (predicted & true).sum(1), (predicted + true).sum(1)
    return 200 * ratio(weights @ right, weights @ both)


# --------------------------------------------------------------------------------------------------------------------- entities


def entities(tags: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The entities in a run of tags: (entities, 3) first word, last word, type (1 PER, 2 ORG, 3 LOC, 4 MISC).

    tags: (words,) indices into TAGS. rows: (words,) the sentence of each word; no entity reaches over its end.
    """
    kind = (tags + 1) // 2  # 0 outside
    begins = tags % 2 == 1
    new_row = np.concatenate([[True], rows[1:] != rows[:-1]])
    changed = np.concatenate([[True], kind[1:] != kind[:-1]])
    cut = new_row | changed | begins  # a border before this word
    first = np.flatnonzero(cut & (kind > 0))
    borders = np.append(np.flatnonzero(cut), len(tags))
    last = borders[np.searchsorted(borders, first, side="right")] - 1
    return np.stack([first, last, kind[first]], axis=1)


def entity_f1(predicted: np.ndarray, true: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """F1, precision, recall by whole entities (0 where nothing was predicted), and accuracy by words, in points."""
    predicted_entities, true_entities = (set(map(tuple, entities(tags, rows).tolist())) for tags in (predicted, true))
    if not predicted_entities and not true_entities:
        raise Undefined("collapsed", "neither labels nor predictions hold an entity, so that F1 has no value")
    right = len(predicted_entities & true_entities)
    return {
        "f1": 200 * right / (len(predicted_entities) + len(true_entities)),
        "precision": 100 * right / len(predicted_entities) if predicted_entities else 0.0,
        "recall": 100 * right / len(true_entities) if true_entities else 0.0,
        "accuracy": accuracy(predicted, true),
    }


def resampled_entity_f1(predicted: np.ndarray, true: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,) F1 by whole entities on each resample of the sentences. weights: (B, sentences)."""
    predicted_entities, true_entities = (
        {tuple(entity) for entity in entities(tags, rows).tolist()} for tags in (predicted, true)
    )

    def drawn(these: set[tuple[int, ...]]) -> np.ndarray:
        firsts = np.array([first for first, *_ in these], dtype=np.int64)
        return weights @ np.bincount(rows[firsts], minlength=weights.shape[1])

    return 200 * ratio(drawn(predicted_entities & true_entities), drawn(predicted_entities) + drawn(true_entities))


# ---------------------------------------------------------------------------------------------------------------------- answers


@functools.lru_cache(maxsize=1 << 16)
def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and needless blanks."""
    text = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1_of_words(predicted: str, right: str) -> float:
    """Of two normalized texts; 1 where both are empty, 0 where one is."""
    words, right_words = predicted.split(), right.split()
    if not words or not right_words:
        return float(words == right_words)
    shared = sum((collections.Counter(words) & collections.Counter(right_words)).values())
    return 2 * shared / (len(words) + len(right_words))


def answer_scores(texts: Sequence[str], answers: Sequence[tuple[str, ...]]) -> np.ndarray:
    """(Q, 2) exact match and F1 of each text, 0..1, against the best of its right answers."""
    values = np.zeros((len(texts), 2))
    for row, (text, given) in enumerate(zip(texts, answers, strict=True)):
        predicted = normalized(text)
        right = [answer for answer in map(normalized, given) if answer] or [""]
        values[row] = predicted in right, max(f1_of_words(predicted, one) for one in right)
    return values


def exact_match_and_f1(texts: Sequence[str], gaps: np.ndarray, questions: Questions) -> dict[str, float]:
    """Exact match and F1, in points, where every question has an answer."""
    exact, f1 = 100 * answer_scores(texts, questions.answers).mean(0)
    return {"exact_match": exact, "f1": f1}


def resampled_answer_f1(texts: Sequence[str], gaps: np.ndarray, questions: Questions, weights: np.ndarray) -> np.ndarray:
    """(B,) F1 on each resample of the questions."""
    return 100 * (weights @ answer_scores(texts, questions.answers)[:, 1]) / weights.sum(1)


def with_empty(texts: Sequence[str], gaps: np.ndarray) -> list[str]:
    """The texts that v2.0 scores: empty where having no answer scores higher."""
    return ["" if gap > 0 else text for text, gap in zip(texts, gaps, strict=True)]


def exact_match_and_f1_with_empty(texts: Sequence[str], gaps: np.ndarray, questions: Questions) -> dict[str, float]:
    """Exact match and F1 of v2.0, over all questions and over those with and without an answer; best_*: with the threshold
    that suits this split best, for each metric its own (in points; the threshold of F1 in units of the model's scores)."""
    chosen = answer_scores(with_empty(texts, gaps), questions.answers)
    exact, f1 = 100 * chosen.mean(0)
    values = {"exact_match": exact, "f1": f1}
    answerable = np.array([bool(given) for given in questions.answers])
    if answerable.any():
        values["has_answer_exact_match"], values["has_answer_f1"] = 100 * chosen[answerable].mean(0)
    if not answerable.all():
        values["no_answer_accuracy"] = 100 * chosen[~answerable, 0].mean()
    answered, empty = answer_scores(texts, questions.answers), answer_scores([""] * len(texts), questions.answers)
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


def resampled_answer_f1_with_empty(
    texts: Sequence[str], gaps: np.ndarray, questions: Questions, weights: np.ndarray
) -> np.ndarray:
    """(B,) F1 of v2.0 on each resample of the questions."""
    return resampled_answer_f1(with_empty(texts, gaps), gaps, questions, weights)


# ------------------------------------------------------------------------------------------------------------------- resampling


def resample_weights(num_rows: int) -> np.ndarray:
    """(B, N) how often each of N rows comes in each of B bootstrap resamples; the same at every call."""
    drawn = np.random.default_rng(0).integers(num_rows, size=(RESAMPLES, num_rows))
    flat = (drawn + num_rows * np.arange(RESAMPLES)[:, None]).ravel()
    return np.bincount(flat, minlength=RESAMPLES * num_rows).reshape(RESAMPLES, num_rows)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, and 0 where that is 0 / 0."""
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=whole != 0)


def resampled_correlations(predicted: np.ndarray, true: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,) the mean of Pearson and Spearman on each resample."""
    true = true.astype(np.float64)
    linear = _weighted_pearson(predicted, true, weights)
    by_rank = _weighted_pearson(_weighted_ranks(predicted, weights), _weighted_ranks(true, weights), weights)
    return (linear + by_rank) / 2


def _weighted_pearson(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,) in points; a and b: (N,), or (B, N) where they differ between the resamples."""
    a, b = ((x - (weights * x).sum(1, keepdims=True) / weights.sum(1, keepdims=True)) for x in (a, b))  # (B, N)
    products = [(weights * x * y).sum(1) for x, y in ((a, b), (a, a), (b, b))]
    return 100 * np.clip(ratio(products[0], np.sqrt(products[1] * products[2])), -1, 1)


def _weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B, N) the rank of each row among the rows of each resample, the mean rank where values are equal."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.add.reduceat(weights[:, order], starts, axis=1)  # (B, distinct values)
    ranks = np.cumsum(sizes, axis=1) - (sizes - 1) / 2
    return ranks[:, group]


def resampled_matthews(predicted: np.ndarray, true: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,) Matthews' correlation of two classes on each resample: Pearson's of the two 0/1 columns."""
    return _weighted_pearson(predicted.astype(np.float64), true.astype(np.float64), weights)
