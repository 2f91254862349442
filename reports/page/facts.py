"""How each number was made: runs, troubles, devices, versions and settings, as text that both pages escape for themselves.

Made from numbers and settings alone: no text of a corpus and no traceback is in it.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from rankwise.experiments import config
from rankwise.experiments.records import STUDY_FILE
from rankwise.reports.results import Study
from rankwise.reports.tables.cells import error_text, rate_text


def counts(study: Study) -> str:
    """ "37 runs: 35 completed, 1 failed, 1 unfinished"."""
    count = Counter(run.status for run in study.runs)
    total = sum(count.values())
    return f"{total} run{'s' if total > 1 else ''}: " + ", ".join(f"{count[name]} {name}" for name in sorted(count))


def troubles(study: Study) -> list[str]:
    """A line for each run that failed, was cut off, or skipped steps."""
    lines = []
    for run in study.runs:
        c = run.config
        name = f"{c.setting}, {c.phase}, rate {rate_text(c.learning_rate)}, seed {c.seed}"
        if run.result and run.result.status == "failed":
            after = f" after {run.result.steps:,} steps" if run.result.steps else ""
            lines.append(f"{name}: failed{after}: {error_text(run.result.error)}")
        elif run.result is None:
            last = run.train[-1].step if run.train else 0
            lines.append(f"{name}: unfinished, {last:,} steps written; the same `rankwise compare` goes on with it")
        elif run.result.skipped_steps:
            lines.append(f"{name}: completed, {run.result.skipped_steps} steps skipped (not finite)")
        lines += run.notes
    return lines


def places(study: Study) -> list[tuple[str, str]]:
    """Where and with what the runs were made; every value that occurs, with its count where there are several."""
    configs = [run.config for run in study.runs]
    results = study.results()
    names = dict.fromkeys(name for config in configs for name in config.versions)
    versions = "; ".join(f"{name} {_each(c.versions.get(name) for c in configs)}" for name in names)
    commits = [f"{(c.commit or 'unknown')[:12]}{' with changes' if c.dirty else ''}" for c in configs]
    devices = [f"{c.device} ({c.device_name})" if c.device_name else c.device for c in configs]
    facts = [
        ("Commit", _each(commits)),
        ("Versions", versions),
        ("Device", _each(devices)),
        ("Threads", _each(c.threads for c in configs)),
        ("Precision of the frozen weights", _each(c.precision for c in configs)),
        ("Runs trained together in a pack", _each(r.pack_size for r in results)),
        ("Packing", _each(r.packing_note for r in results if r.packing_note)),
        ("Dropout", _each(r.dropout_note for r in results if r.dropout_note)),
    ]
    return [(label, values) for label, values in facts if values]


def reproduce(studies: Sequence[Study]) -> str:
    """One line: the command, the commits of the runs, and the hash of the data that they were made with."""
    commands = list(dict.fromkeys(_command(study) for study in studies))
    configs = [run.config for study in studies for run in study.runs]
    commits = _each(f"{(c.commit or 'unknown')[:12]}{' with changes' if c.dirty else ''}" for c in configs)
    data = dict.fromkeys(f"{c.task} {(c.data_hash or 'unknown')[:12]}" for c in sorted(configs, key=lambda c: c.task))
    return f"{'; '.join(commands)}. Commit of the runs: {commits}. Hash of the data: {', '.join(data)}."


def _command(study: Study) -> str:
    """What makes a study's runs and its report again."""
    beside, shipped = study.folder / STUDY_FILE, config.shipped().get(study.name)
    if shipped is not None and study.searched and not (beside.is_file() and beside.read_bytes() != shipped.read_bytes()):
        return f"rankwise tune {study.name}"
    if shipped is not None and not (beside.is_file() and beside.read_bytes() != shipped.read_bytes()):
        return f"rankwise compare {study.name}{_narrowed(study.whole or study, config.read(shipped))}"
    if study.searched and beside.is_file():
        return f"rankwise tune {STUDY_FILE} (the file beside the runs)"
    if beside.is_file():
        return f"rankwise compare {STUDY_FILE} (the file beside the runs)"
    if (config.PAPERS / f"{study.name}.toml").is_file():
        return f"rankwise paper {study.name}"
    return f"the file of the study {study.name} is not kept beside its runs; rankwise report makes this page of them"


def _narrowed(study: Study, shipped: config.Study) -> str:
    """The options that leave of a shipped study what these runs are of."""
    finals = [run.config for run in study.runs if run.config.phase == "final"]
    options = ""
    if (
        (seeds := set(study.seeds) or {c.seed for c in finals})
        and seeds != set(shipped.seeds)
        and seeds == set(range(len(seeds)))
    ):
        options += f" --seeds {len(seeds)}"
    for option, there, all_of in (
        ("methods", set(study.settings), [entry.label for entry in shipped.methods]),
        ("tasks", {c.task for c in finals}, shipped.tasks),
    ):
        if there and not there >= set(all_of):
            options += f' --{option} "{",".join(name for name in all_of if name in there)}"'
    return options


def _each(values: Iterable[object]) -> str:
    count = Counter("unknown" if value is None else str(value) for value in values)
    if len(count) == 1:
        return next(iter(count))
    return ", ".join(f"{value} ({n} runs)" for value, n in sorted(count.items()))


def settings(study: Study) -> list[tuple[str, str, str, str]]:
    """(setting, method, targets, its settings as JSON or "") of each setting."""
    rows = []
    for arm in study.arms:
        config = next(run.config for run in (*arm.final, *(r for runs in arm.grid.values() for r in runs)))
        targets = config.targets if isinstance(config.targets, str) else _json(config.targets) if config.targets else "-"
        sites = f" ({len(config.targets_resolved)} sites)" if config.targets_resolved else ""
        rows.append((arm.setting, arm.method, targets + sites, _json(config.method_settings)))
    return rows


def training(study: Study) -> list[tuple[str, str]]:
    """(phase, its training settings as JSON); more than one line of a phase says that its runs differ."""
    lines: dict[tuple[str, str], None] = {}
    for run in sorted(study.runs, key=lambda run: run.config.phase):
        if run.config.training:
            lines[run.config.phase, _json(run.config.training)] = None
    return list(lines)


def slug(study: Study) -> str:
    """A part's name for files and anchors."""
    return file_name("-".join((study.name, study.task, study.model.split("/")[-1]))).lower()


def file_name(words: str) -> str:
    """A part of a file's name, whatever the words are: names come out of files, and none leads out of the report's folder."""
    return "".join(char if char.isalnum() or char in "_-" else "-" for char in words)


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False) if value else ""
