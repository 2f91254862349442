"""Data, model and targets of each task of a study, before anything runs."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise import variants
from rankwise.experiments import kinds, models
from rankwise.experiments.checks import check_phases, collecting
from rankwise.experiments.config import Entry, Study, Training
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.data.draws import SUBSET
from rankwise.experiments.study import budget, splits
from rankwise.experiments.tasks import OwnTask, Task, in_study
from rankwise.variants.adapter.linears import size_of
from rankwise.variants.settings import Settings, shown


@dataclass(frozen=True)
class PreparedTask:
    """One task of a study, ready to run: its data, and each entry's targets in the model."""

    task: Task
    data: dict[str, Dataset]  # "train", and each split that is evaluated
    data_hash: str
    targets: dict[str, list[str]]  # entry label -> names of the sites
    shapes: dict[str, tuple[int, int]]  # site -> (out, in)
    captions: list[str]
    heads: tuple[str, ...]  # names of the modules made fresh for the task


@dataclass(frozen=True)
class PreparedStudy:
    """A study whose ranks are known, also where they follow from a budget of parameters."""

    study: Study
    sources: list[Entry]  # entries that are not run, whose ranks others take
    tasks: dict[str, PreparedTask]


def prepare(
    study: Study,
    sources: Sequence[Entry],
    say: Callable[[str], None] = lambda line: None,
    precision: str = "fp32",
    heads: Mapping[str, Sequence[str]] | None = None,
) -> PreparedStudy:
    """Fetches and encodes the data, loads the model once a task, and finds every entry's targets in it.

    say: called with each line about the user's own data that the user should see. precision: of the model that is looked at.
    heads: of each task, as another process has prepared it; the model is then looked at without its values.

    Raises:
        ValueError: what the user can correct, one line for each fault, before anything has run.
        Unavailable: model or data cannot be had.
    """
    faults: list[str] = []
    tasks = {}
    for name in study.tasks:
        task = in_study(name, study.data)
        every = [*study.methods, *sources]
        form = every[0].scheme
        training = study.training
        faults.extend(_without_effect(task, training))
        if faults:
            continue
        known = None if heads is None else heads[name]
        model, processor, info = models.load(study.model, task, precision, "cpu", training.image_size, form, known)
        faults.extend(models.unfit(model, training))
        if faults:
            continue
        parts = {"train": splits.trained(study, task), **{split: split for split in splits.evaluated(study, task)}}
        whole = {part: task.encode(processor, split, training.max_length) for part, split in parts.items()}
        faults.extend(models.beyond(model, processor, whole))
        data = {part: _subset(encoded, part, training) for part, encoded in whole.items()}
        for encoded in data.values():
            encoded.make()
        total = training.total_steps(len(data["train"]))
        targets, shapes, entries = {}, {}, []
        for entry in every:
            if entry.scheme != form:
                form = entry.scheme
                model, _, info = models.load(study.model, task, precision, "cpu", training.image_size, form, known)
            with collecting(faults):
                adapter = variants.create(entry.method, **_given(entry.resolved(total)))
                adapter.attach(model, entry.targets, head=info.heads, fresh_head=True, calibration=variants.Uncalibrated())
                targets[entry.label] = [n for n, site in adapter.named_sites() if site.has_rank]
                shapes |= {site: size_of(adapter.base(site)) for site in targets[entry.label]}
                equal = study.budget
                if equal.equal == "parameters" and entry.ranks_of is None:
                    entry = budget.solved(entry, adapter, equal.parameters, entry.scale or equal.scale)
                adapter.detach()
            entries.append(entry)
        number = len(study.methods)
        study, sources = study.model_copy(update={"methods": entries[:number]}), entries[number:]
        faults.extend(_twins(study.methods, total, targets))
        check_phases(study, len(data["train"]), faults)
        captions = [*task.caption, *task.captions_by_model.get(study.model, ()), *_subset_captions(task, data, training)]
        if isinstance(task, OwnTask):
            cut = [task.cut(parts[part], encoded, processor, training.max_length) for part, encoded in whole.items()]
            captions += [f"{name}: {line}." for line in cut if line]
            for line in (*task.notes, *filter(None, cut)):
                say(f"{name}: {line}")
        tasks[name] = PreparedTask(task, data, _content_hash(data), targets, shapes, captions, info.heads)
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))
    return PreparedStudy(study, list(sources), tasks)


def _without_effect(task: Task, training: Training) -> list[str]:
    """Faults: settings of images for a task that has none."""
    given = {"image_size": training.image_size, "augmentation": training.augmentation or None}
    if kinds.get(task.kind).has_images:
        return []
    return [
        f"training.{name} = {shown(value)} is about images, and {task.name} has none: take it out"
        for name, value in given.items()
        if value is not None
    ]


def _content_hash(data: Mapping[str, Dataset]) -> str:
    digest = hashlib.sha256()
    for split in sorted(data):
        for block in data[split].content():
            digest.update(block)
    return digest.hexdigest()


def _twins(entries: Sequence[Entry], total: int, targets: Mapping[str, list[str]]) -> list[str]:
    """Faults: entries that would be the same runs, which could carry one label only."""
    faults, seen = [], {}
    for entry in entries:
        if entry.label not in targets:
            continue  # it has a fault of its own
        taken = entry.ranks_of, entry.permuted, entry.ranks_seed
        same = entry.method, entry.resolved(total).model_dump_json(), tuple(targets[entry.label]), taken, entry.scheme
        for rate in entry.learning_rates:
            other = seen.setdefault((same, rate), entry.label)
            if other != entry.label:
                faults.append(f'"{other}" and "{entry.label}" are the same runs at learning rate {rate:g}: take one out')
    return faults


def _given(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(exclude_unset=True)


def _subset(encoded: Dataset, split: str, training: Training) -> Dataset:
    """A fixed random part of a split, the same for every method and seed, where the study asks for one."""
    return encoded.random_part(training.train_examples if split == "train" else training.evaluation_examples, SUBSET)


def _subset_captions(task: Task, data: Mapping[str, Dataset], training: Training) -> list[str]:
    cut = training.train_examples is not None or training.evaluation_examples is not None
    parts = ", ".join(f"{split} {encoded.num_examples}" for split, encoded in data.items())
    return [f"{task.name}: a fixed random part of the data ({parts} examples)."] if cut else []
