"""The records of a study's runs in a tracker too: TensorBoard, Weights & Biases, MLflow; none unless it is asked for by name.

A tracker is one file here, a `Sink` (interface.py).  It is fed from what the runs wrote down (metrics.jsonl, ranks.jsonl,
result.json) and from nothing else, so that it can be asked for at any time: what is there already is sent first.  How far each
run was sent stands in OUT/tracking/sent/, so that a run that goes on sends no point twice.

    [study]    track = ["tensorboard"]        no part of a run's identity
    command    rankwise compare STUDY --track tensorboard,mlflow
"""

import importlib
import importlib.util
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rankwise.experiments.files import write_file
from rankwise.experiments.records import CONFIG, METRICS, RANKS, RESULT, read_object
from rankwise.experiments.tracking.interface import Point, Sink, TrackedRun

FOLDER = "tracking"


class Tracker(NamedTuple):
    sink: str  # module:class
    package: str  # what must be installed: its module


TRACKERS = {
    "tensorboard": Tracker("rankwise.experiments.tracking.tensorboard:TensorBoard", "tensorboard"),
    "wandb": Tracker("rankwise.experiments.tracking.wandb:WeightsAndBiases", "wandb"),
    "mlflow": Tracker("rankwise.experiments.tracking.mlflow:MLflow", "mlflow"),
}


def faults(names: Collection[str]) -> list[str]:
    """Trackers that are asked for and cannot be had."""
    return [
        f'track = "{name}": its package is not installed: pip install "rankwise[{name}]", or take it out'
        for name in names
        if importlib.util.find_spec(TRACKERS[name].package) is None
    ]


@dataclass
class _Sent:
    """How far a run was sent to a sink: bytes of each of its logs, and whether its end was."""

    metrics: int = 0
    ranks: int = 0
    status: str | None = None  # of its result; None: it was not finished


class Tracking:
    """The trackers of a study.

    Args:
        out: folder of the study's runs.
        say: called with a line where a tracker fails; the study goes on without it.
    """

    def __init__(self, names: Collection[str], study: str, out: Path, say: Callable[[str], None]):
        self.names, self.study, self.out, self.say = list(names), study, out, say
        self._sinks: dict[str, Sink] | None = None  # made with the first run, which may never come
        self._sent: dict[tuple[str, str], _Sent] = {}  # (tracker, fingerprint) -> so far

    def follow(self, folder: Path) -> None:
        """Sends what the run in this folder wrote since the last call, or since it was last sent to each tracker."""
        if not self.names:
            return
        if self._sinks is None:
            self._sinks = {}
            for name in self.names:
                self._guarded(name, lambda name=name: self._open(name))
        for name, sink in list(self._sinks.items()):
            self._guarded(name, lambda name=name, sink=sink: self._send(name, sink, folder))

    def close(self) -> None:
        """Ends what the trackers have open."""
        for name, sink in list((self._sinks or {}).items()):
            self._guarded(name, sink.close)
        self._sinks = None

    def _open(self, name: str) -> None:
        module, _, kind = TRACKERS[name].sink.partition(":")
        self._sinks[name] = getattr(importlib.import_module(module), kind)(self.out / FOLDER / name, self.study)

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        """A tracker that fails, whose network is gone or whose account has ended, ends no run."""
        try:
            act()
        except Exception as error:  # of whatever library
            self._sinks.pop(name, None)
            words = " ".join(str(error).split())[:200] or type(error).__name__
            self.say(f"note: {name} failed ({words}): the study goes on without it, and the next start sends what is missing")

    def _send(self, name: str, sink: Sink, folder: Path) -> None:
        config = read_object(folder / CONFIG)
        if config is None:
            return
        run = _tracked(folder.name, config)
        path = self.out / FOLDER / "sent" / name / f"{run.fingerprint}.json"
        sent = self._sent.get((name, run.fingerprint))
        if sent is None:
            known = read_object(path) or {}
            sent = _Sent(**{key: known[key] for key in ("metrics", "ranks", "status") if key in known})
            if not sink.keeps and sent.status is None:
                sent = _Sent()
            self._sent[name, run.fingerprint] = sent
        result = read_object(folder / RESULT)
        status = None if result is None else str(result.get("status"))
        if status is not None and status == sent.status:
            return
        points, sent.metrics = _points(folder / METRICS, sent.metrics)
        more, sent.ranks = _points(folder / RANKS, sent.ranks)
        points = sorted(points + more, key=lambda point: point.step)
        if not points and status is None:
            return
        sent.status = status
        if sink.keeps:  # noted first: a kill between the two loses a point there rather than showing it twice
            self._note(path, sent)
        sink.send(run, points)
        if status is not None:
            sink.finish(run, status, _summary(result))
        if not sink.keeps and status is not None:
            self._note(path, sent)

    def _note(self, path: Path, sent: _Sent) -> None:
        write_file(path, json.dumps(vars(sent)) + "\n")


def _tracked(fingerprint: str, config: Mapping[str, Any]) -> TrackedRun:
    """What a tracker calls a run, and its settings on one level."""
    names = ("setting", "method", "task", "model", "phase", "seed", "learning_rate", "precision", "device")
    settings = {key: config[key] for key in names if config.get(key) is not None}
    for group in ("method_settings", "training"):
        settings |= {f"{group}.{key}": value for key, value in (config.get(group) or {}).items() if value is not None}
    words = (config.get("setting"), config.get("task"), config.get("phase"), f"lr {config.get('learning_rate')}")
    return TrackedRun(fingerprint, f"{' '.join(map(str, words))} seed {config.get('seed')}", settings)


def _points(path: Path, start: int) -> tuple[list[Point], int]:
    """The points of the whole lines of a log from that byte on, and the byte after them.

    A log that is shorter was cut back to its checkpoint: the lines that follow are those that were sent already.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return [], start
    whole = content[: content.rfind(b"\n") + 1]
    return [_point(json.loads(line)) for line in whole.splitlines()], start + len(whole)


def _point(line: Mapping[str, Any]) -> Point:
    match line.get("kind"):
        case "train":
            values = {f"train/{key}": line.get(key) for key in ("loss", "learning_rate", "penalty")}
        case "evaluation":
            values = {f"{line['split']}/{key}": value for key, value in line["metrics"].items()}
        case _:
            values = {f"ranks/{key}": line.get(key) for key in ("active", "live", "budget")}
    return Point(line["step"], {key: float(value) for key, value in values.items() if value is not None})


def _summary(result: Mapping[str, Any]) -> dict[str, float]:
    keys = ("score", "selection_score", "active_parameters", "trainable_parameters", "seconds", "peak_memory_bytes")
    return {key: float(result[key]) for key in keys if isinstance(result.get(key), int | float)}
