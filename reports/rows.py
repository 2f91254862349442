"""Intervals over seeds and test rows, from the predictions that runs keep and the labels of their study.

An interval over seeds says what other seeds would give on the same test rows; with other rows of the same kind all runs would
move together.  Seeds and rows are crossed: every run predicts every row.  This is the design of radiologists who read the same
cases, and the analysis is theirs: Obuchowski & Rockette 1995 with the degrees of freedom of Hillis 2007 (Statistics in
Medicine 26, 596), here for one mean, or for one mean of differences paired by seed:

    variance of the mean = sd^2 / S + max(Cov, 0)      degrees of freedom = (sd^2 + S max(Cov, 0))^2 / (sd^4 / (S - 1))

with sd over the S seeds, and Cov the covariance of two seeds' scores that comes from sharing the rows, the mean over all
pairs of seeds, from resamples of the rows that all runs share.  sd^2 / S has the interaction of seeds and rows in it already.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from rankwise.experiments.records import Run
from rankwise.reports.results import Arm, Study
from rankwise.reports.statistics import LEVEL, Summary, summary, t_quantile

TOLERANCE = 1e-6  # points: what a run's score may differ from that of its predictions, by sums in another order


@dataclass(frozen=True)
class Crossed:
    """A mean over seeds: its interval over seeds alone, and over seeds and test rows."""

    seeds: Summary
    low: float
    high: float
    num_rows: int


class NoRows(ValueError):
    """Why no interval over test rows can be computed."""


def crossed_interval(
    scores: Float[np.ndarray, " S"], resampled: Float[np.ndarray, "S B"], level: float = LEVEL
) -> tuple[float, float]:
    """The interval of the mean score over seeds and rows.

    resampled: each seed's score on B resamples of the rows, the same rows for all seeds (for differences: of both settings).

    Raises:
        ValueError: fewer than two seeds.
    """
    scores = np.asarray(scores, dtype=np.float64)
    num_seeds = len(scores)
    if num_seeds < 2:
        raise ValueError(f"{num_seeds} seed has no interval: give two or more")
    variance = float(scores.var(ddof=1))
    covariance = np.cov(resampled)  # (S, S)
    shared = max(0.0, float((covariance.sum() - np.trace(covariance)) / (num_seeds * (num_seeds - 1))))
    whole = variance / num_seeds + shared
    # Without spread over seeds there is nothing left but the rows, whose number is taken as large.
    freedom = np.inf if variance == 0 else (num_seeds - 1) * (num_seeds * whole / variance) ** 2
    half = t_quantile(freedom, level) * np.sqrt(whole)
    return float(scores.mean() - half), float(scores.mean() + half)


@dataclass(frozen=True, eq=False)
class Scored:
    """The completed final runs of one setting: score, and score on B resamples of the rows, by seed."""

    setting: str
    scores: Mapping[int, float]
    resampled: Mapping[int, Float[np.ndarray, " B"]]
    num_rows: int


def scored(part: Study, arm: Arm) -> Scored:
    """
    Raises:
        NoRows: predictions or labels are not kept, or the predictions are not those of the score.
    """
    runs = {run.config.seed: run for run in arm.of("completed")}
    sizes = {labels.num_rows for run in runs.values() if (labels := part.labels_of(run)) is not None}
    if len(sizes) > 1:
        raise NoRows("its runs were scored on different numbers of rows")
    resampled = {seed: _resampled(part, runs[seed]) for seed in arm.scores}
    return Scored(arm.setting, arm.scores, resampled, next(iter(sizes), 0))


def of_setting(ours: Scored) -> Crossed:
    """The mean score of a setting.

    Raises:
        NoRows: fewer than two seeds.
    """
    return _crossed(ours, sorted(ours.scores))


def of_difference(ours: Scored, reference: Scored) -> Crossed:
    """The mean difference to the reference, paired by seed.

    Raises:
        NoRows: fewer than two seeds are finished for both, or the rows are others.
    """
    if ours.num_rows != reference.num_rows:
        raise NoRows(f"it was scored on {ours.num_rows:,} rows, {reference.setting} on {reference.num_rows:,}")
    seeds = sorted(ours.scores.keys() & reference.scores.keys())
    scores = {seed: ours.scores[seed] - reference.scores[seed] for seed in seeds}
    resampled = {seed: ours.resampled[seed] - reference.resampled[seed] for seed in seeds}
    return _crossed(Scored(ours.setting, scores, resampled, ours.num_rows), seeds)


def _crossed(one: Scored, seeds: Sequence[int]) -> Crossed:
    if len(seeds) < 2:
        raise NoRows("fewer than two seeds")
    scores, resampled = (np.array([values[seed] for seed in seeds]) for values in (one.scores, one.resampled))
    return Crossed(summary(scores), *crossed_interval(scores, resampled), one.num_rows)


def _resampled(part: Study, run: Run) -> Float[np.ndarray, " B"]:
    """(B,) the run's score on resamples of the rows."""
    labels, metric = part.labels_of(run), run.result.metric
    if labels is None:
        raise NoRows(f"the labels of {run.config.task} are not kept here; the study's `rankwise compare` writes them")
    if not labels.has(metric):
        raise NoRows(f"{metric} of {run.config.task} is not computed from stored predictions")
    predictions = run.predictions
    if predictions is None:
        raise NoRows("a run holds no predictions that are numbers (runs of earlier versions have none)")
    score = labels.score(predictions, metric)
    if abs(score - run.result.score) > TOLERANCE:
        raise NoRows(
            f"the predictions of seed {run.config.seed} score {score:.4f} where its result says {run.result.score:.4f}"
        )
    return labels.resampled(predictions, metric, _weights(labels.num_rows))


@lru_cache(maxsize=4)
def _weights(num_rows: int) -> np.ndarray:
    from rankwise.experiments.tasks.metrics import resample_weights

    return resample_weights(num_rows)
