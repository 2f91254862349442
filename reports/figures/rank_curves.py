"""Score and cost against rank, of a study with a curve of ranks."""

from rankwise.reports.figures.style import (
    FAINT,
    MARKERS,
    Drawing,
    colour,
    house_style,
    line_styles,
    panels,
    subject,
    title_above,
)
from rankwise.reports.rank_curve import WhichRank, which_rank
from rankwise.reports.results import Study
from rankwise.reports.statistics import summary
from rankwise.reports.tables.summaries import arm_of, memory_cell, parameters, seconds_cell

COSTS = ("trainable parameters", "peak memory", "time")


def rank_curve(study: Study) -> Drawing | None:
    """Left the mean score with its 95 % interval, the margin below the best shaded; right costs over those of the least rank.

    None where the study has no curve of two ranks with a score.
    """
    answers = which_rank(study)
    if not answers:
        return None
    arms = {answer.curve: arm_of(study, answer.points[0].setting) for answer in answers}
    lines = {arm.setting: line for arm, line in line_styles(list(arms.values()))}
    ranks = sorted({point.rank for answer in answers for point in answer.points})
    with house_style():
        figure, (left, right) = panels(1, 2, (9.8, 4.1))
        for answer in answers:
            arm = arms[answer.curve]
            style = {"color": colour(arm.method), "linestyle": lines[arm.setting]}
            _score(left, study, answer, style, MARKERS.get(arm.method, "o"))
            for name, mark in zip(COSTS, ("o", "s", "^"), strict=True):
                costs = _costs(study, answer, name)
                if costs:
                    label = name if len(answers) == 1 else f"{answer.curve}, {name}"
                    right.plot(*zip(*costs, strict=True), label=label, marker=mark, markersize=5, **style)
        for ax in (left, right):
            ax.set_xscale("log", base=2)
            ax.set_xticks(ranks, [str(rank) for rank in ranks])
            ax.minorticks_off()
            ax.set_xlabel("rank")
        left.set_title(f"score ({study.metric}, points)")
        right.set_yscale("log", base=2)
        right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        right.set_title("cost, times that of the least rank")
        right.legend()
        if len(answers) > 1:
            left.legend()
        n = "/".join(map(str, sorted({point.n for answer in answers for point in answer.points})))
        title = f"Which rank? {subject(study)} ({n} seeds; band: within {study.margin:g} of the best; filled: enough)"
        title_above(figure, title)
    words = " ".join(f"{answer.curve}: {answer.text}" for answer in answers)
    return Drawing("rank-curve", title, f"Score and cost against rank. {words}", figure, is_main=True)


def _score(ax, study: Study, answer: WhichRank, style: dict, mark: str) -> None:
    found = [(point, summary(list(arm_of(study, point.setting).scores.values()))) for point in answer.points]
    ax.plot([p.rank for p, _ in found], [s.mean for _, s in found], label=answer.curve, linewidth=1.5, **style)
    for point, s in found:
        if s.low is not None:
            ax.plot([point.rank] * 2, [s.low, s.high], color=style["color"], linewidth=1.2)
        face = style["color"] if point.kind == "enough" else "white"
        ax.plot(point.rank, s.mean, mark, color=style["color"], markerfacecolor=face, markersize=6.5, zorder=3)
    top = max(s.mean for _, s in found)
    ax.axhspan(top - answer.margin, top, color=FAINT, alpha=0.18, linewidth=0)


def _costs(study: Study, answer: WhichRank, name: str) -> list[tuple[int, float]]:
    """(rank, cost over that of the least rank); empty where one is not known, or runs were packed by different numbers."""
    costs, sizes = [], set()
    for point in answer.points:
        arm = arm_of(study, point.setting)
        if name == "trainable parameters":
            costs.append(parameters(arm)[0])
            continue
        cell = memory_cell(arm) if name == "peak memory" else seconds_cell(arm)
        if cell is None or len(cell.each) > 1:
            return []
        sizes.add(cell.pack_sizes)
        costs.append(cell.each[0])
    if len(sizes) > 1 or not all(costs):
        return []
    return [(point.rank, cost / costs[0]) for point, cost in zip(answer.points, costs, strict=True)]
