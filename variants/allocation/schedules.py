"""How a total rank goes from its start to its target."""

import math
from collections.abc import Callable

# The share of the change that is left at a progress between 0 and 1.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cubic": lambda progress: (1 - progress) ** 3,  # AdaLoRA eq. (12): fast first
    "cubic-late": lambda progress: 1 - progress**3,  # the release of dynamic-rank DoRA (Mao et al. 2024): slow first
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "constant": lambda progress: 0.0,  # the target at once
}


def scheduled_budget(schedule: str, index: int, start: int, end: int, initial: int, target: int) -> int:
    """The total rank b(t) after step t = `index`; `cubic` is AdaLoRA's.

        b(t) = b(T) + (b(0) - b(T)) (1 - (t - t_i) / (T - t_f - t_i))^3

    AdaLoRA eq. (12) with b(0) = initial until t_i = start, and b(T) = target from T - t_f = end; the printed numerator has a
    further "- t_f", without which alone the schedule is continuous (as in the release).  Truncated to an integer, as there.
    """
    if index <= start:
        return initial
    if index >= end:
        return target
    left = SCHEDULES[schedule]((index - start) / (end - start))
    return int((initial - target) * left + target)
