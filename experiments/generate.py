"""Texts that a model with a trained adapter generates, of any adapter's folder, ours or PEFT's.

`find` and `read_prompts` look without torch, so that what cannot be done is refused early; `generate` does it.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rankwise.experiments import export
from rankwise.variants.settings import nearest

FIELDS = ("prompt", "instruction", "question", "input", "text")  # the first of them that a file has is its prompt


@dataclass(frozen=True)
class Generated:
    """One text. tokens: generated, the end of text not counted. is_finished: the model ended it, and not the limit."""

    prompt: str
    text: str
    tokens: int
    is_finished: bool

    def as_row(self, number: int) -> dict[str, Any]:
        return {"row": number, **asdict(self)}


def find(path: Path, model: str | None = None) -> export.Source:
    """
    Args:
        path: a run's folder, or an adapter's.
        model: name of the base, where another than the one that `path` names is wanted.

    Raises:
        ValueError: no adapter there, no base model to be told, or an adapter of a model that generates no text.
    """
    source = export.find(path, "merged", model)
    if any(word in (source.model_class or "") for word in ("Classification", "QuestionAnswering")):
        raise ValueError(f"{path} is an adapter of {source.model_class}, which generates no text: name one of a language model")
    return source


def read_prompts(where: str, field: str | None = None) -> tuple[list[str], str]:
    """The prompts in a file, and the name of the field that they are read from.

    field: or a template of fields, "{instruction}\\n{input}".

    Raises:
        ValueError: a file that cannot be read, or a field that is not there.
    """
    from rankwise.experiments.tasks import own

    table = own.load(where)
    columns = table.column_names
    if field is None:
        field = next((name for name in FIELDS if name in columns), None)
        if field is None:
            raise ValueError(f"{where}: none of its fields {', '.join(columns)} is a usual prompt: name one with --input")
    template = "{" + field + "}" if field in columns else field
    if template == field and "{" not in field:
        raise ValueError(f'--input "{field}": no field of {where}{nearest(field, columns)}; there are: {", ".join(columns)}')
    try:
        prompts = [template.format_map(row) for row in table]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f'--input "{field}": {error} is no field of {where}; there are: {", ".join(columns)}; write a brace as {{{{'
        ) from None
    empty = next((number for number, prompt in enumerate(prompts, start=1) if not prompt.strip()), None)
    if empty is not None:
        raise ValueError(f"{where}, row {empty}: the prompt is empty: fill it, or take the row out")
    return prompts, field


def generate(
    source: export.Source,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    batch_size: int = 8,
    temperature: float | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Generated]:
    """What follows each prompt: greedily, or drawn where a temperature is given, each row by (seed, its number) alone.

    progress: called with the rows done since the last call.

    Raises:
        ValueError: the model is no language model, the adapter does not fit it, or a prompt is too long for it.
        OSError: the base model could not be obtained.
    """
    import numpy as np
    import torch
    from rankwise import variants
    from rankwise.experiments import kinds, measure, models
    from rankwise.experiments.kinds.decoding import Sampling, generated
    from rankwise.experiments.kinds.language import padded, prompt_tokens
    from rankwise.experiments.training.evaluation import AT_REST, autocast
    from rankwise.variants.adapter.step import CannotMerge

    where = measure.device(device)
    precision = measure.precision("auto", where) if where.type == "cuda" else source.precision
    task = SimpleNamespace(kind="generation", num_labels=0)
    model, processor, info = models.load(source.model, task, precision, str(where), quantization=source.scheme)
    with models.quiet():
        adapter = variants.load_pretrained(model, source.adapter)
    adapter.begin(AT_REST, training=False)
    if precision == "fp32" and adapter.mergeable and info.quantization is None:
        with contextlib.suppress(CannotMerge):
            adapter.merge()
    is_seq2seq = processor.is_encoder_decoder
    ids = processor(list(prompts))["input_ids"] if is_seq2seq else prompt_tokens(processor, prompts)
    _check_lengths(ids, models.longest_input(model), 0 if is_seq2seq else max_new_tokens)
    texts: dict[int, Generated] = {}
    order = np.argsort([len(row) for row in ids], kind="stable")
    kind, end = kinds.get("generation"), processor.eos_token_id
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size].tolist()
        batch = [np.array(ids[row]) for row in rows]
        arrays = padded(batch, max(map(len, batch)), processor.pad_token_id, on_left=not is_seq2seq)
        inputs, mask = (torch.from_numpy(array).to(where) for array in arrays)
        sampling = None if temperature is None else Sampling([(seed, row) for row in rows], temperature, top_p)
        with torch.no_grad(), autocast(where, precision):
            tokens = generated(model, inputs, mask, max_new_tokens, [end], sampling).cpu().numpy()
        for row, text, made in zip(rows, kind.decoded(tokens, processor), tokens, strict=True):
            ends = np.flatnonzero(np.isin(made, [end, processor.pad_token_id]))
            length = int(ends[0]) if len(ends) else len(made)
            texts[row] = Generated(prompts[int(row)], text, length, bool(len(ends)))
        progress(len(rows))
    return [texts[row] for row in range(len(prompts))]


def _check_lengths(ids: Sequence[Sequence[int]], longest: int | None, new: int) -> None:
    for number, row in enumerate(ids, start=1):
        if not row:
            raise ValueError(f"prompt {number} has no tokens: a model goes on from one at least")
        if longest is not None and len(row) + new > longest:
            more = f"with {new} to generate this is" if new else "which is"
            raise ValueError(
                f"prompt {number} has {len(row)} tokens, {more} above the {longest} tokens this model takes: "
                f"shorten it{', or lower --max-new-tokens' if new else ''}"
            )
