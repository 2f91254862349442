"""The cells of one setting's row: score, parameters, scale, memory, time, status, ranks."""

from collections.abc import Callable, Iterable
from itertools import groupby

from rankwise.experiments.records import Result
from rankwise.reports.results import Arm, Study
from rankwise.reports.statistics import paired_differences, summary
from rankwise.reports.tables.cells import Cost, Difference, Estimate, Rank, bytes_text, error_text, seconds_text


def estimate(scores: Iterable[float]) -> Estimate | None:
    s = summary(list(scores))
    return s and Estimate(s.mean, s.low, s.high, s.sd, s.n)


def difference_to(arm: Arm, reference: Arm) -> Difference | None:
    s = summary(paired_differences(arm.scores, reference.scores))
    return s and Difference(s.mean, s.low, s.high, s.sd, s.n)


def mean_known(values: Iterable[float | None]) -> float | None:
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def parameters(arm: Arm) -> tuple[int | None, int | None, int | None]:
    """Trainable, active and head parameters, means over seeds, rounded; the first two are without the head."""

    def mean(field: str) -> int | None:
        value = mean_known(getattr(result, field) for result in arm.completed)
        return None if value is None else round(value)

    return mean("trainable_parameters"), mean("active_parameters"), mean("head_parameters")


def scales(arm: Arm) -> list[float]:
    """The distinct scales alpha/r of the arm's completed runs, ascending; scales within 0.1 % count as one."""
    in_force: list[float] = []
    for result in arm.completed:
        values = result.scale.values() if isinstance(result.scale, dict) else [result.scale]
        in_force += [value for value in values if value is not None]
    distinct: list[float] = []
    for value in sorted(in_force):
        if not distinct or abs(value - distinct[-1]) > 1e-3 * abs(value):
            distinct.append(value)
    return distinct


def scale_text(arm: Arm) -> str:
    values = scales(arm)
    if not values or not arm.has_ranks:
        return "-"
    return f"{values[0]:.3g}" if len(values) == 1 else f"{values[0]:.3g} to {values[-1]:.3g}"


def status_text(arm: Arm) -> str:
    """ "completed", "failed (2 of 5): collapsed", "unfinished (1 of 3)", or what is missing."""
    if not arm.final:
        return f"no final run ({sum(map(len, arm.grid.values()))} in the sweep)"
    n = len(arm.final)
    failed, unfinished = arm.of("failed"), arm.of("unfinished")
    parts = []
    if failed:
        errors = dict.fromkeys(error_text(run.result.error) for run in failed)
        parts.append(f"failed ({len(failed)} of {n}): {', '.join(errors)}")
    if unfinished:
        parts.append(f"unfinished ({len(unfinished)} of {n})")
    return "; ".join(parts) or "completed"


def _grouped(arm: Arm, value: Callable[[Result], float | None], show: Callable[[float], str], size) -> Cost | None:
    pairs = sorted((size(result), value(result)) for result in arm.completed if value(result) is not None)
    groups = {key: [value for _, value in group] for key, group in groupby(pairs, key=lambda pair: pair[0])}
    if not groups:
        return None
    return Cost(tuple(sum(v) / len(v) for v in groups.values()), tuple(groups), show)


def seconds_cell(arm: Arm) -> Cost | None:
    return _grouped(arm, lambda r: r.seconds, seconds_text, lambda r: r.pack_size)


def memory_cell(arm: Arm) -> Cost | None:
    return _grouped(
        arm,
        lambda r: r.peak_memory_bytes if r.peak_memory_bytes is not None else r.pack_peak_memory_bytes,
        bytes_text,
        lambda r: 1 if r.peak_memory_bytes is not None else r.pack_size,
    )


def mean_ranks(arm: Arm) -> dict[str, Rank]:
    """Site -> active and nominal rank, means over the completed runs."""
    with_ranks = [result for result in arm.completed if result.ranks]
    sites = dict.fromkeys(site for result in with_ranks for site in result.ranks)
    return {
        site: Rank(
            mean_known(result.ranks.get(site) for result in with_ranks),
            mean_known(result.nominal_ranks.get(site, result.ranks.get(site)) for result in with_ranks),
        )
        for site in sites
    }


def splits(study: Study) -> tuple[str, str]:
    result = next(iter(study.results()), None)
    return (result.selection_split, result.split) if result else ("selection", "score")


def arm_of(part: Study, setting: str) -> Arm | None:
    return next((arm for arm in part.arms if arm.setting == setting), None)
