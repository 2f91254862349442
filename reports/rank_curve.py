"""Which rank is enough: the smallest of a curve's ranks whose score is within the study's margin of the best one's.

A curve is one method at ranks r_1 < ... < r_k with true mean scores mu_i (experiments/rank_curves.py); rank i is *enough* where
max_j mu_j - mu_i < margin.  Two claims are made of each rank, each family of claims erring at most 5 % of the time:

- enough: mu_i - mu_j > -margin is tested against every other rank j.  All must hold, so that the largest p is rank i's, without
  a correction over j (intersection-union test, Berger 1982).  Over i: Holm.
- too small: mu_j - mu_i > margin for some j.  One suffices, so that the smallest p counts, times k - 1 (Bonferroni).  Over i:
  Holm.

The best rank is always enough and never too small, but which it is is not known: of either family at most k - 1 hypotheses
are true together, and no factor of Holm's exceeds that (Shaffer 1986).  Multiple comparisons with the best: Hsu 1984.

Differences are paired by seed.  In a study of whole curves or shared rates each p is the permutation's, which counts the choice
of the learning rates (`designs`); else it is a t test's, as in `statistics.equivalence_test`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rankwise.reports.compared import NoConstantScore, compared, finished_seeds
from rankwise.reports.results import Arm, Study
from rankwise.reports.statistics import ALPHA, holm, one_sided_test, paired_differences, summary
from rankwise.reports.verdicts import limits


@dataclass(frozen=True)
class Point:
    """One rank of a curve, held against the rank with the best mean.

    below: points that its mean lies below that one's; low, high: 95 % paired t interval of this, None for the best itself.
    p_enough, p_too_small: adjusted over the ranks of the curve; None where no claim can be made of the curve.
    """

    setting: str
    rank: int
    n: int
    below: float
    low: float | None
    high: float | None
    p_enough: float | None
    p_too_small: float | None

    @property
    def kind(self) -> str:
        """ "enough", "too small", or "undecided"."""
        if self.p_enough is not None and self.p_enough <= ALPHA:
            return "enough"
        return "too small" if self.p_too_small is not None and self.p_too_small <= ALPHA else "undecided"


@dataclass(frozen=True)
class WhichRank:
    """The answer for one curve.

    smallest: the smallest rank shown to be enough, None where none is.  possible: ranks that the smallest enough one may be, as
    far as the claims reach.  by_means: the smallest within the margin by the means alone, which has no error.
    """

    curve: str
    margin: float
    points: tuple[Point, ...]
    smallest: int | None
    possible: tuple[int, ...]
    by_means: int
    text: str


def which_rank(part: Study) -> list[WhichRank]:
    """The answer for each curve of which two ranks or more have a score, in the study's order; none without a margin."""
    if part.margin is None:
        return []
    curves = dict.fromkeys(place.curve for place in part.curves.values())
    answers = (_answer(part, curve, _arms(part, curve)) for curve in curves)
    return [answer for answer in answers if answer is not None]


def _arms(part: Study, curve: str) -> list[Arm]:
    """The settings of a curve that have a score, by rank."""
    arms = [arm for arm in part.arms if arm.setting in part.curves and part.curves[arm.setting].curve == curve and arm.scores]
    return sorted(arms, key=lambda arm: part.curves[arm.setting].rank)


def _answer(part: Study, curve: str, arms: list[Arm]) -> WhichRank | None:
    if len(arms) < 2:
        return None
    ranks = [part.curves[arm.setting].rank for arm in arms]
    means = [float(np.mean(list(arm.scores.values()))) for arm in arms]
    best = int(np.argmax(means))
    planned = [place.rank for place in part.curves.values() if place.curve == curve]
    reasons = limits(part, arms)
    if not part.quick and part.design != "whole-curve":  # there a failed run has a constant predictor's score
        reasons += [f"{n} of {len(arm.final)} seeds of {arm.setting} failed" for arm in arms if (n := len(arm.of("failed")))]
    reasons += [f"rank {rank} is not there yet" for rank in sorted(set(planned) - set(ranks))]
    enough, too_small, n = [None] * len(arms), [None] * len(arms), min(len(arm.scores) for arm in arms)
    if not reasons and n > 1:
        try:
            enough, too_small = _adjusted(part, arms, part.margin)
        except NoConstantScore as error:
            reasons.append(str(error))
    points = []
    for arm, rank, mean, p, q in zip(arms, ranks, means, enough, too_small, strict=True):
        paired = summary(paired_differences(arms[best].scores, arm.scores))
        ends = (None, None) if arm is arms[best] or paired is None else (paired.low, paired.high)
        points.append(Point(arm.setting, rank, len(arm.scores), means[best] - mean, *ends, p, q))
    smallest = next((point.rank for point in points if point.kind == "enough"), None)
    possible = tuple(p.rank for p in points if p.kind != "too small" and (smallest is None or p.rank <= smallest))
    by_means = next(point.rank for point in points if point.below < part.margin)
    text = _text(part, curve, points, reasons, smallest, possible, by_means, ranks[best])
    return WhichRank(curve, part.margin, tuple(points), smallest, possible, by_means, text)


def _adjusted(part: Study, arms: Sequence[Arm], margin: float) -> tuple[list[float], list[float]]:
    """p of "enough" and of "too small" of each rank, adjusted over the ranks."""
    k = len(arms)
    above = np.ones((2, k, k))  # p that mu_i - mu_j is above -margin, and above margin
    for i, arm in enumerate(arms):
        for j, other in enumerate(arms):
            if i != j:
                above[:, i, j] = _above(part, arm, other, (-margin, margin))
    enough = [max(above[0, i, j] for j in range(k) if j != i) for i in range(k)]
    too_small = [min(1.0, (k - 1) * min(above[1, j, i] for j in range(k) if j != i)) for i in range(k)]
    return holm(enough, most_true=k - 1).tolist(), holm(too_small, most_true=k - 1).tolist()


def _above(part: Study, arm: Arm, other: Arm, shifts: Sequence[float]) -> list[float]:
    """p that the arm's mean score less the other's is above each shift."""
    if part.design == "chosen-rate":
        differences = paired_differences(arm.scores, other.scores)
        return [one_sided_test(differences, shift) for shift in shifts]
    seeds = sorted(finished_seeds(part, arm) & finished_seeds(part, other))
    if len(seeds) < 2:
        return [1.0] * len(shifts)
    comparison = compared(part, arm, other, seeds).comparison
    return [comparison.above_p(shift) for shift in shifts]


def _text(
    part: Study,
    curve: str,
    points: Sequence[Point],
    reasons: Sequence[str],
    smallest: int | None,
    possible: Sequence[int],
    by_means: int,
    best: int,
) -> str:
    margin, n = f"{part.margin:g} points", min(point.n for point in points)
    of = {point.rank: point for point in points}
    short = of[by_means]
    interval = "" if short.low is None else f", 95 % interval {short.low:+.2f} to {short.high:+.2f}"
    shown = f"By the means alone rank {by_means} is enough" + (
        " and the best." if by_means == best else f", {short.below:.2f} below rank {best}{interval}."
    )
    larger = " The largest rank scores best: a larger one may be better still." if best == points[-1].rank else ""
    if reasons or n < 2:
        why = "; ".join(reasons) if reasons else "n = 1 supports no claim"
        return f"no claim ({why}). {shown}{larger}"
    family = f"over {len(points)} ranks, n = {n} seeds"
    if smallest is None:
        claim = f"undecided: no rank is shown to be within {margin} of the best ({family}; {_power(part, len(points), n)})."
    else:
        p = of[smallest].p_enough
        level = "< 0.001" if p < 0.001 else f"= {p:.3f}"
        claim = f"rank {smallest} is the smallest shown to be within {margin} of the best (p {level} {family})."
    ruled_out = [point.rank for point in points if point.kind == "too small"]
    if ruled_out:
        claim += f" Too small: {', '.join(map(str, ruled_out))}."
    if smallest is None or len(possible) > 1:
        claim += f" The smallest rank that is enough is one of {', '.join(map(str, possible))}."
    return f"{claim} {shown}{larger}"


def _power(part: Study, k: int, n: int) -> str:
    """Whether so many seeds could have claimed anything: a permutation's one-sided p is at least 2^-n."""
    if part.design == "chosen-rate":
        return "more seeds narrow the intervals"
    needed = int(np.ceil(np.log2((k - 1) / ALPHA)))
    return f"a claim takes {needed} seeds" if n < needed else "more seeds narrow the intervals"
