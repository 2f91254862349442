"""Each setting's difference to the reference with its interval: the figure of a paper's main table."""

from rankwise.reports.figures.style import FAINT, INK, Drawing, colour, house_style, panels, subject, title_above
from rankwise.reports.results import Study
from rankwise.reports.verdicts import verdicts

FILLED = ("better", "worse", "equivalent")  # what was decided; the others are drawn hollow


def differences(study: Study) -> Drawing | None:
    """A row a setting: the mean difference, its 95 % interval, and the verdict in a word; None where there is no difference."""
    given = [verdict for verdict in verdicts(study) if verdict.low is not None]
    if not given:
        return None
    methods = {arm.setting: arm.method for arm in study.arms}
    with house_style():
        figure, (ax,) = panels(1, 1, (8.2, 0.36 * len(given) + 1.5))
        for row, verdict in enumerate(given):
            tint = colour(methods[verdict.setting])
            face = tint if verdict.kind in FILLED else "white"
            ax.plot([verdict.low, verdict.high], [row, row], color=tint, linewidth=2)
            ax.plot([verdict.mean], [row], "o", color=tint, markerfacecolor=face, markersize=6.5, zorder=3)
            ax.annotate(
                verdict.kind, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=INK
            )  # fmt: skip
        ax.axvline(0, color=FAINT, linewidth=1)
        if study.margin is not None:
            ax.axvspan(-study.margin, study.margin, color=FAINT, alpha=0.18, linewidth=0)
        ax.set_yticks(range(len(given)), [verdict.setting for verdict in given])
        ax.set_ylim(len(given) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"points more than {given[0].reference}")
        n = "/".join(map(str, sorted({verdict.n for verdict in given})))
        title = f"Difference to {given[0].reference} with its 95 % interval, {subject(study)} ({n} seeds)"
        title_above(figure, title)
    words = ", ".join(f"{verdict.setting} {verdict.mean:+.2f} ({verdict.kind})" for verdict in given)
    return Drawing("differences", title, f"Differences to {given[0].reference} with intervals: {words}.", figure, is_main=True)
