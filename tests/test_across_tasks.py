"""A study of several tasks that scores each adapter on each task: the numbers, and what cannot be asked for."""

import json
from dataclasses import replace

import pytest
from rankwise import variants
from rankwise.experiments import across, checks, config, kinds, models, tasks
from rankwise.experiments.study import Runner
from rankwise.experiments.training.evaluation import Evaluator
from rankwise.reports import tables
from rankwise.reports.results import load

from tests import small_world
from tests.synthetic_runs import write_json, write_run
from tests.test_verdicts import BASE


def study_of(*names, **others):
    raw = {"model": "m", "tasks": list(names), "quick": True, "across_tasks": True, **others}
    return config.parse({**raw, "methods": [{"method": "lora", "rank": 2, "learning_rate": 1e-3}]}, "mine")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("glue/stsb",), "across_tasks = true has no effect with one task (glue/stsb)"),
        (
            ("glue/stsb", "sarcasm"),
            "glue/stsb (regression, 1 outputs) and sarcasm (classification: sincere, sarcastic) are not",
        ),
        (("glue/sst2", "sarcasm"), "are not answered by one head: name tasks of one kind with the same labels"),
    ],
)
def test_tasks_that_one_head_cannot_answer_are_refused(names, said):
    with pytest.raises(ValueError) as error:
        checks.check(study_of(*names))
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1


def test_the_matrix_is_that_of_the_runs(tmp_path):
    """Two tasks, two seeds; the pre-trained model's scores are known: the change on the other task by hand."""
    own, other = {"a": 80.0, "b": 60.0}, {"a": 35.0, "b": 52.0}
    for task in own:
        for seed in (0, 1):
            folder = write_run(tmp_path, task=task, seed=seed, score=own[task] + seed)
            there = "b" if task == "a" else "a"
            untuned = {"a": 40.0, "b": 50.0}
            write_json(folder / "across.json", {"schema": 1, "scores": {there: other[there] + 2 * seed}, "untuned": untuned})
    write_json(
        tmp_path / "study.json",
        {"schema": 1, "study": "stsb-minilm", "quick": True, "title": "t", "methods": ["lora"], "complete": True},
    )
    table = tables.across_tasks(load(tmp_path).parts())
    assert table.columns == ("setting", "trained on", "n", "a", "b", "on the others")
    base, on_a, on_b = table.rows
    assert base == ("pre-trained", "-", 0, 40.0, 50.0, None)
    assert on_a[:3] == ("lora", "a", 2) and (on_a[3].mean, on_a[4].mean, on_a[5].mean) == (80.5, 53.0, 3.0)
    assert (on_b[3].mean, on_b[4].mean, on_b[5].mean) == (36.0, 60.5, -4.0)


def test_a_study_without_it_has_no_matrix(tmp_path):
    for task in ("a", "b"):
        write_run(tmp_path, task=task, score=BASE[0])
    assert tables.across_tasks(load(tmp_path).parts()) is None


@pytest.mark.slow
def test_each_run_is_scored_on_the_other_task(tmp_path, monkeypatch):
    """Against the saved adapter, loaded by itself, on the other task's rows."""
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    small_world.register(monkeypatch.setitem)
    second = replace(small_world.task("classification"), name="small/second", score_split="validation", selection_split="test")
    monkeypatch.setitem(tasks._TASKS, second.name, second)
    training = small_world.training(epochs=1, max_steps=3, train_examples=24, evaluation_examples=12).model_dump()
    names = ["small/classification", "small/second"]
    what = small_world.study(
        small_world.model(tmp_path / "model"), ["lora", "full"], training=training, quick=True, tasks=names, across_tasks=True
    )
    checks.check(what)
    runner = Runner(what, tmp_path / "runs", device="cpu")
    runner.prepare()
    results = runner.run()
    assert {one["status"] for one in results} == {"completed"}
    for one in results:
        folder = tmp_path / "runs" / one["fingerprint"]
        stored = json.loads((folder / "across.json").read_text())
        there = next(name for name in names if name != one["task"])
        assert set(stored["scores"]) == {there} and stored["untuned"] == {}  # its head would be an untrained one
        if one["method"] != "lora":
            continue
        model, processor, _ = models.load(what.model, small_world.task("classification"))
        adapter = variants.load_pretrained(model, folder / "adapter")
        data = runner.prepared[there].data["validation" if there == "small/second" else "test"]
        [predicted] = Evaluator(adapter, kinds.get("classification"), processor, 7, "fp32").predictions(data)
        score = second.metrics(predicted, *data.truth)["accuracy"]
        assert stored["scores"][there] == pytest.approx(score)
    table = tables.across_tasks(load(tmp_path / "runs").parts())
    assert [row[:2] for row in table.rows] == [(s, t) for s in ("lora", "full") for t in names]


def test_the_pretrained_model_answers_where_no_head_is_made(monkeypatch):
    """An adapter that is not trained yet changes nothing, so that its scores are the model's own."""
    made = {}

    class Info:
        heads = ()

    def load(name, task, *rest):
        model = models.tiny("llama")
        return model, None, Info

    monkeypatch.setattr(across.models, "load", load)
    monkeypatch.setattr(across, "scores", lambda adapter, *rest: made.update(adapter=adapter) or [{"a": 1.0}])
    found = across.untuned(study_of("a", "b"), {"a": (small_world.task(), None)}, "cpu", "fp32", None)
    adapter = made["adapter"]
    assert found == {"a": 1.0} and not any(adapter.delta(name).any() for name in adapter.changed_weights())
    Info.heads = ("classifier",)
    assert across.untuned(study_of("a", "b"), {"a": (small_world.task(), None)}, "cpu", "fp32", None) == {}
