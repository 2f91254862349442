"""What all committed studies say together: one table of their results, and the record page.

    rankwise analysis results        (writes reports/results.csv and reports/record.md from reports/studies/)

Both are made from the archives by the code that makes reports; a test holds them to each other.
"""

from collections.abc import Sequence
from pathlib import Path

from rankwise.experiments.files import write_file
from rankwise.reports.results import Arm, Study, is_study, load_all
from rankwise.reports.tables.cells import Cell, Difference, Estimate, rate_text
from rankwise.reports.tables.summaries import difference_to, estimate, parameters
from rankwise.reports.tables.table import Table
from rankwise.reports.verdicts import Verdict, verdicts

STUDIES = Path(__file__).parent / "studies"
TASK, PARAMETERS = "glue/stsb", 165_888  # what the record is of: LoRA's budget at rank 4 on MiniLM-L6
ROOM = 0.005  # of the budget
CONTROLS = ("none", "uniform", "random")  # allocations that place nothing


def studies(folder: Path = STUDIES) -> list[Study]:
    """Every study below a folder, by its path."""
    places = sorted(path for path in (folder, *folder.rglob("*")) if path.is_dir() and path.name != "runs" and is_study(path))
    return [study for place in places for study in load_all(place)]


def results_table(found: Sequence[Study]) -> Table:
    """A row for each setting of each task of each study."""
    rows = []
    for part in (part for study in found for part in study.parts()):
        given = {verdict.setting: verdict for verdict in verdicts(part)}
        rows += [_row(part, arm, given.get(arm.setting)) for arm in part.arms if arm.scores]
    columns = (
        "study", "task", "model", "setting", "method", "quick look", "steps", "rate", "score", "metric", "trainable", "active",
        "head", "reference", "difference", "verdict", "p", "p over the study",
    )  # fmt: skip
    return Table("results", "Results of all committed studies", columns, tuple(rows), (), text_columns=6)


def _row(part: Study, arm: Arm, verdict: Verdict | None) -> tuple[Cell, ...]:
    reference = part.reference_arm
    score: Estimate | None = estimate(arm.scores.values())
    difference: Difference | None = None if verdict is None or reference is None else difference_to(arm, reference)
    steps = sorted({result.total_steps or 0 for result in arm.completed})
    cells = (
        part.name, part.task, part.model, arm.setting, arm.method, str(part.quick).lower(), "/".join(map(str, steps)),
        rate_text(arm.rate), score, part.metric, *parameters(arm), None if verdict is None else verdict.reference, difference,
        None if verdict is None else verdict.kind, *((None, None) if verdict is None else (verdict.p, verdict.p_study)),
    )  # fmt: skip
    return tuple(map(_rounded, cells))


def record_page(found: Sequence[Study]) -> str:
    """record.md: the best placement of rank at one budget on one task, by the verdicts of its own study."""
    tried = [
        (part, arm, verdict)
        for study in found
        if not study.quick
        for part in study.parts()
        if part.task == TASK and _is_uniform(part.reference_arm)
        for verdict in verdicts(part)
        for arm in part.arms
        if arm.setting == verdict.setting and not arm.allocations & set(CONTROLS) and _fits(arm)
    ]
    won = sorted((one for one in tried if one[2].kind == "better"), key=lambda one: -one[2].mean)
    columns = ("placement", "study", "mean score", "difference to uniform", "n", "verdict")
    head = Table("record", "The record", columns, tuple(map(_entry, won[:1])) or (("none yet", *(None,) * 5),), (), 2)
    rest = Table("tried", "What was tried", columns, tuple(map(_entry, tried)), (), 2)
    lines = [
        "# The record: where to put rank",
        f"The best placement at {PARAMETERS:,} active parameters (the head not counted) on {TASK}: a setting within that "
        "budget which its study's own verdict calls better than the uniform allocation: LoRA with the same rank everywhere, "
        "trained beside it. Of several the one with the largest difference. "
        f"More than {100 * ROOM:g} % above the budget is not taken.",
        head.markdown(),
        "## What was tried",
        rest.markdown() if tried else "Nothing yet.\n",
        "## Enter it",
        f"Write a study with LoRA as its reference and your placement beside it, a method or `ranks_of` with `[budget] equal = "
        f'"parameters"` and `parameters = {PARAMETERS}`, or LoRA with a `rank_pattern` of as many. The referee is the verdict '
        "code (`reports/verdicts.py`): paired seeds, a tuned rate for each setting, corrected tests.",
        "```sh\nrankwise compare my-study.toml\nrankwise report runs/my-study --with-runs --out reports/studies/my-study\n"
        "rankwise analysis results\n```",
        "Made by `rankwise analysis results` from the archives in `reports/studies/`; `reports/results.csv` has every setting "
        "of every study.",
    ]
    return "\n\n".join(line.rstrip("\n") for line in lines) + "\n"


def _is_uniform(reference: Arm | None) -> bool:
    """Whether this is the uniform allocation that the record is taken from."""
    if reference is None or reference.method != "lora" or not reference.allocations <= {"uniform", "given"}:
        return False
    active = parameters(reference)[1]
    return active is not None and abs(active - PARAMETERS) <= ROOM * PARAMETERS


def _fits(arm: Arm) -> bool:
    active = parameters(arm)[1]
    return active is not None and active <= (1 + ROOM) * PARAMETERS


def _rounded(cell: Cell) -> Cell:
    """To four decimals: the last digits of a sum are not the same on every processor."""
    if isinstance(cell, float):
        return round(cell, 4)
    if isinstance(cell, Estimate):
        numbers = (cell.mean, cell.low, cell.high, cell.sd)
        return type(cell)(*(None if number is None else round(number, 4) for number in numbers), cell.n)
    return cell


def _entry(one: tuple[Study, Arm, Verdict]) -> tuple[Cell, ...]:
    part, arm, verdict = one
    difference = None if verdict.mean is None else Difference(verdict.mean, verdict.low, verdict.high, None, verdict.n)
    return arm.setting, part.name, estimate(arm.scores.values()), difference, verdict.n, verdict.kind


def write(folder: Path = STUDIES, out: Path = STUDIES.parent) -> tuple[Path, Path]:
    """results.csv and record.md of the studies below a folder; their paths."""
    found = studies(folder)
    paths = out / "results.csv", out / "record.md"
    write_file(paths[0], results_table(found).csv())
    write_file(paths[1], record_page(found))
    return paths
