"""What a tracker is given, and what it must do with it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class TrackedRun(NamedTuple):
    """A run.  name: for a reader; settings: one level, values that JSON can hold."""

    fingerprint: str
    name: str
    settings: Mapping[str, Any]


class Point(NamedTuple):
    """Values by name ("train/loss", "validation/f1", "ranks/active") after an optimizer step."""

    step: int
    values: Mapping[str, float]


class Sink(Protocol):
    """A tracker.

    keeps: what it was sent stays when the process is killed, so that the rest alone is sent by the next one; else a run that is
    not finished is sent anew from its first point, and `send` replaces what an earlier process had of it.
    """

    keeps: bool

    def __init__(self, folder: Path, study: str):
        """folder: for what it keeps on this machine."""

    def send(self, run: TrackedRun, points: Sequence[Point]) -> None:
        """Takes points of a run, in the order of their steps; begins the run with the first call."""

    def finish(self, run: TrackedRun, status: str, summary: Mapping[str, float]) -> None:
        """Ends a run: "completed" or "failed", and what it reached."""

    def close(self) -> None:
        """Writes out and ends everything that is open."""
