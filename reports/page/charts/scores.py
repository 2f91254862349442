"""Charts of scores: differences to the reference, score against parameters, score against learning rate."""

from collections.abc import Sequence
from itertools import pairwise

from rankwise.reports.figures.style import INK, floor_of, turns
from rankwise.reports.page.charts.parts import (
    CROSS,
    DASHES,
    HEIGHT,
    Chart,
    Panel,
    colour_scale,
    hollow_for_second,
    scale_with_air,
    score_scale,
    shape_scale,
    specification_of,
    tooltip_of,
    words,
)
from rankwise.reports.results import Arm, Study, best_rate, rate_score
from rankwise.reports.statistics import summary
from rankwise.reports.tables.cells import Difference, Estimate, rate_text
from rankwise.reports.tables.scores import verdict_table
from rankwise.reports.tables.summaries import parameters
from rankwise.reports.tables.table import Table
from rankwise.reports.verdicts import Verdict


def differences(study: Study, verdicts: Sequence[Verdict]) -> Chart | None:
    """Each setting's paired difference to the reference, with its interval."""
    import altair as alt

    known = [verdict for verdict in verdicts if verdict.mean is not None]
    if not known:
        return None
    by_setting = {arm.setting: arm for arm in study.arms}
    arms = [by_setting[verdict.setting] for verdict in known]
    names = [arm.setting for arm in arms]
    reference = known[0].reference
    means = [v.mean for v in known]
    floor = min(floor_of([*means, 0.0], room=30.0), 0.0)  # the reference itself, at zero, always shows
    shown = [Difference(v.mean, v.low, v.high, None, v.n) for v in known]
    rows = [
        {"setting": v.setting, "shown": max(v.mean, floor), "low": v.low, "high": v.high, "text": words(difference),
         "verdict": v.kind, "n": v.n, "below": v.mean < floor}
        for v, difference in zip(known, shown, strict=True)
    ]  # fmt: skip
    lows, highs = [v.low for v in known if v.low is not None], [v.high for v in known if v.high is not None]
    bottom = floor if floor > min(means) else min([*lows, *means, 0.0])
    x = {"title": f"difference to {reference}, points", "scale": scale_with_air(bottom, max([*highs, *means, 0.0])),
         "axis": alt.Axis(tickCount=6, labelOverlap=True)}  # fmt: skip
    y = alt.Y("setting:N", sort=names, title=None, axis=alt.Axis(labelLimit=150, grid=False, ticks=False, domain=False))
    base = alt.Chart(alt.NamedData("rows")).encode(
        y=y, color=colour_scale(arms, legend=False), tooltip=tooltip_of("setting", "text", "verdict", "n")
    )
    zero = alt.Chart(alt.NamedData("zero")).mark_rule(color=INK, strokeWidth=1).encode(x=alt.X("zero:Q", **x))
    points = base.transform_filter("!datum.below").mark_point(size=90, filled=True, opacity=1)
    layers = [zero, points.encode(x=alt.X("shown:Q", **x), shape=shape_scale(arms, legend=False))]
    if lows:
        ranges = base.transform_filter("isValid(datum.low) && !datum.below").mark_rule(strokeWidth=2.5, clip=True)
        layers.insert(1, ranges.encode(x=alt.X("low:Q", **x), x2="high:Q"))
    caption = ["Paired by seed; the line is the 95 % interval of the mean difference; right of zero is better."]
    if any(row["below"] for row in rows):
        below = base.transform_filter("datum.below").encode(x=alt.X("shown:Q", **x))
        layers.append(below.mark_point(shape="triangle-left", size=90, filled=True, opacity=1))
        layers.append(below.mark_text(align="left", dx=10).encode(text="text:N", color=alt.value(INK)))
        caption.append("An arrow at the left edge: the difference lies outside, and is written beside it.")
    specification = specification_of(alt.layer(*layers), 30 * len(names), rows=rows, zero=[{"zero": 0}])
    described = "; ".join(f"{name} {difference}" for name, difference in zip(names, shown, strict=True))
    panel = Panel("", f"Differences to {reference} in points: {described}.", specification)
    return Chart("differences", f"Difference to {reference}", tuple(caption), (panel,), verdict_table(study))


def score_against_parameters(study: Study) -> Chart | None:
    """Score with its interval against active parameters, head included, on a log axis."""
    import altair as alt

    points = []
    for arm in study.arms:
        score = summary(list(arm.scores.values()))
        _, active, head = parameters(arm)
        count = (active or 0) + (head or 0)
        if score is not None and active is not None and count > 0:
            points.append((arm, count, Estimate(score.mean, score.low, score.high, score.sd, score.n)))
    if not points:
        return None
    arms = [arm for arm, _, _ in points]
    floor = floor_of([score.mean for _, _, score in points])
    aside = offsets([count for _, count, _ in points])
    data = [
        {"setting": arm.setting, "parameters": count, "shown": max(s.mean, floor), "low": s.low, "high": s.high, "n": s.n,
         "text": words(s), "below": s.mean < floor, "aside": offset, "turn": turn}
        for (arm, count, s), offset, turn in zip(points, aside, turns(arms), strict=True)
    ]  # fmt: skip
    split, metric = study.results()[0].split, study.metric
    y = {"title": f"{metric} on the {split} split", "scale": score_scale(
        [s.mean for _, _, s in points],
        [s.low for _, _, s in points if s.low is not None],
        [s.high for _, _, s in points if s.high is not None],
    )}  # fmt: skip
    counts = [count for _, count, _ in points]
    x = alt.X("parameters:Q", title="active parameters, head included (log)",
              scale=alt.Scale(type="log", domain=[min(counts) / 1.6, max(counts) * 1.6], nice=False),
              axis=alt.Axis(format="~s", tickCount=6, labelOverlap=True, labelFlush=False, grid=False))  # fmt: skip
    tooltip = tooltip_of("setting", "text", "parameters", "n")
    layers = []
    for offset in sorted(set(aside)):  # Vega-Lite offsets whole marks: each offset is a layer of its own
        base = alt.Chart().transform_filter(f"datum.aside === {offset}").encode(x=x, tooltip=tooltip)
        here = [row for row in data if row["aside"] == offset]
        if any(row["low"] is not None and not row["below"] for row in here):
            bars = base.transform_filter("isValid(datum.low) && !datum.below")
            bars = bars.mark_rule(strokeWidth=2, clip=True, xOffset=offset)
            layers.append(bars.encode(y=alt.Y("low:Q", **y), y2="high:Q", color=colour_scale(arms)))
        above = base.transform_filter("!datum.below").mark_point(size=95, filled=True, opacity=1, xOffset=offset)
        layers.append(above.encode(y=alt.Y("shown:Q", **y), color=colour_scale(arms), shape=shape_scale(arms),
                                   fillOpacity=hollow_for_second()))  # fmt: skip
        if any(row["below"] for row in here):
            below = base.transform_filter("datum.below").encode(y=alt.Y("shown:Q", **y), color=colour_scale(arms))
            layers.append(below.mark_point(shape="triangle-down", size=95, filled=True, opacity=1, xOffset=offset))
            layers.append(below.mark_text(dy=-14, xOffset=offset).encode(text="text:N", color=alt.value(INK)))
    specification = specification_of(alt.layer(*layers, data=alt.NamedData("rows")), HEIGHT, rows=data)
    caption = [f"Means over seeds of the final runs, with their 95 % t interval{_none_for_one(arms)}."]
    if any(aside):
        caption.append("Settings with nearly the same number of parameters stand side by side.")
    if any(row["below"] for row in data):
        caption.append(f"The axis is cut below {floor:.0f}: an arrow at the foot is a score below, which is written there.")
    described = "; ".join(f"{arm.setting} {score} with {count:,} parameters" for arm, count, score in points)
    columns = ("setting", "n", "active and head parameters", f"{split} score ({metric})")
    rows = tuple((arm.setting, score.n, count, score) for arm, count, score in points)
    table = Table("score-parameters", "Score and parameters", columns, rows, ())
    panel = Panel("", f"Score against active parameters: {described}.", specification)
    return Chart("score-parameters", "Score against active parameters", tuple(caption), (panel,), table)


def _none_for_one(arms: Sequence[Arm]) -> str:
    return " (one seed has none)" if any(len(arm.scores) == 1 for arm in arms) else ""


def offsets(counts: Sequence[int], near: float = 1.25, gap: int = 12) -> list[int]:
    """Horizontal offset of each point in pixels, so that points within a factor `near` do not cover each other."""
    order = sorted(range(len(counts)), key=lambda i: (counts[i], i))
    groups: list[list[int]] = [[order[0]]]
    for before, i in pairwise(order):
        if counts[i] <= near * counts[before]:
            groups[-1].append(i)
        else:
            groups.append([i])
    aside = [0] * len(counts)
    for group in groups:
        for place, i in enumerate(group):
            aside[i] = round(gap * (place - (len(group) - 1) / 2))
    return aside


def rate_curves(study: Study, table: Table | None) -> Chart | None:
    """Selection score against learning rate: the best filled, failed rates and those far below drawn at the foot."""
    import altair as alt

    arms = [arm for arm in study.arms if len(arm.grid) > 1]
    scores = {arm.setting: {rate: rate_score(runs) for rate, runs in arm.grid.items()} for arm in arms}
    known = [score for by_rate in scores.values() for score in by_rate.values() if score is not None]
    if not known:
        return None
    floor = floor_of(known)
    points, failures = [], []
    for arm, turn in zip(arms, turns(arms), strict=True):
        best = best_rate(arm)
        top = max(run.config.rung for runs in arm.grid.values() for run in runs)
        for rate, score in scores[arm.setting].items():
            if score is not None:
                chosen = best is not None and best.rate == rate
                points.append({"setting": arm.setting, "rate": rate, "score": score, "shown": max(score, floor), "turn": turn,
                               "best": chosen, "below": score < floor, "n": len(arm.grid[rate]),
                               "mark": "edge" if chosen and best.at_edge else "",
                               "early": max(run.config.rung for run in arm.grid[rate]) < top})  # fmt: skip
            elif any(run.status == "failed" for run in arm.grid[rate]):
                level = sum(row["rate"] == rate for row in failures)
                failures.append({"setting": arm.setting, "rate": rate, "foot": HEIGHT - 8 - 15 * level, "outcome": "failed"})
    tried = sorted({rate for arm in arms for rate in arm.grid})
    x = alt.X("rate:Q", title="learning rate (log)",
              scale=alt.Scale(type="log", domain=[tried[0] / 1.5, tried[-1] * 1.5], nice=False),
              axis=alt.Axis(values=tried, format="~e", labelOverlap=True, grid=False))  # fmt: skip
    result = study.results()[0]
    y = alt.Y("shown:Q", title=f"{study.metric} on the {result.selection_split} split", scale=score_scale(known))
    base = alt.Chart(alt.NamedData("rows")).encode(x=x, y=y, color=colour_scale(arms))
    tooltip = [
        *tooltip_of("setting"),
        alt.Tooltip("rate:Q", format="~e"),
        alt.Tooltip("score:Q", format=".2f"),
        *tooltip_of("n"),
    ]
    dash = alt.StrokeDash("turn:O", scale=alt.Scale(domain=list(range(len(DASHES))), range=list(DASHES)), legend=None)
    shapes = shape_scale(arms)
    dots = base.encode(shape=shapes, tooltip=tooltip)
    layers = [
        base.mark_line(strokeWidth=1.8).encode(strokeDash=dash, detail="setting:N"),
        dots.transform_filter("!datum.best")
        .mark_point(size=75, fill="white", strokeWidth=1.8)
        .encode(opacity=alt.condition("datum.early", alt.value(0.45), alt.value(1))),
        dots.transform_filter("datum.best").mark_point(size=85, filled=True, opacity=1),
    ]
    if any(row["mark"] for row in points):
        layers.append(base.transform_filter("datum.mark !== ''").mark_text(dy=-13).encode(text="mark:N"))
    if any(row["below"] for row in points):
        numbers = base.transform_filter("datum.below").mark_text(dy=-13)
        layers.append(numbers.encode(text=alt.Text("score:Q", format=".0f")))
    if failures:
        lost = alt.Chart(alt.NamedData("lost")).encode(x=x, y=alt.Y("foot:Q", scale=None), color=colour_scale(arms))
        layers.append(lost.mark_point(shape=CROSS, size=60, filled=True, opacity=1).encode(tooltip=tooltip_of(
            "setting", "rate", "outcome")))  # fmt: skip
    specification = specification_of(alt.layer(*layers), HEIGHT, rows=points, lost=failures)
    caption = ["Mean selection score of each rate that was tried; filled: the best, which the final runs use."]
    if any(row["early"] for row in points):
        caption.append("Pale: given up before the last rung of the sweep, and so trained shorter than the others.")
    if failures:
        caption.append("A cross at the foot: every run at that rate failed.")
    if any(row["below"] for row in points):
        caption.append(f"The axis is cut below {floor:.0f}: what lies there stands at the foot, with its score.")
    described = "; ".join(
        f"{arm.setting} {best.score:.2f} at {rate_text(best.rate)}{', the edge of its grid' if best.at_edge else ''}"
        for arm in arms
        if (best := best_rate(arm))
    )
    panel = Panel("", f"Selection score against learning rate. Best: {described}.", specification)
    return Chart("rates", "Score against learning rate", tuple(caption), (panel,), table)
