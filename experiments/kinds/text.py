"""What kinds of text share: a tokenizer, tokens kept on disk, batches of similar lengths padded on the right."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rankwise.experiments import sources
from rankwise.experiments.data import draws, lengths, tokens
from rankwise.experiments.data.encoded import Encoded, joined
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.kinds.interface import Kind, Planned
from torch import Tensor

ENDLESS = 10**9  # tokens, to which no example is cut


def texts_of(processor: Any, ids: Iterable[int]) -> tuple[str, ...]:
    """Each token's own text, special ones and blanks included."""
    return tuple(processor.decode([int(one)], clean_up_tokenization_spaces=False) for one in ids)


class Text(Kind):
    """A kind whose rows are tokens.

    of_words: the texts come as lists of words, each with a label.
    """

    of_words: ClassVar[bool] = False

    def processor(self, folder: Path) -> Any:
        import transformers

        options = {"use_fast": True, "trust_remote_code": False, "local_files_only": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        if self.of_words and getattr(tokenizer, "add_prefix_space", None) is False:
            # Byte-level BPE: a word starts with a space.
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, add_prefix_space=True, **options)
        if not tokenizer.is_fast:
            raise ValueError("its tokenizer has no fast version, which is needed here")
        return tokenizer

    def fit(self, processor: Any, config: Any) -> None:
        """Gives tokenizer and config the same padding token; decoders often come without one."""
        if processor.pad_token_id is None:
            if processor.eos_token is None:
                raise ValueError("its tokenizer has neither a padding nor an end token")
            processor.pad_token = processor.eos_token
        processor.padding_side = "right"
        config.pad_token_id = processor.pad_token_id

    def encode_split(self, task: Any, split: str, processor: Any, max_length: int) -> Encoded:
        """The tokens of a split, made once and kept in the user's cache."""
        tokens.check_tokenizer(processor, max_length)
        identity = [tokens.tokenizer_hash(processor), task.data_hash()]
        parts = [tokens.FORMAT, draws.SPLIT_SEED, task.name, task.kind, split, max_length, *identity]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        path = sources.cache_folder() / "encoded" / f"{task.name.replace('/', '--')}-{split}-{key}.npz"
        kept = tokens.read(path, max_length, is_by_token=self.of_words)
        if kept is not None:
            return kept
        encoded = joined(self.encode(piece, processor, max_length) for piece in self.pieces(task, split))
        if not isinstance(encoded.ids, np.memmap):  # what memory has no room for is made again at each start
            tokens.write(path, encoded)
        return encoded

    def pieces(self, task: Any, split: str) -> Iterator[Examples]:
        """The examples of a split as they are tokenised, one piece after the other."""
        return task.pieces(split)

    def plan(self, data: Encoded, batch_size: int, seed: int, epoch: int) -> list[Planned]:
        return lengths.batches(data, batch_size, seed, epoch)

    def evaluation_plan(self, data: Encoded, batch_size: int) -> list[Planned]:
        return lengths.evaluation_batches(data, batch_size)

    def collate(self, data: Encoded, rows: np.ndarray, size: int, processor: Any) -> dict[str, np.ndarray]:
        """Rows padded on the right: of the arrays those that the model takes, and the labels."""
        takes = {*processor.model_input_names, "input_ids", "attention_mask", "labels"}
        arrays = lengths.collate(data, rows, size, processor.pad_token_id or 0)
        return {name: array for name, array in arrays.items() if name in takes}

    def example(self, config: Any, num_labels: int, rows: int, size: int) -> dict[str, Tensor]:
        """Rows without padding, which have no mask; one label a row."""
        import torch

        return {"input_ids": torch.ones(rows, size, dtype=torch.int64), "labels": torch.zeros(rows, dtype=torch.int64)}

    def whole_lengths(self, examples: Examples, processor: Any) -> np.ndarray:
        return np.diff(tokens.tokenized(examples, processor, ENDLESS, words=self.of_words)[2])

    def lost(self, processor: Any) -> str | None:
        return "the end is not read"

    def num_tokens(self, batch: Mapping[str, Tensor]) -> int:
        return int(batch["attention_mask"].sum())


class ByToken(Text):
    """A kind of text with a prediction for every token of a row, flat as the tokens are."""

    def empty(self, data: Encoded, members: int) -> np.ndarray:
        dtype, shape = self.predicted
        return np.zeros((members, len(data.ids), *shape), dtype)

    def place(self, kept: np.ndarray, data: Encoded, rows: np.ndarray, size: int, predicted: np.ndarray) -> None:
        mask = np.arange(size) < data.lengths[rows][:, None]  # (N, size): what is no padding
        kept[:, (data.offsets[rows][:, None] + np.arange(size))[mask]] = predicted[:, mask]
