"""What each site's rank is worth: the measured loss and score when its change is taken out.

For each site in turn dW = 0 there, everything else stays as it was trained, and the same rows are evaluated again.  What an
allocator believed of a site (sites.json, `importance`) can be held against what its removal costs; nothing is trained.

36 sites are 36 evaluations, so the rows are a fixed random part of the selection split, `ROWS` of them, the same for every run
of a task.  The score of the whole split is not to be compared with these.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rankwise import variants
from rankwise.experiments import models, objective, records
from rankwise.experiments.tasks import get as get_task
from rankwise.experiments.tasks.common import Encoded, Task, Undefined, collate, evaluation_batches
from rankwise.experiments.trainer import collect
from rankwise.variants.base import Adapter, CannotMerge, Step

SCHEMA = 1
ROWS = 128
KEY = 4  # of the draw of the rows


@torch.no_grad()
def knock_out(
    adapter: Adapter,
    tokenizer: Any,
    task: Task,
    split: str,
    encoded: Encoded,
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

    def every_site(members: int) -> list[dict[str, Any]]:
        whole = _measured(adapter, tokenizer, task, encoded, batch_size, precision, members)
        found = [{**one, "sites": {}} for one in whole]
        for name in names:
            with adapter.without(name):
                left = _measured(adapter, tokenizer, task, encoded, batch_size, precision, members)
            for one, without in zip(found, left, strict=True):
                one["sites"][name] = without
        return found

    adapter.model.eval()
    try:
        found = _merged(adapter, every_site, members) if adapter.device.type == "cpu" and precision == "fp32" else None
        if found is None:
            everyone = every_site(adapter.members)
            found = [everyone[member] for member in members]
    finally:
        adapter.model.train(was_training)
    head = {"schema": SCHEMA, "split": split, "rows": encoded.num_examples, "metric": task.metric}
    return [{**head, **one} for one in found]


def _merged(adapter: Adapter, every_site: Any, members: Sequence[int]) -> list[dict[str, Any]] | None:
    """These members one by one, each merged; None where this adapter cannot be."""
    found = []
    if not adapter.mergeable:
        return None
    with contextlib.suppress(CannotMerge):
        for member in members:
            adapter.merge(member)
            try:
                found += every_site(1)
            finally:
                adapter.unmerge()
        return found
    return None


def _measured(
    adapter: Adapter, tokenizer: Any, task: Task, encoded: Encoded, batch_size: int, precision: str, members: int
) -> list[dict[str, float | None]]:
    """The loss (the task's own) and the score of each member; None for what is no number."""
    sums = torch.zeros(2, members, dtype=torch.float64, device=adapter.device)  # losses, and over how many rows or tokens

    def batches() -> Iterator[tuple[Any, int, torch.Tensor]]:
        takes = {*tokenizer.model_input_names, "input_ids", "attention_mask"}
        for rows, length in evaluation_batches(encoded, batch_size):
            arrays = collate(encoded, rows, length, tokenizer.pad_token_id or 0)
            batch = {k: torch.from_numpy(v).to(adapter.device) for k, v in arrays.items() if k == "labels" or k in takes}
            batch = {k: torch.cat([v] * members) for k, v in batch.items()}
            labels = batch.pop("labels")
            adapter.begin(Step(1, 1), training=False)
            is_16_bit = precision == "bf16"
            with torch.autocast(adapter.device.type, torch.bfloat16) if is_16_bit else contextlib.nullcontext():
                output = adapter.model(**adapter.prepare(batch))
            logits = objective.logits(task.kind, output, batch["attention_mask"])
            count = objective.counts(task.kind, labels, members)
            sums[0] += objective.losses(task.kind, logits, labels, members).double() * count
            sums[1] += count
            yield rows, length, logits

    predicted = collect(task.kind, encoded, batches(), members)
    losses = (sums[0] / sums[1]).tolist()
    return [
        {"loss": loss if abs(loss) < float("inf") else None, "score": _score(task, one, encoded)}
        for loss, one in zip(losses, predicted, strict=True)
    ]


def _score(task: Task, predicted: Any, encoded: Encoded) -> float | None:
    if isinstance(predicted, Undefined):
        return None
    try:
        return task.metrics(predicted, *encoded.truth)[task.metric]
    except Undefined:
        return None


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
    config, result = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("config.json", "result.json"))
    task = get_task(config["task"])
    model, tokenizer, _ = models.load(config["model"], task, "fp32", "cpu")
    adapter = variants.load_pretrained(model, folder / "adapter")
    split = result["selection_split"]
    training = config["training"]
    encoded = task.encode(tokenizer, split, training["max_length"]).random_part(training.get("evaluation_examples"), 3)
    encoded = encoded.random_part(rows, KEY)
    (found,) = knock_out(adapter, tokenizer, task, split, encoded, training["evaluation_batch_size"])
    records.write_knock_out(folder, found)
    return found


def seeds(wanted: bool | str, all_seeds: Sequence[int]) -> list[int]:
    """Whose final runs a study measures so: of its setting `knock_out`."""
    return list(all_seeds) if wanted is True else list(all_seeds[:1]) if wanted == "first seed" else []
