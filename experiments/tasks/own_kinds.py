"""How rows of a user's file become examples of each kind of task, and what these can be scored by.  A new kind is a line here.

The first metric of a task is what methods are compared by: it rises as a model gets better, and its standard error comes from
resamples of the rows, so that not every metric can be the first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.kinds import Undefined
from rankwise.experiments.tasks import metrics, text_metrics
from rankwise.experiments.tasks.own import Parts, Row


@dataclass(frozen=True)
class Metric:
    """One number of a score.

    values: (what `Kind.scored` gives) -> {name: value}, one of which is this metric.
    resampled: as `Task.resampled`; None where `leads` is False, and where the metric is a share of the rows.
    leads: whether methods may be compared by it.
    in_units: whether it has the unit of a regression's targets, in which rows are not as they stand (`OwnKind.scale`).
    """

    values: Callable[..., dict[str, float]]
    resampled: Callable[..., np.ndarray] | None = None
    leads: bool = True
    in_units: bool = False
    two_labels: bool = False  # it has a value for two classes only


@dataclass(frozen=True)
class OwnKind:
    """What the rows of one kind are made into.

    fields: what a file has for it, as `rankwise list` shows. classes: (parts) -> the labels in the order of their numbers.
    examples: (rows, labels, scale) -> Examples; scale: mean and standard deviation of a regression's training targets.
    default: (labels) -> the metrics of a report where a study names none.
    """

    fields: str
    examples: Callable[[Sequence[Row], tuple[str, ...], tuple[float, float]], Examples]
    metrics: Mapping[str, Metric]
    default: Callable[[tuple[str, ...]], tuple[str, ...]]
    classes: Callable[[Parts], tuple[str, ...]] = lambda parts: parts.labels


# -- rows ----------------------------------------------------------------------------------------------------------------


def _texts(rows: Sequence[Row], labels: np.ndarray) -> Examples:
    is_pair = any(row.pair is not None for row in rows)
    return Examples([str(row.input) for row in rows], [str(row.pair) for row in rows] if is_pair else None, labels)


def _classified(rows: Sequence[Row], labels: tuple[str, ...], scale: tuple[float, float]) -> Examples:
    number = {label: index for index, label in enumerate(labels)}
    return _texts(rows, np.array([number[str(row.target)] for row in rows], dtype=np.int64))


def _labelled(rows: Sequence[Row], labels: tuple[str, ...], scale: tuple[float, float]) -> Examples:
    number = {label: index for index, label in enumerate(labels)}
    is_there = np.zeros((len(rows), len(labels)), dtype=np.int64)
    for row, one in enumerate(rows):
        is_there[row, [number[str(label)] for label in one.target]] = 1
    return _texts(rows, is_there)


def _measured(rows: Sequence[Row], labels: tuple[str, ...], scale: tuple[float, float]) -> Examples:
    mean, deviation = scale
    return _texts(rows, ((np.array([row.target for row in rows], dtype=np.float64) - mean) / deviation).astype(np.float32))


def _tagged(rows: Sequence[Row], labels: tuple[str, ...], scale: tuple[float, float]) -> Examples:
    number = {label: index for index, label in enumerate(labels)}
    tags = [np.array([number[str(tag)] for tag in row.target], dtype=np.int64) for row in rows]
    return Examples([list(row.input) for row in rows], None, tags)


def _answered(rows: Sequence[Row], labels: tuple[str, ...], scale: tuple[float, float]) -> Examples:
    starts, answers = [], []
    for row in rows:
        texts, places = answers_of(row)
        starts.append(np.array(places, dtype=np.int64))
        answers.append(tuple(texts))
    names = [str(number) for number in range(len(rows))]
    return Examples([str(row.input) for row in rows], [str(row.pair) for row in rows], starts, answers, names)


def _generated(rows: Sequence[Row], labels: tuple[str, ...], scale: tuple[float, float]) -> Examples:
    prompts = [row.input if isinstance(row.input, tuple) else str(row.input) for row in rows]  # a tuple: the turns of a chat
    return Examples(prompts, None, [str(row.target) for row in rows])


def _chosen(rows: Sequence[Row], labels: tuple[str, ...], scale: tuple[float, float]) -> Examples:
    right = np.array([row.target for row in rows], dtype=np.int64)
    return Examples([str(row.input) for row in rows], None, right, [row.choices for row in rows])


def _modelled(rows: Sequence[Row], labels: tuple[str, ...], scale: tuple[float, float]) -> Examples:
    return Examples([str(row.input) for row in rows], None, [""] * len(rows))


def _pictured(rows: Sequence[Row], labels: tuple[str, ...], scale: tuple[float, float]) -> Examples:
    number = {label: index for index, label in enumerate(labels)}
    return Examples([row.input for row in rows], None, np.array([number[str(row.target)] for row in rows], dtype=np.int64))


def answers_of(row: Row) -> tuple[list[str], list[int]]:
    """The right answers of a question and the character of the context at which each starts.

    Raises:
        ValueError: none, or one that is not where it is said to be.
    """
    context, target = str(row.pair), row.target
    if isinstance(target, Mapping) and {"text", "answer_start"} <= target.keys():
        texts, places = list(target["text"] or []), list(target["answer_start"] or [])
    else:
        texts = [str(target)]
        places = [context.find(texts[0])]
    if not texts or len(texts) != len(places):
        raise ValueError("answers should be texts and as many places (answer_start): give at least one, or take the row out")
    for text, place in zip(texts, places, strict=True):
        if place < 0 or context[place : place + len(text)] != text:
            raise ValueError(f'the answer "{text[:40]}" is not in the context at its place: mend it, or take the row out')
    return texts, places


def by_entities(labels: Sequence[str]) -> tuple[str, ...] | None:
    """BIO tags in the order that metrics.entity_f1 takes, O, B-X, I-X, B-Y, I-Y, ...; None where the labels are none."""
    if any(label != "O" and label[:2] not in ("B-", "I-") for label in labels) or set(labels) <= {"O"}:
        return None
    types = sorted({label[2:] for label in labels if label != "O"})
    return ("O", *(f"{place}-{one}" for one in types for place in "BI"))


# -- metrics -------------------------------------------------------------------------------------------------------------


def _on_resamples(
    values: Callable[..., dict[str, float]], name: str, predicted: np.ndarray, true: np.ndarray, *more: np.ndarray
) -> np.ndarray:
    """(B,) a metric on each resample: every row, or the words of every sentence, as often as it was drawn; undefined is 0.

    more: the sentence of each word, where the labels are those of words; then the weights (B, rows or sentences).
    """
    *sentence, weights = more
    drawn = []
    for one in weights:
        taken = np.repeat(np.arange(len(true)), one if not sentence else one[sentence[0]])
        try:
            drawn.append(values(predicted[taken], true[taken], *(s[taken] for s in sentence))[name])
        except Undefined:
            drawn.append(0.0)
    return np.nan_to_num(np.array(drawn))


def _of_classes(predicted: np.ndarray, true: np.ndarray, *sentence: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import balanced_accuracy_score, f1_score

    return {
        **metrics.accuracy_and_macro_f1(predicted, true),
        "weighted_f1": 100 * float(f1_score(true, predicted, average="weighted", zero_division=0)),
        "balanced_accuracy": 100 * float(balanced_accuracy_score(true, predicted)),
    }


def _of_numbers(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    return {
        "r2": 100 * float(r2_score(true, predicted)),
        "mae": float(mean_absolute_error(true, predicted)),
        "rmse": float(root_mean_squared_error(true, predicted)),
    }


def _resampling(values: Callable[..., dict[str, float]], *names: str) -> dict[str, Metric]:
    return {name: Metric(values, partial(_on_resamples, values, name)) for name in names}


OF_CLASSES = {
    "accuracy": Metric(metrics.accuracy_and_macro_f1),
    **_resampling(_of_classes, "macro_f1", "weighted_f1", "balanced_accuracy"),
    **_resampling(metrics.matthews, "matthews"),
    "f1": Metric(metrics.accuracy_and_f1, partial(_on_resamples, metrics.accuracy_and_f1, "f1"), two_labels=True),
}
OF_LABELS = {
    "micro_f1": Metric(metrics.f1_of_labels, metrics.resampled_micro_f1),
    **_resampling(metrics.f1_of_labels, "macro_f1"),
    "exact_match": Metric(metrics.f1_of_labels),
}
OF_NUMBERS = {
    "pearson_spearman": Metric(metrics.correlations, metrics.resampled_correlations),
    **_resampling(metrics.correlations, "pearson", "spearman"),
    **_resampling(_of_numbers, "r2"),
    "mae": Metric(_of_numbers, leads=False, in_units=True),
    "rmse": Metric(_of_numbers, leads=False, in_units=True),
}
OF_WORDS = {
    "f1": Metric(metrics.entity_f1, metrics.resampled_entity_f1),
    "precision": Metric(metrics.entity_f1, leads=False),
    "recall": Metric(metrics.entity_f1, leads=False),
    "word_accuracy": Metric(
        lambda *scored: {"word_accuracy": _of_classes(*scored)["accuracy"]},
        partial(_on_resamples, _of_classes, "accuracy"),
    ),
    **_resampling(_of_classes, "macro_f1", "balanced_accuracy"),
}
OF_ANSWERS = {
    "f1": Metric(metrics.exact_match_and_f1, metrics.resampled_answer_f1),
    "exact_match": Metric(metrics.exact_match_and_f1),
}
OF_TEXTS = {name: Metric(text_metrics.of_texts([name]), text_metrics.resampled(name)) for name in text_metrics.NAMES}
OF_TEXTS |= {name: Metric(text_metrics.of_texts([name]), leads=False) for name in text_metrics.BESIDE}
OF_CHOICES = {
    "accuracy": Metric(text_metrics.choice_accuracy),
    "accuracy_per_token": Metric(text_metrics.choice_accuracy, leads=False),
    "accuracy_sum": Metric(text_metrics.choice_accuracy, leads=False),
}
OF_MODELLED = {
    "compression": Metric(text_metrics.modelled, text_metrics.resampled_compression),
    "bits_per_byte": Metric(text_metrics.modelled, leads=False),
    "perplexity": Metric(text_metrics.modelled, leads=False),
}

KINDS: dict[str, OwnKind] = {
    "classification": OwnKind(
        "text or sentence1 + sentence2 or premise + hypothesis; label",
        _classified,
        OF_CLASSES,
        lambda labels: ("accuracy", "macro_f1"),
    ),
    "multi-label": OwnKind("text; labels, a list of any length", _labelled, OF_LABELS, lambda labels: tuple(OF_LABELS)),
    "regression": OwnKind(
        "text or sentence1 + sentence2 or premise + hypothesis; label, a number",
        _measured,
        OF_NUMBERS,
        lambda labels: ("pearson_spearman", "pearson", "spearman", "mae"),
    ),
    "token-classification": OwnKind(
        "tokens, a list; tags or ner_tags, a list as long",
        _tagged,
        OF_WORDS,
        lambda labels: ("f1", "precision", "recall") if by_entities(labels) else ("macro_f1", "word_accuracy"),
        lambda parts: by_entities(parts.labels) or parts.labels,
    ),
    "span": OwnKind(
        "question, context; answers: text and answer_start, as in SQuAD",
        _answered,
        OF_ANSWERS,
        lambda labels: ("f1", "exact_match"),
        lambda parts: ("start", "end"),
    ),
    "generation": OwnKind(
        "instruction (+ input) + output or prompt + completion or question + answer or messages",
        _generated,
        OF_TEXTS,
        lambda labels: ("rougeL", "exact_match"),
    ),
    "choice": OwnKind("question, choices, answer", _chosen, OF_CHOICES, lambda labels: tuple(OF_CHOICES)),
    "language-modelling": OwnKind("text", _modelled, OF_MODELLED, lambda labels: tuple(OF_MODELLED)),
    "image-classification": OwnKind(
        "image, label; or a folder with a subfolder of images for each class",
        _pictured,
        OF_CLASSES,
        lambda labels: ("accuracy", "macro_f1"),
    ),
}
