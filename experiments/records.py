"""What a run writes into its folder: the one schema, for those who write it and those who read it.

    DIR/<fingerprint>/
        config.json          what was asked for, and where it ran; written first
        metrics.jsonl        a line for each logged step and each evaluation
        ranks.jsonl          a line for each change of the active ranks
        sites.json           final runs: what became of each weight (variants/weights/anatomy.py)
        knockout.json        where asked for: loss and score without each site
        predictions.safetensors  final runs: predictions of the scored split, one row for each of its rows
        samples.json         final runs that generate texts: a few rows of the scored split, for people to read
        result.json          what the run came to; written last, at once

A folder without result.json is an unfinished run, and a last line without its end is what a kill leaves: both are reported,
neither is an error.  Everything else that is not what this file says is refused by name.  Keys are written in the order of
the fields below, so that equal runs leave equal bytes.  Neither torch nor transformers is imported here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rankwise.experiments.factors import Cell
from rankwise.experiments.files import parse_json, replacing, write_json
from rankwise.experiments.hypotheses import Hypothesis
from rankwise.experiments.rank_curves import Place
from rankwise.experiments.search_space import Searched
from rankwise.variants.files import json_text
from rankwise.variants.settings import METHODS, Settings, check, method
from rankwise.variants.settings.lowrank import AlwaysMagnitude

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1
CONFIG, METRICS, RANKS, SITES = "config.json", "metrics.jsonl", "ranks.jsonl", "sites.json"
KNOCKOUT, ACROSS = "knockout.json", "across.json"
PREDICTIONS, SAMPLES, RESULT = "predictions.safetensors", "samples.json", "result.json"
FILES = (
    CONFIG,
    METRICS,
    RANKS,
    SITES,
    KNOCKOUT,
    ACROSS,
    PREDICTIONS,
    SAMPLES,
    RESULT,
)  # all but weights; the result last: it makes a run whole
STUDY = "study.json"  # beside the runs: the order and the names of a study's settings
STUDY_FILE = "study.toml"  # beside the runs: a copy of the file that the study was read from
REMEDY = "move that run's folder away and run `rankwise compare` again"

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Ranks = dict[str, Count]
Model = TypeVar("Model", bound=BaseModel)


class Stored(BaseModel):
    """What every stored object shares: strict types, finite numbers; keys that a later version adds are passed over."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())
    schema_version: Literal[1] = Field(alias="schema")
    MAY_LACK: ClassVar[frozenset[str]] = frozenset()  # keys that are written only where there is something to say

    @classmethod
    def written(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """What stands in the file: every key of the schema in its order, those that `values` lacks at their default.

        Raises:
            KeyError: a key that is not in the schema, or one without a default is missing.
        """
        if unknown := values.keys() - cls.model_fields.keys():
            raise KeyError(f"not in the schema of {cls.__name__}: {', '.join(sorted(unknown))}")
        found = {"schema": SCHEMA}
        for name, field in cls.model_fields.items():
            if name in values:
                found[name] = values[name]
            elif name not in ("schema_version", *cls.MAY_LACK):
                if field.is_required():
                    raise KeyError(f"missing in {cls.__name__}: {name}")
                found[name] = field.get_default()
        return found


class Result(Stored):
    """result.json: what one run came to. Metrics are points, 0 to 100; more is better."""

    MAY_LACK = frozenset({"rank_scores"})
    fingerprint: str
    study: str
    phase: Literal["sweep", "final"]
    method: str
    setting: str
    task: str
    model: str
    seed: int
    learning_rate: Number
    rung: Count = 0
    status: Literal["completed", "failed"]
    error: str | None = None
    traceback: str | None = None
    metric: str
    protocol: Literal["held-out", "best-dev-epoch"] = "held-out"
    selection_score: Number | None
    selection_split: str
    score: Number | None
    split: str
    score_standard_error: Number | None = None
    score_rows: Count | None = None
    metrics: dict[str, dict[str, Number]] = {}
    steps: Count | None
    total_steps: Count | None
    epochs: Number | None
    skipped_steps: Count | None = None
    scored_step: Count | None = None
    tokens_per_second: Number | None = None
    peak_memory_bytes: Count | None = None
    pack_peak_memory_bytes: Count | None = None
    trainable_parameters: Count | None = None
    nominal_parameters: Count | None = None  # what trainable_parameters were before a run shrank; the same where none did
    active_parameters: Count | None = None
    head_parameters: Count | None = None
    scale: dict[str, Number] | Number | None = None
    ranks: Ranks = {}
    nominal_ranks: Ranks = {}
    physical_ranks: Ranks = {}  # what parameters were held for at the end
    final_train_loss: Number | None = None
    dropout_note: str | None = None
    rank_scores: dict[str, Number | None] = {}
    pack_seconds: Number | None
    seconds: Number | None
    pack_size: Annotated[int, Field(ge=1)]
    pack_index: Count
    device: str
    precision: str
    packing_note: str | None = None


class Config(Stored):
    """config.json: what one run was asked to do, and where it ran."""

    MAY_LACK = frozenset({"ranks_seed", "quantization", "own_data", "processes"})
    fingerprint: str
    numerics: int | None = None
    study: str
    phase: Literal["sweep", "final"]
    method: str
    setting: str
    task: str
    model: str
    seed: int
    learning_rate: Number
    rung: Count = 0
    quick: bool
    method_settings: dict[str, Any] = {}
    allocation: str | None = None  # what placed the ranks; None in runs from before it was written
    ranks_of: str | None = None  # label of the setting whose final ranks were taken
    ranks_seed: str | None = None  # "other": of the run of a partner, see `Entry.ranks_seed`; None: of the same seed
    quantization: dict[str, Any] | None = None  # of the base: "name", "is_double", "bitsandbytes"; None where it has none
    training: dict[str, Any] = {}
    targets: Any = None
    targets_resolved: list[str] = []
    caption: list[str] = []
    licence: str | None = None
    data_hash: str | None = None
    model_hash: str | None = None
    versions: dict[str, Any] = {}
    threads: int | None = None
    processes: int | None = None  # that trained it together; None: one
    device: str | None = None
    device_name: str | None = None
    precision: str | None = None
    commit: str | None = None
    dirty: bool | None = None
    pack: dict[str, Any] = {}
    started: str | None = None
    own_data: dict[str, Any] | None = None  # of a user's own data what its runs are about: see `OwnTask.record`

    def settings(self) -> Settings:
        """The method's settings.

        Raises:
            ValueError: they are of another version, or the method is not there.
        """
        values = dict(self.method_settings)
        if issubclass(method(self.method).settings, AlwaysMagnitude):
            values.pop("magnitude", None)  # earlier versions wrote false, and trained magnitudes all the same
        return check(self.method, values)

    @property
    def placed_by(self) -> str:
        """What placed the ranks: "none" (it has no ranks), "uniform", "given", "random", "learned", "taken", "permuted"."""
        if self.allocation is not None:
            return self.allocation
        known = METHODS.get(self.method)
        try:
            return known.placed_by(self.settings())
        except (ValueError, AttributeError):  # of another version, or a method that is no longer there
            if known is None or not known.takes_targets:
                return "none"
            return known.allocation or ("uniform" if known.takes_ranks else "learned")


class StudyFile(Stored):
    """study.json: the names and the order of a study's settings."""

    MAY_LACK = frozenset({"kind", "shared_with", "design", "hypotheses", "looks", "curves", "cells", "searched"})
    study: str
    quick: bool
    title: str
    kind: Literal["comparison", "randomized"] = "comparison"
    captions: list[str] = []
    reference: str | None = None
    protocol: Literal["held-out", "best-dev-epoch"] = "held-out"
    margin: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seeds: list[int] = []
    trials: dict[str, Count] = {}
    budget: dict[str, Any] = {}
    shared_with: dict[str, str] = {}  # setting -> the setting whose learning rate it shares
    design: Literal["chosen-rate", "shared-rate", "whole-curve"] = "chosen-rate"  # how rates are chosen, and so what tests them
    hypotheses: list[Hypothesis] = []
    looks: list[Count] = []
    curves: dict[str, Place] = {}  # setting -> where it stands on a curve of ranks
    cells: dict[str, Cell] = {}  # setting -> which combination of parts it is
    searched: dict[str, Searched] = {}  # setting that a search found -> by how many runs
    methods: list[str]
    complete: bool


class Evaluation(BaseModel):
    """One evaluation line of metrics.jsonl."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")
    step: Count
    split: str
    epoch: Number
    metrics: dict[str, Number]


class TrainStep(BaseModel):
    """One training line of metrics.jsonl; the loss is the task's own, without the penalty."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")
    step: Count
    loss: Number | None
    learning_rate: Number
    penalty: Number | None = None


class RankStep(BaseModel):
    """One line of ranks.jsonl: `budget` is the schedule's total at that step, `live` the count of E != 0."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")
    step: Count
    budget: Count | None
    active: Count
    live: Count
    ranks: Ranks


class SiteFacts(BaseModel):
    """What became of one site's weight (variants/weights/anatomy.py); None: not measured there, or no number."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")
    nominal: Count
    active: Count
    parameters: Count
    share: Number
    update_norm: Number | None = None
    weight_norm: Number | None = None
    relative_norm: Number | None = None
    effective_rank: Number | None = None
    stable_rank: Number | None = None
    energy_rank: Count | None = None
    singular_values: list[Number] | None = None
    familiarity: list[Number] | None = None
    intruders: Count | None = None
    importance: Number | None = None
    greatest_importance: Number | None = None
    scores: list[Number | None] | None = None
    kept: str | None = None


class IntruderRule(BaseModel):
    """Which singular vectors of W + dW count as intruders: of the top ones those below a greatest |cosine| with W's."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")
    looked_at: Count
    cosine: Number


class SitesFile(Stored):
    """sites.json: what became of every weight of one final run."""

    intruders: IntruderRule
    sites: dict[str, SiteFacts]


class Measured(BaseModel):
    """Loss and score of one evaluation; None where it is no number."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")
    loss: Number | None
    score: Number | None


class KnockOut(Stored):
    """knockout.json: loss and score of one run as trained, and with each site's change taken out."""

    split: str
    rows: Count
    metric: str
    loss: Number | None
    score: Number | None
    sites: dict[str, Measured]

    @property
    def increases(self) -> dict[str, float]:
        """Site -> how much the loss rises without it."""
        if self.loss is None:
            return {}
        return {name: one.loss - self.loss for name, one in self.sites.items() if one.loss is not None}


class AcrossFile(Stored):
    """across.json: scores of one run on the other tasks of its study, and of the pre-trained model on all of them, in points.

    None where a score is undefined; `untuned` is empty where the task's head would be an untrained one.
    """

    scores: dict[str, Number | None]
    untuned: dict[str, Number | None] = {}


class Sample(BaseModel):
    """One row of the scored split (counted from 1): what the model read, what is right, what it wrote."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")
    row: Count
    prompt: str
    target: str
    text: str


class SamplesFile(Stored):
    """samples.json: what one run wrote for a few rows, the same for every run of a task."""

    split: str
    samples: list[Sample]


@dataclass(frozen=True, eq=False)
class Run:
    """One run; its histories are read when they are first asked for."""

    folder: Path  # of an archived run: <archive>/<fingerprint>, for messages
    config: Config
    result: Result | None  # None: not finished
    archived: Mapping[str, bytes] | None = None  # its files by name; None: they lie in the folder

    @property
    def status(self) -> str:
        return self.result.status if self.result else "unfinished"

    def content(self, name: str) -> bytes | None:
        """The bytes of one of its files; None where it has none of that name."""
        if self.archived is not None:
            return self.archived.get(name)
        return _bytes(self.folder / name)

    def contents(self) -> Mapping[str, bytes]:
        """Every file of the run that belongs to the schema, the result last."""
        return contents(self.folder) if self.archived is None else self.archived

    @cached_property
    def _metric_lines(self) -> tuple[list[dict], str | None]:
        return _lines(self.content(METRICS), self.folder / METRICS)

    @cached_property
    def train(self) -> list[TrainStep]:
        path = self.folder / METRICS
        return [checked(TrainStep, row, path) for row in self._metric_lines[0] if row.get("kind") == "train"]

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        path = self.folder / METRICS
        return [checked(Evaluation, row, path) for row in self._metric_lines[0] if row.get("kind") == "evaluation"]

    @cached_property
    def _rank_lines(self) -> tuple[list[dict], str | None]:
        return _lines(self.content(RANKS), self.folder / RANKS)

    @cached_property
    def rank_history(self) -> list[RankStep]:
        return [checked(RankStep, row, self.folder / RANKS) for row in self._rank_lines[0]]

    @cached_property
    def sites_file(self) -> SitesFile | None:
        """sites.json; None where nothing wrote it (an older run, a sweep's)."""
        content, path = self.content(SITES), self.folder / SITES
        return None if content is None else checked(SitesFile, _object(content, path), path)

    @property
    def sites(self) -> dict[str, SiteFacts]:
        """Site -> what became of its weight; empty where there is no sites.json."""
        return self.sites_file.sites if self.sites_file else {}

    @cached_property
    def knock_out(self) -> KnockOut | None:
        content, path = self.content(KNOCKOUT), self.folder / KNOCKOUT
        return None if content is None else checked(KnockOut, _object(content, path), path)

    @cached_property
    def _across(self) -> AcrossFile | None:
        content, path = self.content(ACROSS), self.folder / ACROSS
        return None if content is None else checked(AcrossFile, _object(content, path), path)

    @property
    def across(self) -> dict[str, float | None]:
        """Another task of the study -> score; empty where it was not asked for."""
        return self._across.scores if self._across else {}

    @property
    def untuned(self) -> dict[str, float | None]:
        """Task -> score of the pre-trained model."""
        return self._across.untuned if self._across else {}

    @cached_property
    def samples(self) -> list[Sample]:
        """Empty where there is no samples.json: a run that generates no texts, an older one, a sweep's."""
        content, path = self.content(SAMPLES), self.folder / SAMPLES
        return [] if content is None else checked(SamplesFile, _object(content, path), path).samples

    @property
    def predictions(self) -> "np.ndarray | None":
        """(rows of the scored split, ...), one array of numbers; None where none is kept, or where they are texts."""
        content, path = self.content(PREDICTIONS), self.folder / PREDICTIONS
        if content is None:
            return None
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            arrays = load(content)
        except SafetensorError as error:
            raise ValueError(f"{path} is cut off, changed or foreign ({error}); {REMEDY}") from None
        return arrays.get("predictions") if "offsets" not in arrays else None

    @property
    def notes(self) -> list[str]:
        """What a reader of this run must know about its files."""
        return [note for note in (self._metric_lines[1], self._rank_lines[1]) if note]


# -- writing -----------------------------------------------------------------------------------------------------------


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    write_json(folder / CONFIG, Config.written(values))


def write_result(folder: Path, values: Mapping[str, Any]) -> None:
    """values: keys of `Result`; a run that failed before its first step lacks all that is measured."""
    unmeasured = dict.fromkeys(("steps", "total_steps", "epochs", "pack_seconds", "seconds"))
    write_json(folder / RESULT, Result.written({**unmeasured, **values}))


def rename(folder: Path, config: Mapping[str, Any], result: Mapping[str, Any], names: Mapping[str, Any], quick: bool) -> None:
    """Writes a finished run down under other names (label, study): its numbers stay.

    config, result: what its two files hold, with keys of other versions.
    """
    write_json(folder / CONFIG, {**config, **names, "quick": quick})
    write_json(folder / RESULT, {**result, **names})


OF_SETTINGS = ("trials", "shared_with", "curves", "cells", "searched")  # of study.json: what it says of single settings


def with_others(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """A study.json that also says what one before it said of settings that it does not name."""
    named = now.get("methods", [])
    said = dict(now) | {"methods": [*before.get("methods", []), *(s for s in named if s not in before.get("methods", []))]}
    for key in OF_SETTINGS:
        kept = {setting: value for setting, value in before.get(key, {}).items() if setting not in named}
        if kept:
            said[key] = kept | now.get(key, {})
    return said


def write_study(folder: Path, values: Mapping[str, Any]) -> None:
    write_json(folder / STUDY, StudyFile.written(values))


def write_sites(folder: Path, kept: int, intruders: Mapping[str, Any], sites: Mapping[str, Any]) -> None:
    """kept: so many singular values of each update were written down."""
    write_json(folder / SITES, {"schema": SCHEMA, "kept": kept, "intruders": intruders, "sites": sites}, indent=None)


def write_knock_out(folder: Path, measured: Mapping[str, Any]) -> None:
    write_json(folder / KNOCKOUT, measured, indent=None)


def write_across(folder: Path, scores: Mapping[str, float | None], untuned: Mapping[str, float | None]) -> None:
    write_json(folder / ACROSS, {"schema": SCHEMA, "scores": dict(scores), "untuned": dict(untuned)})


def write_samples(folder: Path, split: str, samples: "list[dict[str, Any]]") -> None:
    """samples: keys of `Sample`."""
    write_json(folder / SAMPLES, {"schema": SCHEMA, "split": split, "samples": samples})


def write_predictions(folder: Path, split: str, predictions: "np.ndarray | Mapping[str, np.ndarray]") -> None:
    """predictions: (rows of the split, ...), or arrays by name (of texts: their bytes as "predictions", and "offsets")."""
    import numpy as np  # here, so that a report of plain tables starts without it
    from safetensors.numpy import save_file

    with replacing(folder / PREDICTIONS) as path:
        arrays = predictions if isinstance(predictions, Mapping) else {"predictions": predictions}
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, {"split": split})


# -- reading -----------------------------------------------------------------------------------------------------------


def is_run(path: Path) -> bool:
    return (path / CONFIG).is_file() or (path / RESULT).is_file()


def load_run(folder: str | Path, archived: Mapping[str, bytes] | None = None) -> Run:
    """One run, finished or not: of a folder, or of its files by name.

    Raises:
        ValueError: config.json is missing, or one of the two files is cut off or foreign, or they are of two runs.
    """
    folder = Path(folder)
    config_path, result_path = folder / CONFIG, folder / RESULT
    get = archived.get if archived is not None else lambda name: _bytes(folder / name)
    content = get(CONFIG)
    if content is None:
        raise ValueError(f"{config_path} is missing: not a run of rankwise, or a part of one; {REMEDY}")
    config = checked(Config, _object(content, config_path), config_path)
    content = get(RESULT)
    if content is None:
        return Run(folder, config, None, archived)
    result = checked(Result, _object(content, result_path), result_path)
    if result.status == "completed" and result.score is None and result.selection_score is None:
        raise ValueError(f"{result_path}: a completed run has a score; {REMEDY}")
    for key in ("fingerprint", "study", "phase", "setting", "task", "seed", "learning_rate"):
        ours, theirs = getattr(result, key), getattr(config, key)
        if ours != theirs:
            raise ValueError(f"{result_path}: {key} {ours!r} is not config.json's {theirs!r}; {REMEDY}")
    return Run(folder, config, result, archived)


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file, or something else in it (a kill before its first line)."""
    try:
        return as_object(path.read_bytes())
    except FileNotFoundError:
        return None


def as_object(content: bytes) -> dict[str, Any] | None:
    """The JSON object that these bytes are; None if they are something else."""
    try:
        value = json_text.parse(content.decode("utf-8-sig"))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, strictly: no NaN, no infinity, no half of a file.

    Raises:
        ValueError: something else is in it.
    """
    return _object(path.read_bytes(), path)


def checked(model: type[Model], value: dict, path: Path) -> Model:
    """The value as the schema has it.

    Raises:
        ValueError: it is not what the schema says; names `path` and the key.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ValueError(f"{path}: {where}: {first['msg']}{more}: cut off, changed or foreign; {REMEDY}") from None


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a run's folder that belongs to the schema, the result last."""
    return {name: content for name in FILES if (content := _bytes(folder / name)) is not None}


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = parse_json(content.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not strict JSON ({error}): cut off, changed or foreign; {REMEDY}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object: a foreign file; {REMEDY}")
    return value


def _lines(content: bytes | None, path: Path) -> tuple[list[dict], str | None]:
    """The objects of a .jsonl file, and a note if its last line was cut off (a kill does that; it is no error)."""
    lines = (content or b"").split(b"\n")
    rows: list[dict] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode("utf-8-sig"))
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            rows.append(row)
        except ValueError as error:
            if number == len(lines):  # no line end after it: the writer was killed
                return rows, f"the last line of {path.parent.name}/{path.name} was cut off and is left out"
            raise ValueError(f"{path}, line {number} is not strict JSON ({error}); {REMEDY}") from None
    return rows, None
