"""Reading run folders: what is whole is read, what was cut off or is foreign is named."""

import json
import subprocess
import sys

import pytest
from rankwise.experiments import archive, files, records
from rankwise.reports import results, tables

from tests.synthetic_runs import METHODS, write_json, write_run, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return results.load(write_study(tmp_path_factory.mktemp("study")))


def test_reports_read_without_torch_and_results_without_numpy():
    script = (
        "import sys, rankwise.reports.results; heavy = {'numpy', 'scipy', 'matplotlib', 'torch'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "import rankwise.reports.page, rankwise.reports.ranks; heavy = {'scipy', 'matplotlib', 'torch'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_study_is_read_in_its_own_order(study):
    assert study.settings == METHODS
    assert [arm.setting for arm in study.arms] == list(METHODS)
    assert len(study.runs) == 6 * (3 + 3)
    assert (study.task, study.metric, study.quick, study.complete) == ("glue/stsb", "mean", False, True)


def test_an_arm_is_the_final_runs_at_the_chosen_rate(study):
    lora = next(arm for arm in study.arms if arm.setting == "lora")
    assert lora.rate == 1e-3
    assert [run.config.seed for run in lora.final] == [0, 1, 2]
    assert list(lora.grid) == [5e-4, 1e-3, 5e-3]
    assert all(run.config.phase == "sweep" for runs in lora.grid.values() for run in runs)


def test_committed_studies_keep_their_runs_in_a_folder_runs(tmp_path):
    write_run(tmp_path / "runs", seed=4)
    write_run(tmp_path, seed=5)
    (tmp_path / "figures").mkdir()
    assert {run.config.seed for run in results.load(tmp_path).runs} == {4, 5}


def test_a_run_in_both_places_is_one_run_and_the_finished_one_counts(tmp_path):
    write_run(tmp_path, finished=False)
    write_run(tmp_path / "runs")
    assert [run.status for run in results.load(tmp_path).runs] == ["completed"]


def test_several_studies_in_a_folder_are_grouped_by_name(tmp_path):
    write_run(tmp_path, study="b")
    write_run(tmp_path, study="a", seed=1)
    write_run(tmp_path, study="a", seed=2)
    assert [(study.name, len(study.runs)) for study in results.load_all(tmp_path)] == [("a", 2), ("b", 1)]
    with pytest.raises(ValueError, match=r"holds the runs of 2 studies \(a, b\)"):
        results.load(tmp_path)


def test_a_study_of_two_tasks_falls_into_two_parts(tmp_path):
    write_run(tmp_path)
    write_run(tmp_path, task="reuters/r8")
    parts = results.load(tmp_path).parts()
    assert [part.task for part in parts] == ["glue/stsb", "reuters/r8"]
    assert [len(part.arms[0].final) for part in parts] == [1, 1]


def test_an_unfinished_run_is_listed_not_an_error(tmp_path):
    write_run(tmp_path, finished=False)
    (run,) = results.load(tmp_path).runs
    assert run.status == "unfinished"
    assert run.rank_history[-1].step == 540


@pytest.mark.parametrize("name", ["metrics.jsonl", "ranks.jsonl"])
def test_a_last_line_cut_off_by_a_kill_is_left_out_and_told(tmp_path, name):
    path = write_run(tmp_path, method="adalora", finished=False) / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    run = results.load(tmp_path).runs[0]
    rows = [*run.train, *run.evaluations] if name == "metrics.jsonl" else run.rank_history
    assert len(rows) == whole.count(b"\n") - 1
    assert len(run.notes) == 1
    assert f"/{name} was cut off" in run.notes[0]


def test_a_line_that_is_damaged_in_the_middle_is_refused_by_number(tmp_path):
    path = write_run(tmp_path) / "ranks.jsonl"
    first, rest = path.read_text().split("\n", 1)
    path.write_text(first[:-9] + "\n" + rest)
    with pytest.raises(ValueError, match=r"ranks\.jsonl, line 1 is not strict JSON"):
        _ = results.load(tmp_path).runs[0].rank_history


@pytest.mark.parametrize("name", ["result.json", "config.json", "study.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema": 1}', b'{"a": NaN}', b"\xff\xfe", b"null"])
def test_a_foreign_or_cut_off_file_is_refused_by_name(tmp_path, name, content):
    folder = write_run(tmp_path)
    (tmp_path if name == "study.json" else folder).joinpath(name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        results.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("score", "85"),
        ("seed", 1.5),
        ("status", "done"),
        ("schema", 2),
        ("pack_size", 0),
        ("score", True),
    ],
)
def test_a_result_of_the_wrong_kind_is_refused_by_key(tmp_path, key, value):
    path = write_run(tmp_path) / "result.json"
    write_json(path, json.loads(path.read_text()) | {key: value})
    with pytest.raises(ValueError, match=rf"result\.json: {key}"):
        results.load(tmp_path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_number_that_is_none_is_refused_wherever_it_stands(tmp_path, number):
    path = write_run(tmp_path) / "config.json"
    path.write_text(path.read_text().replace('"warmup": 0.06', f'"warmup": {number}'))
    with pytest.raises(ValueError, match=rf"{number} is not a (finite )?number"):
        results.load(tmp_path)


def test_a_result_beside_the_config_of_another_run_is_refused(tmp_path):
    folder, other = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=9)
    (folder / "config.json").write_text((other / "config.json").read_text())
    with pytest.raises(ValueError, match=r"fingerprint .* is not config\.json's"):
        results.load(tmp_path / "a")


def test_a_folder_without_runs_says_where_runs_are(tmp_path):
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match=r"holds no runs .*; give the folder that `rankwise compare` wrote"):
        results.load(tmp_path)
    write_run(tmp_path / "sub")
    with pytest.raises(ValueError, match="it holds studies: sub"):
        results.load(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        results.load(tmp_path / "nowhere")
    (run,) = (tmp_path / "sub").iterdir()
    with pytest.raises(ValueError, match="is one run; give the study's folder above it"):
        results.load(run)


def test_a_result_that_names_what_a_later_version_adds_is_read(tmp_path):
    path = write_run(tmp_path) / "result.json"
    write_json(path, json.loads(path.read_text()) | {"later": 1})
    assert results.load(tmp_path).runs[0].status == "completed"


def test_a_failed_run_without_any_facts_is_a_result(tmp_path):
    nothing = dict.fromkeys(("steps", "total_steps", "epochs", "skipped_steps", "tokens_per_second", "seconds", "pack_seconds",
                             "trainable_parameters", "active_parameters", "head_parameters", "scale"))  # fmt: skip
    path = write_run(tmp_path, error="out of memory") / "result.json"
    write_json(path, json.loads(path.read_text()) | nothing)
    assert results.load(tmp_path).arms[0].of("failed")[0].result.error == "out of memory"


def grid(tmp_path, scores):
    for rate, score in scores.items():
        lost = {"error": "collapsed"} if score is None else {"selection_score": score}
        write_run(tmp_path, rate=rate, phase="sweep", **lost)
    return results.best_rate(results.load(tmp_path).arms[0])


def test_best_rate_is_that_of_the_selection_split(tmp_path):
    assert grid(tmp_path, {1e-4: 80.0, 1e-3: 85.0, 1e-2: 84.0}) == results.BestRate(1e-3, 85.0, at_edge=False)


def test_best_rate_at_the_edge_is_flagged(tmp_path):
    assert grid(tmp_path, {1e-4: 80.0, 1e-3: 85.0, 1e-2: 86.0}).at_edge


def test_a_rate_that_failed_still_bounds_the_grid(tmp_path):
    assert grid(tmp_path, {1e-4: 80.0, 1e-3: 85.0, 1e-2: None}) == results.BestRate(1e-3, 85.0, at_edge=False)


def test_equal_scores_choose_the_smaller_rate(tmp_path):
    assert grid(tmp_path, {1e-4: 80.0, 1e-3: 85.0, 1e-2: 85.0, 1e-1: 1.0}).rate == 1e-3


def test_a_rate_at_which_one_seed_failed_is_not_chosen(tmp_path):
    write_run(tmp_path, rate=1e-2, phase="sweep", seed=7, error="collapsed")
    assert grid(tmp_path, {1e-4: 80.0, 1e-3: 85.0, 1e-2: 90.0}).rate == 1e-3


def write_pair(folder, ours: dict, other: dict, shared: bool) -> list[results.Arm]:
    """The arms of LoRA and DoRA with these selection scores by rate and seed, which share a rate or not."""
    for method, grid in (("lora", ours), ("dora", other)):
        for rate, scores in grid.items():
            for seed, score in enumerate(scores):
                lost = {"error": "collapsed"} if score is None else {"selection_score": score}
                write_run(folder, method=method, rate=rate, seed=seed, phase="sweep", **lost)
        for rate in (1e-4, 1e-3, 1e-2):
            write_run(folder, method=method, rate=rate, seed=7)
    facts = {"schema": 1, "study": "stsb-minilm", "quick": False, "title": "", "methods": ["lora", "dora"], "complete": True}
    write_json(folder / "study.json", facts | ({"shared_with": {"dora": "lora"}} if shared else {}))
    return results.load(folder).arms


LORA = {1e-4: [50.0, 50.0], 1e-3: [58.0, 60.0], 1e-2: [60.0, 61.0]}  # its own best is 1e-2, at the edge
DORA = {1e-4: [59.0, 61.0], 1e-3: [60.0, 59.0], 1e-2: [40.0, 42.0]}  # its own best is 1e-4, at the other


def test_settings_that_share_a_rate_are_marked_at_the_one_that_is_best_for_all(tmp_path):
    arms = write_pair(tmp_path / "shared", LORA, DORA, shared=True)
    assert [arm.rate for arm in arms] == [1e-3, 1e-3]
    assert [results.best_rate(arm) for arm in arms] == [
        results.BestRate(1e-3, 59.0, at_edge=False),
        results.BestRate(1e-3, 59.5, at_edge=False),
    ]
    table = tables.rate_sweep(results.load(tmp_path / "shared"))
    assert "dora and lora share one rate: the one with the best mean over the runs of all of them." in table.caption
    arms = write_pair(tmp_path / "apart", LORA, DORA, shared=False)  # study.json of before names no sharing
    assert [results.best_rate(arm).rate for arm in arms] == [arm.rate for arm in arms] == [1e-2, 1e-4]
    assert all(results.best_rate(arm).at_edge for arm in arms)


def test_the_edge_of_a_shared_grid_is_that_of_the_joint_choice(tmp_path):
    """DoRA alone stands inside; together they stand at the edge.  A seed that fails counts against the rate of both."""
    inside = {1e-4: [50.0, 50.0], 1e-3: [52.0, 52.0], 1e-2: [51.0, 51.0]}
    arms = write_pair(tmp_path / "edge", LORA, inside, shared=True)
    assert [(best.rate, best.at_edge) for best in map(results.best_rate, arms)] == [(1e-2, True)] * 2
    arms = write_pair(tmp_path / "failed", LORA, {**inside, 1e-2: [51.0, None]}, shared=True)
    assert [(best.rate, best.at_edge) for best in map(results.best_rate, arms)] == [(1e-3, False)] * 2
    assert [arm.rate for arm in arms] == [1e-3, 1e-3]


def test_the_grid_of_a_whole_curve_is_that_of_its_final_runs(tmp_path):
    """Runs of a sweep that was made before, under another design, choose nothing."""
    for rate, score in {1e-4: 60.0, 1e-3: 61.0, 1e-2: 59.0}.items():
        write_run(tmp_path, rate=rate, phase="sweep", seed=9, selection_score=100 - score)
        for seed in (0, 1):
            write_run(tmp_path, rate=rate, seed=seed, selection_score=score + seed)
    facts = {"schema": 1, "study": "stsb-minilm", "quick": False, "title": "", "methods": ["lora"], "complete": True}
    write_json(tmp_path / "study.json", facts | {"design": "whole-curve"})
    (arm,) = results.load(tmp_path).arms
    assert {run.config.phase for runs in arm.grid.values() for run in runs} == {"final"}
    assert results.best_rate(arm) == results.BestRate(1e-3, 61.5, at_edge=False) and arm.rate == 1e-3
    write_json(tmp_path / "study.json", facts)
    assert results.best_rate(results.load(tmp_path).arms[0]) == results.BestRate(1e-2, 41.0, at_edge=True)


def test_write_file_leaves_the_old_one_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_file(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        files.write_file(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_committed_runs_are_whole_and_hold_no_weights(study, tmp_path):
    folder = next(iter(study.runs)).folder.parent
    done = [run for run in study.runs if run.result is not None]
    (done[0].folder / "adapter").mkdir(exist_ok=True)
    (done[0].folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    results.archive_finished(folder, tmp_path / "kept")
    again = results.load(tmp_path / "kept")
    assert [run.result for run in again.runs] == [run.result for run in done]
    assert again.settings == study.settings
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == [archive.NAME, "study.json"]
    stored = archive.read(tmp_path / "kept" / archive.NAME)
    assert not {name for run in stored.values() for name in run} - set(records.FILES)


def test_an_archive_keeps_what_was_said_of_settings_that_were_run_elsewhere(tmp_path):
    """Half of a study's methods run in another folder: the archive has the runs of all, and the rate that two of them share."""
    said = {"schema": 1, "study": "stsb-minilm", "quick": False, "title": "t", "complete": True}
    for name, arms in {"first": {"lora": "lora", "dora": "lora"}, "then": {"adalora": "adalora", "within": "adalora"}}.items():
        for setting in arms:
            write_run(tmp_path / name, method="lora", setting=setting)
        shared = {setting: leader for setting, leader in arms.items() if setting != leader}
        trials = dict.fromkeys(arms, 5)
        write_json(tmp_path / name / "study.json", {**said, "methods": list(arms), "shared_with": shared, "trials": trials})
        results.archive_finished(tmp_path / name, tmp_path / "kept")
    kept = results.load(tmp_path / "kept")
    assert kept.settings == ("lora", "dora", "adalora", "within") and len(kept.runs) == 4
    assert kept.shared_with == {"dora": "lora", "within": "adalora"} and set(kept.trials) == set(kept.settings)
