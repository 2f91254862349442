"""Questions with options, one of which is right: a language model's choice is the option that it finds likeliest.

Trained on the tokens of the right option, asked for the likelihood of every option after the question:

    sum  log p(option | question)      per token  sum / tokens      per byte  sum / bytes of UTF-8

Per byte is the default (lm-evaluation-harness calls its accuracy acc_norm): long options are not put at a disadvantage, and
tokenizers can be compared.  Examples have the questions as `first`, the options of each as `answers`, and as `labels` the index
of the right one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rankwise.experiments.data import lengths
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.data.encoded import IGNORED, Encoded
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.kinds.interface import Planned, Seen
from rankwise.experiments.kinds.language import LanguageModel, Prompted, continued, cut_left, flat, starts
from rankwise.experiments.kinds.predictions import as_array
from rankwise.experiments.kinds.text import ENDLESS
from rankwise.experiments.kinds.token_losses import token_losses
from torch import Tensor

NORMALISATIONS = ("per_byte", "per_token", "sum")  # the first is the default


@dataclass(frozen=True, eq=False)
class Options(Dataset):
    """n questions: their options as rows, one question's after the other.

    rows: question and option. first: (n + 1,) where the options of each question begin. labels: (n,) int64, the right one.
    num_bytes: of every option, in UTF-8.
    """

    rows: Encoded
    first: np.ndarray
    labels: np.ndarray
    num_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def right(self) -> np.ndarray:
        """(n,) the row of each question's right option."""
        return self.first[:-1] + self.labels

    @property
    def num_options(self) -> int:
        """The most that any question has."""
        return int(np.diff(self.first).max())

    @property
    def max_length(self) -> int:
        return self.rows.max_length

    @property
    def largest_token(self) -> int:
        return self.rows.largest_token

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each question with its longest option."""
        return np.maximum.reduceat(self.rows.lengths, self.first[:-1])

    def content(self) -> Iterator[bytes]:
        yield from self.rows.content()
        yield from (self.first.tobytes(), self.labels.tobytes())

    def select_examples(self, examples: Sequence[int] | np.ndarray) -> "Options":
        examples = np.asarray(examples, dtype=np.int64)
        sizes = np.diff(self.first)[examples]
        first = np.concatenate([[0], np.cumsum(sizes)])
        rows = np.repeat(self.first[examples] - first[:-1], sizes) + np.arange(first[-1])
        return replace(
            self, rows=self.rows.select(rows), first=first, labels=self.labels[examples], num_bytes=self.num_bytes[rows]
        )


@dataclass(frozen=True)
class _RightOptions:
    """What batches of training are planned by: (n,) tokens of each question with its right option."""

    lengths: np.ndarray
    max_length: int

    def __len__(self) -> int:
        return len(self.lengths)


class Choice(LanguageModel):
    """One option a row. Trained: labels (K*N, L). Evaluated: ids of N questions' options (K*N, C, L), C the most options."""

    predicted = (np.int64, (len(NORMALISATIONS),))

    def encode(self, examples: Examples, processor: Any, max_length: int) -> Options:
        """
        Raises:
            ValueError: a label that is none of its options, or an empty option.
        """
        labels = np.asarray(examples.labels, dtype=np.int64)
        sizes = np.array([len(options) for options in examples.answers])
        wrong = np.flatnonzero((labels < 0) | (labels >= sizes))
        if len(wrong):
            row = wrong[0]
            raise ValueError(f"example {row + 1}: the right option is {labels[row]} of {sizes[row]}, counted from 0")
        questions = [q for q, options in zip(examples.first, examples.answers, strict=True) for _ in options]
        options = [option for of_question in examples.answers for option in of_question]
        empty = next((question for question, option in zip(questions, options, strict=True) if not option.strip()), None)
        if empty is not None:
            raise ValueError(f'an option of "{empty[:40]}" is empty: fill it, or take it out')
        prompts, scored = continued(processor, questions, options)
        scored, begin = [ids[: max_length - 1] for ids in scored], starts(processor)
        prompts = [cut_left(p, max_length - len(s), begin) for p, s in zip(prompts, scored, strict=True)]
        rows = Prompted(
            **flat(prompts, scored),
            token_type_ids=None,
            max_length=max_length,
            is_by_token=True,
            references=tuple((option,) for option in options),
        )
        first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return Options(rows, first, labels, np.array([len(option.encode()) for option in options], dtype=np.int64))

    def pieces(self, task: Any, split: str) -> Iterator[Examples]:
        """All at once: the options of every question are kept to choose among."""
        yield task.examples(split)

    def whole_lengths(self, examples: Examples, processor: Any) -> np.ndarray:
        """Of each question with its longest option."""
        return self.encode(examples, processor, ENDLESS).lengths

    def lost(self, processor: Any) -> str:
        return "the beginning of a question, or the end of an option, is not read"

    def seen(self, data: Options, row: int, processor: Any, labels: Sequence[str]) -> list[Seen]:
        """The row-th question with each of its options."""
        found = []
        for option, at in enumerate(range(data.first[row], data.first[row + 1])):
            name = f"option {option + 1}{', the right one' if option == data.labels[row] else ''}"
            found += (replace(one, name=name) for one in super().seen(data.rows, at, processor, labels))
        return found

    def plan(self, data: Options, batch_size: int, seed: int, epoch: int) -> list[Planned]:
        of_right = _RightOptions(data.rows.lengths[data.right], data.max_length)
        return lengths.batches(of_right, batch_size, seed, epoch)

    def collate(self, data: Options, rows: np.ndarray, size: int, processor: Any) -> dict[str, np.ndarray]:
        return super().collate(data.rows, data.right[rows], size, processor)

    def collate_evaluation(self, data: Options, rows: np.ndarray, size: int, processor: Any) -> dict[str, np.ndarray]:
        """Every option of the questions; where one has fewer than others its last one again, of no bytes."""
        which = data.first[rows][:, None] + np.arange(data.num_options)  # (N, C)
        is_there = which < data.first[rows + 1][:, None]
        which = np.where(is_there, which, data.first[rows + 1][:, None] - 1)
        batch = super().collate(data.rows, which.ravel(), size, processor)
        batch = {name: array.reshape(*which.shape, -1) for name, array in batch.items()}  # (N, C, L)
        right = batch["labels"][np.arange(len(rows)), data.labels[rows]]
        num_bytes = np.where(is_there, data.num_bytes[which], 0)
        return {**batch, "labels": right, "options": batch["labels"], "num_bytes": num_bytes, "right": data.labels[rows]}

    def outputs(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """(K*N, C, 3): the log-likelihood of every option, by each normalisation."""
        shared = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "options", "num_bytes", "right")}
        likelihoods = []
        for option in range(inputs["options"].shape[1]):  # as many rows at a time as in training
            batch = {name: inputs[name][:, option] for name in ("input_ids", "attention_mask")}
            likelihoods.append(-token_losses(model, {**shared, **batch}, inputs["options"][:, option]).sum(-1))
        total, num_bytes = torch.stack(likelihoods, -1), inputs["num_bytes"]
        num_tokens = (inputs["options"] != IGNORED).sum(-1).clamp_min(1)
        values = torch.stack([total / num_bytes.clamp_min(1), total / num_tokens, total], -1)
        return values.masked_fill((num_bytes == 0)[..., None], torch.finfo(values.dtype).min)

    def evaluation_losses(
        self, model: Any, inputs: Mapping[str, Tensor], outputs: Tensor, labels: Tensor, members: int
    ) -> Tensor:
        total = outputs[..., NORMALISATIONS.index("sum")].gather(1, inputs["right"][:, None])
        return self.losses(-total, labels, members)

    def predictions(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(1)

    def scored(self, predictions: Any, labels: Any, offsets: None) -> tuple[tuple, int]:
        """The option chosen by each normalisation (n, 3), and the right one (n,)."""
        chosen, right = as_array(predictions), as_array(labels)
        if chosen.shape != (len(right), len(NORMALISATIONS)):
            raise ValueError(f"predictions of shape {chosen.shape} for {len(right)} questions; {len(NORMALISATIONS)} for each")
        return (chosen, right), len(right)
