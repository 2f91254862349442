"""The verdict on each setting against the reference of its task: better, worse, equivalent, undecided or no claim.

A family is the comparisons of one task against the named reference.  Each is tested by the exact sign-flip test on
differences paired by seed, or in a study of whole curves by the test that chooses the rates again in each permutation
(`designs`); Holm's correction holds the family to 5 %, and equivalence is an interval inside a margin that was
fixed before the runs.  A quick look, an untuned rate, a best rate at the edge of its grid, a failed seed or a rank budget that
was not reached leave no winner.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from rankwise.reports.compared import NoConstantScore, compared, finished_seeds
from rankwise.reports.results import Arm, Study, best_rate
from rankwise.reports.statistics import (
    ALPHA,
    holm,
    paired_differences,
    seeds_needed,
    sign_flip_test,
    smallest_difference,
    summary,
)

KINDS = ("better", "worse", "equivalent", "undecided", "no claim")


@dataclass(frozen=True)
class Verdict:
    """A setting against the reference: the difference of scores in points, ours minus the reference's, and what follows."""

    setting: str
    reference: str
    task: str
    kind: str  # one of KINDS
    n: int  # seeds that both have finished
    mean: float | None
    low: float | None  # 95 % paired t interval
    high: float | None
    p: float | None  # of the sign-flip test, Holm-adjusted
    smallest: float | None  # smallest detectable difference: found by so many seeds 80 % of the time
    text: str


def verdicts(part: Study) -> list[Verdict]:
    """A verdict for each setting but the reference, in the study's order; none without a reference."""
    reference = part.reference_arm
    if reference is None:
        return []
    others = [arm for arm in part.arms if arm is not reference]
    m = max(len(part.settings) - 1, len(others), 1)  # as planned, so that a family does not grow as runs finish
    estimates = [_estimate(part, arm, reference) for arm in others]
    raw = [estimate.p for estimate in estimates]
    adjusted = holm([*raw, *[1.0] * (m - len(raw))])
    return [
        _verdict(part, arm, reference, one, p, m) for arm, one, p in zip(others, estimates, adjusted[: len(raw)], strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A difference before correction: its interval is Student's, or a whole curve's inverted test."""

    differences: np.ndarray  # (n,) paired by seed
    mean: float | None
    low: float | None
    high: float | None
    p: float
    trouble: str | None = None  # why no winner may be named


def _estimate(part: Study, arm: Arm, reference: Arm) -> Estimate:
    trouble = None
    if part.design == "whole-curve":
        seeds = sorted(finished_seeds(part, arm) & finished_seeds(part, reference))
        try:
            if len(seeds) > 1:
                whole = compared(part, arm, reference, seeds)
                test = whole.comparison
                return Estimate(whole.differences, test.difference, test.low, test.high, test.p)
        except NoConstantScore as error:
            trouble = str(error)
    differences = paired_differences(arm.scores, reference.scores)
    t = summary(differences)
    p = sign_flip_test(differences) if len(differences) else 1.0
    return Estimate(differences, *((t.mean, t.low, t.high) if t is not None else (None, None, None)), p, trouble)


def _verdict(part: Study, arm: Arm, reference: Arm, estimate: Estimate, p: float, m: int) -> Verdict:
    n = len(estimate.differences)
    smallest = smallest_difference(estimate.differences, m)
    if estimate.low is None:
        size = "no seed is finished for both" if n == 0 else f"difference {estimate.mean:+.2f}, n = 1 supports no claim"
        kind, text = "no claim", f"no claim against {reference.setting} ({size})"
        return Verdict(arm.setting, reference.setting, part.task, kind, n, estimate.mean, None, None, None, None, text)
    difference = f"difference {estimate.mean:+.2f}, 95 % interval {estimate.low:+.2f} to {estimate.high:+.2f}, n = {n}"
    reasons = [*no_winner(part, arm, reference), *([estimate.trouble] if estimate.trouble else [])]
    margin = part.margin
    if reasons:
        kind = "no claim" if part.quick else "undecided"
        text = f"{kind} against {reference.setting}: {'; '.join(reasons)} ({difference})"
    elif margin is not None and -margin < estimate.low and estimate.high < margin:
        kind, text = "equivalent", f"equivalent to {reference.setting} within {margin:g} ({difference})"
    elif p <= ALPHA:
        kind = "better" if estimate.mean > 0 else "worse"
        text = f"{kind} than {reference.setting} ({difference}, p = {p:.3f} in a family of {m})"
    else:
        kind = "undecided"
        few = f"; a family of {m} takes {seeds_needed(m)} seeds" if n < seeds_needed(m) else ""
        text = f"undecided against {reference.setting} ({difference}; smallest detectable difference {smallest:.2f}{few})"
    return Verdict(
        arm.setting, reference.setting, part.task, kind, n, estimate.mean, estimate.low, estimate.high, p, smallest, text
    )


def no_winner(part: Study, arm: Arm, reference: Arm) -> list[str]:
    """Why this comparison may name no winner and claim no equivalence, whatever its numbers are."""
    both = (arm, reference)
    reasons = limits(part, both)
    if part.quick or part.design == "whole-curve":  # there a failed run has a constant predictor's score
        return reasons
    failed = [(one, len(one.of("failed"))) for one in both]
    return [*reasons, *(f"{n} of {len(one.final)} seeds of {one.setting} failed" for one, n in failed if n)]


def limits(part: Study, arms: Sequence[Arm]) -> list[str]:
    """What keeps any comparison of these settings from a claim: how they were tuned, and what was scored."""
    if part.quick:
        return ["a quick look"]
    reasons = [f"{arm.setting} had no choice of rates" for arm in arms if len(arm.grid) < 2]
    edges = [arm.setting for arm in arms if (best := best_rate(arm)) and best.at_edge]
    reasons += [f"the best rate of {' and '.join(edges)} stands at the edge of its grid"] if edges else []
    return [
        *reasons,
        *(f"{arm.setting} was scored before its rank budget was reached" for arm in arms if not budget_reached(arm)),
    ]


def warnings(part: Study) -> list[str]:
    """What a reader must know before believing the verdicts, one sentence each."""
    reference, given = part.reference_arm, verdicts(part)
    sentences = []
    if part.protocol == "best-dev-epoch":
        sentences.append(
            "A paper's own protocol: every epoch was scored on the official development part and the best one is reported, "
            "so that scores are chosen on what they are reported on."
        )
    m = max(len(part.settings) - 1, 1)
    n = min((v.n for v in given), default=0)
    if reference is not None and given and not part.quick and n < seeds_needed(m):
        sentences.append(
            f"Too few seeds for the test: the exact sign-flip test with Holm's correction over a family of m = {m} takes "
            f"n >= {seeds_needed(m)} seeds, and here n = {n}: no difference to {reference.setting} can be claimed."
        )
    lonely = [arm.setting for arm in part.arms if len(arm.grid) > 1 and min(map(len, arm.grid.values())) == 1]
    if lonely and not part.quick:
        sentences.append(
            f"Rates chosen by one seed each ({', '.join(lonely)}): two runs of one method can then end at different rates, and "
            "better or worse is said too often (reports/studies/calibration); give the sweep three seeds."
        )
    for verdict in given:
        arm = next(a for a in part.arms if a.setting == verdict.setting)
        error = test_set_error(arm)
        if verdict.kind in ("better", "worse") and error is not None and abs(verdict.mean) < 2 * error[0]:
            sentences.append(
                f"The {arm.completed[0].split} part is small for the difference claimed of {arm.setting}: {verdict.mean:+.2f} "
                f"points, where the standard error of a score on its {error[1]:,} rows is {error[0]:.2f}."
            )
    sentences += [f"{lack} is not in the table, where a fair comparison has it." for lack in missing_baselines(part)]
    return sentences


def missing_baselines(part: Study) -> list[str]:
    """The baselines of a fair table that this one lacks, as sentences begin."""
    if part.quick:
        return []
    wanted = {"full": "Full fine-tuning", "lora": "Plain LoRA"}
    methods = {arm.method for arm in part.arms}
    placed = set().union(*(arm.allocations for arm in part.arms))
    controls = {"uniform": "A uniform allocation of the rank budget", "random": "A random allocation of the rank budget"}
    lacking = [words for method, words in wanted.items() if method not in methods]
    return [*lacking, *(words for allocation, words in controls.items() if allocation not in placed)]


def test_set_error(arm: Arm) -> tuple[float, int] | None:
    """Standard error of one run's score from the finite number of test rows, in points, and the number of rows.

    Root mean square over the seeds.
    """
    errors = [(r.score_standard_error, r.score_rows) for r in arm.completed if r.score_standard_error is not None]
    if not errors:
        return None
    return sqrt(sum(error**2 for error, _ in errors) / len(errors)), errors[0][1]


def budget_reached(arm: Arm) -> bool:
    """Whether every completed run was scored with no more active ranks than its schedule's last budget."""
    for run in arm.of("completed"):
        history = [row for row in run.rank_history if row.budget is not None]
        if not history:
            continue
        lowest = min(row.budget for row in history)
        step = run.result.scored_step if run.result.scored_step is not None else history[-1].step
        scored = [row for row in history if row.step <= step][-1:]
        if not scored or scored[0].active > lowest or scored[0].budget > lowest:
            return False
    return True
