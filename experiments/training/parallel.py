"""One run on several processes, each with its part of every member's rows; torch.distributed alone, started by torchrun.

    rows of a micro-batch   cut into one part for each process, in order; one that gets none computes a row without weight
    counts                  summed: over how many rows or tokens each member's mean is taken
    forward, backward       of the rows here, each loss weighted by its share of those; the penalty in the first process alone
    losses, gradients       summed, the gradients in one flat bucket: what one process would have, to rounding
    clip ... after_step     in every process, from the same numbers: nothing is told, and all stay equal

A draw of dropout is that of the element's place among all the member's rows (`Rows.before`), so that it is the same on any
number of processes.  Predictions are made batch by batch in turn, and gathered in the first process, which alone scores,
writes and decides what is trained next; the others are told (study/packs.py).  parallel.md says what was tried.
"""

import contextlib
import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from rankwise.experiments import measure
from rankwise.variants.adapter.step import NotPackable
from torch import Tensor, nn

T = TypeVar("T")

# For which the others wait while the first one fetches data, scores, or takes sites out one by one.
PATIENCE = timedelta(days=30)
ALIKE = 60.0  # seconds in which the others meet with the same error, where the work is one of all processes
LOST = "another process of this run has ended, and so does this one; the same command goes on where it stopped"
GONE = ("onnection", "peer", "imed out", "imeout", "NCCL", "aborted")  # what errors of a process that is gone say


class ProcessLost(ConnectionError):
    """Another process of the run has ended."""


class Processes:
    """The processes of one run; of one alone every function gives back what it was given.

    rank: of this one, the first is 0. size: how many there are.
    words: the group that words go through; tensors go through torch.distributed's own.
    store: what all processes can reach while torchrun lives.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None, words: Any = None, store: Any = None):
        self.rank, self.size, self.device = rank, size, device
        self._words, self._store = words, store
        self._failure: BaseException | None = None
        self._attempts = 0  # so many so far, the same in every process

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def part(self, rows: int) -> slice:
        """Which of so many rows are this process's; the first processes have one more where they cannot all have as many."""
        least, more = divmod(rows, self.size)
        start = self.rank * least + min(self.rank, more)
        return slice(start, start + least + (self.rank < more))

    # -- tensors -----------------------------------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        with _connected():
            dist.all_reduce(total)
        return total

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Every parameter's gradient becomes the sum over all processes; one that has none anywhere has none still."""
        if self.size == 1:
            return
        has = self.sum(torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)).tolist()
        trained = [p for p, count in zip(parameters, has, strict=True) if count]
        for dtype in dict.fromkeys(p.dtype for p in trained):  # one, but for a model in several
            some = [p for p in trained if p.dtype == dtype]
            flat = self.sum(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in some]))
            for parameter, gradient in zip(some, flat.split([p.numel() for p in some]), strict=True):
                parameter.grad = gradient.view(parameter.shape)

    def check_equal(self, tensors: Sequence[Tensor], when: str) -> None:
        """
        Raises:
            ValueError: these tensors are not the same in every process, to the bit.
        """
        if self.size == 1 or not tensors:
            return
        kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
        sums = torch.stack([t.detach().contiguous().view(kinds[t.element_size()]).sum(dtype=torch.int64) for t in tensors])
        both = torch.cat([sums, -sums])
        with _connected():
            dist.all_reduce(both, dist.ReduceOp.MAX)
        if not torch.equal(both[: len(sums)], -both[len(sums) :]):
            self._failure = ValueError(
                f"{when} the processes have not the same weights, as where their processors or versions differ: "
                f"run them on machines of one kind, with the same packages"
            )
            raise self._failure

    def shared(
        self, kept: tuple[Mapping[str, Tensor], dict[str, Any]] | None, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts that the first process has read, or None where it found none; in every process."""
        if self.size == 1:
            return kept
        shapes = kept and [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in kept[0].items()]
        told = self.told(kept and {"facts": kept[1], "tensors": shapes})
        if told is None:
            return None
        tensors = {}
        for name, dtype, shape in told["tensors"]:
            one = kept[0][name].contiguous() if kept else torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            self.give(one)
            tensors[name] = one
        return tensors, told["facts"]

    def give(self, tensor: Tensor) -> None:
        """The first process's values, written into this tensor of each other one; it is contiguous."""
        if tensor.numel():
            with _connected():
                dist.broadcast(tensor.view(-1).view(torch.uint8), 0)

    # -- words -------------------------------------------------------------------------------------------------------

    def told(self, value: Any = None) -> Any:
        """What the first process says, in every process; what JSON can hold."""
        if self.size == 1:
            return value
        content = json.dumps(value).encode() if self.is_first else b""
        size = torch.tensor([len(content)])
        with _connected():
            dist.broadcast(size, 0, group=self._words)
            words = torch.frombuffer(bytearray(content.ljust(int(size))), dtype=torch.uint8)
            dist.broadcast(words, 0, group=self._words)
        return json.loads(words.numpy().tobytes())

    def most(self, number: int) -> int:
        """The greatest of all processes' numbers."""
        if self.size == 1:
            return number
        found = torch.tensor([number])
        with _connected():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._words)
        return int(found)

    def gathered(self, content: bytes) -> list[bytes]:
        """What every process has to say, in their order."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _connected():
            dist.all_gather(sizes, torch.tensor([len(content)]), group=self._words)
            room = max(1, max(int(size) for size in sizes))
            found = [torch.empty(room, dtype=torch.uint8) for _ in range(self.size)] if self.is_first else None
            dist.gather(torch.frombuffer(bytearray(content.ljust(room)), dtype=torch.uint8), found, 0, group=self._words)
        return [one[: int(size)].numpy().tobytes() for one, size in zip(found or [], sizes, strict=False)]

    def attempt(self, work: Callable[[], T], together: bool = False) -> T:
        """What `work` returns, once every process has done it; where it failed in one it fails in all.

        Args:
            together: the processes wait for each other within the work, as over weights that they share: an error that only
                some of them meet with leaves the others waiting, and so ends the run.

        Raises:
            NotPackable, torch.OutOfMemoryError, ValueError, OSError, RuntimeError: after the first failure, where another
                process had it; the own one where there is one.
        """
        if self.size == 1:
            return work()
        result, error = None, None
        self._attempts += 1
        if together:
            self.most(0)  # who comes first waits here, with patience: within the work torch's own is some minutes
        try:
            result = work()
        except ProcessLost:
            raise
        except Exception as caught:
            if together and _is_lost(caught):
                raise ProcessLost(LOST) from caught
            if together and not self._all_failed():
                raise
            error = caught
        if not self.most(error is not None):
            return result
        found = self.gathered(b"" if error is None else json.dumps(_described(error)).encode())
        failures = [(rank, *json.loads(one)) for rank, one in enumerate(found) if one]
        elsewhere = self.told(failures[0] if failures else None)
        self._failure = _failure(*elsewhere) if error is None else error
        raise self._failure

    def _all_failed(self) -> bool:
        """Whether every process says, within a minute, that the work of this attempt has failed."""
        name, until = f"rankwise failed at attempt {self._attempts}", time.monotonic() + ALIKE
        failed = self._store.add(name, 1)
        while failed < self.size and time.monotonic() < until:
            time.sleep(0.05)
            failed = self._store.add(name, 0)
        return failed == self.size

    def agreed(self, error: BaseException) -> bool:
        """Whether every process met with this error, so that all can go on to the next pack."""
        return self.size == 1 or error is self._failure

    def speaks_first(self) -> bool:
        """Whether no other process has yet said why the run ends."""
        try:
            return self.size == 1 or self._store.add("rankwise has said why", 1) == 1
        except RuntimeError:  # torchrun is gone
            return True


ALONE = Processes()


@contextlib.contextmanager
def joined(size: int, device: str) -> Iterator[Processes]:
    """The processes that torchrun started, joined; of an error that ends them one alone speaks.

    Args:
        size: how many there are.
        device: "auto", "cpu" or "cuda"; of several GPUs each process takes that of its place on its machine.
    """
    if size == 1:
        yield ALONE
        return
    try:
        here = _own_device(device, size)
    except ValueError:  # the same in all; they cannot yet agree on who speaks
        if os.environ["RANK"] != "0":
            raise SystemExit(2) from None
        raise
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    processes = Processes(rank, size, here, dist.new_group(backend="gloo", timeout=PATIENCE), store)
    before = signal.signal(signal.SIGTERM, _end)  # torchrun ends all when one has died
    try:
        yield processes
        processes.most(0)
        dist.destroy_process_group()
    except BaseException as error:
        if not processes.speaks_first():
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _own_device(device: str, size: int) -> torch.device:
    """
    Raises:
        ValueError: a device that is not there, or one for all processes.
    """
    here = measure.device(device)
    if here.type == "cuda":
        if here.index is not None:
            raise ValueError(f"--device {device}: of {size} processes each takes a GPU of its own: give cuda, or leave it out")
        here = measure.device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(here)
    return here


def _end(*_: Any) -> None:
    raise ProcessLost(LOST)


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """
    Raises:
        ProcessLost: a process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if _is_lost(error):
            raise ProcessLost(LOST) from error
        raise


def _is_lost(error: Exception) -> bool:
    """Whether it is torch.distributed's, of another process that is gone."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in GONE)


def _described(error: Exception) -> tuple[str, str]:
    """Its kind, of those that are answered differently, and what it says."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "memory", str(error)
    kinds = {NotPackable: "packing", ValueError: "value", OSError: "system"}
    return next(
        ((kind, str(error)) for known, kind in kinds.items() if isinstance(error, known)),
        ("other", f"{type(error).__name__}: {error}"),
    )


def _failure(rank: int, kind: str, text: str) -> Exception:
    kinds = {"memory": torch.OutOfMemoryError, "packing": NotPackable, "value": ValueError, "system": OSError}
    return kinds.get(kind, RuntimeError)(f"process {rank}: {text}")


# -- arrays as bytes ---------------------------------------------------------------------------------------------------


def as_bytes(arrays: Sequence[np.ndarray]) -> bytes:
    """Arrays of numbers, or of texts (`object`)."""
    into = io.BytesIO()
    for array in arrays:
        is_texts = array.dtype == object
        content = np.frombuffer(json.dumps(array.tolist()).encode(), np.uint8) if is_texts else array
        np.save(into, np.array(is_texts), allow_pickle=False)
        np.save(into, content, allow_pickle=False)
    return into.getvalue()


def from_bytes(content: bytes) -> list[np.ndarray]:
    """What `as_bytes` was given; texts in one or two axes."""
    file, arrays = io.BytesIO(content), []
    while file.tell() < len(content):
        is_texts, array = bool(np.load(file, allow_pickle=False)), np.load(file, allow_pickle=False)
        arrays.append(np.array(json.loads(array.tobytes()), dtype=object) if is_texts else array)
    return arrays
