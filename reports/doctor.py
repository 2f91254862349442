"""What `rankwise doctor` prints of an examined adapter: its findings, its sites, and the criteria side by side."""

from collections import Counter
from collections.abc import Mapping
from math import isfinite
from typing import Any

from rankwise.reports.ranks.sites import site_order
from rankwise.reports.tables.table import Table
from rankwise.variants.doctor.examining import Examination, Examined
from rankwise.variants.doctor.findings import Finding
from rankwise.variants.doctor.writing import Cut
from rankwise.variants.settings import printable

SITES = (
    "dW is s B A; |dW| in the Frobenius norm, share of the energy |dW|^2 of all sites. Effective is exp of the entropy of the "
    "singular values' shares (Roy & Vetterli 2007), stable |dW|_F^2/|dW|_2^2, 95 % how many hold that share of |dW|^2; then "
    "how much of it each of the greatest holds (--json has all), and spikes how many stand above the Marchenko-Pastur edge of "
    "noise of the same size."
)
CRITERIA = (
    "Error is |dW - dW'|/|dW| over all sites, exact (Eckart & Young 1936); worst that of the worst site. It is an error of the "
    "weights, not of the task: --data FILE measures the loss too."
)
SHOWN = 4  # ranks whose energy is printed; --json has all
MOST_ALIKE = 5  # findings of one rule that are printed; --json and --sarif have all


def tables(one: Examination) -> list[Table]:
    return [table for table in (site_table(one), criteria_table(one)) if table.rows]


def site_table(one: Examination) -> Table:
    by_name = {site.site.name: site for site in one.sites}
    rows = [_row(by_name[name]) for name in site_order(by_name)]
    total = sum(site.site.rank for site in one.sites)
    columns = ("site", "rank", "live", "scale", "|dW|", "share", "effective", "stable", "95 %", "of each rank [%]", "spikes")
    more = [name for name, field in (("|dW|/|W|", "relative"), ("drift", "drift")) if _has(one, field)]
    rows = [(*row, *_more(by_name[row[0]], more)) for row in rows]
    title = f"{one.adapter.path.resolve().name}: {one.adapter.method}, {one.adapter.form}'s format, "
    title += f"{len(rows)} sites of {total:,} ranks"
    is_dora = any("magnitude" in site.site.keys for site in one.sites)
    unknown = ["How far DoRA's magnitudes are from |W| cannot be told from the file: give the base with --base."]
    drift = (
        ["Drift is the mean of |m/|W| - 1| over the rows, m DoRA's magnitude."]
        if "drift" in more
        else unknown
        if is_dora
        else []
    )
    return Table("doctor", title, (*columns, *more), tuple(rows), (SITES, *drift))


def _has(one: Examination, field: str) -> bool:
    return any(getattr(site, field) is not None for site in one.sites)


def _more(site: Examined, names: list[str]) -> list[str]:
    shown = {"|dW|/|W|": site.relative, "drift": None if site.drift is None else site.drift[0]}
    return ["" if shown[name] is None else f"{shown[name]:.4f}" for name in names]


def _row(one: Examined) -> tuple:
    update = one.update
    is_known = update.update_norm is not None
    energies = one.energies
    return (
        one.site.name,
        one.site.rank if one.site.rank == one.site.nominal else f"{one.site.rank}/{one.site.nominal}",
        update.live if is_known else "?",
        f"{one.site.scale:.4g}" if isfinite(one.site.scale) else str(one.site.scale),
        f"{update.update_norm:.4g}" if is_known else "",
        f"{one.share:.4f}" if is_known else "",
        f"{update.effective_rank:.2f}" if is_known else "",
        f"{update.stable_rank:.2f}" if is_known else "",
        update.energy_rank if is_known else "",
        " ".join(f"{100 * energy:.3g}" for energy in energies[:SHOWN]) + " ..." * (len(energies) > SHOWN),
        one.spikes if is_known else "",
    )


def criteria_table(one: Examination) -> Table:
    sizes = {site.site.name: sum(site.shape) for site in one.sites}
    now = sum(site.update.parameters for site in one.sites)
    rows = []
    for name, made in one.suggestions.items():
        ranks = list(made.ranks.values())
        spread = f"{min(ranks)} to {max(ranks)}" if ranks else ""
        least = sum(rank * sizes[site] for site, rank in made.ranks.items())
        share = f"{least / now:.0%}" if now else ""
        worst = max(made.errors.values(), default=0.0)
        rows.append((name, made.setting, made.total, spread, f"{least:,}", share, f"{made.error:.2%}", f"{worst:.2%}"))
    columns = ("criterion", "keeps", "ranks", "a site", "parameters", "of now", "error", "worst")
    return Table("criteria", "Ranks that would be kept, and the error", columns, tuple(rows), (CRITERIA,), text_columns=2)


def finding_lines(findings: list[Finding]) -> list[str]:
    """One line a finding, the gravest first; of many alike the first few, and how many more."""
    if not findings:
        return ["No finding: nothing is wrong as far as the file tells."]
    lines = []
    counts = Counter(finding.rule for finding in findings)
    seen: Counter[str] = Counter()
    for finding in findings:
        seen[finding.rule] += 1
        if seen[finding.rule] <= MOST_ALIKE:
            remedy = f" -> {finding.remedy}" if finding.remedy and seen[finding.rule] == 1 else ""
            lines.append(f"{finding.level}: {finding.sentence} [{finding.rule}]{remedy}")
        elif seen[finding.rule] == MOST_ALIKE + 1:
            lines.append(f"{finding.level}: {counts[finding.rule] - MOST_ALIKE} more of [{finding.rule}]; --json lists all")
    return lines


def measured_table(one: Examination, measured: Mapping[str, Any]) -> Table:
    """measured: what `experiments.truncations.measure` gives."""
    rows = []
    errors = {name: f"{made.error:.2%}" for name, made in one.suggestions.items()}
    ranks = {name: made.total for name, made in one.suggestions.items()}
    whole = sum(site.site.rank for site in one.sites)
    for name in ("base", "whole", *measured["criteria"]):
        of = measured["criteria"].get(name) or measured[name]
        rows.append(
            (
                name,
                {"base": 0, "whole": whole}.get(name, ranks.get(name)),
                {"base": "100.00%", "whole": "0.00%"}.get(name, errors.get(name)),
                _with_error(of["loss"], of["standard_error"], ".4f"),
                "" if name == "whole" else _with_error(of["difference"], of["difference_standard_error"], "+.4f"),
                _with_error(of["score"], of["score_standard_error"], ".2f"),
            )
        )
    columns = ("adapter", "ranks", "error", "loss", "from the whole adapter's", measured["metric"])
    of_all = "" if measured["rows"] == measured["of_rows"] else f" of {measured['of_rows']:,}, drawn by a fixed seed"
    labels = measured["labels"]
    order = f" Outputs are taken for the labels {', '.join(labels[:10])}{', ...' * (len(labels) > 10)} in this order."
    caption = (
        f"{measured['rows']:,} rows{of_all} ({measured['reading']}), on {measured['model']}. Loss is the mean over rows, of a "
        f"language model over all scored tokens, +- its standard error over rows; the difference is taken row by row. Base: "
        f"the model with the adapter's head and no update. These are the rows that were given: held-out ones say what a "
        f"smaller adapter costs elsewhere.{order if labels else ''}"
    )
    return Table("measured", f"Measured on {measured['data']}", columns, tuple(rows), (caption,))


def _with_error(value: float | None, error: float | None, form: str) -> str:
    if value is None:
        return "no number"
    return f"{value:{form}}" if error is None else f"{value:{form}} +- {error:{form.removeprefix('+')}}"


def text(one: Examination, width: int, measured: Mapping[str, Any] | None = None) -> str:
    made = tables(one) if measured is None else [*tables(one), measured_table(one, measured)]
    shown = [table.text(width).rstrip("\n") for table in made]
    return "\n\n".join([*shown, "\n".join(map(printable, finding_lines(one.findings)))])


def cut_line(cut: Cut, criterion: str) -> str:
    size = f"{cut.bytes_before:,} to {cut.bytes_after:,} bytes"
    return (
        f"{cut.file}: {sum(cut.ranks.values()):,} ranks by {criterion}, {size}; relative error of dW at most {cut.bound:.3e}, "
        f"measured {cut.measured:.3e}"
    )
