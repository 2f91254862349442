"""randomized.md: what rank is worth at each site, and how much any placement could gain, from a randomized study.

    rankwise analysis randomized RUNS        (writes randomized.md, figures/, tables/ and best.toml)

What is computed is said in reports/randomized.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path

import numpy as np
import tomlkit
from rankwise.experiments.files import write_file
from rankwise.experiments.tasks import names as shipped_tasks
from rankwise.reports import randomized
from rankwise.reports.figures.rank_maps import worth_map
from rankwise.reports.figures.style import save, subject
from rankwise.reports.randomized import Effects, Runs
from rankwise.reports.results import Arm, Study, load, load_all
from rankwise.reports.statistics import holm, summary, t_quantile
from rankwise.reports.tables.cells import interval_text
from rankwise.reports.tables.table import Table, escape_markdown
from rankwise.variants.settings.lowrank import pattern_for

BEST_OF = (10, 100, 1_000)  # random allocations, of which the best is given
NEW_SEEDS = 12  # of the study that tests the predicted allocation afresh: looks at 8 and 12
UNIT = "points for 1 % of the budget"


@dataclass(frozen=True, eq=False)
class Analysis:
    """What the runs of one task say."""

    part: Study
    runs: Runs
    uniform: Arm | None
    spread: randomized.Spread | None  # None: the uniform allocation has fewer than two runs
    by: dict[str, Effects]  # "site", "kind", "layer"
    explained: dict[str, tuple[float, float]]  # of each: share of the variance, p
    best: dict[str, int] | None  # chosen by one half of the runs; None: too few for two halves
    gain: tuple[float, float, float] | None  # predicted by the other half
    agreements: list[randomized.Agreement]
    reliability: float | None  # None: too few for two halves


def analysed(part: Study, beside: Sequence[Study] = ()) -> Analysis:
    """
    Args:
        beside: studies of the same model, whose importances and ranks are compared too.

    Raises:
        ValueError: the study has no random allocations, or too few runs.
    """
    drawn, uniform = randomized.arms_of(part)
    runs = randomized.runs_of(drawn)
    best = gain = None
    if runs.can_be_halved:
        first, second = randomized.halves(runs)
        best = randomized.best_allocation(first, randomized.effects(first))
        gain = randomized.predicted_gain(second, randomized.effects(second), best)
    measures = randomized.measures_of(part, apart=(drawn.setting,))
    for other in beside:
        named = {f"{other.name}, {name}": values for name, values in randomized.measures_of(other).items()}
        measures |= {name: values for name, values in named.items() if values.keys() & set(runs.sites)}
    scores = [] if uniform is None else list(uniform.scores.values())
    by = {name: randomized.effects(runs, name) for name in ("site", "kind", "layer")}
    return Analysis(
        part=part,
        runs=runs,
        uniform=uniform,
        spread=randomized.spread(runs.scores, np.array(scores)) if len(scores) > 1 else None,
        by=by,
        explained={name: randomized.permutation_p(runs, name) for name in by},
        best=best,
        gain=gain,
        agreements=randomized.agreements(runs, measures),
        reliability=randomized.reliability(runs) if runs.can_be_halved else None,
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
    sites = one.by["site"]
    half = t_quantile(len(sites.without) - 1, 0.95) * sites.errors
    worth = {site: (float(v), float(h)) for site, v, h in zip(sites.names, sites.values, half, strict=True)}
    drawing = worth_map(worth, UNIT, f"{subject(one.part)} ({len(one.runs.scores)} random allocations)")
    drawing = replace(drawing, name=prefix + drawing.name)
    save(drawing, out / "figures")
    tables = [spread_table(one), *(effects_table(one, by) for by in ("kind", "layer", "site"))]
    tables += [] if one.best is None else [best_table(one, one.best)]
    tables += [agreement_table(one)] if one.agreements else []
    lines = [f"# What rank is worth: {escape_markdown(one.part.title)}\n"]
    lines += ["".join(f"- {escape_markdown(sentence)}\n" for sentence in sentences(one))]
    lines += [f"![{drawing.alt}](figures/{drawing.name}.png)\n"]
    for table in tables:
        write_file(out / "tables" / f"{prefix}{table.name}.csv", table.csv())
        write_file(out / "tables" / f"{prefix}{table.name}.tex", table.latex())
        notes = "".join(f"- {escape_markdown(sentence)}\n" for sentence in table.caption)
        lines.append(f"## {escape_markdown(table.title)}\n\n{table.markdown()}\n{notes}")
    return "\n".join(lines)


def sentences(one: Analysis) -> list[str]:
    """The answer first: is there anything to gain, where, how far it could be foreseen."""
    n, (share, p) = len(one.runs.scores), one.explained["site"]
    found = "the allocation matters" if p <= 0.05 else "no effect of the allocation was found"
    lines = [
        f"{n} random allocations of one budget ({one.runs.budget:,.0f} parameters on {len(one.runs.sites)} sites), one for "
        f"each seed, on {one.part.task}: where the rank went explains {100 * share:.1f} % of the variance of the scores "
        f"(p = {p:.4f} by permutation: {found}; {100 * (len(one.runs.sites) - 1) / (n - 1):.1f} % are expected of chance)."
    ]
    if one.spread is not None:
        s = one.spread
        best, low, high = s.gain(100)
        lines.append(
            f"How much could any placement gain? Scores have a standard deviation of {s.drawn:.2f} over allocations and "
            f"{s.uniform:.2f} over {s.numbers[1]} seeds of the uniform one: {s.allocation:.2f} ({s.low:.2f} to {s.high:.2f}) "
            f"is that of the allocation alone. The best of 100 random allocations would be {best:.2f} ({low:.2f} to "
            f"{high:.2f}) points above their mean."
        )
    else:
        lines.append("How much could any placement gain? Not known: the uniform allocation has fewer than two finished runs.")
    if one.gain is None:
        return [
            *lines,
            f"Too few runs to choose an allocation by one half and judge it by the other: that takes {one.runs.least}.",
        ]
    gain, low, high = one.gain
    lines.append(
        f"The allocation that half of the runs predict to be best gains {gain:+.2f} points ({low:+.2f} to {high:+.2f}) over "
        "the mean allocation by the effects of the other half."
    )
    if one.part.task in shipped_tasks():
        lines[-1] += " best.toml tests it afresh."
    return lines


def spread_table(one: Analysis) -> Table:
    drawn = summary(one.runs.scores)
    rows = [("random allocations, one a seed", drawn.n, drawn.mean, interval_text(drawn.low, drawn.high), drawn.sd, None)]
    caption = [
        "sd of the allocation alone: the square root of the difference of both variances, with a generalized confidence "
        "interval (Weerahandi 1993), which takes scores to be normal; below zero counts as zero.",
        "Best of so many: the mean of the highest of normal scores with that sd, above the mean allocation.",
    ]
    if one.uniform is not None and (uniform := summary(list(one.uniform.scores.values()))) is not None:
        rows.append(("uniform allocation", uniform.n, uniform.mean, interval_text(uniform.low, uniform.high), uniform.sd, None))
        if uniform.sd is not None:
            caption.append(_apart(drawn, uniform))
    if one.spread is not None:
        s = one.spread
        rows.append(("the allocation alone", None, None, None, s.allocation, interval_text(s.low, s.high)))
        for of in BEST_OF:
            gain, low, high = s.gain(of)
            rows.append((f"best of {of:,} random allocations", None, gain, None, None, interval_text(low, high)))
    columns = ("scores", "n", "mean, or gain", "95 % interval of the mean", "sd", "95 % interval")
    return Table("spread", "How much any placement could gain", columns, tuple(rows), tuple(caption))


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
    effects, (share, p) = one.by[by], one.explained[by]
    adjusted = holm(np.nan_to_num(effects.p_values, nan=1.0))
    groups = one.runs.groups(by)
    rows = [
        (name, _spent(one.runs, groups[name]), float(value), f"{low:+.3f} to {high:+.3f}", float(adjust))
        for name, value, (low, high), adjust in zip(
            effects.names, effects.values, effects.intervals(), adjusted, strict=True
        )
    ]  # fmt: skip
    caption = (
        f"Effect: {UNIT} moved there from all others in their shares. Interval: 95 %, clustered by seed (jackknife), of each "
        f"effect alone; p corrected by Holm over the {len(rows)}.",
        f"Together they explain {100 * share:.1f} % of the variance of the scores (p = {p:.4f} by permutation).",
    )
    columns = (by, "share of the budget (%)", "effect", "95 % interval", "p (Holm)")
    return Table(f"worth-by-{by}", f"What rank is worth, by {by}", columns, tuple(rows), caption)


def _spent(runs: Runs, inside: Sequence[int]) -> float:
    return float(100 * runs.spent[:, list(inside)].sum() / runs.spent.sum())


def best_table(one: Analysis, best: Mapping[str, int]) -> Table:
    gain, low, high = one.gain
    mean = one.runs.spent.mean(0) / one.runs.prices
    rows = tuple((site, rank, float(m)) for (site, rank), m in zip(best.items(), mean, strict=True))
    caption = (
        f"Chosen by the runs of every other seed; by the effects of the rest it gains {gain:+.2f} points ({low:+.2f} to "
        f"{high:+.2f}) over the mean allocation, if effects add up as the regression takes them to.",
        "No site gets more rank than the 95 % quantile of what sites had in the runs. best.toml, where it is written (for "
        "tasks of `rankwise list`), tests it against the uniform allocation with seeds that no run here had.",
    )
    columns = ("site", "rank", "mean rank of the runs")
    return Table("best-allocation", "The allocation that half of the runs predict to be best", columns, rows, caption)


def agreement_table(one: Analysis) -> Table:
    rows = tuple(
        (
            agreement.measure,
            agreement.num_sites,
            agreement.correlation,
            None if agreement.low is None else f"{agreement.low:+.2f} to {agreement.high:+.2f}",
        )
        for agreement in one.agreements
    )
    known = "not known" if one.reliability is None else f"{one.reliability:.2f}"
    caption = (
        "Spearman's correlation over sites of the effects with each measure, and its 95 % interval over resampled seeds.",
        f"The effects of one half of the runs correlate with those of the other by {known}: no measure can be expected to "
        "agree with the estimate better than the estimate with itself.",
    )
    columns = ("measure", "sites", "rank correlation", "95 % interval")
    return Table("agreement", "Do allocators and importances know where rank is worth something?", columns, rows, caption)


def fresh_test(one: Analysis, best: Mapping[str, int]) -> str:
    """The TOML of a study of the predicted allocation against the uniform one, at a shared rate, with new seeds."""
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
    document["sweep"] = {"design": "shared-rate", "seeds": _new(used, NEW_SEEDS + 2)[-2:], "trials": 5}
    document["methods"] = tomlkit.aot()
    for label, ranks in (("uniform", uniform), ("predicted", best)):
        most = max(ranks.values())
        entry = {
            "method": "lora", "label": label, "rank": most, "alpha": alpha_over_rank * most,
            "dropout": config.method_settings.get("dropout", 0.0),
            "learning_rates": [drawn.rate / 2, drawn.rate, 2 * drawn.rate],
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
