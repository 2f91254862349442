"""Calibration of the verdicts: the error rate where arms do not differ, the power where one is shifted.

Arms that do not differ are drawn from committed runs of one method.  Every arm gets seeds of its own, chooses its rate on the
selection split by the first of them, reports the scores of the score split, and goes through `reports.verdicts` in a family
with the others.  "Better" or "worse" is then an error.  The share of families with an error is compared with 5 % by Clopper
and Pearson's lower bound.  Two controls: a planted shift of one sd of the differences must be found as often as the power of
the test says, and the smallest uncorrected p-value must fail the same check.  The power is given twice: for normal
differences, as in `statistics.smallest_difference`, and for differences distributed as the pool's are.

The families are drawn from one pool, so that they are not independent: the bound is a check, not a theorem.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rankwise.experiments.files import write_file
from rankwise.experiments.records import Run
from rankwise.reports.results import Study, best_rate
from rankwise.reports.statistics import ALPHA, paired_differences, share_found, sign_flip_power, sign_flip_test
from rankwise.reports.verdicts import KINDS, verdicts

Pool = dict[float, dict[int, Run]]  # rate -> seed -> a run with both scores


@dataclass(frozen=True)
class Design:
    """The number of families drawn, and the size of each."""

    families: int = 2_000
    comparisons: int = 3  # arms against the reference arm: the family's m
    seeds: int = 8  # of each arm
    sweep_seeds: int = 3  # of those, the first choose the rate
    margin: float = 0.5
    seed: int = 0


def pool_of(study: Study) -> Pool:
    """The finished final runs of one method, by rate and seed.

    Raises:
        ValueError: several methods or tasks, or rates that do not have the same seeds.
    """
    runs = [run for run in study.runs if run.config.phase == "final" and run.status == "completed"]
    if len({(run.config.method, run.config.task, run.config.model) for run in runs}) != 1:
        raise ValueError(f"{study.folder}: a pool is of one method, task and model; this study has others or none")
    pool: Pool = {}
    for run in runs:
        if run.result.selection_score is None or run.result.score is None:
            raise ValueError(
                f"{run.folder}: a run of the pool has a selection score and a score; set evaluations_per_epoch = 1"
            )
        pool.setdefault(run.config.learning_rate, {})[run.config.seed] = run
    seeds = {rate: sorted(by_seed) for rate, by_seed in pool.items()}
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in seeds.values())))
    return {rate: {seed: pool[rate][seed] for seed in shared} for rate in sorted(pool)}


def family(pool: Pool, template: Study, arms: Sequence[Sequence[int]], design: Design, shift: float = 0.0) -> Study:
    """A study whose arms are one method at these seeds of the pool, the last arm's scores shifted by `shift`."""
    names = ["reference", *(f"arm {i}" for i in range(1, len(arms)))]
    runs = []
    for name, seeds in zip(names, arms, strict=True):
        sweep = [
            _as(pool[rate][seed], name, place, "sweep", template)
            for rate in pool
            for place, seed in enumerate(seeds[: design.sweep_seeds])
        ]
        only = replace(template, settings=(name,), runs=tuple(sweep))
        rate = best_rate(only.arms[0]).rate
        moved = shift if name == names[-1] else 0.0
        runs += sweep + [_as(pool[rate][s], name, place, "final", template, moved) for place, s in enumerate(seeds)]
    return replace(template, settings=tuple(names), reference="reference", runs=tuple(runs), margin=design.margin, quick=False)


def _as(run: Run, setting: str, place: int, phase: str, template: Study, shift: float = 0.0) -> Run:
    """A run of the pool under another name: the `place`-th seed of an arm, in a sweep or at its end."""
    names = {"setting": setting, "seed": place, "phase": phase, "quick": False}
    result = run.result.model_copy(update={**names, "score": run.result.score + shift if phase == "final" else None})
    return Run(run.folder, run.config.model_copy(update=names), result)


def without_edges(study: Study) -> Study:
    """The same study with every grid widened by a rate on each side at which nothing is known.

    A best rate at the edge of its grid names no winner, which would hide errors; so no rate may be at an edge.
    """
    for arm in study.arms:  # Study.arms is cached: the verdicts see the widened grids
        low, high = min(arm.grid), max(arm.grid)
        arm.grid[low / 10], arm.grid[high * 10] = (), ()
    return study


def calibrate(study: Study, design: Design) -> dict:
    """Shares of families and comparisons with an error, and both controls.

    Raises:
        ValueError: the pool has fewer seeds than a family takes.
    """
    if min(design.families, design.comparisons, design.sweep_seeds) < 1 or design.seeds < max(2, design.sweep_seeds):
        raise ValueError("give at least one family, one comparison, two seeds, and among them those of the sweep")
    pool = pool_of(study)
    seeds = list(next(iter(pool.values())))
    needed = (design.comparisons + 1) * design.seeds
    if len(seeds) < needed:
        raise ValueError(f"a family takes {needed} seeds, and the pool has {len(seeds)}: lower the seeds or the comparisons")
    generator = np.random.default_rng(design.seed)
    kinds, planted, pairs = Counter(), 0, Counter()
    wrong, as_reported, uncorrected, claims = 0, 0, 0, 0
    for _ in range(design.families):
        drawn = generator.permutation(seeds)[:needed].reshape(-1, design.seeds)
        made = family(pool, study, drawn.tolist(), design)
        as_reported += any(v.kind in ("better", "worse") for v in verdicts(made))
        named = verdicts(without_edges(made))
        kinds.update(v.kind for v in named)
        false = sum(v.kind in ("better", "worse") for v in named)
        wrong, claims = wrong + (false > 0), claims + false
        reference, *others = made.arms
        differences = [paired_differences(arm.scores, reference.scores) for arm in others]
        uncorrected += min(map(sign_flip_test, differences)) <= ALPHA
        shifted = family(pool, study, drawn.tolist(), design, shift=_sd(pool, made))
        planted += verdicts(without_edges(replace(shifted, margin=None)))[-1].kind == "better"
        pairs[others[-1].rate, reference.rate] += 1
    count = design.families
    stated = sign_flip_power(design.seeds, 1.0, design.comparisons)
    own = sum(times * power(pool, *rates, design) for rates, times in pairs.items()) / count
    return {
        "schema": 1,
        "study": study.name,
        "runs": sum(map(len, pool.values())),
        "design": design.__dict__,
        "verdicts": {kind: kinds[kind] for kind in KINDS},
        "families with an error": share(wrong, count),
        "the same, best rates at the edge as they are": share(as_reported, count),
        "comparisons with an error": share(claims, count * design.comparisons),
        "smallest p uncorrected, families with an error": share(uncorrected, count),
        "planted shift of one sd found": {
            **share(planted, count),
            "power for normal differences": stated,
            "power for the pool's differences": own,
        },
        "passes": bool(share(wrong, count)["low"] <= ALPHA),
        "uncorrected passes": bool(share(uncorrected, count)["low"] <= ALPHA),
    }


def power(pool: Pool, rate: float, reference: float, design: Design) -> float:
    """How often the test finds one sd between two rates of the pool, their scores drawn apart and with replacement."""
    generator = np.random.default_rng(design.seed)
    ours, others = (np.array([run.result.score for run in pool[one].values()]) for one in (rate, reference))
    drawn = [generator.choice(scores - scores.mean(), (4_000, design.seeds)) for scores in (ours, others)]
    return share_found(drawn[0] - drawn[1] + _sd_of(ours, others), design.comparisons)


def _sd(pool: Pool, made: Study) -> float:
    """One sd of the differences of the shifted arm and the reference, each at the rate that it chose, over the whole pool."""
    chosen = made.arms[-1].rate, made.reference_arm.rate
    return _sd_of(*(np.array([run.result.score for run in pool[rate].values()]) for rate in chosen))


def _sd_of(ours: np.ndarray, others: np.ndarray) -> float:
    return float(np.sqrt(ours.var(ddof=1) + others.var(ddof=1)))


def share(count: int, of: int) -> dict[str, float]:
    """A share with its 95 % Clopper-Pearson bounds: low is the one-sided lower bound, high the upper."""
    from scipy.stats import binomtest

    test = binomtest(count, of)
    low = test.proportion_ci(0.90, method="exact").low  # two-sided 90 %: one-sided 95 % below
    high = test.proportion_ci(0.90, method="exact").high
    return {"count": count, "of": of, "share": count / of, "low": float(low), "high": float(high)}


def text(result: dict) -> str:
    """The result as Markdown."""
    design, planted = result["design"], result["planted shift of one sd found"]
    own, normal = planted["power for the pool's differences"], planted["power for normal differences"]
    rows = [
        ("families with a wrong better or worse", result["families with an error"]),
        (
            "the same, winners at a grid's edge withheld as in every report",
            result["the same, best rates at the edge as they are"],
        ),
        ("single comparisons with a wrong better or worse", result["comparisons with an error"]),
        ("control: smallest p-value, uncorrected", result["smallest p uncorrected, families with an error"]),
        ("control: planted shift of one sd, found", result["planted shift of one sd found"]),
    ]
    lines = [
        "# Calibration of the verdicts",
        "",
        f"{design['families']:,} families of {design['comparisons']} comparisons, {design['seeds']} seeds an arm, drawn from "
        f"{result['runs']} runs of the study `{result['study']}`: all arms are the same method with seeds of their own, of "
        f"which the first {design['sweep_seeds']} choose the rate.",
        "",
        "| | count | share | 95 % lower bound | 95 % upper bound |",
        "| :-- | --: | --: | --: | --: |",
        *(
            f"| {name} | {s['count']:,} of {s['of']:,} | {s['share']:.2%} | {s['low']:.2%} | {s['high']:.2%} |"
            for name, s in rows
        ),
        "",
        f"Power for the planted shift: {own:.1%} for differences that scatter as the pool's do, {normal:.1%} for normal ones.",
        f"The verdicts {'pass' if result['passes'] else 'FAIL'} the check (lower bound at most 5 %); the uncorrected smallest "
        f"p-value {'passes it' if result['uncorrected passes'] else 'fails it, as it should'}.",
        "Verdicts given: " + ", ".join(f"{count:,} {kind}" for kind, count in result["verdicts"].items()) + ".",
        "The families share one pool of runs, so that they are not independent.",
    ]
    return "\n".join(lines) + "\n"


def write(result: dict, out: Path) -> None:
    """calibration.json and calibration.md."""
    write_file(out / "calibration.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_file(out / "calibration.md", text(result))
