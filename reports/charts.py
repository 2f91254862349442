"""Interactive figures of a study for report.html, as Vega-Lite specifications made with Altair.

Colours are those of `figures.METHOD_COLOURS`, numbers come from the same statistics and tables as report.md's. Each
function takes one part of a study and returns a `Chart`, or None where there is nothing to draw. A chart carries the words
for who cannot see it and a table of its numbers. Altair is imported when the first chart is made. Names of settings are data
of a specification, never a part of one of its expressions.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rankwise.experiments.records import RankStep, Run
from rankwise.reports.figures import FAINT, INK, colour, floor_of, turns
from rankwise.reports.ranks import module_labels, site_order, split_site
from rankwise.reports.results import Arm, Study, best_rate, rate_score
from rankwise.reports.statistics import summary
from rankwise.reports.tables import Difference, Estimate, Table, decimal, mean_ranks, parameters, rate_text, verdict_table
from rankwise.reports.verdicts import Verdict

MOST_STATES = 40  # of one rank history: more than a hand can choose with a slider
MOST_NUMBERS = 120_000  # ranks in one map: 0.3 MB of a page
HEIGHT = 300
CROSS = "M-1,-.7L-.7,-1L0,-.3L.7,-1L1,-.7L.3,0L1,.7L.7,1L0,.3L-.7,1L-1,.7L-.3,0Z"
SHAPES = {"full": "square", "head": "triangle-down", "bitfit": "triangle-up", "lora": "circle", "adalora": "diamond",
          "dora": "cross", "adalora+dora": CROSS}  # fmt: skip
DASHES = ([1, 0], [6, 4], [2, 2], [6, 3, 2, 3])  # as figures.LINES: the first, second, ... setting of one method
ENOUGH_CONTRAST = "datum.rank / datum.top > 0.64"  # white letters from here on, on YlGnBu

CONFIG = {
    "background": "white",
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif",
    "view": {"stroke": None},
    "axis": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titleColor": INK, "labelColor": INK,
             "gridColor": "#e9e9e9", "domainColor": "#b0b0b0", "tickColor": "#b0b0b0", "titlePadding": 8},
    "legend": {"labelFontSize": 12, "labelColor": INK, "symbolSize": 90, "symbolStrokeWidth": 1.8, "title": None},
    "text": {"fontSize": 11, "fill": INK},
}  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """One drawing: its heading where a figure has several, its words, and its Vega-Lite specification."""

    heading: str
    description: str
    specification: dict
    widest: int = 860  # px


@dataclass(frozen=True)
class Chart:
    """A figure of the page: drawings, the sentences under them, and the numbers they show."""

    name: str
    title: str
    caption: tuple[str, ...]
    panels: tuple[Panel, ...]
    table: Table | None


@dataclass(frozen=True)
class RankChart(Chart):
    """The rank map, with what its controls may choose, in the order of the specification's numbers."""

    choices: tuple["Choice", ...] = ()
    start: int = 0  # index of the choice that is shown first


@dataclass(frozen=True)
class Choice:
    """One setting of the rank map: its seeds, its training steps, and the total at each, [seed][step]."""

    setting: str
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    totals: tuple[tuple[int, ...], ...]


def words(text: object) -> str:
    """Plus-minus and the minus sign of negative numbers as they are printed."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\u2212", str(text).replace("+-", "\u00b1"))


# --- scores --------------------------------------------------------------------------------------------------------


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
    x = {"title": f"difference to {reference}, points", "scale": _with_air(bottom, max([*highs, *means, 0.0])),
         "axis": alt.Axis(tickCount=6, labelOverlap=True)}  # fmt: skip
    y = alt.Y("setting:N", sort=names, title=None, axis=alt.Axis(labelLimit=150, grid=False, ticks=False, domain=False))
    base = alt.Chart(alt.NamedData("rows")).encode(
        y=y, color=_colour_scale(arms, legend=False), tooltip=_tooltip("setting", "text", "verdict", "n")
    )
    zero = alt.Chart(alt.NamedData("zero")).mark_rule(color=INK, strokeWidth=1).encode(x=alt.X("zero:Q", **x))
    points = base.transform_filter("!datum.below").mark_point(size=90, filled=True, opacity=1)
    layers = [zero, points.encode(x=alt.X("shown:Q", **x), shape=_shape_scale(arms, legend=False))]
    if lows:
        ranges = base.transform_filter("isValid(datum.low) && !datum.below").mark_rule(strokeWidth=2.5, clip=True)
        layers.insert(1, ranges.encode(x=alt.X("low:Q", **x), x2="high:Q"))
    caption = ["Paired by seed; the line is the 95 % interval of the mean difference; right of zero is better."]
    if any(row["below"] for row in rows):
        below = base.transform_filter("datum.below").encode(x=alt.X("shown:Q", **x))
        layers.append(below.mark_point(shape="triangle-left", size=90, filled=True, opacity=1))
        layers.append(below.mark_text(align="left", dx=10).encode(text="text:N", color=alt.value(INK)))
        caption.append("An arrow at the left edge: the difference lies outside, and is written beside it.")
    specification = _specification(alt.layer(*layers), 30 * len(names), rows=rows, zero=[{"zero": 0}])
    told = "; ".join(f"{name} {difference}" for name, difference in zip(names, shown, strict=True))
    panel = Panel("", f"Differences to {reference} in points: {told}.", specification)
    return Chart("differences", f"Difference to {reference}", tuple(caption), (panel,), verdict_table(study))


def score_against_parameters(study: Study) -> Chart | None:
    """Score with its interval against the parameters that are active, the head's among them, on a log axis."""
    import altair as alt

    found = []
    for arm in study.arms:
        score = summary(list(arm.scores.values()))
        _, active, head = parameters(arm)
        count = (active or 0) + (head or 0)
        if score is not None and active is not None and count > 0:
            found.append((arm, count, Estimate(score.mean, score.low, score.high, score.sd, score.n)))
    if not found:
        return None
    arms = [arm for arm, _, _ in found]
    floor = floor_of([score.mean for _, _, score in found])
    aside = _side_by_side([count for _, count, _ in found])
    data = [
        {"setting": arm.setting, "parameters": count, "shown": max(s.mean, floor), "low": s.low, "high": s.high, "n": s.n,
         "text": words(s), "below": s.mean < floor, "aside": offset, "turn": turn}
        for (arm, count, s), offset, turn in zip(found, aside, turns(arms), strict=True)
    ]  # fmt: skip
    split, metric = study.results()[0].split, study.metric
    y = {"title": f"{metric} on the {split} split", "scale": _near(
        [s.mean for _, _, s in found],
        [s.low for _, _, s in found if s.low is not None],
        [s.high for _, _, s in found if s.high is not None],
    )}  # fmt: skip
    counts = [count for _, count, _ in found]
    x = alt.X("parameters:Q", title="active parameters, head included (log)",
              scale=alt.Scale(type="log", domain=[min(counts) / 1.6, max(counts) * 1.6], nice=False),
              axis=alt.Axis(format="~s", tickCount=6, labelOverlap=True, labelFlush=False, grid=False))  # fmt: skip
    tooltip = _tooltip("setting", "text", "parameters", "n")
    layers = []
    for offset in sorted(set(aside)):  # an offset is a constant of a mark: settings that stand apart are layers apart
        base = alt.Chart().transform_filter(f"datum.aside === {offset}").encode(x=x, tooltip=tooltip)
        here = [row for row in data if row["aside"] == offset]
        if any(row["low"] is not None and not row["below"] for row in here):
            bars = base.transform_filter("isValid(datum.low) && !datum.below")
            bars = bars.mark_rule(strokeWidth=2, clip=True, xOffset=offset)
            layers.append(bars.encode(y=alt.Y("low:Q", **y), y2="high:Q", color=_colour_scale(arms)))
        above = base.transform_filter("!datum.below").mark_point(size=95, filled=True, opacity=1, xOffset=offset)
        layers.append(above.encode(y=alt.Y("shown:Q", **y), color=_colour_scale(arms), shape=_shape_scale(arms),
                                   fillOpacity=_hollow_for_second()))  # fmt: skip
        if any(row["below"] for row in here):
            below = base.transform_filter("datum.below").encode(y=alt.Y("shown:Q", **y), color=_colour_scale(arms))
            layers.append(below.mark_point(shape="triangle-down", size=95, filled=True, opacity=1, xOffset=offset))
            layers.append(below.mark_text(dy=-14, xOffset=offset).encode(text="text:N", color=alt.value(INK)))
    specification = _specification(alt.layer(*layers, data=alt.NamedData("rows")), HEIGHT, rows=data)
    caption = [f"Means over seeds of the final runs, with their 95 % t interval{_none_for_one(arms)}."]
    if any(aside):
        caption.append("Settings with nearly the same number of parameters stand side by side.")
    if any(row["below"] for row in data):
        caption.append(f"The axis is cut below {floor:.0f}: an arrow at the foot is a score below, which is written there.")
    told = "; ".join(f"{arm.setting} {score} with {count:,} parameters" for arm, count, score in found)
    columns = ("setting", "n", "active and head parameters", f"{split} score ({metric})")
    rows = tuple((arm.setting, score.n, count, score) for arm, count, score in found)
    table = Table("score-parameters", "Score and parameters", columns, rows, ())
    panel = Panel("", f"Score against active parameters: {told}.", specification)
    return Chart("score-parameters", "Score against active parameters", tuple(caption), (panel,), table)


def _none_for_one(arms: Sequence[Arm]) -> str:
    return " (one seed has none)" if any(len(arm.scores) == 1 for arm in arms) else ""


def _side_by_side(counts: Sequence[int], near: float = 1.25, gap: int = 12) -> list[int]:
    """Pixels by which each point is moved, so that neighbours within a factor `near` do not cover each other."""
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
    """Selection score against learning rate; the best filled, failures and what lies far below at the foot."""
    import altair as alt

    arms = [arm for arm in study.arms if len(arm.grid) > 1]
    scores = {arm.setting: {rate: rate_score(runs) for rate, runs in arm.grid.items()} for arm in arms}
    known = [score for found in scores.values() for score in found.values() if score is not None]
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
    y = alt.Y("shown:Q", title=f"{study.metric} on the {result.selection_split} split", scale=_near(known))
    base = alt.Chart(alt.NamedData("rows")).encode(x=x, y=y, color=_colour_scale(arms))
    tooltip = [*_tooltip("setting"), alt.Tooltip("rate:Q", format="~e"), alt.Tooltip("score:Q", format=".2f"), *_tooltip("n")]
    dash = alt.StrokeDash("turn:O", scale=alt.Scale(domain=list(range(len(DASHES))), range=list(DASHES)), legend=None)
    shapes = _shape_scale(arms)
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
        lost = alt.Chart(alt.NamedData("lost")).encode(x=x, y=alt.Y("foot:Q", scale=None), color=_colour_scale(arms))
        layers.append(lost.mark_point(shape=CROSS, size=60, filled=True, opacity=1).encode(tooltip=_tooltip(
            "setting", "rate", "outcome")))  # fmt: skip
    specification = _specification(alt.layer(*layers), HEIGHT, rows=points, lost=failures)
    caption = ["Mean selection score of each rate that was tried; filled: the best, which the final runs use."]
    if any(row["early"] for row in points):
        caption.append("Pale: given up before the last rung of the sweep, and so trained shorter than the others.")
    if failures:
        caption.append("A cross at the foot: every run at that rate failed.")
    if any(row["below"] for row in points):
        caption.append(f"The axis is cut below {floor:.0f}: what lies there stands at the foot, with its score.")
    told = "; ".join(
        f"{arm.setting} {best.score:.2f} at {rate_text(best.rate)}{', the edge of its grid' if best.at_edge else ''}"
        for arm in arms
        if (best := best_rate(arm))
    )
    panel = Panel("", f"Selection score against learning rate. Best: {told}.", specification)
    return Chart("rates", "Score against learning rate", tuple(caption), (panel,), table)


# --- ranks ---------------------------------------------------------------------------------------------------------


def rank_map(study: Study, table: Table | None) -> RankChart | None:
    """Layer x module, the active rank in each cell, of one setting, seed and training step at a time."""
    import altair as alt

    arms = [arm for arm in study.arms if arm.has_ranks]
    histories = {arm.setting: {run.config.seed: _states(run) for run in arm.of("completed")} for arm in arms}
    histories = {setting: {seed: states for seed, states in runs.items() if states} for setting, runs in histories.items()}
    arms = [arm for arm in arms if histories[arm.setting]]
    if not arms:
        return None
    every = [states for runs in histories.values() for states in runs.values()]
    sites = site_order(site for states in every for ranks in states.values() for site in ranks)
    labels = module_labels(sites)
    numbers = {split_site(site)[1] for site in sites}
    layers = [str(number) for number in sorted(numbers - {None})] + (["none"] if None in numbers else [])
    kinds = list(dict.fromkeys(labels[site] for site in sites))
    top = max((rank.nominal for arm in arms for rank in mean_ranks(arm).values()), default=0) or 1
    changing = sum(len(states) > 1 for states in every)
    most = max(2, min(MOST_STATES, MOST_NUMBERS // max(changing * len(sites), 1)))

    data, choices, thinned = [], [], []
    for number, arm in enumerate(arms):
        seeds, runs = tuple(histories[arm.setting]), list(histories[arm.setting].values())
        recorded = sorted({step for states in runs for step in states})
        steps = _thinned(recorded, most)
        if len(steps) < len(recorded):
            thinned.append(f"{arm.setting} {len(steps)} of {len(recorded)}")
        shown = [[_at(states, step) for step in steps] for states in runs]
        totals = tuple(tuple(sum(ranks.values()) for ranks in states) for states in shown)
        choices.append(Choice(arm.setting, seeds, tuple(steps), totals))
        if all(states == shown[0] for states in shown):
            shown = shown[:1]  # every seed alike: written once
        for seed, states in enumerate(shown):
            for site in sites:
                if site in states[-1]:
                    ranks_there = [ranks.get(site, 0) for ranks in states]
                    layer = split_site(site)[1]
                    data.append({"m": number, "s": seed if len(shown) > 1 else -1, "k": labels[site],
                                 "l": "none" if layer is None else str(layer), "r": ranks_there})  # fmt: skip
    start = next((i for i, choice in enumerate(choices) if len(choice.steps) > 1), 0)
    chosen = [alt.param(name="chosen_setting", value=start), alt.param(name="chosen_seed", value=-1),
              alt.param(name="chosen_state", value=len(choices[start].steps) - 1)]  # fmt: skip
    base = (
        alt.Chart(alt.NamedData("rows"))
        .transform_filter(
            "datum.m === chosen_setting && (datum.s < 0 || chosen_seed < 0 || datum.s === chosen_seed)"
        )
        .transform_calculate(now="datum.r[min(chosen_state, length(datum.r) - 1)]")
        .transform_aggregate(rank="mean(now)", groupby=["l", "k"])
        .transform_calculate(
            top=str(float(top)), text="format(datum.rank, abs(datum.rank - round(datum.rank)) < 0.05 ? '.0f' : '.1f')"
        )
        .encode(
            x=alt.X("l:O", sort=layers, scale=alt.Scale(domain=layers), title="layer", axis=_bare_axis(labelAngle=0)),
            y=alt.Y("k:N", sort=kinds, scale=alt.Scale(domain=kinds), title=None, axis=_bare_axis(labelLimit=170)),
            tooltip=[alt.Tooltip("k:N", title="module"), alt.Tooltip("l:O", title="layer"),
                     alt.Tooltip("text:N", title="active rank")],
        )
    )  # fmt: skip
    shade = alt.Color("rank:Q", scale=alt.Scale(domain=[0, top], scheme="yellowgreenblue"),
                      legend=alt.Legend(title="active rank", orient="bottom", gradientLength=180, titleFontWeight="normal",
                                        titleFontSize=12, titleOrient="top", values=[0, top / 2, top]))  # fmt: skip
    letters = alt.condition(ENOUGH_CONTRAST, alt.value("white"), alt.value(INK))
    room = f"width / {len(layers)}"
    drawing = alt.layer(
        base.mark_rect(stroke="white", strokeWidth=1.5).encode(color=shade),
        base.mark_text(fontSize=alt.expr(f"min(12.5, {room} / 2.6)"), opacity=alt.expr(f"{room} < 14 ? 0 : 1")).encode(
            text="text:N", color=letters
        ),
    ).add_params(*chosen)
    specification = _specification(drawing, 32 * len(kinds), rows=data)
    ends = ", ".join(f"{c.setting} {decimal(sum(t[-1] for t in c.totals) / len(c.totals))}" for c in choices)
    told = (
        f"Heat map of active ranks, {len(kinds)} kinds of modules by {len(layers)} layers. Total after training, mean over "
        f"seeds: {ends}. The table of ranks below holds the end state of every site."
    )
    caption = [
        "Shown at first: the state after the last step, the mean over seeds if there are several; the controls choose others."
    ]
    if thinned:
        caption.append(f"The slider holds at most {most} states of a history: {', '.join(thinned)} recorded steps.")
    panel = Panel("", told, specification, widest=240 + 76 * max(len(layers), 4))
    title = "Active rank of each layer and module"
    return RankChart("rank-map", title, tuple(caption), (panel,), table, tuple(choices), start)


def budget(study: Study) -> Chart | None:
    """Active ranks of all sites together against the schedule, over steps; a panel a setting that has a schedule."""
    import altair as alt

    panels, columns, at = [], ["step"], {}
    for arm in study.arms:
        runs = [{row.step: row for row in run.rank_history} for run in arm.of("completed") if run.rank_history]
        if not any(row.budget is not None for run in runs for row in run.values()):
            continue
        steps = sorted({step for run in runs for step in run})
        rows = [_budget_row(step, [_at(run, step) for run in runs]) for step in _thinned(_turning(runs, steps), MOST_STATES)]
        for row in rows:
            at.setdefault(row["step"], {})[arm.setting] = row
        columns += [f"{arm.setting}, active", f"{arm.setting}, schedule"]
        x = alt.X("step:Q", title="step", scale=alt.Scale(domain=[0, steps[-1]], nice=False),
                  axis=alt.Axis(grid=False, tickCount=5))  # fmt: skip
        label = {"title": "ranks, all sites together", "scale": alt.Scale(zero=True)}
        tooltip = [alt.Tooltip("step:Q"), alt.Tooltip("active:Q", format=",.4~f"), alt.Tooltip("schedule:Q", format=",")]
        base = alt.Chart().encode(x=x)
        tint = colour(arm.method)
        layers = [
            base.mark_area(interpolate="step-after", color=tint, opacity=0.2).encode(y=alt.Y("low:Q", **label), y2="high:Q"),
            base.mark_line(interpolate="step-after", color=tint, strokeWidth=3).encode(y=alt.Y("active:Q", **label)),
            base.mark_line(interpolate="step-after", color=INK, strokeWidth=1.2, strokeDash=[5, 3]).encode(
                y=alt.Y("schedule:Q", **label)
            ),
            base.mark_point(opacity=0, size=200).encode(y=alt.Y("active:Q", **label), tooltip=tooltip),
        ]
        if any(row["live"] not in (None, row["active"]) for row in rows):
            live = base.mark_line(interpolate="step-after", color=FAINT, strokeWidth=1)
            layers.insert(1, live.encode(y=alt.Y("live:Q", **label)))
        specification = _specification(alt.layer(*layers, data=alt.NamedData("rows")), 200, rows=rows)
        first, last = rows[0], rows[-1]
        end = next(row["schedule"] for row in reversed(rows) if row["schedule"] is not None)
        told = f"{arm.setting}: active ranks from {decimal(first['active'])} at step {first['step']:,} to " + (
            f"{decimal(last['active'])} at step {last['step']:,}; the schedule ends at {end:,}."
        )
        panels.append(Panel(arm.setting, told, specification, widest=560))
    if not panels:
        return None
    rows = []
    for step in sorted(at):
        cells = [at[step].get(name.heading) for name in panels]
        rows.append((f"{step:,}", *(value for row in cells for value in _pair(row))))
    caption = (
        "Coloured: active ranks, the mean over seeds (band: lowest to highest seed); dashed: the schedule; "
        "thin and grey, where it differs: triplets that are not zero.",
    )
    table = Table("budget", "Ranks of all sites together", tuple(columns), tuple(rows), (), text_columns=0)
    return Chart("budget", "Rank budget against its schedule", caption, tuple(panels), table)


def _budget_row(step: int, rows: Sequence[RankStep]) -> dict:
    active = [row.active for row in rows]
    live = [row.live for row in rows]
    return {"step": step, "active": sum(active) / len(active), "low": min(active), "high": max(active),
            "live": sum(live) / len(live) if all(live) else None,
            "schedule": next((row.budget for row in rows if row.budget is not None), None)}  # fmt: skip


def _pair(row: dict | None) -> tuple[str | None, int | None]:
    return (None, None) if row is None else (decimal(row["active"]), row["schedule"])


def _turning(runs: Sequence[dict[int, RankStep]], steps: Sequence[int]) -> list[int]:
    """The steps at which anything of the curves is new, the first and the last among them."""

    def seen(step: int) -> list[tuple]:
        return [(row.active, row.live, row.budget) for row in (_at(run, step) for run in runs)]

    return [steps[0], *(b for a, b in pairwise(steps) if seen(a) != seen(b) or b == steps[-1])]


def _states(run: Run) -> dict[int, dict[str, int]]:
    """Step -> ranks, the steps at which they changed and the last; the end alone where no history was written."""
    rows = {row.step: row.ranks for row in run.rank_history}
    if not rows:
        return {run.result.steps or 0: run.result.ranks} if run.result.ranks else {}
    steps = sorted(rows)
    changes = [steps[0], *(b for a, b in pairwise(steps) if rows[a] != rows[b])]
    if len(changes) == 1:
        return {steps[-1]: rows[steps[-1]]}
    return {step: rows[step] for step in dict.fromkeys([*changes, steps[-1]])}


def _at(states: dict, step: int):
    """What held at a step: the newest state that is not later, or the first."""
    return states[max((s for s in states if s <= step), default=min(states))]


def _thinned(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of the steps, evenly by their place, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


# --- what they share -----------------------------------------------------------------------------------------------


def _specification(chart, height: int, **datasets: list[dict]) -> dict:
    """As wide as its place on the page; the page's one configuration is given when it is drawn.

    The data are put in afterwards, by the names that the chart gives them: Altair would look at each number.
    """
    sized = chart.properties(width="container", height=height, autosize={"type": "fit-x", "contains": "padding"})
    specification = sized.to_dict()
    del specification["$schema"], specification["config"]
    return specification | {"datasets": {name: rows for name, rows in datasets.items() if rows}}


def _colour_scale(arms: Sequence[Arm], legend: bool = True):
    import altair as alt

    scale = alt.Scale(domain=[arm.setting for arm in arms], range=[colour(arm.method) for arm in arms])
    return alt.Color("setting:N", scale=scale, legend=_legend(arms) if legend else None)


def _shape_scale(arms: Sequence[Arm], legend: bool = True):
    import altair as alt

    scale = alt.Scale(domain=[arm.setting for arm in arms], range=[SHAPES.get(arm.method, "circle") for arm in arms])
    return alt.Shape("setting:N", scale=scale, legend=_legend(arms) if legend else None)


def _legend(arms: Sequence[Arm]):
    """Below, in as many columns as there is room for."""
    import altair as alt

    entry = 34 + 7 * min(max(len(arm.setting) for arm in arms), 26)  # px
    return alt.Legend(orient="bottom", title=None, columns=alt.expr(f"max(1, floor(width / {entry}))"), labelLimit=180)


def _hollow_for_second():
    """The second setting of a method is hollow, for they share shape and colour."""
    import altair as alt

    return alt.FillOpacity("turn:O", scale=alt.Scale(domain=[0, 1, 2, 3], range=[1, 0, 0.5, 0.25]), legend=None)


def _tooltip(*names: str) -> list:
    import altair as alt

    titles = {"text": "value"}
    return [alt.Tooltip(f"{name}:{'N' if name in ('setting', 'text', 'verdict', 'outcome') else 'Q'}",
                        title=titles.get(name, name)) for name in names]  # fmt: skip


def _bare_axis(**more):
    import altair as alt

    return alt.Axis(ticks=False, domain=False, grid=False, **more)


def _near(means: Sequence[float], lows: Sequence[float] = (), highs: Sequence[float] = ()):
    """The range of an axis of scores, with some air; what lies far below the best is cut off, see `floor_of`."""
    bottom, top = floor_of([*lows, *means]), max([*highs, *means])
    bottom = max(bottom, floor_of(means)) if floor_of(means) > min(means) else bottom
    return _with_air(bottom, top)


def _with_air(bottom: float, top: float):
    import altair as alt

    air = 0.08 * (top - bottom) or 0.5
    return alt.Scale(domain=[bottom - air, top + air], nice=False, zero=False)
