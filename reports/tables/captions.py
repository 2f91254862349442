"""Captions: what limits a study, what was equal in it, and warnings.

A number never stands alone: n, interval, parameters, memory and time are in its row, what was equal and what was not in
the caption.
"""

from rankwise.experiments.search_space import Searched
from rankwise.reports.results import Arm, Study, best_rate
from rankwise.reports.tables.cells import bytes_text, rate_text
from rankwise.reports.tables.summaries import parameters, scales, splits, status_text
from rankwise.reports.verdicts import budget_reached, test_set_error, verdicts, warnings
from rankwise.variants.adapter.kinds.scheme import Scheme

QUICK = (
    "A quick look, no fair comparison: rates fixed or hardly tuned, and too few seeds for a claim. "
    "A fair study tunes the rate of every method on the same kind of grid and repeats each over seeds."
)
ONE_SEED = "n = 1 has no interval, and one seed supports no claim."
QUANTISED = "The base is quantised to "
UNEQUAL = 0.005  # relative; budgets of parameters that differ by more are not called equal


def alarms(study: Study) -> list[str]:
    """What keeps the study from being a fair or a whole comparison."""
    incomplete = study.complete is False or any(run.status == "unfinished" for run in study.runs)
    return [
        *([QUICK] if study.quick else []),
        *(["The study is not complete: runs that it names are missing here."] if incomplete else []),
    ]


def task_caption(study: Study) -> list[str]:
    """What the task of a study, or the study itself, asks to be said beside every number."""
    of_task = dict.fromkeys(line for run in study.runs for line in run.config.caption)
    said = of_task or study.captions  # a study's own captions are of all its tasks
    return [*(line for line in said if not line.startswith(QUANTISED)), *_quantised_sentences(study)]


def _quantised_sentences(study: Study) -> list[str]:
    """From the forms of the runs' bases.

    Runs of before hold such a sentence in their own caption, which names only the settings that were asked for with them.
    """
    forms: dict[Scheme, dict[str, None]] = {}
    for run in study.runs:
        if (form := Scheme.of_fact(run.config.quantization)) is not None:
            forms.setdefault(form, {})[run.config.setting] = None
    return [f"{QUANTISED}{form} for {', '.join(settings)}." for form, settings in forms.items()]


def comparison_caption(study: Study) -> list[str]:
    arms = study.arms
    selection, split = splits(study)
    n = sorted({len(arm.scores) for arm in arms if arm.scores})
    caption = [*alarms(study), *task_caption(study)]
    if n:
        seeds = str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}"
        caption.append(
            f"Scores are points on the {split} split; n = {seeds} seed{'s' if n != [1] else ''}; "
            + _rate_words(study, arms, selection)
        )
        if n[-1] > 1:
            caption.append(
                "+- is the half-width of the 95 % t interval over seeds; differences are paired by seed, "
                "with their 95 % paired t interval in brackets."
            )
        if n[0] == 1:
            caption.append(ONE_SEED)
    caption += warnings(study)
    caption += [_search_sentence(setting, one, selection) for setting, one in study.searched.items()]
    caption += _seed_sentences(study)
    caption += _planned_budget(study)
    caption += _budget_sentences(arms)
    caption += edge_sentences(arms)
    caption += _place_sentences(arms)
    sizes = sorted({result.pack_size for arm in arms for result in arm.completed})
    if sizes and sizes[-1] > 1:
        caption.append(
            "(pack of k): k runs shared the frozen model; the time is a k-th of the pack's, the memory all of it, "
            "and neither is to be compared with that of a run alone."
        )
    failed = [f"{arm.setting} {status_text(arm)}" for arm in arms if arm.of("failed")]
    if failed:
        caption.append(f"Scores are of the completed runs only, where some failed: {'; '.join(failed)}.")
    return caption


def _search_sentence(setting: str, one: Searched, selection: str) -> str:
    return (
        f"{setting}: rank, scale, rate and targets of {one.entry}, found by a search of {one.runs} runs on the {selection} "
        f"split with other seeds; no score of the search is shown. What is compared are these two configurations: another "
        f"search may find another, and a reference with as many runs to choose from may be better."
    )


def _rate_words(study: Study, arms: list[Arm], selection: str) -> str:
    tuned = [arm.setting for arm in arms if len(arm.grid) > 1 or arm.setting in study.searched]
    if not tuned:
        return "rates were fixed beforehand, not tuned."
    if len(tuned) == len(arms):
        return f"rates were chosen on the {selection} split alone."
    return f"only {', '.join(tuned)} had a choice of rates, made on the {selection} split alone."


def _seed_sentences(study: Study) -> list[str]:
    """The smallest detectable differences, and the standard error of a score on so few test rows."""
    sentences = []
    given = verdicts(study)
    detectable = [f"{v.setting} {v.smallest:.2f}" for v in given if v.smallest is not None]
    if detectable:
        sentences.append(
            f"Smallest detectable difference to {given[0].reference} (80 % of the time, at the level that the family asks of "
            f"its first comparison): {', '.join(detectable)}."
        )
    errors = {arm.setting: test_set_error(arm) for arm in study.arms}
    if known := {setting: error for setting, error in errors.items() if error is not None}:
        rows = next(iter(known.values()))[1]
        each = ", ".join(f"{setting} {error:.2f}" for setting, (error, _) in known.items())
        sentences.append(f"Standard error of one score from the number of test rows alone ({rows:,} scored): {each} points.")
    return sentences


def _planned_budget(study: Study) -> list[str]:
    """The budget that the study's file makes equal, where it is not steps. What the runs came to is said apart."""
    wanted = study.budget.get("equal", "steps")
    if wanted == "parameters":
        own = " where an entry says nothing else" if study.cells else ""
        return [
            f"The budget of each low-rank setting is {study.budget['parameters']:,} active parameters, the head not counted, "
            f"at alpha/r = {study.budget['scale']:g}{own}: its ranks follow from it."
        ]
    if wanted == "time":
        return ["Equal in training time: each setting has as many steps as fit into the reference's time, by measured steps."]
    if wanted == "memory":
        return [
            f"Equal in memory: no training step may need more than {bytes_text(study.budget['bytes'])}, in micro-batches where "
            "it would."
        ]
    return []


def _budget_sentences(arms: list[Arm]) -> list[str]:
    """What was equal: steps, and among the low-rank settings active parameters and scale."""
    sentences = []
    steps = {arm.setting: sorted({result.total_steps or 0 for result in arm.completed}) for arm in arms if arm.completed}
    distinct = {tuple(value) for value in steps.values()}
    if len(distinct) == 1 and len(next(iter(distinct))) == 1:
        sentences.append(f"Equal in steps: {next(iter(distinct))[0]:,} optimizer steps each.")
    elif steps:
        each = ", ".join(f"{setting} {'/'.join(f'{n:,}' for n in value)}" for setting, value in steps.items())
        sentences.append(f"Not equal in steps: {each}.")
    low_rank = [arm for arm in arms if arm.has_ranks]
    active = {arm.setting: parameters(arm)[1] for arm in low_rank}
    active = {setting: count for setting, count in active.items() if count}
    if len(active) > 1:
        least, most = min(active, key=active.get), max(active, key=active.get)
        gap = active[most] / active[least] - 1
        each = ", ".join(f"{setting} {count:,}" for setting, count in active.items())
        if gap > UNEQUAL:
            sentences.append(
                f"Not equal in active parameters among the low-rank settings, {most} has {100 * gap:.1f} % more than "
                f"{least}: {each} (the head not counted)."
            )
        else:
            sentences.append(
                f"Equal in active parameters among the low-rank settings, within {100 * UNEQUAL:g} %: {each} "
                "(the head not counted)."
            )
    elif active:
        setting, count = next(iter(active.items()))
        sentences.append(f"Active parameters of {setting}, the head not counted: {count:,}.")
    by_scale = {arm.setting: tuple(f"{value:.3g}" for value in scales(arm)) for arm in low_rank}
    if len(set(by_scale.values())) > 1:
        each = ", ".join(f"{setting} {' to '.join((v[0], v[-1]) if len(v) > 1 else v)}" for setting, v in by_scale.items())
        sentences.append(f"Warning: scales (alpha/r) differ, which alone can make a difference: {each}.")
    unreached = [arm.setting for arm in low_rank if not budget_reached(arm)]
    if unreached:
        sentences.append(f"Warning: scored before its rank budget was reached: {', '.join(unreached)}.")
    return sentences


def _place_sentences(arms: list[Arm]) -> list[str]:
    """A warning where the runs of one table were made on several devices."""
    configs = [run.config for arm in arms for run in arm.of("completed")]
    places = sorted({f"{c.device_name or c.device}, {c.precision}, {c.threads} threads" for c in configs})
    if len(places) < 2:
        return []
    return [f"Warning: made in {len(places)} places, whose times and memory do not compare: {'; '.join(places)}."]


def edge_sentences(arms: list[Arm]) -> list[str]:
    edges = [arm.setting for arm in arms if (best := best_rate(arm)) and best.at_edge]
    sentences = []
    if edges:
        sentences.append(f"Best rate at the edge of its grid: no winner named ({', '.join(edges)}).")
    for arm in arms:
        best = best_rate(arm)
        if best and arm.rate is not None and arm.rate != best.rate:
            sentences.append(
                f"{arm.setting}: the final runs used {rate_text(arm.rate)}, but {rate_text(best.rate)} is the best rate now."
            )
    return sentences
