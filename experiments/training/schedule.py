"""The schedule of the learning rate."""

import math


def schedule_factor(schedule: str, index: int, total: int, warmup: int) -> float:
    """What step `index` (1-based) of `total` multiplies the rate with: up over `warmup` steps, then down to zero.

    The first step is not lost to a rate of zero, nor is the last: the ramp is index/warmup, the fall starts at 1 on the
    first step after it and would reach 0 one step after the last.
    """
    if index <= warmup:
        return index / warmup
    if schedule == "constant":
        return 1.0
    left = (total - index + 1) / (total - warmup)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
