"""Texts to model: put one after the other, cut into blocks of max_length tokens, every token of a block but its first scored.

Examples have the texts as `first`; an end of text stands after each.  Bits per byte compares models with different tokenizers,
perplexity does not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rankwise.experiments.data import tokens
from rankwise.experiments.data.encoded import BLOCK, IGNORED, Encoded, Growing
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.kinds.interface import Seen
from rankwise.experiments.kinds.language import LanguageModel, starts
from rankwise.experiments.kinds.predictions import as_array
from rankwise.experiments.kinds.token_losses import token_losses
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Blocks(Encoded):
    """Rows of tokens. counts: (n, 2) scored tokens of each row, and the bytes of text (UTF-8) that they stand for."""

    counts: np.ndarray | None = None

    @property
    def truth(self) -> tuple[np.ndarray, None]:
        return self.counts, None

    def select(self, rows: Any) -> "Blocks":
        part = super().select(rows)
        return replace(self, ids=part.ids, offsets=part.offsets, labels=part.labels, counts=self.counts[np.asarray(rows)])


class LanguageModelling(LanguageModel):
    """The text itself, by the cross-entropy of its tokens. What is predicted of a row is the sum of their losses, in nats."""

    predicted = (np.float64, ())

    def encode(self, examples: Examples, processor: Any, max_length: int) -> Blocks:
        """
        Raises:
            ValueError: less text than two tokens.
        """
        return self._blocks(iter([examples]), processor, max_length)

    def encode_split(self, task: Any, split: str, processor: Any, max_length: int) -> Blocks:
        tokens.check_tokenizer(processor, max_length)
        return self._blocks(self.pieces(task, split), processor, max_length)

    def _blocks(self, pieces: Iterator[Examples], processor: Any, max_length: int) -> Blocks:
        """Of pieces of a split, whose texts stand one after the other across their borders."""
        flat, bytes_of = Growing(), Growing()
        for examples in pieces:
            ids, sizes = _flat(examples, processor)
            flat.add(ids)
            bytes_of.add(sizes)
        ids, sizes = flat.array(), bytes_of.array()
        offsets = np.append(np.arange(0, len(ids), max_length), len(ids))
        if offsets[-1] - offsets[-2] < 2:  # a last block of one token has nothing to score
            offsets, ids, sizes = offsets[:-1], ids[:-1], sizes[:-1]
        if len(offsets) < 2:
            raise ValueError("the texts have less than two tokens together, so that there is nothing to predict")
        labels, counts = Growing(), []
        step = max_length * max(1, BLOCK // max_length)  # whole blocks
        for at in range(0, len(ids), step):
            some, of_some = ids[at : at + step].astype(np.int64), np.array(sizes[at : at + step], np.int64)
            starting = np.arange(0, len(some), max_length)
            some[starting], of_some[starting] = IGNORED, 0
            labels.add(some)
            counts.append(np.add.reduceat(of_some, starting))
        both = np.stack([np.diff(offsets) - 1, np.concatenate(counts)], 1)
        return Blocks(ids, offsets, None, labels.array(), max_length, is_by_token=True, counts=both)

    def whole_lengths(self, examples: Examples, processor: Any) -> np.ndarray:
        """Of each text with what begins and ends it."""
        batch = processor(list(examples.first), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return np.array([len(starts(processor)) + len(row) + 1 for row in batch["input_ids"]])

    def lost(self, processor: Any) -> None:
        """Nothing: texts stand one after the other, and what one block has no room for is in the next."""
        return None

    def num_rows(self, lengths: np.ndarray, max_length: int) -> int:
        return max(1, -(-int(lengths.sum()) // max_length))

    def seen(self, data: Blocks, row: int, processor: Any, labels: Sequence[str]) -> list[Seen]:
        return [replace(one, name="a block of texts") for one in super().seen(data, row, processor, labels)]

    def outputs(self, model: Any, inputs: Any) -> Tensor:
        """(K*N, L): the loss of every token."""
        return token_losses(model, {k: v for k, v in inputs.items() if k != "text"}, inputs["text"])

    def collate_evaluation(self, data: Blocks, rows: np.ndarray, size: int, processor: Any) -> dict[str, np.ndarray]:
        batch = self.collate(data, rows, size, processor)
        return {**batch, "text": batch["labels"]}

    def predictions(self, outputs: Tensor) -> Tensor:
        return outputs.double().sum(-1)

    def scored(self, predictions: Any, labels: Any, offsets: None) -> tuple[tuple, int]:
        """Each block's loss, and its numbers of tokens and bytes (n, 2)."""
        losses, counts = as_array(predictions).astype(np.float64), as_array(labels)
        if losses.shape != counts.shape[:1]:
            raise ValueError(f"{len(losses)} predictions for {len(counts)} blocks")
        return (losses, counts), len(losses)


def _flat(examples: Examples, processor: Any) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of texts one after the other, each between what begins and ends one; and the bytes that each stands for."""
    batch = processor(
        list(examples.first),
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    first, end = starts(processor), [processor.eos_token_id]
    ids = np.concatenate([[*first, *row, *end] for row in batch["input_ids"]]).astype(np.int32)
    sizes = np.concatenate(
        [
            [0] * len(first) + _bytes_of_tokens(text, spans) + [0]
            for text, spans in zip(examples.first, batch["offset_mapping"], strict=True)
        ]
    )
    return ids, sizes.astype(np.int32)


def _bytes_of_tokens(text: str, spans: list[tuple[int, int]]) -> list[int]:
    """The bytes of a text that each of its tokens adds; blanks that no token has count to the one after them.

    Tokens that share a character (of several bytes) have it once: the first.
    """
    bytes_before = np.cumsum([0, *(len(character.encode("utf-8", "replace")) for character in text)])
    ends = np.maximum.accumulate([0, *(bytes_before[end] for _, end in spans)])
    if spans:
        ends[-1] = bytes_before[-1]
    return np.diff(ends).tolist()
