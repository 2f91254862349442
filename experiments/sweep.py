"""How a learning rate is chosen: which rate is best, where a grid is widened, and who goes on to the next rung.

Everything here depends on the selection scores alone, never on the score split, and on nothing but what is finished, so
that a sweep that was cut off takes the same way again.  Successive halving: Jamieson & Talwalkar 2016, alg. 1.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

Scores = Mapping[float, Sequence[float | None]]  # rate -> selection score of each seed, None where the run failed


def ranked(scores: Scores) -> list[float]:
    """The rates, best mean score first; of equal ones the lower.

    A rate at which a seed failed comes after all that went through; where every rate failed the lowest is the likeliest to
    hold, and the final rows must be made.
    """

    def key(rate: float) -> tuple[bool, float, float]:
        found = [score for score in scores[rate] if score is not None]
        mean = sum(found) / len(found) if found else -math.inf
        return len(found) < len(scores[rate]), -mean, rate

    return sorted(scores, key=key)


def next_rate(scores: Scores, trials: int) -> float | None:
    """The rate to try next: one step of the grid beyond its edge where the best stands there; None where the best is
    inside, the `trials` are used up, or no rate went through.

    The step is the ratio of the two rates at that edge; the new rate has two significant digits.
    """
    grid = sorted(scores)
    if len(grid) < 2 or len(grid) >= trials or all(score is None for found in scores.values() for score in found):
        return None
    best = ranked(scores)[0]
    if best == grid[-1]:
        wanted = _rounded(grid[-1] * grid[-1] / grid[-2])
    elif best == grid[0]:
        wanted = _rounded(grid[0] * grid[0] / grid[1])
    else:
        return None
    return wanted if wanted not in scores else None


def rung_steps(total: int, halving: int, rungs: int) -> list[int]:
    """Steps of each rung, the last `total`: each so many times as long as the one before, none below 1."""
    return [max(1, -(-total // halving ** (rungs - 1 - rung))) for rung in range(rungs)]


def survivors(scores: Scores, halving: int) -> list[float]:
    """The best one in `halving` of the rates, at least one, in ascending order."""
    return sorted(ranked(scores)[: max(1, len(scores) // halving)])


def by_rate(members: Iterable[tuple[float, float | None]]) -> dict[float, list[float | None]]:
    """(rate, score) of each run as `Scores`."""
    found: dict[float, list[float | None]] = {}
    for rate, score in members:
        found.setdefault(rate, []).append(score)
    return found


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")
