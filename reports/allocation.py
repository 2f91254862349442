"""Where the rank went and what it was worth: the tables of a study, and what `rankwise ranks` shows of any folder.

PATH is a run, a folder of runs, or an adapter in PEFT's format.  The tables of a study are made from sites.json and
knockout.json; runs that lack them (older ones, a sweep's) are left out of what needs them.
"""

import csv
import io
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rankwise.experiments.records import Run, is_run
from rankwise.reports import figures, tables
from rankwise.reports import ranks as rank_maps
from rankwise.reports.ranks import RankMap, SiteRank, believed_and_measured
from rankwise.reports.results import Arm, Study, is_study, load_all
from rankwise.reports.statistics import spearman, summary
from rankwise.reports.tables import SPECTRA, Estimate, Table, alarms

BELIEFS = ("importance", "relative_norm", "active")  # fields of SiteFacts that a knock-out is held against


# -- the tables of a study -------------------------------------------------------------------------------------------------


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
        "Ranks and parameters of all sites together, the rest means over sites; all over the n seeds that wrote it down.",
        SPECTRA,
        "Intruders: of the top 10 left singular vectors of W + dW those whose |cosine| with every one of W is below 0.5 "
        "(Shuttleworth et al. 2024).",
    ]
    return Table("anatomy", f"What became of the weights: {study.task}, {study.model}", columns, tuple(rows), tuple(caption))


def _mean(runs: list[Run], field: str, show: str) -> str | None:
    values = [value for run in runs for one in run.sites.values() if (value := getattr(one, field)) is not None]
    return show.format(float(np.mean(values))) if values else None


def knock_out(study: Study) -> Table | None:
    """Setting -> how far what was believed of the sites agrees with what their removal costs."""
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
        correlations = [_correlation(runs, by) for by in BELIEFS]
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
        "rho: Spearman's correlation over the sites of a run between that rise and what was believed of the site: the "
        "allocator's own score summed over the ranks it keeps, the size of the change, its rank; mean over seeds and 95 % t "
        "interval. An allocator whose score says what a site is worth has a rho near 1.",
    ]
    return Table("knock-out", f"What each site is worth: {study.task}, {study.model}", columns, tuple(rows), tuple(caption))


def _correlation(runs: list[Run], by: str) -> Estimate | None:
    found = [spearman(*believed_and_measured(run, by)) for run in runs]
    of = summary([value for value in found if value is not None])
    return None if of is None else Estimate(of.mean, of.low, of.high, of.sd, of.n)


def stability(study: Study) -> Table | None:
    """Setting -> how alike the allocations of two seeds are; settings whose ranks are all alike are left out."""
    found = {arm: pairs for arm in study.arms if (pairs := figures.seed_pairs(arm))}
    if not found:
        return None
    rows = [
        (arm.setting, len(arm.completed), *(_span([pair[at] for pair in pairs]) for at in range(3)))
        for arm, pairs in found.items()
    ]
    columns = ("setting", "n", "Spearman", "Jaccard, ranks", "Jaccard, sites")
    caption = [
        *alarms(study),
        "Over all pairs of seeds: mean (least to greatest). Spearman: of the sites' ranks. Jaccard: sum of the smaller over "
        "sum of the greater rank of each site, and the same of the sites that have any rank.",
    ]
    return Table(
        "stability", f"The allocation at another seed: {study.task}, {study.model}", columns, tuple(rows), tuple(caption)
    )


def _span(values: list[float | None]) -> str | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return f"{np.mean(known):.2f}" + (f" ({min(known):.2f} to {max(known):.2f})" if len(known) > 1 else "")


def study_tables(study: Study) -> list[Table]:
    """Those of one part that there is data for."""
    return [table for table in (make(study) for make in (anatomy, stability, knock_out)) if table is not None]


# -- rankwise ranks --------------------------------------------------------------------------------------------------------


def parts(path: Path) -> list[Study]:
    """The parts of a folder of runs; none where it is a run or an adapter."""
    is_one = is_run(path) or (path / "adapter_config.json").is_file()
    return [part for study in load_all(path) for part in study.parts()] if not is_one and is_study(path) else []


def shown(path: Path) -> list[Table]:
    """The tables that `rankwise ranks` prints.

    Raises:
        ValueError: neither run, study nor adapter; or a study without ranks.
    """
    found = parts(path)
    if not found:
        return [tables.rank_table(path)]
    made = [table for part in found for table in (tables.ranks(part), *study_tables(part)) if table is not None]
    if not made:
        raise ValueError(f"{path}: no finished run there has ranks; give the folder of a study of low-rank methods")
    return made


def as_dict(path: Path) -> dict:
    """The same for a program: of a study every run, and the tables."""
    found = parts(path)
    if not found:
        return rank_maps.read(path).as_dict()
    return {
        "schema": 1,
        "kind": "study",
        "parts": [
            {
                "study": part.name,
                "task": part.task,
                "model": part.model,
                "tables": {table.name: table.records() for table in study_tables(part)},
                "runs": [{"setting": arm.setting, "seed": seed, **one.as_dict()} for arm, seed, one in _maps(part)],
            }
            for part in found
        ],
    }


def _maps(part: Study) -> list[tuple[Arm, int, RankMap]]:
    """The final runs that have ranks."""
    return [
        (arm, run.config.seed, rank_maps.of_run(run))
        for arm in part.arms
        for run in arm.of("completed")
        if run.result.ranks or run.sites
    ]


def as_csv(path: Path) -> str:
    """One line a site, of every run where PATH is a study."""
    found = parts(path)
    if found:
        heads = [
            ({"study": part.name, "task": part.task, "model": part.model, "setting": arm.setting, "seed": seed}, one)
            for part in found
            for arm, seed, one in _maps(part)
        ]
    else:
        heads = [({}, rank_maps.read(path))]
    rows = [{**head, "method": one.method, **_flat(site)} for head, one in heads for site in one.sites]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _flat(site: SiteRank) -> dict:
    return {**asdict(site), "singular_values": " ".join(f"{value:.5g}" for value in site.singular_values)}


def drawings(path: Path, beside: Path | None = None) -> list[figures.Drawing]:
    """The figures of PATH; with `beside` those of the two allocations and their difference.

    Raises:
        ValueError: a study where a single allocation is needed.
    """
    if beside is not None:
        one, other = (_allocation(folder) for folder in (path, beside))
        names = [found.method if one.method != other.method else found.name for found in (one, other)]
        ranks = [{site.site: float(site.active) for site in found.sites} for found in (one, other)]
        return [figures.side_by_side(names[0], ranks[0], names[1], ranks[1], f"{path.name} and {beside.name}")]
    found = parts(path)
    if found:
        made = [(part, [figures.rank_map, figures.allocation_pair, figures.stability, figures.budget, figures.ranks_over_time,
                        figures.importance, figures.spectra, figures.knock_out]) for part in found]  # fmt: skip
        drawn = [(part, make(part)) for part, functions in made for make in functions]
        from rankwise.reports.facts import slug

        several = len(found) > 1
        return [_named(drawing, slug(part) + "-" if several else "") for part, drawing in drawn if drawing is not None]
    one = rank_maps.read(path)
    return [figures.one_map(one), *([figures.one_spectrum(one)] if any(site.singular_values for site in one.sites) else [])]


def _named(drawing: figures.Drawing, prefix: str) -> figures.Drawing:
    return figures.Drawing(prefix + drawing.name, drawing.title, drawing.alt, drawing.figure)


def _allocation(path: Path) -> RankMap:
    if parts(path):
        raise ValueError(f"{path} is a study, of many allocations: give two runs or adapters to lay side by side")
    return rank_maps.read(path)
