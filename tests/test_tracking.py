"""Trackers are fed from the records alone: every point once, also after a kill, and none of it changes a run."""

import importlib.util
import json
import os
import signal

import pytest
import rankwise.experiments.study.runner as study_runner
from rankwise.experiments import checks, config
from rankwise.experiments.study import Runner
from rankwise.experiments.tracking import TRACKERS, Tracker, Tracking

from tests import small_world
from tests.command import rankwise
from tests.test_study import contents

CONFIG = {"setting": "lora", "method": "lora", "task": "t", "phase": "final", "seed": 1, "learning_rate": 0.01}


class Recorder:
    """A tracker in this process: what it was sent, by run."""

    keeps = True
    points: dict[str, list] = {}
    ended: dict[str, list] = {}

    def __init__(self, folder, study):
        self.study = study

    def send(self, run, points):
        self.points.setdefault(run.fingerprint, []).extend(points)

    def finish(self, run, status, summary):
        self.ended.setdefault(run.fingerprint, []).append((status, summary))

    def close(self):
        pass


class Broken(Recorder):
    def send(self, run, points):
        raise RuntimeError("no\nnetwork")


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, "points", {})
    monkeypatch.setattr(Recorder, "ended", {})
    monkeypatch.setitem(TRACKERS, "mlflow", Tracker("tests.test_tracking:Recorder", "json"))
    monkeypatch.setitem(TRACKERS, "wandb", Tracker("tests.test_tracking:Broken", "json"))
    return Recorder


def train(step):
    return json.dumps({"kind": "train", "step": step, "loss": 1.0 / step, "learning_rate": 0.1, "penalty": None}) + "\n"


def evaluation(step):
    return json.dumps({"kind": "evaluation", "step": step, "split": "validation", "epoch": 1, "metrics": {"f1": 5}}) + "\n"


def ranks(step):
    return json.dumps({"step": step, "budget": None, "active": 8, "live": 7, "ranks": {"q": 8}}) + "\n"


def written(out, metrics, of_ranks="", result=None):
    folder = out / "0123abcd"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "metrics.jsonl").write_text(metrics)
    (folder / "ranks.jsonl").write_text(of_ranks)
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_each_point_is_sent_once_whatever_is_cut_and_written_again(recorder, tmp_path):
    def follow(*content, **more):
        Tracking(["mlflow"], "s", tmp_path, pytest.fail).follow(written(tmp_path, *content, **more))  # a process of its own

    follow(train(1), ranks(1))
    follow(train(1) + train(2) + evaluation(2)[:20], ranks(1))  # killed while it wrote a line
    follow(train(1))  # cut back to its checkpoint
    follow(train(1) + train(2) + evaluation(2), ranks(1))
    follow(train(1) + train(2) + evaluation(2) + train(3), ranks(1), result={"status": "completed", "score": 80.0})
    follow(train(1) + train(2) + evaluation(2) + train(3), ranks(1), result={"status": "completed", "score": 80.0})
    points = recorder.points["0123abcd"]
    assert [(p.step, sorted(p.values)) for p in points] == [
        (1, ["train/learning_rate", "train/loss"]),
        (1, ["ranks/active", "ranks/live"]),
        (2, ["train/learning_rate", "train/loss"]),
        (2, ["validation/f1"]),
        (3, ["train/learning_rate", "train/loss"]),
    ]
    assert recorder.ended["0123abcd"] == [("completed", {"score": 80.0})]


def test_a_failed_run_that_is_made_again_ends_again(recorder, tmp_path):
    for status in ("failed", "failed", "completed"):
        folder = written(tmp_path, train(1), result={"status": status})
        Tracking(["mlflow"], "s", tmp_path, pytest.fail).follow(folder)
    assert [status for status, _ in recorder.ended["0123abcd"]] == ["failed", "completed"]
    assert len(recorder.points["0123abcd"]) == 1


def test_a_tracker_that_fails_is_said_once_and_the_others_go_on(recorder, tmp_path):
    said = []
    one = Tracking(["wandb", "mlflow"], "s", tmp_path, said.append)
    one.follow(written(tmp_path, train(1)))
    one.follow(written(tmp_path, train(1) + train(2)))
    one.close()
    assert said == ["note: wandb failed (no network): the study goes on without it, and the next start sends what is missing"]
    assert len(recorder.points["0123abcd"]) == 2


def test_a_tracker_that_is_not_installed_or_not_known_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(TRACKERS, "wandb", Tracker("x:X", "no_such_package_of_ours"))
    for words, said in (
        (["--track", "wandb"], 'track = "wandb": its package is not installed: pip install "rankwise[wandb]"'),
        (["--track", "tensorbord"], 'did you mean "tensorboard"'),
        (["--log-format", "jsno"], 'did you mean "json"'),
    ):
        assert rankwise("compare", "smoke", "--out", tmp_path / "out", *words) == 2
        assert said in capsys.readouterr().err
    raw = {"name": "x", "model": "m", "tasks": ["glue/stsb"], "track": ["wandb"]}
    study = config.parse(raw | {"methods": [{"method": "lora", "rank": 2, "learning_rate": 1e-3}]}, "x")
    with pytest.raises(ValueError, match="its package is not installed"):
        checks.check(study)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    patch = pytest.MonkeyPatch()
    patch.setenv("RANKWISE_CACHE", str(folder))
    small_world.register(patch.setitem)
    patch.setattr(study_runner, "COMMITTED", folder / "committed")
    yield small_world.model(folder / "model")
    patch.undo()


TRAINING = {"epochs": 1, "max_steps": 4, "train_examples": 24, "evaluation_examples": 12, "log_every": 1}


def study(model, *track, **changes):
    training = small_world.training(**TRAINING).model_dump()
    return small_world.study(model, ["lora"], training=training, quick=True, anatomy=False, track=list(track), **changes)


def ran(what, out):
    runner = Runner(what, out, device="cpu", say=lambda line: None)
    runner.prepare()
    return runner.run()


def test_a_tracked_study_is_the_study_and_its_points_are_its_records(recorder, model, tmp_path):
    ran(study(model), tmp_path / "plain")
    ran(study(model, "mlflow"), tmp_path / "tracked")
    plain, tracked = contents(tmp_path / "plain"), contents(tmp_path / "tracked")
    assert {name: value for name, value in tracked.items() if not name.startswith("tracking/")} == plain
    assert not any(name.startswith("tracking/") for name in plain) and len(recorder.points) == 2
    for fingerprint, points in recorder.points.items():
        lines = [
            len((tmp_path / "tracked" / fingerprint / name).read_text().splitlines())
            for name in ("metrics.jsonl", "ranks.jsonl")
        ]
        assert len(points) == sum(lines) and min(lines) > 3
        assert recorder.ended[fingerprint][0][0] == "completed"
    sent = {name: list(points) for name, points in recorder.points.items()}
    ran(study(model, "mlflow"), tmp_path / "tracked")  # nothing is left to do, and nothing is sent again
    assert recorder.points == sent and all(len(ends) == 1 for ends in recorder.ended.values())


def test_runs_that_were_finished_before_are_shown_when_a_tracker_is_named_later(recorder, model, tmp_path):
    ran(study(model), tmp_path)
    ran(study(model, "mlflow"), tmp_path)
    assert len(recorder.points) == 2 and all(recorder.points.values())


def test_progress_is_an_object_a_line_on_request(model, tmp_path, capsys, figures_undrawn):
    path = tmp_path / "study.toml"
    path.write_text(
        f'name = "x"\nmodel = "{model}"\ntasks = ["small/regression"]\nquick = true\nanatomy = false\n'
        "[training]\nmax_steps = 2\nmax_length = 24\nepochs = 1\ntrain_examples = 24\nevaluation_examples = 12\n"
        '[[methods]]\nmethod = "lora"\nrank = 2\nlearning_rate = 1e-3\n'
    )
    assert rankwise("compare", path, "--out", tmp_path / "runs", "--log-format", "json", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert {line["event"] for line in lines} >= {"say", "progress"} and all("time" in line for line in lines)
    last = [line for line in lines if line["event"] == "progress"][-1]
    assert last["done"] == pytest.approx(last["total"]) and last["total"] > 0


# -- the real ones, each in a process that is killed in the middle and goes on ----------------------------------------------


def killed_once(what, out, cache, kill_at):
    """The study in a child that is killed at a file, then to its end in another; see tests/test_study.py."""
    from tests.test_study import child

    process = child(what, out, cache, kill_at, True)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process = child(what, out, cache)
    process.join()
    assert process.exitcode == 0


def needed(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def lines_of(out):
    """(step, loss) of every run, by fingerprint."""
    found = {}
    for path in out.glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    return found


@pytest.mark.slow
@needed("tensorboard")
def test_tensorboard_shows_each_point_once(model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed_once(study(model, "tensorboard"), tmp_path / "runs", os.environ["RANKWISE_CACHE"], 7)
    expected = lines_of(tmp_path / "runs")
    folders = list((tmp_path / "runs" / "tracking" / "tensorboard").iterdir())
    assert len(folders) == len(expected) == 2
    for folder in folders:
        events = EventAccumulator(str(folder)).Reload()
        (fingerprint,) = [name for name in expected if folder.name.endswith(name[:8])]
        shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
        assert [step for step, _ in shown] == [step for step, _ in expected[fingerprint]]
        assert [value for _, value in shown] == pytest.approx([value for _, value in expected[fingerprint]])
        assert len(events.Scalars("result/score")) == 1


@pytest.mark.slow
@needed("mlflow")
@needed("sqlalchemy")  # which mlflow-skinny leaves out
def test_mlflow_shows_each_point_once(model, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient
    from rankwise.experiments.tracking.mlflow import TAG

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    killed_once(study(model, "mlflow"), tmp_path / "runs", os.environ["RANKWISE_CACHE"], 9)
    expected = lines_of(tmp_path / "runs")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path.resolve()}/runs/tracking/mlflow/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert {run.data.tags[TAG] for run in runs} == set(expected)
    for run in runs:
        history = client.get_metric_history(run.info.run_id, "train/loss")
        of_run = expected[run.data.tags[TAG]]
        steps = [metric.step for metric in history]
        assert len(set(steps)) == len(steps) and len(of_run) - 1 <= len(steps) <= len(
            of_run
        )  # a kill may lose one, and shows none twice
        assert run.info.status == "FINISHED" and run.data.params["learning_rate"] == "0.01"


@pytest.mark.slow
@needed("wandb")
def test_weights_and_biases_takes_a_study_offline(model, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    said = []
    runner = Runner(study(model, "wandb"), tmp_path / "runs", device="cpu", say=said.append)
    runner.prepare()
    runner.run()
    assert not [line for line in said if "wandb" in line]
    files = list((tmp_path / "runs" / "tracking" / "wandb").rglob("*.wandb"))
    assert {path.stem.removeprefix("run-") for path in files} == set(lines_of(tmp_path / "runs"))
    assert all(path.stat().st_size > 1000 for path in files)
