"""Learning curves, and score against learning rate."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rankwise.experiments.records import Result, Run
from rankwise.reports.figures.rank_histories import mean_series
from rankwise.reports.figures.style import (
    FAINT,
    MARKERS,
    Drawing,
    colour,
    floor_of,
    house_style,
    line_styles,
    panels,
    seeds_text,
    setting_names,
    subject,
    title_above,
)
from rankwise.reports.results import Arm, Study, best_rate, rate_score
from rankwise.reports.tables.cells import rate_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def learning_curves(study: Study) -> Drawing | None:
    """Training loss (in bins of steps) and the metric on the selection split, means over seeds."""
    arms = [arm for arm in study.arms if any(run.train or run.evaluations for run in arm.of("completed"))]
    if not arms:
        return None
    result = next(iter(study.results()))
    split = _evaluated_split(arms, result)
    with house_style():
        figure, (left, right) = panels(1, 2, (9.8, 4.1), sharex=True)
        for arm, line in line_styles(arms):
            runs = arm.of("completed")
            steps, losses = _binned([(row.step, row.loss) for row in run.train if row.loss is not None] for run in runs)
            if steps:
                left.plot(steps, losses, label=arm.setting, color=colour(arm.method), linestyle=line, linewidth=1.5)
            curves = [
                {e.step: e.metrics[result.metric] for e in run.evaluations if e.split == split and result.metric in e.metrics}
                for run in runs
            ]
            steps, means = mean_series([(step, [value]) for step, value in curve.items()] for curve in curves)
            if not steps:
                continue
            if len(runs) > 1:
                bounds = [[curve[step] for curve in curves if step in curve] for step in steps]
                right.fill_between(steps, [min(b) for b in bounds], [max(b) for b in bounds], color=colour(arm.method),
                                   alpha=0.13, linewidth=0)  # fmt: skip
            right.plot(steps, means, label=arm.setting, color=colour(arm.method), linestyle=line, linewidth=1.5,
                       marker=MARKERS.get(arm.method, "o"), markersize=4.5)  # fmt: skip
        left.set_title("training loss")
        losses = [y for line in left.lines for y in line.get_ydata()]
        if losses and min(losses) > 0 and max(losses) > 20 * min(losses):
            left.set_yscale("log")
        right.set_title(f"{result.metric} on the {split} split (points)")
        _show_near_best(right, [y for line in right.lines for y in line.get_ydata()])
        for ax in (left, right):
            ax.set_xlabel("step")
            ax.margins(x=0.02)
        handles = {line.get_label(): line for line in [*left.lines, *right.lines] if not line.get_label().startswith("_")}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 6))
        band = "; band: lowest to highest seed" if any(len(arm.completed) > 1 for arm in arms) else ""
        title = f"Learning curves, {subject(study)} ({seeds_text(arms)}{band})"
        title_above(figure, title)
    return Drawing(
        "learning-curves", title, f"Loss and {result.metric} over steps for {', '.join(setting_names(arms))}.", figure
    )


def _evaluated_split(arms: Sequence[Arm], result: Result) -> str:
    """The selection split, or the split that final runs evaluated most often where they did not evaluate that one."""
    splits = [e.split for arm in arms for run in arm.of("completed") for e in run.evaluations]
    if result.selection_split in splits or not splits:
        return result.selection_split
    return max(sorted(set(splits)), key=splits.count)


def _binned(runs: Iterable[list[tuple[int, float]]], bins: int = 60) -> tuple[list[float], list[float]]:
    points = sorted(point for run in runs for point in run)
    if not points:
        return [], []
    last = points[-1][0] or 1
    at: dict[int, list[tuple[int, float]]] = {}
    for step, loss in points:
        at.setdefault(min(step * bins // last, bins - 1), []).append((step, loss))
    return [float(np.mean([s for s, _ in b])) for b in at.values()], [float(np.mean([y for _, y in b])) for b in at.values()]


def _show_near_best(ax: "Axes", values: Sequence[float]) -> float:
    """Cuts the axis at `floor_of` the values and says so at its top; returns where the axis begins."""
    if not len(values):
        return 0.0
    best, floor = max(values), floor_of(values)
    if floor > min(values):
        ax.set_ylim(floor - 0.06 * (best - floor), best + 0.08 * (best - floor))
        ax.set_title(f"cut below {floor:.0f}", loc="right", fontsize=8.5, fontweight="normal", color=FAINT)
    return floor


def rates(study: Study) -> Drawing | None:
    """Selection score against learning rate: the best filled, failed rates and those far below drawn at the foot."""
    arms = [arm for arm in study.arms if len(arm.grid) > 1]
    if not any(rate_score(runs) is not None for arm in arms for runs in arm.grid.values()):
        return None
    result = next(iter(study.results()))
    with house_style():
        figure, (ax,) = panels(1, 1, (8.2, 4.4))
        ax.set_xscale("log")
        scores = {arm: {rate: rate_score(runs) for rate, runs in arm.grid.items()} for arm in arms}
        floor = _show_near_best(ax, [s for by_rate in scores.values() for s in by_rate.values() if s is not None])
        failed: list[tuple[float, Arm]] = []
        for arm, line in line_styles(arms):
            shown = [(rate, score) for rate, score in scores[arm].items() if score is not None]
            failed += [(rate, arm) for rate, score in scores[arm].items() if _lost(arm.grid[rate], score)]
            style = {"color": colour(arm.method), "marker": MARKERS.get(arm.method, "o"), "markersize": 6.5}
            if shown:
                ax.plot(*zip(*shown, strict=True), label=arm.setting, linestyle=line, markerfacecolor="white", **style)
            for rate, score in shown:
                if score < floor:
                    ax.annotate(f"{score:.0f}", (rate, floor), ha="center", fontsize=8, color=style["color"])
            best = best_rate(arm)
            if best:
                ax.plot(best.rate, best.score, linestyle="", **style)
                if best.at_edge:
                    ax.annotate("edge", (best.rate, best.score), xytext=(0, 8), textcoords="offset points", ha="center",
                                fontsize=8, color=style["color"])  # fmt: skip
        for i, (rate, arm) in enumerate(sorted(failed, key=lambda pair: pair[0])):
            level = sum(1 for other, _ in failed[:i] if other == rate)
            ax.plot(rate, 0.03 + 0.05 * level, transform=ax.get_xaxis_transform(), marker="x", markersize=8,
                    markeredgewidth=2, color=colour(arm.method), linestyle="", clip_on=False)  # fmt: skip
        tried = sorted({rate for arm in arms for rate in arm.grid})
        ax.set_xticks(tried, [rate_text(rate) for rate in tried], rotation=0 if len(tried) < 9 else 45)
        ax.minorticks_off()
        ax.set_xlabel("learning rate")
        ax.set_ylabel(f"{result.metric} on the {result.selection_split} split")
        ax.margins(y=0.14)
        figure.legend(loc="outside lower center", ncols=min(len(arms), 6))
        marks = "filled: best" + (", x: failed" if failed else "")
        title = f"Score against learning rate, {subject(study)} ({marks})"
        title_above(figure, title)
    return Drawing("rates", title, f"Selection score over learning rates for {', '.join(setting_names(arms))}.", figure)


def _lost(runs: Sequence[Run], score: float | None) -> bool:
    return score is None and any(run.status == "failed" for run in runs)
