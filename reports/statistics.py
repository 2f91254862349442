"""Intervals, tests and the seeds that they need: the same code for tables and figures.

Axes: K member, S seed, T task. A score is points, more is better; a difference is paired by seed, (S,).

Below ten seeds the interval is the paired t interval: a BCa bootstrap covers 72 % at three seeds and 84 % at five where
it claims 95 %. scipy is imported where it is used, for it takes longer than most tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2, sqrt

import numpy as np
from jaxtyping import Float

LEVEL = 0.95
MOST_FLIPS = 22  # 2^22 sums of float64 are 32 MiB


@dataclass(frozen=True)
class Summary:
    """What is said of the scores of one setting. `sd` and the interval need two seeds; without them they are None."""

    n: int
    mean: float
    median: float
    sd: float | None  # of the sample, divided by n - 1
    low: float | None
    high: float | None

    @property
    def half_width(self) -> float | None:
        return None if self.high is None else self.high - self.mean


def summary(values: Float[np.ndarray, " S"] | Sequence[float], level: float = LEVEL) -> Summary | None:
    """Mean, median, sd and t interval of one value a seed; None if there is no value."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        return None
    mean, median = float(values.mean()), float(np.median(values))
    if n == 1:
        return Summary(1, mean, median, None, None, None)
    sd = float(values.std(ddof=1))
    half = _t_quantile(n - 1, level) * sd / sqrt(n)
    return Summary(n, mean, median, sd, mean - half, mean + half)


def paired_differences(ours: dict[int, float], reference: dict[int, float]) -> Float[np.ndarray, " S"]:
    """Ours minus the reference's, over the seeds that both have, in the order of the seeds."""
    return np.array([ours[seed] - reference[seed] for seed in sorted(ours.keys() & reference.keys())], dtype=np.float64)


def sign_flip_test(differences: Float[np.ndarray, " S"] | Sequence[float]) -> float:
    """Exact two-sided p-value of "each paired difference is as likely to have the other sign".

    The share, among all 2^S ways to choose the signs, of those whose mean is at least as far from zero as the mean seen.
    Its smallest value is 2^(1 - S), which is why `seeds_needed` grows with the number of comparisons.

    Raises:
        ValueError: no difference, one that is not finite, or more than 22 of them (4 million sign choices).
    """
    differences = np.asarray(differences, dtype=np.float64)
    n = len(differences)
    if not 1 <= n <= MOST_FLIPS or not np.isfinite(differences).all():
        raise ValueError(f"{n} differences: the exact sign-flip test takes 1 to {MOST_FLIPS} finite ones; use a t test")
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])  # (2^s,)
    seen = abs(differences.sum())
    slack = 1e-12 * np.abs(differences).sum()  # sums of the same numbers in another order are ties
    return float(np.mean(np.abs(sums) >= seen - slack))


def holm(p_values: Float[np.ndarray, " m"] | Sequence[float]) -> Float[np.ndarray, " m"]:
    """Holm's step-down adjustment: reject where the adjusted value is at most alpha, and the family errs at most so often.

    Sorted ascending, the i-th of m (from 0) becomes the largest of (m - j) p_j over j <= i, at most 1.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    if not ((p_values >= 0) & (p_values <= 1)).all():
        raise ValueError(f"p-values {p_values.tolist()}: each lies between 0 and 1")
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p_values[order]), 1.0)
    return adjusted


def seeds_needed(m: int, alpha: float = 0.05) -> int:
    """Fewest seeds with which one of m comparisons can be significant: 2^(1 - S) <= alpha / m."""
    if m < 1 or not 0 < alpha < 1:
        raise ValueError(f"m = {m}, alpha = {alpha}: at least one comparison, and alpha between 0 and 1")
    return ceil(1 + log2(m / alpha))


def smallest_difference(
    differences: Float[np.ndarray, " S"] | Sequence[float], power: float = 0.8, level: float = LEVEL
) -> float | None:
    """The true difference that these seeds would have seen, by a two-sided paired t test, `power` of the time.

    It takes the sd of the differences as true. None for fewer than two seeds.
    """
    differences = np.asarray(differences, dtype=np.float64)
    n = len(differences)
    if n < 2:
        return None
    return effect_size(n, power, level) * float(differences.std(ddof=1))


def effect_size(n: int, power: float = 0.8, level: float = LEVEL) -> float:
    """The difference, in sd of the differences, that a two-sided paired t test on n seeds finds `power` of the time."""
    from scipy.optimize import brentq
    from scipy.stats import nct

    critical = _t_quantile(n - 1, level)

    def missing(effect: float) -> float:
        shift = effect * sqrt(n)
        # scipy's nct.cdf is NaN in its far lower tail (one degree, shift above 11), where it is below 1e-12.
        wrong_side = np.nan_to_num(nct.cdf(-critical, n - 1, shift))
        return nct.sf(critical, n - 1, shift) + wrong_side - power

    high = 1.0
    while missing(high) < 0:
        high *= 2
    return float(brentq(missing, 0.0, high, xtol=1e-10))


def _t_quantile(degrees: int, level: float) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + level / 2, degrees))
