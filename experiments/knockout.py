"""What each site's rank is worth: the measured loss and score when its change is taken out.

For each site in turn dW = 0 there, everything else stays as it was trained, and the same rows are evaluated again.  What an
allocator believed of a site (sites.json, `importance`) can be held against what its removal costs; nothing is trained.

36 sites are 36 evaluations, so the rows are a fixed random part of the selection split, `ROWS` of them, the same for every run
of a task.  The score of the whole split is not to be compared with these.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rankwise import variants
from rankwise.experiments import kinds, models, records
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.data.draws import KNOCKOUT_ROWS, SUBSET
from rankwise.experiments.kinds import Undefined
from rankwise.experiments.tasks import Task
from rankwise.experiments.tasks import of_run as task_of_run
from rankwise.experiments.training.evaluation import Evaluator
from rankwise.experiments.training.outcomes import score
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.kinds.scheme import Scheme
from rankwise.variants.adapter.step import CannotMerge

SCHEMA = 1
ROWS = 128


@torch.no_grad()
def knock_out(
    adapter: Adapter,
    processor: Any,
    task: Task,
    split: str,
    data: Dataset,
    batch_size: int,
    precision: str = "fp32",
    members: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """For each of these members, all if not given, what knockout.json holds: loss and score as trained, and with each
    site's change taken out.

    On a CPU a member is merged, so that each evaluation costs what the bare model costs; elsewhere all members are
    evaluated together.
    """
    members = range(adapter.members) if members is None else members
    names, was_training = adapter.changed_weights(), adapter.model.training
    evaluator = Evaluator(adapter, kinds.get(task.kind), processor, batch_size, precision)

    def every_site(members: int) -> list[dict[str, Any]]:
        results = [{**one, "sites": {}} for one in _measured(evaluator, task, data, members)]
        for name in names:
            with adapter.without(name):
                without = _measured(evaluator, task, data, members)
            for result, one in zip(results, without, strict=True):
                result["sites"][name] = one
        return results

    adapter.model.eval()
    try:
        results = _merged(adapter, every_site, members) if evaluator.can_merge else None
        if results is None:
            everyone = every_site(adapter.members)
            results = [everyone[member] for member in members]
    finally:
        adapter.model.train(was_training)
    head = {"schema": SCHEMA, "split": split, "rows": data.num_examples, "metric": task.metric}
    return [{**head, **result} for result in results]


def _merged(
    adapter: Adapter, every_site: Callable[[int], list[dict[str, Any]]], members: Sequence[int]
) -> list[dict[str, Any]] | None:
    """These members one by one, each merged; None where one cannot be."""
    results = []
    with contextlib.suppress(CannotMerge):
        for member in members:
            adapter.merge(member)
            try:
                results += every_site(1)
            finally:
                adapter.unmerge()
        return results
    return None


def _measured(evaluator: Evaluator, task: Task, data: Dataset, members: int) -> list[dict[str, float | None]]:
    """The loss and the score of each member; None for what is no number."""
    results = []
    for loss, predicted in zip(*evaluator.losses_and_predictions(data, members), strict=True):
        metrics = predicted if isinstance(predicted, Undefined) else score(task, predicted, *data.truth)
        value = None if isinstance(metrics, Undefined) else metrics[task.metric]
        results.append({"loss": loss if abs(loss) < float("inf") else None, "score": value})
    return results


def of_run(folder: Path, rows: int = ROWS) -> dict[str, Any]:
    """Measures a finished run that still has its adapter/, and writes knockout.json beside its result.

    Raises:
        ValueError: no adapter there, or no run.
        Unavailable: model or data cannot be had.
    """
    folder = Path(folder)
    if not (folder / "adapter").is_dir():
        raise ValueError(
            f"{folder} has no adapter/ (a committed run holds no weights), so nothing can be taken out: make it again"
        )
    config, result = (records.read_json(folder / name) for name in (records.CONFIG, records.RESULT))
    task = task_of_run(folder, config)
    training, scheme = config["training"], Scheme.of_fact(config.get("quantization"))
    precision = "fp32" if scheme is None else config["precision"]  # that which the codes were made from
    size = training.get("image_size")
    model, processor, _ = models.load(config["model"], task, precision, "cpu", image_size=size, quantization=scheme)
    adapter = variants.load_pretrained(model, folder / "adapter")
    split = result["selection_split"]
    data = task.encode(processor, split, training["max_length"]).random_part(training.get("evaluation_examples"), SUBSET)
    part = data.random_part(rows, KNOCKOUT_ROWS)
    (measured,) = knock_out(adapter, processor, task, split, part, training["evaluation_batch_size"], precision)
    records.write_knock_out(folder, measured)
    return measured


def seeds(wanted: bool | str, all_seeds: Sequence[int]) -> list[int]:
    """Whose final runs a study measures so: of its setting `knock_out`."""
    return list(all_seeds) if wanted is True else list(all_seeds[:1]) if wanted == "first seed" else []
