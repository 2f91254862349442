"""How a learning rate is chosen: which rate is best, where a grid is widened, and who goes on to the next rung.

Everything here depends on the selection scores alone, never on the score split, and on nothing but what is finished, so
that a sweep that was cut off takes the same way again.  Successive halving: Jamieson & Talwalkar 2016, alg. 1.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

Scores = Mapping[float, Sequence[float | None]]  # rate -> selection score of each seed, None where the run failed


def ranked(scores: Scores) -> list[float]:
    """The rates, best mean score first; of equal ones the lower.

    A rate at which a seed failed comes after all that went through.  If all failed, the lowest comes first: it is the most
    likely to be stable, and final runs are still required.
    """

    def key(rate: float) -> tuple[bool, float, float]:
        completed = [score for score in scores[rate] if score is not None]
        # fsum: the exact sum, so that the order of the runs decides no tie.
        mean = math.fsum(completed) / len(completed) if completed else -math.inf
        return len(completed) < len(scores[rate]), -mean, rate

    return sorted(scores, key=key)


def best_rate(scores: Scores) -> float:
    """The rate of the final runs: the first of `ranked`.

    The runner trains at it and the reports mark it.  Of settings that share a rate, `scores` has the runs of all.
    """
    return ranked(scores)[0]


def is_at_edge(rate: float, tried: Collection[float]) -> bool:
    """Whether nothing was tried beyond the rate, so that a better one may lie there."""
    return rate in (min(tried), max(tried))


def next_rate(scores: Scores, trials: int) -> float | None:
    """The rate to try next: one step of the grid beyond its edge where the best stands there; None where the best is
    inside, the `trials` are used up, or no rate went through.

    The step is the ratio of the two rates at that edge; the new rate has two significant digits.
    """
    grid = sorted(scores)
    if len(grid) < 2 or len(grid) >= trials or all(score is None for seeds in scores.values() for score in seeds):
        return None
    best = best_rate(scores)
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
    scores: dict[float, list[float | None]] = {}
    for rate, score in members:
        scores.setdefault(rate, []).append(score)
    return scores


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")
