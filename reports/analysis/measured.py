"""What `rankwise analysis subspace` and `magnitude` wrote: its schema, how it is read and checked, how it is named."""

import hashlib
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from pydantic import TypeAdapter, ValidationError
from rankwise.reports.ranks.sites import module_labels
from rankwise.variants.files import json_text
from rankwise.variants.settings import quoted
from typing_extensions import TypedDict  # pydantic reads typing's own from Python 3.12 on alone

SCHEMA = 1
MOST_BYTES = 1 << 30  # of an analysis's arrays; those of a small model have 2 MB
KINDS = ("subspace", "magnitude")


class AnalysisFile(TypedDict):
    """What both files say of how they were made, as far as it is read here."""

    model: str
    task: str
    metric: str
    split: str
    captions: list[str]
    methods: list[dict[str, Any]]
    training: dict[str, Any]
    versions: dict[str, str]
    device_name: str
    precision: str
    commit: str | None
    dirty: bool | None
    files_sha256: dict[str, str]


class Member(TypedDict):
    rank: int
    seed: int
    score: float | None


class MeasuredSite(TypedDict):
    name: str
    in_features: int


class Amplified(TypedDict):
    site: str
    rank: int
    seed: int
    of_update: float
    of_weight: float
    of_random: float
    weight_norm: float
    update_norm: float
    factor: float


class SubspaceFile(AnalysisFile):
    members: list[Member]
    sites: list[MeasuredSite]
    gaussian_width: int
    pairs: dict[str, list[int]]  # two members
    amplification: list[Amplified]


class Ended(TypedDict):
    method: str
    seed: int
    score: float | None


class Move(TypedDict):
    method: str
    seed: int
    step: int
    site: str
    dM_rows: float
    dD_rows: float
    dM_columns: float
    dD_columns: float
    familiarity: NotRequired[list[float]]


class MagnitudeFile(AnalysisFile):
    runs: list[Ended]
    snapshots: list[int]
    sites: list[str]
    moves: list[Move]


WRITTEN = {"subspace": TypeAdapter(SubspaceFile), "magnitude": TypeAdapter(MagnitudeFile)}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """What `experiments.analysis` left in a folder, by kind; the grids of subspace.npz under "grids".

    Raises:
        ValueError: neither file is there, or one is cut off, of another schema, or belongs to another run's arrays.
    """
    by_kind = {kind: _read(folder, kind) for kind in KINDS if (folder / f"{kind}.json").is_file()}
    if not by_kind:
        raise ValueError(f"{folder}: neither subspace.json nor magnitude.json: give what `rankwise analysis` wrote")
    return by_kind


def _read(folder: Path, kind: str) -> dict[str, Any]:
    path, again = folder / f"{kind}.json", f"make it again with `rankwise analysis {kind}`"
    try:
        written = json_text.read(path)
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}): {again}") from None
    if not isinstance(written, dict) or (written.get("schema"), written.get("kind")) != (SCHEMA, kind):
        raise ValueError(f"{path}: no {kind} analysis of schema {SCHEMA}: {again}")
    try:
        WRITTEN[kind].validate_python(written, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise ValueError(f"{path}: {place}: {fault['msg'][0].lower()}{fault['msg'][1:]}: {again}") from None
    for name, digest in written["files_sha256"].items():
        if Path(name).name != name:
            raise ValueError(f"{path}: files_sha256 names {quoted(name)}, which is no file beside it: {again}")
        try:
            content = (folder / name).read_bytes()
        except FileNotFoundError:
            raise ValueError(f"{folder / name}: missing, and {path.name} names it: {again}") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{folder / name}: not the file that {path.name} names: {again}")
        written["grids"] = _arrays(folder / name, content, again)
    return written


def _arrays(path: Path, content: bytes, again: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz in float64.

    Raises:
        ValueError: another file, pickled objects, or larger than any analysis when it is unpacked.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MOST_BYTES:
            raise ValueError(f"{size:,} bytes when it is unpacked, more than the {MOST_BYTES:,} that are read")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {key: arrays[key].astype(np.float64) for key in arrays.files}
    except (ValueError, TypeError, OSError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no arrays of an analysis ({error}): {again}") from None


def sites_by_kind(sites: Sequence[str]) -> dict[str, list[int]]:
    """Kind of module -> the places of its sites in `sites`."""
    labels = module_labels(sites)
    return {kind: [i for i, site in enumerate(sites) if labels[site] == kind] for kind in dict.fromkeys(labels.values())}


def subject(measured: dict[str, Any]) -> str:
    return f"{measured['task']}, {measured['model'].rstrip('/').split('/')[-1]}"


def made_with(measured: dict[str, Any]) -> str:
    """Model, data, training, device and commit of the numbers, as a sentence."""
    training = measured["training"]
    where = "an unknown commit" if measured["commit"] is None else f"commit {measured['commit'][:7]}"
    rates = ", ".join(f"{entry['label']} {entry['learning_rates'][0]:g}" for entry in measured["methods"])
    changes = " with changes" if measured["dirty"] else ""
    return (
        f"Made with {measured['model']} on {measured['task']}: {training['max_steps']} steps of {training['batch_size']} rows "
        f"out of {training['train_examples']}, rates not tuned ({rates}), {measured['precision']} on "
        f"{measured['device_name']}, torch {measured['versions']['torch']}, {where}{changes}."
    )


def scores_sentence(measured: dict[str, Any]) -> str:
    """The final score of every run that was analysed."""

    def one(run: dict[str, Any]) -> str:
        name = run.get("method") or f"r {run['rank']}"
        return f"{name} seed {run['seed']} " + ("without a value" if run["score"] is None else f"{run['score']:.1f}")

    runs = measured["members"] if measured["kind"] == "subspace" else measured["runs"]
    return f"Scores at the end ({measured['metric']} on a part of the {measured['split']} split): {', '.join(map(one, runs))}."
