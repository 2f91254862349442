"""Texts that a language model generates, greedily or sampled, the same whoever shares the batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rankwise.variants.adapter.shards import is_sharded
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    keys: of each row of the batch what its draws depend on, and nothing else: (a member's seed, the row's number), say.
    top_p: tokens are drawn among the likeliest that have this probability together.
    """

    keys: Sequence[tuple[int, ...]]
    temperature: float = 1.0
    top_p: float = 1.0


def generated(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    end: Sequence[int],
    sampling: Sampling | None = None,
) -> Tensor:
    """(rows, max_new_tokens): what the model goes on with, padded after its end of text; greedy where no sampling is given.

    ids, mask: (rows, L), of a decoder padded on the left.  end: tokens that end a text; those that the model's own generation
    settings name end it too.  Other settings of the model's (penalties, forced tokens) stay; beams are off.
    """
    pad = model.config.pad_token_id
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        max_length=None,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        early_stopping=False,
        eos_token_id=all_ends(model, end),
        pad_token_id=pad,
        synced_gpus=is_sharded(model),  # then every process takes as many steps: each layer is gathered by all, or by none
        logits_processor=None if sampling is None else _draws(sampling),
    )
    made = made[:, 1 if model.config.is_encoder_decoder else ids.shape[1] :]
    return F.pad(made, (0, max_new_tokens - made.shape[1]), value=pad)


def all_ends(model: Any, end: Sequence[int]) -> list[int]:
    """Tokens that end a text of this model: these, and those that its own generation settings name."""
    known = model.generation_config.eos_token_id
    return sorted({*end, *([] if known is None else known if isinstance(known, list) else [known])})


def _draws(sampling: Sampling) -> Any:
    """Temperature, top-p, then Gumbel noise: the greatest of the sums is a draw from the softmax (Gumbel's trick)."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    steps = LogitsProcessorList()
    if sampling.temperature != 1:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    steps.append(_Gumbel(sampling.keys))
    return steps


class _Gumbel:
    """Adds to every logit a draw that depends on the row's key and the number of tokens that were generated, alone."""

    def __init__(self, keys: Sequence[tuple[int, ...]]):
        self.keys, self.step = keys, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = np.stack([np.random.default_rng([*key, self.step]).gumbel(size=scores.shape[1]) for key in self.keys])
        self.step += 1
        return scores + torch.from_numpy(noise).to(scores)
