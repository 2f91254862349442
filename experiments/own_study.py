"""The study file of a comparison on a user's own data: written from a model and files, moved with its paths.

Methods, ranks and rates are those of two studies that ship: default.toml of a quick look, stsb-minilm.toml of the full
protocol.  Length, batch size and epochs follow from the data, and the file says how.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomlkit
import tomlkit.items
from rankwise.experiments import config, kinds, sources
from rankwise.experiments.data_entries import OwnData, is_hub_id
from rankwise.experiments.files import write_file
from rankwise.experiments.records import STUDY_FILE
from rankwise.experiments.tasks import OwnTask
from rankwise.variants.adapter.kinds.scheme import Scheme
from rankwise.variants.settings import method, nearest

METHODS: tuple[str, ...] = ("full", "lora", "adalora", "dora")  # where none are named
STEPS = 200  # that a run should have: as many epochs as give them, but at most
MOST_EPOCHS = 20
BATCHES = (32, 16, 8)  # the largest that leaves `STEPS_AN_EPOCH` steps, else the last
STEPS_AN_EPOCH = 10
LONGEST = 512  # tokens; longer rows are cut, which is said
SHORTEST = 16
FACTOR = 2  # between neighbouring rates of every method, as a test of whole curves takes it


def shipped_entries(full_protocol: bool) -> dict[str, dict[str, Any]]:
    """Method -> its table in the study that the comparison follows, the study's defaults filled in.

    The quick look takes what default.toml lacks from the full protocol's study, with the second rate of its grid.
    """
    full = _entries(config.shipped()["stsb-minilm"])
    if full_protocol:
        return full
    quick = {
        name: {k: v for k, v in entry.items() if k != "learning_rates"} | {"learning_rate": entry["learning_rates"][1]}
        for name, entry in full.items()
    }
    return quick | _entries(config.DEFAULT_STUDY)


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    study = config.read(path)
    made = {}
    for entry in study.methods:
        rates = entry.learning_rates
        rate = {"learning_rates": rates} if len(rates) > 1 else {"learning_rate": rates[0]}
        made[entry.label] = {"method": entry.method, **entry.settings, **rate}
    return made


def _by_factor(rates: Sequence[float]) -> list[float]:
    """As many rates around the same centre, with FACTOR between neighbours; of two digits."""
    centre = math.exp(sum(map(math.log, rates)) / len(rates))
    return [float(f"{centre * FACTOR ** (index - (len(rates) - 1) / 2):.1e}") for index in range(len(rates))]


def check_methods(named: str | None, full_protocol: bool, quantization: Scheme | None = None) -> list[str]:
    """The methods of --methods; over a quantised base full fine-tuning is not among those of a comparison that names none.

    Raises:
        ValueError: none, or one whose rates and ranks no shipped study has.
    """
    known = shipped_entries(full_protocol)
    usual = [name for name in METHODS if quantization is None or not method(name).trains_base]
    chosen = usual if named is None else list(dict.fromkeys(n.strip() for n in named.split(",") if n.strip()))
    for name in chosen:
        if name not in known:
            raise ValueError(
                f'--methods: a comparison in one line does not know "{name}"{nearest(name, known)}; it knows: '
                f"{', '.join(known)}; write any other into the study's file"
            )
    if not chosen:
        raise ValueError(f"--methods is empty: name at least one of: {', '.join(known)}")
    return chosen


@dataclass(frozen=True)
class Lengths:
    """How long the rows of each part are for a model.

    of: part -> (n,) tokens of each row, nothing cut. most: that the model takes; None where it names no limit.
    """

    of: Mapping[str, np.ndarray]
    most: int | None

    @property
    def longest(self) -> int:
        return max(int(lengths.max()) for lengths in self.of.values())

    @property
    def max_length(self) -> int:
        """The longest row, rounded up to a multiple of 8, at most what the model takes and 512 tokens."""
        rounded = -(-self.longest // 8) * 8
        return min(max(rounded, SHORTEST), LONGEST, *([self.most] if self.most is not None else []))


def lengths_of(model: Any, processor: Any, task: OwnTask) -> Lengths | None:
    """How long the rows of a task are for a loaded model; None where they have no tokens.

    Raises:
        ValueError: the model cannot read such rows, as a chat where it has no template.
    """
    from rankwise.experiments import models  # torch

    longest, kind = models.longest_input(model), kinds.get(task.kind)
    found = {}
    for split in task.splits:
        lengths = [kind.whole_lengths(piece, processor) for piece in task.pieces(split)]
        if any(piece is None for piece in lengths):
            return None
        found[split] = np.concatenate(lengths)
    most = processor.model_max_length if longest is None else min(longest, processor.model_max_length)
    return Lengths(found, most)


def image_size_of(processor: Any, task: OwnTask) -> tuple[int, int]:
    """Height and width in pixels of the images of a task, as the model's own processor makes them."""
    first = task.made(task.rows[task.train_split][:1])
    _, _, height, width = kinds.get(task.kind).encode(first, processor, 0).pixels.shape
    return height, width


def training_for(rows: int) -> dict[str, int]:
    """Batch size and epochs for so many training rows."""
    batch = next((size for size in BATCHES if rows >= size * STEPS_AN_EPOCH), BATCHES[-1])
    return {"epochs": min(MOST_EPOCHS, max(1, round(STEPS * batch / rows))), "batch_size": batch}


def compose(
    data: OwnData,
    model: str,
    methods: Sequence[str],
    rows: int,
    max_length: int | None,
    folder: Path,
    full_protocol: bool,
    quantization: Scheme | None = None,
) -> str:
    """The text of a study's file that lies in `folder`; the data's paths are relative to it, a model's folder is absolute.

    max_length: None where rows have no tokens.
    """
    if model not in sources.CATALOGUE and os.path.isdir(os.path.expanduser(model)):
        model = os.path.abspath(os.path.expanduser(model))
    training, entries = training_for(rows), shipped_entries(full_protocol)
    document = tomlkit.document()
    document.add(tomlkit.comment(f"Made by rankwise compare --model {model} --data ...; change it, and run it again:"))
    document.add(tomlkit.comment(f"rankwise compare {STUDY_FILE} --out ."))
    document["name"] = data.name
    document["title"] = f"{'The full protocol' if full_protocol else 'A quick look'}: {Path(model).name} on {data.name}"
    if not full_protocol:
        document["quick"] = True
    document["model"] = model
    if quantization is not None:
        document["quantization"] = quantization.name
        if quantization.is_double:
            document["double_quantization"] = True
    document["tasks"] = [data.name]
    document["seeds"] = 10 if full_protocol else 1
    if "lora" in methods and full_protocol:
        document["reference"] = "lora"
    if max_length is not None:
        training = {**training, "max_length": max_length}
    if not full_protocol:
        training["evaluations_per_epoch"] = 0  # nothing is chosen, so the validation part is not looked at
    document["training"] = _table(training)
    if full_protocol:
        document["sweep"] = _table({"design": "whole-curve"})
        entries = {name: entry | {"learning_rates": _by_factor(entry["learning_rates"])} for name, entry in entries.items()}
    entry = {k: v for k, v in data.model_dump(exclude_none=True).items() if v != []}
    entry |= {part: _moved(where, Path(), folder) for part, where in data.places()}
    document["data"] = _tables([entry])
    document["methods"] = _tables([entries[name] for name in methods])
    return tomlkit.dumps(document).rstrip("\n") + "\n"


def write(folder: Path, text: str) -> Path:
    """Puts the study's file into its folder.

    Raises:
        ValueError: one that says something else is there.
    """
    path = folder / STUDY_FILE
    if path.is_file():
        if config.read_toml(path) != tomlkit.parse(text).unwrap():
            raise ValueError(
                f"{path} is there and says something else: run that one (rankwise compare {path} --out {folder}), or give "
                f"another --out"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, text.encode())
    return path


def copy(source: Path, folder: Path) -> None:
    """Puts a copy of a study's file beside its runs, its data's paths relative to there, all else as it is written."""
    content = source.read_bytes()
    entries = config.read_toml(source).get("data", [])
    if entries and source.resolve().parent != folder.resolve():
        document = tomlkit.parse(content.decode("utf-8-sig"))
        for entry, plain in zip(document["data"], entries, strict=True):
            own = OwnData(**plain)
            for part, where in own.places():
                entry[part] = _moved(where, source.parent, folder)
        text = tomlkit.dumps(document)
        if "name" not in document:  # the copy is called study.toml, and the study is not
            text = f"name = {tomlkit.item(source.stem).as_string()}\n{text}"
        content = text.encode()
    write_file(folder / STUDY_FILE, content)


def _moved(where: str, before: Path, after: Path) -> str:
    """A path that was relative to one folder, relative to another; an absolute one and a hub id stay."""
    here = OwnData(name="x", train=where).beside(before).train
    if os.path.isabs(here) or (here == where and is_hub_id(where)):
        return here
    return os.path.relpath(here, after)


def _table(values: Mapping[str, Any]) -> tomlkit.items.Table:
    table = tomlkit.table()
    for key, value in values.items():
        table[key] = value
    return table


def _tables(entries: Sequence[Mapping[str, Any]]) -> tomlkit.items.AoT:
    tables = tomlkit.aot()
    for entry in entries:
        tables.append(_table(entry))
    return tables
