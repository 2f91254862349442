"""What a model with a trained adapter gives, of any adapter's folder, ours or PEFT's: texts, or a classifier's labels.

`find`, `kind_of` and `read_prompts` look without torch, so that what cannot be done is refused early; `generate` and `classify`
do it.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rankwise.experiments import export, tasks
from rankwise.variants.settings import nearest

Prompt = str | tuple[dict[str, str], ...]  # a text, or the turns of a chat
FIELDS = ("prompt", "instruction", "question", "input", "text", "sentence")  # the first of them that a file has is its prompt
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"))  # that a classifier reads together


@dataclass(frozen=True)
class Generated:
    """One text. tokens: generated, the end of text not counted. is_finished: the model ended it, and not the limit.

    adapter: its name, where several stand side by side.
    """

    prompt: str
    text: str
    tokens: int
    is_finished: bool
    adapter: str | None = None

    def as_row(self, number: int) -> dict[str, Any]:
        return {"row": number, **{key: value for key, value in asdict(self).items() if key != "adapter" or value is not None}}


@dataclass(frozen=True)
class Classified:
    """One row's class with the probability of each, or of a regression its value, in the unit of the targets.

    label: where classes do not exclude each other all of a probability above a half, with commas between.
    """

    prompt: str
    label: str | None = None
    scores: dict[str, float] | None = None
    value: float | None = None
    pair: str | None = None
    adapter: str | None = None

    def as_row(self, number: int) -> dict[str, Any]:
        return {"row": number, **{key: value for key, value in asdict(self).items() if value is not None}}

    @property
    def text(self) -> str:
        if self.label is None:
            return f"{self.value:.6g}"
        scores = self.scores or {}
        return f"{self.label} ({scores[self.label]:.3f})" if self.label in scores else self.label or "(no label)"


def find(path: Path, model: str | None = None) -> export.Source:
    """
    Args:
        path: a run's folder, or an adapter's.
        model: name of the base, where another than the one that `path` names is wanted.

    Raises:
        ValueError: no adapter there, no base model to be told, or an adapter of a model that gives neither texts nor classes.
    """
    source = export.find(path, "merged", model)
    if kind_of(source) not in ("generation", "classification"):
        what = source.model_class or f"a model for {kind_of(source)}"
        raise ValueError(
            f"{path} is an adapter of {what}, which gives neither texts nor the class of a text: name one of a language model, "
            f"or of a classifier"
        )
    return source


def kind_of(source: export.Source) -> str:
    """ "generation", of every language model; "classification", of whatever gives classes or a number for a text; or another.

    Raises:
        ValueError: a run whose task is not to be told.
    """
    if source.run is not None:
        kind = tasks.outputs_of_run(source.adapter.parent, source.run).kind
        if kind in ("regression", "multi-label"):
            return "classification"
        return "generation" if kind in ("choice", "language-modelling") else kind
    known = source.model_class or ""
    if "SequenceClassification" in known:
        return "classification"
    others = ("TokenClassification", "QuestionAnswering", "ImageClassification", "MultipleChoice")
    return next((word for word in others if word in known), "generation")


def read_pairs(where: str) -> tuple[list[str], list[str], str] | None:
    """The pairs of texts in a file, and the names of their fields; None where it has none of the usual names."""
    from rankwise.experiments.tasks import own

    table = own.load(where)
    pair = next((pair for pair in PAIRS if set(pair) <= set(table.column_names)), None)
    if pair is None:
        return None
    first, second = (list(map(str, table[name])) for name in pair)
    return first, second, " and ".join(pair)


def find_several(named: Sequence[str], model: str | None = None) -> dict[str, export.Source]:
    """The adapters of "NAME=FOLDER" words, by name.

    Raises:
        ValueError: as `find`; a word of another form, a name that comes twice, or adapters of several base models.
    """
    sources: dict[str, export.Source] = {}
    for word in named:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--adapter {word}: give NAME=FOLDER")
        if name in sources:
            raise ValueError(f"--adapter {word}: {name} is given twice; give each adapter a name of its own")
        sources[name] = find(Path(folder), model)
        if kind_of(sources[name]) != "generation":
            raise ValueError(f"--adapter {word}: it generates no text: give classifiers one at a time, without --adapter")
    bases = {(source.model, str(source.scheme)): name for name, source in sources.items()}
    if len(bases) > 1:
        ((one, scheme), first), ((other, another), second), *_ = bases.items()
        if one == other:
            raise ValueError(f"{first} was trained on {one} as {scheme}, and {second} as {another}: give one at a time")
        raise ValueError(
            f"{first} is an adapter of {one} and {second} of {other}: side by side they need one base; or give --model"
        )
    return sources


def read_prompts(where: str, field: str | None = None, has_chats: bool = False) -> tuple[list[Prompt], str]:
    """The prompts in a file, and the name of the field that they are read from.

    field: or a template of fields, "{instruction}\\n{input}".  If not given these two where both are there, as a study's
    own data are read; else the first of `FIELDS`.
    has_chats: a field "messages" may be read, each chat without the answer that it ends with.

    Raises:
        ValueError: a file that cannot be read, a field that is not there, or a row without a prompt.
    """
    from rankwise.experiments.tasks import own

    table = own.load(where)
    columns = table.column_names
    if field is None and has_chats and "messages" in columns:
        return [_asked(messages, f"{where}, row {row}") for row, messages in enumerate(table["messages"], start=1)], "messages"
    both = field is None and {"instruction", "input"} <= set(columns)
    if both:
        field = "{instruction}\n{input}"
    if field is None:
        field = next((name for name in FIELDS if name in columns), None)
        if field is None:
            raise ValueError(f"{where}: none of its fields {', '.join(columns)} is a usual prompt: name one with --input")
    template = "{" + field + "}" if field in columns else field
    if template == field and "{" not in field:
        raise ValueError(f'--input "{field}": no field of {where}{nearest(field, columns)}; there are: {", ".join(columns)}')
    try:
        template.format_map(dict.fromkeys(columns, ""))
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f'--input "{field}": {error} is no field of {where}; there are: {", ".join(columns)}; write a brace as {{{{'
        ) from None
    prompts: list[Prompt] = []
    rows = own.Rows(table, own.Reading("generation", "", template, template))
    for number, row in enumerate(rows.checked(), start=1):
        if isinstance(row, ValueError):
            raise ValueError(rows.said(number, where, row))
        prompts.append(str(row.input))
    return prompts, "instruction + input" if both else field


def _asked(messages: Any, where: str) -> tuple[dict[str, str], ...]:
    """The turns of a chat up to the one that is to be answered."""
    from rankwise.experiments.tasks import own

    try:
        turns = own.chat_turns(messages)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise ValueError(f"{where}: a chat without a turn to answer: write one, or take the row out")
    return tuple(turns)


def generate(
    source: export.Source | Mapping[str, export.Source],
    prompts: Sequence[Prompt],
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

    prompts: a chat is written by the chat template of the model's tokenizer.
    source: or several by name, of one base: every prompt is gone on with by each, in mixed batches.
    progress: called with the rows done since the last call.

    Raises:
        ValueError: the model is no language model, the adapter does not fit it, or a prompt is too long for it.
        OSError: the base model could not be obtained.
    """
    import numpy as np
    import torch
    from rankwise import variants
    from rankwise.experiments import kinds, measure, models
    from rankwise.experiments.kinds.decoding import Sampling, all_ends, generated
    from rankwise.experiments.kinds.language import as_text, padded, prompt_tokens
    from rankwise.experiments.training.evaluation import AT_REST, autocast
    from rankwise.variants.adapter.step import CannotMerge

    sources = {None: source} if isinstance(source, export.Source) else dict(source)
    base = next(iter(sources.values()))
    where = measure.device(device)
    precision = measure.precision("auto", where) if where.type == "cuda" else base.precision
    task = SimpleNamespace(kind="generation", num_labels=0)
    model, processor, info = models.load(base.model, task, precision, str(where), quantization=base.scheme)
    bank = None
    with models.quiet():
        if isinstance(source, export.Source):
            adapter = variants.load_pretrained(model, source.adapter)
            adapter.begin(AT_REST, training=False)
            if precision == "fp32" and adapter.mergeable and info.quantization is None:
                with contextlib.suppress(CannotMerge):
                    adapter.merge()
        else:
            bank = variants.Bank(model)
            for name, one in source.items():
                bank.load(name, one.adapter)
    is_seq2seq = processor.is_encoder_decoder
    prompts = [as_text(processor, prompt) for prompt in prompts]
    ids = processor(prompts)["input_ids"] if is_seq2seq else prompt_tokens(processor, prompts)
    _check_lengths(ids, models.longest_input(model), 0 if is_seq2seq else max_new_tokens)
    asked: list[tuple[int, str | None]] = [(row, name) for row in range(len(prompts)) for name in sources]
    texts: dict[int, Generated] = {}
    order = np.argsort([len(ids[row]) for row, _ in asked], kind="stable")
    kind, end = kinds.get("generation"), processor.eos_token_id
    for at in range(0, len(order), batch_size):
        places: list[int] = order[at : at + batch_size].tolist()
        rows, names = [asked[place][0] for place in places], [asked[place][1] for place in places]
        batch = [np.array(ids[row]) for row in rows]
        arrays = padded(batch, max(map(len, batch)), processor.pad_token_id, on_left=not is_seq2seq)
        inputs, mask = (torch.from_numpy(array).to(where) for array in arrays)
        sampling = None if temperature is None else Sampling([(seed, row) for row in rows], temperature, top_p)
        rows_of = contextlib.nullcontext() if bank is None else bank.mixed(names)
        with torch.no_grad(), autocast(where, precision), rows_of:
            tokens = generated(model, inputs, mask, max_new_tokens, [end], sampling).cpu().numpy()
        for place, text, made in zip(places, kind.decoded(tokens, processor), tokens, strict=True):
            row, name = asked[place]
            ends = np.flatnonzero(np.isin(made, [*all_ends(model, [end]), processor.pad_token_id]))
            length = int(ends[0]) if len(ends) else len(made)
            texts[place] = Generated(prompts[row], text, length, bool(len(ends)), name)
        progress(len(rows))
    return [texts[place] for place in range(len(asked))]


def classify(
    source: export.Source,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    batch_size: int = 8,
    device: str = "auto",
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[list[Classified], int, int]:
    """The class, or the number, that a classifier gives each text; how many texts were cut, and at how many tokens.

    Classes have the names of the run's labels, or those that the base model's configuration has for them.  A run's texts are
    cut where its training's were.

    Raises:
        ValueError: the adapter does not fit the model, or this has no tokenizer.
        OSError: the base model could not be obtained.
    """
    import numpy as np
    import torch
    from rankwise import variants
    from rankwise.experiments import kinds, measure, models
    from rankwise.experiments.training.evaluation import AT_REST, autocast
    from rankwise.variants.adapter.kinds.quantised import scheme_of

    where = measure.device(device)
    model, processor = export.load(source, whole=False, device=str(where))
    if processor is None:
        raise ValueError(f"{source.model} has no tokenizer: name a copy that has one with --model")
    is_exclusive = model.config.problem_type != "multi_label_classification"
    kinds.get("classification").fit(processor, model.config)
    with models.quiet():
        adapter = variants.load_pretrained(model, source.adapter)
    if scheme_of(model) is None:  # a quantised one stays where it was read
        model.to(where)
    model.eval()
    adapter.begin(AT_REST, training=False)
    mean, deviation = (0.0, 1.0) if source.run is None else tasks.outputs_of_run(source.adapter.parent, source.run).scale
    trained = None if source.run is None else source.run.get("training", {}).get("max_length")
    longest = min(one for one in (trained, models.longest_input(model), processor.model_max_length) if one is not None)
    whole = processor(list(texts), None if pairs is None else list(pairs), verbose=False)["input_ids"]
    lengths = np.array([len(ids) for ids in whole])
    made: dict[int, Classified] = {}
    order = np.argsort(lengths, kind="stable")
    for at in range(0, len(order), batch_size):
        rows = [int(row) for row in order[at : at + batch_size]]
        second = None if pairs is None else [pairs[row] for row in rows]
        batch = processor(
            [texts[row] for row in rows], second, truncation=True, max_length=longest, padding=True, return_tensors="pt"
        )
        with torch.no_grad(), autocast(model.device, source.precision):
            logits = model(**batch.to(model.device)).logits.double().cpu()
        for row, values in zip(rows, logits, strict=True):
            pair = None if pairs is None else pairs[row]
            if len(values) == 1 and is_exclusive:
                made[row] = Classified(texts[row], value=values.item() * deviation + mean, pair=pair)
                continue
            shares = (values.softmax(-1) if is_exclusive else values.sigmoid()).tolist()
            scores = {model.config.id2label[index]: share for index, share in enumerate(shares)}
            likely = (
                [max(scores, key=scores.__getitem__)] if is_exclusive else [n for n, share in scores.items() if share > 0.5]
            )
            made[row] = Classified(texts[row], ", ".join(likely), scores, pair=pair)
        progress(len(rows))
    return [made[row] for row in range(len(texts))], int((lengths > longest).sum()), longest


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
