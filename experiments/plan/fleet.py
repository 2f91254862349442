"""A study on many machines, event by event: what a list scheduler and one writer make of its packs.

A pack trains on one machine.  A free machine takes the first pack of the plan whose needs are met.  Every so many seconds of
training a machine hands its state to the writer, the one process that touches the disk, and trains on; it hands over no other
before that one is written.  At a pack's end the results of its members go to the writer and the machine is free; what needs the
pack waits until they are written.  The writer takes one thing after the other: in the order in which they came, or results
first, and then without the checkpoints of packs that have ended.

A machine that fails loses what it trained since it last handed its state over, and is back after a while; its pack goes on
elsewhere, first in the line.  Not simulated: the network, loading a model, a writer that fails.  No torch, and no draw but that
of the failures: the same arguments give the same outcome.
"""

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.experiments.files import parse_json

ASKED, ENDED, FAILED, BACK, WRITTEN = range(5)  # kinds of events


@dataclass(frozen=True)
class Job:
    """A pack: seconds that it trains, bytes of a checkpoint, files and bytes of all its results, and the jobs that it needs."""

    seconds: float
    checkpoint_bytes: int = 0
    result_files: int = 1
    result_bytes: int = 0
    needs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Writer:
    """What a file takes: `file_seconds`, and its bytes at `bytes_per_second`."""

    file_seconds: float
    bytes_per_second: float

    def checkpoint(self, job: Job) -> float:
        return self.file_seconds + job.checkpoint_bytes / self.bytes_per_second

    def results(self, job: Job) -> float:
        return self.file_seconds * job.result_files + job.result_bytes / self.bytes_per_second


@dataclass(frozen=True)
class Fleet:
    """Machines of one kind; a failure of one comes every `failure_seconds` on average, exponentially, and takes it away for
    `repair_seconds`; none if None. results_first: the order in which the writer takes what waits."""

    machines: int
    checkpoint_seconds: float
    failure_seconds: float | None = None
    repair_seconds: float = 600.0
    seed: int = 0
    results_first: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    makespan: seconds until everything is written. busy: machine-seconds of training, the lost ones among them. lost: those that
    were trained twice. down: machine-seconds of repair. writer: seconds that the writer wrote. checkpoints: written, and of
    those that fell due `skipped` while the machine's last one was not written yet. longest_line: things that waited for the
    writer at one time.
    """

    makespan: float
    busy: float
    lost: float
    down: float
    writer: float
    checkpoints: int
    skipped: int
    checkpoint_bytes: int
    result_bytes: int
    longest_line: int
    failures: int
    machines: int

    @property
    def idle_share(self) -> float:
        """Of the machine-seconds until the end, those in which a machine was whole and had nothing to train."""
        return 1 - (self.busy + self.down) / (self.machines * self.makespan)

    @property
    def writer_share(self) -> float:
        """Of the time until the end, that in which the writer wrote."""
        return self.writer / self.makespan


@dataclass
class _Machine:
    """What a machine trains: since when, from which second of the job on, and how far its last checkpoint is."""

    job: int | None = None
    began: float = 0.0
    done_before: float = 0.0
    saved: float = 0.0
    is_waiting: bool = False  # its last checkpoint is not written
    term: int = 0  # events of an earlier term are void
    down_since: float | None = None


def read_times(path: Path) -> dict[str, Any]:
    """What `rankwise bench --full --json FILE` measured.

    Raises:
        ValueError: no such file, or no times of packs in it.
    """
    remedy = "give what `rankwise bench --full --json FILE` wrote"
    if not path.is_file():
        raise ValueError(f"--fleet {path}: no such file: {remedy}")
    try:
        found = parse_json(path.read_bytes())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"--fleet {path}: not JSON ({error}): {remedy}") from None
    if not isinstance(found, dict) or not isinstance(found.get("machine"), dict) or not found.get("throughput"):
        raise ValueError(f"--fleet {path}: it has no times of packs: {remedy}")
    return found


def lower_bounds(jobs: Sequence[Job], machines: int, writer: Writer) -> dict[str, float]:
    """Seconds that no schedule without failures is under: all work shared out evenly, the longest chain of needs, and the
    writer's own work on the results (checkpoints can be left out)."""
    ends: list[float] = []
    for job in jobs:
        start = max((ends[i] for i in job.needs), default=0.0)
        ends.append(start + job.seconds + writer.results(job))
    return {
        "work": sum(job.seconds for job in jobs) / machines,
        "chain": max(ends),
        "writer": sum(writer.results(job) for job in jobs),
    }


def saturation(jobs: Sequence[Job], checkpoint_seconds: float, writer: Writer) -> float:
    """Machines, all of them training all the time, that hand over as much as the writer can write."""
    written = 0.0
    for job in jobs:
        due = math.ceil(job.seconds / checkpoint_seconds) - 1  # none at the end
        written += due * writer.checkpoint(job) + writer.results(job)
    return sum(job.seconds for job in jobs) / written


def simulate(jobs: Sequence[Job], fleet: Fleet, writer: Writer) -> Outcome:
    """
    Args:
        jobs: in the order in which they are taken; each needs earlier ones alone.
    """
    return _Simulation(jobs, fleet, writer).run()


class _Simulation:
    def __init__(self, jobs: Sequence[Job], fleet: Fleet, writer: Writer):
        assert all(need < i for i, job in enumerate(jobs) for need in job.needs), "a job needs a later one"
        self.jobs, self.fleet, self.writer = jobs, fleet, writer
        self.draw = random.Random(fleet.seed)
        self.machines = [_Machine() for _ in range(fleet.machines)]
        self.free = list(range(fleet.machines))
        self.wanting = [len(set(job.needs)) for job in jobs]
        self.needed_by: list[list[int]] = [[] for _ in jobs]
        for i, job in enumerate(jobs):
            for need in set(job.needs):
                self.needed_by[need].append(i)
        self.ready = [(1, i) for i, wanting in enumerate(self.wanting) if not wanting]  # 0: it was cut off
        self.done = [0.0] * len(jobs)  # seconds of each job that a next machine need not train
        self.line: list[tuple[bool, int, str, int, int, int]] = []  # is it put off, number, what, job, machine, its term
        self.writing: tuple[str, int, int, int] | None = None
        self.has_ended = [False] * len(jobs)
        self.events: list[tuple[float, int, int, int, int]] = []  # time, number, kind, machine or job, term
        self.number = 0
        self.busy = self.lost = self.down = self.writer_seconds = self.now = 0.0
        self.checkpoints = self.skipped = self.checkpoint_bytes = self.result_bytes = self.longest = self.failures = 0
        self.left = len(jobs)

    def run(self) -> Outcome:
        for machine in range(self.fleet.machines):
            self._fail_later(machine)
        self._hand_out()
        while self.left:
            self.now, _, kind, which, term = heapq.heappop(self.events)
            if kind == WRITTEN:
                self._written()
            elif kind == FAILED:
                self._fail(which)
            elif kind == BACK:
                self._come_back(which)
            elif term == self.machines[which].term:
                self._asked(which) if kind == ASKED else self._ended(which)
            self._hand_out()
        for machine in self.machines:
            if machine.down_since is not None:
                self.down += self.now - machine.down_since
        return Outcome(
            self.now,
            self.busy,
            self.lost,
            self.down,
            self.writer_seconds,
            self.checkpoints,
            self.skipped,
            self.checkpoint_bytes,
            self.result_bytes,
            self.longest,
            self.failures,
            self.fleet.machines,
        )

    def _at(self, seconds: float, kind: int, which: int, term: int = 0) -> None:
        self.number += 1  # of two events at one time, the one that was known first
        heapq.heappush(self.events, (self.now + seconds, self.number, kind, which, term))

    # -- machines ---------------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        while self.ready and self.free:
            _, job = heapq.heappop(self.ready)
            which = heapq.heappop(self.free)
            machine = self.machines[which]
            machine.job, machine.began, machine.is_waiting = job, self.now, False
            machine.done_before = machine.saved = self.done[job]
            left = self.jobs[job].seconds - machine.done_before
            self._at(left, ENDED, which, machine.term)
            if self.fleet.checkpoint_seconds < left:
                self._at(self.fleet.checkpoint_seconds, ASKED, which, machine.term)

    def _trained(self, machine: _Machine) -> float:
        """Seconds of its job that are trained by now."""
        return machine.done_before + self.now - machine.began

    def _asked(self, which: int) -> None:
        """A checkpoint is due."""
        machine = self.machines[which]
        assert machine.job is not None
        if machine.is_waiting:
            self.skipped += 1
        else:
            machine.saved, machine.is_waiting = self._trained(machine), True
            self._line_up("checkpoint", machine.job, which, machine.term)
        if self.fleet.checkpoint_seconds < self.jobs[machine.job].seconds - self._trained(machine):
            self._at(self.fleet.checkpoint_seconds, ASKED, which, machine.term)

    def _ended(self, which: int) -> None:
        machine = self.machines[which]
        assert machine.job is not None
        self.busy += self.now - machine.began
        self.has_ended[machine.job] = True
        self._line_up("results", machine.job, which, machine.term)
        self._release(which)
        heapq.heappush(self.free, which)

    def _release(self, which: int) -> None:
        machine = self.machines[which]
        machine.job, machine.term = None, machine.term + 1

    def _fail_later(self, which: int) -> None:
        if self.fleet.failure_seconds is not None:
            self._at(self.draw.expovariate(1 / self.fleet.failure_seconds), FAILED, which)

    def _fail(self, which: int) -> None:
        machine = self.machines[which]
        self.failures += 1
        if machine.job is None:
            self.free.remove(which)
            heapq.heapify(self.free)
        else:
            self.busy += self.now - machine.began
            self.lost += self._trained(machine) - machine.saved
            self.done[machine.job] = machine.saved
            heapq.heappush(self.ready, (0, machine.job))
            self._release(which)
        machine.down_since = self.now
        self._at(self.fleet.repair_seconds, BACK, which)

    def _come_back(self, which: int) -> None:
        machine = self.machines[which]
        assert machine.down_since is not None
        self.down += self.now - machine.down_since
        machine.down_since = None
        heapq.heappush(self.free, which)
        self._fail_later(which)

    # -- the writer -------------------------------------------------------------------------------------------------

    def _line_up(self, what: str, job: int, which: int, term: int) -> None:
        self.number += 1
        is_put_off = self.fleet.results_first and what == "checkpoint"
        heapq.heappush(self.line, (is_put_off, self.number, what, job, which, term))
        self.longest = max(self.longest, len(self.line))
        self._write_next()

    def _write_next(self) -> None:
        while self.line and self.writing is None:
            is_put_off, _, what, job, which, term = heapq.heappop(self.line)
            if is_put_off and self.has_ended[job]:
                continue
            whole = self.jobs[job]
            seconds = self.writer.checkpoint(whole) if what == "checkpoint" else self.writer.results(whole)
            self.writer_seconds += seconds
            self.writing = what, job, which, term
            self._at(seconds, WRITTEN, job)

    def _written(self) -> None:
        assert self.writing is not None
        what, job, which, term = self.writing
        self.writing = None
        if what == "checkpoint":
            self.checkpoints += 1
            self.checkpoint_bytes += self.jobs[job].checkpoint_bytes
            if self.machines[which].term == term:
                self.machines[which].is_waiting = False
        else:
            self.result_bytes += self.jobs[job].result_bytes
            self.left -= 1
            for other in self.needed_by[job]:
                self.wanting[other] -= 1
                if not self.wanting[other]:
                    heapq.heappush(self.ready, (1, other))
        self._write_next()
