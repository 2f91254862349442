"""What tensors take: their bytes, and the most that torch's allocator gave out at one moment.

Never the process's own mark (VmHWM): it has what earlier runs left, what C libraries keep for later, and torch itself.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

STEP = "rankwise: counted from here"  # what the profiler calls the moment


def tensors_in(*things: Any) -> Iterable[Tensor]:
    """Every tensor among these: of modules their parameters and buffers, of lists and dicts what is in them."""
    for thing in things:
        if isinstance(thing, Tensor):
            yield thing
        elif isinstance(thing, nn.Module):
            yield from thing.parameters()
            yield from thing.buffers()
        elif isinstance(thing, Mapping):
            yield from tensors_in(*thing.keys(), *thing.values())
        elif isinstance(thing, list | tuple | set):
            yield from tensors_in(*thing)


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages under these tensors, each storage once."""
    here = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)  # of a base that processes share, what is held here
    storages = (t.untyped_storage() for t in here)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())


def of_training(model: nn.Module, adapter: Any, optimizer: Any) -> list[Tensor]:
    """The tensors that stay from step to step: the model's, the adapter's with what it has put aside, the optimizer's."""
    return [*tensors_in(model, adapter, vars(optimizer), getattr(adapter, "_originals", {}))]


class Growth:
    """peak: the most bytes that were given out at one moment beyond those at the start; None where they were not counted."""

    peak: int | None = None


@contextlib.contextmanager
def growth(device: torch.device) -> Iterator[Growth]:
    """Counts in what is done within it; on a CPU by torch's profiler.

    A block that was there before and is freed within is not seen to be freed on a CPU.  Nothing is counted on a CPU where
    another profiler is at work.
    """
    found = Growth()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        torch.cuda.synchronize(device)
        found.peak = max(torch.cuda.max_memory_allocated(device) - before, 0)
        return
    if torch._C._autograd._profiler_enabled():
        yield found
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reports every start
    gc.collect()  # what an earlier count has seen come, and only the collector sees go, would be taken off this one
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
        elif event.name() == STEP:
            now = peak = 0
    found.peak = peak


class PeakMemory:
    """The most bytes of tensors at one moment of a run.

    On a GPU torch counts all the time, from `start`.  On a CPU a part of the run is counted where it can be fuller than all
    that were counted before: what stood at its start, and what it added.  What a part takes is known by its sizes.

    Equal runs have equal peaks, whatever ran before them in the process.  What it costs: a counted step of MiniLM (32 x 32
    tokens, LoRA) takes 1.2 % more of the processor, one of a tiny model half as much again, and the first count of a process
    up to a second more; of most runs one step is counted, and one batch of an evaluation.
    """

    def __init__(self, device: torch.device):
        self.device, self.peak = device, 0
        self.counted: list[tuple[str, tuple[int, ...]]] = []
        self.is_known = True

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextlib.contextmanager
    def part(self, what: str, sizes: tuple[int, ...], there: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        """Counts what is done within it, unless a part of this name has been counted none of whose sizes was smaller.

        there: gives what stands at its start.
        """
        known = any(what == one and all(a <= b for a, b in zip(sizes, of, strict=True)) for one, of in self.counted)
        if self.device.type == "cuda" or known:
            yield
            return
        stood = live_bytes(there())
        with growth(self.device) as found:
            yield
        self.counted.append((what, sizes))
        if found.peak is None:
            self.is_known = False
        else:
            self.peak = max(self.peak, stood + found.peak)

    def read(self) -> int | None:
        """In bytes; None where another profiler was at work, 0 where nothing was counted yet."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self.peak if self.is_known else None


def peak_growth(step: Callable[[], Any], device: torch.device, before: Callable[[], Any] | None = None) -> int:
    """Most bytes that were allocated at one moment of `step` beyond those at its start.

    before: done first, so that what it leaves and `step` frees is seen to be freed.
    """
    if before is not None and device.type == "cuda":
        before()
    with growth(device) as found:
        if before is not None and device.type == "cpu":
            before()
            with torch.profiler.record_function(STEP):
                pass
        step()
    assert found.peak is not None, "another profiler is at work"
    return found.peak
