"""The clock: arms in turn, medians with their spread; the rate of the machine's products."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def undisturbed():
    """Garbage is collected before, not while."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - began


def interleave(
    steps: Mapping[Key, Callable[[], Any]],
    device: torch.device,
    repetitions: int,
    warmup: int = 1,
    repeat: Mapping[Key, int] | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[Key, list[float]]:
    """The seconds of each step in each round, one after the other within a round, warm-up rounds dropped.

    repeat: how often a step is taken in a row within one round; the median of them is the round's.
    progress: called after each round with its share of all.
    """
    times: dict[Key, list[float]] = {key: [] for key in steps}
    with undisturbed():
        for index in range(warmup + repetitions):
            for key, step in steps.items():
                taken = statistics.median(seconds(step, device) for _ in range((repeat or {}).get(key, 1)))
                if index >= warmup:
                    times[key].append(taken)
            gc.collect(0)  # what this round left behind
            progress(1 / (warmup + repetitions))
    return times


def quartiles(values: Iterable[float]) -> list[float]:
    """[25 %, 75 %], by linear interpolation between the sorted values."""
    values = sorted(values)
    if len(values) == 1:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


# -- the machine ---------------------------------------------------------------------------------------------------------


def product_rate(dtype: torch.dtype, device: torch.device, sizes: Iterable[tuple[int, int, int]]) -> float:
    """GFLOP/s of the best of some matrix products, (rows, inner, columns) each; a multiply-add is two operations."""
    best = 0.0
    for rows, inner, columns in sizes:
        x = torch.randn(rows, inner, device=device).to(dtype)
        weight = torch.randn(columns, inner, device=device).to(dtype)
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        product = lambda x=x, w=weight, out=out: torch.mm(x, w.mT, out=out)  # noqa: E731
        product()
        taken = min(seconds(product, device) for _ in range(4))
        best = max(best, 2 * rows * inner * columns / taken / 1e9)
    return best


def flops(step: Callable[[], Any]) -> int:
    """Operations of the matrix products in `step`, attention's among them; a multiply-add is two."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the CPU's fused attention is not counted
        step()
    return counter.get_total_flops()
