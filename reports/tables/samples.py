"""What each setting's model wrote for a few rows of the scored split, beside prompt and target."""

from rankwise.reports.results import Study
from rankwise.reports.tables.table import Table


def samples(study: Study) -> Table | None:
    """A line for each text: of every row the prompt, the target, and what the first seed of each setting wrote.

    None where no run has written any; a setting whose runs have none, or other rows, is left out.
    """
    runs = {arm.setting: next((run for run in arm.of("completed") if run.samples), None) for arm in study.arms}
    runs = {setting: run for setting, run in runs.items() if run is not None}
    if not runs:
        return None
    first = next(iter(runs.values()))
    rows = []
    for sample in first.samples:
        rows += [(str(sample.row), "prompt", _text(sample.prompt)), (str(sample.row), "target", _text(sample.target))]
        for setting, run in runs.items():
            same = (
                one for one in run.samples if (one.row, one.prompt, one.target) == (sample.row, sample.prompt, sample.target)
            )
            rows += [(str(sample.row), setting, _text(one.text)) for one in same]
    seeds = sorted({run.config.seed for run in runs.values()})
    of = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))} (each setting's first that completed)"
    caption = (
        f"What {of} wrote, greedily, for rows of the {first.result.split} split at equal distances; none was picked.",
        "Prompts are shown as the model reads them. The report holds these texts: look at them before you pass it on.",
    )
    return Table("samples", "Generated samples", ("row", "of", "text"), tuple(rows), caption, text_columns=3, is_quoted=True)


def _text(text: str) -> str:
    return text if text.strip() else "(nothing)"
