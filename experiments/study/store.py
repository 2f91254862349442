"""The folders of a study's runs: what is finished, and what is written of a run that is made."""

import datetime
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rankwise.experiments import archive, kinds, measure, models, records
from rankwise.experiments.files import write_file
from rankwise.experiments.records import read_object
from rankwise.experiments.study import splits
from rankwise.experiments.study.context import Context
from rankwise.experiments.study.plan import NUMERICS
from rankwise.experiments.study.runs import PlannedRun
from rankwise.experiments.training.pack import Outcome
from rankwise.variants.settings import method


def begun_in(out: Path) -> set[str]:
    """The precisions ("fp32", "bf16") of the runs under today's NUMERICS in a study's folder, finished or not.

    Raises:
        ValueError: the folder's archive is damaged.
    """
    folders = (read_object(path) for path in out.glob(f"*/{records.CONFIG}"))
    return _precisions(folders) | _precisions(_configs(archive.read(out / archive.NAME)))


def _configs(archived: Mapping[str, archive.Files]) -> Iterator[dict[str, Any] | None]:
    return (records.as_object(files[records.CONFIG]) for files in archived.values() if records.CONFIG in files)


def _precisions(configs: Iterable[Mapping[str, Any] | None]) -> set[str]:
    return {one["precision"] for one in configs if one and one.get("numerics") == NUMERICS and "precision" in one}


class RunStore:
    """Results of runs, by fingerprint, from the study's own folder and from the committed study.

    Args:
        retry_failed: a failed result of an earlier sitting counts as none.
    """

    def __init__(self, context: Context, retry_failed: bool):
        self.context, self.retry_failed = context, retry_failed
        self.foreign_versions: set[str] = set()  # of packages with which some finished runs were made
        self._ended_now: set[str] = set()  # fingerprints of runs that ended in this sitting, which are not tried again
        self._archived: dict[str, dict[str, bytes]] | None = None  # fingerprint -> files; None: not read yet

    # -- what is finished -------------------------------------------------------------------------------------------

    def result(self, run: PlannedRun) -> dict[str, Any] | None:
        """The run's result, from this folder or from the committed ones, which are copied here."""
        folder = self.context.out / run.fingerprint
        if not (folder / "result.json").is_file():
            for name, content in self._committed(run.fingerprint).items():  # the result last: a folder with one is whole
                write_file(folder / name, content)
        if not (folder / "result.json").is_file():
            return None
        result, config = read_object(folder / "result.json"), read_object(folder / "config.json")
        if result is None or config is None or "status" not in result:
            self.context.say(f"note: {folder / 'result.json'} or its config.json is missing or no JSON; the run is made again")
            return None
        if result["status"] == "failed" and self.retry_failed and run.fingerprint not in self._ended_now:
            return None
        names = self._names(run)
        if any(written.get(key) != value for written in (result, config) for key, value in names.items()):
            # The same run under another label or in another study: the numbers stay, the names follow the file.
            records.rename(folder, config, result, names, self.context.study.quick)
            result = read_object(folder / "result.json")
        for name, version in self.context.versions.items():
            if config.get("versions", {}).get(name, version) != version:
                self.foreign_versions.add(f"{name} {config['versions'][name]} (here {version})")
        return result

    def missing(self, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
        return [run for run in runs if self.result(run) is None]

    def has_files(self, fingerprint: str) -> bool:
        return (self.context.out / fingerprint / "result.json").is_file()

    def _committed(self, fingerprint: str) -> Mapping[str, bytes]:
        """The files of a run that an archive, of the committed study or in our own folder, or its folder has; else none.

        Raises:
            ValueError: an archive is damaged.
        """
        committed = self.context.committed
        if self._archived is None:
            theirs = archive.read(committed / archive.NAME)
            self._say_if_of_another_precision(theirs)
            self._archived = theirs | archive.read(self.context.out / archive.NAME)
        if fingerprint in self._archived:
            return self._archived[fingerprint]
        folder = committed / "runs" / fingerprint
        return records.contents(folder) if (folder / records.RESULT).is_file() else {}

    def _say_if_of_another_precision(self, committed: Mapping[str, archive.Files]) -> None:
        made_in, here = _precisions(_configs(committed)), self.context.precision
        if made_in and here not in made_in:
            self.context.say(
                f"note: the committed runs of {self.context.study.name} were made in {' and '.join(sorted(made_in))}; this "
                f'study runs in {here} here and takes none of them: precision = "{min(made_in)}" under [training] takes them'
            )

    # -- what is written --------------------------------------------------------------------------------------------

    def write_config(self, run: PlannedRun, pack: Sequence[PlannedRun], index: int, member: int, keep: bool) -> None:
        """Writes config.json; of a run that goes on (`keep`) the one that it was begun with stays."""
        context, prepared = self.context, self.context.tasks[run.task]
        folder = context.out / run.fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "fingerprint": run.fingerprint,
            "numerics": NUMERICS,
            **self._names(run),
            "quick": context.study.quick,
            "method_settings": run.settings.model_dump(mode="json"),
            "allocation": run.placed_by,
            "ranks_of": run.entry.ranks_of,
            **({"ranks_seed": run.entry.ranks_seed} if run.entry.ranks_seed != "same" else {}),
            **_quantization(run),
            "training": run.training.model_dump(mode="json"),
            "targets": run.entry.targets if method(run.entry.method).takes_targets else None,
            "targets_resolved": prepared.targets[run.entry.label],
            "caption": prepared.captions,
            "licence": prepared.task.licence,
            "data_hash": prepared.data_hash,
            "model_hash": models.content_hash(context.study.model),
            "versions": context.versions,
            "threads": torch.get_num_threads(),
            **({"processes": context.processes.size} if context.processes.size > 1 else {}),
            "device": context.device.type,
            "device_name": measure.device_name(context.device),
            "precision": context.precision,
            **context.commit,
            "pack": {"index": index, "size": len(pack), "member": member, "members": [one.fingerprint for one in pack]},
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **({"own_data": record} if (record := prepared.task.record()) else {}),
        }
        if not keep or read_object(folder / "config.json") is None:
            records.write_config(folder, config)

    def write_predictions(self, run: PlannedRun, outcome: Outcome, processor: Any) -> None:
        """Writes the predictions of the scored split, where the kind of task keeps them, and a few to be read.

        Args:
            processor: of the model's inputs.
        """
        prepared = self.context.tasks[run.task]
        split, kind = splits.scored(self.context.study, prepared.task), kinds.get(prepared.task.kind)
        predictions = outcome.predictions.get(split)
        if predictions is None:
            return
        folder = self.context.out / run.fingerprint
        stored, samples = kind.stored(predictions), kind.samples(prepared.data[split], predictions, processor)
        if stored is not None:
            records.write_predictions(folder, split, stored)
        if samples:
            records.write_samples(folder, split, samples)

    def write_result(self, run: PlannedRun, outcome: Outcome, index: int, size: int, note: str | None) -> None:
        """Writes result.json, which makes the run finished.

        Args:
            index, size: of its pack.
            note: why its pack was split.
        """
        context, task = self.context, self.context.tasks[run.task].task
        selection, split = splits.selection(context.study, task), splits.scored(context.study, task)
        scores = {split: metrics.get(task.metric) for split, metrics in outcome.metrics.items()}
        failed = outcome.error is not None
        result = {
            "fingerprint": run.fingerprint,
            **self._names(run),
            "status": "failed" if failed else "completed",
            "error": outcome.error,
            "traceback": outcome.detail,
            "metric": task.metric,
            "protocol": context.study.protocol,
            "selection_score": None if failed else scores.get(selection),
            "selection_split": selection,
            "score": None if failed else scores.get(split),
            "split": split,
            "score_standard_error": None if failed else outcome.standard_errors.get(split),
            "score_rows": None if failed else outcome.rows.get(split),
            "metrics": outcome.metrics,
            **outcome.facts,
            "pack_size": size,
            "pack_index": index,
            "device": context.device.type,
            "precision": context.precision,
            "packing_note": note,
        }
        records.write_result(context.out / run.fingerprint, result)
        self.made([run])

    def made(self, runs: Iterable[PlannedRun]) -> None:
        """These ended in this sitting."""
        self._ended_now |= {run.fingerprint for run in runs}

    def _names(self, run: PlannedRun) -> dict[str, Any]:
        return {
            "study": self.context.study.name,
            "phase": run.phase,
            "method": run.entry.method,
            "setting": run.entry.label,
            "task": run.task,
            "model": self.context.study.model,
            "seed": run.seed,
            "learning_rate": run.learning_rate,
            "rung": run.rung,
        }


def _quantization(run: PlannedRun) -> dict[str, Any]:
    """How the base was quantised, and by which version."""
    form = run.entry.scheme
    if form is None:
        return {}
    return {"quantization": form.as_fact() | {"bitsandbytes": importlib.metadata.version("bitsandbytes")}}
