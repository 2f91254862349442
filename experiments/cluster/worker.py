"""A process that trains packs of one study for another one, each in a folder of its own, and says what became of them.

`ready` reads model and data by the same names as the driver, and refuses where they are others.  `begin` starts a pack, from
the files that are written of it so far.  `news` waits for what there is to say: rows trained, lines for the user, and the files
that are new since the last checkpoint.  Nothing is left behind: a folder whose process is gone is removed by the next worker.

What travels are objects of these modules, in Ray's own messages between the processes of one user (threat_model.md).
"""

import contextlib
import os
import shutil
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.experiments.cluster.bundle import Bundle
from rankwise.experiments.files import write_file
from rankwise.experiments.study.plan import NUMERICS

if TYPE_CHECKING:
    from rankwise.experiments.config import Entry, Study
    from rankwise.experiments.study.packs import Job

PREFIX = "rankwise-worker-"  # of the folders of workers


@dataclass(frozen=True)
class Errand:
    """What a worker must know of a study before it gets its packs.

    sources: entries that are not run, whose ranks others take. folder: the driver's working folder, to which names in the study
    are relative. inputs: what must be the same here (`inputs`).
    """

    study: "Study"
    sources: "list[Entry]"
    device: str
    precision: str
    threads: int
    folder: str
    inputs: Mapping[str, str]


@dataclass
class News:
    """What a worker has to say since it last spoke.

    rows: what is trained, and rows of it. said: lines for the user. files: new ones, or None.
    ended: whether the pack is. error: ("system" or "other", text) of what ended it otherwise.
    """

    rows: dict[str, float] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    files: Bundle | None = None
    ended: bool = False
    error: tuple[str, str] | None = None


class Outbox:
    """News that wait for the driver; what it has not asked for yet is put together."""

    def __init__(self) -> None:
        self._some = threading.Condition()
        self._news, self._files = News(), {}

    def rows(self, what: str, rows: float) -> None:
        with self._some:
            self._news.rows[what] = self._news.rows.get(what, 0) + rows

    def say(self, line: str) -> None:
        with self._some:
            self._news.said.append(line)

    def files(self, files: Mapping[str, bytes]) -> None:
        with self._some:
            self._files |= files
            self._some.notify()

    def end(self, error: tuple[str, str] | None) -> None:
        with self._some:
            self._news.ended, self._news.error = True, error
            self._some.notify()

    def take(self, seconds: float) -> News:
        """The news so far, as soon as there are files or an end, else after so many seconds."""
        with self._some:
            self._some.wait_for(lambda: self._files or self._news.ended, seconds)
            news, files = self._news, self._files
            self._news, self._files = News(), {}
        if files:
            news.files = Bundle.of(files)
        return news


class Worker:
    """One process, one pack at a time."""

    def __init__(self, errand: Errand):
        self.errand, self.outbox = errand, Outbox()
        self.out: Path | None = None

    def ready(self) -> str | None:
        """Prepares the study as the driver did; None, or why no pack of it can be trained here."""
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # other workers compute on this machine; read when torch is imported
        try:
            with contextlib.suppress(OSError):
                os.chdir(self.errand.folder)
            self._prepare()
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            return " ".join(str(error).split())
        return None

    def _prepare(self) -> None:
        """
        Raises:
            ValueError: model, data or versions are not those of the driver, or cannot be read.
            OSError: the machine is at fault.
        """
        from rankwise.experiments import measure
        from rankwise.experiments.study.context import Context
        from rankwise.experiments.study.packs import PackRunner
        from rankwise.experiments.study.prepare import prepare
        from rankwise.experiments.study.store import RunStore

        errand = self.errand
        measure.keep_freed_memory()
        device = measure.device(errand.device)
        measure.make_deterministic(device)
        ready = prepare(errand.study, errand.sources)
        own = inputs(errand.study, ready.tasks)
        if differing := [name for name, value in errand.inputs.items() if own.get(name) != value]:
            differ = "differs" if len(differing) == 1 else "differ"
            raise ValueError(f"its {' and its '.join(differing)} {differ} from the driver's: give all machines the same")
        self._lock, self.out = _own_folder()
        self._sent: dict[str, tuple[int, ...]] = {}
        self.context = Context(
            study=ready.study,
            tasks=ready.tasks,
            out=self.out / "runs",
            committed=self.out / "committed",  # the driver has looked there
            device=device,
            precision=errand.precision,
            versions=measure.versions(),
            commit=measure.commit(),
            say=lambda line: self.outbox.say(line),
            progress=lambda what, rows: self.outbox.rows(what, rows),
            written=lambda folder: None,
            saved=self._send,
        )
        self.packs = PackRunner(self.context, RunStore(self.context, retry_failed=False))

    def begin(self, job: "Job", files: Bundle) -> News:
        """Starts to train what is missing of a pack, of which these files are written."""
        self.outbox = Outbox()
        threading.Thread(target=self._train, args=(job, files), daemon=True).start()
        return News()

    def news(self, seconds: float) -> News:
        return self.outbox.take(seconds)

    def close(self) -> None:
        """Removes this worker's folder."""
        if self.out is not None:
            shutil.rmtree(self.out, ignore_errors=True)

    def _train(self, job: "Job", files: Bundle) -> None:
        import torch

        torch.set_num_threads(self.errand.threads)  # of this thread
        error = None
        try:
            shutil.rmtree(self.context.out, ignore_errors=True)
            for name, content in files.checked().items():
                write_file(self.context.out / name, content)
            self._sent = dict(self._signatures())
            self._check_fingerprints(job)
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: self.outbox.say(f"note: {message}")
                self.packs.run(job.plan, job.runs, job.missing, job.what)
            self._send()
        except OSError as caught:
            error = "system", caught.strerror or str(caught)
        except BaseException:
            error = "other", traceback.format_exc()
        self.outbox.end(error)

    def _check_fingerprints(self, job: "Job") -> None:
        """
        Raises:
            OSError: a run would not be the one that was asked for.
        """
        from rankwise.experiments.study.runs import planned

        for run in job.runs:
            own = planned(self.context, job.plan, run.settings, run.training, run.seed, run.learning_rate)
            if own.fingerprint != run.fingerprint:
                raise OSError(f"it gives {job.what} another fingerprint than the driver: install the same versions there")

    def _send(self) -> None:
        """Puts the files that are new or changed into the outbox."""
        now = dict(self._signatures())
        new = [name for name, signature in now.items() if self._sent.get(name) != signature]
        self.outbox.files({name: (self.context.out / name).read_bytes() for name in new})
        self._sent = now

    def _signatures(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Path -> what tells one state of a file from the next: files are replaced, or grow."""
        for path in self.context.out.rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                about = path.stat()
                yield path.relative_to(self.context.out).as_posix(), (about.st_ino, about.st_mtime_ns, about.st_size)


def inputs(study: "Study", tasks: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same on all machines of a study, by what it is called in a message."""
    from rankwise.experiments import measure, models

    return {
        "version of rankwise": f"{measure.versions().get('rankwise')}, NUMERICS {NUMERICS}",
        f"model {study.model}": models.content_hash(study.model),
        **{f"data of {name}": prepared.data_hash for name, prepared in tasks.items()},
        **{f"targets in {name}": str(sorted(prepared.targets.items())) for name, prepared in tasks.items()},
    }


def _own_folder() -> tuple[Any, Path]:
    """A new folder, locked for as long as this process lives; those of processes that are gone are removed."""
    import fcntl

    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/.lock"):
        with contextlib.suppress(OSError), left.open("r") as file:  # another user's, or one that is held
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = (folder / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock, folder
