"""Studies of a user's own data: what they train on, what is said and refused, and the one line that makes one."""

import json
import os
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from rankwise.experiments import checks, config, kinds, knockout, own_study, tasks
from rankwise.experiments.data_entries import OwnData, located
from rankwise.experiments.study import Runner
from rankwise.experiments.tasks import metrics, own_kinds, own_tasks
from safetensors import safe_open
from sklearn import metrics as sklearn_metrics
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests import small_world
from tests.command import rankwise
from tests.test_study import contents
from tests.test_study_files import REMEDIES, changed, clear, variations

LETTERS = small_world.LETTERS


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setenv("RANKWISE_CACHE", str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return small_world.model(tmp_path_factory.mktemp("model"))


def words(count: int, shortest: int = 3) -> list[list[str]]:
    draw = np.random.default_rng(3)
    return [draw.choice(list(LETTERS), size=shortest + i % 9).tolist() for i in range(count)]


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def csv(path: Path, count: int = 40) -> Path:
    """Three classes as texts, in two columns."""
    rows = [(" ".join(text), ("low", "mid", "high")[i % 3]) for i, text in enumerate(words(count))]
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows), encoding="utf-8")
    return path


STUDY = """# a comment that stays
model = "{model}"
quick = true
[training]
epochs = 1
max_steps = 2
batch_size = 8
max_length = 8
[[data]]
name = "support"      # another
train = "data/support.csv"
[[data]]
name = "stars"
train = "data/stars.jsonl"
input = "headline"
target = "stars"
metrics = ["r2", "mae"]
[[methods]]
method = "lora"
rank = 2
alpha = 6
learning_rate = 1e-2
"""


def written(folder: Path, model: str, text: str = STUDY) -> Path:
    (folder / "data").mkdir(parents=True)
    csv(folder / "data" / "support.csv")
    rows = [{"headline": " ".join(text), "stars": 100 + 10 * (i % 7) / 3} for i, text in enumerate(words(40))]
    jsonl(folder / "data" / "stars.jsonl", rows)
    path = folder / "mine.toml"
    path.write_text(text.replace("{model}", model), encoding="utf-8")
    return path


def fingerprints(file: Path, out: Path) -> dict[str, str]:
    """Task -> the fingerprint of its first run; nothing is run."""
    runner = Runner(config.read(file), out, device="cpu")
    runner.prepare()
    return {group.task: runner.known.planned(group, *group.members[0]).fingerprint for group in runner.known.of_study}


def task(folder: Path, rows: list[dict], **more) -> own_tasks.OwnTask:
    return own_tasks.task(OwnData(name="mine", train=str(jsonl(folder / "train.jsonl", rows)), **more))


def test_rows_with_any_number_of_labels_are_a_task_with_a_column_for_each(tmp_path):
    texts = words(60)
    rows = [{"text": " ".join(text), "labels": [name for name in ("q", "b", "a") if name in text]} for text in texts]
    one = task(tmp_path, rows)
    assert (one.kind, one.label_names, one.num_labels, one.metric) == ("multi-label", ("a", "b", "q"), 3, "micro_f1")
    assert "multi-label with 3 labels: a, b, q" in one.caption[0]
    for part in one.splits:
        examples = one.examples(part)
        wanted = [[name in text.split() for name in one.label_names] for text in examples.first]
        assert examples.labels.tolist() == wanted
    true = one.examples("train").labels
    predicted = np.roll(true, 1, 0)
    micro, macro = (100 * sklearn_metrics.f1_score(true, predicted, average=way) for way in ("micro", "macro"))
    right = 100 * (true == predicted).all(1).mean()
    assert one.metrics(predicted, true) == pytest.approx({"micro_f1": micro, "macro_f1": macro, "exact_match": right})
    weights = metrics.resample_weights(len(true))[:3]
    drawn = [np.repeat(np.arange(len(true)), weight) for weight in weights]
    wanted = [100 * sklearn_metrics.f1_score(true[rows], predicted[rows], average="macro") for rows in drawn]
    np.testing.assert_allclose(own_kinds.OF_LABELS["macro_f1"].resampled(predicted, true, weights), wanted)


# -- the one line --------------------------------------------------------------------------------------------------------


def test_one_line_makes_a_study_that_gives_the_same_runs_when_it_is_run_again(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, data = Path("out"), csv(Path("support.csv"))
    given = ("compare", "--model", os.path.relpath(model), "--data", data, "--methods", "lora,head", "--out", out)
    assert rankwise(*given) == 0
    said = capsys.readouterr().err
    assert "support: reading text as the input, label as its class; classification with 3 labels: high, low, mid" in said
    assert "max_length = 16 tokens (the longest row has 13)" in said and "20 epochs of 32 rows, 8 a step" in said
    study = tomllib.loads((out / "study.toml").read_text())
    assert study["model"] == model  # from any folder
    assert study["quick"] and study["seeds"] == 1 and study["tasks"] == ["support"]
    assert study["data"] == [{"name": "support", "train": "../support.csv", "kind": "classification"}]
    assert [entry["method"] for entry in study["methods"]] == ["lora", "head"]
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    assert len(before) == 2
    assert rankwise("compare", out / "study.toml", "--out", out) == rankwise(*given) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")} == before
    assert rankwise(*given[:-4], "--methods", "lora", "--out", out) == 2
    assert "study.toml is there and says something else: run that one" in capsys.readouterr().err
    (run,) = (p.parent for p in before if json.loads(p.read_text())["method"] == "lora")
    assert knockout.of_run(run, rows=4)["rows"] == 4
    assert rankwise("export", run, "--to", "merged", "--out", tmp_path / "merged") == 0


def test_the_full_protocol_has_whole_curves_and_ten_seeds(tmp_path, model):
    data = OwnData(name="mine", train=str(csv(tmp_path / "a.csv", 2000)), kind="classification")
    text = own_study.compose(data, model, own_study.check_methods(None, True), 1600, 16, tmp_path, True)
    (tmp_path / "study.toml").write_text(text)
    study = config.read(tmp_path / "study.toml")
    checks.check(study)
    assert not study.quick and study.seeds == [*range(10)] and study.reference == "lora"
    assert study.sweep.design == "whole-curve" and study.training.epochs == 4 and study.training.batch_size == 32
    assert [entry.method for entry in study.methods] == ["full", "lora", "adalora", "dora"]
    assert all(len(entry.learning_rates) == 4 for entry in study.methods)


def test_quick_rates_and_ranks_are_the_quick_study_s():
    shipped = {entry.label: entry for entry in config.read(config.DEFAULT_STUDY).methods}
    for name, entry in own_study.shipped_entries(False).items():
        if name in shipped:
            assert entry["learning_rate"] == shipped[name].learning_rates[0]
            assert {k: v for k, v in entry.items() if k not in ("method", "learning_rate")} == shipped[name].settings
    assert own_study.shipped_entries(False)["random-rank"]["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("rows", "epochs", "batch"), [(8, 20, 8), (100, 16, 8), (160, 20, 16), (200, 16, 16), (1600, 4, 32), (9999, 1, 32)]
)
def test_epochs_and_batches_follow_from_the_rows(rows, epochs, batch):
    assert own_study.training_for(rows) == {"epochs": epochs, "batch_size": batch}


def test_the_length_is_that_of_the_longest_row_within_what_the_model_takes():
    def length_for(longest: int, most: int | None) -> int:
        return own_study.Lengths({"train": np.array([3, longest]), "test": np.array([2])}, most).max_length

    assert length_for(41, 128) == 48
    assert length_for(9, 128) == 16
    assert length_for(400, 128) == 128
    assert length_for(4000, None) == 512


WRONG = {
    "no model": (["--data", "support.csv"], "--data needs --model: name a hub id or a folder"),
    "no data": (["--model", "m"], "--model has no effect without --data"),
    "no data, full": (["--full-protocol"], "--full-protocol has no effect without --data"),
    "a study too": (["smoke", "--data", "support.csv", "--model", "m"], "a study, smoke, is given too: keep one"),
    "tasks too": (["--data", "support.csv", "--model", "m", "--tasks", "x"], "with --data there is one task"),
    "method": (["--data", "support.csv", "--model", "m", "--methods", "lorra"], 'did you mean "lora"?'),
    "no file": (["--data", "nope.csv", "--model", "m"], "nope.csv: no such file: give a file"),
    "kind": (["--data", "support.csv", "--model", "m", "--kind", "classify"], "--kind = 'classify': should be"),
    "field": (["--data", "support.csv", "--model", "m", "--input", "txt", "--target", "label"], 'did you mean "text"?'),
    "number": (["--data", "support.csv", "--model", "m", "--kind", "regression"], 'row 1: target = "low" is no number'),
    "no such model": (["--data", "support.csv", "--model", "no/such"], "no/such could not be obtained"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_line_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    csv(tmp_path / "support.csv")
    given, said = WRONG[case]
    assert rankwise("compare", *given) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["support.csv"]


# -- [[data]] --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_trains_on_several_files_beside_it_and_its_copy_finds_them(tmp_path, model, monkeypatch):
    file = written(tmp_path / "study", model)
    monkeypatch.chdir(tmp_path)
    assert rankwise("compare", Path("study/mine.toml"), "--out", "runs/mine") == 0
    results = [json.loads(path.read_text()) for path in Path("runs/mine").glob("*/result.json")]
    scores = {result["task"]: list(result["metrics"]["test"]) for result in results}
    assert scores == {"support": ["accuracy", "macro_f1"], "stars": ["r2", "mae"]}
    copy = Path("runs/mine/study.toml").read_text()
    assert "# a comment that stays" in copy and "# another" in copy and 'train = "../../study/data/support.csv"' in copy
    assert fingerprints(Path("runs/mine/study.toml"), tmp_path / "x") == fingerprints(file, tmp_path / "x")
    assert config.read(Path("runs/mine/study.toml")).name == "mine"
    report = Path("runs/mine/report/report.md").read_text()
    assert "reading text as the input, label as its class; classification with 3 labels" in report
    assert "rows are longer than max_length = 8 tokens" in report.replace("\\_", "_")
    assert "standardised by the training rows' mean" in report


def test_the_same_data_gives_the_same_runs_and_other_data_or_another_reading_others(tmp_path, model):
    base = fingerprints(written(tmp_path / "a", model), tmp_path / "runs")
    moved = written(tmp_path / "b", model, STUDY.replace("data/", "./data/"))
    assert fingerprints(moved, tmp_path / "runs") == base
    (tmp_path / "b" / "data" / "support.csv").write_text((tmp_path / "a/data/support.csv").read_text() + "a b c,low\n")
    after = fingerprints(moved, tmp_path / "runs")
    assert after["stars"] == base["stars"] and after["support"] != base["support"]
    relabelled = (tmp_path / "a/data/support.csv").read_text().replace(",low", ",lower")
    (tmp_path / "b" / "data" / "support.csv").write_text(relabelled)
    assert fingerprints(moved, tmp_path / "runs")["support"] != base["support"]
    scored = written(tmp_path / "c", model, STUDY.replace('["r2", "mae"]', '["pearson", "mae"]'))
    assert fingerprints(scored, tmp_path / "runs")["stars"] != base["stars"]


def test_a_target_changed_in_its_last_digit_is_other_data(tmp_path):
    rows = [{"text": " ".join(text), "label": i / 7} for i, text in enumerate(words(40))]
    before = task(tmp_path, rows).data_hash()
    rows[3]["label"] += 1e-9
    assert task(tmp_path, rows).data_hash() != before


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('train = "data/stars.jsonl"', 'train = "data/star.jsonl"', r"data/star\.jsonl: no such file"),
        ('name = "stars"', 'name = "support"', r'two \[\[data\]\] are called "support": give one of them another name'),
        ('name = "stars"', 'name = "sarcasm"', r'data "sarcasm": a task that comes with Rankwise has this name'),
        ("quick = true", 'quick = true\ntasks = ["support"]', r'data "stars" has no effect, because tasks does not name it'),
        ("quick = true", 'quick = true\ntasks = ["supprt", "stars", "support"]', r'no task "supprt"'),
        ('["r2", "mae"]', '["r22"]', r'data "stars": metrics: "r22" is no metric of this kind; did you mean "r2"'),
        ('["r2", "mae"]', '["mae", "r2"]', r"methods cannot be compared by mae: name one of .* before it"),
        ('["r2", "mae"]', '["r2", "r2"]', r"r2, r2 has one twice: take it out"),
        ('input = "headline"', 'inptu = "headline"', r'mine\.toml\.data\[1\]\.inptu: unknown setting; did you mean "input"'),
        ('input = "headline"', 'input = ""', r"mine\.toml\.data\[1\]\.input: is empty: name a field"),
        ('target = "stars"', 'target = "star"', r'names the field "star", which is not there; did you mean "stars"'),
        ('train = "data/stars.jsonl"', "train = 3", r"mine\.toml\.data\[1\]\.train = 3: should be a valid string"),
        ('target = "stars"', 'target = "stars"\nkind = "generation"', r'"r2" is no metric of this kind; there are: exact'),
        (
            '["r2", "mae"]',
            '["METEOR"]\nkind = "generation"',
            r'"METEOR" is missing here: its script needs Java .*; there are: exact',
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_data_is_said_before_anything_runs(tmp_path, model, capsys, old, new, said):
    file = written(tmp_path, model, STUDY.replace(old, new))
    with pytest.raises(ValueError, match=said):
        checks.check(config.read(file))
    assert rankwise("compare", file, "--out", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists() and "Traceback" not in capsys.readouterr().err


def test_a_fault_in_a_study_of_own_data_is_said_in_clear_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "study", "m")
    shutil.copytree("study/data", "data")
    refused = 0
    for what, path, raw in variations(tomllib.loads(STUDY)):
        if path[:1] in (("data",), ("tasks",)):
            try:
                checks.check(config.parse(raw, default_name="file", where="file.toml"))
            except ValueError as error:
                refused += 1
                assert type(error) is ValueError
                assert clear(ValueError(str(error).replace("validation", "a part"))), (what, path)  # it is a key's name here
    assert refused > 100
    raw = tomllib.loads(STUDY)
    with pytest.raises(ValueError, match=r"file\.toml\.data = .*: should be a list of tables, \[\[data\]\]"):
        config.parse(changed(raw, ("data",), raw["data"][0]), default_name="file", where="file.toml")
    assert "give " in REMEDIES


def test_paths_are_relative_to_the_study_and_a_hub_id_stays(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.csv").touch()
    assert located("a/x.csv", tmp_path) == str(tmp_path / "a/x.csv")
    assert located("a/*.csv", tmp_path) == str(tmp_path / "a/*.csv")
    assert located("/b/x.csv", tmp_path) == "/b/x.csv"
    assert located("owner/name:part", tmp_path) == "owner/name:part"
    assert located("owner/name-v1.1", tmp_path) == "owner/name-v1.1"
    assert located("owner/name.csv", tmp_path) == str(tmp_path / "owner/name.csv")


@pytest.mark.slow
def test_killed_and_begun_again_a_study_of_own_data_ends_with_the_same_bytes(tmp_path, model, cache):
    from tests.test_study import child

    file = written(tmp_path / "study", model, STUDY.replace("quick = true", "quick = true\ncheckpoint_seconds = 1e-6"))
    study = config.read(file)
    for out, kills in (("whole", []), ("cut", [(6, True), (11, False)])):
        for kill in [*kills, ()]:
            process = child(study, tmp_path / out, cache, *kill)
            process.join()
            assert (process.exitcode < 0) == bool(kill)
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


def test_an_adapter_of_own_data_has_a_head_for_its_labels(tmp_path, model):
    file = written(tmp_path, model)
    runner = Runner(config.read(file), tmp_path / "runs", device="cpu")
    runner.prepare()
    runner.run()
    rows = {}
    for path in (tmp_path / "runs").glob("*/adapter/*.safetensors"):
        with safe_open(path, framework="numpy") as opened:
            heads = [opened.get_slice(name).get_shape()[0] for name in opened.keys() if "classifier.weight" in name]  # noqa: SIM118
            rows[tasks.of_run(path.parent.parent, {"task": "glue/stsb"}).name] = None
            rows[path.parent.parent.name] = heads
    assert sorted(heads for name, heads in rows.items() if heads) == [[1], [3]]


@pytest.mark.slow
def test_a_finished_run_needs_its_data_for_the_knock_out_alone(tmp_path, model, capsys, monkeypatch):
    """Its labels are in its configuration, in exported models and in what it says of new texts."""
    text = STUDY.partition('[[data]]\nname = "stars"')[0] + STUDY[STUDY.index("[[methods]]") :]
    file = written(tmp_path / "study", model, text)
    assert rankwise("compare", file, "--out", tmp_path / "runs") == 0
    (run,) = (path.parent for path in (tmp_path / "runs").glob("*/result.json"))
    csv(tmp_path / "study/data/support.csv", 41)
    with pytest.raises(ValueError, match=r"support.csv: the data of \"support\" is no longer what .* was trained on"):
        knockout.of_run(run)
    (tmp_path / "study/data/support.csv").rename(tmp_path / "moved.csv")
    with pytest.raises(
        ValueError, match=r"support.csv: no such file.*say in .*study\.toml, under .*\"support\", where it is now"
    ):
        knockout.of_run(run)
    csv(tmp_path / "moved.csv")
    study = (tmp_path / "runs/study.toml").read_text()
    (tmp_path / "runs/study.toml").write_text(re.sub(r'train = ".*"', 'train = "../moved.csv"', study))
    assert knockout.of_run(run, rows=4)["rows"] == 4
    (tmp_path / "runs/study.toml").unlink()
    with pytest.raises(ValueError, match=r"run on a user's own data, .*no .*study\.toml says where that is"):
        knockout.of_run(run)
    assert rankwise("export", run, "--to", "merged", "--out", tmp_path / "merged") == 0
    exported = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert exported["id2label"] == {"0": "high", "1": "low", "2": "mid"}
    assert exported["label2id"] == {"high": 0, "low": 1, "mid": 2}
    capsys.readouterr()
    assert rankwise("generate", run, "--prompt", "a b c", "--prompt", "x y " * 9, "--json") == 0
    said = capsys.readouterr()
    first, second = (json.loads(line) for line in said.out.splitlines())
    assert "1 of 2 texts are longer than 8 tokens: the end is not read" in said.err
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for row in (first, second):
        given = tokenizer(row["prompt"], truncation=True, max_length=8, return_tensors="pt")
        shares = merged(**given).logits[0].softmax(-1).tolist()
        assert list(row["scores"].values()) == pytest.approx(shares, abs=1e-6) and list(row["scores"]) == ["high", "low", "mid"]
        assert row["label"] == max(row["scores"], key=row["scores"].get)


# -- tasks -----------------------------------------------------------------------------------------------------------------


def test_classes_are_numbered_in_the_order_of_their_names_and_each_part_has_its_share(tmp_path):
    rows = [{"text": " ".join(t), "label": "rare" if i % 10 == 0 else "often"} for i, t in enumerate(words(100))]
    one = task(tmp_path, rows)
    assert one.label_names == ("often", "rare") and one.num_labels == 2 and one.metric == "accuracy"
    for split, count in {"train": 80, "validation": 10, "test": 10}.items():
        labels = one.examples(split).labels
        assert len(labels) == count and labels.sum() == count // 10


def test_numbers_are_standardised_by_the_training_rows_and_errors_come_in_their_own_unit(tmp_path):
    rows = [{"text": " ".join(t), "label": 1000 + 30 * i / 7} for i, t in enumerate(words(60))]
    one = task(tmp_path, rows, metrics=["pearson_spearman", "mae", "rmse", "r2"])
    train, test = one.examples("train").labels, one.examples("test").labels
    assert abs(train.mean()) < 1e-6 and abs(train.std() - 1) < 1e-6
    deviation = np.std([row["label"] for row in rows])
    found = one.metrics(test + 0.1 * (-1.0) ** np.arange(len(test)), test)
    assert found["mae"] == pytest.approx(0.1 * deviation, rel=0.2) and found["rmse"] == pytest.approx(found["mae"], rel=1e-5)
    assert found["pearson_spearman"] > 90 and found["r2"] > 90 and next(iter(found)) == "pearson_spearman"
    assert one.standard_error(test + 0.1, test) >= 0


def test_bio_tags_are_scored_by_entities_and_others_by_words(tmp_path):
    tags = ["O", "B-ORG", "I-ORG", "B-PER"]
    rows = [{"tokens": t, "tags": [tags[(i + j) % 4] for j in range(len(t))]} for i, t in enumerate(words(40, 4))]
    one = task(tmp_path, rows)
    assert one.label_names == ("O", "B-ORG", "I-ORG", "B-PER", "I-PER") and one.metric == "f1"
    truth = [np.array(labels) for labels in one.examples("test").labels]
    assert one.metrics(truth, truth) == {"f1": 100, "precision": 100, "recall": 100}
    rows = [{"tokens": row["tokens"], "tags": [tag.replace("-", "_") for tag in row["tags"]]} for row in rows]
    two = task(tmp_path, rows)
    assert two.label_names == ("B_ORG", "B_PER", "I_ORG", "O") and two.metric == "macro_f1"
    wrong = [(labels + (np.arange(len(labels)) == 0)) % 4 for labels in truth]
    assert 0 < two.metrics(wrong, truth)["macro_f1"] < 100 and two.standard_error(wrong, truth) > 0
    with pytest.raises(ValueError, match='"f1" is not for these labels'):
        task(tmp_path, rows, metrics=["f1"])


def test_words_and_labels_of_unequal_numbers_are_a_fault(tmp_path):
    rows = [{"tokens": ["a", "b"], "tags": ["X", "Y"]}] * 12 + [{"tokens": ["a", "b"], "tags": ["X"]}]
    with pytest.raises(ValueError, match=r"row 13: 1 labels for 2 words: give one for each"):
        task(tmp_path, rows)
    with pytest.raises(ValueError, match=r"row 1: the words should be a list of texts"):
        task(tmp_path, [{"tokens": "a b", "tags": ["X", "Y"]}] * 12)


def test_answers_are_where_they_are_said_to_be(tmp_path):
    rows = [{"question": "q", "context": f"{i} the end", "answers": {"text": ["the"], "answer_start": [len(f"{i} ")]}}
            for i in range(20)]  # fmt: skip
    one = task(tmp_path, rows)
    assert one.kind == "span" and one.metric == "f1" and one.examples("test").answers == [("the",)] * 2
    named = [{"q": "q", "context": f"{i} the end", "a": "end"} for i in range(20)]
    two = task(tmp_path, named, kind="span", input="q", target="a")
    assert two.examples("test").labels[0].tolist() == [two.examples("test").second[0].index("end")]
    rows[7]["answers"]["answer_start"] = [0]
    with pytest.raises(ValueError, match='the answer "the" is not in the context at its place: mend it'):
        task(tmp_path, rows)


def test_rows_that_are_cut_are_counted_to_the_token(tmp_path, model):
    from rankwise.experiments import models

    tokenizer = models.tiny_tokenizer()
    rows = [{"text": " ".join("a" * (4 + i % 4)), "label": str(i % 2)} for i in range(40)]
    one = task(tmp_path, rows)
    lengths = kinds.get(one.kind).whole_lengths(one.examples("train"), tokenizer)
    assert set(lengths) == {6, 7, 8, 9} or set(np.diff(sorted(set(lengths)))) == {1}
    for most in (8, 9):
        said = one.cut("train", one.encode(tokenizer, "train", most), tokenizer, most)
        longer = int((lengths > most).sum())
        assert (said is None) == (longer == 0)
        assert said is None or f"train: {longer} of 32 rows are longer than max_length = {most} tokens" in said


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ("classification", "regression") for name in own_kinds.KINDS[kind].metrics],
)
def test_a_metric_is_scikit_learn_s_and_its_resamples_are_those_of_the_rows(kind, name):
    draw = np.random.default_rng(0)
    one = own_kinds.KINDS[kind].metrics[name]
    if kind == "classification":
        classes = 2 if one.two_labels else 4
        true = draw.integers(classes, size=50)
        predicted = np.where(draw.random(50) < 0.6, true, draw.integers(classes, size=50))
    else:
        true = draw.normal(size=50)
        predicted = true + draw.normal(size=50)
    found = one.values(predicted, true)[name]
    theirs = {
        "accuracy": lambda: 100 * sklearn_metrics.accuracy_score(true, predicted),
        "macro_f1": lambda: 100 * sklearn_metrics.f1_score(true, predicted, average="macro"),
        "weighted_f1": lambda: 100 * sklearn_metrics.f1_score(true, predicted, average="weighted"),
        "balanced_accuracy": lambda: 100 * sklearn_metrics.balanced_accuracy_score(true, predicted),
        "matthews": lambda: 100 * sklearn_metrics.matthews_corrcoef(true, predicted),
        "f1": lambda: 100 * sklearn_metrics.f1_score(true, predicted),
        "r2": lambda: 100 * sklearn_metrics.r2_score(true, predicted),
        "mae": lambda: sklearn_metrics.mean_absolute_error(true, predicted),
        "rmse": lambda: sklearn_metrics.root_mean_squared_error(true, predicted),
    }
    assert name not in theirs or found == pytest.approx(theirs[name]())
    if one.resampled is not None:
        weights = metrics.resample_weights(50)[:3]
        by_hand = [one.values(*(np.repeat(x, w) for x in (predicted, true)))[name] for w in weights]
        assert one.resampled(predicted, true, weights) == pytest.approx(by_hand)
        assert one.resampled(predicted, true, np.ones((1, 50), int)) == pytest.approx([found])


def test_the_page_about_own_data_shows_a_study_and_every_kind():
    page = Path(own_tasks.__file__).with_name("own_data.md").read_text(encoding="utf-8")
    study = config.parse(tomllib.loads(page.partition("```toml\n")[2].partition("```")[0]), default_name="page")
    assert study.tasks == ["support"] and study.data[0].input == "{subject}\n{body}"
    assert re.findall(r"^\| ([a-z-]+) \|", page, re.M)[1:] == list(own_kinds.KINDS)


def test_list_names_the_kinds_and_their_fields(capsys):
    assert rankwise("list") == 0
    shown = capsys.readouterr().out
    assert "\nkinds\n" in shown and "token-classification  fields tokens, a list" in shown
