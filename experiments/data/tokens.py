"""From texts to tokens, and the tokens on disk."""

import hashlib
import io
import itertools
import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rankwise.experiments import files
from rankwise.experiments.data.encoded import Encoded
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data.questions import Questions

FORMAT = 1  # raise it when the tokens kept on disk change their meaning


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 over everything of a fast tokenizer that decides about tokens; not over how it was last called."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    parts = [state, tokenizer.truncation_side, list(tokenizer.model_input_names)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_tokenizer(tokenizer: Any, max_length: int) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"the tokenizer {type(tokenizer).__name__} has no fast version, which is needed here")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 8:
        raise ValueError(f"max_length {max_length!r} must be a whole number of at least 8 tokens")
    if max_length > tokenizer.model_max_length:
        raise ValueError(f"max_length {max_length} is above the {tokenizer.model_max_length} tokens this model takes")


def tokenized(
    examples: Examples, tokenizer: Any, max_length: int, words: bool
) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray | None]:
    """One batch call: what the tokenizer said, and its ids, offsets and types in flat storage."""
    wants_types = "token_type_ids" in tokenizer.model_input_names
    batch = tokenizer(
        examples.first,
        examples.second,
        truncation=True,
        max_length=max_length,
        padding=False,
        is_split_into_words=words,
        return_attention_mask=False,
        return_token_type_ids=wants_types,
        verbose=False,
    )
    rows = batch["input_ids"]
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    if not lengths.all():
        raise ValueError(f"example {int(np.argmin(lengths)) + 1} has no tokens at all")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = _flat(rows, np.int32, offsets[-1])
    return batch, ids, offsets, _flat(batch["token_type_ids"], np.int8, offsets[-1]) if wants_types else None


def _flat(rows: Iterable[Iterable[int]], dtype: type, total: int) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(rows), dtype=dtype, count=int(total))


def read(path: Path, max_length: int, is_by_token: bool) -> Encoded | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            types = file.get("token_type_ids")
            questions = Questions.from_arrays(file) if "question_texts" in file else None
            return Encoded(file["ids"], file["offsets"], types, file["labels"], max_length, is_by_token, questions)
    except FileNotFoundError:
        return None
    except Exception:  # whatever a damaged archive raises: make it anew
        return None


def write(path: Path, encoded: Encoded) -> None:
    arrays = {"ids": encoded.ids, "offsets": encoded.offsets, "labels": encoded.labels}
    if encoded.token_type_ids is not None:
        arrays["token_type_ids"] = encoded.token_type_ids
    if encoded.questions is not None:
        arrays |= encoded.questions.arrays()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    try:
        files.write_file(path, buffer.getvalue())
    except OSError as error:  # the tokens are in memory; only the next start is slower
        with suppress(OSError):
            print(f"tokens are not kept: {error.strerror or error} in {path.parent}", file=sys.stderr)
