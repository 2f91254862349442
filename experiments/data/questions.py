"""Questions whose answer is a run of words of a text: its windows as rows, and the best span of a model's scores.

A context that is too long for the model is cut into windows that overlap, one row each: [CLS] question [SEP] window [SEP].
A model gives every token a start and an end score. A row's labels are the tokens at which the answer starts and ends, and
token 0 ([CLS]) twice where the window does not hold all of it. The answer to a question is the best span of all its
windows; start plus end score of token 0, the least over its windows, is the score of having no answer. Devlin et al.
2019, sec. 4.2 and 4.3, and the scripts run_qa.py and utils_qa.py of transformers, which AdaLoRA's release took over.

Departures: the stride is a third of max_length (128 of 384, as in the scripts, and something that fits elsewhere); a
question keeps its first max_length / 6 tokens (64 of 384, as in BERT's release; run_qa.py never cuts one).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BATCH = 1000  # examples a call of the tokenizer, whose offsets are large Python lists
SHORTEST = 16  # tokens a window needs to have room for a question, a stride and some context
N_BEST = 20  # starts and ends that are combined; n_best_size of run_qa.py
LONGEST = 30  # tokens of an answer; max_answer_length of run_qa.py


@dataclass(frozen=True, eq=False)
class Questions:
    """What the rows of a split are windows of: Q questions, their contexts and right answers.

    rows: (n,) the question of each row. characters: (total, 2) int32, for each token its first character in the context
    and the one behind its last; -1 for tokens that are not of the context. answers: one tuple a question, empty where the
    context holds none.
    """

    rows: np.ndarray
    characters: np.ndarray
    ids: list[str]
    contexts: list[str]
    answers: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: np.ndarray, tokens: np.ndarray) -> "Questions":
        """Those of these rows, whose tokens are `tokens`; a question without a row is left out."""
        kept, index = np.unique(self.rows[rows], return_inverse=True)
        lists = ([values[question] for question in kept] for values in (self.ids, self.contexts, self.answers))
        return Questions(index, self.characters[tokens], *lists)

    def arrays(self) -> dict[str, np.ndarray]:
        """As numpy can keep it; each context once."""
        place = {context: index for index, context in enumerate(dict.fromkeys(self.contexts))}
        texts = {"ids": self.ids, "contexts": list(place), "answers": self.answers}
        texts["context"] = [place[context] for context in self.contexts]
        return {
            "question_rows": self.rows,
            "question_characters": self.characters,
            "question_texts": np.frombuffer(json.dumps(texts).encode("ascii"), dtype=np.uint8),
        }

    @classmethod
    def from_arrays(cls, arrays: Any) -> "Questions":
        texts = json.loads(arrays["question_texts"].tobytes())
        contexts = [texts["contexts"][place] for place in texts["context"]]
        answers = [tuple(answers) for answers in texts["answers"]]
        return cls(arrays["question_rows"], arrays["question_characters"], texts["ids"], contexts, answers)


@dataclass(frozen=True, eq=False)
class Window:
    """One row: its tokens, their characters in the context (length, 2), the question that it belongs to, its labels."""

    ids: np.ndarray
    types: np.ndarray | None
    characters: np.ndarray
    question: int
    labels: tuple[int, int]


def windows(
    questions: Sequence[str],
    contexts: Sequence[str],
    starts: Sequence[np.ndarray],
    answers: Sequence[tuple[str, ...]],
    tokenizer: Any,
    max_length: int,
) -> Iterator[Window]:
    """The rows of these questions, in their order.

    starts: the first character of each right answer of each question; the first answer makes the labels.
    """
    if max_length < SHORTEST:
        raise ValueError(f"max_length {max_length} is too short for questions with contexts; give at least {SHORTEST} tokens")
    wants_types = "token_type_ids" in tokenizer.model_input_names
    for begin in range(0, len(questions), BATCH):
        part = slice(begin, begin + BATCH)
        batch = tokenizer(
            shortened(questions[part], tokenizer, max_length // 6),
            list(contexts[part]),
            truncation="only_second",
            max_length=max_length,
            stride=max_length // 3,
            padding=False,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=wants_types,
            verbose=False,
        )
        for row, ids in enumerate(batch["input_ids"]):
            question = begin + batch["overflow_to_sample_mapping"][row]
            characters = np.array(batch["offset_mapping"][row], dtype=np.int32)
            of_context = np.array(batch.sequence_ids(row), dtype=np.float64) == 1  # None becomes NaN
            characters[~of_context] = -1
            span = (0, 0)
            if answers[question]:
                first = int(starts[question][0])
                span = token_span(characters, of_context, first, first + len(answers[question][0]))
            types = np.array(batch["token_type_ids"][row], dtype=np.int8) if wants_types else None
            yield Window(np.array(ids, dtype=np.int32), types, characters, question, span)


def shortened(questions: Sequence[str], tokenizer: Any, limit: int) -> list[str]:
    """The questions without leading blanks, each cut behind its first `limit` tokens."""
    stripped = [question.lstrip() for question in questions]
    characters = tokenizer(stripped, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return [text[: at[limit - 1][1]] if len(at) > limit else text for text, at in zip(stripped, characters, strict=True)]


def token_span(characters: np.ndarray, of_context: np.ndarray, first: int, end: int) -> tuple[int, int]:
    """The tokens that hold the characters first..end-1 of the context; (0, 0) where the window lacks some of them."""
    tokens = np.flatnonzero(of_context)
    if not len(tokens) or characters[tokens[0], 0] > first or characters[tokens[-1], 1] < end:
        return 0, 0
    start = np.searchsorted(characters[tokens, 0], first, side="right") - 1
    stop = np.searchsorted(characters[tokens, 1], end, side="left")
    return int(tokens[start]), int(tokens[stop])


def best(scores: np.ndarray, questions: Questions, offsets: np.ndarray) -> tuple[list[str], np.ndarray]:
    """For each question the text of its best span, and by how much having no answer scores above it.

    A span starts at one of the 20 likeliest starts of its window, ends at one of the 20 likeliest ends, lies in the
    context, and has at most 30 tokens. Where there is none the text is empty and the difference 0.

    scores: (total, 2) start and end score of each token. offsets: (n + 1,) where each row begins.
    """
    if not len(scores) == len(questions.characters) == offsets[-1]:
        raise ValueError(f"scores of {len(scores)} tokens for {len(questions.characters)} tokens")
    scores = scores.astype(np.float64)
    rows = len(offsets) - 1
    value, span = np.empty(rows), np.empty((rows, 2), dtype=np.int64)
    for begin in range(0, rows, 512):
        part = slice(begin, min(begin + 512, rows))
        value[part], span[part] = _best_of_rows(scores, questions.characters, offsets[part.start : part.stop + 1])
    null = np.full(len(questions), np.inf)
    np.minimum.at(null, questions.rows, scores[offsets[:-1]].sum(1))
    order = np.lexsort((-value, questions.rows))
    row = order[np.unique(questions.rows[order], return_index=True)[1]]  # the best row of each question
    has_span = np.isfinite(value[row])
    texts = []
    for index, (first, last) in enumerate(span[row]):
        at = slice(questions.characters[first, 0], questions.characters[last, 1])
        texts.append(questions.contexts[index][at] if has_span[index] else "")
    return texts, np.where(has_span, null - np.where(has_span, value[row], 0), 0.0)


def _best_of_rows(scores: np.ndarray, characters: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row the score of its best span (-inf: it has none), and the span's first and last token, (rows, 2)."""
    lengths = np.diff(offsets)
    mask = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full((*mask.shape, 2), -np.inf)
    padded[mask] = scores[offsets[0] : offsets[-1]]
    usable = np.zeros(mask.shape, dtype=bool)
    own = characters[offsets[0] : offsets[-1]]
    usable[mask] = own[:, 1] > own[:, 0]  # a token of the context that stands for some of its characters
    number = min(N_BEST, mask.shape[1])
    likeliest = np.argpartition(-padded, number - 1, axis=1)[:, :number]  # (rows, N, 2)
    start, end = likeliest[:, :, None, 0], likeliest[:, None, :, 1]
    row = np.arange(len(lengths))[:, None, None]
    valid = usable[row, start] & usable[row, end] & (start <= end) & (end - start < LONGEST)  # (rows, N, N)
    total = np.where(valid, padded[row, start, 0] + padded[row, end, 1], -np.inf).reshape(len(lengths), -1)
    chosen = total.argmax(1)
    row = np.arange(len(lengths))
    first, last = likeliest[row, chosen // number, 0], likeliest[row, chosen % number, 1]
    return total[row, chosen], offsets[:-1, None] + np.stack([first, last], axis=1)
