"""What became of the weights, how stable an allocation is over seeds, and what each site is worth: a row a setting.

Made from sites.json and knockout.json; runs that lack them (older ones, a sweep's) are left out of what needs them.
"""

import numpy as np
from rankwise.experiments.records import Run
from rankwise.reports.ranks.maps import with_loss_increase
from rankwise.reports.results import Study
from rankwise.reports.stability import SeedPair, seed_pairs, setting_pairs
from rankwise.reports.statistics import spearman, summary
from rankwise.reports.tables.captions import alarms
from rankwise.reports.tables.cells import Estimate
from rankwise.reports.tables.rank_tables import SPECTRA
from rankwise.reports.tables.table import Table

COMPARED = ("importance", "relative_norm", "active")  # fields of SiteFacts that are correlated with the loss increase


def anatomy(study: Study) -> Table | None:
    """Setting -> ranks by every measure, size and intruders of its updates: means over sites and seeds."""
    rows = []
    for arm in study.arms:
        runs = [run for run in arm.of("completed") if run.sites]
        if not runs:
            continue
        totals = [[sum(getattr(one, key) for one in run.sites.values()) for run in runs] for key in ("active", "nominal")]
        rows.append(
            (
                arm.setting,
                len(runs),
                len(runs[0].sites),
                *(f"{np.mean(total):,.0f}" for total in totals),
                _mean(runs, "effective_rank", "{:.2f}"),
                _mean(runs, "stable_rank", "{:.2f}"),
                _mean(runs, "energy_rank", "{:.2f}"),
                f"{np.mean([sum(one.parameters for one in run.sites.values()) for run in runs]):,.0f}",
                _mean(runs, "relative_norm", "{:.4f}"),
                _mean(runs, "intruders", "{:.2f}"),
            )
        )
    if not rows:
        return None
    columns = ("setting", "n", "sites", "active ranks", "nominal ranks", "effective", "stable", "95 %", "parameters",
               "|dW|/|W|", "intruders")  # fmt: skip
    caption = [
        *alarms(study),
        "Ranks and parameters of all sites together, the rest means over sites; all of them means over the n seeds measured.",
        SPECTRA,
        _intruder_sentence(study),
    ]
    return Table("anatomy", f"What became of the weights: {study.task}, {study.model}", columns, tuple(rows), tuple(caption))


def _intruder_sentence(study: Study) -> str:
    """The rule by which the runs counted intruders, as sites.json has it."""
    files = [run.sites_file for arm in study.arms for run in arm.of("completed") if run.sites_file is not None]
    rules = dict.fromkeys((file.intruders.looked_at, file.intruders.cosine) for file in files)
    counted = "; or ".join(
        f"of the top {looked_at} left singular vectors of W + dW those whose |cosine| with every one of W is below {cosine:g}"
        for looked_at, cosine in rules
    )
    return f"Intruders: {counted} (Shuttleworth et al. 2024)."


def _mean(runs: list[Run], field: str, show: str) -> str | None:
    values = [value for run in runs for one in run.sites.values() if (value := getattr(one, field)) is not None]
    return show.format(float(np.mean(values))) if values else None


def knock_out(study: Study) -> Table | None:
    """Setting -> how far the importance, size and rank of the sites agree with the rise of the loss without them."""
    rows, evaluated = [], {}
    for arm in study.arms:
        runs = [run for run in arm.of("completed") if run.knock_out and run.sites]
        if not runs:
            continue
        evaluated |= {(run.knock_out.rows, run.knock_out.split): None for run in runs}
        increases = [value for run in runs for value in run.knock_out.increases.values()]
        if not increases:
            continue
        harmless = sum(value <= 0 for value in increases) / len(increases)
        correlations = [_correlation(runs, by) for by in COMPARED]
        rows.append(
            (
                arm.setting,
                len(runs),
                f"{np.mean(increases):.5f}",
                f"{max(increases):.5f}",
                f"{100 * harmless:.0f} %",
                *correlations,
            )
        )
    if not rows:
        return None
    columns = ("setting", "n", "rise, mean", "rise, greatest", "no worse without", "rho importance", "rho |dW|/|W|", "rho rank")
    on = " and ".join(f"{rows_} rows of the {split} split" for rows_, split in evaluated)
    caption = [
        *alarms(study),
        f"Rise of the task's loss when one site's change is taken out (dW = 0 there, nothing trained again), on {on}; over all "
        "sites and the n seeds that were measured.",
        "rho: Spearman's correlation, over the sites of a run, of that rise with the allocator's own score summed over the "
        "ranks that it keeps, with the size of the change, and with the rank; mean over seeds and 95 % t interval. If the "
        "score says what a site is worth, its rho is near 1.",
    ]
    return Table("knock-out", f"What each site is worth: {study.task}, {study.model}", columns, tuple(rows), tuple(caption))


def _correlation(runs: list[Run], by: str) -> Estimate | None:
    correlations = [spearman(*with_loss_increase(run, by)) for run in runs]
    of = summary([value for value in correlations if value is not None])
    return None if of is None else Estimate(of.mean, of.low, of.high, of.sd, of.n)


def stability(study: Study) -> Table | None:
    """Setting -> how alike the allocations of two seeds are; settings with one rank at every site are left out."""
    by_arm = {arm: pairs for arm in study.arms if (pairs := seed_pairs(arm))}
    if not by_arm:
        return None
    measures = ("spearman", "spearman_within", "jaccard_ranks", "jaccard_sites")
    rows = [
        (arm.setting, len(arm.completed), *(_span([getattr(pair, measure) for pair in pairs]) for measure in measures))
        for arm, pairs in by_arm.items()
    ]
    columns = ("setting", "n", "Spearman", "Spearman within kinds", "Jaccard, ranks", "Jaccard, sites")
    caption = [
        *alarms(study),
        "Over all pairs of seeds: mean (least to greatest). Spearman: of the sites' ranks. Within kinds: the mean of its "
        "values within each kind of module (all queries, all keys, ...), which compares layers alone; a kind of one rank "
        "everywhere is left out. Jaccard: sum of the smaller over sum of the greater rank of each site, and the same of the "
        "sites that have any rank.",
    ]
    return Table(
        "stability", f"The allocation at another seed: {study.task}, {study.model}", columns, tuple(rows), tuple(caption)
    )


def agreement(study: Study) -> Table | None:
    """Setting x setting -> how alike their allocations are at one seed; None below two settings that place rank unevenly."""
    own = {arm: pairs for arm in study.arms if (pairs := seed_pairs(arm))}
    if len(own) < 2:
        return None
    cells = [[_alike(own[arm] if arm is other else setting_pairs(arm, other)) for other in own] for arm in own]
    rows = [(arm.setting, *row) for arm, row in zip(own, cells, strict=True)]
    caption = [
        *alarms(study),
        "Spearman's correlation of the sites' ranks, and in brackets within kinds of modules: of two settings at the same "
        "seed, mean over seeds; of a setting with itself (the diagonal) at two seeds. Two settings that agree as far as each "
        "agrees with itself place rank alike.",
    ]
    title = f"Whether settings place rank alike: {study.task}, {study.model}"
    return Table("agreement", title, ("setting", *(arm.setting for arm in own)), tuple(rows), tuple(caption))


def _alike(pairs: list[SeedPair]) -> str | None:
    over_all, within = (
        [value for pair in pairs if (value := getattr(pair, name)) is not None] for name in ("spearman", "spearman_within")
    )
    means = (f"{np.mean(known):.2f}" if known else "-" for known in (over_all, within))
    return "{} ({})".format(*means) if pairs else None


def _span(values: list[float | None]) -> str | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return f"{np.mean(known):.2f}" + (f" ({min(known):.2f} to {max(known):.2f})" if len(known) > 1 else "")


def study_tables(study: Study) -> list[Table]:
    """The tables of one part that there is data for."""
    return [table for table in (make(study) for make in (anatomy, stability, agreement, knock_out)) if table is not None]
