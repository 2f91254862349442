"""A study: what is finished is never run twice, what is killed goes on to the same bytes, a failure is a result."""

import dataclasses
import errno
import json
import multiprocessing
import random
import shutil
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rankwise.experiments.study.runner
import rankwise.experiments.training.state
import rankwise.experiments.training.trainer
import torch
from rankwise import variants
from rankwise.experiments import archive, config, files, kinds, measure, records
from rankwise.experiments.config import Study
from rankwise.experiments.study import Runner, groups
from rankwise.experiments.study.equalize import Equalizer
from rankwise.experiments.study.store import RunStore
from rankwise.experiments.training.optim import MemberAdamW
from rankwise.experiments.training.trainer import Trainer
from rankwise.reports.results import BestRate, archive_finished, best_rate, load
from safetensors import safe_open

from tests import small_world
from tests.tiers import quick


@pytest.fixture(scope="module")
def cache(tmp_path_factory, request) -> str:
    """A cache of this module's own, instead of the user's."""
    folder = str(tmp_path_factory.mktemp("cache"))
    patch = pytest.MonkeyPatch()
    patch.setenv("RANKWISE_CACHE", folder)
    small_world.register(patch.setitem)
    request.addfinalizer(patch.undo)
    return folder


@pytest.fixture(scope="module")
def model(cache, tmp_path_factory) -> str:
    return small_world.model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def nothing_committed(monkeypatch, tmp_path):
    monkeypatch.setattr(rankwise.experiments.study.runner, "COMMITTED", tmp_path / "committed")


TRAINING = small_world.training(epochs=1, max_steps=4, train_examples=24, evaluation_examples=12, log_every=1).model_dump()
ADALORA = {"method": "adalora", "initial_rank": 4, "target_rank": 2, "warmup_steps": 1, "final_steps": 1, "learning_rate": 1e-2}
SWEPT = {"method": "lora", "rank": 2, "learning_rates": [1e-2, 3e-3]}


def study(model: str, methods: Any = ("lora",), **changes: Any) -> Study:
    """Runs of 4 steps."""
    return small_world.study(model, methods, **{"training": TRAINING, **changes})


def ran(what: Study, out: Path, **options: Any) -> list[dict[str, Any]]:
    runner = Runner(what, out, device="cpu", **options)
    runner.prepare()
    return runner.run()


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def result(out: Path, **wanted: Any) -> dict[str, Any]:
    """The one result with these values."""
    found = [strict(path.read_text()) for path in out.glob("*/result.json")]
    found = [r for r in found if all(r[k] == v for k, v in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]


TIMES = {"seconds", "pack_seconds", "tokens_per_second", "peak_memory_bytes", "pack_peak_memory_bytes"}


def contents(out: Path) -> dict[str, Any]:
    """Everything of a folder of runs that must not depend on how often it was interrupted."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out).as_posix()
        if name == ".lock":
            continue
        if path.name == "result.json":
            found[name] = {k: v for k, v in strict(path.read_text()).items() if k not in TIMES}
        elif path.name == "config.json":
            found[name] = {k: v for k, v in strict(path.read_text()).items() if k != "started"}
        elif path.suffix == ".safetensors":  # its metadata are written in any order
            with safe_open(path, framework="pt") as file:
                found[name] = file.metadata(), {key: file.get_tensor(key).tolist() for key in sorted(file.keys())}
        else:
            found[name] = path.read_bytes()
    return found


def no_training(monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "train_step", lambda self: pytest.fail("it trained"))


# -- killed ----------------------------------------------------------------------------------------------------------


def child(what: Study, out: Path, cache: str, *kill: Any) -> multiprocessing.Process:
    """A process of its own that runs the study: a fork of a server that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.small_world"])
    process = context.Process(target=small_world.run, args=(what, out, cache, *kill))
    process.start()
    return process


@pytest.fixture(scope="module")
def killable(model, cache, tmp_path_factory) -> tuple[Study, dict[str, Any], float]:
    """A study with a sweep, packs and pruning; what its folder holds in the end; and how long it takes in a child."""
    what = study(model, [SWEPT, ADALORA, "full"], quick=True, sweep={"seeds": [0], "max_steps": 3, "trials": 3})  # it widens
    out = tmp_path_factory.mktemp("whole")
    child(what, out / "first", cache).join()  # starts the server and fills the cache
    began = time.perf_counter()
    process = child(what, out / "runs", cache)
    process.join()
    assert process.exitcode == 0
    whole = contents(out / "runs")
    assert whole == contents(out / "first")
    assert len([name for name in whole if name.endswith("result.json")]) == 3 + 3 * 2
    assert not [name for name in whole if name.startswith("packs/") or ".tmp" in name or "partial" in name]
    return what, whole, time.perf_counter() - began


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_the_writing_of_any_file_a_study_ends_with_the_same_bytes(killable, cache, tmp_path, after):
    what, whole, _ = killable
    deaths, kill_at = 0, 4 + after
    while True:
        process = child(what, tmp_path / "runs", cache, kill_at, after)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
        kill_at += 2  # each time it gets somewhat farther
    assert deaths > 4
    assert contents(tmp_path / "runs") == whole


@pytest.mark.slow
def test_killed_at_random_moments_a_study_ends_with_the_same_bytes(killable, cache, tmp_path):
    what, whole, seconds = killable
    moments = random.Random(0)
    for _ in range(4):
        process = child(what, tmp_path / "runs", cache)
        time.sleep(seconds * moments.uniform(0.2, 0.6))
        process.kill()
        process.join()
    process = child(what, tmp_path / "runs", cache)
    process.join()
    assert process.exitcode == 0
    assert contents(tmp_path / "runs") == whole


def test_a_pack_of_which_a_part_is_finished_goes_on_as_that_pack(model, tmp_path, monkeypatch):
    what = study(model, seeds=3)
    write, written = RunStore.write_result, []

    def stop_after_one(self, run, *args):
        if written:
            raise KeyboardInterrupt
        write(self, run, *args)
        written.append(run)

    monkeypatch.setattr(RunStore, "write_result", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        ran(what, tmp_path / "runs")
    monkeypatch.setattr(RunStore, "write_result", write)
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 1
    no_training(monkeypatch)
    assert [r["pack_size"] for r in ran(what, tmp_path / "runs")] == [3, 3, 3]
    monkeypatch.undo()


@pytest.mark.slow
def test_a_study_whose_settings_changed_does_not_take_up_the_old_pack(model, cache, tmp_path, monkeypatch):
    step = Trainer.train_step

    def interrupted(self):
        if self.step == 3:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ran(study(model), tmp_path / "runs")
    monkeypatch.setattr(Trainer, "train_step", step)
    assert list((tmp_path / "runs").rglob("checkpoint.safetensors"))
    changed = study(model, training={**TRAINING, "weight_decay": 0.5})
    scores = [r["score"] for r in ran(changed, tmp_path / "runs")]
    assert scores == [r["score"] for r in ran(changed, tmp_path / "fresh")]
    assert len(list((tmp_path / "runs" / "packs").iterdir())) == 1  # the old one, should its settings come back


# -- finished is finished ------------------------------------------------------------------------------------------------


def test_finished_runs_are_not_run_twice(model, tmp_path, monkeypatch):
    what = study(model, [SWEPT, "head"], quick=True, sweep={"seeds": [0], "max_steps": 3})
    first = ran(what, tmp_path)
    before = contents(tmp_path)
    no_training(monkeypatch)
    monkeypatch.setattr(rankwise.experiments.training.trainer.models, "load", rankwise.experiments.training.trainer.models.load)
    assert ran(what, tmp_path) == first
    assert contents(tmp_path) == before


def test_only_what_is_missing_is_run(model, tmp_path):
    ran(study(model, seeds=2), tmp_path)
    old = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}
    results = ran(study(model, seeds=3), tmp_path)
    assert [r["seed"] for r in results] == [0, 1, 2]
    assert [r["pack_size"] for r in results] == [2, 2, 1]
    assert all(path.stat().st_mtime_ns == when for path, when in old.items())


def test_committed_results_are_taken_as_finished_and_copied(model, tmp_path, monkeypatch):
    what = study(model)
    made = ran(what, tmp_path / "committed" / "small" / "runs")
    for adapter in (tmp_path / "committed").rglob("adapter"):
        shutil.rmtree(adapter)
    no_training(monkeypatch)
    assert ran(what, tmp_path / "mine") == made
    for one in made:
        for name in ("config.json", "metrics.jsonl", "ranks.jsonl", "result.json"):
            theirs = tmp_path / "committed" / "small" / "runs" / one["fingerprint"] / name
            assert (tmp_path / "mine" / one["fingerprint"] / name).read_bytes() == theirs.read_bytes()
    # In its own folder too: that is how a committed study is gone on with.
    assert ran(what, tmp_path / "committed" / "small" / "runs") == made


def test_an_archived_study_is_finished_without_a_run(model, tmp_path, monkeypatch):
    what = study(model, seeds=2, knock_out=True)
    made = ran(what, tmp_path / "made")
    archive_finished(tmp_path / "made", tmp_path / "committed" / "small")
    no_training(monkeypatch)
    assert ran(what, tmp_path / "mine") == made
    for one in made:
        mine, theirs = (records.contents(tmp_path / where / one["fingerprint"]) for where in ("mine", "made"))
        assert mine == theirs and records.PREDICTIONS in mine
    # So is one whose archive lies in the folder itself.
    archive_finished(tmp_path / "made", tmp_path / "here")
    shutil.rmtree(tmp_path / "committed")
    assert ran(what, tmp_path / "here") == made


def test_of_a_study_that_is_archived_in_part_only_the_rest_is_run(model, tmp_path, monkeypatch):
    made = ran(study(model, seeds=2), tmp_path / "made")
    archive_finished(tmp_path / "made", tmp_path / "committed" / "small")
    ran(study(model, ["head"], seeds=2), tmp_path / "mine")
    both = ran(study(model, ["lora", "head"], seeds=3), tmp_path / "mine")
    assert [r["pack_size"] for r in both] == [2, 2, 1, 2, 2, 1]
    assert both[:2] == made


def test_a_damaged_archive_stops_a_study_before_it_trains(model, tmp_path, monkeypatch):
    what = study(model, seeds=1)
    ran(what, tmp_path / "made")
    path = archive_finished(tmp_path / "made", tmp_path / "committed" / "small")
    path.write_bytes(path.read_bytes()[:-9])
    no_training(monkeypatch)
    with pytest.raises(ValueError, match=r"small.runs\.parquet is not a whole Parquet file .*take it from git again"):
        ran(what, tmp_path / "mine")
    assert path.name == archive.NAME


# A regression writes no texts, and a study of one task scores none across tasks.
WRITTEN = [name for name in records.FILES if name not in (records.SAMPLES, records.ACROSS)]


@pytest.mark.parametrize("name", quick(WRITTEN, ["result.json", "predictions.safetensors"]))
def test_a_committed_result_that_was_half_copied_is_copied_again(model, tmp_path, monkeypatch, name):
    what = study(model, ["lora"], seeds=1, knock_out=True)
    (made,) = ran(what, tmp_path / "committed" / "small" / "runs")
    flush = files._to_disk

    def full_disk(file):
        if f".{name}." in file.name:
            file.truncate(40)
            raise OSError(errno.ENOSPC, "No space left on device", file.name)
        flush(file)

    monkeypatch.setattr(files, "_to_disk", full_disk)
    with pytest.raises(OSError, match="No space"):
        ran(what, tmp_path / "mine")
    monkeypatch.setattr(files, "_to_disk", flush)
    assert not list((tmp_path / "mine").rglob("result.json"))
    assert not list((tmp_path / "mine").rglob(".*.tmp"))
    no_training(monkeypatch)
    assert ran(what, tmp_path / "mine") == [made]


@pytest.mark.parametrize("name", ["result.json", "config.json"])
@pytest.mark.parametrize("text", quick(["", '{"status": "comp', "[]"], ['{"status": "comp']))
def test_a_damaged_result_is_made_again(model, tmp_path, name, text):
    what = study(model, ["head"], seeds=1)
    (made,) = ran(what, tmp_path)
    (tmp_path / made["fingerprint"] / name).write_text(text)
    said = []
    (again,) = ran(what, tmp_path, say=said.append)
    assert again["score"] == made["score"]
    assert "made again" in said[0]
    said.clear()
    ran(what, tmp_path, say=said.append)
    assert said == []


def test_results_of_other_versions_are_kept_and_said(model, tmp_path, monkeypatch):
    what = study(model, ["head"], seeds=1)
    ran(what, tmp_path)
    monkeypatch.setattr(measure, "versions", lambda: {"torch": "99.0"})
    no_training(monkeypatch)
    said = []
    ran(what, tmp_path, say=said.append)
    assert len(said) == 1
    assert "(here 99.0)" in said[0]


def on_a_machine(monkeypatch, chooses: str) -> None:
    """As if `auto` were this precision here."""
    monkeypatch.setattr(measure, "precision", lambda wanted, where: chooses if wanted == "auto" else wanted)


@pytest.mark.parametrize("archived", [False, True])
def test_a_folder_goes_on_in_the_precision_it_was_begun_in_whatever_this_machine_would_take(
    model, tmp_path, monkeypatch, archived
):
    training = TRAINING | {"precision": "auto"}
    one, two = (study(model, ["head"], seeds=seeds, training=training, pack=1) for seeds in (1, 2))
    on_a_machine(monkeypatch, "bf16")
    made = ran(one, tmp_path / "made")
    if archived:
        archive_finished(tmp_path / "made", tmp_path / "mine")
    else:
        shutil.copytree(tmp_path / "made", tmp_path / "mine")
    on_a_machine(monkeypatch, "fp32")
    said = []
    both = ran(two, tmp_path / "mine", say=said.append)
    assert both[0] == made[0]
    assert {read["precision"] for read in map(records.read_json, (tmp_path / "mine").glob("*/config.json"))} == {"bf16"}
    assert len(said) == 1
    assert 'begun in bf16, and go on in it; precision "auto" would be fp32' in said[0]
    # What the file names is not overruled.
    ran(study(model, ["head"], seeds=1, training=TRAINING | {"precision": "fp32"}), tmp_path / "mine", say=said.append)
    assert len(said) == 1


def test_committed_runs_of_another_precision_are_not_taken_and_that_is_said(model, tmp_path, monkeypatch):
    what = study(model, ["head"], seeds=2, training=TRAINING | {"precision": "auto"})
    on_a_machine(monkeypatch, "bf16")
    ran(what, tmp_path / "made")
    archive_finished(tmp_path / "made", tmp_path / "committed" / "small")
    on_a_machine(monkeypatch, "fp32")
    said = []
    ran(what, tmp_path / "mine", say=said.append)
    assert len(said) == 1
    assert said[0].endswith('takes none of them: precision = "bf16" under [training] takes them')


# -- packs and fingerprints ------------------------------------------------------------------------------------------------


def packs_of(what: Study, size: int = 4) -> dict[str, tuple]:
    return {g.name: g.members for g in groups(what, size)}


def test_packs_are_those_of_the_whole_study_whatever_methods_are_asked_for(model):
    what = study(model, [SWEPT, ADALORA, "full"], quick=True, seeds=6, sweep={"seeds": [0], "max_steps": 3})
    whole = packs_of(what)
    assert [len(m) for name, m in whole.items() if "adalora" in name] == [4, 2]
    assert [len(m) for name, m in whole.items() if "full" in name] == [1] * 6
    some = packs_of(what.model_copy(update={"methods": what.methods[1:2]}))
    assert some
    assert some.items() <= whole.items()
    phases = [g.phase for g in groups(what, 4)]
    assert phases == sorted(phases, reverse=True)  # sweeps first


def fingerprint(what: Study, out: Path) -> str:
    runner = Runner(what, out, device="cpu")
    runner.prepare()
    return runner.known.planned(runner.known.of_study[-1], 0, 1e-2).fingerprint


def test_fingerprints_change_with_each_setting_that_changes_results_and_with_no_other(model, cache, tmp_path):
    entry = {"method": "lora", "rank": 2, "learning_rate": 1e-2}
    base = fingerprint(study(model, [entry]), tmp_path)

    parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    linears = [f"bert.encoder.layer.{i}.{part}" for i in (0, 1) for part in (*parts, "intermediate.dense", "output.dense")]

    def changed(entry_changes=None, training_changes=None, **changes):
        training = {**TRAINING, **(training_changes or {})}
        what = study(changes.pop("model", model), [{**entry, **(entry_changes or {})}], training=training, **changes)
        return fingerprint(what, tmp_path)

    same = [
        changed(training_changes={"log_every": 7}),
        changed(training_changes={"shard_base": True}),
        changed(checkpoint_seconds=5.0),
        changed(pack=1),
        changed(title="another", quick=True),
        changed({"label": "another"}),
        changed({"targets": linears}),
        changed(seeds=5),
        changed({"alpha": 16.0}),  # the default, written out
    ]
    assert set(same) == {base}
    one_by_one = (
        {"rank": 3},
        {"alpha": 4},
        {"dropout": 0.2},
        {"targets": "attention"},
        {"lr_ratio": 2.0},
        {"magnitude": True},
        {"scaling": "alpha/sqrt(r)"},
        {"initialization": "gaussian"},
        {"method": "dora"},
        {"rank_pattern": {"query": 1}},
        {"alpha_pattern": {"query": 1}},
    )
    different = {
        **{str(change): changed(change) for change in one_by_one},
        "task": changed(tasks=["small/classification"]),
        "model": changed(model=small_world.model(tmp_path / "other", dropout=0.2)),
    }
    others = {
        **{"epochs": 2, "max_steps": 5, "batch_size": 5, "accumulation": 2, "warmup_ratio": 0.5, "schedule": "cosine"},
        **{"weight_decay": 0.5, "clip": None, "max_length": 16, "gradient_checkpointing": True, "evaluations_per_epoch": 3},
        **{"evaluation_batch_size": 9, "train_examples": 23, "evaluation_examples": 11, "max_skipped_steps": 1},
        "head_learning_rate": 2e-2,
        "optimizer_states": "8-bit",
    }
    of_images = {"image_size": 24, "augmentation": ["flip"]}  # refused for texts
    beside = {"precision", "log_every", "shard_base"}
    assert {*others, *of_images, *beside} == set(config.Training.model_fields)  # sort in a new one
    plain = config.Training().identity()
    assert all(config.Training(**{name: value}).identity() != plain for name, value in of_images.items())
    different |= {name: changed(training_changes={name: value}) for name, value in others.items()}
    assert base not in different.values(), [k for k, v in different.items() if v == base]
    assert len(set(different.values())) == len(different)
    runner = Runner(study(model, [entry]), tmp_path, device="cpu")
    runner.prepare()
    (group,) = runner.known.of_study
    assert runner.known.planned(group, 0, 1e-2).fingerprint == base
    assert len({base, runner.known.planned(group, 1, 1e-2).fingerprint, runner.known.planned(group, 0, 1e-3).fingerprint}) == 3
    runner.known.context = dataclasses.replace(runner.context, precision="bf16")
    assert runner.known.planned(group, 0, 1e-2).fingerprint != base


def test_two_labels_of_the_same_runs_are_refused(model, tmp_path):
    same = [{"method": "lora", "rank": 2, "learning_rate": 1e-2, "label": label} for label in ("one", "two")]
    with pytest.raises(ValueError, match=r'"one" and "two" are the same runs at learning rate 0\.01: take one out'):
        ran(study(model, same), tmp_path)


def test_every_fault_is_said_at_once_before_anything_runs(model, tmp_path):
    lost = [{"method": "lora", "rank": 2, "learning_rate": 1e-2, "label": n, "targets": [f"{n}x"]} for n in ("query", "key")]
    with pytest.raises(ValueError) as caught:
        ran(study(model, lost), tmp_path / "runs")
    assert len(str(caught.value).splitlines()) == 2
    assert not (tmp_path / "runs").exists()


# -- the sweep ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({1e-3: 50.0, 3e-3: 60.0, 1e-2: 55.0}, 3e-3),
        ({1e-3: 50.0, 3e-3: 60.0, 1e-2: 60.0}, 3e-3),  # a tie: the lowest
        ({1e-3: -20.0, 3e-3: -10.0, 1e-2: None}, 3e-3),  # failed ones lose, however low the others are
        ({1e-3: None, 3e-3: None, 1e-2: None}, 1e-3),
    ],
    ids=["best", "tie", "failed", "all failed"],
)
def test_the_sweep_takes_the_best_rate(model, tmp_path, monkeypatch, scores, best):
    what = study(model, [{"method": "lora", "rank": 2, "learning_rates": [1e-2, 1e-3, 3e-3]}], sweep={"max_steps": 3})
    runner = Runner(what, tmp_path, device="cpu")
    runner.prepare()
    final = runner.known.of_study[-1]
    monkeypatch.setattr(
        runner.store, "result", lambda run: {"selection_score": scores[run.learning_rate], "status": "completed"}
    )
    assert runner.known.rates(final) == [(0, best), (1, best)]


def test_a_grid_is_widened_while_its_best_rate_stands_at_the_edge_within_the_budget_of_trials(model, tmp_path, monkeypatch):
    """Scores rise up to 0.08: the grid of 3e-3 and 1e-2 grows by its own step, 10 / 3, until 0.11 lies beyond the best."""
    best, written = 0.033, RunStore.write_result

    def risen(self, run, outcome, *rest):
        if outcome.metrics.get("validation"):
            metric = self.context.tasks[run.task].task.metric
            outcome.metrics["validation"][metric] = 90 - 10 * abs(np.log(run.learning_rate / best))
        written(self, run, outcome, *rest)

    monkeypatch.setattr(RunStore, "write_result", risen)
    for trials, tried, chosen in ((3, [3e-3, 1e-2, 3.3e-2], 3.3e-2), (9, [3e-3, 1e-2, 3.3e-2, 0.11], 3.3e-2)):
        what = study(model, [SWEPT], sweep={"seeds": [0], "max_steps": 1, "trials": trials}, seeds=1)
        out = tmp_path / str(trials)
        results = ran(what, out)
        assert sorted(r["learning_rate"] for r in results if r["phase"] == "sweep") == pytest.approx(tried)
        assert [r["learning_rate"] for r in results if r["phase"] == "final"] == [pytest.approx(chosen)]
        assert json.loads((out / "study.json").read_text())["trials"] == {"lora": trials}
        packs = json.loads((out / "packs.json").read_text())["packs"]
        assert [p["pack"] for p in packs if "sweep" in p["pack"]] == [
            "sweep-lora-" + what.tasks[0].replace("/", "_") + f"-{i}" for i in range(len(tried) - 1)
        ]
        assert ran(what, out) == results  # known again, not run again


def test_entries_that_share_a_rate_choose_it_together_and_widen_together(model, tmp_path, monkeypatch):
    """LoRA alone would take 1e-3, DoRA 1e-2; together they take what is best on average, and their grids stay the same."""
    scores = {("lora", 1e-3): 60.0, ("lora", 3e-3): 58.0, ("lora", 1e-2): 50.0}
    scores |= {("dora", 1e-3): 40.0, ("dora", 3e-3): 51.0, ("dora", 1e-2): 52.0}
    entry = {"rank": 2, "learning_rates": [1e-2, 1e-3, 3e-3]}
    methods = [{"method": "lora", **entry}, {"method": "dora", **entry, "shared_with": "lora"}]
    runner = Runner(study(model, methods, sweep={"max_steps": 3, "trials": 4}), tmp_path, device="cpu")
    runner.prepare()
    scored = lambda run: {"selection_score": scores[run.entry.method, run.learning_rate], "status": "completed"}  # noqa: E731
    monkeypatch.setattr(runner.store, "result", scored)
    for final in [group for group in runner.known.of_study if group.phase == "final"]:
        assert runner.known.rates(final) == [(0, 3e-3), (1, 3e-3)]

    scores |= {("lora", 1e-2): 60.0, ("lora", 1e-3): 50.0}  # now the joint best stands at the upper edge: both go on
    scores |= {(name, 3.3e-2): 10.0 for name in ("lora", "dora")}
    packs = runner._sweep(runner.known.sharers(runner.study.methods[1]), "small/regression")
    ran_at = [(group.entry.label, r) for groups in packs for group in groups for _, r in group.members]
    assert {one for one in ran_at if one[1] == 3.3e-2} == {("lora", 3.3e-2), ("dora", 3.3e-2)}


def test_the_report_marks_the_shared_rate_that_the_final_runs_had(model, tmp_path, monkeypatch):
    """Each method alone would take an edge; the rate between is best for both, and no grid is widened."""
    scores = {"lora": {1e-3: 40.0, 3e-3: 59.0, 1e-2: 60.0}, "dora": {1e-3: 60.0, 3e-3: 58.0, 1e-2: 40.0}, "head": {1e-2: 1.0}}
    write = RunStore.write_result

    def scored(self, run, outcome, *rest):
        outcome.metrics["validation"][self.context.tasks[run.task].task.metric] = scores[run.entry.label][run.learning_rate]
        write(self, run, outcome, *rest)

    monkeypatch.setattr(RunStore, "write_result", scored)
    entry = {"rank": 2, "learning_rates": [1e-2, 1e-3, 3e-3]}
    methods = [{"method": "lora", **entry}, {"method": "dora", **entry, "shared_with": "lora"}]
    ran(study(model, methods, sweep={"seeds": [5], "max_steps": 1}, seeds=1), tmp_path)
    assert strict((tmp_path / "study.json").read_text())["shared_with"] == {"dora": "lora"}
    arms = load(tmp_path).arms
    assert [(arm.rate, best_rate(arm)) for arm in arms] == [
        (3e-3, BestRate(3e-3, scores[arm.setting][3e-3], at_edge=False)) for arm in arms
    ]
    ran(study(model, ["head"], seeds=1), tmp_path)  # what is not asked for now stays in the study's file
    assert strict((tmp_path / "study.json").read_text())["shared_with"] == {"dora": "lora"}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"shared_with": "lorra"}, 'dora: shared_with = "lorra" is no label of another method; did you mean "lora"?'),
        ({"shared_with": "dora"}, 'shared_with = "dora" is no label of another method'),
        ({"learning_rates": [1e-2, 1e-3]}, "give both the same"),
    ],
    ids=["unknown", "itself", "another grid"],
)
def test_a_rate_that_cannot_be_shared_is_refused(model, change, fault):
    dora = {"method": "dora", "rank": 2, "learning_rates": [1e-2, 3e-3], "shared_with": "lora"} | change
    with pytest.raises(ValueError, match="dora: shared_with") as caught:
        study(model, [SWEPT, dora], sweep={"max_steps": 3})
    assert fault in str(caught.value)


def test_a_final_run_keeps_the_predictions_that_were_scored(model, tmp_path):
    what = study(model, ["lora"], seeds=2)
    for one in ran(what, tmp_path):
        with safe_open(tmp_path / one["fingerprint"] / "predictions.safetensors", framework="np") as file:
            predicted, split = file.get_tensor("predictions"), file.metadata()["split"]
        runner = Runner(what, tmp_path, device="cpu")
        runner.prepare()
        prepared = runner.prepared[one["task"]]
        assert split == one["split"] and len(predicted) == one["score_rows"]
        assert prepared.task.metrics(predicted, *prepared.data[split].truth) == one["metrics"][split]


def test_a_whole_curve_runs_every_rate_with_every_final_seed_and_names_its_design(model, tmp_path):
    rates = [1e-3, 3e-3, 1e-2]
    curve = [{"method": "lora", "rank": 2, "learning_rates": rates}]
    results = ran(study(model, curve, seeds=2, sweep={"design": "whole-curve"}), tmp_path)
    assert [(r["phase"], r["seed"], r["learning_rate"], r["pack_size"]) for r in results] == [
        ("final", seed, rate, 6) for seed in (0, 1) for rate in rates
    ]
    assert all(r["selection_score"] is not None and r["score"] is not None for r in results)
    assert strict((tmp_path / "study.json").read_text())["design"] == "whole-curve"
    report = load(tmp_path)
    (arm,) = report.arms
    assert report.design == "whole-curve" and list(arm.grid) == rates and len(arm.final) == 2
    means = {rate: sum(r["selection_score"] for r in results if r["learning_rate"] == rate) for rate in rates}
    assert arm.rate == best_rate(arm).rate == max(means, key=means.get)


def test_the_design_of_the_rates_is_no_part_of_a_run(model, tmp_path, monkeypatch):
    """A study that was made at one rate goes on as a whole curve; what is finished stays finished."""
    (before,) = ran(study(model, [{"method": "lora", "rank": 2, "learning_rate": 3e-3}], seeds=1), tmp_path)
    assert "design" not in strict((tmp_path / "study.json").read_text()) and load(tmp_path).design == "chosen-rate"
    curve = [{"method": "lora", "rank": 2, "learning_rates": [1e-3, 3e-3, 1e-2]}]
    after = ran(study(model, curve, seeds=1, sweep={"design": "whole-curve"}), tmp_path)
    assert after[1] == before and [r["pack_size"] for r in after] == [2, 1, 2]


def test_successive_halving_runs_the_better_half_twice_as_long(model, tmp_path):
    rates = [1e-3, 3e-3, 1e-2, 3e-2]
    methods = [{"method": "lora", "rank": 2, "learning_rates": rates}]
    what = study(model, methods, sweep={"seeds": [0], "max_steps": 4, "halving": 2, "rungs": 3, "trials": 4}, seeds=1)
    results = ran(what, tmp_path)
    sweeps = [r for r in results if r["phase"] == "sweep"]
    assert [(r["rung"], r["total_steps"]) for r in sweeps] == [(0, 1)] * 4 + [(1, 2)] * 2 + [(2, 4)]
    for rung, keep in ((0, 2), (1, 1)):
        scores = {r["learning_rate"]: r["selection_score"] for r in sweeps if r["rung"] == rung}
        best = sorted(scores, key=lambda rate: (-scores[rate], rate))[:keep]
        assert {r["learning_rate"] for r in sweeps if r["rung"] == rung + 1} == set(best)
    last = next(r["learning_rate"] for r in sweeps if r["rung"] == 2)
    assert [r["learning_rate"] for r in results if r["phase"] == "final"] == [last]
    arm = load(tmp_path).arms[0]
    assert arm.rate == last and {rate: runs[0].config.rung for rate, runs in arm.grid.items()}[last] == 2


# -- budgets -------------------------------------------------------------------------------------------------------------


def test_a_budget_of_parameters_gives_every_method_ranks_and_one_scale(model, tmp_path):
    methods = [
        {"method": "lora", "learning_rate": 1e-3},
        {"method": "dora", "learning_rate": 1e-3},
        {"method": "adalora", "learning_rate": 1e-3, "final_steps": 1},
        {"method": "head", "learning_rate": 1e-3},
    ]
    wanted = 2600
    results = ran(study(model, methods, seeds=1, budget={"equal": "parameters", "parameters": wanted, "scale": 3.0}), tmp_path)
    by = {r["setting"]: r for r in results}
    for label in ("lora", "dora"):
        assert wanted - 48 < by[label]["active_parameters"] <= wanted
        assert by[label]["scale"] == pytest.approx(3.0)
        assert len(set(by[label]["ranks"].values())) == 2  # mixed: a whole rank would be too coarse
    assert by["adalora"]["scale"] == pytest.approx(3.0) and by["head"]["active_parameters"] == 0
    totals = {label: sum(by[label]["ranks"].values()) for label in ("lora", "adalora")}
    assert 0 <= totals["lora"] - totals["adalora"] <= 2  # a triplet costs one parameter more than a pair


def test_a_budget_that_is_too_small_is_refused_with_what_would_do(model, tmp_path):
    with pytest.raises(ValueError, match=r"a budget of 10 parameters does not give each of \d+ sites one rank: that takes"):
        what = study(model, [{"method": "lora", "learning_rate": 1e-3}], budget={"equal": "parameters", "parameters": 10})
        ran(what, tmp_path)


def test_equal_time_shortens_what_is_slower_and_is_written_down(model, tmp_path, monkeypatch):
    seconds = {"lora": 1.0, "full": 2.0}
    probe = lambda self, entry, task, accumulation: {"seconds_per_step": seconds[entry.label], "peak_bytes": 1}  # noqa: E731
    monkeypatch.setattr(Equalizer, "_probe", probe)
    methods = [{"method": "lora", "rank": 2, "learning_rate": 1e-3}, {"method": "full", "learning_rate": 1e-4}]
    what = study(model, methods, seeds=1, reference="lora", budget={"equal": "time"})
    assert [r["total_steps"] for r in ran(what, tmp_path)] == [4, 2]
    seconds["full"] = 1.0  # another measurement later on changes nothing
    assert [r["total_steps"] for r in ran(what, tmp_path)] == [4, 2]
    assert json.loads((tmp_path / "budget.json").read_text())["equal"] == "time"


def test_equal_memory_takes_micro_batches_until_a_step_fits(model, tmp_path, monkeypatch):
    peak = lambda self, entry, task, accumulation: {"seconds_per_step": 1.0, "peak_bytes": 100 // accumulation}  # noqa: E731
    monkeypatch.setattr(Equalizer, "_probe", peak)
    what = study(model, seeds=1, budget={"equal": "memory", "bytes": 30})
    [result] = ran(what, tmp_path)
    config = json.loads((tmp_path / result["fingerprint"] / "config.json").read_text())
    assert config["training"]["accumulation"] == 4
    with pytest.raises(ValueError, match=r"needs \d+ bytes for a step of one row at a time, above budget.bytes = 1: raise it"):
        ran(study(model, seeds=1, budget={"equal": "memory", "bytes": 1}), tmp_path / "less")


def test_a_probe_measures_real_steps(model, tmp_path):
    runner = Runner(study(model), tmp_path, device="cpu")
    runner.prepare()
    found = runner.equalizer._probe(runner.study.methods[0], runner.study.tasks[0], 1)
    assert found["seconds_per_step"] > 0 and found["peak_bytes"] > 10**5


# -- a paper's own protocol ----------------------------------------------------------------------------------------------


def test_best_dev_epoch_reports_the_best_epoch_of_the_development_part(model, tmp_path):
    training = {**TRAINING, "epochs": 4, "max_steps": None, "evaluations_per_epoch": 1}
    what = study(model, seeds=2, protocol="best-dev-epoch", training=training)
    for result in ran(what, tmp_path):
        lines = (tmp_path / result["fingerprint"] / "metrics.jsonl").read_text().splitlines()
        seen = [line for line in map(json.loads, lines) if line["kind"] == "evaluation"]
        assert len(seen) == 4 and {line["split"] for line in seen} == {"validation"}
        scores = {line["step"]: line["metrics"][result["metric"]] for line in seen}
        assert result["score"] == result["selection_score"] == max(scores.values())
        assert result["scored_step"] == min(step for step, score in scores.items() if score == result["score"])
        assert (result["protocol"], result["split"]) == ("best-dev-epoch", "validation")
    assert {r.result.protocol for r in load(tmp_path).runs} == {"best-dev-epoch"}


def test_a_sweep_sees_the_selection_split_alone_and_its_rate_is_run_again_in_full(model, tmp_path):
    what = study(model, [SWEPT], sweep={"max_steps": 3, "seeds": 2, "trials": 2})
    results = ran(what, tmp_path)
    sweeps, finals = results[:4], results[4:]
    assert all(r["phase"] == "sweep" and r["score"] is None and set(r["metrics"]) == {"validation"} for r in sweeps)
    assert all(r["selection_score"] is not None and r["total_steps"] == 3 for r in sweeps)
    mean = {rate: sum(r["selection_score"] for r in sweeps if r["learning_rate"] == rate) for rate in (1e-2, 3e-3)}
    assert [r["learning_rate"] for r in finals] == [max(mean, key=mean.get)] * 2
    assert all(r["phase"] == "final" and r["total_steps"] == 4 and r["score"] is not None for r in finals)
    assert {path.parent.name for path in tmp_path.glob("*/adapter")} == {r["fingerprint"] for r in finals}


# -- what cannot be packed -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_that_cannot_be_packed_runs_its_members_apart_and_says_why(cache, tmp_path, monkeypatch):
    deberta = small_world.model(tmp_path / "deberta", "deberta-v2")
    what, said = study(deberta, seeds=2), []
    results = ran(what, tmp_path / "runs", say=said.append)
    assert [(r["status"], r["pack_size"]) for r in results] == [("completed", 1)] * 2
    assert all("cannot pack lora" in r["packing_note"] for r in results)
    assert len([line for line in said if "cannot pack" in line]) == 1
    for r in results:
        pack = strict((tmp_path / "runs" / r["fingerprint"] / "config.json").read_text())["pack"]
        assert (pack["size"], pack["members"]) == (1, [r["fingerprint"]])
    alone = ran(study(deberta, seeds=2, pack=1), tmp_path / "alone")
    assert [r["score"] for r in alone] == [r["score"] for r in results]
    assert [r["packing_note"] for r in alone] == [None, None]


def out_of_memory_above(limit: int, monkeypatch, at: str = "run") -> list[int]:
    """Makes every Trainer of more members than `limit` run out of memory; the sizes that were tried."""
    real, tried = getattr(Trainer, at), []

    def scarce(self, *args, **options):
        members = args[0].members if at == "__init__" else self.pack.members
        tried.append(members)
        if members > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")
        return real(self, *args, **options)

    monkeypatch.setattr(Trainer, at, scarce)
    return tried


@pytest.mark.parametrize("at", quick(["__init__", "run"], ["run"]))
def test_a_pack_that_does_not_fit_in_memory_is_split(model, tmp_path, monkeypatch, at):
    ran(study(model, seeds=5, pack=2), tmp_path / "apart")
    tried = out_of_memory_above(2, monkeypatch, at)
    said = []
    results = ran(study(model, seeds=5), tmp_path / "runs", say=said.append)
    assert tried == [5, 3, 2, 1, 2]
    assert [r["pack_size"] for r in results] == [2, 2, 1, 2, 2]
    assert all("does not fit in memory" in r["packing_note"] for r in results)
    assert [r["seed"] for r in results] == [0, 1, 2, 3, 4]
    small_world.assert_same_runs(tmp_path / "runs", tmp_path / "apart", 5)
    assert len(said) == 2
    assert not list((tmp_path / "runs" / "packs").iterdir())


@pytest.mark.slow
def test_a_pack_that_was_split_stays_split_when_it_goes_on(model, tmp_path, monkeypatch):
    tried = out_of_memory_above(2, monkeypatch)
    write, count = RunStore.write_result, []

    def stop(self, *args):
        if len(count) == 1:
            raise KeyboardInterrupt
        count.append(1)
        write(self, *args)

    monkeypatch.setattr(RunStore, "write_result", stop)
    with pytest.raises(KeyboardInterrupt):
        ran(study(model, seeds=4), tmp_path / "runs")
    monkeypatch.setattr(RunStore, "write_result", write)
    assert tried == [4, 2]
    results = ran(study(model, seeds=4), tmp_path / "runs")
    assert tried == [4, 2, 2, 2]  # four members are not tried again
    assert [r["pack_size"] for r in results] == [2] * 4


@pytest.mark.slow
def test_what_did_not_fit_is_gone_before_its_parts_are_run(model, tmp_path, monkeypatch):
    step, seen, held = Trainer.train_step, [], []

    def scarce(self):
        if self.pack.members > 1:
            seen.append(weakref.ref(self.model))
            raise torch.OutOfMemoryError("CUDA out of memory")
        held.extend(ref() is not None for ref in seen)
        step(self)

    monkeypatch.setattr(Trainer, "train_step", scarce)
    ran(study(model, seeds=2), tmp_path)
    assert held == [False] * 8


def test_a_single_run_that_does_not_fit_is_a_failed_result_with_the_remedy(model, tmp_path, monkeypatch):
    out_of_memory_above(0, monkeypatch)
    results = ran(study(model, seeds=2), tmp_path)
    assert [(r["status"], r["error"], r["score"]) for r in results] == [("failed", "out of memory", None)] * 2
    assert "gradient_checkpointing" in results[0]["traceback"]


# -- failures are results ------------------------------------------------------------------------------------------------


def test_a_method_that_raises_in_training_is_a_failed_result_and_the_others_go_on(model, tmp_path, monkeypatch):
    from rankwise.variants.dora import DoRA

    def broken(self, step):
        if step.index == 2:
            raise RuntimeError("a wild bug\nwith two lines")

    monkeypatch.setattr(DoRA, "after_step", broken)
    results = ran(study(model, ["dora", "lora"]), tmp_path)
    assert [(r["setting"], r["status"]) for r in results] == [("dora", "failed")] * 2 + [("lora", "completed")] * 2
    assert results[0]["error"] == "RuntimeError: a wild bug"
    assert "in broken" in results[0]["traceback"]
    assert results[0]["score"] is results[0]["selection_score"] is None
    assert results[2]["score"] is not None
    assert not list((tmp_path / "packs").iterdir())


def test_a_failed_run_is_tried_again_only_when_asked_for(model, tmp_path, monkeypatch):
    what = study(model, seeds=2)
    broken = monkeypatch.setattr
    broken(Trainer, "run", lambda self: (_ for _ in ()).throw(RuntimeError("no")))
    failed = ran(what, tmp_path)
    assert [r["status"] for r in failed] == ["failed"] * 2
    assert ran(what, tmp_path) == failed
    again = ran(what, tmp_path, retry_failed=True)  # and fails again, which is a result too
    assert [r["status"] for r in again] == ["failed"] * 2
    monkeypatch.undo()
    monkeypatch.setattr(rankwise.experiments.study.runner, "COMMITTED", tmp_path / "committed")
    assert [r["status"] for r in ran(what, tmp_path, retry_failed=True)] == ["completed"] * 2


def test_a_member_that_diverges_or_collapses_is_a_failed_result_with_its_reason(model, tmp_path, monkeypatch):
    what = study(
        model,
        [{"method": "lora", "rank": 2, "learning_rates": [1e-2, 1e30]}],
        sweep={"seeds": [0], "epochs": 2, "max_steps": 7, "trials": 2},
        seeds=1,
        training={**TRAINING, "max_skipped_steps": 2, "warmup_ratio": 0.0},
    )
    results = ran(what, tmp_path)
    assert [(r["phase"], r["status"], r["error"]) for r in results] == [
        ("sweep", "completed", None),
        ("sweep", "failed", "diverged"),
        ("final", "completed", None),
    ]
    assert results[1]["selection_score"] is None
    assert results[2]["learning_rate"] == 1e-2
    assert results[0]["selection_score"] is not None


def test_constant_predictions_are_a_failed_result_without_a_score(model, tmp_path, monkeypatch):
    kind = kinds.get("regression")
    plain = kind.predictions
    monkeypatch.setattr(kind, "predictions", lambda outputs: plain(outputs) * 0 + 0.5)
    results = ran(study(model), tmp_path)
    assert [(r["status"], r["error"], r["score"], r["selection_score"]) for r in results] == [
        ("failed", "collapsed", None, None)
    ] * 2


# -- a full disk, and two at once --------------------------------------------------------------------------------------------


class FullDisk:
    """Fails at the n-th writing: half of the file is there, then there is no space."""

    def __init__(self, monkeypatch, at: int):
        self.left, save = at, rankwise.experiments.training.state.save_file

        def save_file(tensors, path, *args):
            self.count(path)
            save(tensors, path, *args)

        dump = json.dump

        def json_dump(value, file, **options):
            self.count(file.name)
            dump(value, file, **options)

        monkeypatch.setattr(rankwise.experiments.training.state, "save_file", save_file)
        monkeypatch.setattr(json, "dump", json_dump)

    def count(self, path) -> None:
        self.left -= 1
        if self.left == 0:
            Path(path).write_bytes(b'{"half')
            raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.mark.slow
def test_a_full_disk_is_said_leaves_nothing_half_written_and_a_later_run_finishes(model, tmp_path, monkeypatch):
    what = study(model, ["head"], seeds=1)
    ran(what, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    at, finished = 0, False
    while not finished:
        at += 1
        with monkeypatch.context() as patch:
            disk = FullDisk(patch, at)
            out = tmp_path / f"{at}"
            try:
                ran(what, out)
                finished = disk.left > 0
            except OSError as error:
                assert error.errno == errno.ENOSPC
        for path in out.rglob("*.json"):
            strict(path.read_text())
        assert not [p for p in out.rglob("*") if ".tmp" in p.name]
        if at % 3 == 1:
            ran(what, out)
            assert contents(out) == whole
    assert at > 8


def test_a_full_disk_while_a_checkpoint_is_written_is_no_failed_run(model, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(rankwise.experiments.training.state, "save_file", full)
    with pytest.raises(OSError) as caught:
        ran(study(model), tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.rglob("result.json"))


def test_a_second_process_in_the_same_folder_is_refused(model, tmp_path, monkeypatch):
    what = study(model)
    other = Runner(what, tmp_path, device="cpu")
    other.prepare()
    refused = []
    step = Trainer.train_step

    def meanwhile(self):
        if not refused:
            with pytest.raises(ValueError, match="another compare is running there: wait for it, or give another --out"):
                other.run()
            refused.append(True)
        step(self)

    monkeypatch.setattr(Trainer, "train_step", meanwhile)
    ran(what, tmp_path)
    assert refused
    assert other.run()  # the lock is gone


# -- what is written -----------------------------------------------------------------------------------------------------


def test_a_run_s_folder_holds_what_the_contract_says_in_strict_json(model, tmp_path):
    results = ran(study(model, [ADALORA]), tmp_path)
    for r in results:
        folder = tmp_path / r["fingerprint"]
        files = {p.name for p in folder.iterdir()}
        assert files == {"config.json", "metrics.jsonl", "ranks.jsonl", "sites.json", "predictions.safetensors",
                         "result.json", "adapter"}  # fmt: skip
        written, made = strict((folder / "result.json").read_text()), strict((folder / "config.json").read_text())
        assert written == r
        assert made["fingerprint"] == r["fingerprint"]
        assert made["pack"]["members"] == [one["fingerprint"] for one in results]
        assert made["method_settings"]["initial_rank"] == 4
        assert made["targets_resolved"] == list(r["ranks"])
        assert (
            "small/regression: a fixed random part of the data (train 24, validation 12, test 12 examples)." in made["caption"]
        )
        assert r["metric"] == "pearson_spearman"
        assert r["score"] == r["metrics"]["test"]["pearson_spearman"]
        assert r["selection_score"] == r["metrics"]["validation"]["pearson_spearman"]
        assert sum(r["ranks"].values()) == 2 * len(r["ranks"])
        assert set(r["nominal_ranks"].values()) == {4}
        assert r["seconds"] == r["pack_seconds"] / 2
        assert r["peak_memory_bytes"] is None
        lines = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4]
        ranks = [strict(line) for line in (folder / "ranks.jsonl").read_text().splitlines()]
        assert [line["step"] for line in ranks] == [0, 1, 2, 3, 4]
        assert [line["active"] for line in ranks] == [line["budget"] for line in ranks]
        assert ranks[-1]["ranks"] == r["ranks"]
    for path in tmp_path.glob("*.json"):
        strict(path.read_text())


def test_the_adapter_that_is_kept_is_the_one_that_was_scored(model, tmp_path):
    what = study(model, ["dora"], seeds=2)
    results = ran(what, tmp_path)
    runner = Runner(what, tmp_path, device="cpu")
    runner.prepare()
    prepared = runner.prepared["small/regression"]
    for r in results:
        loaded, _, _ = rankwise.experiments.training.trainer.models.load(model, prepared.task)
        variants.load_pretrained(loaded, tmp_path / r["fingerprint"] / "adapter")
        loaded.eval()
        data = prepared.data["test"]
        predicted = []
        for row in range(len(data)):
            ids = torch.tensor(data.ids[data.offsets[row] : data.offsets[row + 1]])[None].long()
            types = torch.tensor(data.token_type_ids[data.offsets[row] : data.offsets[row + 1]])[None].long()
            with torch.no_grad():
                predicted.append(float(loaded(input_ids=ids, token_type_ids=types).logits))
        assert prepared.task.metrics(predicted, data.labels)["pearson"] == pytest.approx(
            r["metrics"]["test"]["pearson"], rel=1e-3
        )


def test_study_json_is_complete_only_when_every_method_is(model, tmp_path, monkeypatch):
    whole = study(model, ["lora", "head"])
    one = whole.model_copy(update={"methods": whole.methods[1:]})

    def told() -> tuple[list[str], bool]:
        value = strict((tmp_path / "study.json").read_text())
        return value["methods"], value["complete"]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        ran(whole, tmp_path)
    assert told() == (["lora", "head"], False)
    ran(one, tmp_path)
    assert told() == (["lora", "head"], False)
    ran(whole, tmp_path)
    assert told() == (["lora", "head"], True)
    ran(one, tmp_path)
    assert told() == (["lora", "head"], True)


def test_progress_adds_up_to_the_work_whether_runs_are_made_resumed_or_found(model, tmp_path):
    what = study(model, [SWEPT, "head"], quick=True, sweep={"seeds": [0], "max_steps": 3})
    runner = Runner(what, tmp_path, device="cpu")
    runner.prepare()
    work = runner.work()
    for _ in range(2):
        seen = []
        ran(what, tmp_path, progress=lambda what, rows, seen=seen: seen.append(rows))
        assert sum(seen) == pytest.approx(work, rel=0.02)


def test_memory_of_one_pack_is_freed_before_the_next(model, tmp_path, monkeypatch):
    step, seen, held = Trainer.train_step, [], []

    def watched(self):
        if self.step == 1:
            held.extend(ref() is not None for ref in seen)
            seen.append(weakref.ref(self.model))
        step(self)

    monkeypatch.setattr(Trainer, "train_step", watched)
    ran(study(model, ["full", "lora", "dora"], seeds=1), tmp_path)
    assert held == [False] * (1 + 2)


# -- found by a hostile reader -------------------------------------------------------------------------------------


def interrupted_at(monkeypatch, step: int) -> None:
    train = Trainer.train_step

    def stop(self):
        if self.step == step:
            raise KeyboardInterrupt
        train(self)

    monkeypatch.setattr(Trainer, "train_step", stop)


@pytest.mark.parametrize("first, second", [(1, 3), (3, 1)])
def test_other_seeds_after_an_interruption_make_every_run_and_lose_none(model, tmp_path, monkeypatch, first, second):
    with monkeypatch.context() as patch:
        interrupted_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            ran(study(model, seeds=first), tmp_path / "runs")
    for seeds in (second, first):
        results = ran(study(model, seeds=seeds), tmp_path / "runs")
        assert [r["status"] for r in results] == ["completed"] * seeds
    assert not list((tmp_path / "runs" / "packs").iterdir())


@pytest.mark.slow
def test_another_pack_size_after_an_interruption_makes_every_run(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            ran(study(model, seeds=3, pack=1), tmp_path / "runs")
    results = ran(study(model, seeds=3, pack=8), tmp_path / "runs")
    assert [r["status"] for r in results] == ["completed"] * 3


def test_a_diverged_member_of_any_method_does_not_end_the_study(model, tmp_path):
    wild = {"method": "adalora+dora", "initial_rank": 4, "target_rank": 2, "learning_rate": 1e38}
    what = study(model, [wild, "head"], seeds=1, training={**TRAINING, "max_skipped_steps": 0, "clip": None})
    results = ran(what, tmp_path / "runs")
    assert [r["status"] for r in results] == ["failed", "completed"]
    assert results[0]["error"] in ("diverged", "collapsed") and results[0]["score"] is None


def test_a_run_whose_every_step_was_skipped_is_no_result(model, tmp_path, monkeypatch):
    norms = MemberAdamW.gradient_norms
    monkeypatch.setattr(MemberAdamW, "gradient_norms", lambda self: norms(self) * float("nan"))
    (only,) = ran(study(model, seeds=1), tmp_path / "runs")
    assert only["skipped_steps"] == only["steps"] == 4
    assert (only["status"], only["error"], only["score"]) == ("failed", "diverged", None)


def test_files_of_others_in_the_folder_stay(model, tmp_path):
    others = [
        tmp_path / "runs" / "mine" / ".work.tmp",
        tmp_path / "runs" / ".notes.tmp",
        tmp_path / "runs" / "packs" / ".a.tmp",
    ]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    ours = tmp_path / "runs" / ".study.json.123.tmp"
    ours.write_text("{")
    ran(study(model), tmp_path / "runs")
    assert [path.read_text() for path in others] == ["mine"] * 3 and not ours.exists()


def test_a_renamed_label_keeps_its_numbers_under_the_new_name(model, tmp_path, monkeypatch):
    entry = {"method": "lora", "rank": 2, "learning_rate": 1e-2}
    (before,) = ran(study(model, [{**entry, "label": "one"}], seeds=1), tmp_path / "runs")
    no_training(monkeypatch)
    (after,) = ran(study(model, [{**entry, "label": "two"}], seeds=1), tmp_path / "runs")
    assert after == {**before, "setting": "two"}
    assert strict((tmp_path / "runs" / after["fingerprint"] / "config.json").read_text())["setting"] == "two"


def test_what_a_model_cannot_do_is_refused_before_anything_runs(model, tmp_path):
    with pytest.raises(ValueError, match="max_length = 4096 is above"):
        ran(study(model, training={**TRAINING, "max_length": 4096}), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
