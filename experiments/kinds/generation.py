"""Texts that follow a prompt: trained on the target's tokens, asked with the prompt alone, scored as texts.

Decoders (GPT-2, Llama, ...) see the prompt and go on; encoder-decoders (T5, BART) read it and answer.  Examples have the
prompts as `first`, the targets (texts) as `labels`, and, where several answers are right, all of them as `answers`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rankwise.experiments.data import lengths
from rankwise.experiments.data.encoded import IGNORED
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.kinds.decoding import generated
from rankwise.experiments.kinds.interface import Planned, Seen
from rankwise.experiments.kinds.language import LanguageModel, Prompted, as_text, continued, cut_left, flat, padded, starts
from rankwise.experiments.kinds.predictions import texts_as_bytes
from rankwise.experiments.kinds.text import ENDLESS, texts_of
from torch import Tensor

SAMPLES = 5  # rows of a split that a report shows
LONGEST_SAMPLE = 1_000  # characters of a text in a report
ASKED = ("prompt_ids", "prompt_mask", "max_new_tokens", "end")  # of a batch of an evaluation, what the loss does not take


@dataclass(frozen=True)
class _Sources:
    """What the batches of an encoder-decoder are planned by: (n,) tokens of its sources."""

    lengths: np.ndarray
    max_length: int

    def __len__(self) -> int:
        return len(self.lengths)


class Generation(LanguageModel):
    """One text a row, by the cross-entropy of its tokens and of the end of text after them.

    A prompt that is too long loses its beginning (of an encoder-decoder its end), a target that is too long its end.  When a
    model is asked it may generate as many tokens as the longest target of the split has; of a decoder at most half of
    max_length, and the prompt has the rest.
    """

    predicted = (object, ())

    def model_class(self, config: Any) -> str:
        return "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else super().model_class(config)

    def fit(self, processor: Any, config: Any) -> None:
        super().fit(processor, config)
        processor.is_encoder_decoder = config.is_encoder_decoder  # rows are laid out otherwise for these

    def encode(self, examples: Examples, processor: Any, max_length: int) -> Prompted:
        """
        Raises:
            ValueError: a prompt without tokens.
        """
        is_apart = getattr(processor, "is_encoder_decoder", False)
        texts = [as_text(processor, prompt) for prompt in examples.first]
        prompts, scored = (_apart if is_apart else _in_one)(texts, list(examples.labels), processor, max_length)
        empty = next((row for row, prompt in enumerate(prompts) if not len(prompt)), None)
        if empty is not None:
            raise ValueError(f"example {empty + 1}: its prompt has no tokens; a model goes on from one at least")
        longest = max(map(len, scored))
        return Prompted(
            **flat(prompts, scored),
            token_type_ids=None,
            max_length=max_length,
            is_by_token=True,
            references=tuple(tuple(texts) for texts in examples.answers or [(text,) for text in examples.labels]),
            max_new_tokens=longest if is_apart else min(longest, max_length // 2),
            is_apart=is_apart,
        )

    def whole_lengths(self, examples: Examples, processor: Any) -> np.ndarray:
        """Of a decoder prompt, target and end of text together, of an encoder-decoder the longer of source and target."""
        whole = self.encode(examples, processor, ENDLESS)
        return np.maximum(whole.prompts, whole.lengths - whole.prompts) if whole.is_apart else whole.lengths

    def lost(self, processor: Any) -> str:
        if processor.is_encoder_decoder:
            return "the end of a source, or of a target, is not read"
        return "the beginning of a prompt, or the end of a target, is not read"

    def seen(self, data: Prompted, row: int, processor: Any, labels: Sequence[str]) -> list[Seen]:
        if not data.is_apart:
            return super().seen(data, row, processor, labels)
        source, target = (texts_of(processor, ids) for ids in data.parts(row))
        return [Seen(source, (False,) * len(source), "source"), Seen(target, (True,) * len(target), "target")]

    def plan(self, data: Prompted, batch_size: int, seed: int, epoch: int) -> list[Planned]:
        return lengths.batches(_planned(data), batch_size, seed, epoch)

    def evaluation_plan(self, data: Prompted, batch_size: int) -> list[Planned]:
        return lengths.evaluation_batches(_planned(data), batch_size)

    def collate(self, data: Prompted, rows: np.ndarray, size: int, processor: Any) -> dict[str, np.ndarray]:
        if not data.is_apart:
            return super().collate(data, rows, size, processor)
        sources, targets = zip(*(data.parts(row) for row in rows), strict=True)
        ids, mask = padded(sources, size, processor.pad_token_id)
        # As long as the longest target of the split: the same for every member and seed, whichever rows they have.
        labels, _ = padded(targets, data.max_new_tokens, IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def collate_evaluation(self, data: Prompted, rows: np.ndarray, size: int, processor: Any) -> dict[str, np.ndarray]:
        """A batch to train on, which the loss is taken of, and beside it the prompts alone: of a decoder padded on the left."""
        batch = self.collate(data, rows, size, processor)
        prompts = [data.parts(row)[0] for row in rows]
        if not data.is_apart:
            room, first = data.max_length - data.max_new_tokens, starts(processor)
            prompts = [np.array(cut_left(prompt.tolist(), room, first)) for prompt in prompts]
        longest = lengths.planned_length(max(map(len, prompts)), data.max_length)
        ids, mask = padded(prompts, longest, processor.pad_token_id, on_left=not data.is_apart)
        every = np.ones(len(rows), np.int64)
        asked = (ids, mask, data.max_new_tokens * every, processor.eos_token_id * every)
        return {**batch, **dict(zip(ASKED, asked, strict=True))}

    def outputs(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """(K*N, T): tokens that the model generates."""
        ids, mask, limit, end = (inputs[name] for name in ASKED)
        return generated(model, ids, mask, int(limit[0]), [int(end[0])])

    def evaluation_losses(
        self, model: Any, inputs: Mapping[str, Tensor], outputs: Tensor, labels: Tensor, members: int
    ) -> Tensor:
        return self.training_losses(model, {k: v for k, v in inputs.items() if k not in ASKED}, labels, members)

    def predictions(self, outputs: Tensor) -> Tensor:
        return outputs

    def decoded(self, predicted: np.ndarray, processor: Any) -> np.ndarray:
        """Tokens (K*N, T) as texts (K*N,), without special tokens, and blanks at the ends."""
        texts = processor.batch_decode(predicted, skip_special_tokens=True)
        return np.array([text.strip() for text in texts], dtype=object)

    def scored(self, predictions: Any, labels: Any, offsets: None) -> tuple[tuple, int]:
        """The texts, and for each those that are right."""
        if len(predictions) != len(labels):
            raise ValueError(f"{len(predictions)} predictions for {len(labels)} targets")
        return (list(predictions), list(labels)), len(labels)

    def samples(self, data: Prompted, predictions: np.ndarray, processor: Any) -> list[dict[str, Any]]:
        """Rows at equal distances, the first and the last among them; prompts as the model reads them."""
        rows = np.unique(np.linspace(0, len(data) - 1, SAMPLES).round().astype(int)).tolist()
        prompts = processor.batch_decode([data.parts(row)[0] for row in rows], skip_special_tokens=True)
        return [
            {
                "row": row + 1,
                "prompt": _end(prompt.strip()),
                "target": _beginning(data.references[row][0]),
                "text": _beginning(predictions[row]),
            }
            for row, prompt in zip(rows, prompts, strict=True)
        ]

    def stored(self, predictions: np.ndarray) -> dict[str, np.ndarray]:
        return texts_as_bytes(predictions)


def _in_one(prompts: list[str], targets: list[str], processor: Any, max_length: int) -> tuple[list[list[int]], list[list[int]]]:
    """For a decoder: prompt, then target and end of text, in max_length tokens together."""
    before, after = continued(processor, prompts, targets)
    after = [[*ids[: max_length - 2], processor.eos_token_id] for ids in after]
    first = starts(processor)
    return [cut_left(p, max_length - len(t), first) for p, t in zip(before, after, strict=True)], after


def _apart(prompts: list[str], targets: list[str], processor: Any, max_length: int) -> tuple[list[list[int]], list[list[int]]]:
    """For an encoder-decoder: source and target with their own special tokens, max_length tokens each."""
    options = {"return_attention_mask": False, "verbose": False, "truncation": True, "max_length": max_length}
    sources = processor(prompts, **options)["input_ids"]
    answers = processor(text_target=targets, **options)["input_ids"]
    end = processor.eos_token_id
    return sources, [ids if ids[-1:] == [end] else [*ids[: max_length - 1], end] for ids in answers]


def _beginning(text: str) -> str:
    return text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE]} ..."


def _end(text: str) -> str:
    return text if len(text) <= LONGEST_SAMPLE else f"... {text[-LONGEST_SAMPLE:]}"


def _planned(data: Prompted) -> Any:
    return _Sources(data.prompts, data.max_length) if data.is_apart else data
