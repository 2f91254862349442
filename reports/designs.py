"""Two tests of a difference between methods whose error rate includes the choice of the learning rate.

A *curve* is one method on one task: v (K, S) selection scores and y (K, S) reported scores at K rates and S seeds, rate k
standing for the same multiple of the centre of each method's grid.  A method's rate is argmax_k mean_s v; what is compared is
the mean of y there.  Choosing a rate by one set of runs and testing at it as if it had been given (`verdicts`, the design
"chosen-rate") errs more often than 5 %, because the error of the choice does not shrink with more seeds.

Whole curve: under the null hypothesis the two curves of a seed are exchangeable.  All 2^S ways of swapping whole curves
within seeds are tried, the rates *chosen again* each time, and p is the share in which the difference of means is as large.

Shared rate: for two methods of one parameterization.  The rate is the argmax of the mean of both; swapping the methods leaves
it as it is, so that the sign-flip test at that rate is exact.

Both intervals are the shifts of our reported scores that the test does not reject (its inversion), found exactly.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float
from rankwise.reports.statistics import ALPHA

MOST_EXACT = 16  # seeds up to which all 2^S swaps are tried; 65,536 of them take a tenth of a second
DRAWN = 20_000  # swaps drawn beyond that, the observed one among them


@dataclass(frozen=True)
class Curve:
    """A method on one task at K rates and S seeds, the rates in ascending order; scores in points, more is better."""

    rates: tuple[float, ...]
    selection: Float[np.ndarray, "K S"]
    reported: Float[np.ndarray, "K S"]

    def __post_init__(self) -> None:
        shape = (len(self.rates), self.selection.shape[-1])
        if self.selection.shape != shape or self.reported.shape != shape or 0 in shape:
            raise ValueError(
                f"a curve of {len(self.rates)} rates has selection scores {self.selection.shape} and reported scores "
                f"{self.reported.shape}: both are (rates, seeds), at least one of each"
            )
        if list(self.rates) != sorted(self.rates):
            raise ValueError(f"rates {self.rates}: give them in ascending order")
        if not (np.isfinite(self.selection).all() and np.isfinite(self.reported).all()):
            raise ValueError("a score is missing or not finite: a failed run scores what a constant predictor scores")

    @property
    def chosen(self) -> int:
        """Index of the rate with the best mean selection score, the lower of equal ones."""
        return int(self.selection.mean(1).argmax())


@dataclass(frozen=True)
class Comparison:
    """Ours against the reference: the difference of mean reported scores at the chosen rates, in points.

    p: two-sided.  at_edge: whose chosen rate is the first or last of its grid, so that no winner is named.
    """

    difference: float
    p: float
    low: float
    high: float
    level: float  # of the interval
    rates: tuple[float, float]  # ours, the reference's
    at_edge: tuple[bool, bool]
    seeds: int
    kept: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False, compare=False)
    """Lowest and highest shift of our scores at which each permutation is as extreme as what was seen, (F,) each."""

    def equivalence_p(self, margin: float) -> float:
        """p of the two one-sided tests that the difference lies inside the margin: at most alpha where the 1 - 2 alpha interval
        lies inside it."""
        low, high = self.kept
        if not -margin < self.difference < margin:
            return 1.0
        return max(float(np.mean((low <= shift) & (shift <= high))) for shift in (-margin, margin)) / 2

    def above_p(self, shift: float) -> float:
        """p of the one-sided test that the difference is above `shift`."""
        low, high = self.kept
        half = float(np.mean((low <= shift) & (shift <= high))) / 2
        return half if self.difference > shift else 1 - half

    def equivalent_within(self, margin: float) -> bool:
        """Whether the interval lies inside the margin; with level 0.90 this is the two one-sided tests (TOST) at 5 %."""
        return -margin < self.low and self.high < margin


def whole_curve(ours: Curve, reference: Curve, level: float = 1 - ALPHA) -> Comparison:
    """The whole-curve test: rates are chosen again for every swap of curves within seeds.

    Raises:
        ValueError: grids or seeds of different sizes.
    """
    _check_pair(ours, reference)
    swaps = _swaps(ours.selection.shape[1])  # (F, S)
    share = swaps.mean(1)  # (F,)
    own, other = (
        _means_after(swaps, *pair) for pair in ((ours.selection, reference.selection), (reference.selection, ours.selection))
    )
    k_own, k_other = own.argmax(0), other.argmax(0)  # (F,)
    at = np.arange(len(swaps))
    y_own = _means_after(swaps, ours.reported, reference.reported)[k_own, at]
    y_other = _means_after(swaps, reference.reported, ours.reported)[k_other, at]
    return _compare(ours, reference, ours.chosen, reference.chosen, y_own - y_other, share, level)


def shared_rate(ours: Curve, reference: Curve, level: float = 1 - ALPHA) -> Comparison:
    """The sign-flip test at the one rate that both share: the best mean selection score over both methods.

    Raises:
        ValueError: grids that differ, or seeds of different number.
    """
    _check_pair(ours, reference)
    if ours.rates != reference.rates:
        raise ValueError(f"rates {ours.rates} and {reference.rates}: methods that share a rate have one grid")
    k = int((ours.selection + reference.selection).mean(1).argmax())
    swaps = _swaps(ours.selection.shape[1])
    differences = ours.reported[k] - reference.reported[k]  # (S,)
    return _compare(ours, reference, k, k, (1 - 2.0 * swaps) @ differences / len(differences), swaps.mean(1), level)


def one_rate(ours: Float[np.ndarray, " S"], reference: Float[np.ndarray, " S"], level: float = 1 - ALPHA) -> Comparison:
    """The sign-flip test of scores at one rate that other runs fixed; the rates of the result are NaN.

    Exact where those runs judged both methods together, so that swapping the two leaves the rate as it is.
    """
    curves = [Curve((math.nan,), scores[None], scores[None]) for scores in (ours, reference)]
    swaps = _swaps(len(ours))
    statistics = (1 - 2.0 * swaps) @ (ours - reference) / len(ours)
    return _compare(*curves, 0, 0, statistics, swaps.mean(1), level)


def _compare(
    ours: Curve,
    reference: Curve,
    k: int,
    k_reference: int,
    statistics: Float[np.ndarray, " F"],
    share: Float[np.ndarray, " F"],
    level: float,
) -> Comparison:
    """p and interval from the statistics of all swaps, the observed one first; share: of the seeds that each swaps."""
    seen = statistics[0]
    slack = 1e-9 * max(1.0, float(np.abs(statistics).max()))  # sums of the same numbers in another order are ties
    p = float(np.mean(np.abs(statistics) >= abs(seen) - slack))
    # Our scores less a shift d: swap f then has the statistic c_f - w_f d with w_f = 1 - 2 share, and the one seen c_0 - d.
    # |c_f - w_f d| >= |c_0 - d| holds on one interval around c_0, since |w_f| <= 1.
    w = 1 - 2 * share
    always = np.abs(w) > 1 - 1e-12  # nothing or everything is swapped: equal for every shift
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.stack([(seen - statistics) / (1 - w), (seen + statistics) / (1 + w)])
    low = np.where(always, -np.inf, ends.min(0))
    high = np.where(always, np.inf, ends.max(0))
    rejected = int(np.floor((1 - level) * len(statistics) + 1e-9))  # as many swaps at least as extreme still reject
    edges = tuple(index in (0, len(curve.rates) - 1) for index, curve in ((k, ours), (k_reference, reference)))
    return Comparison(
        difference=float(seen),
        p=p,
        low=float(np.sort(low)[rejected]),
        high=float(np.sort(high)[::-1][rejected]),
        level=level,
        rates=(ours.rates[k], reference.rates[k_reference]),
        at_edge=edges,
        seeds=ours.selection.shape[1],
        kept=(low, high),
    )


def _check_pair(ours: Curve, reference: Curve) -> None:
    if ours.selection.shape != reference.selection.shape:
        raise ValueError(
            f"curves of {ours.selection.shape} and {reference.selection.shape} (rates, seeds): a comparison takes as many "
            f"rates and the same seeds of both"
        )


def _means_after(
    swaps: Bool[np.ndarray, "F S"], ours: Float[np.ndarray, "K S"], other: Float[np.ndarray, "K S"]
) -> Float[np.ndarray, "K F"]:
    """Mean score at each rate of the curve that takes ours at the seeds kept and the other's at the seeds swapped."""
    return (ours.sum(1)[:, None] + (other - ours) @ swaps.T) / ours.shape[1]


@lru_cache(maxsize=8)
def _swaps(seeds: int) -> Bool[np.ndarray, "F S"]:
    """All 2^S ways of swapping, none swapped first; drawn ones beyond MOST_EXACT seeds."""
    if seeds <= MOST_EXACT:
        return (np.arange(2**seeds)[:, None] >> np.arange(seeds)) % 2 == 1
    drawn = np.random.default_rng(0).random((DRAWN - 1, seeds)) < 0.5
    return np.concatenate([np.zeros((1, seeds), bool), drawn])
