"""The verdict on each setting against the reference of its task: better, worse, equivalent, undecided or no claim.

A family is the comparisons of one task against the named reference.  Each is tested by the exact sign-flip test on
differences paired by seed, or in a study of whole curves by the test that chooses the rates again in each permutation
(`designs`); Holm's correction holds the family to 5 %.  Where a study has several tasks, p over all of its comparisons stands
beside it.  Equivalence is two one-sided tests (TOST) inside a margin that was fixed before the runs, a family of its own with
Holm's correction.  A quick look, an untuned rate, a best rate at the edge of its grid, a failed seed or a rank budget that
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
    equivalence_test,
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
    p: float | None  # of the sign-flip test, Holm-adjusted over the task's comparisons
    smallest: float | None  # smallest detectable difference: found by so many seeds 80 % of the time
    text: str
    p_equivalent: float | None = None  # of the two one-sided tests, Holm-adjusted over the task's; None without a margin
    p_study: float | None = None  # of the sign-flip test, Holm-adjusted over the comparisons of all the study's tasks


def verdicts(part: Study) -> list[Verdict]:
    """A verdict for each setting but the reference, in the study's order; none without a reference."""
    reference = part.reference_arm
    if reference is None:
        return []
    others = [arm for arm in part.arms if arm is not reference]
    m = _family(part)
    estimates = _estimates(part)
    adjusted = _adjusted([one.p for one in estimates], m)
    equivalent = _adjusted([one.p_equivalent for one in estimates], m)
    siblings = part.whole.parts() if part.whole is not None else []
    over_study, in_study = [None] * len(others), 0
    if len(siblings) > 1:
        apart = [one for other in siblings if (other.task, other.model) != (part.task, part.model) for one in _estimates(other)]
        in_study = sum(_family(other) for other in siblings if other.reference_arm is not None)
        over_study = _adjusted([*(one.p for one in estimates), *(one.p for one in apart)], in_study)[: len(others)]
    return [
        _verdict(part, arm, reference, one, p, q, p_study, m, in_study)
        for arm, one, p, q, p_study in zip(others, estimates, adjusted, equivalent, over_study, strict=True)
    ]


def _family(part: Study) -> int:
    """Comparisons of a task as planned, so that a family does not grow as runs finish."""
    return max(len(part.settings) - 1, len(part.arms) - 1, 1)


def _adjusted(raw: Sequence[float], m: int) -> list[float]:
    """Holm's adjustment in a family of m, those that are not there yet counted as 1."""
    return holm([*raw, *[1.0] * (m - len(raw))]).tolist()[: len(raw)]


def _estimates(part: Study) -> list["Estimate"]:
    """Of every setting but the reference, in the study's order; none without a reference."""
    reference = part.reference_arm
    return [] if reference is None else [_estimate(part, arm, reference) for arm in part.arms if arm is not reference]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A difference before correction: its interval is Student's, or a whole curve's inverted test."""

    differences: np.ndarray  # (n,) paired by seed
    mean: float | None
    low: float | None
    high: float | None
    p: float
    p_equivalent: float = 1.0  # of the two one-sided tests
    trouble: str | None = None  # why no winner may be named
    at_edge: tuple[bool, bool] | None = (
        None  # whose rate, as the comparison chose it, is the first or last; None: it chose none
    )


def _estimate(part: Study, arm: Arm, reference: Arm) -> Estimate:
    trouble = None
    if part.design == "whole-curve":
        seeds = sorted(finished_seeds(part, arm) & finished_seeds(part, reference))
        try:
            if len(seeds) > 1:
                whole = compared(part, arm, reference, seeds)
                test = whole.comparison
                inside = 1.0 if part.margin is None else test.equivalence_p(part.margin)
                return Estimate(
                    whole.differences, test.difference, test.low, test.high, test.p, inside, at_edge=whole.at_edge
                )  # fmt: skip
        except NoConstantScore as error:
            trouble = str(error)
    differences = paired_differences(arm.scores, reference.scores)
    t = summary(differences)
    p = sign_flip_test(differences) if len(differences) else 1.0
    inside = 1.0 if part.margin is None else equivalence_test(differences, part.margin)
    return Estimate(differences, *((t.mean, t.low, t.high) if t is not None else (None, None, None)), p, inside, trouble)


def _verdict(
    part: Study,
    arm: Arm,
    reference: Arm,
    estimate: Estimate,
    p: float,
    p_equivalent: float,
    p_study: float | None,
    m: int,
    in_study: int,
) -> Verdict:
    """p, p_equivalent: adjusted over the m comparisons of the task; p_study: over the `in_study` ones of the study."""
    n = len(estimate.differences)
    smallest = smallest_difference(estimate.differences, m)
    if estimate.low is None:
        size = "no seed is finished for both" if n == 0 else f"difference {estimate.mean:+.2f}, n = 1 supports no claim"
        kind, text = "no claim", f"no claim against {reference.setting} ({size})"
        return Verdict(arm.setting, reference.setting, part.task, kind, n, estimate.mean, None, None, None, None, text)
    difference = f"difference {estimate.mean:+.2f}, 95 % interval {estimate.low:+.2f} to {estimate.high:+.2f}, n = {n}"
    reasons = [*no_winner(part, arm, reference, estimate.at_edge), *([estimate.trouble] if estimate.trouble else [])]
    margin = part.margin
    if reasons:
        kind = "no claim" if part.quick else "undecided"
        text = f"{kind} against {reference.setting}: {'; '.join(reasons)} ({difference})"
    elif margin is not None and p_equivalent <= ALPHA:
        kind = "equivalent"
        tost = f"TOST p {'< 0.001' if p_equivalent < 0.001 else f'= {p_equivalent:.3f}'} in a family of {m}"
        text = f"equivalent to {reference.setting} within {margin:g} ({difference}, {tost})"
    elif p <= ALPHA:
        kind = "better" if estimate.mean > 0 else "worse"
        over = ""
        if p_study is not None:
            over = f", {p_study:.3f} over the study's {in_study}" + ("" if p_study <= ALPHA else ": for this task alone")
        text = f"{kind} than {reference.setting} ({difference}, p = {p:.3f} in a family of {m}{over})"
    else:
        kind = "undecided"
        few = f"; a family of {m} takes {seeds_needed(m)} seeds" if n < seeds_needed(m) else ""
        text = f"undecided against {reference.setting} ({difference}; smallest detectable difference {smallest:.2f}{few})"
    found = (
        n,
        estimate.mean,
        estimate.low,
        estimate.high,
        p,
        smallest,
        text,
        None if margin is None else p_equivalent,
        p_study,
    )
    return Verdict(arm.setting, reference.setting, part.task, kind, *found)


def no_winner(part: Study, arm: Arm, reference: Arm, at_edge: tuple[bool, bool] | None = None) -> list[str]:
    """Why this comparison may name no winner and claim no equivalence, whatever its numbers are; at_edge: see `limits`."""
    both = (arm, reference)
    reasons = limits(part, both, at_edge)
    if part.quick or part.design == "whole-curve":  # there a failed run has a constant predictor's score
        return reasons
    failed = [(one, len(one.of("failed"))) for one in both]
    return [*reasons, *(f"{n} of {len(one.final)} seeds of {one.setting} failed" for one, n in failed if n)]


def limits(part: Study, arms: Sequence[Arm], at_edge: Sequence[bool] | None = None) -> list[str]:
    """What keeps any comparison of these settings from a claim: how they were tuned, and what was scored.

    at_edge: whose rate stands at the edge of its grid, where the comparison chose the rates itself, by the seeds that it has;
    else each setting's best rate is looked at.
    """
    if part.quick:
        return ["a quick look"]
    untuned = [arm.setting for arm in arms if len(arm.grid) < 2 and arm.setting not in part.searched]
    reasons = [f"{setting} had no choice of rates" for setting in untuned]
    at_end = [arm.setting for arm in arms if arm.setting in part.searched and part.searched[arm.setting].at_edge]
    reasons += [f"the search ended at an edge of its learning rates for {setting}" for setting in at_end]
    if at_edge is None:
        at_edge = [(best := best_rate(arm)) is not None and best.at_edge for arm in arms]
    edges = [arm.setting for arm, edge in zip(arms, at_edge, strict=True) if edge and len(arm.grid) > 1]
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
