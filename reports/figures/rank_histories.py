"""The rank budget and the rank of each kind of module over the steps of training."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rankwise.reports.figures.style import (
    INK,
    KIND_COLOURS,
    Drawing,
    colour,
    house_style,
    panels,
    seeds_text,
    setting_names,
    subject,
    title_above,
)
from rankwise.reports.ranks.sites import module_labels, site_order
from rankwise.reports.results import Arm, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def budget(study: Study) -> Drawing | None:
    """Total of active ranks and the total that the schedule asks for, over steps; a panel for each setting with a schedule."""
    histories = {arm: _histories(arm) for arm in study.arms}
    arms = [arm for arm, runs in histories.items() if any(row.budget is not None for run in runs for row in run)]
    if not arms:
        return None
    columns = min(len(arms), 2)
    rows = -(-len(arms) // columns)
    with house_style():
        figure, axes = panels(rows, columns, (9.6 if columns == 2 else 6.4, 3.1 * rows + 0.5), sharey=True)
        for ax, arm in zip(axes, arms, strict=False):
            for i, run in enumerate(histories[arm]):
                steps = [row.step for row in run]
                first = i == 0
                active = [row.active for row in run]
                alive = [(row.step, row.live) for row in run if row.live]  # at the start every E is 0
                if any(row.live not in (0, row.active) for row in run):
                    ax.step(*zip(*alive, strict=True), where="post", color=colour(arm.method), alpha=0.3, linewidth=1.0,
                            label="live (E not 0)" if first else None)  # fmt: skip
                ax.step(steps, active, where="post", color=colour(arm.method), alpha=1.0 if first else 0.5,
                        linewidth=2.6, label="active" if first else None)  # fmt: skip
            scheduled = [(row.step, row.budget) for row in histories[arm][0] if row.budget is not None]
            ax.step(*zip(*scheduled, strict=True), where="post", color=INK, linestyle=(0, (4, 2.5)), linewidth=1.1,
                    label="schedule")  # fmt: skip
            ax.annotate(f"{scheduled[-1][1]:,}", scheduled[-1], xytext=(0, -13), textcoords="offset points", ha="right",
                        fontsize=9, color=INK)  # fmt: skip
            ax.set_title(arm.setting)
            ax.set_xlabel("step")
            ax.set_ylim(bottom=0)
            ax.margins(x=0.02)
            ax.legend(loc="lower left")
        axes[0].set_ylabel("ranks, all sites together")
        for ax in axes[len(arms) :]:
            ax.set_axis_off()
        title = f"Rank budget over time against its schedule, {subject(study)} ({seeds_text(arms)})"
        title_above(figure, title)
    return Drawing("budget", title, f"Active ranks fall with the schedule for {', '.join(setting_names(arms))}.", figure)


def ranks_over_time(study: Study) -> Drawing | None:
    """Mean active rank of each kind of module over steps, of the settings whose ranks change in training."""
    histories = {arm: _histories(arm) for arm in study.arms}
    arms = [arm for arm, runs in histories.items() if any(row.ranks != run[0].ranks for run in runs for row in run)]
    if not arms:
        return None
    sites = site_order(site for arm in arms for run in histories[arm] for site in run[0].ranks)
    labels = module_labels(sites)
    kinds = list(dict.fromkeys(labels[site] for site in sites))
    colours = {kind: KIND_COLOURS[i % len(KIND_COLOURS)] for i, kind in enumerate(kinds)}
    columns = min(len(arms), 2)
    rows = -(-len(arms) // columns)
    with house_style():
        figure, axes = panels(rows, columns, (9.6 if columns == 2 else 7.0, 3.3 * rows + 0.5), sharey=True)
        for ax, arm in zip(axes, arms, strict=False):
            ends = []
            for kind in kinds:
                members = [site for site in sites if labels[site] == kind]
                steps, means = mean_series(
                    [(row.step, [row.ranks[site] for site in members if site in row.ranks]) for row in run]
                    for run in histories[arm]
                )
                if steps:
                    ax.step(steps, means, where="post", color=colours[kind], linewidth=1.9)
                    ends.append((means[-1], kind))
            ax.set_title(arm.setting)
            ax.set_xlabel("step")
            ax.set_ylim(bottom=0)
            ax.margins(x=0.0)
            _end_labels(ax, ends, colours)
        axes[0].set_ylabel("active rank, mean over layers")
        for ax in axes[len(arms) :]:
            ax.set_axis_off()
        title = f"Active rank of each kind of module over time, {subject(study)} ({seeds_text(arms)})"
        title_above(figure, title)
    return Drawing("ranks-over-time", title, f"Mean rank of {', '.join(kinds)} while training.", figure)


def _histories(arm: Arm) -> list[list]:
    return [run.rank_history for run in arm.of("completed") if run.rank_history]


def mean_series(runs: Iterable[list[tuple[int, list[float]]]]) -> tuple[list[int], list[float]]:
    """The mean at each step over the runs that have it."""
    at: dict[int, list[float]] = {}
    for run in runs:
        for step, values in run:
            at.setdefault(step, []).extend(values)
    steps = sorted(step for step, values in at.items() if values)
    return steps, [sum(at[step]) / len(at[step]) for step in steps]


def _end_labels(ax: "Axes", ends: list[tuple[float, str]], colours: dict[str, str]) -> None:
    """Each line's name at its right end, moved apart where two would overlap."""
    gap = 0.062 * ax.get_ylim()[1]
    ends = sorted(ends)
    heights = [value for value, _ in ends]
    for _ in range(200):  # neighbours that are too near push each other apart, by halves
        for i in range(len(heights) - 1):
            short = gap - (heights[i + 1] - heights[i])
            if short > 1e-9:
                heights[i], heights[i + 1] = heights[i] - short / 2, heights[i + 1] + short / 2
    lift = max(0.0, -min(heights, default=0.0))
    for (_, name), height in zip(ends, heights, strict=True):
        ax.annotate(name, (1.0, height + lift), xycoords=("axes fraction", "data"), xytext=(6, 0),
                    textcoords="offset points", va="center", fontsize=8.5, color=colours[name])  # fmt: skip
