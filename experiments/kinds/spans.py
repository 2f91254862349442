"""Questions whose answer is a run of words of a text: a start and an end score for each token (data/questions.py)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rankwise.experiments.data.encoded import Encoded
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data.questions import Questions, best, windows
from rankwise.experiments.kinds.interface import Seen, Undefined, at_least_fp32
from rankwise.experiments.kinds.predictions import as_array
from rankwise.experiments.kinds.text import ByToken, texts_of
from torch import Tensor
from torch.nn import functional as F


class Spans(ByToken):
    """One span a row, by cross-entropy. Labels (K*N, 2): the tokens at which it starts and ends; logits (K*N, L, 2)."""

    auto_class = "AutoModelForQuestionAnswering"
    predicted = (np.float32, (2,))

    def encode(self, examples: Examples, processor: Any, max_length: int) -> Encoded:
        """One row for each window of a question's context."""
        rows = list(windows(examples.first, examples.second, examples.labels, examples.answers, processor, max_length))
        offsets = np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int64)
        types = None if rows[0].types is None else np.concatenate([row.types for row in rows])
        questions = Questions(
            np.array([row.question for row in rows], dtype=np.int64),
            np.concatenate([row.characters for row in rows]),
            list(examples.ids),
            list(examples.second),
            list(examples.answers),
        )
        labels = np.array([row.labels for row in rows], dtype=np.int64)
        return Encoded(np.concatenate([row.ids for row in rows]), offsets, types, labels, max_length, questions=questions)

    def pieces(self, task: Any, split: str) -> Iterator[Examples]:
        """All at once: contexts are kept whole to find answers in."""
        yield task.examples(split)

    def lost(self, processor: Any) -> None:
        """Nothing: a long context is cut into windows that overlap."""
        return None

    def seen(self, data: Encoded, row: int, processor: Any, labels: Sequence[str]) -> list[Seen]:
        """The row-th question's windows; scored are the first and the last token of the answer."""
        windows = np.flatnonzero(data.questions.rows == row)
        found = []
        for number, window in enumerate(windows, start=1):
            texts = texts_of(processor, data.ids[data.offsets[window] : data.offsets[window + 1]])
            ends = set(data.labels[window].tolist())
            name = f"window {number}" if len(windows) > 1 else ""
            found.append(Seen(texts, tuple(at in ends for at in range(len(texts))), name))
        return found

    def logits(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The start and the end score of each token.

        At padding they are the least number there is, so that a loss, a softmax over the row's tokens, does not depend on
        how far the row is padded (run_qa.py pads every row to one length, and leaves the padding in).
        """
        both = torch.stack([output.start_logits, output.end_logits], dim=-1)
        return both.masked_fill(batch["attention_mask"].unsqueeze(-1) == 0, torch.finfo(both.dtype).min)

    def example(self, config: Any, num_labels: int, rows: int, size: int) -> dict[str, Tensor]:
        batch = super().example(config, num_labels, rows, size)
        return {**batch, "labels": torch.zeros(rows, 2, dtype=torch.int64)}

    def example_losses(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, members: int) -> tuple[Tensor, int]:
        logits = self.logits(model(**inputs), {"attention_mask": torch.ones_like(inputs["input_ids"])})
        return self.losses(logits, labels, members), logits.numel() * logits.element_size()

    def losses(self, logits: Tensor, labels: Tensor, members: int) -> Tensor:
        """The mean of the start's and the end's loss, each a choice among the L tokens of the row."""
        both = at_least_fp32(logits).mT.flatten(0, 1)  # (2 K N, L): a row's start and its end are two classifications
        return F.cross_entropy(both, labels.flatten(), reduction="none").view(members, -1).mean(1)

    def predictions(self, outputs: Tensor) -> Tensor:
        return outputs.float()

    def scored(self, predictions: Any, labels: Questions, offsets: np.ndarray) -> tuple[tuple, int]:
        """The text of each question's best span, how far having no answer scores above it, and the questions."""
        scores = as_array(predictions)
        if not np.isfinite(scores).all():
            raise Undefined("collapsed", "the model's outputs are not finite numbers")
        return (*best(scores, labels, offsets), labels), len(labels)

    def stored(self, predictions: np.ndarray) -> None:
        """Two numbers for each token are too large to keep."""
        return None
