"""What each part of a method is worth, of a study with every combination of its parts."""

from rankwise.reports.factors import Effect, decompositions
from rankwise.reports.figures.style import FAINT, INK, Drawing, house_style, panels, subject, title_above
from rankwise.reports.results import Study


def factors(study: Study) -> Drawing | None:
    """A row an effect: single factors above, their combinations below, with 95 % intervals; filled: shown.

    None where nothing has an effect yet.
    """
    found = [one for one in decompositions(study) if one.effects]
    if not found:
        return None
    rows: list[tuple[str, Effect] | None] = []
    for one in found:
        prefix = "" if len(found) == 1 else f"{one.design}: "
        rows += [(prefix + " x ".join(effect.factors), effect) for effect in one.effects]
        rows += [(f"{prefix}all against none", one.whole)]
    with house_style():
        figure, (ax,) = panels(1, 1, (7.4, 0.28 * len(rows) + 1.4))
        for row, (_, effect) in enumerate(rows):
            if effect.low is not None:
                ax.plot([effect.low, effect.high], [row, row], color=INK, linewidth=1.4)
            face = INK if effect.is_claimed and "against none" not in rows[row][0] else "white"
            ax.plot([effect.mean], [row], "o", color=INK, markerfacecolor=face, markersize=5.5, zorder=3)
        ax.axvline(0, color=FAINT, linewidth=1)
        ax.set_yticks(range(len(rows)), [label for label, _ in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("points")
        n = "/".join(str(one.n) for one in found)
        title = f"What each part is worth, {subject(study)} ({n} seeds; filled: shown)"
        title_above(figure, title)
    words = " ".join(f"{one.design}: {one.text}" for one in found)
    return Drawing("factors", title, f"Effects with intervals. {words}", figure, is_main=True)
