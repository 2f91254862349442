"""How torch is started, the same for every command that trains."""

import os
import time
from pathlib import Path

from rankwise.experiments.cli.progress import Progress


def start_torch(bar: Progress, threads: int | None = None) -> bool:
    """Imports torch with its threads set; whether other programs compute on this machine.

    libgomp's threads spin for milliseconds when they wait: a little faster on an idle machine, several times slower where
    another program wants the processor.  How long is read when torch is imported.
    """
    busy = others_compute()
    if busy:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    import torch
    from rankwise.experiments.measure import keep_freed_memory

    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    warn_if_not_compiled(bar)
    return busy


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
