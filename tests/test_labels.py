"""The labels beside a study: what predictions are scored against, kept once, read without torch and without the data."""

import subprocess
import sys

import numpy as np
import pytest
from rankwise.experiments import labels, tasks
from rankwise.experiments.labels import Labels
from rankwise.experiments.study import Runner
from rankwise.reports import results
from safetensors import safe_open

from tests.test_study import cache, model, study  # noqa: F401  (fixtures)

KEY = ("0" * 64, "test")
WORDS = Labels("token-classification", np.array([-100, 1, 2, -100, 0, 0, 3]), np.array([0, 4, 7]))


def test_labels_come_back_as_they_were_and_equal_ones_are_equal_bytes(tmp_path):
    numbers = Labels("regression", np.array([0.5, 3.2, 5.0], np.float32))
    blocks = Labels("language-modelling", np.array([[3, 40], [5, 70_000]]))
    every = {KEY: WORDS, ("1" * 64, "dev"): numbers, ("2" * 64, "test"): blocks}
    labels.write(tmp_path, every)
    content = (tmp_path / labels.NAME).read_bytes()
    found = labels.read(tmp_path)
    assert found.keys() == every.keys()
    for key, one in every.items():
        assert found[key].kind == one.kind
        assert np.array_equal(found[key].labels, one.labels) and np.array_equal(found[key].offsets, one.offsets)
    assert found[KEY].labels.dtype == np.int64
    labels.write(tmp_path, dict(reversed(every.items())))
    assert (tmp_path / labels.NAME).read_bytes() == content
    with safe_open(tmp_path / labels.NAME, "np") as file:  # whole numbers lie in the smallest type
        kept = {str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118  (no mapping)
    assert kept == {"int8", "int32", "float32"}


def test_new_labels_join_the_old_ones_and_known_ones_leave_the_file_alone(tmp_path):
    labels.add(tmp_path, {KEY: WORDS})
    before = (tmp_path / labels.NAME).stat().st_mtime_ns
    labels.add(tmp_path, {KEY: WORDS})
    assert (tmp_path / labels.NAME).stat().st_mtime_ns == before
    labels.add(tmp_path, {("3" * 64, "test"): WORDS})
    assert len(labels.read(tmp_path)) == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"\x10\0\0\0\0\0\0\0{}"])
def test_a_damaged_file_is_named_in_one_line(tmp_path, content):
    (tmp_path / labels.NAME).write_bytes(content)
    with pytest.raises(ValueError, match=r"labels.safetensors is cut off, .*; move it away") as error:
        labels.read(tmp_path)
    assert "\n" not in str(error.value)


def test_words_are_scored_by_entities_as_their_task_scores_them():
    predicted = np.array([0, 1, 2, 7, 0, 3, 3])
    scored = WORDS.score(predicted, "f1")
    assert scored == tasks.get("conll2003").metrics(predicted, WORDS.labels, WORDS.offsets)["f1"]
    assert 0 < scored < 100
    drawn = WORDS.resampled(predicted, "f1", np.array([[1, 1], [2, 0], [0, 2]]))
    assert drawn.tolist() == pytest.approx([scored, 100, 200 / 3])  # in the second sentence one entity too many


def test_a_share_of_rows_on_resamples_is_the_share_of_the_drawn_rows():
    rows = Labels("classification", np.array([0, 1, 2, 1]))
    options = Labels("choice", np.array([0, 1]))
    assert rows.resampled(np.array([0, 1, 1, 0]), "accuracy", np.array([[1, 1, 1, 1], [0, 3, 0, 1]])).tolist() == [50, 75]
    chosen = np.array([[0, 1, 1], [0, 1, 1]])  # per byte, per token, sum
    assert options.resampled(chosen, "accuracy", np.array([[1, 1], [2, 0]])).tolist() == [50, 100]
    assert options.score(chosen, "accuracy") == 50
    several = Labels("multi-label", np.array([[1, 0], [1, 1]], np.float32))
    drawn = several.resampled(np.array([[1, 0], [1, 0]]), "exact_match", np.array([[1, 1], [0, 2]]))
    assert drawn.tolist() == [50, 0] and several.score(np.array([[1, 0], [1, 0]]), "exact_match") == 50


@pytest.mark.parametrize(
    ("kind", "values", "metric", "score"),
    [
        ("classification", [2, 2, 0, 1, 2], "accuracy", 60),
        ("classification", [1, 1, 0, 1, 1], "f1", 200 * 0.8 / 1.8),
        ("classification", [1, 1, 0], "matthews", 0),
        ("choice", [1, 1, 0, 2], "accuracy", 50),
        ("regression", np.array([0.5, 1.5], np.float32), "pearson_spearman", 0),
        ("multi-label", np.array([[1, 0], [1, 1], [1, 0]], np.float32), "micro_f1", 600 / 7),
        ("language-modelling", [[3, 9]], "compression", None),
        ("classification", [0, 1], "exact_match", None),
    ],
)
def test_a_constant_predictor_answers_the_commonest_label(kind, values, metric, score):
    assert Labels(kind, np.asarray(values)).constant_score(metric) == (None if score is None else pytest.approx(score))


def test_of_words_the_commonest_is_outside_and_finds_no_entity():
    assert WORDS.constant_score("f1") == 0
    assert WORDS.constant_score("word_accuracy") == pytest.approx(40)  # of the five scored words two


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_a_study_writes_its_labels_and_predictions_score_by_them_what_the_run_says(model, tmp_path, monkeypatch, kind):  # noqa: F811
    chosen = study(model, tasks=[f"small/{kind}"])
    runner = Runner(chosen, tmp_path / "runs")
    runner.prepare()
    runner.run()
    loaded = results.load(tmp_path / "runs")
    for run in loaded.runs:
        of_run = loaded.labels_of(run)
        assert of_run.kind == kind and of_run.num_rows == 12
        assert of_run.score(run.predictions, run.result.metric) == pytest.approx(run.result.score, abs=1e-9)
        assert loaded.labels_of(run, "validation").num_rows == 12

    (tmp_path / "runs" / labels.NAME).unlink()  # a folder of an earlier version: the next compare writes it
    again = Runner(chosen, tmp_path / "runs")
    again.prepare()
    monkeypatch.setattr(again.packs, "_train", None)  # nothing is trained
    again.run()
    results.archive_finished(tmp_path / "runs", tmp_path / "kept")
    assert (tmp_path / "kept" / labels.NAME).read_bytes() == (tmp_path / "runs" / labels.NAME).read_bytes()
    assert results.load(tmp_path / "kept").labels_of(loaded.runs[0]).num_rows == 12


def test_labels_are_read_without_torch():
    script = "import sys, rankwise.experiments.labels as l, numpy as n; l.Labels('regression', n.zeros(2)).has('r2');"
    subprocess.run([sys.executable, "-c", script + "assert 'torch' not in sys.modules"], check=True)
