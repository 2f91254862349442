"""Intervals, tests and the seeds that they need: the same code for tables and figures.

Axes: K member, S seed, T task. A score is points, more is better; a difference is paired by seed, (S,).

Below ten seeds the interval is the paired t interval: a BCa bootstrap covers 72 % at three seeds and 84 % at five where
it claims 95 %. scipy is imported where it is used, for it takes longer than most tables. What is drawn is drawn with a
fixed seed, so that the same runs give the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil, log2, sqrt

import numpy as np
from jaxtyping import Float

LEVEL = 0.95
ALPHA = 0.05
MOST_FLIPS = 22  # 2^22 sums of float64 are 32 MiB
FEWEST_FOR_BOOTSTRAP = 10  # seeds below which a BCa interval covers far less than it claims
RESAMPLES = 9_999  # scipy.stats.bootstrap's default
SIMULATED = 4_000  # studies drawn for the power of the exact test, which then has a standard error of 0.6 %
MOST_SIMULATED = 12  # seeds up to which that takes milliseconds; beyond, the t test stands in, which is then as powerful


@dataclass(frozen=True)
class Summary:
    """Statistics of the scores of one setting; `sd` and the interval are None below two seeds."""

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
    half = t_quantile(n - 1, level) * sd / sqrt(n)
    return Summary(n, mean, median, sd, mean - half, mean + half)


def paired_differences(ours: dict[int, float], reference: dict[int, float]) -> Float[np.ndarray, " S"]:
    """Ours minus the reference's, over the seeds that both have, in the order of the seeds."""
    return np.array([ours[seed] - reference[seed] for seed in sorted(ours.keys() & reference.keys())], dtype=np.float64)


def bca_interval(values: Float[np.ndarray, " S"] | Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron 1987); None below two different values.

    Shown beside the t interval, never instead of it below ten seeds.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2 or np.ptp(values) == 0:
        return None
    from scipy.stats import bootstrap

    generator = np.random.default_rng(0)
    result = bootstrap((values,), np.mean, n_resamples=RESAMPLES, confidence_level=level, method="BCa", rng=generator)
    low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
    return (low, high) if np.isfinite([low, high]).all() else None


def interquartile_mean(values: Float[np.ndarray, "..."] | Sequence[float]) -> float | None:
    """Mean of the middle half of all values, over seeds and tasks together; what a quarter does not divide is cut.

    Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", sec. 4.3.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    if not len(values):
        return None
    from scipy.stats import trim_mean

    return float(trim_mean(values, 0.25))


def probability_of_improvement(ours: Sequence[float], reference: Sequence[float]) -> float | None:
    """Chance that a run of ours beats a run of the reference, a tie counting half: Mann and Whitney's U over n m.

    Agarwal et al. 2021, sec. 4.3.  None where one side has no run.
    """
    ours, reference = np.asarray(ours, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if not len(ours) or not len(reference):
        return None
    apart = ours[:, None] - reference[None]
    return float(np.mean((apart > 0) + 0.5 * (apart == 0)))


def stratified_interval(
    scores: Sequence[Float[np.ndarray, " S"]], statistic: str = "mean", level: float = LEVEL
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of a statistic over tasks: seeds are drawn anew within each task (T of them).

    Args:
        scores: one array of scores, or of paired differences, a task.
        statistic: "mean" (of the tasks' means) or "iqm" (of all values together).
    Agarwal et al. 2021, sec. 4.1.  None where some task has fewer than two seeds.
    """
    if not scores or min(map(len, scores)) < 2:
        return None
    generator = np.random.default_rng(0)
    drawn = [np.asarray(task)[generator.integers(len(task), size=(2_000, len(task)))] for task in scores]
    if statistic == "mean":
        resampled = np.mean([task.mean(1) for task in drawn], axis=0)  # (2000,)
    else:
        from scipy.stats import trim_mean

        resampled = trim_mean(np.concatenate(drawn, axis=1), 0.25, axis=1)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_flip_test(differences: Float[np.ndarray, " S"] | Sequence[float]) -> float:
    """Two-sided p-value of "each paired difference is as likely to have the other sign".

    The share, among all 2^S ways to choose the signs, of those whose mean is at least as far from zero as the observed one.
    Its smallest value is 2^(1 - S), which is why `seeds_needed` grows with the number of comparisons.  Exact up to 22
    seeds; beyond, over 99,999 drawn choices, the observed one among them.

    Raises:
        ValueError: no difference, or one that is not finite.
    """
    differences = np.asarray(differences, dtype=np.float64)
    n = len(differences)
    if n < 1 or not np.isfinite(differences).all():
        raise ValueError(f"{n} differences: the sign-flip test takes one or more, each a finite number")
    if n > MOST_FLIPS:
        from scipy.stats import permutation_test

        drawn = {"n_resamples": 99_999, "permutation_type": "samples", "rng": np.random.default_rng(0)}
        return float(permutation_test((differences,), np.sum, vectorized=True, **drawn).pvalue)
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])  # (2^s,)
    seen = abs(differences.sum())
    slack = 1e-12 * np.abs(differences).sum()  # sums of the same numbers in another order are ties
    return float(np.mean(np.abs(sums) >= seen - slack))


def equivalence_test(differences: Float[np.ndarray, " S"] | Sequence[float], margin: float) -> float:
    """p of the two one-sided t tests (TOST, Schuirmann 1987) that the mean difference lies inside the margin.

    At most alpha where the 1 - 2 alpha t interval lies inside it.  1 below two differences.
    """
    differences = np.asarray(differences, dtype=np.float64)
    n = len(differences)
    if n < 2:
        return 1.0
    from scipy.stats import t

    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / sqrt(n)
    room = margin - abs(mean)
    if error == 0:
        return 0.0 if room > 0 else 1.0
    return float(t.sf(room / error, n - 1))


@dataclass(frozen=True)
class OverTasks:
    """A difference over k tasks that stand for others: its mean, and where the difference on another task lies.

    tau: sd of the true differences between tasks.  The prediction interval is None below three tasks.
    """

    mean: float
    low: float
    high: float
    tau: float
    predicted_low: float | None
    predicted_high: float | None


def random_effects(
    means: Sequence[float], variances: Sequence[float], level: float = LEVEL
) -> OverTasks | None:  # fmt: skip
    """Random-effects mean over tasks; None below two tasks, or where a variance is not known (0 or less).

    means, variances: of each task's difference and of that estimate (sd^2 / n).

    tau^2 by DerSimonian & Laird 1986; interval by Hartung & Knapp 2001 with k - 1 degrees of freedom, its scale not below one
    (Knapp & Hartung 2003), so that tasks that agree by chance make it no narrower; prediction interval of Higgins, Thompson &
    Spiegelhalter 2009 with that error, k - 2 degrees of freedom.
    """
    y, v = np.asarray(means, dtype=np.float64), np.asarray(variances, dtype=np.float64)
    k = len(y)
    if k < 2 or not (v > 0).all():
        return None
    w = 1 / v
    fixed = (w @ y) / w.sum()
    excess = w @ (y - fixed) ** 2 - (k - 1)
    tau2 = max(0.0, float(excess / (w.sum() - (w**2).sum() / w.sum())))
    w = 1 / (v + tau2)
    mean = float((w @ y) / w.sum())
    error2 = max(1.0, float(w @ (y - mean) ** 2) / (k - 1)) / float(w.sum())
    half = t_quantile(k - 1, level) * sqrt(error2)
    predicted = t_quantile(k - 2, level) * sqrt(tau2 + error2) if k > 2 else None
    ends = (None, None) if predicted is None else (mean - predicted, mean + predicted)
    return OverTasks(mean, mean - half, mean + half, sqrt(tau2), *ends)


def one_sided_test(differences: Float[np.ndarray, " S"] | Sequence[float], shift: float) -> float:
    """p of the one-sided t test that the mean difference is above `shift`; 1 below two differences."""
    differences = np.asarray(differences, dtype=np.float64)
    n = len(differences)
    if n < 2:
        return 1.0
    from scipy.stats import t

    above, error = float(differences.mean()) - shift, float(differences.std(ddof=1)) / sqrt(n)
    if error == 0:
        return 0.0 if above > 0 else 1.0
    return float(t.sf(above / error, n - 1))


def holm(p_values: Float[np.ndarray, " m"] | Sequence[float], most_true: int | None = None) -> Float[np.ndarray, " m"]:
    """Holm's step-down adjustment: reject where the adjusted value is at most alpha, and the family errs at most so often.

    Sorted ascending, the i-th of m (from 0) becomes the largest of (m - j) p_j over j <= i, at most 1.

    most_true: at most so many of the m hypotheses can be true together, which no factor then exceeds (Shaffer 1986, S1).
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    if not ((p_values >= 0) & (p_values <= 1)).all():
        raise ValueError(f"p-values {p_values.tolist()}: each lies between 0 and 1")
    order = np.argsort(p_values, kind="stable")
    factors = np.minimum(np.arange(len(p_values), 0, -1), len(p_values) if most_true is None else most_true)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p_values[order]), 1.0)
    return adjusted


def seeds_needed(m: int, alpha: float = 0.05) -> int:
    """Fewest seeds with which one of m comparisons can be significant: 2^(1 - S) <= alpha / m."""
    if m < 1 or not 0 < alpha < 1:
        raise ValueError(f"m = {m}, alpha = {alpha}: at least one comparison, and alpha between 0 and 1")
    return ceil(1 + log2(m / alpha))


def smallest_difference(differences: Float[np.ndarray, " S"] | Sequence[float], m: int = 1, power: float = 0.8) -> float | None:
    """The smallest detectable difference: the true one that so many seeds find `power` of the time, of m comparisons.

    The sd of the differences is taken as the true one, and the test must reach what Holm asks of the first of m comparisons:
    p <= 5 % / m.  None for fewer than two seeds.
    """
    differences = np.asarray(differences, dtype=np.float64)
    n = len(differences)
    if n < 2:
        return None
    return detectable(n, m, power) * float(differences.std(ddof=1))


@lru_cache(maxsize=256)
def detectable(n: int, m: int = 1, power: float = 0.8) -> float:
    """The difference, in sd of the paired differences, that n seeds find `power` of the time at p <= 5 % / m.

    By the exact sign-flip test where n seeds can reach that p and n is at most 12 (drawn normal differences, a fixed
    seed), else by the t test, which also answers for too few seeds.
    """
    if n < seeds_needed(m) or n > MOST_SIMULATED:
        return effect_size(n, power, 1 - ALPHA / m)
    from scipy.optimize import brentq

    high = 1.0
    while sign_flip_power(n, high, m) < power:
        high *= 2
    return float(brentq(lambda effect: sign_flip_power(n, effect, m) - power, 0.0, high, xtol=1e-3))


def sign_flip_power(n: int, effect: float, m: int = 1) -> float:
    """How often the exact sign-flip test on n normal differences with mean `effect` and sd 1 has p <= 5 % / m.

    In 4,000 drawn studies with a fixed seed; the same draws for every effect, so that it rises with the effect.
    """
    return share_found(_noise(n) + effect, m)


def share_found(differences: Float[np.ndarray, "D S"], m: int = 1) -> float:
    """The share of D drawn studies of S paired differences in which the exact sign-flip test has p <= 5 % / m."""
    sums = np.abs(differences @ _half_of_signs(differences.shape[1]).T)  # (D, 2^(S-1)); the other half are their negatives
    as_far = (sums >= sums[:, :1] - 1e-9).mean(1)
    return float(np.mean(as_far <= ALPHA / m + 1e-12))


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None below three pairs, and where one side is constant."""
    from scipy.stats import rankdata

    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def jaccard(first: Mapping[str, int], second: Mapping[str, int]) -> float | None:
    """The overlap of two allocations of ranks: sum of the smaller over sum of the greater rank of each site.

    With ranks of 0 and 1 it is Jaccard's index of the two sets of sites; None where no site has a rank in either.
    """
    sites = first.keys() | second.keys()
    union = sum(max(first.get(site, 0), second.get(site, 0)) for site in sites)
    return sum(min(first.get(site, 0), second.get(site, 0)) for site in sites) / union if union else None


@lru_cache(maxsize=32)
def _noise(n: int) -> Float[np.ndarray, "4000 n"]:
    return np.random.default_rng(n).normal(size=(SIMULATED, n))


@lru_cache(maxsize=32)
def _half_of_signs(n: int) -> Float[np.ndarray, "flips n"]:
    return np.array([(1, *rest) for rest in product((1, -1), repeat=n - 1)], dtype=np.float64)


@lru_cache(maxsize=256)
def effect_size(n: int, power: float = 0.8, level: float = LEVEL) -> float:
    """The difference, in sd of the differences, that a two-sided paired t test on n seeds finds `power` of the time."""
    from scipy.optimize import brentq
    from scipy.stats import nct

    critical = t_quantile(n - 1, level)

    def missing(effect: float) -> float:
        shift = effect * sqrt(n)
        # scipy's nct.cdf is NaN in its far lower tail (one degree, shift above 11), where it is below 1e-12.
        wrong_side = np.nan_to_num(nct.cdf(-critical, n - 1, shift))
        return nct.sf(critical, n - 1, shift) + wrong_side - power

    high = 1.0
    while missing(high) < 0:
        high *= 2
    return float(brentq(missing, 0.0, high, xtol=1e-10))


def t_quantile(degrees: float, level: float) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + level / 2, degrees))
