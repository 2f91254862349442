"""Tests what a study set out to test, in the order that its file gives (`[[hypothesis]]`, experiments/hypotheses.py).

A fixed sequence needs no correction: a hypothesis is tested if every one before it was decided or equivalent, and then at
the whole level.  A study that looks more than once tests at the level of each look, and what a look decided stays decided;
seeds beyond it are no longer read for the verdict.

The test is the one that the two settings' rates allow:

- shared rate: both trained at one rate, chosen by the scores of both together on other seeds or by all of them.  Swapping
  the two leaves the choice as it is, so that the sign-flip test of the differences paired by seed is exact.
- chosen rate: each trained at a rate of its own, chosen on other runs.  The error of that choice is not in p, so no winner
  is named: p is given as it is.

Equivalence is two one-sided tests at the same level: the 1 - 2 alpha interval of the test (its inversion) lies inside the
margin.  A failed run is not dropped but scores what a constant predictor scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rankwise.experiments.hypotheses import ALPHA, LOOKS, Hypothesis, in_order
from rankwise.experiments.records import Run
from rankwise.reports.designs import Comparison, one_rate
from rankwise.reports.results import Arm, Study, best_rate
from rankwise.reports.statistics import detectable
from rankwise.reports.tables.table import Table
from rankwise.reports.verdicts import budget_reached

# Metrics on which a predictor that answers the same for every row scores nothing.
CONSTANT_IS_ZERO = frozenset({"pearson", "spearman", "pearson_spearman", "matthews", "f1", "exact_match"})
SETTLED = ("better", "worse", "equivalent")


@dataclass(frozen=True)
class Tested:
    """What became of one hypothesis.

    kind: "better" or "worse" (of the first setting), "equivalent", "undecided", "waiting" (seeds are missing) or "not tested"
    (one before it was not settled).  design: "shared rate" or "chosen rate".  alpha: level of the test.
    """

    hypothesis: Hypothesis
    kind: str
    text: str
    design: str | None = None
    comparison: Comparison | None = None
    alpha: float | None = None
    smallest: float | None = None  # detectable difference in points, 80 % of the time, at this level
    failed: tuple[int, int] = (0, 0)  # runs of each setting that were scored as a constant predictor


def outcomes_of(study: Study) -> list[Tested]:
    """What became of each of the study's hypotheses, in their order."""
    outcomes: list[Tested] = []
    for hypothesis in in_order(study.hypotheses):
        open_ones = [one for one in outcomes if one.kind not in SETTLED]
        outcome = _look(study, hypothesis)
        if open_ones and outcome.kind != "waiting":
            before = open_ones[0]
            text = f"not tested, because {before.hypothesis.name} before it is {before.kind}"
            if outcome.comparison is not None:
                text += f" ({_numbers(outcome.comparison, outcome.alpha)})"
            outcome = Tested(hypothesis, "not tested", text, outcome.design, outcome.comparison, outcome.alpha)
        outcomes.append(outcome)
    return outcomes


def _look(study: Study, hypothesis: Hypothesis) -> Tested:
    """The test at the first look that settles it, else at the last one for which the seeds are there."""
    runs = [run for run in study.runs if hypothesis.task is None or run.config.task == hypothesis.task]
    parts = [part for part in study.parts() if part.runs and part.runs[0] in runs]
    arms = [next((arm for part in parts for arm in part.arms if arm.setting == name), None) for name in hypothesis.arms]
    if not all(arms):
        missing = next(name for name, arm in zip(hypothesis.arms, arms, strict=True) if arm is None)
        return Tested(hypothesis, "waiting", f"waiting: {missing} has no run")
    part = next(part for part in parts if arms[0] in part.arms)
    finished = [{run.config.seed: run for run in arm.final if run.result is not None} for arm in arms]
    planned = list(dict.fromkeys([*study.seeds, *sorted(set(finished[0]) | set(finished[1]))]))
    looks = study.looks or (len(study.seeds) or len(planned),)
    outcome = None
    for seeds in looks:
        wanted = planned[:seeds]
        done = [seed for seed in wanted if all(seed in one for one in finished)]
        if len(done) < seeds:
            if outcome is not None:
                return outcome
            return Tested(hypothesis, "waiting", f"waiting: {len(done)} of {seeds} seeds are finished for both")
        alpha = LOOKS[seeds] if study.looks else ALPHA
        outcome = _test(part, hypothesis, arms, [[one[seed] for seed in wanted] for one in finished], alpha)
        if outcome.kind in SETTLED:
            return outcome
    return outcome


def _test(part: Study, hypothesis: Hypothesis, arms: Sequence[Arm], runs: Sequence[Sequence[Run]], alpha: float) -> Tested:
    """runs: of each arm, one a seed, the same seeds."""
    scores = [[_score(run) for run in one] for one in runs]
    failed = tuple(sum(run.status == "failed" for run in one) for one in runs)
    if any(score is None for one in scores for score in one):
        lacking = next(arm.setting for arm, one in zip(arms, scores, strict=True) if None in one)
        text = f"no claim: a run of {lacking} failed, and nothing says what a constant predictor scores on {part.metric}"
        return Tested(hypothesis, "undecided", text, failed=failed)
    is_shared = _rate_group(part, arms[0].setting) == _rate_group(part, arms[1].setting)
    design = "shared rate" if is_shared else "chosen rate"
    values = np.array(scores)  # (2, S)
    comparison = one_rate(*values, level=1 - 2 * alpha)
    n = values.shape[1]
    smallest = detectable(n, ALPHA / alpha) * float((values[0] - values[1]).std(ddof=1)) if n > 1 else None
    numbers = _numbers(comparison, alpha)
    reasons = _no_claim(part, arms, is_shared)
    ours, other = hypothesis.arms
    if reasons:
        kind, text = "undecided", f"undecided: {'; '.join(reasons)} ({numbers})"
    elif comparison.equivalent_within(hypothesis.margin):
        kind, text = "equivalent", f"{ours} and {other} are equivalent within {hypothesis.margin:g} ({numbers})"
    elif comparison.p <= alpha:
        kind = "better" if comparison.difference > 0 else "worse"
        text = f"{ours} is {kind} than {other} ({numbers})"
    else:
        kind = "undecided"
        seen = "" if smallest is None else f"; smallest detectable difference {smallest:.2f}"
        text = f"undecided: {numbers}{seen}"
    if any(failed):
        counts = " and ".join(f"{n} of {arm.setting}" for n, arm in zip(failed, arms, strict=True) if n)
        text += f"; failed runs, scored as a constant predictor: {counts}"
    return Tested(hypothesis, kind, text, design, comparison, alpha, smallest, failed)


def _numbers(comparison: Comparison, alpha: float) -> str:
    level = f"{100 * comparison.level:.4g} %"
    return (
        f"difference {comparison.difference:+.2f}, {level} interval {comparison.low:+.2f} to {comparison.high:+.2f}, "
        f"n = {comparison.seeds}, p = {comparison.p:.3f}, level {alpha:g}"
    )


def _no_claim(part: Study, arms: Sequence[Arm], is_shared: bool) -> list[str]:
    """Why neither a winner nor equivalence may be said, whatever the numbers are."""
    if part.quick:
        return ["a quick look"]
    reasons = []
    if not is_shared:
        reasons.append("each has a rate of its own, and the error of that choice is not in p (give them shared_with)")
    edges = [arm.setting for arm in arms if (best := best_rate(arm)) and best.at_edge]
    reasons += [f"the best rate of {' and '.join(edges)} stands at the edge of its grid"] if edges else []
    reasons += [f"{arm.setting} was scored before its rank budget was reached" for arm in arms if not budget_reached(arm)]
    return reasons


def _rate_group(part: Study, setting: str) -> str:
    return part.shared_with.get(setting, setting)


def _score(run: Run) -> float | None:
    """Points on the score split; of a failed run those of a constant predictor, None where nothing says them."""
    if run.status == "completed":
        return run.result.score
    return 0.0 if run.result.metric in CONSTANT_IS_ZERO else None


def hypothesis_table(study: Study) -> Table | None:
    """What the study set out to test, and what became of it; None where its file holds no hypothesis."""
    outcomes = outcomes_of(study)
    if not outcomes:
        return None
    rows = []
    for one in outcomes:
        seen = one.comparison
        interval = None if seen is None else f"{seen.low:+.2f} to {seen.high:+.2f} ({100 * seen.level:.4g} %)"
        rows.append(
            (
                one.hypothesis.name,
                f"{one.hypothesis.arms[0]} against {one.hypothesis.arms[1]}",
                one.hypothesis.task or study.task,
                one.kind,
                None if seen is None else f"{seen.difference:+.2f}",
                interval,
                None if seen is None else f"{seen.p:.4f}",
                None if seen is None else seen.seeds,
                f"{one.hypothesis.margin:g}",
                one.design,
            )
        )
    columns = ("hypothesis", "settings", "task", "verdict", "difference", "interval", "p", "n", "margin", "design")
    caption = [
        "Written into the study's file before its runs; tested in this order, each only if all before it were settled.",
        *_look_sentences(study),
        *(f"{one.hypothesis.name}: {one.hypothesis.why}" for one in outcomes if one.hypothesis.why),
        *(f"{one.hypothesis.name}: {one.text}." for one in outcomes),
    ]
    title = f"{study.title}: what it set out to test"
    return Table("hypotheses", title, columns, tuple(rows), tuple(caption), text_columns=4)


def _look_sentences(study: Study) -> list[str]:
    if not study.looks:
        return []
    levels = " and ".join(f"{LOOKS[n]}" for n in study.looks)
    return [f"Looks at {' and '.join(map(str, study.looks))} seeds, at levels {levels}."]
