"""randomized.md: what rank is worth at each site, and how much any placement could gain, from a randomized study.

    rankwise analysis randomized RUNS        (writes randomized.md, figures/, tables/ and best.toml)

What is computed is said in reports/randomized.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from pathlib import Path

import numpy as np
import tomlkit
from jaxtyping import Float
from rankwise.experiments.files import write_file
from rankwise.experiments.tasks import names as shipped_tasks
from rankwise.reports import randomized
from rankwise.reports.figures.rank_maps import worth_map
from rankwise.reports.figures.style import Drawing, save, subject
from rankwise.reports.randomized import Effects, Runs
from rankwise.reports.results import Arm, Study, load, load_all
from rankwise.reports.statistics import holm, summary, t_quantile
from rankwise.reports.tables.captions import alarms
from rankwise.reports.tables.cells import interval_text
from rankwise.reports.tables.table import Table, escape_markdown
from rankwise.variants.settings.lowrank import pattern_for

BEST_OF = (10, 100, 1_000)  # random allocations, of which the best is given
NEW_SEEDS = 12  # of the study that tests the predicted allocation afresh: looks at 8 and 12
GROUPS = ("site", "kind", "layer")
UNIT = "points for 1 % of the budget"


@dataclass(frozen=True, eq=False)
class View:
    """Effects on what runs say, by "site", "kind" and "layer", and the share of its variance that these explain, with a p."""

    name: str
    runs: Runs

    @cached_property
    def by(self) -> dict[str, Effects]:
        return {group: randomized.effects(self.runs, group) for group in GROUPS}

    @cached_property
    def explained(self) -> dict[str, tuple[float, float]]:
        return {group: randomized.permutation_p(self.runs, group) for group in GROUPS}


@dataclass(frozen=True, eq=False)
class Analysis:
    """What the runs of one task say.

    best, gain, gain_kept: an allocation, what it gains by runs that did not choose it, and by those of them that did not
    collapse.  reliability: of the effects on scores, and on their ranks.
    """

    part: Study
    runs: Runs
    unplaced: int  # runs that failed before they had an allocation, and are left out
    uniform: Arm | None
    uniform_scores: Float[np.ndarray, " m"]
    spread: randomized.Spread | None  # None: the uniform allocation has fewer than two runs
    spread_kept: randomized.Spread | None  # without the runs that collapsed; None: as above, or none did
    all: View
    ranked: View
    kept: View | None  # without the runs that collapsed; None: none did, or too few are left
    collapses: View | None  # whether a run collapsed; None: none did
    best: dict[str, int] | None  # None: too few for two halves
    gain: tuple[float, float, float] | None
    gain_kept: tuple[float, float, float] | None
    agreements: list[randomized.Agreement]
    agreements_ranked: list[randomized.Agreement]
    reliability: tuple[float | None, float | None] | None  # None: too few for two halves

    @property
    def uniform_collapsed(self) -> np.ndarray:
        """(m,) which of the uniform allocation's runs lie below the random ones' floor."""
        return self.uniform_scores < self.runs.floor


def analysed(part: Study, beside: Sequence[Study] = ()) -> Analysis:
    """
    Args:
        beside: studies of the same model, whose importances and ranks are compared too.

    Raises:
        ValueError: the study has no random allocations, or too few runs.
    """
    drawn, uniform = randomized.arms_of(part)
    runs = randomized.runs_of(part, drawn)
    collapsed = runs.collapsed
    kept = runs.take(~collapsed)
    kept = kept if collapsed.any() and kept.has_effects else None
    best = gain = gain_kept = reliability = None
    if runs.can_be_halved:
        first, second = randomized.halves(runs)
        best = randomized.best_allocation(first, randomized.effects(first.ranked))
        gain = randomized.predicted_gain(second, randomized.effects(second), best)
        if kept is not None and (rest := second.take(second.scores >= runs.floor)).has_effects:
            gain_kept = randomized.predicted_gain(rest, randomized.effects(rest), best)
        reliability = randomized.reliability(runs), randomized.reliability(runs.ranked)
    measures = randomized.measures_of(part, apart=(drawn.setting,))
    for other in beside:
        named = {f"{other.name}, {name}": values for name, values in randomized.measures_of(other).items()}
        measures |= {name: values for name, values in named.items() if values.keys() & set(runs.sites)}
    scores = np.zeros(0) if uniform is None else randomized.scores_of(part, uniform)
    steady = runs.scores[~collapsed], scores[scores >= runs.floor]
    return Analysis(
        part=part,
        runs=runs,
        unplaced=sum(not run.result.ranks for run in drawn.of("failed")),
        uniform=uniform,
        uniform_scores=scores,
        spread=randomized.spread(runs.scores, scores) if len(scores) > 1 else None,
        spread_kept=randomized.spread(*steady) if collapsed.any() and min(map(len, steady)) > 1 else None,
        all=View("scores", runs),
        ranked=View("ranks of the scores", runs.ranked),
        kept=None if kept is None else View("scores of runs that did not collapse", kept),
        collapses=View("whether a run collapsed", runs.scored(collapsed)) if collapsed.any() else None,
        best=best,
        gain=gain,
        gain_kept=gain_kept,
        agreements=randomized.agreements(runs, measures),
        agreements_ranked=randomized.agreements(runs.ranked, measures),
        reliability=reliability,
    )


def write(folder: Path, out: Path, beside: Sequence[Path] = ()) -> Path:
    """The page of every task of the study, its tables, figures, and a study that tests the best allocation; the page's path.

    Raises:
        ValueError: no such study there, or too few runs.
    """
    others = [part for path in beside for study in load_all(path) for part in study.parts()]
    parts = load(folder).parts()
    done = [analysed(part, [one for one in others if one.model == part.model]) for part in parts]
    text = []
    for one in done:
        prefix = "" if len(done) == 1 else one.part.task.replace("/", "-") + "-"
        text.append(_page(one, out, prefix))
        if one.best is not None and one.part.task in shipped_tasks():
            write_file(out / f"{prefix}best.toml", fresh_test(one, one.best))
    path = out / "randomized.md"
    write_file(path, "\n".join(text))
    return path


def _page(one: Analysis, out: Path, prefix: str) -> str:
    drawings = []
    for view, name in ((one.kept, "worth-map-kept"), (one.all, "worth-map")):
        if view is not None:
            drawings.append(replace(_map(one, view), name=prefix + name))
            save(drawings[-1], out / "figures")
    tables = [views_table(one), spread_table(one), *(effects_table(one, by) for by in ("kind", "layer", "site"))]
    tables += [] if one.best is None else [best_table(one, one.best)]
    tables += [agreement_table(one)] if one.agreements else []
    lines = [f"# Random allocations: {escape_markdown(one.part.title)}\n"]
    lines += ["".join(f"- {escape_markdown(sentence)}\n" for sentence in sentences(one))]
    lines += [f"![{drawing.alt}](figures/{drawing.name}.png)\n" for drawing in drawings]
    for table in tables:
        write_file(out / "tables" / f"{prefix}{table.name}.csv", table.csv())
        write_file(out / "tables" / f"{prefix}{table.name}.tex", table.latex())
        notes = "".join(f"- {escape_markdown(sentence)}\n" for sentence in table.caption)
        lines.append(f"## {escape_markdown(table.title)}\n\n{table.markdown()}\n{notes}")
    return "\n".join(lines)


def _map(one: Analysis, view: View) -> Drawing:
    sites = view.by["site"]
    half = t_quantile(len(sites.without) - 1, 0.95) * sites.errors
    worth = {site: (float(v), float(h)) for site, v, h in zip(sites.names, sites.values, half, strict=True)}
    apart = "" if view is one.all else ", collapsed runs left out"
    return worth_map(worth, UNIT, f"{subject(one.part)} ({len(view.runs.scores)} random allocations{apart})")


def sentences(one: Analysis) -> list[str]:
    """The answer first: is there anything to gain, where, how far it could be foreseen."""
    runs, n, (_, p), (_, p_ranked) = one.runs, len(one.runs.scores), one.all.explained["site"], one.ranked.explained["site"]
    lines = [
        *alarms(one.part),
        f"{n} random allocations of one budget ({runs.budget:,.0f} parameters on {len(runs.sites)} sites), one for each seed, "
        f"on {one.part.task}: where the rank went explains {_share(one.all)} of the variance of the scores ({_p(p)}), and "
        f"{_share(one.ranked)} of that of their ranks, which no run can sway alone ({_p(p_ranked)}): {found(min(p, p_ranked))}"
        f". {100 * (len(runs.sites) - 1) / (n - 1):.1f} % are expected of chance.",
    ]
    if one.unplaced:
        left_out = "1 run that failed before it" if one.unplaced == 1 else f"{one.unplaced} runs that failed before they"
        lines.append(f"Left out: {left_out} had an allocation.")
    if one.collapses is not None:
        lines.append(_collapses(one, one.collapses))
    lines.append(_could_gain(one))
    if one.gain is None:
        return [*lines, f"Too few runs to choose an allocation by one half and judge it by the other: that takes {runs.least}."]
    lines.append(
        "The allocation that half of the runs predict to be best, by the ranks of their scores, gains "
        f"{_gain(one.gain)} over the mean allocation by the effects of the other half"
        + ("." if one.gain_kept is None else f", and {_gain(one.gain_kept)} by those of its runs that did not collapse.")
    )
    if one.part.task in shipped_tasks():
        lines[-1] += " best.toml tests it afresh."
    return lines


def _collapses(one: Analysis, view: View) -> str:
    from scipy.stats import fisher_exact

    collapsed, n = int(one.runs.collapsed.sum()), len(one.runs.scores)
    text = (
        f"{collapsed} of the {n} collapsed (below {one.runs.floor:.1f} points, which is {randomized.COLLAPSE:g} robust "
        f"standard deviations under the median of {np.median(one.runs.scores):.2f})"
    )
    if m := len(one.uniform_scores):
        others = int(one.uniform_collapsed.sum())
        p = fisher_exact([[collapsed, n - collapsed], [others, m - others]])[1]
        text += f", and {others} of {m} of the uniform allocation ({_p(p)} for a difference, Fisher's exact test)"
    text += f". Whether a run collapsed: where the rank went explains {_share(view)} ({_p(view.explained['site'][1])})."
    if one.kept is not None:
        text += (
            f" Of the scores of the {len(one.kept.runs.scores)} others: {_share(one.kept)} "
            f"({_p(one.kept.explained['site'][1])})."
        )
    return text


def _could_gain(one: Analysis) -> str:
    s = one.spread if one.spread_kept is None else one.spread_kept
    if s is None:
        return "How much could any placement gain? Not known: the uniform allocation has fewer than two finished runs."
    best, low, high = s.gain(100)
    apart = "Among runs that did not collapse, scores" if one.spread_kept is not None else "Scores"
    text = (
        f"How much could any placement gain? {apart} have a standard deviation of {s.drawn:.2f} over allocations and "
        f"{s.uniform:.2f} over {s.numbers[1]} seeds of the uniform one: {s.allocation:.2f} ({s.low:.2f} to {s.high:.2f}) "
        f"is that of the allocation alone. The best of 100 random allocations would be {best:.2f} ({low:.2f} to "
        f"{high:.2f}) points above their mean."
    )
    if one.spread_kept is not None and one.spread is not None:
        text += f" With the collapsed runs the deviations are {one.spread.drawn:.2f} and {one.spread.uniform:.2f}."
    return text


def _share(view: View) -> str:
    return f"{100 * view.explained['site'][0]:.1f} %"


def _p(p: float) -> str:
    return f"p = {p:.4f}"


def found(p: float) -> str:
    """Of the smaller of two p, which may be half as large for that."""
    return "the allocation matters" if p <= 0.025 else "no effect of the allocation was found"


def _gain(gain: tuple[float, float, float]) -> str:
    return f"{gain[0]:+.2f} points ({gain[1]:+.2f} to {gain[2]:+.2f})"


def views_table(one: Analysis) -> Table:
    views = [view for view in (one.all, one.ranked, one.kept, one.collapses) if view is not None]
    rows = tuple((view.name, len(view.runs.scores), *(_explained(view, by) for by in GROUPS)) for view in views)
    caption = [
        "Share of the variance that is explained, and p by permutation (scores are dealt to allocations anew, since "
        "allocations were drawn).",
        "Ranks of the scores (Conover & Iman 1981) cannot be swayed by a few runs that collapse. Of the first two lines one is "
        "enough to say that the allocation matters, at 2.5 % each. A p looked at before all runs are in errs more often.",
    ]
    if one.kept is not None:
        caption.append("Scores of runs that did not collapse say nothing of how often an allocation collapses.")
    return Table("views", "Does the allocation matter?", ("of", "runs", *(f"by {by}" for by in GROUPS)), rows, tuple(caption))


def _explained(view: View, by: str) -> str:
    share, p = view.explained[by]
    return f"{100 * share:.1f} % ({_p(p)})"


def spread_table(one: Analysis) -> Table:
    drawn = summary(one.runs.scores)
    rows = [("random allocations, one a seed", drawn.n, drawn.mean, interval_text(drawn.low, drawn.high), drawn.sd, None)]
    caption = [
        "sd of the allocation alone: the square root of the difference of both variances, with a generalized confidence "
        "interval (Weerahandi 1993), which takes scores to be normal; below zero counts as zero.",
        "Best of so many: the mean of the highest of normal scores with that sd, above the mean allocation.",
    ]
    if (uniform := summary(one.uniform_scores)) is not None:
        rows.append(("uniform allocation", uniform.n, uniform.mean, interval_text(uniform.low, uniform.high), uniform.sd, None))
        if uniform.sd is not None:
            caption.append(_apart(drawn, uniform))
    rows += _spread_rows(one.spread, "")
    if one.spread_kept is not None:
        steady = {"random": one.runs.scores[~one.runs.collapsed], "uniform": one.uniform_scores[~one.uniform_collapsed]}
        for name, found in ((name, summary(scores)) for name, scores in steady.items()):
            rows.append((f"{name}, not collapsed", found.n, found.mean, interval_text(found.low, found.high), found.sd, None))
        rows += _spread_rows(one.spread_kept, ", not collapsed")
        caption.append("Scores are not normal where runs collapsed: the lines that leave these out are the ones to read.")
    columns = ("scores", "n", "mean, or gain", "95 % interval of the mean", "sd", "95 % interval")
    return Table("spread", "How much any placement could gain", columns, tuple(rows), tuple(caption))


def _spread_rows(spread: randomized.Spread | None, apart: str) -> list[tuple]:
    if spread is None:
        return []
    rows = [(f"the allocation alone{apart}", None, None, None, spread.allocation, interval_text(spread.low, spread.high))]
    for of in BEST_OF:
        gain, low, high = spread.gain(of)
        rows.append((f"best of {of:,} random allocations{apart}", None, gain, None, None, interval_text(low, high)))
    return rows


def _apart(drawn, uniform) -> str:
    """The mean of random allocations against the uniform one (Welch)."""
    errors = [one.sd**2 / one.n for one in (drawn, uniform)]
    whole = sum(errors)
    difference = drawn.mean - uniform.mean
    if whole == 0:
        return f"Random less uniform: {difference:+.2f}."
    freedom = whole**2 / sum(error**2 / (one.n - 1) for error, one in zip(errors, (drawn, uniform), strict=True))
    half = t_quantile(freedom, 0.95) * sqrt(whole)
    return f"Random less uniform: {difference:+.2f} ({difference - half:+.2f} to {difference + half:+.2f}; Welch)."


def effects_table(one: Analysis, by: str) -> Table:
    groups = one.runs.groups(by)
    rows = [
        (name, _spent(one.runs, groups[name]), *cells)
        for name, cells in zip(groups, _effect_cells(one.all.by[by]), strict=True)
    ]
    columns = (by, "share of the budget (%)", "effect", "95 % interval", "p (Holm)")
    caption = [
        f"Effect: {UNIT} moved there from all others in their shares. Interval: 95 %, clustered by seed (jackknife), of each "
        f"effect alone; p corrected by Holm over the {len(rows)}.",
        f"Together they explain {_explained(one.all, by)} of the variance of the scores.",
    ]
    if one.kept is not None:
        rows = [(*row, *cells) for row, cells in zip(rows, _effect_cells(one.kept.by[by]), strict=True)]
        columns += ("effect, not collapsed", "its 95 % interval", "its p (Holm)")
        caption.append(f"Not collapsed: by the {len(one.kept.runs.scores)} runs that did not; {_explained(one.kept, by)}.")
    return Table(f"worth-by-{by}", f"What rank is worth, by {by}", columns, tuple(rows), tuple(caption))


def _effect_cells(effects: Effects) -> list[tuple[float, str, float]]:
    """(effect, interval, corrected p) of each group."""
    adjusted = holm(np.nan_to_num(effects.p_values, nan=1.0))
    return [
        (float(value), f"{low:+.3f} to {high:+.3f}", float(p))
        for value, (low, high), p in zip(effects.values, effects.intervals(), adjusted, strict=True)
    ]


def _spent(runs: Runs, inside: Sequence[int]) -> float:
    return float(100 * runs.spent[:, list(inside)].sum() / runs.spent.sum())


def best_table(one: Analysis, best: Mapping[str, int]) -> Table:
    mean = one.runs.spent.mean(0) / one.runs.prices
    rows = tuple((site, rank, float(m)) for (site, rank), m in zip(best.items(), mean, strict=True))
    caption = (
        f"Chosen by the runs of every other seed, by the effects on the ranks of their scores; by the effects of the rest it "
        f"gains {_gain(one.gain)} over the mean allocation, if effects add up as the regression takes them to.",
        "No site gets more rank than the 95 % quantile of what sites had in the runs. best.toml, where it is written (for "
        "tasks of `rankwise list`), tests it against the uniform allocation with seeds that no run here had.",
    )
    columns = ("site", "rank", "mean rank of the runs")
    return Table("best-allocation", "The allocation that half of the runs predict to be best", columns, rows, caption)


def agreement_table(one: Analysis) -> Table:
    rows = tuple(
        (agreement.measure, agreement.num_sites, *_correlation(agreement), *_correlation(ranked))
        for agreement, ranked in zip(one.agreements, one.agreements_ranked, strict=True)
    )
    caption = [
        "Spearman's correlation over sites of the effects with each measure, and its 95 % interval over resampled seeds; of "
        "the effects on scores, and on the scores' ranks.",
    ]
    if one.reliability is None:
        caption.append("How far the effects of one half of the runs agree with those of the other is not known: too few runs.")
    else:
        plain, ranked = ("not known" if value is None else f"{value:.2f}" for value in one.reliability)
        caption.append(
            f"The effects of one half of the runs correlate with those of the other by {plain} (on ranks: {ranked}): no "
            "measure can be expected to agree with the estimate better than the estimate with itself."
        )
    columns = ("measure", "sites", "rank correlation", "95 % interval", "with effects on ranks", "its 95 % interval")
    title = "Do allocators and importances know where rank is worth something?"
    return Table("agreement", title, columns, rows, tuple(caption))


def _correlation(agreement: randomized.Agreement) -> tuple[float | None, str | None]:
    none = agreement.low is None or agreement.high is None
    return agreement.correlation, None if none else f"{agreement.low:+.2f} to {agreement.high:+.2f}"


def fresh_test(one: Analysis, best: Mapping[str, int]) -> str:
    """The TOML of a study of the predicted allocation against the uniform one, at a shared rate, with new seeds.

    Where runs collapsed, the rate was too high for some seeds, which two pilots do not show: lower rates, four pilots.
    """
    drawn, _ = randomized.arms_of(one.part)
    config = drawn.final[0].config
    used = {run.config.seed for run in one.part.runs}
    scale = drawn.completed[0].scale
    alpha_over_rank = max(scale.values()) if isinstance(scale, dict) else scale
    uniform = dict.fromkeys(best, 1) if one.uniform is None else one.uniform.completed[0].ranks
    document = tomlkit.document()
    document.add(
        tomlkit.comment(f"Made by `rankwise analysis randomized` of the study {one.part.name}: the allocation that the")
    )
    document.add(tomlkit.comment("runs of every other seed predict to be best, against the uniform one, with new seeds."))
    document["name"] = f"{one.part.name}-best"
    document["title"] = f"The predicted allocation against the uniform one: {one.part.title}"
    document["model"], document["tasks"] = one.part.model, [one.part.task]
    document["seeds"] = _new(used, NEW_SEEDS)
    document["reference"], document["margin"] = "uniform", one.part.margin or 0.3
    document["looks"] = [8, NEW_SEEDS]
    hypothesis = {
        "name": "H1", "arms": ["predicted", "uniform"], "margin": one.part.margin or 0.3, "order": 1,
        "why": "whether an allocation that random ones predict to be best is better than the uniform one",
    }  # fmt: skip
    document["hypothesis"] = tomlkit.aot()
    document["hypothesis"].append(tomlkit.item(hypothesis))
    document["training"] = {k: v for k, v in config.training.items() if v is not None} | {"precision": config.precision}
    steps, pilots = ((0.5, 1, 2), 2) if one.collapses is None else ((0.25, 0.5, 1), 4)
    document["sweep"] = {"design": "shared-rate", "seeds": _new(used, NEW_SEEDS + pilots)[NEW_SEEDS:], "trials": 5}
    document["methods"] = tomlkit.aot()
    for label, ranks in (("uniform", uniform), ("predicted", best)):
        most = max(ranks.values())
        entry = {
            "method": "lora", "label": label, "rank": most, "alpha": alpha_over_rank * most,
            "dropout": config.method_settings.get("dropout", 0.0),
            "learning_rates": [step * drawn.rate for step in steps],
        }  # fmt: skip
        others = {site: rank for site, rank in ranks.items() if rank != most}
        if others:
            entry["rank_pattern"] = {pattern_for(site): rank for site, rank in others.items()}
            entry["alpha_pattern"] = {pattern_for(site): alpha_over_rank * max(rank, 1) for site, rank in others.items()}
        if label == "predicted":
            entry["shared_with"] = "uniform"
        document["methods"].append(tomlkit.item(entry))
    return tomlkit.dumps(document)


def _new(used: set[int], number: int) -> list[int]:
    """The first seeds above all that were used."""
    return [max(used) + 1 + index for index in range(number)]
