"""The thousand-run study: it has a thousand runs, and a slice of it runs packed from end to end."""

from pathlib import Path

import pytest
from rankwise.experiments import checks, config
from rankwise.experiments.sources import Unavailable, fetch
from rankwise.experiments.study import Runner, groups
from rankwise.reports import page, tables
from rankwise.reports.results import load

from tests import small_world

STUDY = config.read(Path("thousand"))


def test_it_is_a_thousand_runs_of_equal_sweeps():
    checks.check(STUDY)
    found = groups(STUDY, 32)
    assert sum(len(group.members) for group in found) == 1000
    sweeps = {(g.entry.label, g.task): 0 for g in found}
    for group in found:
        sweeps[group.entry.label, group.task] += len(group.members) if group.phase == "sweep" else 0
    assert set(sweeps.values()) == {80} and len(sweeps) == 10
    assert all(len(group.members) > 1 for group in found)


def check_slice(model: str, task: str, labels: list[str] | None, folder: Path) -> None:
    """Two rates, two seeds, a few steps: sweep, choice, final runs."""
    chosen = [entry for entry in STUDY.methods if labels is None or entry.label in labels]
    entries = [entry.model_copy(update={"learning_rates": entry.learning_rates[3:5]}) for entry in chosen]
    small = {"max_steps": 3, "batch_size": 4, "max_length": 16, "train_examples": 32, "evaluation_examples": 24}
    study = STUDY.model_copy(
        update={
            "model": model,
            "tasks": [task],
            "seeds": [0, 1, 2],
            "methods": entries,
            "sweep": STUDY.sweep.model_copy(update={"seeds": [0, 1]}),
            "training": STUDY.training.model_copy(update=small),
        }
    )
    runner = Runner(study, folder / "runs", device="cpu")
    runner.prepare()
    results = runner.run()
    assert len(results) == len(entries) * (2 * 2 + 3)
    assert [r["status"] for r in results] == ["completed"] * len(results)
    assert {(r["phase"], r["pack_size"]) for r in results} == {("sweep", 4), ("final", 3)}
    for label in {r["setting"] for r in results}:
        of_method = [r for r in results if r["setting"] == label]
        sweep: dict[float, float] = {}
        for r in of_method:
            if r["phase"] == "sweep":
                sweep[r["learning_rate"]] = sweep.get(r["learning_rate"], 0) + r["selection_score"]
        best = max(sorted(sweep), key=sweep.get)
        assert {r["learning_rate"] for r in of_method if r["phase"] == "final"} == {best}
        assert len({r["final_train_loss"] for r in of_method if r["phase"] == "final"}) == 3  # the members differ
    assert tables.comparison(load(folder / "runs")).rows


def test_a_slice_runs_packed_from_end_to_end_in_the_small_world(tmp_path, monkeypatch):
    small_world.register(monkeypatch.setitem)
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    check_slice(small_world.model(tmp_path / "model"), "small/regression", ["lora", "adalora+dora"], tmp_path)


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("task, labels", [("sarcasm", None), ("glue/stsb", ["lora", "adalora+dora"])], ids=STUDY.tasks[::-1])
def test_a_slice_runs_packed_from_end_to_end(tmp_path, task, labels):
    """On the study's own model and tasks: every method on one of them."""
    try:
        fetch(STUDY.model), fetch(task)
    except Unavailable as error:
        pytest.skip(str(error))
    check_slice(STUDY.model, task, labels, tmp_path)
    text = page.write(tmp_path / "runs", tmp_path / "report").read_text()
    assert all(entry.label in text for entry in STUDY.methods if labels is None or entry.label in labels)
