"""Two settings on one task, compared by the test that the study's design of choosing rates allows.

- whole curve: each setting's rate is chosen by its own final runs at every rate; the choice is made again in each permutation.
- shared rate: both train at one rate, which the scores of both together chose; swapping them leaves the choice as it is.
- chosen rate: each rate was chosen by other runs of that setting alone; p does not count the error of that choice.

A failed run is not dropped: it scores what a constant predictor scores, which is 0 of a correlation, and of other metrics what
the commonest label scores by the labels that the study keeps (experiments/labels.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rankwise.experiments.records import Run
from rankwise.reports.designs import Comparison, Curve, one_rate, shared_rate, whole_curve
from rankwise.reports.results import Arm, Study
from rankwise.reports.statistics import ALPHA

# Metrics on which a predictor that answers the same for every row scores nothing, whatever the task.
CONSTANT_IS_ZERO = frozenset({"pearson", "spearman", "pearson_spearman", "matthews"})


@dataclass(frozen=True, eq=False)
class Compared:
    """A comparison, and the design that it rests on: "whole curve", "shared rate" or "chosen rate".

    differences: (S,) ours minus the reference's, at the chosen rates.
    """

    design: str
    comparison: Comparison
    differences: np.ndarray
    failed: tuple[int, int]  # runs of ours and of the reference that were scored as a constant predictor

    @property
    def at_edge(self) -> tuple[bool, bool] | None:
        """Whose rate, as this comparison chose it, stands at the edge of its grid; None where other runs chose it."""
        return None if np.isnan(self.comparison.rates[0]) else self.comparison.at_edge

    @property
    def counts_the_choice(self) -> bool:
        """Whether p counts the error of choosing the rates."""
        return self.design != "chosen rate"


class NoConstantScore(ValueError):
    """A run failed, and nothing says what a constant predictor scores on its metric."""


def finished_seeds(part: Study, arm: Arm) -> set[int]:
    """Seeds whose runs have all ended: at the chosen rate, or at every rate in a whole curve."""
    rates = arm.grid.values() if part.design == "whole-curve" else [arm.final]
    done = [{run.config.seed for run in runs if run.result is not None} for runs in rates]
    return set.intersection(*done) if done else set()


def compared(part: Study, arm: Arm, reference: Arm, seeds: Sequence[int], level: float = 1 - ALPHA) -> Compared:
    """The comparison of these seeds, each of which both have finished.

    Raises:
        NoConstantScore: a run failed, and nothing says what a constant predictor scores.
        ValueError: no seed, or curves of different numbers of rates.
    """
    is_shared = reference.setting in part.sharers(arm.setting)
    if part.design != "whole-curve":
        scores = [_row(part, one.final, seeds, "score") for one in (arm, reference)]
        failed = tuple(_failed(one.final, seeds) for one in (arm, reference))
        design = "shared rate" if is_shared and arm.rate == reference.rate else "chosen rate"
        return Compared(design, one_rate(*scores, level=level), scores[0] - scores[1], failed)
    ours, other = (_curve(part, one, seeds) for one in (arm, reference))
    comparison = (shared_rate if is_shared else whole_curve)(ours, other, level)
    rows = [curve.reported[curve.rates.index(rate)] for curve, rate in zip((ours, other), comparison.rates, strict=True)]
    failed = tuple(sum(_failed(runs, seeds) for runs in one.grid.values()) for one in (arm, reference))
    return Compared("shared rate" if is_shared else "whole curve", comparison, rows[0] - rows[1], failed)


def _curve(part: Study, arm: Arm, seeds: Sequence[int]) -> Curve:
    rates = tuple(sorted(arm.grid))
    selection, reported = (
        np.array([_row(part, arm.grid[rate], seeds, key) for rate in rates]) for key in ("selection_score", "score")
    )
    return Curve(rates, selection, reported)


def _row(part: Study, runs: Sequence[Run], seeds: Sequence[int], key: str) -> np.ndarray:
    """(S,) points of the runs with these seeds."""
    by_seed = {run.config.seed: run for run in runs}
    return np.array([_score(part, by_seed[seed], key) for seed in seeds])


def _score(part: Study, run: Run, key: str) -> float:
    if run.status == "completed":
        return getattr(run.result, key)
    metric = run.result.metric
    if metric in CONSTANT_IS_ZERO:
        return 0.0
    labels = part.labels_of(run, run.result.selection_split if key == "selection_score" else run.result.split)
    score = None if labels is None else labels.constant_score(metric)
    if score is None:
        raise NoConstantScore(
            f"a run of {run.config.setting} failed, and nothing says what a constant predictor scores on {metric} (the labels "
            f"are not kept)"
        )
    return score


def scores_with_failures(part: Study, arm: Arm, seeds: Sequence[int]) -> tuple[np.ndarray, int]:
    """(S,) points of the final runs with these seeds, and how many of them failed, which score as a constant predictor.

    Raises:
        NoConstantScore: a run failed, and nothing says what a constant predictor scores.
    """
    return _row(part, arm.final, seeds, "score"), _failed(arm.final, seeds)


def _failed(runs: Sequence[Run], seeds: Sequence[int]) -> int:
    return sum(run.status == "failed" and run.config.seed in seeds for run in runs)
