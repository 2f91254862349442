"""What a study set out to test: each hypothesis's difference with its interval, beside its margin."""

from rankwise.reports.figures.style import FAINT, INK, Drawing, colour, house_style, panels, subject, title_above
from rankwise.reports.hypotheses import SETTLED, outcomes_of
from rankwise.reports.results import Study


def hypotheses(study: Study) -> Drawing | None:
    """A row a hypothesis: the difference, the interval at the level of its test, the margin shaded, the verdict in a word.

    None where nothing has been compared yet.
    """
    tested = [one for one in outcomes_of(study) if one.comparison is not None]
    if not tested:
        return None
    methods = {arm.setting: arm.method for arm in study.arms}
    with house_style():
        figure, (ax,) = panels(1, 1, (8.2, 0.5 * len(tested) + 1.5))
        for row, one in enumerate(tested):
            seen, tint = one.comparison, colour(methods[one.hypothesis.arms[0]])
            face = tint if one.kind in SETTLED else "white"
            margin = one.hypothesis.margin
            ax.fill_betweenx([row - 0.35, row + 0.35], -margin, margin, color=FAINT, alpha=0.18, linewidth=0)
            ax.plot([seen.low, seen.high], [row, row], color=tint, linewidth=2)
            ax.plot([seen.difference], [row], "o", color=tint, markerfacecolor=face, markersize=6.5, zorder=3)
            ax.annotate(
                one.kind, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=INK
            )  # fmt: skip
        ax.axvline(0, color=FAINT, linewidth=1)
        labels = [f"{one.hypothesis.name}: {' over '.join(one.hypothesis.arms)}" for one in tested]
        ax.set_yticks(range(len(tested)), labels)
        ax.set_ylim(len(tested) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("points (shaded: the margin inside which a difference counts as none)")
        n = "/".join(map(str, sorted({one.comparison.seeds for one in tested})))
        title = f"What was set out to be tested, {subject(study)} ({n} seeds)"
        title_above(figure, title)
    words = "; ".join(f"{one.hypothesis.name}: {one.text}" for one in tested)
    return Drawing("hypotheses", title, f"Differences with intervals and margins. {words}.", figure, is_main=True)
