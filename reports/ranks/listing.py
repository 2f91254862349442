"""What `rankwise ranks` shows of a folder: tables, figures, JSON, CSV.

PATH is a run, a folder of runs, or an adapter in PEFT's format.
"""

from dataclasses import asdict
from pathlib import Path

from rankwise.experiments.records import is_run
from rankwise.reports import figures, tables
from rankwise.reports.page.facts import slug
from rankwise.reports.ranks.folders import read
from rankwise.reports.ranks.maps import RankMap, SiteRank, of_run
from rankwise.reports.results import Arm, Study, is_study, load_all
from rankwise.reports.tables.site_tables import study_tables
from rankwise.reports.tables.table import Table, csv_text


def parts(path: Path) -> list[Study]:
    """The parts of a folder of runs; none where it is a run or an adapter."""
    is_one = is_run(path) or (path / "adapter_config.json").is_file()
    return [part for study in load_all(path) for part in study.parts()] if not is_one and is_study(path) else []


def shown(path: Path) -> list[Table]:
    """The tables that `rankwise ranks` prints.

    Raises:
        ValueError: neither run, study nor adapter; or a study without ranks.
    """
    study_parts = parts(path)
    if not study_parts:
        return [tables.rank_table(path)]
    made = [table for part in study_parts for table in (tables.ranks(part), *study_tables(part)) if table is not None]
    if not made:
        raise ValueError(f"{path}: no finished run there has ranks; give the folder of a study of low-rank methods")
    return made


def as_dict(path: Path) -> dict:
    """What `rankwise ranks --json` prints: of a study every run, and the tables."""
    study_parts = parts(path)
    if not study_parts:
        return read(path).as_dict()
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
            for part in study_parts
        ],
    }


def _maps(part: Study) -> list[tuple[Arm, int, RankMap]]:
    """The final runs that have ranks."""
    return [
        (arm, run.config.seed, of_run(run)) for arm in part.arms for run in arm.of("completed") if run.result.ranks or run.sites
    ]


def as_csv(path: Path) -> str:
    """What `rankwise ranks --csv` writes: a line for each site, of every run where PATH is a study."""
    study_parts = parts(path)
    if study_parts:
        heads = [
            ({"study": part.name, "task": part.task, "model": part.model, "setting": arm.setting, "seed": seed}, one)
            for part in study_parts
            for arm, seed, one in _maps(part)
        ]
    else:
        heads = [({}, read(path))]
    rows = [{**head, "method": one.method, **_flat(site)} for head, one in heads for site in one.sites]
    columns = list(rows[0]) if rows else []
    return csv_text(columns, [[row[name] for name in columns] for row in rows])


def _flat(site: SiteRank) -> dict:
    return {**asdict(site), "singular_values": " ".join(f"{value:.5g}" for value in site.singular_values)}


def drawings(path: Path, beside: Path | None = None) -> list[figures.Drawing]:
    """The figures of PATH; with `beside` those of the two allocations and their difference.

    Raises:
        ValueError: a study where a single allocation is needed.
    """
    if beside is not None:
        one, other = (_allocation(folder) for folder in (path, beside))
        names = [each.method if one.method != other.method else each.name for each in (one, other)]
        ranks = [{site.site: float(site.active) for site in each.sites} for each in (one, other)]
        return [figures.side_by_side(names[0], ranks[0], names[1], ranks[1], f"{path.name} and {beside.name}")]
    study_parts = parts(path)
    if study_parts:
        made = [(part, [figures.rank_map, figures.allocation_pair, figures.stability, figures.budget, figures.ranks_over_time,
                        figures.importance, figures.spectra, figures.knock_out]) for part in study_parts]  # fmt: skip
        drawn = [(part, make(part)) for part, functions in made for make in functions]
        several = len(study_parts) > 1
        return [_named(drawing, slug(part) + "-" if several else "") for part, drawing in drawn if drawing is not None]
    one = read(path)
    return [figures.one_map(one), *([figures.one_spectrum(one)] if any(site.singular_values for site in one.sites) else [])]


def _named(drawing: figures.Drawing, prefix: str) -> figures.Drawing:
    return figures.Drawing(prefix + drawing.name, drawing.title, drawing.alt, drawing.figure)


def _allocation(path: Path) -> RankMap:
    if parts(path):
        raise ValueError(f"{path} is a study, of many allocations: give two runs or adapters to lay side by side")
    return read(path)
