"""What rank is worth at each site, from runs that each drew an allocation at random within one budget.

Allocations that are drawn, and not chosen, have nothing in common with what else decides a run: a regression of the score on
where the rank went estimates its worth without bias, as a randomized experiment does.  With x_j the parameters spent at site
j, whose sum is the budget (the same in every run, but for less than one rank),

    score = constant + sum_j g_j x_j + error          sum_j w_j g_j = 0,   w_j the mean share of the budget at site j

so that g_j is what a parameter is worth at site j against one that is spread as the mean allocation is.  Effects are printed
as points for 1 % of the budget moved to the site (the kind, the layer) from all others in their shares.

Intervals are clustered by seed: the jackknife that leaves out all runs of one seed (CV3 of MacKinnon, Nielsen & Webb 2023,
Journal of Econometrics 232, 272), Student's t with (seeds - 1) degrees of freedom.  Whether the allocation matters at all is a
permutation test: under the null hypothesis the scores may be dealt to the allocations anew, because these were drawn.

How much any placement could gain is a variance: that of scores over allocations less that over seeds of one allocation, with
a generalized confidence interval (Weerahandi 1993, JASA 88, 899; normal scores).

A few runs that collapse have more of the variance than all others.  So everything is given in three more views: of the scores'
ranks (Conover & Iman 1981, American Statistician 35, 124), which no run can sway alone; of the runs that did not collapse,
which says nothing of how often an allocation collapses; and of whether a run collapsed.  A failed run is none that is missing:
it scores what a constant predictor scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float
from rankwise.experiments.records import Run
from rankwise.reports.compared import scores_with_failures
from rankwise.reports.ranks.sites import module_labels, site_order, split_site
from rankwise.reports.results import Arm, Study
from rankwise.reports.statistics import LEVEL, spearman, t_quantile

PERMUTATIONS = 1_999
DRAWS = 100_000  # of a generalized confidence interval: its ends are then known to about 1 %
RESAMPLES = 500  # of the seeds, for the interval of a rank correlation
PERCENT = 0.01  # of the budget, which effects are given for
LEAST = 2  # runs for each site
COLLAPSE = 10.0  # robust standard deviations below the median: no scatter goes so far, and a run that learnt nothing does
LIKELY = 0.95  # a site of the best allocation gets no more rank than this quantile of what sites had in the runs


@dataclass(frozen=True, eq=False)
class Runs:
    """n finished runs with an allocation each.

    seeds: (n,). scores: (n,) points. spent: (n, J) parameters at each site. prices: (J,) of one rank at each site.
    """

    sites: tuple[str, ...]
    seeds: np.ndarray
    scores: Float[np.ndarray, " n"]
    spent: Float[np.ndarray, "n J"]
    prices: Float[np.ndarray, " J"]

    @property
    def budget(self) -> float:
        """Parameters of an allocation, the mean over the runs."""
        return float(self.spent.sum(1).mean())

    @property
    def least(self) -> int:
        """Runs that two halves take, each with an effect for every site."""
        return 2 * LEAST * len(self.sites)

    @property
    def has_effects(self) -> bool:
        """Whether these are enough for an effect of every site."""
        return len(self.scores) >= LEAST * len(self.sites)

    @property
    def can_be_halved(self) -> bool:
        return len(self.scores) >= self.least

    def take(self, which: np.ndarray) -> "Runs":
        return Runs(self.sites, self.seeds[which], self.scores[which], self.spent[which], self.prices)

    def scored(self, scores: Float[np.ndarray, " n"]) -> "Runs":
        """The same allocations with other scores."""
        return replace(self, scores=np.asarray(scores, dtype=np.float64))

    @property
    def ranked(self) -> "Runs":
        """With the scores' ranks, from 0 (the worst) to 100; ties share theirs."""
        from scipy.stats import rankdata

        return self.scored(100 * (rankdata(self.scores) - 1) / max(1, len(self.scores) - 1))

    @property
    def floor(self) -> float:
        """Below this a run collapsed: COLLAPSE robust deviations (1.4826 median absolute deviations) under the median."""
        middle = np.median(self.scores)
        return float(middle - COLLAPSE * 1.4826 * np.median(np.abs(self.scores - middle)))

    @property
    def collapsed(self) -> np.ndarray:
        """(n,) which runs did."""
        return self.scores < self.floor

    def groups(self, name: str) -> dict[str, list[int]]:
        """The sites' indices by group; name: "site", "kind" or "layer"."""
        labels = module_labels(self.sites)
        found: dict[str, list[int]] = {}
        for index, site in enumerate(self.sites):
            layer = split_site(site)[1]
            key = {"site": site, "kind": labels[site], "layer": "no layer" if layer is None else f"layer {layer}"}[name]
            found.setdefault(key, []).append(index)
        return found


@dataclass(frozen=True, eq=False)
class Effects:
    """Points for 1 % of the budget moved to each of G groups of sites from all others in their shares.

    without: (C, G) the effects without each seed, for the jackknife.
    """

    names: tuple[str, ...]
    values: Float[np.ndarray, " G"]
    without: Float[np.ndarray, "C G"]

    @cached_property
    def covariance(self) -> Float[np.ndarray, "G G"]:
        apart = self.without - self.values
        return (len(apart) - 1) / len(apart) * apart.T @ apart

    @property
    def errors(self) -> Float[np.ndarray, " G"]:
        return np.sqrt(np.diag(self.covariance))

    def intervals(self, level: float = LEVEL) -> Float[np.ndarray, "G 2"]:
        half = t_quantile(len(self.without) - 1, level) * self.errors
        return np.stack([self.values - half, self.values + half], 1)

    @property
    def p_values(self) -> Float[np.ndarray, " G"]:
        """Two-sided, of each effect alone."""
        from scipy.stats import t

        with np.errstate(divide="ignore", invalid="ignore"):
            return 2 * t.sf(np.abs(self.values / self.errors), len(self.without) - 1)


def runs_of(part: Study, arm: Arm) -> Runs:
    """The final runs of the setting that draws an allocation for each seed; a failed one scores as a constant predictor.

    A run that failed before it had an allocation (out of memory, say) has none that could be blamed, and is left out.

    Raises:
        ValueError: too few runs for as many effects as there are sites.
        NoConstantScore: a run failed, and nothing says what a constant predictor scores.
    """
    done = [run for run in _ended(arm) if run.result.ranks]
    sites = tuple(site_order(site for run in done[:1] for site in run.result.ranks))
    if len(done) < LEAST * len(sites) or not sites:
        raise ValueError(
            f"{arm.setting} has {len(done)} finished runs: a regression on {len(sites) or 'the'} sites takes at least "
            f"{LEAST * len(sites) or 'twice as many'}; let `rankwise compare` go on"
        )
    ranks = np.array([[run.result.ranks[site] for site in sites] for run in done], dtype=np.float64)
    prices = _prices(ranks, done)
    seeds = [run.config.seed for run in done]
    scores, _ = scores_with_failures(part, arm, seeds)
    return Runs(sites, np.array(seeds), scores, ranks * prices, prices)


def scores_of(part: Study, arm: Arm) -> Float[np.ndarray, " m"]:
    """Of the finished final runs of a setting; a failed one scores as a constant predictor."""
    return scores_with_failures(part, arm, [run.config.seed for run in _ended(arm)])[0]


def _ended(arm: Arm) -> list[Run]:
    """Final runs with a score, and those that failed, by seed."""
    done = [run for run in arm.of("completed") if run.result.score is not None] + arm.of("failed")
    return sorted(done, key=lambda run: run.config.seed)


def _prices(ranks: Float[np.ndarray, "n J"], done: Sequence[Run]) -> Float[np.ndarray, " J"]:
    """Parameters of one rank at each site: the whole numbers that give every run's active parameters.

    Raises:
        ValueError: there are none.
    """
    counts = np.array([run.result.active_parameters for run in done], dtype=np.float64)
    prices = np.rint(np.linalg.lstsq(ranks, counts, rcond=None)[0])
    if not np.array_equal(ranks @ prices, counts):
        raise ValueError(
            "active parameters of the runs are not the sum over sites of rank times a price: runs of other models or methods?"
        )
    return prices


def effects(runs: Runs, by: str = "site") -> Effects:
    """by: "site", "kind" or "layer"."""
    groups = runs.groups(by)
    membership = np.zeros((len(runs.sites), len(groups)))
    for column, inside in enumerate(groups.values()):
        membership[inside, column] = 1
    spent = runs.spent @ membership  # (n, G)
    share = spent.mean(0) / spent.mean(0).sum()
    basis = _basis(share)

    def fitted(kept: np.ndarray) -> np.ndarray:
        design = np.concatenate([np.ones((kept.sum(), 1)), spent[kept] @ basis], 1)
        return basis @ np.linalg.lstsq(design, runs.scores[kept], rcond=None)[0][1:]

    everything = np.ones(len(runs.seeds), bool)
    unit = PERCENT * runs.budget
    without = np.stack([fitted(runs.seeds != seed) for seed in np.unique(runs.seeds)])
    return Effects(tuple(groups), unit * fitted(everything), unit * without)


def _basis(share: Float[np.ndarray, " G"]) -> Float[np.ndarray, "G H"]:
    """Columns that span the effects whose mean by share is zero, H = G - 1."""
    return np.linalg.svd(share[None])[2][1:].T


def permutation_p(runs: Runs, by: str = "site") -> tuple[float, float]:
    """(share of the scores' variance that the effects explain, p): as much is explained of scores dealt to allocations anew."""
    membership = np.stack([np.isin(np.arange(len(runs.sites)), inside) for inside in runs.groups(by).values()], 1)
    spent = runs.spent @ membership
    centred = (spent - spent.mean(0)) @ _basis(spent.mean(0) / spent.mean(0).sum())
    space = np.linalg.qr(centred)[0]
    scores = runs.scores - runs.scores.mean()
    random = np.random.default_rng(0)
    dealt = np.stack([scores, *(random.permutation(scores) for _ in range(PERMUTATIONS))])
    explained = ((dealt @ space) ** 2).sum(1) / (scores @ scores)
    return float(explained[0]), float(np.mean(explained >= explained[0] - 1e-12))


@dataclass(frozen=True)
class Spread:
    """Standard deviation of scores: over allocations (one a seed), over seeds of one allocation, of allocations alone.

    low, high: of the latter, 95 %.  gain: the mean best of `of` allocations over their mean, where scores of allocations
    are normal.
    """

    drawn: float
    uniform: float
    allocation: float
    low: float
    high: float
    numbers: tuple[int, int]

    def gain(self, of: int) -> tuple[float, float, float]:
        """(estimate, low, high)."""
        from scipy.stats import norm

        grid = np.linspace(-8, 8, 20_001)
        best = float(np.trapezoid(grid * of * norm.pdf(grid) * norm.cdf(grid) ** (of - 1), grid))
        return best * self.allocation, best * self.low, best * self.high


def spread(drawn: Float[np.ndarray, " n"], uniform: Float[np.ndarray, " m"], level: float = LEVEL) -> Spread:
    """
    Raises:
        ValueError: fewer than two scores of either.
    """
    numbers = len(drawn), len(uniform)
    if min(numbers) < 2:
        raise ValueError(f"{numbers[0]} and {numbers[1]} scores: a spread takes two or more of each")
    squares = [float(np.var(scores, ddof=1)) for scores in (drawn, uniform)]
    random = np.random.default_rng(0)
    pivots = [square * (n - 1) / random.chisquare(n - 1, DRAWS) for square, n in zip(squares, numbers, strict=True)]
    low, high = np.quantile(pivots[0] - pivots[1], [(1 - level) / 2, (1 + level) / 2])
    deviations = [float(np.sqrt(max(value, 0.0))) for value in (*squares, squares[0] - squares[1], low, high)]
    return Spread(*deviations, numbers)


def best_allocation(runs: Runs, worth: Effects) -> dict[str, int]:
    """The allocation that these effects predict to be best, within the budget and the ranks that the runs cover.

    Args:
        worth: by site.
    """
    most = max(1, int(np.quantile(np.rint(runs.spent / runs.prices), LIKELY)))
    left, ranks = runs.budget, dict.fromkeys(runs.sites, 0)
    for index in np.argsort(-worth.values, kind="stable"):
        price = runs.prices[index]
        given = min(most, int((left + 1e-6) // price))
        ranks[runs.sites[index]] = given
        left -= given * price
    return ranks


def predicted_gain(runs: Runs, worth: Effects, ranks: Mapping[str, int], level: float = LEVEL) -> tuple[float, float, float]:
    """(points, low, high): of this allocation over the mean one, by effects of other runs than chose it."""
    moved = np.array([ranks[site] for site in runs.sites]) * runs.prices - runs.spent.mean(0)
    weights = moved / (PERCENT * runs.budget)
    gain, error = float(weights @ worth.values), float(np.sqrt(weights @ worth.covariance @ weights))
    half = t_quantile(len(worth.without) - 1, level) * error
    return gain, gain - half, gain + half


def halves(runs: Runs) -> tuple[Runs, Runs]:
    """The runs of every other seed, and the rest."""
    first = np.isin(runs.seeds, np.unique(runs.seeds)[::2])
    return runs.take(first), runs.take(~first)


def reliability(runs: Runs) -> float | None:
    """Rank correlation of the sites' effects in one half of the runs with those in the other."""
    one, other = (effects(half).values for half in halves(runs))
    return spearman(one, other)


@dataclass(frozen=True)
class Agreement:
    """The rank correlation over sites of the effects with another measure, and its interval over resampled seeds."""

    measure: str
    correlation: float | None
    low: float | None
    high: float | None
    num_sites: int


def agreements(runs: Runs, measures: Mapping[str, Mapping[str, float]], level: float = LEVEL) -> list[Agreement]:
    """measures: name -> site -> value. Sites that one does not have are left out."""
    worth = effects(runs).values
    random, every = np.random.default_rng(0), np.unique(runs.seeds)
    drawn = []
    for _ in range(RESAMPLES if measures else 0):
        chosen = random.choice(every, len(every))
        rows = np.concatenate([np.flatnonzero(runs.seeds == seed) for seed in chosen])
        drawn.append(_plain_effects(runs.take(rows)))
    found = []
    for name, values in measures.items():
        at = [index for index, site in enumerate(runs.sites) if site in values]
        other = [values[runs.sites[index]] for index in at]
        seen = spearman(worth[at], other) if len(at) > 2 else None
        bounds = (None, None)
        if seen is not None:
            again = [spearman(one[at], other) for one in drawn]
            bounds = tuple(map(float, np.quantile(again, [(1 - level) / 2, (1 + level) / 2])))
        found.append(Agreement(name, seen, *bounds, len(at)))
    return found


def _plain_effects(runs: Runs) -> Float[np.ndarray, " J"]:
    basis = _basis(runs.spent.mean(0) / runs.spent.mean(0).sum())
    design = np.concatenate([np.ones((len(runs.scores), 1)), runs.spent @ basis], 1)
    return basis @ np.linalg.lstsq(design, runs.scores, rcond=None)[0][1:]


def measures_of(part: Study, apart: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """What else says where rank is worth something: final ranks, importances and knock-outs of a study's settings.

    Means over the completed final runs; apart: settings that are left out (their ranks are the experiment's own).
    """
    found: dict[str, dict[str, float]] = {}
    for arm in part.arms:
        by_name: dict[str, list[Mapping[str, float]]] = {}
        for run in arm.of("completed"):
            if arm.setting not in apart and len(set(run.result.ranks.values())) > 1:
                by_name.setdefault("ranks kept", []).append(run.result.ranks)
            importances = {site: facts.importance for site, facts in run.sites.items() if facts.importance is not None}
            if importances:
                by_name.setdefault("importance", []).append(importances)
            if run.knock_out is not None and run.knock_out.increases:
                by_name.setdefault("loss that its removal costs", []).append(run.knock_out.increases)
        for name, maps in by_name.items():
            sites = set.intersection(*(set(one) for one in maps))
            runs = f"{len(maps)} run{'s' if len(maps) > 1 else ''}"
            found[f"{arm.setting}: {name} ({runs})"] = {site: float(np.mean([one[site] for one in maps])) for site in sites}
    return found


def arms_of(part: Study) -> tuple[Arm, Arm | None]:
    """The setting that draws an allocation for each seed, and the uniform one at the same rate; None: it has no run.

    Raises:
        ValueError: no setting draws one.
    """
    drawn = next((arm for arm in part.arms if arm.method == "random-rank"), None)
    if drawn is None:
        raise ValueError(f'{part.name} has no runs of random-rank on {part.task}: give a study of kind = "randomized"')
    sharers = part.sharers(drawn.setting)
    same = [arm for arm in part.arms if arm.method == "lora" and (arm.setting in sharers or not sharers)]
    return drawn, next((arm for arm in same if arm.rate == drawn.rate), None)
