"""The rank of every site: of the settings of a study, and of one run or adapter."""

from pathlib import Path

from rankwise.reports.ranks.folders import read
from rankwise.reports.ranks.maps import RankMap, SiteRank
from rankwise.reports.ranks.sites import site_order
from rankwise.reports.results import Study
from rankwise.reports.tables.captions import alarms
from rankwise.reports.tables.cells import Rank
from rankwise.reports.tables.summaries import mean_ranks
from rankwise.reports.tables.table import Table

SPECTRA = (
    "Of dW's singular values: effective is exp of the entropy of their shares (Roy & Vetterli 2007), stable |dW|_F^2/|dW|_2^2, "
    "95 % how many hold that share of |dW|_F^2."
)
# What `rankwise ranks` shows of a site beside its ranks, where it is known: heading, field of `SiteRank`, format.
KNOWN_OF_A_SITE = (
    ("effective", "effective_rank", "{:.2f}"),
    ("stable", "stable_rank", "{:.2f}"),
    ("95 %", "energy_rank", "{}"),
    ("|dW|/|W|", "relative_norm", "{:.4f}"),
    ("parameters", "parameters", "{:,}"),
    ("share", "share", "{:.4f}"),
    ("importance", "importance", "{:.3g}"),
    ("intruders", "intruders", "{}"),
    ("loss without", "loss_increase", "{:+.5f}"),
)


def ranks(study: Study) -> Table | None:
    """Site x setting -> active and nominal rank at the end of the final runs; None where nothing has ranks."""
    arms = [arm for arm in study.arms if arm.has_ranks]
    if not arms:
        return None
    by_arm = [mean_ranks(arm) for arm in arms]
    sites = site_order(site for of_arm in by_arm for site in of_arm)
    rows = [(site, *(of_arm.get(site) for of_arm in by_arm)) for site in sites]
    totals = [Rank(sum(r.active for r in of_arm.values()), sum(r.nominal for r in of_arm.values())) for of_arm in by_arm]
    n = sorted({len(arm.completed) for arm in arms})
    caption = [
        *alarms(study),
        "Active rank after training; active/nominal where they differ.",
        f"Means over n = {'/'.join(map(str, n))} seeds." if n != [1] else "n = 1 seed.",
    ]
    title = f"Rank of every site: {study.task}, {study.model}"
    columns = ("site", *(arm.setting for arm in arms))
    return Table("ranks", title, columns, (*rows, ("total", *totals)), tuple(caption))


def rank_table(path: str | Path | RankMap) -> Table:
    """The ranks of one run's folder or of any adapter folder in PEFT's format (`rankwise ranks`).

    Raises:
        ValueError: neither of the two, cut off, foreign, or pickled.
    """
    one = path if isinstance(path, RankMap) else read(path)
    known = [entry for entry in KNOWN_OF_A_SITE if any(getattr(site, entry[1]) is not None for site in one.sites)]

    def more(site: SiteRank) -> list[str]:
        values = [(getattr(site, field), show) for _, field, show in known]
        return ["" if value is None else show.format(value) for value, show in values]

    rows = [
        (s.site, "-" if s.layer is None else str(s.layer), s.active, s.nominal, _short(s.alpha), _short(s.scale), *more(s))
        for s in one.sites
    ]
    empty = sum(site.active == 0 for site in one.sites)
    caption = [
        f"{one.active:,} of {one.nominal:,} ranks are active in {len(one.sites)} sites"
        + (f"; {empty} of them {'are' if empty > 1 else 'is'} at rank 0." if empty else "."),
        *([one.note[0].upper() + one.note[1:] + "."] if one.note else []),
        *([SPECTRA] if any(site.effective_rank is not None for site in one.sites) else []),
        *([f"Loss without: its rise with dW = 0 there, on {one.evaluated}."] if one.evaluated else []),
        *(f"Warning: {fault}." for fault in one.faults),
    ]
    columns = ("site", "layer", "active", "nominal", "alpha", "scale", *(heading for heading, _, _ in known))
    rows.append(("total", "", one.active, one.nominal, "", "", *("" for _ in known)))
    return Table("ranks", f"Ranks of {one.name} ({one.method})", columns, tuple(rows), tuple(caption))


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
