"""Read the runs of a study: one `Run` a run, one `Study` a comparison, one `Arm` a setting of it.

Runs lie in DIR/<fingerprint>/ or DIR/runs/<fingerprint>/, or in the archive DIR/runs.parquet of a committed study; all of
them count, and where two are the same run the finished one does.  What a run's files hold is said in experiments/records.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rankwise.experiments import archive
from rankwise.experiments import labels as stored_labels
from rankwise.experiments.factors import Cell
from rankwise.experiments.files import write_file, write_json
from rankwise.experiments.hypotheses import Hypothesis
from rankwise.experiments.rank_curves import Place
from rankwise.experiments.records import (
    STUDY,
    STUDY_FILE,
    Result,
    Run,
    StudyFile,
    checked,
    is_run,
    load_run,
    read_json,
    read_object,
    with_others,
)
from rankwise.experiments.search_space import Searched
from rankwise.experiments.study import sweep

BESIDE = (STUDY, STUDY_FILE, stored_labels.NAME, "budget.json")  # what a committed study keeps beside its runs
FROM_THE_STUDY_FILE = ("kind", "protocol", "margin", "trials", "budget", "shared_with", "design", "curves", "cells", "searched")
FULL = "full"  # the method that every difference is taken to: full fine-tuning


Grid = dict[float, tuple[Run, ...]]  # every rate that was tried, ascending: its runs on the highest rung that it reached


@dataclass(frozen=True, eq=False)
class Arm:
    """One setting of a study as the table shows it: its final runs at the chosen rate, ordered by seed."""

    setting: str
    method: str
    rate: float | None  # None: no final run yet
    final: tuple[Run, ...]
    grid: Grid
    shared_grids: tuple[Grid, ...] = ()  # those of the settings that share its rate

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
    score: float  # mean selection score of the arm itself
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
    kind: str = "comparison"  # or "randomized": one random allocation for each seed (reports/randomized.py)
    protocol: str = "held-out"
    margin: float | None = None  # points within which a setting is equivalent to the reference, fixed beforehand
    seeds: tuple[int, ...] = ()  # that the study asks for
    trials: Mapping[str, int] = field(default_factory=dict)  # label -> most rates that it may try
    shared_with: Mapping[str, str] = field(default_factory=dict)  # label -> that of the setting whose rate it shares
    design: str = "chosen-rate"  # how rates are chosen: this, "shared-rate" or "whole-curve" (reports/designs.py)
    budget: Mapping[str, Any] = field(default_factory=dict)  # what is equal, as the study's file says it
    hypotheses: tuple[Hypothesis, ...] = ()  # what the study set out to test
    looks: tuple[int, ...] = ()  # numbers of seeds at which it may stop
    curves: Mapping[str, Place] = field(default_factory=dict)  # setting -> where it stands on a curve of ranks
    cells: Mapping[str, Cell] = field(default_factory=dict)  # setting -> which combination of parts it is
    searched: Mapping[str, Searched] = field(default_factory=dict)  # setting that a search found -> by how many runs
    whole: "Study | None" = field(default=None, repr=False)  # the study that this is a part of

    def parts(self) -> list["Study"]:
        keys = sorted({(run.config.task, run.config.model) for run in self.runs})
        whole = self.whole or self
        return [
            replace(self, runs=tuple(r for r in self.runs if (r.config.task, r.config.model) == k), whole=whole) for k in keys
        ]

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
    def labels(self) -> dict[stored_labels.Key, stored_labels.Labels]:
        """What the runs' predictions are scored against, by data hash and split; none in studies from before it was kept."""
        return stored_labels.read(self.folder)

    def labels_of(self, run: Run, split: str | None = None) -> stored_labels.Labels | None:
        """The labels of the split that the run was scored on, or of another one; None where they are not kept."""
        return self.labels.get((run.config.data_hash or "", split or run.result.split)) if run.result else None

    @cached_property
    def arms(self) -> list[Arm]:
        """One arm a setting, in the study's order; settings of which nothing was started are left out."""
        by_setting = {setting: [r for r in self.runs if r.config.setting == setting] for setting in self.settings}
        by_setting = {setting: runs for setting, runs in by_setting.items() if runs}
        grids = {setting: _grid(runs, self.design) for setting, runs in by_setting.items()}
        return [
            _arm(setting, runs, grids[setting], tuple(grids[other] for other in self.sharers(setting) if other in grids))
            for setting, runs in by_setting.items()
        ]

    def sharers(self, setting: str) -> list[str]:
        """The other settings that train at one rate with this one."""
        leader = self.shared_with.get(setting, setting)
        return [s for s in self.settings if s != setting and self.shared_with.get(s, s) == leader]

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
    """The rate that the sweep chooses (`sweep.best_rate`), by the runs of the arm and of all arms that share its rate.

    None where there was no choice, or no run of the arm at that rate completed.  A failed rate still counts as tried when
    the grid's edge is looked for.
    """
    grids = (arm.grid, *arm.shared_grids)
    top = max((_rung(runs) for grid in grids for runs in grid.values()), default=0)
    # A shorter run's score, of a lower rung, is not compared with those of the top one.
    finished = [run for grid in grids for runs in grid.values() for run in runs if run.result and run.config.rung == top]
    scores = sweep.by_rate((run.config.learning_rate, run.result.selection_score) for run in finished)
    if len(arm.grid) < 2 or not scores:
        return None
    rate = sweep.best_rate(scores)
    score = rate_score(arm.grid.get(rate, ()))
    return None if score is None else BestRate(rate, score, sweep.is_at_edge(rate, {r for grid in grids for r in grid}))


def rate_score(runs: Iterable[Run]) -> float | None:
    """Mean selection score of the completed runs."""
    scores = [r.result.selection_score for r in runs if r.status == "completed" and r.result.selection_score is not None]
    return sum(scores) / len(scores) if scores else None


def _rung(runs: Iterable[Run]) -> int:
    return max((run.config.rung for run in runs), default=0)


def _at(rate: float, runs: Iterable[Run]) -> tuple[Run, ...]:
    """The runs at that rate, ordered by seed."""
    return tuple(sorted((run for run in runs if run.config.learning_rate == rate), key=lambda run: run.config.seed))


def _rates(runs: Iterable[Run]) -> list[float]:
    return sorted({run.config.learning_rate for run in runs})


def _grid(runs: Sequence[Run], design: str) -> Grid:
    """The grid of a setting with these runs: that of its sweep, or of its final runs where none chose the rate."""
    phase = "final" if design == "whole-curve" else "sweep"
    tried = [run for run in runs if run.config.phase == phase] or runs
    by_rate = {rate: _at(rate, tried) for rate in _rates(tried)}
    return {rate: tuple(run for run in at if run.config.rung == _rung(at)) for rate, at in by_rate.items()}


def _arm(setting: str, runs: Sequence[Run], grid: Grid, shared_grids: tuple[Grid, ...]) -> Arm:
    final = [run for run in runs if run.config.phase == "final"]
    arm = Arm(setting, runs[0].config.method, None, (), grid, shared_grids)
    best = best_rate(arm)
    rates = _rates(final)
    if not rates:
        return arm
    # More than one rate among the final runs: a grid that was widened after some of them, or a study without a sweep.
    rate = best.rate if best and best.rate in rates else max(rates, key=lambda r: len(_at(r, final)))
    return replace(arm, rate=rate, final=_at(rate, final))


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
    stored = folder / archive.NAME
    runs += [load_run(stored / fingerprint, files) for fingerprint, files in archive.read(stored).items()]
    by_fingerprint: dict[str, Run] = {}
    for run in runs:  # a run in DIR, in DIR/runs and in the archive is one run; the finished one counts
        known = by_fingerprint.get(run.config.fingerprint)
        if known is None or known.result is None:
            by_fingerprint[run.config.fingerprint] = run
    by_study: dict[str, list[Run]] = {}
    for run in by_fingerprint.values():
        by_study.setdefault(run.config.study, []).append(run)
    path = folder / STUDY
    described = checked(StudyFile, read_json(path), path) if path.is_file() else None
    return [_study(name, folder, by_study[name], described) for name in sorted(by_study)]


def archive_finished(folder: str | Path, out: str | Path) -> Path:
    """Writes what a committed study keeps: every finished run, without weights, in one archive, and study.json beside it.

    Runs that the archive in `out` held before stay in it, and what its study.json said of their settings.
    """
    folder, out = Path(folder), Path(out)
    path = out / archive.NAME
    found = archive.read(path)
    for study in load_all(folder):
        found |= {run.config.fingerprint: run.contents() for run in study.runs if run.result is not None}
    archive.write(path, found.values())
    before, now = (read_object(one / STUDY) or {} for one in (out, folder))
    for name in BESIDE:
        if (folder / name).is_file():
            write_file(out / name, (folder / name).read_bytes())
    if now and set(before.get("methods", [])) - set(now.get("methods", [])):  # a folder of runs alone has no study.json
        write_json(out / STUDY, with_others(before, now))
    return path


def _run_folders(folder: Path) -> list[Path]:
    if not folder.exists():
        raise ValueError(f"{folder} does not exist; give the folder of a study, which `rankwise compare --out` names")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder of a study, which `rankwise compare --out` names")
    if is_run(folder):
        raise ValueError(f"{folder} is one run; give the study's folder above it, or ask `rankwise ranks` for its ranks")
    found = [path for parent in (folder, folder / "runs") for path in _folders(parent) if is_run(path)]
    if not found and not (folder / archive.NAME).is_file():
        below = [path.name for path in _folders(folder) if is_study(path)]
        hint = f"; it holds studies: {', '.join(below)}" if below else ""
        raise ValueError(
            f"{folder} holds no runs (no */config.json, runs/*/config.json or {archive.NAME}){hint}; "
            "give the folder that `rankwise compare` wrote"
        )
    return found


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def is_study(path: Path) -> bool:
    """Whether runs lie in this folder, in its folder runs, or in its archive."""
    return (path / archive.NAME).is_file() or any(
        is_run(child) for parent in (path, path / "runs") for child in _folders(parent)
    )


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
        **({key: getattr(info, key) for key in FROM_THE_STUDY_FILE} if info else {}),
        seeds=tuple(info.seeds) if info else (),
        hypotheses=tuple(info.hypotheses) if info else (),
        looks=tuple(info.looks) if info else (),
    )
