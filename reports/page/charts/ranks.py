"""Charts of ranks: the map with its controls, and the budget against its schedule."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rankwise.experiments.records import RankStep, Run
from rankwise.reports.figures.style import FAINT, INK, colour
from rankwise.reports.page.charts.parts import Chart, Panel, bare_axis, specification_of
from rankwise.reports.ranks.sites import module_labels, site_order, split_site
from rankwise.reports.results import Study
from rankwise.reports.tables.cells import decimal
from rankwise.reports.tables.summaries import mean_ranks
from rankwise.reports.tables.table import Table

MOST_STATES = 40  # steps of one rank history that the slider holds; a hand cannot choose among more
MOST_NUMBERS = 120_000  # ranks in one map: 0.3 MB of a page
ENOUGH_CONTRAST = "datum.rank / datum.top > 0.64"  # share of the colour scale (YlGnBu) above which letters are white


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
            shown = shown[:1]  # equal seeds are written once
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
            x=alt.X("l:O", sort=layers, scale=alt.Scale(domain=layers), title="layer", axis=bare_axis(labelAngle=0)),
            y=alt.Y("k:N", sort=kinds, scale=alt.Scale(domain=kinds), title=None, axis=bare_axis(labelLimit=170)),
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
    specification = specification_of(drawing, 32 * len(kinds), rows=data)
    ends = ", ".join(f"{c.setting} {decimal(sum(t[-1] for t in c.totals) / len(c.totals))}" for c in choices)
    description = (
        f"Heat map of active ranks, {len(kinds)} kinds of modules by {len(layers)} layers. Total after training, mean over "
        f"seeds: {ends}. The table of ranks below holds the end state of every site."
    )
    caption = [
        "Shown at first: the state after the last step, the mean over seeds if there are several; the controls choose others."
    ]
    if thinned:
        caption.append(f"The slider holds at most {most} states of a history: {', '.join(thinned)} recorded steps.")
    panel = Panel("", description, specification, widest=240 + 76 * max(len(layers), 4))
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
        specification = specification_of(alt.layer(*layers, data=alt.NamedData("rows")), 200, rows=rows)
        first, last = rows[0], rows[-1]
        end = next(row["schedule"] for row in reversed(rows) if row["schedule"] is not None)
        description = f"{arm.setting}: active ranks from {decimal(first['active'])} at step {first['step']:,} to " + (
            f"{decimal(last['active'])} at step {last['step']:,}; the schedule ends at {end:,}."
        )
        panels.append(Panel(arm.setting, description, specification, widest=560))
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
    """The steps at which any of the curves changes, with the first and the last step."""

    def seen(step: int) -> list[tuple]:
        return [(row.active, row.live, row.budget) for row in (_at(run, step) for run in runs)]

    return [steps[0], *(b for a, b in pairwise(steps) if seen(a) != seen(b) or b == steps[-1])]


def _states(run: Run) -> dict[int, dict[str, int]]:
    """Step -> ranks, at the steps where they changed and at the last; the end alone where no history was written."""
    rows = {row.step: row.ranks for row in run.rank_history}
    if not rows:
        return {run.result.steps or 0: run.result.ranks} if run.result.ranks else {}
    steps = sorted(rows)
    changes = [steps[0], *(b for a, b in pairwise(steps) if rows[a] != rows[b])]
    if len(changes) == 1:
        return {steps[-1]: rows[steps[-1]]}
    return {step: rows[step] for step in dict.fromkeys([*changes, steps[-1]])}


def _at(states: dict, step: int):
    """The state in force at a step: the latest one that is not after it, or the first."""
    return states[max((s for s in states if s <= step), default=min(states))]


def _thinned(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly spaced in the list, with the first and the last."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
