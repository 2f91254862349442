"""What kinds over language models share: a prompt and what is scored after it, losses by token, no head of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from rankwise.experiments.data import tokens
from rankwise.experiments.data.encoded import IGNORED, Encoded, joined
from rankwise.experiments.kinds.interface import Seen
from rankwise.experiments.kinds.text import Text, texts_of
from rankwise.experiments.kinds.token_losses import all_token_losses, token_losses
from torch import Tensor


class LanguageModel(Text):
    """A kind whose loss is that of tokens. Labels (K*N, L), -100 where no token is scored, as at the first place of a row.

    What the loss reads in place of logits are the losses of the tokens, (K*N, L): see `token_losses`.
    """

    auto_class = "AutoModelForCausalLM"

    def model_class(self, config: Any) -> str:
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        if config.is_encoder_decoder:
            raise ValueError("it is an encoder-decoder, which kind = generation takes; this kind takes a decoder")
        if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
            raise ValueError("it is an encoder, whose tokens see those after them: take a decoder, such as GPT-2 or Llama")
        return self.auto_class

    def model_settings(self, num_labels: int) -> dict[str, Any]:
        return {}

    def head_names(self, model: Any, missing: Any = ()) -> list[str]:
        """None: the output layer comes with the checkpoint, tied to the embeddings or not, and stays frozen."""
        return []

    def fit(self, processor: Any, config: Any) -> None:
        if processor.eos_token is None:
            raise ValueError("its tokenizer has no end-of-text token (eos_token), at which generation stops")
        super().fit(processor, config)

    def encode_split(self, task: Any, split: str, processor: Any, max_length: int) -> Encoded:
        """The tokens of a split, made at each start: texts to score against have to be read for it anyway."""
        tokens.check_tokenizer(processor, max_length)
        return joined(self.encode(piece, processor, max_length) for piece in self.pieces(task, split))

    def seen(self, data: Encoded, row: int, processor: Any, labels: Sequence[str]) -> list[Seen]:
        own = slice(data.offsets[row], data.offsets[row + 1])
        return [Seen(texts_of(processor, data.ids[own]), tuple((data.labels[own] != IGNORED).tolist()))]

    def training_losses(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, members: int) -> Tensor:
        return self.losses(token_losses(model, inputs, labels), labels, members)

    def example(self, config: Any, num_labels: int, rows: int, size: int) -> dict[str, Tensor]:
        """Rows of which every token is scored, which is the most that can be."""
        batch = super().example(config, num_labels, rows, size)
        return {**batch, "labels": batch["input_ids"].clone()}

    def example_losses(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, members: int) -> tuple[Tensor, int]:
        losses, logits = all_token_losses(model, inputs, labels)
        return losses.reshape(members, -1).mean(1), logits

    def losses(self, logits: Tensor, labels: Tensor, members: int) -> Tensor:
        """logits: of these kinds the losses of the tokens, (K*N, L)."""
        return logits.reshape(members, -1).sum(1) / self.counts(labels, members).clamp_min(1)

    def counts(self, labels: Tensor, members: int) -> Tensor:
        return (labels != IGNORED).reshape(members, -1).sum(1)


@dataclass(frozen=True, eq=False)
class Prompted(Encoded):
    """Rows of a prompt and what is scored after it, flat: labels are the ids, -100 at the prompt.

    prompts: (n,) tokens of each row's prompt. references: the texts that a row's prediction may be.
    max_new_tokens: so many a model may generate, the same for every row of the split.
    is_apart: an encoder-decoder's rows, which go into the model as a source and a target, and not one after the other.
    """

    prompts: np.ndarray | None = None
    references: tuple[tuple[str, ...], ...] = ()
    max_new_tokens: int = 0
    is_apart: bool = False

    @property
    def truth(self) -> tuple[Any, None]:
        return self.references, None

    def select(self, rows: Sequence[int] | np.ndarray) -> "Prompted":
        rows = np.asarray(rows, dtype=np.int64)
        part = super().select(rows)
        own = {"prompts": self.prompts[rows], "references": tuple(self.references[row] for row in rows)}
        return replace(self, ids=part.ids, offsets=part.offsets, labels=part.labels, **own)

    def parts(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The prompt and what is scored after it, of one row."""
        start, end = self.offsets[row : row + 2]
        middle = start + self.prompts[row]
        return self.ids[start:middle], self.ids[middle:end]


def flat(prompts: Sequence[Sequence[int]], scored: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """ids, offsets, labels and prompts of `Prompted`."""
    rows = [[*prompt, *after] for prompt, after in zip(prompts, scored, strict=True)]
    labels = [[IGNORED] * len(prompt) + list(after) for prompt, after in zip(prompts, scored, strict=True)]
    return {
        "ids": np.fromiter(chain.from_iterable(rows), dtype=np.int32),
        "offsets": np.cumsum([0, *map(len, rows)], dtype=np.int64),
        "labels": np.fromiter(chain.from_iterable(labels), dtype=np.int64),
        "prompts": np.array([len(prompt) for prompt in prompts], dtype=np.int64),
    }


def padded(rows: Sequence[np.ndarray], size: int, filler: int, on_left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids brought to one size, and the mask (rows, size) of what is no padding."""
    ids, mask = np.full((len(rows), size), filler, np.int64), np.zeros((len(rows), size), np.int64)
    for at, row in enumerate(rows):
        own = slice(size - len(row), size) if on_left else slice(0, len(row))
        ids[at, own], mask[at, own] = row, 1
    return ids, mask


def starts(processor: Any) -> list[int]:
    """The token that the tokenizer begins every text with, if it does."""
    bos = processor.bos_token_id
    return [bos] if bos is not None and processor("a")["input_ids"][:1] == [bos] else []


def continued(processor: Any, prompts: Sequence[str], texts: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of prompts and of the texts that follow them, as a model sees them one after the other.

    The blank between a prompt and its text belongs to the text, because tokenizers have it so (" Paris" is one token), and a
    prompt that ends in one could not be gone on with: it is put there where neither has one, and moved where the prompt ends
    in blanks.  The tokens of a text are those of both together after the prompt's, or, where the border falls inside a token,
    those of the text alone.
    """
    before = [prompt.rstrip(" ") for prompt in prompts]
    blanks = [prompt[len(cut) :] for prompt, cut in zip(prompts, before, strict=True)]
    after = [
        blank + text if blank or not cut or cut[-1].isspace() or text[:1].isspace() else f" {text}"
        for cut, blank, text in zip(before, blanks, texts, strict=True)
    ]
    whole = [cut + text for cut, text in zip(before, after, strict=True)]
    of_prompts, of_both, of_texts = (_plain_tokens(processor, some) for some in (before, whole, after))
    rest = [
        both[len(prompt) :] if both[: len(prompt)] == prompt else text
        for prompt, both, text in zip(of_prompts, of_both, of_texts, strict=True)
    ]
    return _begun(of_prompts, starts(processor)), rest


def as_text(processor: Any, prompt: Any) -> str:
    """A prompt, or the turns of a chat ({"role", "content"} each) as the tokenizer's template writes them for a next answer.

    Raises:
        ValueError: a chat, and the tokenizer has no template, or one that does not take it.
    """
    import jinja2

    if isinstance(prompt, str):
        return prompt
    if not getattr(processor, "chat_template", None):
        raise ValueError("the rows are chats, and the model's tokenizer has no chat template: take a model tuned on chats")
    turns = [dict(turn) for turn in prompt]
    try:
        return processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:  # also what a template raises by itself, as of a role that it does not know
        roles = ", ".join(turn["role"] for turn in turns)
        raise ValueError(
            f"the chat template of the model's tokenizer does not take turns of {roles} ({' '.join(str(error).split())}): "
            f"write the chats as it wants them, or take another model"
        ) from None


def prompt_tokens(processor: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Tokens of prompts that a decoder is to go on with, as `continued` has them."""
    return _begun(_plain_tokens(processor, [prompt.rstrip(" ") for prompt in prompts]), starts(processor))


def _plain_tokens(processor: Any, texts: Sequence[str]) -> list[list[int]]:
    return processor(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _begun(prompts: Sequence[list[int]], first: list[int]) -> list[list[int]]:
    """Prompts after the token that begins every text, which a chat template has written already."""
    return [prompt if prompt[: len(first)] == first else first + prompt for prompt in prompts]


def cut_left(prompt: Sequence[int], room: int, first: Sequence[int]) -> list[int]:
    """The end of a prompt, which stands next to what is asked for; the token that begins every text stays."""
    if len(prompt) <= room:
        return list(prompt)
    return [*first, *prompt[len(prompt) - room + len(first) :]] if room > len(first) else list(prompt[len(prompt) - room :])
