"""Read the folders that runs leave behind: one `Result` a run, one `Study` a comparison.

A run is a folder DIR/<fingerprint>/ or DIR/runs/<fingerprint>/ with config.json (written first), metrics.jsonl and
ranks.jsonl (a line at a time), perhaps sites.json and knockout.json, and result.json (written last, at once). So a folder
without result.json is an unfinished run, and a last line without its end is what a kill leaves: both are told, neither is an
error. Everything else that is not what this file says is refused by name. The schema of a result is defined here and nowhere
else in reports.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rankwise.variants.settings import METHODS, check

REMEDY = "move that run's folder away and run `rankwise compare` again"
FILES = ("config.json", "metrics.jsonl", "ranks.jsonl", "sites.json", "knockout.json", "result.json")  # the result last
FULL = "full"  # the method that every difference is taken to: full fine-tuning

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Ranks = dict[str, Count]
Model = TypeVar("Model", bound=BaseModel)


class Stored(BaseModel):
    """What every stored object shares: strict types, finite numbers; keys that a later version adds are passed over."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())
    schema_version: Literal[1] = Field(alias="schema")


class Result(Stored):
    """result.json: what one run came to. Metrics are points, 0 to 100; more is better."""

    study: str
    phase: Literal["sweep", "final"]
    fingerprint: str
    method: str
    setting: str
    task: str
    model: str
    seed: int
    learning_rate: Number
    status: Literal["completed", "failed"]
    error: str | None = None
    traceback: str | None = None
    metric: str
    selection_score: Number | None
    selection_split: str
    score: Number | None
    split: str
    metrics: dict[str, dict[str, Number]] = {}
    steps: Count | None
    total_steps: Count | None
    epochs: Number | None
    skipped_steps: Count | None = None
    tokens_per_second: Number | None = None
    seconds: Number | None
    pack_seconds: Number | None
    pack_size: Annotated[int, Field(ge=1)]
    pack_index: Count
    peak_memory_bytes: Count | None = None
    pack_peak_memory_bytes: Count | None = None
    trainable_parameters: Count | None = None
    nominal_parameters: Count | None = None  # what trainable_parameters were before a run shrank; the same where none did
    active_parameters: Count | None = None
    head_parameters: Count | None = None
    scale: dict[str, Number] | Number | None = None
    rung: Count = 0
    protocol: Literal["held-out", "best-dev-epoch"] = "held-out"
    scored_step: Count | None = None
    score_rows: Count | None = None
    score_standard_error: Number | None = None
    ranks: Ranks = {}
    nominal_ranks: Ranks = {}
    rank_scores: dict[str, Number | None] = {}
    physical_ranks: Ranks = {}  # what parameters were held for at the end
    device: str
    precision: str
    dropout_note: str | None = None
    packing_note: str | None = None
    final_train_loss: Number | None = None


class Config(Stored):
    """config.json: what one run was asked to do, and where it ran."""

    fingerprint: str
    study: str
    quick: bool
    phase: Literal["sweep", "final"]
    method: str
    setting: str
    task: str
    model: str
    seed: int
    learning_rate: Number
    rung: Count = 0
    method_settings: dict[str, Any] = {}
    allocation: str | None = None  # what placed the ranks; None in runs from before it was written
    ranks_of: str | None = None  # label of the setting whose final ranks were taken
    training: dict[str, Any] = {}
    targets: Any = None
    targets_resolved: list[str] = []
    caption: list[str] = []
    versions: dict[str, Any] = {}
    threads: int | None = None
    device: str | None = None
    device_name: str | None = None
    precision: str | None = None
    commit: str | None = None
    dirty: bool | None = None

    @property
    def placed_by(self) -> str:
        """What placed the ranks: "none" has any, "uniform", "given", "random", "learned", "taken", "permuted"."""
        if self.allocation is not None:
            return self.allocation
        known = METHODS.get(self.method)
        try:
            return known.placed_by(check(self.method, self.method_settings))
        except (ValueError, AttributeError):  # of another version, or a method that is no longer there
            if known is None or not known.takes_targets:
                return "none"
            return known.allocation or ("uniform" if known.takes_ranks else "learned")


class StudyFile(Stored):
    """study.json: the names and the order of a study's settings."""

    study: str
    quick: bool
    title: str
    captions: list[str] = []
    reference: str | None = None
    methods: list[str]
    complete: bool
    protocol: Literal["held-out", "best-dev-epoch"] = "held-out"
    margin: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seeds: list[int] = []
    trials: dict[str, Count] = {}
    budget: dict[str, Any] = {}


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


class SitesFile(Stored):
    """sites.json: what became of every weight of one final run."""

    intruders: dict[str, Number]
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


@dataclass(frozen=True, eq=False)
class Run:
    """One run's folder; its histories are read when they are first asked for."""

    folder: Path
    config: Config
    result: Result | None  # None: not finished

    @property
    def status(self) -> str:
        return self.result.status if self.result else "unfinished"

    @cached_property
    def _metric_lines(self) -> tuple[list[dict], str | None]:
        return read_lines(self.folder / "metrics.jsonl")

    @cached_property
    def train(self) -> list[TrainStep]:
        path = self.folder / "metrics.jsonl"
        return [_check(TrainStep, row, path) for row in self._metric_lines[0] if row.get("kind") == "train"]

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        path = self.folder / "metrics.jsonl"
        return [_check(Evaluation, row, path) for row in self._metric_lines[0] if row.get("kind") == "evaluation"]

    @cached_property
    def _rank_lines(self) -> tuple[list[dict], str | None]:
        return read_lines(self.folder / "ranks.jsonl")

    @cached_property
    def rank_history(self) -> list[RankStep]:
        return [_check(RankStep, row, self.folder / "ranks.jsonl") for row in self._rank_lines[0]]

    @cached_property
    def sites(self) -> dict[str, SiteFacts]:
        """Site -> what became of its weight; empty where nothing wrote it down (an older run, a sweep's)."""
        path = self.folder / "sites.json"
        return _check(SitesFile, read_json(path), path).sites if path.is_file() else {}

    @cached_property
    def knock_out(self) -> KnockOut | None:
        path = self.folder / "knockout.json"
        return _check(KnockOut, read_json(path), path) if path.is_file() else None

    @property
    def notes(self) -> list[str]:
        """What a reader of this run must know about its files."""
        return [note for note in (self._metric_lines[1], self._rank_lines[1]) if note]


@dataclass(frozen=True, eq=False)
class Arm:
    """One setting of a study as the table shows it: its final runs at the chosen rate, ordered by seed."""

    setting: str
    method: str
    rate: float | None  # None: no final run yet
    final: tuple[Run, ...]
    grid: dict[float, tuple[Run, ...]]  # every rate that was tried, ascending: its runs on the highest rung that it reached

    def of(self, status: str) -> list[Run]:
        return [run for run in self.final if run.status == status]

    @property
    def completed(self) -> list[Result]:
        return [run.result for run in self.of("completed")]

    @property
    def scores(self) -> dict[int, float]:
        """Seed -> score on the score split."""
        return {result.seed: result.score for result in self.completed if result.score is not None}

    @property
    def allocations(self) -> set[str]:
        """What placed the ranks of its runs: see `Config.placed_by`."""
        return {run.config.placed_by for run in (*self.final, *(one for runs in self.grid.values() for one in runs))}

    @property
    def has_ranks(self) -> bool:
        return any(result.nominal_ranks or result.ranks for result in self.completed)


@dataclass(frozen=True)
class BestRate:
    rate: float
    score: float
    at_edge: bool  # of a grid of two rates or more: beyond it nothing was tried


@dataclass(frozen=True)
class Study:
    """The runs of one study. `parts` cuts it by task and model; the rest is meant for one part."""

    name: str
    folder: Path
    title: str
    quick: bool
    captions: tuple[str, ...]
    reference: str | None
    settings: tuple[str, ...]  # labels, in the order of the study's file
    complete: bool | None  # None: no study.json says so
    runs: tuple[Run, ...]
    protocol: str = "held-out"
    margin: float | None = None  # points within which a setting is equivalent to the reference, fixed beforehand
    seeds: tuple[int, ...] = ()  # that the study asks for
    trials: Mapping[str, int] = field(default_factory=dict)  # label -> most rates that it may try
    budget: Mapping[str, Any] = field(default_factory=dict)  # what is equal, as the study's file says it

    def parts(self) -> list["Study"]:
        keys = sorted({(run.config.task, run.config.model) for run in self.runs})
        return [replace(self, runs=tuple(r for r in self.runs if (r.config.task, r.config.model) == k)) for k in keys]

    @property
    def task(self) -> str:
        return self.runs[0].config.task

    @property
    def model(self) -> str:
        return self.runs[0].config.model

    def results(self) -> list[Result]:
        return [run.result for run in self.runs if run.result]

    @property
    def metric(self) -> str | None:
        return next((result.metric for result in self.results()), None)

    @cached_property
    def arms(self) -> list[Arm]:
        """One arm a setting, in the study's order; settings of which nothing was started are left out."""
        by_setting = {setting: [r for r in self.runs if r.config.setting == setting] for setting in self.settings}
        return [_arm(setting, runs) for setting, runs in by_setting.items() if runs]

    @property
    def reference_arms(self) -> list[Arm]:
        """What differences are taken to: full fine-tuning where there is one, then the study's own reference."""
        full = [arm for arm in self.arms if arm.method == FULL][:1]
        named = [arm for arm in self.arms if arm.setting == self.reference and arm not in full]
        return full + named

    @property
    def reference_arm(self) -> Arm | None:
        """What verdicts are taken against: the study's own reference, else full fine-tuning."""
        named = next((arm for arm in self.arms if arm.setting == self.reference), None)
        return named or next(iter(self.reference_arms), None)


def best_rate(arm: Arm) -> BestRate | None:
    """The rate with the best mean selection score; a rate at which a seed failed wins only where all rates have one.

    Ties go to the smaller rate. A failed rate still counts as tried when the grid's edge is looked for.
    """
    top = max((_rung(runs) for runs in arm.grid.values()), default=0)  # a shorter run's score is not compared with these
    scores = {rate: rate_score(runs) for rate, runs in arm.grid.items() if _rung(runs) == top}
    scores = {rate: score for rate, score in scores.items() if score is not None}
    if len(arm.grid) < 2 or not scores:
        return None
    sound = [rate for rate in scores if all(run.status != "failed" for run in arm.grid[rate])] or list(scores)
    rate = max(sound, key=lambda rate: (scores[rate], -rate))
    return BestRate(rate, scores[rate], at_edge=rate in (min(arm.grid), max(arm.grid)))


def rate_score(runs: Iterable[Run]) -> float | None:
    """Mean selection score of the completed runs."""
    scores = [r.result.selection_score for r in runs if r.status == "completed" and r.result.selection_score is not None]
    return sum(scores) / len(scores) if scores else None


def _rung(runs: Iterable[Run]) -> int:
    return max((run.config.rung for run in runs), default=0)


def _arm(setting: str, runs: list[Run]) -> Arm:
    def at(rate: float, among: list[Run]) -> tuple[Run, ...]:
        return tuple(sorted((r for r in among if r.config.learning_rate == rate), key=lambda r: r.config.seed))

    def rates(among: list[Run]) -> list[float]:
        return sorted({run.config.learning_rate for run in among})

    final = [run for run in runs if run.config.phase == "final"]
    sweep = [run for run in runs if run.config.phase == "sweep"]
    tried = {rate: at(rate, sweep or final) for rate in rates(sweep or final)}
    grid = {rate: tuple(run for run in found if run.config.rung == _rung(found)) for rate, found in tried.items()}
    arm = Arm(setting, runs[0].config.method, None, (), grid)
    best = best_rate(arm)
    final_rates = rates(final)
    if not final_rates:
        return arm
    # More than one rate among the final runs: a grid that was widened after some of them, or a study without a sweep.
    rate = best.rate if best and best.rate in final_rates else max(final_rates, key=lambda r: len(at(r, final)))
    return replace(arm, rate=rate, final=at(rate, final))


def load(folder: str | Path) -> Study:
    """The one study of a folder.

    Raises:
        ValueError: no runs there, several studies there, or a file that is cut off or foreign.
    """
    studies = load_all(folder)
    if len(studies) > 1:
        names = ", ".join(study.name for study in studies)
        raise ValueError(f"{folder} holds the runs of {len(studies)} studies ({names}); give a folder of one study")
    return studies[0]


def load_all(folder: str | Path) -> list[Study]:
    """Every study of a folder, by name; see `load`."""
    folder = Path(folder)
    runs = [load_run(path) for path in _run_folders(folder)]
    by_fingerprint: dict[str, Run] = {}
    for run in runs:  # a run in DIR and in DIR/runs is one run; the finished one counts
        known = by_fingerprint.get(run.config.fingerprint)
        if known is None or known.result is None:
            by_fingerprint[run.config.fingerprint] = run
    by_study: dict[str, list[Run]] = {}
    for run in by_fingerprint.values():
        by_study.setdefault(run.config.study, []).append(run)
    path = folder / "study.json"
    described = _check(StudyFile, read_json(path), path) if path.is_file() else None
    return [_study(name, folder, by_study[name], described) for name in sorted(by_study)]


def copy_finished(folder: str | Path, out: str | Path) -> list[Path]:
    """Copies every finished run, without weights, to out/runs, and study.json beside: what a committed study is."""
    copied = []
    for study in load_all(folder):
        for run in study.runs:
            if run.result is None:
                continue
            target = Path(out) / "runs" / run.config.fingerprint
            target.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                if (run.folder / name).is_file():
                    write_file(target / name, (run.folder / name).read_bytes())
            copied.append(target)
    if (Path(folder) / "study.json").is_file():
        write_file(Path(out) / "study.json", (Path(folder) / "study.json").read_bytes())
    return copied


def load_run(folder: str | Path) -> Run:
    """One run, finished or not.

    Raises:
        ValueError: config.json is missing, or one of the two files is cut off or foreign, or they are of two runs.
    """
    folder = Path(folder)
    config_path, result_path = folder / "config.json", folder / "result.json"
    if not config_path.is_file():
        raise ValueError(f"{config_path} is missing: not a run of rankwise, or a part of one; {REMEDY}")
    config = _check(Config, read_json(config_path), config_path)
    if not result_path.is_file():
        return Run(folder, config, None)
    result = _check(Result, read_json(result_path), result_path)
    if result.status == "completed" and result.score is None and result.selection_score is None:
        raise ValueError(f"{result_path}: a completed run has a score; {REMEDY}")
    for key in ("fingerprint", "study", "phase", "setting", "task", "seed", "learning_rate"):
        ours, theirs = getattr(result, key), getattr(config, key)
        if ours != theirs:
            raise ValueError(f"{result_path}: {key} {ours!r} is not config.json's {theirs!r}; {REMEDY}")
    return Run(folder, config, result)


def _run_folders(folder: Path) -> list[Path]:
    if not folder.exists():
        raise ValueError(f"{folder} does not exist; give the folder of a study, which `rankwise compare --out` names")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder of a study, which `rankwise compare --out` names")
    if is_run(folder):
        raise ValueError(f"{folder} is one run; give the study's folder above it, or ask `rankwise ranks` for its ranks")
    found = [path for parent in (folder, folder / "runs") for path in _folders(parent) if is_run(path)]
    if not found:
        below = [path.name for path in _folders(folder) if any(map(is_run, _folders(path)))]
        hint = f"; it holds studies: {', '.join(below)}" if below else ""
        raise ValueError(
            f"{folder} holds no runs (no */config.json or runs/*/config.json){hint}; "
            "give the folder that `rankwise compare` wrote"
        )
    return found


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def is_study(path: Path) -> bool:
    """Whether runs lie in this folder, or in its folder runs."""
    return any(is_run(child) for parent in (path, path / "runs") for child in _folders(parent))


def is_run(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "result.json").is_file()


def _study(name: str, folder: Path, runs: list[Run], described: StudyFile | None) -> Study:
    info = described if described and described.study == name else None
    started = sorted(runs, key=lambda r: (r.config.phase, r.config.learning_rate, r.config.seed, r.config.fingerprint))
    settings = dict.fromkeys([*(info.methods if info else ()), *(run.config.setting for run in started)])
    return Study(
        name=name,
        folder=folder,
        title=info.title if info else name,
        quick=(info.quick if info else False) or any(run.config.quick for run in runs),
        captions=tuple(info.captions) if info else (),
        reference=info.reference if info else None,
        settings=tuple(settings),
        complete=info.complete if info else None,
        runs=tuple(started),
        **({key: getattr(info, key) for key in ("protocol", "margin", "trials", "budget")} if info else {}),
        seeds=tuple(info.seeds) if info else (),
    )


def read_json(path: Path) -> dict:
    """A JSON object, strictly: no NaN, no infinity, no half of a file."""
    try:
        text = path.read_bytes().decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not strict JSON ({error}): cut off, changed or foreign; {REMEDY}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object: a foreign file; {REMEDY}")
    return value


def read_lines(path: Path) -> tuple[list[dict], str | None]:
    """The objects of a .jsonl file, and a note if its last line was cut off (a kill does that; it is no error)."""
    if not path.is_file():
        return [], None
    lines = path.read_bytes().split(b"\n")
    rows: list[dict] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            rows.append(row)
        except ValueError as error:
            if number == len(lines):  # no line end after it: the writer was killed
                return rows, f"the last line of {path.parent.name}/{path.name} was cut off and is left out"
            raise ValueError(f"{path}, line {number} is not strict JSON ({error}); {REMEDY}") from None
    return rows, None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of strict JSON")


def _finite(text: str) -> float:
    if not isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def _check(model: type[Model], value: dict, path: Path) -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ValueError(f"{path}: {where}: {first['msg']}{more}: cut off, changed or foreign; {REMEDY}") from None


def write_file(path: Path, content: str | bytes) -> None:
    """Whole or not at all: a reader never sees half a file, and a full disk leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
