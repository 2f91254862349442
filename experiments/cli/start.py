"""How torch is started, the same for every command that trains."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.experiments.cli.progress import Progress

if TYPE_CHECKING:
    from rankwise.experiments.training.parallel import Processes


def start_torch(bar: Progress, threads: int | None = None) -> bool:
    """Imports torch with its threads set; whether other programs compute on this machine.

    libgomp's threads spin for milliseconds when they wait: a little faster on an idle machine, several times slower where
    another program wants the processor.  How long is read when torch is imported.
    """
    busy = others_compute()
    if busy:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a count of memory warns of what is freed in it and was there before
    import torch
    from rankwise.experiments.measure import keep_freed_memory

    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    warn_if_not_compiled(bar)
    return busy


def torchrun() -> tuple[int, int]:
    """The number of this process, from 0, and how many torchrun started; (0, 1) without it."""
    if any(name not in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextlib.contextmanager
def processes(device: str, threads: int | None) -> Iterator["Processes | None"]:
    """Those that torchrun started, joined, with torch; None, and no torch, where there is one alone."""
    _, size = torchrun()
    if size == 1:
        yield None
        return
    start_torch(Progress(is_quiet=True), threads)
    from rankwise.experiments.training import parallel

    with parallel.joined(size, device) as joined:
        yield joined


@contextlib.contextmanager
def elsewhere(
    bar: Progress, ray: str | None, device: str, threads: int | None
) -> Iterator[Callable[[], tuple[dict[str, Any], Any]] | None]:
    """The cluster that trains the packs, joined without torch; what a `Runner` on it is given once torch is there: options, and
    its device.  None without --ray.

    Raises:
        ValueError: it cannot be joined, or no machine of it has what the packs need.
    """
    if ray is None:
        yield None
        return
    from rankwise.experiments.cluster import places, pool

    with pool.joined(ray) as cluster:
        need = places.need(cluster.nodes(), device, threads)

        def options() -> tuple[dict[str, Any], Any]:
            import torch
            from rankwise.experiments.cluster.driver import Driver

            given = {"train": Driver(cluster, need, bar.warn), "precision": cluster.precision(need)}
            return given, torch.device(need.device)

        yield options


def others_compute() -> bool:
    """Whether other programs keep more than a third of one processor busy; looked at for a fifth of a second, on Linux."""

    def busy() -> float:
        user, nice, system, *_ = map(int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK")

    try:
        before, began = busy(), time.perf_counter()
        time.sleep(0.2)
        return (busy() - before) / (time.perf_counter() - began) > 1 / 3
    except (OSError, ValueError):
        return False


def warn_if_not_compiled(bar: Progress) -> None:
    """Nothing is slower without a word."""
    from rankwise.variants import native

    if native.library() is None:
        bar.warn(f"note: without the compiled passes steps on the CPU take longer: {native.library.reason}")
