"""What each truncation of an adapter costs on data: the measured loss and score, beside the whole adapter and its base.

Every truncated adapter is written as `rankwise doctor --fix` writes it, read again, and asked for the same rows.  A row's loss
is that of the kind of task; the mean is over rows, or over all scored tokens of a language model:

    L = sum(n_i l_i) / sum(n_i)        se^2 = N/(N-1) sum(n_i^2 (l_i - L)^2) / sum(n_i)^2

over N rows of n_i tokens (n_i = 1 where a row has one loss).  What a truncation costs is the mean of the differences row by
row, whose error is far smaller than that of each mean.  The base is the model with the adapter's head and no update.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rankwise.experiments import export, tasks
from rankwise.experiments.data_entries import OwnData
from rankwise.experiments.tasks import own_tasks
from rankwise.variants.doctor.reading import ThinAdapter

if TYPE_CHECKING:
    from rankwise.experiments.tasks import OwnTask
    from rankwise.experiments.training.evaluation import Evaluator

ROWS = 128
BASE, WHOLE = "base", "whole"  # beside the criteria's names


@dataclass(frozen=True)
class Measured:
    """Mean loss and score of one adapter on the rows, each with its standard error over rows; None for what is no number.

    difference: of its loss from the whole adapter's, row by row; positive where it is worse.
    """

    loss: float | None
    standard_error: float | None
    difference: float | None
    difference_standard_error: float | None
    score: float | None
    score_standard_error: float | None


def task_for(source: export.Source, data: OwnData) -> "OwnTask":
    """The data as rows for the adapter's model: its labels in the order of the model's outputs, every row of the file.

    Raises:
        ValueError: data that cannot be read, or of another kind than the adapter's task.
    """
    data = data.model_copy(update={"test": data.train, "validation": data.train})  # nothing is set aside
    if source.run is not None:
        own = tasks.outputs_of_run(source.adapter.parent, source.run)
        task = own_tasks.task(data, own.label_names, own.scale)
        if task.kind != own.kind:
            raise ValueError(
                f"{data.train} is read as {task.kind}, and the adapter was trained on {own.kind}: name it with --kind, or give "
                f"other data"
            )
        return task
    return own_tasks.task(data, _labels_of(source, data), (0.0, 1.0))


def _labels_of(source: export.Source, data: OwnData) -> tuple[str, ...]:
    """Of an adapter of no run: the names that its base has for a classifier's outputs, or else their numbers.

    Empty where the data's own labels, sorted, are all that is known: there are as many of them, and no names.
    """
    if "Classification" not in (source.model_class or ""):
        return ()
    config = _configuration(source)
    outputs = source.labels or config.num_labels
    names = tuple(str(config.id2label.get(number)) for number in range(outputs))
    found = own_tasks.task(data).label_names
    if not found:
        return ()
    if len(found) > outputs:
        raise ValueError(f"{data.train} has {len(found)} labels ({', '.join(found[:10])}), and the model {outputs} outputs")
    if set(found) <= set(names):
        return names
    numbers = tuple(map(str, range(outputs)))
    return numbers if set(found) <= set(numbers) else ()


def _configuration(source: export.Source) -> Any:
    """
    Raises:
        ValueError: the base model cannot be had, or its configuration cannot be read.
    """
    import transformers
    from rankwise.experiments import sources

    try:
        folder = sources.fetch(source.model)
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except sources.Unavailable as error:
        raise ValueError(f"{error}; name a copy that is at hand with --model") from None
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{source.model} cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def measure(
    source: export.Source,
    adapter: ThinAdapter,
    ranks: Mapping[str, Mapping[str, int]],
    task: "OwnTask",
    rows: int = ROWS,
    batch_size: int = 16,
    device: str = "auto",
    progress: Callable[[str, int], None] = lambda name, of: None,
) -> dict[str, Any]:
    """What `rankwise doctor --json` says under "measured".

    Args:
        ranks: criterion -> site -> how many singular values stay.
        rows: at most so many, a fixed random part of the data.
        progress: called before each evaluation with its name, and how many there are at most.

    Raises:
        ValueError: the adapter does not fit the model or the task, or cannot be written at other ranks.
        OSError: the base model could not be obtained.
    """
    from rankwise import variants
    from rankwise.experiments import kinds, models, own_study
    from rankwise.experiments import measure as machine
    from rankwise.experiments.data.draws import KNOCKOUT_ROWS
    from rankwise.experiments.training.evaluation import Evaluator
    from rankwise.variants.doctor import writing

    where = machine.device(device)
    precision = machine.precision("auto", where) if where.type == "cuda" else source.precision
    _check_kind(source, task)
    model, processor, info = models.load(source.model, task, precision, str(where), quantization=source.scheme)
    lengths = own_study.lengths_of(model, processor, task)
    longest = 0 if lengths is None else lengths.max_length
    if source.run is not None and longest:
        longest = source.run.get("training", {}).get("max_length") or longest
    everything = task.encode(processor, task.score_split, longest)
    data = everything.random_part(rows, KNOCKOUT_ROWS)
    found: dict[str, Any] = {}
    done: dict[tuple, Any] = {}  # criteria that keep the same ranks are one adapter

    def asked(name: str, folder: Path, without_updates: bool = False) -> Any:
        progress(name, len(ranks) + 2)
        with models.quiet():
            one = variants.load_pretrained(model, folder)
        try:
            _check_heads(one, info, model)
            evaluator = Evaluator(one, kinds.get(task.kind), processor, batch_size, precision)
            model.eval()
            with _base_alone(one) if without_updates else _merged(one, evaluator):
                return evaluator.of_rows(data)
        finally:
            one.detach()

    found[WHOLE] = asked(WHOLE, source.adapter)
    found[BASE] = asked(BASE, source.adapter, without_updates=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, kept in ranks.items():
            key = tuple(kept.values())
            if key not in done and not any(key):
                done[key] = found[BASE]
            if key not in done:
                folder = Path(scratch) / name
                writing.truncated(adapter, kept, folder)
                done[key] = asked(name, folder)
            found[name] = done[key]
    results = {name: asdict(_measured(task, data.truth, of_rows, found[WHOLE])) for name, of_rows in found.items()}
    return {
        "data": task.name,
        "model": source.model,
        "kind": task.kind,
        "metric": task.metric,
        "rows": data.num_examples,
        "of_rows": everything.num_examples,
        "max_length": longest or None,
        "labels": list(task.label_names),
        "reading": task.notes[0],
        WHOLE: results.pop(WHOLE),
        BASE: results.pop(BASE),
        "criteria": results,
    }


def mean(losses: np.ndarray, counts: np.ndarray) -> tuple[float | None, float | None]:
    """The mean loss of rows, (n,), each the mean of so many tokens, and its standard error over rows; None for no number."""
    kept = counts > 0  # nothing of a row is scored where its target was cut off
    losses, counts = losses[kept], counts[kept]
    value = float((losses * counts).sum() / counts.sum()) if len(losses) else float("nan")
    if not np.isfinite(value):
        return None, None
    if len(losses) < 2:
        return value, None
    squares = np.square(counts * (losses - value)).sum() * len(losses) / (len(losses) - 1)
    return value, float(np.sqrt(squares) / counts.sum())


def _measured(task: "OwnTask", truth: tuple, of_rows: tuple, whole: tuple) -> Measured:
    from rankwise.experiments.kinds import Undefined

    losses, counts, predicted = of_rows
    loss, error = mean(losses, counts)
    difference, of_difference = mean(losses - whole[0], counts)
    score = score_error = None
    with contextlib.suppress(Undefined):
        if not isinstance(predicted, Undefined):
            score = task.metrics(predicted, *truth)[task.metric]
            score_error = task.standard_error(predicted, *truth)
    return Measured(loss, error, difference, of_difference, score, score_error)


@contextlib.contextmanager
def _base_alone(adapter: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in adapter.changed_weights():
            stack.enter_context(adapter.without(name))
        yield


@contextlib.contextmanager
def _merged(adapter: Any, evaluator: "Evaluator") -> Iterator[None]:
    """While the adapter is merged, where that is quicker and as exact."""
    from rankwise.variants.adapter.step import CannotMerge

    if evaluator.can_merge:
        with contextlib.suppress(CannotMerge):
            adapter.merge()
    try:
        yield
    finally:
        if adapter.is_merged:
            adapter.unmerge()


def _check_kind(source: export.Source, task: "OwnTask") -> None:
    """
    Raises:
        ValueError: the adapter was trained on a model with another head than the data asks for.
    """
    from rankwise.experiments import kinds

    known = source.model_class or ""
    if not known.startswith("AutoModelFor"):
        return
    wanted = kinds.get(task.kind).auto_class
    with contextlib.suppress(ValueError):  # such a model is of no use for that kind
        wanted = kinds.get(task.kind).model_class(_configuration(source))
    if known != wanted:
        raise ValueError(
            f"the data is read as {task.kind}, which asks an {wanted}, and the adapter is of an {known}: name the kind with "
            f"--kind, or give other data"
        )


def _check_heads(adapter: Any, info: Any, model: Any) -> None:
    """
    Raises:
        ValueError: a head that neither the adapter nor the model's files hold: it would answer at random.
    """
    from rankwise.variants.doctor.stored import Stored

    known: dict[str, tuple[int, ...]] = {}
    for file in sorted(info.folder.glob("*.safetensors")):
        known |= Stored(file).shapes
    for head in info.heads:
        if any(head == own or head.startswith(f"{own}.") or own.startswith(f"{head}.") for own in adapter.head_names):
            continue
        parameters = {f"{head}.{name}": tuple(p.shape) for name, p in model.get_submodule(head).named_parameters()}
        if any(known.get(name) != shape for name, shape in parameters.items()):
            raise ValueError(
                f"{head} is neither in the adapter nor, with these outputs, in {info.id}: it would answer at random"
            )
