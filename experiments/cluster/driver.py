"""Gives the packs of a study to workers, and writes what comes back: the one writer of the study's folder.

A worker that is gone has lost what it trained since its pack's last checkpoint, which is here: the pack is given to another
one, from there.  What arrives late from a worker that was given up is not looked at, so that every result is written once.
A node whose data, model or disk is at fault is left out with a line; who cannot reach a checkpoint on three workers in a row
is left for the end, which then says so.
"""

import dataclasses
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rankwise.experiments.cluster import places
from rankwise.experiments.cluster.bundle import Bundle, Damaged
from rankwise.experiments.cluster.places import Need, Node, WorkerLost
from rankwise.experiments.cluster.worker import Errand, News, inputs
from rankwise.experiments.study.packs import Job
from rankwise.experiments.study.runner import Runner

MOST_LOST = 3  # workers in a row that a pack may lose without reaching a checkpoint
LOOK = 1.0  # seconds between two looks at which nodes there are
PATIENCE = 600.0  # seconds for which a cluster without room is waited for, once it had room
REST = 5.0  # seconds for which a node that lost a worker gets none: a dead one is listed a little longer
SLOW = 120.0  # seconds after which a worker that is not ready is spoken of
NEWS = 2.0  # seconds after which a worker says how far it is, if nothing else happens


class Pool(Protocol):
    """A cluster: its nodes, and workers on them, of which each does one call after the other.  Tickets can be hashed."""

    def nodes(self) -> list[Node]:
        """Those that are alive."""
        ...

    def start(self, node: Node, need: Need, errand: Errand) -> Any:
        """A worker on that node, which starts."""
        ...

    def call(self, worker: Any, name: str, *arguments: Any) -> Any:
        """Asks a worker for `name(*arguments)`; a ticket for the answer."""
        ...

    def answered(self, tickets: Sequence[Any], seconds: float) -> list[Any]:
        """Tickets with an answer, as soon as there is one, at the latest after so many seconds."""
        ...

    def answer(self, ticket: Any) -> Any:
        """
        Raises:
            WorkerLost: there will be none.
        """
        ...

    def stop(self, workers: Sequence[Any]) -> None:
        """Ends workers, which may be gone."""
        ...


@dataclass(eq=False)
class Hand:
    """A worker as the driver sees it."""

    worker: Any
    node: Node
    ticket: Any
    is_ready: bool = False
    began: float = dataclasses.field(default_factory=time.monotonic)
    is_slow: bool = False  # and the user knows
    job: Job | None = None
    rows: dict[str, float] = dataclasses.field(default_factory=dict)  # of its pack, that the progress bar has


class Driver:
    """Trains the packs of a runner on a cluster: `Runner(..., train=Driver(pool, need, say))`."""

    def __init__(self, pool: Pool, need: Need, say: Callable[[str], None] = lambda line: None):
        self.pool, self.need, self.say = pool, need, say

    def __call__(self, runner: Runner) -> None:
        """
        Raises:
            ValueError: no node can train the study, or some packs could not be finished.
        """
        self.runner = runner
        self.errand = Errand(
            study=runner.as_read,
            sources=runner.sources_as_read,
            device=self.need.device,
            precision=runner.precision,
            threads=self.need.threads,
            folder=os.getcwd(),
            inputs=inputs(runner.study, runner.prepared),
        )
        self.hands: list[Hand] = []
        self.waiting: deque[Job] = deque()
        self.lost: dict[int, int] = {}  # of each pack (by its plan's id): workers in a row without a checkpoint
        self.lost_idle: dict[str, int] = {}  # of each node: workers without a pack
        self.resting: dict[str, float] = {}  # node -> until when no worker is started there
        self.left: list[str] = []  # what became of packs that are given up
        self.barred: dict[str, str] = {}  # node -> why it cannot train this study
        self.nodes: list[Node] = []
        self._looked = self._had_room = -float("inf")
        try:
            while not runner.is_finished:
                self._look()
                self._give()
                if runner.is_finished:
                    break
                self._check_that_it_goes_on()
                asked = {hand.ticket: hand for hand in self.hands if hand.ticket is not None}
                for ticket in self.pool.answered(list(asked), LOOK):
                    self._hear(asked[ticket])
        finally:
            self.pool.stop([hand.worker for hand in self.hands])

    # -- who trains what --------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Which nodes there are now."""
        if time.monotonic() - self._looked >= LOOK:
            known, self.nodes = {node.id for node in self.nodes}, self.pool.nodes()
            self._looked = time.monotonic()
            if known and (joined := [node for node in self.nodes if node.id not in known and self.need.room(node)]):
                self.say(f"note: {', '.join(map(str, joined))} has joined")
        for hand in self.hands:
            if not hand.is_ready and not hand.is_slow and time.monotonic() - hand.began > SLOW:
                hand.is_slow = True
                self.say(
                    f"note: the worker on {hand.node} still reads model and data, or waits for CPUs and GPUs that others use"
                )

    def _give(self) -> None:
        """Gives packs to idle workers, and starts workers for those that wait beyond them."""
        room = sum(self.need.room(node) for node in self.nodes)
        while len(self.waiting) < max(room, 1) and (job := self.runner.next_job()) is not None:
            self.waiting.append(job)
        for hand in self.hands:
            if self.waiting and hand.is_ready and hand.job is None and hand.node.id not in self.barred:
                self._begin(hand, self.waiting.popleft())
        starting = [hand for hand in self.hands if not hand.is_ready]
        for _ in range(len(self.waiting) - len(starting)):
            workers = {node.id: sum(hand.node.id == node.id for hand in self.hands) for node in self.nodes}
            at = {hand.node.id for hand in self.hands if not hand.is_ready}
            at |= {node for node, until in self.resting.items() if time.monotonic() < until}
            node = places.next_node(self.nodes, self.need, workers, at, self.barred)
            if node is None:
                break
            worker = self.pool.start(node, self.need, self.errand)
            self.hands.append(Hand(worker, node, self.pool.call(worker, "ready")))

    def _begin(self, hand: Hand, job: Job) -> None:
        hand.job, hand.rows = job, {}
        hand.ticket = self.pool.call(hand.worker, "begin", job, Bundle.of(self.runner.packs.files(job)))

    def _check_that_it_goes_on(self) -> None:
        """
        Raises:
            ValueError: it does not.
        """
        now = time.monotonic()
        usable = [node for node in self.nodes if node.id not in self.barred and self.need.room(node)]
        if usable or self._had_room < 0:
            self._had_room = now
        busy = any(hand.job is not None or not hand.is_ready for hand in self.hands)
        if not self.waiting and not busy:
            assert self.left
            raise ValueError("\n".join(self.left))
        if usable or busy:
            return
        if self.barred and all(node.id in self.barred for node in self.nodes):
            raise ValueError(f"no node can train this study: {'; '.join(self.barred.values())}")
        missing = places.lacking(self.nodes, self.need)
        if now - self._had_room > PATIENCE:
            raise ValueError(f"{missing}; none has joined for {PATIENCE / 60:.0f} minutes; the same command goes on")
        if not self._has_said_that_it_waits:
            self.say(f"note: {missing}; waiting for one, the same command goes on if it is ended")
        self._has_said_that_it_waits = True

    _has_said_that_it_waits = False

    # -- what they say ----------------------------------------------------------------------------------------------

    def _hear(self, hand: Hand) -> None:
        try:
            answer = self.pool.answer(hand.ticket)
            hand.ticket = None
            if not hand.is_ready:
                self._hear_whether_it_is_ready(hand, answer)
            else:
                self._hear_news(hand, answer)
        except (WorkerLost, Damaged) as error:
            self.pool.stop([hand.worker])  # it may live still, cut off from here
            self._lose(hand, str(error))

    def _hear_whether_it_is_ready(self, hand: Hand, refusal: str | None) -> None:
        if refusal is None:
            hand.is_ready = True
        else:
            self._bar(hand, refusal)

    def _hear_news(self, hand: Hand, news: News) -> None:
        """
        Raises:
            Damaged: files did not arrive as they were sent.
            RuntimeError: an error in the worker's code.
        """
        job, runner = hand.job, self.runner
        assert job is not None
        files = {} if news.files is None else news.files.checked(lambda name: runner.packs.is_of(job, name))
        for line in news.said:
            self.say(line)
        for what, rows in news.rows.items():
            hand.rows[what] = hand.rows.get(what, 0) + rows
            runner.progress(what, rows)
        if files:
            runner.packs.take(job, files)
            self.lost.pop(id(job.plan), None)
            for run in job.missing:
                runner.tracking.follow(runner.out / run.fingerprint)
        if not news.ended:
            hand.ticket = self.pool.call(hand.worker, "news", NEWS)
        elif news.error is None:
            hand.job, hand.rows = None, {}
            self._end(job)
        elif news.error[0] == "system":
            self._bar(hand, news.error[1])
        else:
            raise RuntimeError(f"{hand.node}: {job.what}\n{news.error[1]}")

    def _end(self, job: Job) -> None:
        """Ends a job of which nothing is missing; what is goes on."""
        missing = self.runner.store.missing(job.runs)
        if missing:
            self.waiting.appendleft(dataclasses.replace(job, missing=missing))
        else:
            self.runner.end(job)

    def _bar(self, hand: Hand, reason: str) -> None:
        """Leaves out a node that cannot train this study; its other workers end with the packs that they have."""
        self.barred[hand.node.id] = f"{hand.node}: {reason}"
        self.say(f"note: {hand.node} is left out: {reason}")
        self.pool.stop([hand.worker])
        self._take_back(hand)

    def _lose(self, hand: Hand, reason: str) -> None:
        job = hand.job
        self._take_back(hand)
        self.resting[hand.node.id] = time.monotonic() + REST
        if job is None:
            self.lost_idle[hand.node.id] = count = self.lost_idle.get(hand.node.id, 0) + 1
            self.say(f"note: a worker on {hand.node} is gone: {reason}")
            if count >= MOST_LOST:
                self.barred[hand.node.id] = f"{hand.node}: {count} workers were lost before they had a pack ({reason})"
            return
        self.lost[id(job.plan)] = count = self.lost.get(id(job.plan), 0) + 1
        self.say(f"note: {job.what}: its worker on {hand.node} is gone ({reason}); it goes on from its last checkpoint")
        if count >= MOST_LOST and self.waiting and self.waiting[0].plan is job.plan:
            self.waiting.popleft()
            self.left.append(
                f"{job.what}: {count} workers in a row were lost before it reached a checkpoint ({reason}): give its machines "
                f"more memory or --pack fewer members; the same command goes on"
            )

    def _take_back(self, hand: Hand) -> None:
        """A worker that is not asked again; its pack waits for another one, before all others."""
        self.hands.remove(hand)
        for what, rows in hand.rows.items():
            self.runner.progress(what, -rows)
        if hand.job is not None:
            self._end(hand.job)
