"""What each part of a method is worth, from runs of every combination of its parts (experiments/factors.py).

With k factors of two levels, x_f = -1 without factor f and +1 with it, and y(x) the score of a combination at one seed, the
effect of a set S of factors is the contrast (Box, Hunter & Hunter 2005, chapter 5)

    e_S = 2^(1 - k) sum_x y(x) prod_(f in S) x_f

For one factor: the mean with it less the mean without it, over all combinations of the others.  For two: half of what one adds
to the effect of the other.  Each seed has run every combination, so that each gives an effect of its own; the interval is the
t interval over seeds, the test flips signs (`statistics.sign_flip_test`).  Holm's correction is over the k factors for these,
and over all sets of two or more for the rest, which nobody has asked for one by one.

All parts together differ from none of them by the sum of e_S over the sets of an odd number of factors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import prod

import numpy as np
from rankwise.experiments.factors import Cell
from rankwise.reports.compared import NoConstantScore, finished_seeds, scores_with_failures
from rankwise.reports.results import Arm, Study
from rankwise.reports.statistics import ALPHA, holm, sign_flip_test, summary


@dataclass(frozen=True)
class Effect:
    """What a factor, or a combination of some, is worth, in points; low and high are None, p too, with one seed."""

    factors: tuple[str, ...]
    mean: float
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None

    @property
    def is_claimed(self) -> bool:
        return self.p_adjusted is not None and self.p_adjusted <= ALPHA


@dataclass(frozen=True)
class Decomposition:
    """The effects of one entry's factors, single ones first; `whole`: all parts against none.

    missing: combinations without a finished seed that all others have finished too; the effects are then empty.
    """

    design: str
    factors: tuple[str, ...]
    n: int
    effects: tuple[Effect, ...]
    whole: Effect | None
    missing: tuple[str, ...]
    failed: int
    reason: str = ""

    @property
    def text(self) -> str:
        if self.reason:
            return f"no effect can be given: {self.reason}."
        if not self.effects:
            return f"waiting: no seed has run every combination ({', '.join(self.missing)})."
        single = self.effects[: len(self.factors)]
        said = "; ".join(f"{effect.factors[0]} {_points(effect)}" for effect in single)
        joint = [effect for effect in self.effects[len(self.factors) :] if effect.is_claimed]
        together = "; ".join(f"{' with '.join(effect.factors)} {_points(effect)}" for effect in joint)
        return (
            f"{said}. All of them together {_points(self.whole, False)}. "
            f"{f'Combinations that count: {together}' if joint else 'No combination is shown to count beyond its parts'} "
            f"(n = {self.n} seeds of {2 ** len(self.factors)} combinations)."
        )


def _points(effect: Effect, with_claim: bool = True) -> str:
    interval = "" if effect.low is None else f" (95 % interval {effect.low:+.2f} to {effect.high:+.2f}"
    if not interval:
        return f"{effect.mean:+.2f}"
    claim = "" if not with_claim else ", shown" if effect.is_claimed else ", not shown"
    return f"{effect.mean:+.2f}{interval}{claim})"


def decompositions(part: Study) -> list[Decomposition]:
    """One for each entry with factors of which anything has run, in the study's order."""
    designs = dict.fromkeys(cell.design for cell in part.cells.values())
    known = {arm.setting: arm for arm in part.arms}
    found = []
    for design in designs:
        cells = {setting: cell for setting, cell in part.cells.items() if cell.design == design}
        if any(setting in known for setting in cells):
            found.append(_decomposed(part, design, cells, known))
    return found


def _decomposed(part: Study, design: str, cells: dict[str, Cell], known: dict[str, Arm]) -> Decomposition:
    factors = tuple(next(iter(cells.values())).levels)
    seeds = [finished_seeds(part, known[setting]) if setting in known else set() for setting in cells]
    every = sorted(set.intersection(*seeds))
    most = max(map(len, seeds))
    missing = tuple(setting for setting, done in zip(cells, seeds, strict=True) if len(done) < most or not done)
    if not every:
        return Decomposition(design, factors, 0, (), None, missing, 0)
    try:
        scored = {setting: scores_with_failures(part, known[setting], every) for setting in cells}
    except NoConstantScore as error:
        return Decomposition(design, factors, 0, (), None, missing, 0, str(error))
    by_levels = {tuple(cell.levels[factor] for factor in factors): scored[setting][0] for setting, cell in cells.items()}
    scores = np.array([by_levels[levels] for levels in product((0, 1), repeat=len(factors))])  # (2^k, S)
    sets = [chosen for size in range(1, len(factors) + 1) for chosen in combinations(range(len(factors)), size)]
    by_seed = contrasts(scores, sets)
    single, joint = by_seed[: len(factors)], by_seed[len(factors) :]
    effects = [*_effects(factors, sets[: len(factors)], single), *_effects(factors, sets[len(factors) :], joint)]
    [whole] = _effects(factors, [tuple(range(len(factors)))], (scores[-1] - scores[0])[None])
    return Decomposition(
        design, factors, len(every), tuple(effects), whole, missing, sum(failures for _, failures in scored.values())
    )


def contrasts(scores: np.ndarray, sets: Sequence[Sequence[int]]) -> np.ndarray:
    """(E, S) the effect of each set of factors at each seed.

    Args:
        scores: (2^k, S) points, the combinations in the order of `itertools.product((0, 1), repeat=k)`.
    """
    num_factors = (len(scores) - 1).bit_length()
    levels = np.array(list(product((-1, 1), repeat=num_factors)))  # (2^k, k)
    signs = np.array([[prod(row[factor] for factor in chosen) for row in levels] for chosen in sets])  # (E, 2^k)
    return signs @ scores * 2.0 ** (1 - num_factors)


def _effects(factors: Sequence[str], sets: Sequence[Sequence[int]], by_seed: np.ndarray) -> list[Effect]:
    """Effects of one family, p corrected over it.  by_seed: (E, S)."""
    if not sets:
        return []
    n = by_seed.shape[1]
    p = [sign_flip_test(row) for row in by_seed] if n > 1 else []
    adjusted = holm(p) if p else []
    made = []
    for index, (chosen, row) in enumerate(zip(sets, by_seed, strict=True)):
        seen = summary(row)
        tested = (float(p[index]), float(adjusted[index])) if p else (None, None)
        made.append(Effect(tuple(factors[i] for i in chosen), seen.mean, seen.low, seen.high, *tested))
    return made
