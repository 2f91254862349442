"""Tests what a study set out to test, in the order that its file gives (`[[hypothesis]]`, experiments/hypotheses.py).

A fixed sequence needs no correction: a hypothesis is tested if every one before it was decided or equivalent, and then at
the whole level.  A study that looks more than once tests at the level of each look, and what a look decided stays decided;
seeds beyond it are no longer read for the verdict.

The test is the one that the study's design allows (`compared`); where p does not count the choice of the rates, no winner
is named, and p is given as it is.

Equivalence is two one-sided tests at the same level: the 1 - 2 alpha interval of the test (its inversion) lies inside the
margin.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.experiments.hypotheses import LOOKS, Hypothesis, in_order
from rankwise.reports.compared import Compared, NoConstantScore, compared, finished_seeds
from rankwise.reports.designs import Comparison
from rankwise.reports.results import Arm, Study
from rankwise.reports.statistics import ALPHA, detectable
from rankwise.reports.tables.table import Table
from rankwise.reports.verdicts import limits

SETTLED = ("better", "worse", "equivalent")


@dataclass(frozen=True)
class Tested:
    """What became of one hypothesis.

    kind: "better" or "worse" (of the first setting), "equivalent", "undecided", "waiting" (seeds are missing) or "not tested"
    (one before it was not settled).  design: see `Compared`.  alpha: level of the test.
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
    parts = [part for part in study.parts() if hypothesis.task in (None, part.task)]
    arms = [next((arm for part in parts for arm in part.arms if arm.setting == name), None) for name in hypothesis.arms]
    if not all(arms):
        missing = next(name for name, arm in zip(hypothesis.arms, arms, strict=True) if arm is None)
        return Tested(hypothesis, "waiting", f"waiting: {missing} has no run")
    part = next(part for part in parts if arms[0] in part.arms)
    finished = [finished_seeds(part, arm) for arm in arms]
    planned = list(dict.fromkeys([*study.seeds, *sorted(finished[0] | finished[1])]))
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
        outcome = _test(part, hypothesis, arms, wanted, alpha)
        if outcome.kind in SETTLED:
            return outcome
    return outcome


def _test(part: Study, hypothesis: Hypothesis, arms: Sequence[Arm], seeds: Sequence[int], alpha: float) -> Tested:
    """The test of these seeds, which both settings have finished."""
    try:
        found = compared(part, *arms, seeds, level=1 - 2 * alpha)
    except NoConstantScore as error:
        return Tested(hypothesis, "undecided", f"no claim: {error}")
    comparison, n = found.comparison, len(seeds)
    smallest = detectable(n, ALPHA / alpha) * float(found.differences.std(ddof=1)) if n > 1 else None
    numbers = _numbers(comparison, alpha)
    reasons = _no_claim(part, arms, found)
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
    if any(found.failed):
        counts = " and ".join(f"{runs} of {arm.setting}" for runs, arm in zip(found.failed, arms, strict=True) if runs)
        text += f"; failed runs, scored as a constant predictor: {counts}"
    return Tested(hypothesis, kind, text, found.design, comparison, alpha, smallest, found.failed)


def _numbers(comparison: Comparison, alpha: float) -> str:
    level = f"{100 * comparison.level:.4g} %"
    return (
        f"difference {comparison.difference:+.2f}, {level} interval {comparison.low:+.2f} to {comparison.high:+.2f}, "
        f"n = {comparison.seeds}, p = {comparison.p:.3f}, level {alpha:g}"
    )


def _no_claim(part: Study, arms: Sequence[Arm], found: Compared) -> list[str]:
    """Why neither a winner nor equivalence may be said, whatever the numbers are."""
    apart = "each has a rate of its own, and the error of that choice is not in p (give them shared_with)"
    return [*([] if found.counts_the_choice else [apart]), *limits(part, arms, found.at_edge)]


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
